"""An upcycled MoE as a stock transformers checkpoint: Qwen2MoeForSequenceClassification, no moemerge needed.

Qwen2-MoE adds sigmoid(shared_expert_gate x) shared(x) to sum_i w_i expert_i(x), w being the router's softmax
renormalised over the selected experts (norm_topk_prob). That is the gate `topk` with its constant weight
lambda once the sigmoid is held at 1/2 by a gate of zeros, the shared down_proj is scaled by 2 lambda and the
routed ones by 1 - lambda. Both scales are powers of two when lambda is 1/2 or 0: then no weight is rounded.

Letters: N routed experts, F hidden width of the MLP, D model width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, Qwen2MoeConfig, Qwen2MoeForSequenceClassification

from moemerge.artifacts.progress import hidden
from moemerge.artifacts.stage import Draft
from moemerge.errors import UnsupportedError
from moemerge.merging.sources.moe import MoeCheckpoint
from moemerge.models.checkpoint import copy_side_files, write_checkpoint
from moemerge.models.device import use_device
from moemerge.models.equivalence import largest_difference, probe_scores, probe_texts, require_alike
from moemerge.models.families.base import PREFIX, ExpertTensor
from moemerge.models.families.dense import dense_config, shared_values
from moemerge.models.loading import load_reward_model
from moemerge.models.modelling import moe_to_look_at
from moemerge.options.export import Export

# Width of a shared expert of zeros, where the MoE has none: what any tensor-parallel split divides.
IDLE = 16

log = logging.getLogger(__name__)


def _full(config: PreTrainedConfig) -> list[str]:
    return ["full_attention"] * config.num_hidden_layers


def _mistral(config: PreTrainedConfig) -> list[str]:
    """All layers slide or none; Mistral's model reads no layer_types."""
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def _listed(config: PreTrainedConfig) -> list[str]:
    return list(config.layer_types)


# Families whose attention, norms and MLP are computed as Qwen2-MoE's, and how their layers attend.
ATTENTION: dict[str, Callable[[PreTrainedConfig], list[str]]] = {
    "llama": _full,
    "ministral": _listed,
    "mistral": _mistral,
    "qwen2": _listed,
    "seed_oss": _full,
}


def write_native(options: Export, draft: Draft) -> None:
    """Write the MoE `options.model` as one Qwen2-MoE reward model, load it, compare scores on a probe batch.

    Tensors are read and written one at a time. Weights keep the MoE's dtype; unless lambda is 0 or 1/2, each
    down_proj is rounded once. Raises UnsupportedError for what Qwen2-MoE cannot express and CheckpointError
    if the scores differ by more than the dtype rounds.
    """
    assert options.model is not None, "recipe.Export asks for it"
    source = MoeCheckpoint(options.model)
    source.require_one_head()
    config = native_config(source)
    draft.reserve(_num_parameters(config) * source.dtype.itemsize)
    write_checkpoint(draft.folder, native_tensors(source), options.shard_size)
    config.save_pretrained(draft.folder)
    copy_side_files(source.folder, draft.folder)
    shared, routed = _scales(source)
    # frexp gives a mantissa in [1/2, 1): 1/2 for powers of two, and only these change no mantissa of a
    # weight.
    exact = all(scale == 0 or math.frexp(scale)[0] == 0.5 for scale in (shared, routed))
    if not exact:
        log.warning(
            "export: down_proj is scaled by %g and %g, which rounds in %s", shared, routed, source.dtype
        )
    draft.results |= {"form": options.form, "scales": {"shared": shared, "routed": routed}, "exact": exact}
    _compare(options, source, draft)


def _num_parameters(config: Qwen2MoeConfig) -> int:
    """How many numbers the weights of a model of `config` hold."""
    with torch.device("meta"):
        model = Qwen2MoeForSequenceClassification(config)
    return sum(tensor.numel() for tensor in model.state_dict().values())


def native_config(source: MoeCheckpoint) -> Qwen2MoeConfig:
    """The Qwen2-MoE config of `source`, every value of it taken from the MoE's config, none by default.

    Raises UnsupportedError, with the reason, for what Qwen2-MoE cannot express.
    """
    source.opened.require_stock_head("Qwen2-MoE cannot express its head")
    _refuse_inexpressible(source)
    dense, settings = dense_config(source.config), source.settings
    layer_types = ATTENTION[dense.model_type](dense)
    sliding = "sliding_attention" in layer_types
    head_dim = {"head_dim": dense.head_dim} if hasattr(dense, "head_dim") else {}
    values = {
        **head_dim,
        "layer_types": layer_types,
        "use_sliding_window": sliding,
        "sliding_window": dense.sliding_window if sliding else None,
        "max_window_layers": dense.num_hidden_layers,
        "qkv_bias": any(name.endswith("q_proj.bias") for name in source.backbone),
        "num_experts": settings.num_routed_experts,
        "num_experts_per_tok": settings.num_experts_per_tok,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n in range(dense.num_hidden_layers) if n not in settings.layers],
        "moe_intermediate_size": dense.intermediate_size,
        "shared_expert_intermediate_size": dense.intermediate_size if settings.shared_expert else IDLE,
        "router_aux_loss_coef": settings.balance_coefficient,
        "output_router_logits": False,
        "architectures": ["Qwen2MoeForSequenceClassification"],
        "dtype": source.dtype,
    }
    return Qwen2MoeConfig(**{**shared_values(dense, Qwen2MoeConfig), **values})


def native_tensors(source: MoeCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by the name that from_pretrained reads, experts one by one."""
    for name in source.backbone:
        yield name, source.weights.tensor(name)
    for tensor in tqdm(source.tensors, desc="export", leave=False, disable=hidden()):
        yield from _copies(source, tensor)
    for home in dict.fromkeys(tensor.home for tensor in source.tensors):
        gate_ND = source.weights.tensor(f"{home}.gate.weight")
        yield f"{home}.gate.weight", gate_ND
        # sigmoid(0 x) = 1/2 whatever x is; _scales makes up for the half.
        yield f"{home}.shared_expert_gate.weight", torch.zeros_like(gate_ND[:1])


def _copies(source: MoeCheckpoint, tensor: ExpertTensor) -> Iterator[tuple[str, Tensor]]:
    """The shared expert's copy of a dense tensor, zeros if there is none, then the N routed ones."""
    shared, routed = _scales(source) if tensor.matrix == "down" else (1.0, 1.0)
    if source.settings.shared_expert:
        yield tensor.shared, source.weights.tensor(tensor.shared) * shared
    else:
        # Qwen2-MoE always has a shared expert: one whose matrices are zeros adds nothing.
        rows, columns = tensor.shape
        shape = (rows, IDLE) if tensor.matrix == "down" else (IDLE, columns)
        yield tensor.shared, torch.zeros(shape, dtype=source.dtype)
    for index in range(source.settings.num_routed_experts):
        name = f"{tensor.home}.experts.{index}.{tensor.matrix}_proj.weight"
        yield name, source.weights.expert(tensor, index) * routed


def _scales(source: MoeCheckpoint) -> tuple[float, float]:
    """What the shared and the routed down_proj are multiplied by: the MLP's output is linear in it."""
    weight = source.settings.gate_shared_weight if source.settings.shared_expert else 0.0
    return 2 * weight, 1 - weight


def _refuse_inexpressible(source: MoeCheckpoint) -> None:
    reason = _reason(source)
    if reason is not None:
        raise UnsupportedError(
            f"this MoE cannot be written as Qwen2-MoE: {reason[0]}",
            given=f"{source.folder}, {reason[1]}",
            expected=f"gate topk, a linear router, no bias but in q, k, v; {', '.join(ATTENTION)}",
            fix="use the MoE with moemerge, merge it, or export its experts with form dense",
        )


def _reason(source: MoeCheckpoint) -> tuple[str, str] | None:
    """Why Qwen2-MoE cannot express the MoE, and what is to blame; None if it can."""
    family, settings = source.config.model_type.removeprefix(PREFIX), source.settings
    if family not in ATTENTION:
        return "its attention, norms, positions or MLP are computed otherwise", f"model_type {family}"
    if settings.gate == "xft":
        return "its weights depend on max s, and are not the selected s renormalised", "gate xft"
    if settings.gate == "prompt":
        return "it is routed by prompt, Qwen2-MoE by token", "gate prompt"
    if settings.router != "linear":
        return "Qwen2-MoE's router is linear", f"router {settings.router}"
    ends = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
    biases = [name for name in source.backbone if name.endswith("bias") and not name.endswith(ends)]
    biases += [tensor.dense for tensor in source.tensors if tensor.matrix.endswith("bias")]
    return ("Qwen2-MoE has no such biases", ", ".join(biases[:3])) if biases else None


def _compare(options: Export, source: MoeCheckpoint, draft: Draft) -> None:
    """Largest difference between the scores of the MoE and of what was written, on a probe batch."""
    device = use_device(options)
    texts = probe_texts(source.config, options.seed)
    theirs_B = probe_scores(moe_to_look_at(source.folder, str(device)), texts)
    ours_B = probe_scores(load_reward_model(draft.folder, device, source.dtype), texts)
    draft.results["largest_difference"] = largest_difference(ours_B, theirs_B)
    what, fix = "the Qwen2-MoE does not equal the MoE", "report this model's config"
    require_alike(ours_B, theirs_B, source.dtype, what, fix)
