"""Causal language models: loading them, and what they say of texts, with few logits in memory at a time.

B texts, T tokens, D width, K words asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moemerge.data.tokenise import Encoded
from moemerge.errors import CheckpointError, few
from moemerge.models.cost import cost
from moemerge.models.folder import ModelFolder, opened, unloadable
from moemerge.models.guards import refuse_larger
from moemerge.models.language_head import split
from moemerge.models.loading import load_tokenizer, quiet_loading
from moemerge.models.scoring import collate


class LanguageModel:
    """A causal language model that reads texts; its states and its head can be had one without the other.

    facts: its class, and what it costs (models.cost), its head at every token included; trunk_flops: what a
    token costs without the head.
    """

    def __init__(self, source: ModelFolder, device: torch.device) -> None:
        model, _ = load_language_model(source, device)
        vocabulary, width = cast(Tensor, model.get_input_embeddings().weight).shape
        self.facts: dict[str, Any] = {"class": type(model).__name__, **cost(model)}
        self.trunk, self.head = split(model)
        self.trunk_flops = cost(self.trunk)["flops_per_token"]
        tied = self.facts["flops_per_token"] == self.trunk_flops
        self.facts["flops_per_token"] += 2 * width * vocabulary * tied

    def states(self, texts: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        """The trunk's last states of a batch, padded on the right, [B, T, D]; its ids and mask, [B, T]."""
        inputs = collate(texts, 0, False, self.trunk.device)
        states_BTD: Tensor = self.trunk(**inputs, use_cache=False)[0]
        return states_BTD, inputs["input_ids"], inputs["attention_mask"]

    @torch.inference_mode()
    def log_probabilities(self, texts: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """log p(answer | prompt) of each text in nats, and of how many tokens that is the sum; [B] both."""
        prompts_B = torch.tensor([text.prompt_length for text in texts], device=self.trunk.device)
        return self.head.answers(*self.states(texts), prompts_B)

    @torch.inference_mode()
    def next_logits(self, texts: Sequence[Encoded], words_K: Sequence[int]) -> Tensor:
        """The logits of these words after the last token of each text, [B, K]."""
        states_BTD, _, _ = self.states(texts)
        last_BD = states_BTD[torch.arange(len(texts)), self.ends(texts)]
        return self.head.logits(last_BD, torch.tensor(words_K, device=last_BD.device))

    def ends(self, texts: Sequence[Encoded]) -> Tensor:
        """Where the last token of each text stands in a batch of them, [B]."""
        return torch.tensor([len(text.ids) - 1 for text in texts], device=self.trunk.device)


def load_language_model(
    source: ModelFolder | str | Path, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, every weight from the checkpoint, and its tokenizer.

    `dtype=None` keeps the checkpoint's on a GPU and takes float32 on CPU. Raises CheckpointError for tensors
    that are missing, as of a reward model, or misshapen, and for pickled weights.
    """
    folder = opened(source)
    if folder.is_local:
        refuse_larger(folder.weights, folder.config)  # pickled and damaged weights too
        folder.weights.release()
    tokenizer = load_tokenizer(folder)
    wanted: Any = dtype or (torch.float32 if device.type == "cpu" else "auto")
    model, missing = _load(folder, wanted)
    if missing:
        raise CheckpointError(
            f"{folder.source} is not a language model",
            given=f"without {few(missing)}",
            expected="every tensor of a causal language model",
            fix="give a language model, such as the one that the reward model was made from",
        )
    _name_pad(tokenizer, folder.source)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    # What is left unset when text is generated, transformers takes from here.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.to(device).eval(), tokenizer


def _name_pad(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Have the tokenizer pad with its end token if it names no pad token: in generation masks hide it."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise CheckpointError(
            f"the tokenizer of {source} has no pad token",
            given="neither pad_token nor eos_token",
            expected="one of the two",
            fix="set pad_token in tokenizer_config.json",
        )


def _load(folder: ModelFolder, dtype: Any) -> tuple[Any, list[str]]:
    """The model, and the tensors that its checkpoint lacks."""
    try:
        with quiet_loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder.source,
                dtype=dtype,
                trust_remote_code=folder.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # a model's class may raise anything at values that it does not expect
        what, expected = "the language model cannot be loaded", "a causal language model"
        raise unloadable(what, folder.source, error, expected) from error
    model, loading = loaded
    return model, sorted(loading["missing_keys"])
