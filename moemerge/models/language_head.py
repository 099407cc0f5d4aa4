"""What a language model would say of the answers, from a reward model's own states.

A sequence classifier has no language head. The class of the causal language model of the same architecture is
made without its trunk, and the states of the reward model's trunk are sent through what is left: scales, caps
and further layers before the vocabulary are then transformers' own.

Shapes: B texts, T tokens, D width, V words of the vocabulary, S answer tokens of all texts, C at a time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from moemerge.errors import CheckpointError, UnsupportedError, few
from moemerge.models.families import family_of
from moemerge.models.families.dense import describes_model, stock_config
from moemerge.models.folder import ModelFolder

NUMBERS = 2**24  # logits at a time: 64 MiB in float32
# GPT-NeoX's name of the head, before transformers gave it the others'.
OLD_NAMES = {"lm_head": "embed_out"}


class _Trunk(nn.Module):
    """In place of a language model's trunk: it gives the states set before, whatever it is asked."""

    states: Tensor

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.states)

    @property
    def decoder(self) -> _Trunk:
        """What OPT calls in the trunk's place."""
        return self


class LanguageHead:
    """log pi(answer | prompt) by states of the trunk; see `open_language_head`."""

    def __init__(self, model: PreTrainedModel, trunk: _Trunk, vocabulary: int) -> None:
        self._model, self._trunk = model, trunk
        self._chunk = max(1, NUMBERS // vocabulary)

    def answers(
        self, states_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor, prompts_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Summed log-probability of each text's answer tokens in nats, [B], and how many they are, [B].

        Texts are padded on the right; prompts_B are their prompts' lengths in tokens. The first token of a
        text is never an answer's: nothing predicts it. Gradients pass.
        """
        places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        asked_BT = mask_BT.bool() & (places_T >= prompts_B[:, None].clamp(min=1))
        row_S, place_S = asked_BT.nonzero(as_tuple=True)
        log_S = self._log_probabilities(states_BTD[row_S, place_S - 1], ids_BT[row_S, place_S])
        return log_S.new_zeros(len(ids_BT)).index_add(0, row_S, log_S), asked_BT.sum(1)

    def logits(self, states_SD: Tensor, words_K: Tensor) -> Tensor:
        """The logits of these words after each state, [S, K]."""
        return torch.cat([self._logits(chunk_CD)[:, words_K] for chunk_CD in states_SD.split(self._chunk)])

    def _log_probabilities(self, states_SD: Tensor, targets_S: Tensor) -> Tensor:
        """Of each target after its state. Logits are made again in the backward pass, and never kept."""
        chunks = zip(states_SD.split(self._chunk), targets_S.split(self._chunk), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._of_chunk(*chunk) for chunk in chunks])
        how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(self._of_chunk, *chunk, **how) for chunk in chunks])

    def _of_chunk(self, states_CD: Tensor, targets_C: Tensor) -> Tensor:
        return -cross_entropy(self._logits(states_CD), targets_C, reduction="none")

    def _logits(self, states_CD: Tensor) -> Tensor:
        self._trunk.states = states_CD[None]
        ids_1C = torch.zeros(1, len(states_CD), dtype=torch.long, device=states_CD.device)  # never looked at
        logits_CV: Tensor = self._model(input_ids=ids_1C, use_cache=False).logits[0]
        return logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()


def open_language_head(model: PreTrainedModel, own: ModelFolder, given: ModelFolder | None) -> LanguageHead:
    """The language head for the states of the reward model `model`, which lies in `own`.

    It is that of the language model `given`, frozen. Without one: where the architecture ties head and
    embeddings, the embeddings of `model` itself, which go on training if they do; else the tensors that `own`
    holds, as a language model does to which training gives its first reward head, frozen.
    Raises UnsupportedError for encoders and for another architecture or vocabulary, CheckpointError if there
    is no head to be found.
    """
    family = family_of(model.config)
    if not family.causal:
        raise UnsupportedError(
            "an encoder has no language head",
            given=f"model_type {model.config.model_type}",
            expected="a decoder, whose states predict the next token",
            fix="take policy and language out of objectives",
        )
    source = given or own
    if source.dense_type != own.dense_type:
        raise _unlike(source, f"model_type {source.dense_type}, not {own.dense_type}")
    head, trunk, last, tied = _without_trunk(source.config if given else stock_config(model.config))
    embeddings = cast(nn.Parameter, model.get_input_embeddings().weight)
    for name, wanted in list(head.named_parameters()):
        if name in tied and given is None:
            parameter = embeddings
        else:
            read = _read(source, name, tied.get(name)).to(model.device, model.dtype)
            parameter = nn.Parameter(read, requires_grad=False)
        if parameter.shape != wanted.shape:
            raise _unlike(source, f"{name} {tuple(parameter.shape)}, not {tuple(wanted.shape)}")
        path, _, leaf = name.rpartition(".")
        setattr(head.get_submodule(path), leaf, parameter)
    output = head.get_parameter(f"{last}.weight")
    if output.shape != embeddings.shape:
        shapes = tuple(output.shape), tuple(embeddings.shape)
        raise _unlike(source, f"a head of shape {shapes[0]} for embeddings of shape {shapes[1]}")
    return LanguageHead(head.eval(), trunk, len(output))


def split(model: PreTrainedModel) -> tuple[PreTrainedModel, LanguageHead]:
    """A causal language model in two: its trunk, and its head for the trunk's states. `model` is used up."""
    trunk, stand_in = cast(PreTrainedModel, model.base_model), _Trunk()
    if trunk is model:
        raise UnsupportedError(
            "a language model without a trunk of its own",
            given=type(model).__name__,
            expected="a class of transformers that holds a base model",
            fix="give another language model",
        )
    vocabulary = len(cast(Tensor, model.get_output_embeddings().weight))
    setattr(model, model.base_model_prefix, stand_in)
    return trunk, LanguageHead(model, stand_in, vocabulary)


def _without_trunk(config: PreTrainedConfig) -> tuple[PreTrainedModel, _Trunk, str, dict[str, str]]:
    """A language model of this config whose trunk gives what it is told; its last module; tied parameters.

    On the meta device: its own parameters have no values yet. Modules and parameters by name, the tied ones
    with the name of what they are tied to.
    """
    with describes_model(config.model_type), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output, trunk = model.get_output_embeddings(), _Trunk()
    last = next(name for name, module in model.named_modules() if module is output)
    setattr(model, model.base_model_prefix, trunk)
    return model, trunk, last, dict(getattr(model, "all_tied_weights_keys", None) or {})


def _read(source: ModelFolder, name: str, tied: str | None) -> Tensor:
    """The head's tensor `name` as the folder has it: of a tied one, the embeddings."""
    old = [name.replace(new, before) for new, before in OLD_NAMES.items() if new in name]
    # Of a language model saved without its head, embeddings have no prefix.
    wanted = [tied, tied.partition(".")[2]] if tied else [name, *old]
    held = next((known for known in wanted if known in source.weights.names), None)
    if held is None:
        raise CheckpointError(
            f"{source.source} has no language head, which the objectives policy and language need",
            given=f"no {few(wanted)} among its tensors",
            expected="the language model that the reward model was made from",
            fix="set language_head to its folder or hub name, or take policy and language out of objectives",
        )
    return source.weights.tensor(held)


def _unlike(source: ModelFolder, given: str) -> UnsupportedError:
    return UnsupportedError(
        f"the language head of {source.source} does not fit the reward model",
        given=given,
        expected="the architecture, width and vocabulary of the reward model",
        fix="set language_head to the language model that the reward model was made from",
    )
