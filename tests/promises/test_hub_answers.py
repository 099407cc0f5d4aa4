"""A hub that answers nonsense, without end or never, asks for long waits, or repeats the token."""

from __future__ import annotations

import gzip
import logging
import re
import socket
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from hub_server import Hub, Trouble, serve
from tiny_models import save_dense

from moemerge.artifacts import hub as module
from moemerge.artifacts.hub import NOT_REPEATED, bounded_hub, words_of
from moemerge.artifacts.redaction import holds_piece_of
from moemerge.errors import CheckpointError, MoemergeError
from moemerge.models.folder import ModelFolder
from moemerge.stages.publish import push_folder

TOKEN = "hf_Qx7mZ2kLp9RvT4wYb8NcJd5GsH3f"
CALLS = ["POST /api/repos/create", "GET /api/models/.*", "POST .*/preupload/main", "POST .*/objects/batch"]
CALLS += ["POST .*/commit/main"]
Send = Callable[[], str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serve(TOKEN) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that are waited between tries, which take no time here."""
    asked: list[float] = []
    monkeypatch.setattr("time.sleep", asked.append)
    return asked


@pytest.fixture
def send(hub: Hub, tmp_path: Path, waits: list[float]) -> Send:
    save_dense(tmp_path / "rm")
    return lambda: push_folder(tmp_path / "rm", "me/rm", False, hub.url)


NONSENSE = [b"", b"nonsense", b"\xff\xfe\x00", b"null", b"[]", b"[[1]]", b'"x"', b"5", b"[" * 100_000]
NONSENSE += [b'{"url": 5, "files": 5, "objects": 5, "siblings": 5, "id": [], "sha": {}}']
NONSENSE += [
    b'{"files": [{"path": 1}], "objects": [{}], "siblings": [{}, 1], "private": "no", "commitUrl": 1}'
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("answer", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_one_error_and_nothing_is_shown(call: str, answer: bytes, send: Send, hub: Hub) -> None:
    hub.troubles = [Trouble(call, answer=answer)]
    with pytest.raises(MoemergeError):
        send()
    assert all(repo.files == {} for repo in hub.repos.values())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_an_answer_without_end_is_not_read_to_its_end(
    call: str, packed: bool, send: Send, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 50_000)
    answer = b'{"x": "' + b"a" * 30_000_000 + b'"}'
    headers = {"Content_Encoding": "gzip"} if packed else {}
    hub.troubles = [Trouble(call, answer=gzip.compress(answer) if packed else answer, headers=headers)]
    with pytest.raises(MoemergeError, match="EndlessAnswer: an answer without end, [0-9]+ bytes") as caught:
        send()
    (read,) = re.findall("([0-9]+) bytes", str(caught.value))
    assert int(read) < 2_000_000


@pytest.mark.parametrize("call", CALLS)
def test_a_hub_that_never_answers_is_given_up(
    call: str, send: Send, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    hub.troubles = [Trouble(call, answer=b"{}", pause=2.0)]
    with pytest.raises(MoemergeError, match="ReadTimeout"):
        send()


def test_an_answer_that_trickles_is_given_up(send: Send, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER_SECONDS", -1.0)
    with pytest.raises(MoemergeError, match="an answer without end"):
        send()


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry_After": "999999999"},
        {"Retry_After": "9" * 5000},
        {"RateLimit": '"api";r=0;t=99999999'},
        {"RateLimit": f'"api";r=0;t={"9" * 5000}'},
    ],
    ids=["after", "after many digits", "limit", "limit of many digits"],
)
def test_a_hub_is_not_obeyed_that_asks_for_an_endless_wait(
    headers: dict[str, str], send: Send, hub: Hub, waits: list[float]
) -> None:
    hub.troubles = [Trouble("POST .*/objects/batch", 429, answer=b"{}", headers=headers)]
    with pytest.raises(MoemergeError, match="HTTP status 429"):
        send()
    assert waits and max(waits) <= module.LONGEST_WAIT


def test_a_short_wait_is_obeyed(send: Send, hub: Hub, waits: list[float]) -> None:
    hub.troubles = [
        Trouble("POST .*/objects/batch", 429, answer=b"{}", headers={"Retry_After": "42"}, times=1)
    ]
    send()
    assert max(waits) >= 42


@pytest.mark.parametrize("answer", NONSENSE, ids=range(len(NONSENSE)))
def test_a_model_of_a_hub_that_talks_nonsense_cannot_be_found(
    answer: bytes, hub: Hub, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.troubles = [Trouble("GET /api/.*", answer=answer)]
    with pytest.raises(CheckpointError, match="the model cannot be found: me/rm"):
        ModelFolder("me/rm").folder  # noqa: B018
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_users_own_client_is_used_and_left_as_it_was() -> None:
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def own():  # type: ignore[no-untyped-def]
        client = default_client_factory()
        client.headers["x-mine"], client.timeout = "yes", 7.0
        return client

    set_client_factory(own)
    try:
        with bounded_hub():
            assert get_session().headers["x-mine"] == "yes" and get_session().timeout.read == 7.0
            assert get_session().event_hooks["response"]
        assert get_session().headers["x-mine"] == "yes" and not get_session().event_hooks["response"]
        assert len(get_session().event_hooks["request"]) == len(own().event_hooks["request"])
    finally:
        set_client_factory(default_client_factory)


def test_what_the_hub_library_logs_is_said_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import logging as theirs

    log, spoken = theirs.get_logger("huggingface_hub.test"), []
    handler = logging.Handler()
    handler.emit = lambda record: spoken.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.root, "handlers", [handler])  # not what other tests have left there
    before = logging.getLogger("huggingface_hub").handlers
    with bounded_hub():
        log.warning("Retrying in 1s")
    assert spoken == ["Retrying in 1s"] and capfd.readouterr().err == ""
    assert logging.getLogger("huggingface_hub").handlers is before


# The token in disguise

DISGUISED = {
    "plain": TOKEN,
    "in pieces": f"{TOKEN[:12]} and then {TOKEN[12:]}",
    "a third": TOKEN[10:20],
    "spaced": " ".join(TOKEN),
    "base64": b64encode(f"Authorization: Bearer {TOKEN}".encode()).decode(),
    "base64, shifted": b64encode(f"A: Bearer {TOKEN}!".encode()).decode(),
    "base64, shifted again": b64encode(f"AB: Bearer {TOKEN}!".encode()).decode(),
    "percent": "".join(f"%{byte:02x}" for byte in TOKEN.encode()),
    "percent twice": quote("".join(f"%{byte:02X}" for byte in TOKEN.encode())),
    "html": "".join(f"&#{byte};" for byte in TOKEN.encode()),
    "hex": TOKEN.encode().hex(),
    "reversed": TOKEN[::-1],
    "upper case": TOKEN.upper(),
}


@pytest.mark.parametrize("words", DISGUISED.values(), ids=DISGUISED)
def test_no_form_of_the_token_is_repeated(words: str, send: Send, hub: Hub) -> None:
    hub.troubles = [Trouble("POST .*", 403, answer=f'{{"error": "refused {words} here"}}'.encode())]
    with pytest.raises(MoemergeError, match="HTTP status 403") as caught:
        send()
    said = str(caught.value)
    assert not holds_piece_of(TOKEN, said)
    assert NOT_REPEATED in said or ("refused" in said and "***" in said)


def test_what_a_hub_says_is_told_where_it_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    harmless = (
        "You have exceeded your private storage limit of 100 GB: https://huggingface.co/settings/billing"
    )
    assert words_of(ValueError(harmless)) == harmless
    assert words_of(ValueError("x" * 1000)) == "x" * 300
    monkeypatch.delenv("HF_TOKEN")
    assert words_of(ValueError("plain words")) == "plain words"


def test_without_network_the_hub_is_not_asked_again_and_again(
    hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that has no address says at once that there is no network."""

    def nowhere(host: str, *_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(module, "getproxies", dict)
    monkeypatch.setattr(module.socket, "getaddrinfo", nowhere)
    with pytest.raises(CheckpointError) as fault:
        ModelFolder("owner/model")
    assert "there is no network, or no host" in fault.value.given and not waits
