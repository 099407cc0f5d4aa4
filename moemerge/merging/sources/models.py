"""Whole models of one architecture as a source of merges: fine-tunes of one start, domain experts, RM and LM.

Letters: N models besides the base.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moemerge.artifacts.manifest import model_fingerprint
from moemerge.artifacts.ranks import led
from moemerge.errors import CheckpointError, UnsupportedError
from moemerge.merging.sources.base import MergedTensor, MergeSource
from moemerge.merging.sources.likeness import (
    Scope,
    check_architectures,
    check_pooling,
    check_vocabularies,
    differing_settings,
    embeddings_name,
    mlp_names,
    names_in_scope,
)
from moemerge.merging.sources.vocabulary import Vocabulary, common_vocabulary, differences
from moemerge.models.checkpoint import copy_side_files
from moemerge.models.families.dense import dense_config, skeleton
from moemerge.models.folder import ModelFolder
from moemerge.models.head_tensors import output_names
from moemerge.models.loading import load_tokenizer
from moemerge.options.base import Coordinates, listed_twice

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelTensor:
    """A tensor that is merged from whole models."""

    dense: str
    shape: tuple[int, ...]


class Model:
    """One of the models: its weights, its config, and what it calls the reward model's tensors.

    Raises CheckpointError unless it holds exactly what its config says, the reward head perhaps excepted.
    """

    def __init__(self, source: str | Path) -> None:
        self.opened = ModelFolder(source)
        self.weights, self.folder = self.opened.weights, self.opened.folder
        self.opened.require_dense()
        self.config, self.names = self.opened.config, self.opened.dense_names
        self.lacks = self.opened.missing_head

    def tensor(self, dense: str) -> Tensor:
        """The tensor that the reward model calls `dense`."""
        held = self.names[dense]
        assert held is not None
        return self.weights.tensor(held)

    def dtype(self, dense: str) -> torch.dtype:
        """Its dtype, from the header."""
        return self.weights.dtype(str(self.names[dense]))

    def shape(self, dense: str) -> tuple[int, ...]:
        """Its shape, from the header."""
        return self.weights.shape(str(self.names[dense]))


class ModelList(MergeSource):
    """Reward models of one architecture, perhaps with a base that weighs in as a shared expert does.

    The base, or without one the first model, gives config, tokenizer and all that is not merged. `scope`:
    all; body, which is all but the head; mlp. Models without a reward head (language models of the same base,
    as in DogeRM, arXiv 2407.01470) can take part where the head is not merged. Where tokenizers differ in
    added tokens, the result has all of them: a token's embedding is averaged over the models that have it,
    its counterparts elsewhere being filled in. With `coordinates` sum the base may be the language model or
    bare encoder that all started from: the first reward model gives config and tokenizer then, and the base's
    head counts as zeros. `scales`: each model's score is divided by its number. Nothing is read but headers
    until it is asked for.

    Raises CheckpointError for a model that is not whole, UnsupportedError for models that do not go together.
    """

    def __init__(
        self,
        models: Sequence[str],
        base: str | None = None,
        scope: Scope = "all",
        coordinates: Coordinates = "average",
        scales: tuple[float, ...] | None = None,
    ) -> None:
        if twice := listed_twice(models):
            log.warning("models has %s twice: it counts as often as it is listed", twice[0])
        self.has_shared, self.num_members, self.scope = base is not None, len(models), scope
        self.models = [Model(folder) for folder in ([base] if base else []) + list(models)]
        self.scales = scales
        bare_base = coordinates == "sum" and base is not None and bool(self.models[0].lacks)
        self.donor_number = int(bare_base)
        self.donor = self.models[self.donor_number]
        self.folder, self.config = self.donor.folder, self.donor.config
        self.head = set(self.donor.opened.head_names)
        self.outputs = set(output_names(skeleton(self.config)))
        self._check_heads()
        opened = [model.opened for model in self.models]
        headless = [number for number, model in enumerate(self.models) if model.lacks]
        check_architectures(opened, self.has_shared, scope, headless)
        self._compare_settings()
        tokenizers = [load_tokenizer(model) for model in opened]
        self._check_tokenizers(tokenizers)
        merged = names_in_scope(self.donor.opened, scope)
        self.embeddings = embeddings_name(self.donor.opened)
        self.vocabulary = self._vocabulary(tokenizers)
        self.tensors = [ModelTensor(name, self._shape(name)) for name in merged]
        self.backbone = [name for name in self.donor.names if name not in merged]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The widest dtype of any tensor to merge."""
        held = ((model, tensor.dense) for tensor in self.tensors for model in self.models)
        dtypes = (model.dtype(name) for model, name in held if not (model.lacks and name in self.head))
        return reduce(torch.promote_types, dtypes)

    @property
    def dense_dtype(self) -> torch.dtype:
        """dtype of the first model, the base if there is one."""
        return self.donor.dtype(self.tensors[0].dense)

    @property
    def member_names(self) -> list[str]:
        """base, if there is one, then model-0 ... model-{N-1}."""
        return ["base"] * self.has_shared + [f"model-{i}" for i in range(self.num_members)]

    def found_in(self, member: int) -> str:
        """The model's own folder."""
        return str(self.models[member].folder)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the models' weights and configs in their order, and the scope."""
        parts = led(lambda: [model_fingerprint(model.folder) for model in self.models])
        return hashlib.sha256(" ".join([*parts, self.scope, str(self.has_shared)]).encode()).hexdigest()

    def identity(self) -> dict[str, str]:
        """Fingerprint, scope, and names of the head's tensors: mergekit's methods see only names."""
        head = [name for name in self.donor.names if name in self.head]
        return {"model": self.fingerprint, "scope": self.scope, "head": ",".join(head)}

    def matrix(self, tensor: MergedTensor, member: int) -> Tensor:
        """One model's tensor, in the widest of their dtypes; embeddings in the common order of tokens.

        What a scale divides is in float32 at least: rounded again, the scales would not be what they are.
        """
        if self.scales is None or tensor.dense not in self.outputs:
            return self._own(tensor.dense, member).to(self.dtype)
        own = self._own(tensor.dense, member).to(torch.promote_types(self.dtype, torch.float32))
        return own if member < self.has_shared else own / self.scales[member - self.has_shared]

    def kept(self, name: str) -> Tensor:
        """The tensor of the model that gives what is not merged."""
        return self._own(name, self.donor_number)

    def converted(self, member: int) -> bool:
        """Whether this model takes part as something else than the reward model on disk."""
        scaled = self.scales is not None and member >= self.has_shared
        return scaled or bool(self.models[member].lacks) or self.vocabulary is not None

    def references(self) -> list[Path | None]:
        """The models' own folders, but for those that are converted."""
        return [
            None if self.converted(member) else model.folder.absolute()
            for member, model in enumerate(self.models)
        ]

    def dense_config(self) -> PreTrainedConfig:
        """The first model's config, with the common vocabulary."""
        config = dense_config(self.config)
        if self.vocabulary is not None:
            config.get_text_config().vocab_size = self.vocabulary.size
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The first model's, with the others' added tokens."""
        tokenizer = load_tokenizer(self.donor.opened)
        if self.vocabulary is not None:
            tokenizer.add_tokens(self.vocabulary.added)
        return tokenizer

    def write_side_files(self, target: Path) -> None:
        """Tokenizer, chat template, licence and the like of the first model; the tokenizer has all tokens."""
        copy_side_files(self.folder, target)
        if self.vocabulary is not None and self.vocabulary.added:
            self.vocabulary.tokenizer(self.folder).save_pretrained(target)

    @cached_property
    def mlps(self) -> set[str]:
        """Dense names of the tensors of MLPs; none in an architecture whose MLPs are not known."""
        return mlp_names(self.donor.opened)

    def in_head(self, name: str) -> bool:
        """Whether the tensor is the reward head's."""
        return name in self.head

    def _own(self, name: str, member: int) -> Tensor:
        """The tensor as one model has it, its embeddings in the common order; zeros for a missing head."""
        if self.models[member].lacks and name in self.head:
            return torch.zeros(self.donor.shape(name), dtype=self.donor.dtype(name))
        if name == self.embeddings and self.vocabulary is not None:
            return self.vocabulary.table(member, lambda number: self.models[number].tensor(name))
        return self.models[member].tensor(name)

    def _vocabulary(self, tokenizers: list[PreTrainedTokenizerBase]) -> Vocabulary | None:
        if self.scope == "mlp":
            return None
        # The model that gives the tokenizer comes first there: the others' tokens are added to its own.
        order = sorted(range(len(self.models)), key=lambda number: number != self.donor_number)
        sizes = [self.models[number].shape(self.embeddings)[0] for number in order]
        common = common_vocabulary([tokenizers[number] for number in order], sizes)
        if common is None:
            return None
        rows = dict(zip(order, common.rows_V, strict=True))
        return replace(common, rows_V=[rows[number] for number in range(len(order))])

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.donor.shape(name)
        if name == self.embeddings and self.vocabulary is not None:
            return (self.vocabulary.size, *shape[1:])
        return shape

    def _compare_settings(self) -> None:
        for model in self._others():
            if differing := differing_settings(model.opened, self.donor.opened):
                log.warning("%s differs from %s in %s; %s's are kept", model.folder, self.folder,
                            ", ".join(differing), self.folder)  # fmt: skip

    def _others(self) -> list[Model]:
        """All but the one that gives config and tokenizer."""
        return [model for model in self.models if model is not self.donor]

    def _check_tokenizers(self, tokenizers: list[PreTrainedTokenizerBase]) -> None:
        opened, kept = [model.opened for model in self.models], tokenizers[self.donor_number]
        judges = [number for number, model in enumerate(self.models) if not model.lacks]
        check_pooling([opened[n] for n in judges], [tokenizers[n] for n in judges])
        for model, tokenizer in zip(self.models, tokenizers, strict=True):
            if differing := differences(kept, tokenizer):
                log.warning("the tokenizer of %s differs from that of %s in %s; the latter's is kept",
                            model.folder, self.folder, ", ".join(differing))  # fmt: skip
        if self.scope != "mlp":
            check_vocabularies(opened, tokenizers, self.has_shared)

    def _check_heads(self) -> None:
        if self.donor.lacks:
            raise CheckpointError(
                f"{self.folder} has no reward head",
                given=f"no {', '.join(self.donor.lacks)}",
                expected="a reward model as base, or as the first of models",
                fix="name the reward model as base",
            )
        headless = next((model for model in self.models[self.donor_number :] if model.lacks), None)
        if headless is not None and self.scope == "all":
            raise UnsupportedError(
                f"{headless.folder} has no reward head to merge",
                given="scope all",
                expected="scope body or mlp, where the head of the base is kept",
                fix="set scope to body",
            )
        self.donor.opened.require_one_output()
