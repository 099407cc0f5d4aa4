"""Loading reward models and scoring texts with them.

P pairs, B batch, T tokens.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from moemerge.checkpoint import Checkpoint
from moemerge.configs import check_files, load_config, tell_of_code, unloadable
from moemerge.errors import CheckpointError, DataError, MoemergeError
from moemerge.model_guards import refuse_larger, refuse_own_class
from moemerge.token_limits import check_texts
from moemerge.tokenise import Encoded, EncodedPair, texts_of

log = logging.getLogger(__name__)

OnBatch: TypeAlias = Callable[[list[int]], None]

# Heads of language models: left over, rightly, when a base model becomes a reward model.
LANGUAGE_HEADS = (
    "lm_head",
    "cls.",
    "vocab_",
    "mlm_head",
    "embed_out",
    "decoder.weight",
    "decoder.bias",
    "output_projection",
    "discriminator_predictions",
    "generator_predictions",
    "generator_lm_head",
    "lm_predictions",
    "mask_predictions",
)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model, padding on the right, with a pad token.

    Without one of its own the end-of-sequence token pads, as in TRL's RewardTrainer: decoders then pool the
    token before it. Raises CheckpointError if there is no tokenizer, or neither token.
    """
    try:
        check_files(path)
        if trust_remote_code:
            tell_of_code(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer(["a"])
        tokenizer.get_vocab(), tokenizer.pad_token, tokenizer.eos_token  # noqa: B018 (a few classes have none)
    except MoemergeError:
        raise
    except Exception as error:  # a broken tokenizer.json raises a bare Exception
        raise unloadable(
            "the tokenizer cannot be loaded", path, error, "a folder or hub name with one"
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(
                f"the tokenizer of {path} has no pad token",
                given="neither pad_token nor eos_token",
                expected="one of the two",
                fix="set pad_token in tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_reward_model(
    path: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    fresh_head_seed: int | None = None,
) -> PreTrainedModel:
    """A reward model with exactly one output, in eval mode, every weight from the checkpoint.

    `dtype=None` keeps the checkpoint's on a GPU and takes float32 on CPU. With `fresh_head_seed` a base LM or
    encoder is taken too: its missing head is drawn from that seed, on any device alike. `config.pad_token_id`
    is set from the tokenizer when missing. Raises CheckpointError for missing, left-over or misshapen
    tensors, pickled weights, adapters, a reward model without its head, and any other number of outputs;
    UnsupportedError for a class of its own, unless its code comes along and is trusted.
    """
    _register_moe()
    device = torch.device(device)
    refuse_pickle(path)
    weights = Checkpoint(path) if Path(path).is_dir() else None
    config = load_config(path, trust_remote_code)
    if not (trust_remote_code and has_own_code(config)):
        refuse_own_class(config.architectures, path)
    if claims_head(config):
        fresh_head_seed = None
    if fresh_head_seed is not None:
        config.num_labels = 1
    if weights is not None:
        refuse_larger(weights, config)
    wanted: Any = dtype or (torch.float32 if device.type == "cpu" else "auto")
    model, loading = _load_weights(path, config, wanted, trust_remote_code)
    _check_loading(path, model, loading, fresh_head_seed)
    if model.config.num_labels != 1:
        raise CheckpointError(
            f"{path} is not a reward model",
            given=f"{model.config.num_labels} outputs",
            expected="one output",
            fix="give a sequence classifier with num_labels = 1",
        )
    if loading["missing_keys"] and fresh_head_seed is not None:
        _draw_head(model, sorted(loading["missing_keys"]), fresh_head_seed)
    _set_pad_token(model, path, trust_remote_code)
    return model.to(device).eval()  # type: ignore[arg-type, no-any-return]


def _register_moe() -> None:
    importlib.import_module("moemerge.modelling").register()


def refuse_pickle(path: str) -> None:
    """Raise CheckpointError if the folder at `path` holds weights as pickles only."""
    folder = Path(path)
    pickled = sorted(p.name for p in folder.glob("*.bin") if p.name.startswith("pytorch_model"))
    if pickled and not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{path} holds pickled weights",
            given=", ".join(pickled[:3]),
            expected="safetensors: pickle files can run code when they are opened",
            fix="if you trust it, load it with transformers and save_pretrained it to another folder",
        )


def claims_head(config: PreTrainedConfig) -> bool:
    """Whether a config says that its model has a reward head."""
    return any("SequenceClassification" in name for name in config.architectures or [])


def has_own_code(config: PreTrainedConfig) -> bool:
    """Whether a sequence classifier's code comes with the model."""
    return "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})


def _load_weights(
    path: str, config: PreTrainedConfig, dtype: Any, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        with quiet_loading():
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # see load_config
        expected = "safetensors of a sequence classifier that agree with config.json"
        raise unloadable("the model cannot be loaded", path, error, expected) from error
    return model, loading


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep back transformers' load report and progress bar: the loading info is checked in full."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _check_loading(path: str, model: PreTrainedModel, loading: dict[str, Any], seed: int | None) -> None:
    """Refuse a model whose weights are not exactly those of the checkpoint, but for a head to be drawn."""
    missing, unexpected = set(loading["missing_keys"]), set(loading["unexpected_keys"])
    head = {name for name in missing if in_head(model, name)}
    if seed is not None and head == missing:
        unexpected = {name for name in unexpected if not spare_head(name)}
        missing = set()
    wrong = {
        "missing": missing,
        "left over": unexpected,
        "of another shape": {
            f"{name} {tuple(found)}, not {tuple(want)}" for name, found, want in loading["mismatched_keys"]
        },
    }
    given = "; ".join(f"{kind}: {_few(names)}" for kind, names in wrong.items() if names)
    if not given:
        return
    headless = bool(missing) and head == missing
    raise CheckpointError(
        f"{path} has no reward head" if headless else f"{path} does not hold exactly this model's tensors",
        given=given,
        expected="every tensor of the reward model and no other",
        fix="train it first: training gives a base model a fresh head"
        if headless
        else "copy the checkpoint again, or save it again with the code that made it",
    )


def spare_head(name: str) -> bool:
    """Whether a tensor that the reward model lacks is but a base model's head or pooler."""
    return name.startswith(LANGUAGE_HEADS) or ".pooler." in f".{name}"


def in_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor is the reward head's. A pooler is: checkpoints of masked language models lack it."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def _few(names: set[Any]) -> str:
    shown = sorted(str(name) for name in names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _draw_head(model: PreTrainedModel, names: list[str], seed: int) -> None:
    """Draw the head's tensors as transformers does, but from `seed` and in one order."""
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    with torch.no_grad():
        for name in names:
            tensor = model.get_parameter(name)
            if tensor.ndim > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
            else:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    log.info("drew a fresh reward head (%s) from seed %d", ", ".join(names), seed)


def _set_pad_token(model: PreTrainedModel, path: str, trust_remote_code: bool) -> None:
    if model.config.get_text_config().pad_token_id is None:
        pad = load_tokenizer(path, trust_remote_code).pad_token_id
        model.config.get_text_config().pad_token_id = pad
        model.config.pad_token_id = pad


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    batch_tokens: int,
    progress: str = "",
    on_batch: OnBatch | None = None,
) -> Tensor:
    """Scores of `encoded` texts, float32 on CPU, in the order given; shape [len(encoded)].

    Texts of like length go together, at most `batch_tokens` tokens a batch with padding counted (a longer
    text goes alone). Batching does not change scores beyond rounding. `progress` names a progress bar;
    `on_batch` is told the rows of each batch before it runs, in the batch's order. Raises DataError for a
    text without tokens, CheckpointError if a score is not finite.
    """
    _refuse_empty(encoded)
    check_texts(model, encoded)
    scores = torch.empty(len(encoded))
    if not encoded:
        return scores
    # The model pools the last token that is not config.pad_token_id, so that is what must pad.
    pad = model.config.get_text_config().pad_token_id
    pad = tokenizer.pad_token_id if pad is None else pad
    takes = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in takes else {}
    done: list[tuple[list[int], Tensor]] = []
    with torch.inference_mode(), _bar(len(encoded), progress) as bar:
        for rows in batches([len(text.ids) for text in encoded], batch_tokens):
            if on_batch is not None:
                on_batch(rows)
            inputs = collate([encoded[row] for row in rows], pad, _gates_by_prompt(model), model.device)
            done.append((rows, model(**inputs, **extra).logits[:, 0].float()))
            bar.update(len(rows))
        for rows, scores_B in done:
            scores[rows] = scores_B.cpu()
    _refuse_non_finite(scores)
    return scores


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows grouped by falling length, `rows x longest <= batch_tokens` (or one row), ties in order."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _gates_by_prompt(model: PreTrainedModel) -> bool:
    return (getattr(model.config, "moemerge", None) or {}).get("gate") == "prompt"


def collate(texts: Sequence[Encoded], pad: int, prompts: bool, device: torch.device) -> dict[str, Tensor]:
    """A batch of texts padded on the right with `pad`; `prompt_lengths` too if `prompts` asks for them."""
    longest = max(len(text.ids) for text in texts)
    ids_BT = torch.tensor([text.ids + [pad] * (longest - len(text.ids)) for text in texts])
    lengths_B = torch.tensor([len(text.ids) for text in texts])
    inputs = {"input_ids": ids_BT, "attention_mask": (torch.arange(longest) < lengths_B[:, None]).long()}
    if prompts:
        inputs["prompt_lengths"] = torch.tensor([text.prompt_length for text in texts])
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def _bar(total: int, text: str) -> tqdm[Any]:
    return tqdm(total=total, desc=text, unit="text", leave=False, disable=None if text else True)


def _refuse_empty(encoded: Sequence[Encoded]) -> None:
    empty = [row for row, text in enumerate(encoded) if not text.ids]
    if empty:
        raise DataError(
            "a text without tokens cannot be scored",
            given=f"{len(empty)} of {len(encoded)} texts, first at position {empty[0]}",
            expected="at least one token",
            fix="drop empty answers, or use a tokenizer that adds an end token",
        )


def _refuse_non_finite(scores: Tensor) -> None:
    bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise CheckpointError(
            "the model gives scores that are not finite",
            given=f"{len(bad)} of {len(scores)} texts, first at position {bad[0]}: {scores[bad[0]].item()}",
            expected="finite scores",
            fix="check the checkpoint for NaN, or load it in float32 or bfloat16 in place of float16",
        )


def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    batch_tokens: int,
    progress: str = "",
) -> Tensor:
    """Scores of pairs, [len(pairs), 2]: chosen, rejected. As `score`, over both sides at once."""
    texts = texts_of(pairs)
    return score(model, tokenizer, texts, batch_tokens, progress).view(-1, 2)


def bradley_terry(scores_P2: Tensor) -> tuple[float, float]:
    """Mean of -log sigmoid(chosen - rejected) in nats, and the share of pairs with chosen > rejected.

    A tie is an error. Raises DataError without pairs.
    """
    if not len(scores_P2):
        raise DataError(
            "no pairs to compare",
            given="0 pairs",
            expected="at least one",
            fix="give a file with usable pairs",
        )
    margin_P = scores_P2[:, 0].double() - scores_P2[:, 1].double()
    loss_P = -torch.nn.functional.logsigmoid(margin_P)
    return loss_P.mean().item(), (margin_P > 0).double().mean().item()
