"""Checks around mergekit's merges by our methods: before anything is written, and before the result is kept.

mergekit ends well when it has lost the head, read another model's shards or copied no tokenizer. Merges by
other methods are left as they are.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from moemerge.artifacts.disk import parents
from moemerge.errors import ArtifactError, CheckpointError, OptionError
from moemerge.models.checkpoint import Checkpoint, copy_side_files
from moemerge.models.folder import ModelFolder

SEPARATORS = set("@+")


def guarded(run_merge: Callable[..., None], methods: tuple[str, ...]) -> Callable[..., None]:
    """mergekit's `run_merge`, checked where the configuration's method is one of `methods`.

    The models must be reward models that go together; the result is written beside its place, checked, and
    put there when it is whole. Raises MoemergeErrors of all kinds, and what mergekit raises.
    """

    def run(merge_config: Any, out_path: str, options: Any, config_source: str | None = None) -> None:
        if merge_config.merge_method not in methods:
            run_merge(merge_config, out_path, options=options, config_source=config_source)
            return
        with whole(Path(out_path)) as draft:
            base = _check_models(merge_config, options)
            run_merge(_plainly_local(merge_config), str(draft), options=options, config_source=config_source)
            _check_result(draft, base, merge_config, options)

    return run


@contextmanager
def whole(output: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `output` if all goes well, else leaves nothing.

    Raises ArtifactError if `output` holds anything: old shards would pass for the new model's.
    """
    output = output.resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArtifactError(
            "output exists already",
            given=str(output),
            expected="a folder that does not exist yet, or an empty one",
            fix="choose another output, or remove this one",
        )
    with parents(output):
        home = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
        try:
            yield home / output.name
            if output.exists():
                output.rmdir()
            (home / output.name).rename(output)
        finally:
            shutil.rmtree(home, ignore_errors=True)


def our_documents(file: Path, methods: tuple[str, ...]) -> list[dict[str, Any]]:
    """The documents of a YAML file that merge by `methods`; none if it cannot be read: mergekit says so."""
    try:
        documents = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    return [d for d in documents if isinstance(d, dict) and d.get("merge_method") in methods]


def refuse_separators(document: Any, dicts_too: bool) -> None:
    """Raise OptionError for a model folder whose path has @ or +, which mergekit takes apart.

    Paths within {model: {path: ...}} are safe, but for mergekit-multi (`dicts_too`), which writes them out as
    text again.
    """
    for text, in_dict in _model_paths(document):
        if not SEPARATORS & set(text) or not Path(text).exists() or (in_dict and not dicts_too):
            continue
        link = "a symbolic link to the folder whose own path has neither"
        raise OptionError(
            "mergekit reads @ and + in a model's path as revision and LoRA",
            given=text,
            expected=link if dicts_too else "model: {model: {path: ...}}, which is taken as it is",
            fix=f"give {link}" if dicts_too else f'write {{model: {{path: "{text}"}}}}',
        )


def _model_paths(value: Any, key: str = "", in_dict: bool = False) -> Iterator[tuple[str, bool]]:
    if isinstance(value, dict):
        nested = key in ("model", "base_model")
        for name, item in value.items():
            yield from _model_paths(item, str(name), in_dict or nested)
    elif isinstance(value, list):
        for item in value:
            yield from _model_paths(item)
    elif isinstance(value, str) and key in ("model", "base_model", "path"):
        yield value, key == "path"


def _check_models(config: Any, options: Any) -> ModelFolder:
    """The base model, after a look at all of them."""
    from moemerge.models.guards import check_alike

    if config.base_model is None:
        raise OptionError(
            "no base_model: mergekit would draw at random which model gives config and tokenizer",
            given="base_model: nothing",
            expected="the model that is the shared expert",
            fix="write base_model",
        )
    others = [model for model in config.referenced_models() if model != config.base_model]
    models = [_check_model(model, options) for model in (config.base_model, *sorted(others, key=str))]
    if not _makes_tokenizer(config):
        check_alike([model.weights for model in models], dtypes=config.dtype is None)
    return models[0]


def _check_model(reference: Any, options: Any) -> ModelFolder:
    from moemerge.models.families import family_called
    from moemerge.models.guards import check_reward_model

    folder = reference.local_path(cache_dir=options.transformers_cache, ignore_lora=True)
    model = ModelFolder(folder)
    family_called(model.dense_type)
    check_reward_model(model)
    if model.config_json.get("quantization_config") is not None:
        raise CheckpointError(
            f"{folder}: a quantization_config over weights that are not quantised",
            given="quantization_config in config.json, which mergekit would put into the result",
            expected="a config.json of floating-point weights",
            fix="remove quantization_config from its config.json",
        )
    return model


def _makes_tokenizer(config: Any) -> bool:
    return bool(config.tokenizer_source or config.tokenizer)


def _plainly_local(config: Any) -> Any:
    """`config` with ./ before relative folders: mergekit's card asks the hub about runs/moe."""
    config = config.model_copy(deep=True)
    parts = [config, *(config.modules or {}).values()]
    slices = [s for part in parts for s in part.slices or []]
    members = [m for part in parts for m in part.models or []] + [m for s in slices for m in s.sources]
    for owner, field in [*((m, "model") for m in members), *((p, "base_model") for p in (config, *slices))]:
        reference = getattr(owner, field)
        if reference is not None and _bare(reference.model.path):
            path = reference.model.model_copy(update={"path": f"./{reference.model.path}"})
            setattr(owner, field, reference.model_copy(update={"model": path}))
    return config


def _bare(path: str) -> bool:
    return not path.startswith(("/", ".", "~")) and Path(path).is_dir()


def _check_result(draft: Path, base: ModelFolder, config: Any, options: Any) -> None:
    """The written folder is a reward model like the base, finite, and has the base's tokenizer."""
    from moemerge.models.guards import check_finite, check_reward_model

    written = check_reward_model(draft)
    if written.architectures != base.architectures:
        raise _not_whole(f"architectures: {written.architectures}", str(base.architectures))
    _check_dtypes(written.weights, base.weights, config.out_dtype or config.dtype)
    check_finite(written.weights)
    if options.copy_tokenizer and not _makes_tokenizer(config) and not config.chat_template:
        copy_side_files(base.folder, draft, replace=False)
        if not any(draft.glob("*token*")):
            raise CheckpointError(
                f"{base.folder} has no tokenizer to copy",
                given=", ".join(sorted(path.name for path in base.folder.iterdir())),
                expected="a base model with its tokenizer",
                fix="save the tokenizer beside the base model, or give --no-copy-tokenizer",
            )


def _check_dtypes(written: Checkpoint, base: Checkpoint, named: str | None) -> None:
    """Every tensor has the dtype that the configuration names, or without one the base model's."""
    for name in base.names:
        wanted = getattr(torch, named) if named and base.dtype(name).is_floating_point else base.dtype(name)
        if name in written.names and written.dtype(name) != wanted:
            raise _not_whole(f"{name} is {written.dtype(name)}", str(wanted))


def _not_whole(given: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "mergekit did not write the model that was meant; nothing is kept",
        given=given,
        expected=expected,
        fix="merge with moemerge merge, or report this",
    )
