"""Taking secrets out of what is written down: passwords in addresses, and access tokens."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
SECRETS = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # user:password@ in an address
    re.compile(
        r"(?<=[?&;])((?:[\w-]*(?:token|secret|password|passwd|signature|credential|api[_-]?key))|sig|key)=[^&\s\"'#]+",
        re.IGNORECASE,
    ),
    re.compile(r"(?<![\w-])(?:(?:hf|ghp|gho|ghs)_|sk-(?:proj-|ant-)?)[A-Za-z0-9]{20,}"),
    re.compile(r"(?<![\w-])(?:github_pat_|glpat-)[\w-]{20,}|(?<!\w)AKIA[0-9A-Z]{16}(?!\w)"),
)


def redact(text: str) -> str:
    """`text` with passwords and tokens replaced by ***."""
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
