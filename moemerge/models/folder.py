"""One opened model: a folder or hub name that is judged once, and what every stage asks of it.

Imports nothing heavy: checking a recipe needs config.json only, merging the experts of a MoE its tensors too,
and importing transformers takes longer than merging a gigabyte.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moemerge.artifacts.foreign import refuse_foreign, refuse_paths
from moemerge.artifacts.hub import bounded_hub, words_of
from moemerge.artifacts.json_file import read_object
from moemerge.artifacts.paths import near_path, reads_like_path
from moemerge.errors import CheckpointError, UnsupportedError, few
from moemerge.models.config_file import read_config
from moemerge.models.families.base import PREFIX
from moemerge.models.families.siblings import NO_SIBLING, SIBLINGS
from moemerge.models.heads.saved import head_field, told_head
from moemerge.models.tokenizer_file import FILE as TOKENIZER
from moemerge.models.tokenizer_file import check_tokenizer_json, check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from moemerge.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
# transformers takes what these hold for arguments of the tokenizer's class.
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_TOKENIZER_CONFIG_BYTES = 30_000_000
# What older versions saved, and transformers replaces by what lies in the folder.
REPLACED_ON_LOADING = {"name_or_path", "tokenizer_file", "special_tokens_map_file"}
# Where LLaMA-Factory and ms-swift put the head of a reward model, whose config.json then names a causal LM.
HEAD_FILES = ("value_head.safetensors", "value_head.bin")
# The classes of models that never had a reward head.
BASE_CLASS = re.compile(r"For(CausalLM|MaskedLM|PreTraining)$|LMHeadModel$|^((?!For).)*Model$")
ON_HUB = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]


class ModelFolder:
    """The model in the folder, or under the hub name, `source`.

    When it is opened, everything that transformers would read beside the weights is looked at: it must not
    name or link to anything elsewhere, nor be an adapter, whose base may be anywhere. The rest is read when
    first asked for, and kept. Code that comes with the model runs only with `trust_remote_code`, and that is
    logged. With `fresh_head` the reward head may be missing, or be under another name, of any model; without
    it, of plain base models only.

    Raises ArtifactError for links and names that lead out of the folder, CheckpointError for an adapter, a
    name that cannot be found, and files that cannot be read.
    """

    def __init__(self, source: str | Path, trust_remote_code: bool = False, fresh_head: bool = False) -> None:
        self.source, self.trust_remote_code, self.fresh_head = str(source), trust_remote_code, fresh_head
        self.is_local = Path(source).is_dir()
        self.drawn_head: list[str] = []  # tensors of the head that load_reward_model drew, not read
        self._tokenizer_configs: dict[str, dict[str, Any]] = {}
        if Path(source).exists():
            refuse_foreign(Path(source))
        if not self.is_local:
            self._require_hub_name()
        self._refuse_adapter()
        if self.has_config:
            self.config_json  # noqa: B018 (transformers' tokenizers read it too)
        self._check_tokenizer_files()

    # What it is

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """config.json as it stands. CheckpointError if it is missing, or names what is not in the folder."""
        try:
            path = self._file("config.json") or Path(self.source) / "config.json"
            return read_config(path.parent)
        except (OSError, ValueError, TypeError) as error:
            expected = "a model folder or hub name, its config.json a JSON object"
            raise unloadable("the model's config cannot be read", self.source, error, expected) from error

    @property
    def has_config(self) -> bool:
        """Whether there is a config.json: a folder may hold a tokenizer only."""
        return self._file("config.json") is not None

    @property
    def model_type(self) -> str:
        """As config.json has it; "None" if it has none."""
        return str(self.config_json.get("model_type"))

    @property
    def dense_type(self) -> str:
        """The model_type of the dense model: of a MoE's, the one that it was made from."""
        return self.model_type.removeprefix(PREFIX)

    @property
    def kind(self) -> Literal["dense", "moe", "native"]:
        """moe: made by moemerge. native: a mixture of experts of transformers. dense: any other."""
        if self.model_type.startswith(PREFIX):
            only_head = self.has_own_head and self.config_json.get("moemerge") is None
            return "dense" if only_head else "moe"
        return "native" if self.model_type in SIBLINGS or self.model_type in NO_SIBLING else "dense"

    @property
    def has_own_head(self) -> bool:
        """Whether its reward head is none of transformers', but one of models.heads."""
        return head_field(self.config_json) is not None

    @property
    def architectures(self) -> list[str]:
        """The classes that config.json names."""
        return self.config_json.get("architectures") or []

    @property
    def claims_head(self) -> bool:
        """Whether config.json says that the model has a reward head."""
        return any("SequenceClassification" in name for name in self.architectures)

    @property
    def is_base(self) -> bool:
        """Whether config.json says that it is a language model or bare encoder, which has no reward head."""
        return bool(self.architectures) and all(map(BASE_CLASS.search, self.architectures))

    @property
    def head_files(self) -> list[str]:
        """The files beside the weights that hold a reward head."""
        return [name for name in HEAD_FILES if self._file(name) is not None]

    @property
    def trusts_own_class(self) -> bool:
        """Whether a sequence classifier's code comes with the model and may run."""
        classes = self.config_json.get("auto_map")
        own = isinstance(classes, dict) and "AutoModelForSequenceClassification" in classes
        return own and self.trust_remote_code

    # What it holds

    @cached_property
    def folder(self) -> Path:
        """Where it lies: `source` itself, or the hub's copy of that name, without pickle files."""
        if self.is_local:
            return Path(self.source)
        from huggingface_hub import snapshot_download

        try:
            with bounded_hub():
                folder = Path(snapshot_download(self.source, allow_patterns=ON_HUB))
        except Exception as error:  # an answer that makes no sense can raise anything
            raise _not_on_hub(self.source, error) from None
        refuse_foreign(folder)
        return folder

    @cached_property
    def weights(self) -> Checkpoint:
        """The tensors on disk. Raises as Checkpoint does."""
        from moemerge.models.checkpoint import Checkpoint

        return Checkpoint(self.folder)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config as transformers has it, its pad token settled; copy it before you change it.

        CheckpointError if its own class refuses it, or a MoE's layers or the pad token make no sense;
        UnsupportedError for a class that is neither transformers' nor moemerge's, unless its code comes along
        and is trusted.
        """
        from moemerge.models.configs import read_model_config

        return read_model_config(self)

    @cached_property
    def dense_names(self) -> dict[str, str | None]:
        """For each tensor of the dense reward model its name here; None for a head that is not here.

        Raises as guards.source_names.
        """
        from moemerge.models.guards import source_names

        return source_names(self)

    @property
    def missing_head(self) -> list[str]:
        """The tensors of the reward head that are not here: none, or a base model's all."""
        return [name for name, held in self.dense_names.items() if held is None]

    @cached_property
    def head_names(self) -> list[str]:
        """The tensors of the reward head, by their names in the dense reward model, here or not."""
        from moemerge.models.families.dense import skeleton
        from moemerge.models.head_tensors import in_head

        model = skeleton(self.config)
        return [name for name in model.state_dict() if in_head(model, name)]

    # What it must be

    def require_dense(self) -> None:
        """Raise UnsupportedError for a MoE that moemerge made."""
        if self.kind == "moe":
            raise UnsupportedError(
                f"{self.source} is a MoE made by moemerge",
                given=f"model_type {self.model_type}",
                expected="a dense reward model",
                fix="merge it with moemerge merge, or write its experts as dense models with moemerge export",
            )

    def require_stock_head(self, what: str) -> None:
        """Raise UnsupportedError, `what` cannot be done, for a head that transformers does not have."""
        if self.has_own_head:
            raise UnsupportedError(
                f"{self.source}: {what}",
                given=told_head(self.config_json),
                expected="the linear head of stock transformers",
                fix="write it as a stock model first: moemerge export --form linear --model M --pairs P",
            )

    def require_moe(self) -> None:
        """Raise CheckpointError unless it is a MoE that moemerge made."""
        if self.kind != "moe":
            raise CheckpointError(
                f"{self.source} is not a MoE made by moemerge",
                given=f"model_type {self.model_type}",
                expected="a folder written by upcycle or train",
                fix="run moemerge upcycle on it first; fit and merge take several dense models as models",
            )

    def require_one_output(self) -> None:
        """Raise CheckpointError unless the head has one output: the score."""
        if self.config.num_labels != 1:
            raise CheckpointError(
                f"{self.source} is not a reward model",
                given=f"{self.config.num_labels} outputs",
                expected="one output",
                fix="give a sequence classifier with num_labels = 1",
            )

    @property
    def tokenizer_file(self) -> Path | None:
        """tokenizer.json, if it has one."""
        return self._file(TOKENIZER)

    def check_tokenizer(self) -> None:
        """Raise CheckpointError for a tokenizer that could make a text, or its vocabulary, without end."""
        versions = self._tokenizer_configs.get(TOKENIZER_FILES[0], {}).get("fast_tokenizer_files")
        names = [TOKENIZER, *(map(str, versions) if isinstance(versions, list | dict) else ())]
        with self._tokenizer_faults("a whole tokenizer that hardly lengthens a text"):
            added = [check_tokenizer_json(path) for path in map(self._file, names) if path is not None]
            check_tokens(self._tokenizer_configs, set().union(*added))

    def _require_hub_name(self) -> None:
        """Raise CheckpointError, after one question at most, for what is neither a folder nor on the hub."""
        if Path(self.source).exists():
            fix = f"give the folder that it lies in: {Path(self.source).parent}"
            raise _not_found(self.source, "a file", fix)
        if reads_like_path(self.source):
            raise _not_found(self.source, "no such folder", "correct the path")
        log.info("%s is no folder here: looking for it on the hub", self.source)
        self._from_hub("config.json", _raise_exceptions_for_missing_entries=True)

    def _refuse_adapter(self) -> None:
        if self._file(ADAPTER) is not None:
            # transformers would load the model that this file names, from wherever that is
            raise CheckpointError(
                f"{self.source} is an adapter (LoRA), not a whole model",
                given=ADAPTER,
                expected="a folder with all of the model's tensors, head included",
                fix="load it on its base (PEFT), merge_and_unload(), save_pretrained()",
            )

    def _check_tokenizer_files(self) -> None:
        for path in filter(None, map(self._file, TOKENIZER_FILES)):
            with self._tokenizer_faults(f"a JSON object in {path.name}"):
                values = read_object(path, MAX_TOKENIZER_CONFIG_BYTES)
            refuse_paths(
                {key: values[key] for key in values.keys() - REPLACED_ON_LOADING}, path.parent, path.name
            )
            self._tokenizer_configs[path.name] = values

    @contextmanager
    def _tokenizer_faults(self, expected: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            fix = "take the tokenizer that the model was trained with"
            raise unloadable("the tokenizer cannot be loaded", self.source, error, expected, fix) from error

    def _file(self, name: str) -> Path | None:
        """Where the file `name` is, fetched from the hub if need be; None if the model has none."""
        if self.is_local:
            path = Path(self.source) / name
            return path if path.exists() else None
        return self._from_hub(name, _raise_exceptions_for_missing_entries=False)

    def _from_hub(self, name: str, **how: bool) -> Path | None:
        from transformers.utils.hub import cached_file

        try:
            with bounded_hub():
                cached = cached_file(self.source, name, **how)
        except Exception as error:  # an answer that makes no sense can raise anything
            raise _not_on_hub(self.source, error) from None
        return None if cached is None else Path(cached)


def opened(source: ModelFolder | str | Path) -> ModelFolder:
    """`source` opened, or itself if it is open already."""
    return source if isinstance(source, ModelFolder) else ModelFolder(source)


def unloadable(
    what: str,
    source: str | Path,
    error: BaseException,
    expected: str,
    fix: str = "check the path and that every file of the model is there and whole",
) -> CheckpointError:
    """The fault of a model of which transformers cannot make anything."""
    reason = " ".join(str(error).split())
    return CheckpointError(
        f"{what}: {source}",
        given=f"{type(error).__name__}: {reason[:500]}",
        expected=expected,
        fix=fix,
    )


def misfit(
    source: str | Path, faults: Mapping[str, Iterable[object]], expected: str, fix: str
) -> CheckpointError:
    """The fault of a model whose tensors are not those of its config; `faults` are their names by kind."""
    return CheckpointError(
        f"{source} does not fit its own config",
        given="; ".join(f"{kind}: {few(names)}" for kind, names in faults.items()),
        expected=expected,
        fix=fix,
    )


def _not_found(source: str, given: str, fix: str) -> CheckpointError:
    return CheckpointError(
        f"the model cannot be found: {source}",
        given=given,
        expected="a folder with a model, or a name on the hub that can be reached",
        fix=near_path(source, folders_only=True) + fix,
    )


def _not_on_hub(source: str, error: Exception) -> CheckpointError:
    given = f"no folder of this name here; on the hub: {words_of(error) or type(error).__name__}"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return _not_found(source, given, "correct the path, or unset HF_HUB_OFFLINE to load it from the hub")
    return _not_found(source, given, "correct the path or the name on the hub; check network and token")
