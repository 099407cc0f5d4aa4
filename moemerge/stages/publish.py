"""Stage `publish`: a repository folder with model, card and plots; on request, pushed to a hub."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from moemerge.artifacts.disk import link_or_copy
from moemerge.artifacts.hub import bounded_hub, words_of
from moemerge.artifacts.json_file import write_json
from moemerge.artifacts.stage import Draft, stage
from moemerge.artifacts.verify import verify_folder
from moemerge.artifacts.weight_files import WEIGHTS
from moemerge.errors import ArtifactError, MoemergeError, OptionError
from moemerge.evaluation.model_card import find_evaluation, home_of, make_card
from moemerge.models.folder import REPLACED_ON_LOADING, TOKENIZER_FILES
from moemerge.options.publish import Publish
from moemerge.stages import OPTIONS

T = TypeVar("T")

MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
PLACES = {*REPLACED_ON_LOADING, "_name_or_path"}
# What an earlier push may have left behind and the new model must not be mixed with.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "plots/*")

log = logging.getLogger(__name__)


class HubError(MoemergeError):
    """The hub refused the push, or cannot be reached."""


@stage("publish", Publish)
def publish(options: Publish, draft: Draft) -> None:
    """Write the repository: model files (weights linked, not copied, where the disk allows), card and plots.

    Without `push` nothing is sent: results say what would be. With `push` and `yes` the repository is made if
    there is none, private unless `public`, and the files go up in one commit; with `push` alone nothing is
    sent or written, and the error says what would have been. Raises OptionError for that, for a bad or
    missing repo name, an endpoint with a password in it, and a public repository that was to be private;
    ArtifactError for a folder that no stage wrote as a model or that is not as it was written; HubError for
    what the hub refuses.
    """
    _check_target(options)
    _refuse_damaged(home_of(Path(options.model)))
    card = make_card(options, OPTIONS)
    card.save(draft.folder / "README.md")
    _stage_model(Path(options.model), draft.folder)
    if options.evaluation:
        _stage_plots(Path(options.model), options.evaluation, draft.folder)
    sizes = {
        p.relative_to(draft.folder).as_posix(): p.stat().st_size
        for p in sorted(draft.folder.rglob("*"))
        if p.is_file()
    }
    draft.results |= {
        "repo": options.repo,
        "visibility": _visibility(options),
        "files": sizes,
        "bytes": sum(sizes.values()),
        "pushed": options.push,
    }
    shown = _shown(options, sizes, card)
    _ask_for_yes(options, shown)
    log.info("%s:\n%s", "pushing" if options.push else "nothing is sent; push would send", shown)
    if options.push:
        draft.results["url"] = push_folder(draft.folder, str(options.repo), options.public, options.endpoint)
        log.info("pushed to %s", draft.results["url"])


def _shown(options: Publish, sizes: dict[str, int], card: ModelCard) -> str:
    """What is to be pushed where: target, visibility, files with sizes, and the card's metadata."""
    where = (
        f"{options.repo or 'a repository still to be named'} ({'public' if options.public else 'private'})"
    )
    files = [f"{size / 1e6:12,.3f} MB  {name}" for name, size in sizes.items()]
    total = f"{sum(sizes.values()) / 1e6:12,.3f} MB  in {len(sizes)} files"
    metadata = [f"  {line}" for line in card.data.to_yaml().splitlines()]
    return "\n".join([f"to {where}", *files, total, "card:", *metadata])


def _visibility(options: Publish) -> str:
    return "public" if options.public else "private"


def _ask_for_yes(options: Publish, shown: str) -> None:
    if options.push and not options.yes:
        raise OptionError(
            "not pushed: this push is not confirmed",
            given=f"push without yes, {shown}",
            expected="yes, once you have seen what would be pushed",
            fix="add --yes (yes=True) to push this; leave push out to only write it, card included",
        )


def _check_target(options: Publish) -> None:
    if options.endpoint and urlsplit(options.endpoint).username is not None:
        raise OptionError(
            "the endpoint holds a user name or password",
            given="an address with @, not repeated here",
            expected="https://HOST, because options are written into manifests",
            fix="leave it out of the endpoint: the hub's token belongs into HF_TOKEN",
        )
    fault = options.missing_repo()
    if fault is not None:
        raise fault
    try:
        if options.repo is not None:
            validate_repo_id(options.repo)
    except HFValidationError as error:
        raise OptionError(
            "no repository to push to",
            given=f"{options.repo!r}: {error}",
            expected="owner/name",
            fix="set repo to the name that the model should have on the hub",
        ) from error


def _refuse_damaged(folder: Path) -> None:
    faults = verify_folder(folder)
    if faults:
        raise ArtifactError(
            f"{folder} is not as it was written",
            given="; ".join(f"{fault.file} {fault.what}: {fault.found}" for fault in faults[:3]),
            expected="the files of its manifest, with the checksums that stand there",
            fix="see moemerge verify; remove what was added, or run the stage that wrote the folder again",
        )


def _stage_model(model: Path, folder: Path) -> None:
    for path in sorted(model.rglob("*")):
        name = path.relative_to(model).as_posix()
        if path.is_file() and any(fnmatch(name, pattern) for pattern in MODEL_FILES):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # Whoever edits a small file here must not change the one that it was published from.
            put = link_or_copy if path.suffix == WEIGHTS else shutil.copyfile
            put(path, folder / name)
            if path.name in (*TOKENIZER_FILES, "config.json"):
                _without_places(folder / name)


def _without_places(file: Path) -> None:
    """Take out of a JSON file where somebody's model or tokenizer lay: older versions saved that."""
    text = file.read_text(encoding="utf-8")
    places: list[str] = []

    def kept(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        places.extend(key for key, _ in pairs if key in PLACES)
        return {key: value for key, value in pairs if key not in PLACES}

    values = json.loads(text, object_pairs_hook=kept)
    if places:
        write_json(file, values)


def _stage_plots(model: Path, evaluation: str, folder: Path) -> None:
    shown = find_evaluation(model, evaluation)
    (folder / "plots").mkdir()
    for plot in shown.plots:
        shutil.copy2(plot, folder / "plots" / plot.name)


def push_folder(folder: Path, repo: str, public: bool, endpoint: str | None = None) -> str:
    """Upload all of `folder` to the model repository `repo`, making it if needed; returns its address.

    All is sent before one commit shows it. What a broken push has sent already is not sent again. Weights and
    plots of an earlier push that are not in `folder` are deleted by the commit. A repository that exists
    keeps its visibility: a public one is refused unless `public`; one that someone else writes to meanwhile
    is left as it is. Raises OptionError, HubError.
    """
    api = HfApi(endpoint=endpoint)
    url = _ask(repo, api.endpoint, lambda: api.create_repo(repo, private=not public, exist_ok=True))
    there = _ask(repo, api.endpoint, lambda: api.model_info(repo))
    if not public and not there.private:
        raise OptionError(
            "the repository is public already",
            given=repo,
            expected="a private repository, because public is off",
            fix="set public: true to publish there, or choose another repo",
        )
    _ask(
        repo,
        api.endpoint,
        lambda: api.create_commit(
            repo,
            _operations(folder, [file.rfilename for file in there.siblings or []]),
            commit_message="Publish with moemerge",
            parent_commit=there.sha,
        ),
    )
    return str(url)


def _operations(folder: Path, there: list[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Add every file of `folder`; delete what is `there` of an earlier model and not replaced."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    old = [
        name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in REPLACED)
    ]
    adds = [CommitOperationAdd(name, path) for name, path in files.items()]
    return [*adds, *(CommitOperationDelete(name) for name in old)]


def _ask(repo: str, endpoint: str, request: Callable[[], T]) -> T:
    """Make one request; whatever goes wrong becomes a HubError with a remedy."""
    try:
        with bounded_hub():
            return request()
    except Exception as error:  # an answer that makes no sense can raise anything
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        reason = f"HTTP status {status}" if status else type(cause).__name__
        raise HubError(
            f"the push to {repo} failed",
            given=f"{reason}: {words_of(cause)}",
            expected=f"the hub at {endpoint} to take it",
            fix=_remedy(status),
        ) from None


def _remedy(status: Any) -> str:
    return {
        401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
        403: "use a token that may write to this owner's repositories",
        404: "check the owner's name, and that your token may see the repository",
        409: "choose another repo, or try again when no one else is writing to it",
        412: "someone else wrote to the repository meanwhile: look at it, then run publish again",
        429: "wait: the hub limits how often it is asked; then run publish again, what was sent stays sent",
    }.get(
        status,
        "check the network, the endpoint and that HF_HUB_OFFLINE is not set, then run publish again: "
        "what was sent stays sent",
    )
