"""Stage `publish`: a repository folder with model, card and plots; on request, pushed to a hub."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from moemerge.artifacts import Draft, stage
from moemerge.card import find_evaluation, make_card
from moemerge.errors import MoemergeError, OptionError
from moemerge.recipe import Publish

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
)
# What an earlier push may have left behind and the new model must not be mixed with.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "plots/*"]

log = logging.getLogger(__name__)


class HubError(MoemergeError):
    """The hub refused the push, or cannot be reached."""


@stage("publish", Publish)
def publish(options: Publish, draft: Draft) -> None:
    """Write the repository: model files (linked, not copied, where the disk allows), card and plots.

    Without `push` nothing is sent: results say what would be. With it the repository is made if there is
    none, private unless `public`, and the files go up in one commit. Raises OptionError for a bad or missing
    repo name and for a public repository that was to be private, ArtifactError for a folder that is no
    merged or trained model, HubError for what the hub refuses.
    """
    _check_repo(options)
    make_card(options).save(draft.folder / "README.md")
    _stage_model(Path(options.model), draft.folder)
    if options.evaluation:
        _stage_plots(Path(options.model), options.evaluation, draft.folder)
    sizes = {
        str(p.relative_to(draft.folder)): p.stat().st_size
        for p in sorted(draft.folder.rglob("*"))
        if p.is_file()
    }
    draft.results |= {
        "repo": options.repo,
        "visibility": "public" if options.public else "private",
        "files": sizes,
        "bytes": sum(sizes.values()),
        "pushed": options.push,
    }
    if options.push:
        draft.results["url"] = push_folder(draft.folder, str(options.repo), options.public, options.endpoint)
    log.info(
        "%s %d files, %.1f MB, to %s (%s)",
        "pushed" if options.push else "nothing sent; with push: true would push",
        len(sizes),
        sum(sizes.values()) / 1e6,
        options.repo or "a repository still to be named",
        draft.results["visibility"],
    )


def _check_repo(options: Publish) -> None:
    try:
        if options.repo is not None:
            validate_repo_id(options.repo)
        if options.repo is not None or not options.push:
            return
        given = "push without repo"
    except HFValidationError as error:
        given = f"{options.repo!r}: {error}"
    raise OptionError(
        "no repository to push to",
        given=given,
        expected="owner/name",
        fix="set repo to the name that the model should have on the hub",
    )


def _stage_model(model: Path, folder: Path) -> None:
    for path in sorted(model.rglob("*")):
        name = path.relative_to(model).as_posix()
        if path.is_file() and any(fnmatch(name, pattern) for pattern in MODEL_FILES):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _link(path, folder / name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def _stage_plots(model: Path, evaluation: str, folder: Path) -> None:
    found = find_evaluation(model, evaluation)
    (folder / "plots").mkdir()
    for plot in found.report["plots"]:
        shutil.copy2(found.folder / plot, folder / "plots" / plot)


def push_folder(folder: Path, repo: str, public: bool, endpoint: str | None = None) -> str:
    """Upload all of `folder` to the model repository `repo`, making it if needed; returns its address.

    Weights and plots of an earlier push that are not in `folder` are deleted there. A repository that
    exists keeps its visibility: a public one is refused unless `public`. Raises OptionError, HubError.
    """
    api = HfApi(endpoint=endpoint)
    url = _ask(repo, api.endpoint, lambda: api.create_repo(repo, private=not public, exist_ok=True))
    if not public and not _ask(repo, api.endpoint, lambda: api.model_info(repo)).private:
        raise OptionError(
            "the repository is public already",
            given=repo,
            expected="a private repository, because public is off",
            fix="set public: true to publish there, or choose another repo",
        )
    _ask(
        repo,
        api.endpoint,
        lambda: api.upload_folder(
            repo_id=repo, folder_path=folder, delete_patterns=REPLACED, commit_message="Publish with moemerge"
        ),
    )
    return str(url)


def _ask(repo: str, endpoint: str, request: Callable[[], T]) -> T:
    """Make one request; whatever goes wrong becomes a HubError with a remedy."""
    try:
        return request()
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise HubError(
            f"the push to {repo} failed",
            given=_reason(error, status),
            expected=f"the hub at {endpoint} to take it",
            fix=_remedy(status),
        ) from error


def _reason(error: Exception, status: int | None) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return f"HTTP status {status}: {text}" if status else f"{type(error).__name__}: {text}"


def _remedy(status: Any) -> str:
    return {
        401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
        403: "use a token that may write to this owner's repositories",
        404: "check the owner's name, and that your token may see the repository",
        409: "choose another repo, or try again when no one else is writing to it",
        429: "wait: the hub limits how often it is asked",
    }.get(
        status, "check the network, the endpoint and that HF_HUB_OFFLINE is not set, then run publish again"
    )
