"""Taking secrets out of what is written down: passwords in addresses, and access tokens."""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
PIECE = 6  # characters of a token that nobody writes by chance
SECRETS = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # user:password@ in an address
    re.compile(
        r"(?<=[?&;])((?:[\w-]*(?:token|secret|password|passwd|signature|credential|api[_-]?key))|sig|key)=[^&\s\"'#]+",
        re.IGNORECASE,
    ),
    re.compile(r"(?<![\w-])(?:(?:hf|ghp|gho|ghs)_|sk-(?:proj-|ant-)?)[A-Za-z0-9]{20,}"),
    re.compile(r"(?<![\w-])(?:github_pat_|glpat-)[\w-]{20,}|(?<!\w)AKIA[0-9A-Z]{16}(?!\w)"),
)


def redact(text: str, token: str | None = None) -> str:
    """`text` with passwords and tokens, and `token` whatever its form, replaced by ***."""
    text = text.replace(token, HIDDEN) if token else text
    for secret in SECRETS:
        text = secret.sub(lambda match: f"{match[1]}={HIDDEN}" if match.re.groups else HIDDEN, text)
    return text


def redacted(value: Any) -> Any:
    """JSON values with every text in them redacted, keys included."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def holds_piece_of(token: str | None, text: str) -> bool:
    """Whether `text` holds PIECE characters in a row of `token`: plain, reversed, in base64 or hex, escaped
    for addresses or HTML, or with other signs in between."""
    if not token:
        return False
    plain = _bare(html.unescape(unquote(unquote(text))))
    spellings = (_bare(spelling) for spelling in _spellings(token))
    return any(s[at : at + PIECE] in plain for s in spellings for at in range(len(s) - PIECE + 1))


def _spellings(token: str) -> Iterator[str]:
    """Its secret part, and all of it as it stands in the middle of longer texts in other codes."""
    _, _, secret = token.rpartition("_")
    yield from (secret, secret[::-1], token.encode().hex())
    # Of each group of four signs one that stands for bytes of the token alone: the first and last do not.
    for before in range(3):
        yield b64encode(b"\0" * before + token.encode()).decode()[4:-4]


def _bare(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
