"""A model's lower layers, frozen and computed once per text: what makes studies of real models fit a CPU.

`upper_layers` writes the upper layers as a model of their own. While `install` is open, every embedding of
the model's width gives, in place of embeddings, the states that the lower layers make of the text: all of
moemerge then works on the upper layers as if the whole model ran, and the whole model's scores come out.
Causal models and BERT, padded on the right only. BERT's last layer is computed at the first token alone, if
asked: no other is pooled.

B sequences, T tokens, D width, N heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

STATES, TEXTS = "states.npy", "texts.npz"


def opened(model: Path) -> Any:
    """The model in `model` as it was saved: a language model, or an encoder without head."""
    encoder = AutoConfig.from_pretrained(model).model_type == "bert"
    loader = AutoModel if encoder else AutoModelForCausalLM
    return loader.from_pretrained(model, dtype=torch.float32)


def upper_layers(model: Path, count: int, output: Path) -> Path:
    """The last `count` layers of the model in `model`, with its embeddings and tokenizer."""
    whole = opened(model)
    if hasattr(whole, "encoder"):
        whole.encoder.layer = whole.encoder.layer[-count:]
    else:
        whole.model.layers = whole.model.layers[-count:]
        for number, layer in enumerate(whole.model.layers):
            layer.self_attn.layer_idx = number
    whole.config.num_hidden_layers = count
    whole.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    return output


class LowerLayers:
    """The model but for its last `upper` layers, and the states it has made, by text.

    Texts are known by their tokens with just one pad token at the end, as some models pool there.
    """

    def __init__(self, model: Path, upper: int) -> None:
        whole = opened(model).eval()
        self.encoder = hasattr(whole, "encoder")
        if self.encoder:
            whole.encoder.layer = whole.encoder.layer[:-upper]
        else:
            whole = whole.model
            whole.layers, whole.norm = whole.layers[:-upper], nn.Identity()
        self.whole, self.width = whole, whole.config.hidden_size
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.found: dict[bytes, np.ndarray] = {}

    def key(self, ids: Iterable[int]) -> bytes:
        """What a text is known by."""
        text = [*ids]
        while text and text[-1] == self.pad:
            text.pop()
        return np.array([*text, self.pad], dtype=np.int32).tobytes()

    def compute(self, keys: Iterable[bytes], batch_tokens: int = 2048) -> None:
        """Find the states of the texts that are not known yet."""
        todo = sorted({key for key in keys if key not in self.found}, key=len)
        with tqdm(total=len(todo), unit="text", disable=len(todo) < 100) as bar:
            while todo:
                part = todo[-max(1, 4 * batch_tokens // len(todo[-1])) :]
                del todo[-len(part) :]
                self._run(part)
                bar.update(len(part))

    def _run(self, keys: list[bytes]) -> None:
        texts = [np.frombuffer(key, dtype=np.int32) for key in keys]
        ids_BT = torch.full((len(texts), max(map(len, texts))), self.pad)
        mask_BT = torch.zeros_like(ids_BT)
        for row, text in enumerate(texts):
            ids_BT[row, : len(text)] = torch.from_numpy(text.copy())
            mask_BT[row, : len(text) - 1] = 1
        # A causal model sees no pad token of later places; its own state at the first one must be as it is.
        given = {"attention_mask": mask_BT} if self.encoder else {"use_cache": False}
        with install(None), torch.no_grad():
            states_BTD = self.whole(input_ids=ids_BT, **given).last_hidden_state
        for key, text, states_TD in zip(keys, texts, states_BTD, strict=True):
            self.found[key] = states_TD[: len(text)].numpy().copy()

    def states(self, ids_BT: Tensor) -> Tensor:
        """The states of padded texts, [B, T, D]; 0 from the second pad token on, which no token sees."""
        keys = [self.key(ids) for ids in ids_BT.tolist()]
        self.compute(keys)
        out_BTD = torch.zeros(*ids_BT.shape, self.width)
        for row, key in enumerate(keys):
            states_TD = self.found[key][: ids_BT.shape[1]]
            out_BTD[row, : len(states_TD)] = torch.from_numpy(np.array(states_TD))
        return out_BTD

    def save(self, folder: Path) -> None:
        """Write all states, for `load` in other processes."""
        folder.mkdir(parents=True, exist_ok=True)
        keys = list(self.found)
        np.savez(
            folder / TEXTS, ids=np.frombuffer(b"".join(keys), np.int32), sizes=[len(k) // 4 for k in keys]
        )
        np.save(folder / STATES, np.concatenate([self.found[key] for key in keys]))

    def load(self, folder: Path) -> None:
        """Know what `save` wrote; states stay on the disk and are shared between processes."""
        texts, states = np.load(folder / TEXTS), np.load(folder / STATES, mmap_mode="r")
        starts = np.concatenate([[0], np.cumsum(texts["sizes"])])
        ids = texts["ids"]
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            self.found[ids[start:end].tobytes()] = states[start:end]


current: list[LowerLayers | None] = [None]
pooled: list[bool] = [False]


@contextmanager
def install(lower: LowerLayers | None, pooled_only: bool = False) -> Iterator[None]:
    """While open, embeddings of `lower`'s width give its states; None: embeddings are embeddings.

    `pooled_only`: BERT's last layer is computed at the first token alone. Not for a MoE, whose routing is
    counted over all tokens, nor for objectives that look at other tokens.
    """
    before = current[0], pooled[0]
    current[0], pooled[0] = lower, pooled_only
    try:
        yield
    finally:
        current[0], pooled[0] = before


def _replace(
    module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Any], output: Tensor
) -> Tensor | None:
    lower = current[0]
    if lower is None or not isinstance(module, BertEmbeddings if lower.encoder else nn.Embedding):
        return None
    ids_BT = given[0] if given else named["input_ids"]
    part: Any = module
    width = part.LayerNorm.weight.shape[0] if lower.encoder else part.embedding_dim
    return lower.states(ids_BT) if width == lower.width else None


def _at_first_token(layer: Any, states_BTD: Tensor, mask_B1TT: Tensor | None) -> Tensor:
    """What a BERT layer makes of the first token, [B, 1, D]."""
    attention, first_B1D = layer.attention.self, states_BTD[:, :1]

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    seen_BN1D = nn.functional.scaled_dot_product_attention(
        heads(attention.query(first_B1D)),
        heads(attention.key(states_BTD)),
        heads(attention.value(states_BTD)),
        attn_mask=None if mask_B1TT is None else mask_B1TT[:, :, :1],
        dropout_p=attention.dropout.p if layer.training else 0.0,
    )
    mixed_B1D = layer.attention.output(seen_BN1D.transpose(1, 2).flatten(2), first_B1D)
    made_B1D: Tensor = layer.feed_forward_chunk(mixed_B1D)
    return made_B1D


def _last_layer(
    layer: Any, states_BTD: Tensor, mask_B1TT: Tensor | None = None, *others: Any, **named: Any
) -> Tensor:
    lower, attention = current[0], layer.attention.self
    last = attention.layer_idx == attention.config.num_hidden_layers - 1
    if pooled[0] and lower is not None and last and states_BTD.shape[-1] == lower.width:
        return _at_first_token(layer, states_BTD, mask_B1TT)
    made_BTD: Tensor = whole_layer(layer, states_BTD, mask_B1TT, *others, **named)
    return made_BTD


whole_layer = BertLayer.forward
BertLayer.forward = _last_layer  # type: ignore[method-assign, assignment]
hook: Any = _replace  # torch's types do not know of with_kwargs
nn.modules.module.register_module_forward_hook(hook, with_kwargs=True)
