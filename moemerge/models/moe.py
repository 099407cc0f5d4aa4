"""The mixture-of-experts layer: router, gates, stacked experts, balance loss.

Letters: B sequences, T tokens (flattened over the batch), D model width, F hidden width of the MLP,
N routed experts, K routed experts per token, S selected token-expert pairs (T * K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moemerge.errors import UnsupportedError
from moemerge.models.moe_settings import MoeSettings

LOAD_NOISE_STD = 1.0
EPSILON = 1e-10


@dataclass(frozen=True)
class Steering:
    """What training imposes on the gates for one batch; nothing unless said otherwise.

    temperature divides the router's logits. num_selected stands for the config's K. expert_B is the one
    routed expert of each sequence; alone_B marks the sequences that do without the shared expert.
    """

    temperature: float = 1.0
    num_selected: int | None = None
    expert_B: Tensor | None = None
    alone_B: Tensor | None = None


FREE = Steering()


def by_token(values_B: Tensor | None, x_TD: Tensor) -> Tensor | None:
    """A value per sequence as one per row of `x_TD`: its tokens or, under the prompt gate, its prompt."""
    return None if values_B is None else values_B.repeat_interleave(len(x_TD) // len(values_B))


@dataclass(frozen=True)
class Gating:
    """What a gate decided for T tokens; weights_TK and shared_T sum to one per token."""

    probabilities_TN: torch.Tensor
    index_TK: torch.Tensor
    weights_TK: torch.Tensor
    shared_T: torch.Tensor
    mask_T: torch.Tensor


class TokenContext:
    """Which tokens of the running forward pass are real, which are the prompt's, and what steers the gates.

    The model fills the first two before its layers run; a trainer may set `steering`, which eval mode
    ignores. Under a gate that picks one expert, the layers leave their choice in `expert_B` for the head. A
    recomputation during backward reads all of this again, so run backward before the next forward when
    gradient checkpointing is on.
    """

    def __init__(self) -> None:
        self.mask_BT: torch.Tensor | None = None
        self.prompt_BT: torch.Tensor | None = None
        self.expert_B: torch.Tensor | None = None
        self.steering = FREE


class HeadByExpert(nn.Linear):
    """N reward heads in one matrix [N, D]: each sequence has the score of the expert that it went through.

    Where layers chose several experts, that of the last one counts.
    """

    def __init__(self, head: nn.Linear, num_experts: int, context: TokenContext) -> None:
        made = {"device": head.weight.device, "dtype": head.weight.dtype}
        super().__init__(head.in_features, num_experts, bias=head.bias is not None, **made)
        self.context = context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ..., D] -> [B, ..., 1]."""
        expert_B = self.context.expert_B
        assert expert_B is not None, "the layers with experts run before the head"
        scores = super().forward(x)
        index = expert_B.to(x.device).view(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-1], 1)
        return scores.gather(-1, index)


class _AttachLoss(torch.autograd.Function):
    """Identity on `x` whose backward also sends `scale` into `loss`: training on loss * scale besides."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (loss,) = ctx.saved_tensors
        return gradients[0], torch.full_like(loss, ctx.scale), None


def gate_weights(
    logits_TN: torch.Tensor,
    num_selected: int,
    kind: str,
    has_shared: bool,
    shared_weight: float = 0.5,
    forced_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities [T, N], index [T, K], routed weights [T, K] and shared weight [T], at least float32.

    `xft` and `prompt`: shared 1 - max s, routed max(s) * softmax over the selected s (routing-weight
    normalisation, arXiv 2404.15247). `topk`: shared `shared_weight`, the rest shared out as s / sum s.
    Per token all weights sum to one. `forced_T` selects one expert per token, K = 1, whose s takes the place
    of the largest.
    """
    wide = logits_TN if logits_TN.dtype == torch.float64 else logits_TN.float()
    s_TN = wide.softmax(-1)
    if forced_T is None:
        top_TK, index_TK = s_TN.topk(num_selected, dim=-1)
    else:
        index_TK = forced_T[:, None]
        top_TK = s_TN.gather(1, index_TK)
    if kind == "topk":
        routed_T = s_TN.new_full(s_TN.shape[:1], 1 - shared_weight if has_shared else 1.0)
        share_TK = top_TK / top_TK.sum(-1, keepdim=True)
    else:
        routed_T = top_TK[:, 0] if has_shared else torch.ones_like(top_TK[:, 0])
        share_TK = top_TK.softmax(-1)
    return s_TN, index_TK, routed_T[:, None] * share_TK, 1 - routed_T


def balance_loss(
    logits_TN: torch.Tensor, s_TN: torch.Tensor, index_TK: torch.Tensor, mask_T: torch.Tensor, kind: str
) -> torch.Tensor:
    """Balance loss of one layer over its real tokens; zero when there are none.

    `cv`: cv^2 of importance (probability mass of selected experts) + cv^2 of load (arXiv 1701.06538,
    as in XFT), load being the smooth chance of selection under unit normal noise that is not drawn.
    `switch`: N * sum of f_i P_i (arXiv 2101.03961), f_i the share of selections; 1 at perfect balance.
    """
    keep_T1 = mask_T[:, None].to(s_TN.dtype)
    chosen_TN = torch.zeros_like(s_TN).scatter(1, index_TK, 1.0) * keep_T1
    count = keep_T1.sum().clamp(min=1)
    if kind == "switch":
        share_N = chosen_TN.sum(0) / (count * index_TK.shape[1])
        return s_TN.shape[1] * (share_N * (s_TN * keep_T1).sum(0) / count).sum()
    load_TN = _selection_chance(logits_TN.to(s_TN.dtype), index_TK.shape[1]) * keep_T1
    return _squared_variation((s_TN * chosen_TN).sum(0)) + _squared_variation(load_TN.sum(0))


def _selection_chance(logits_TN: torch.Tensor, num_selected: int) -> torch.Tensor:
    """The chance that each expert is selected if its own logit had normal noise (arXiv 1701.06538, eq. 8)."""
    if num_selected == logits_TN.shape[1]:
        return torch.ones_like(logits_TN)
    # An expert is selected if it beats the K-th largest of the others. Without itself, that is the K+1-th
    # largest of all for one that is among the first K, and the K-th for any other.
    top_TK = logits_TN.topk(num_selected + 1, dim=-1).values
    next_T1, last_T1 = top_TK[:, -1:], top_TK[:, -2:-1]
    threshold_TN = torch.where(logits_TN > next_T1, next_T1, last_T1)
    return torch.special.ndtr((logits_TN - threshold_TN) / LOAD_NOISE_STD)


def _squared_variation(x_N: torch.Tensor) -> torch.Tensor:
    """cv^2: variance over squared mean."""
    return x_N.var() / (x_N.mean() ** 2 + EPSILON)


class DenseExpert(nn.Module):
    """An MLP made of the dense model's own linear modules: gate_proj, up_proj or gate_up_proj, down_proj."""

    gate_proj: nn.Module
    up_proj: nn.Module
    gate_up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, linears: dict[str, nn.Module], activation: str) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(f"{name}_proj", linear)
        self.act_fn = ACT2FN[activation]

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        if hasattr(self, "gate_up_proj"):
            gate_TF, up_TF = self.gate_up_proj(x_TD).chunk(2, dim=-1)
            return self.down_proj(self.act_fn(gate_TF) * up_TF)
        if hasattr(self, "gate_proj"):
            return self.down_proj(self.act_fn(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return self.down_proj(self.act_fn(self.up_proj(x_TD)))


class StackedExperts(nn.Module):
    """N experts as stacked weights, run by transformers' expert kernels (grouped_mm, ...) or eagerly.

    Gated: gate_up_proj [N, 2F, D] with the gate's rows first; else up_proj [N, F, D]. down_proj [N, D, F].
    Biases, where the dense model has them: the same name + "_bias" [N, rows].
    """

    # What transformers' kernels ask of a module of experts.
    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    _is_expert_parallel = False
    down_proj: nn.Parameter

    def __init__(self, config: Any, shapes: dict[str, tuple[int, ...]], activation: str) -> None:
        super().__init__()
        self.config = config
        self.num_experts = next(iter(shapes.values()))[0]
        self.has_gate = "gate_up_proj" in shapes
        self.has_bias = "down_proj_bias" in shapes
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.act_fn = ACT2FN[activation]

    def forward(self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Sum over the K selected experts of weight * expert(x): [T, D], in x's dtype."""
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            return self._autocast(device, x_TD, index_TK, weights_TK)
        kernel = ALL_EXPERTS_FUNCTIONS.get_interface(self._implementation(x_TD), StackedExperts._eager)
        return kernel(self, x_TD, index_TK, weights_TK)

    def _autocast(self, device: str, x_TD: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """grouped_mm ignores autocast, so cast here."""
        dtype = torch.get_autocast_dtype(device)
        weights = {name: weight.to(dtype) for name, weight in self.named_parameters()}
        with torch.autocast(device, enabled=False):
            return torch.func.functional_call(self, weights, (x_TD.to(dtype), *routing))

    def _implementation(self, x_TD: torch.Tensor) -> str:
        """The kernel asked for, or eager where grouped_mm cannot go: float64, rows not of 16 bytes."""
        asked = self.config._experts_implementation or "grouped_mm"
        if asked != "grouped_mm":
            return asked
        rows = (x_TD.shape[1], self.down_proj.shape[2])
        aligned = all(row * x_TD.element_size() % 16 == 0 for row in rows)
        return "grouped_mm" if aligned and x_TD.dtype != torch.float64 else "eager"

    def _eager(self, x_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        out_TD = torch.zeros(x_TD.shape, dtype=weights_TK.dtype, device=x_TD.device)
        for expert in range(self.num_experts):
            token_S, slot_S = torch.where(index_TK == expert)
            if len(token_S):
                y_SD = self._one(expert, x_TD[token_S]) * weights_TK[token_S, slot_S, None]
                out_TD = out_TD.index_add(0, token_S, y_SD.to(out_TD.dtype))
        return out_TD.to(x_TD.dtype)

    def _apply_gate(self, gate_up_SF: torch.Tensor) -> torch.Tensor:
        """[S, 2F] -> [S, F]; the kernels call it too."""
        gate_SF, up_SF = gate_up_SF.chunk(2, dim=-1)
        return self.act_fn(gate_SF) * up_SF

    def _one(self, expert: int, x_SD: torch.Tensor) -> torch.Tensor:
        if self.has_gate:
            inner_SF = self._apply_gate(self._linear("gate_up_proj", expert, x_SD))
            return self._linear("down_proj", expert, inner_SF)
        return self._linear("down_proj", expert, self.act_fn(self._linear("up_proj", expert, x_SD)))

    def _linear(self, name: str, expert: int, x_SD: torch.Tensor) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return functional.linear(x_SD, getattr(self, name)[expert], bias)


def make_router(kind: str, width: int, num_experts: int) -> nn.Module:
    """linear: D -> N. mlp: D -> N -> tanh -> N, as in XFT. No biases."""
    last = nn.Linear(width if kind == "linear" else num_experts, num_experts, bias=False)
    if kind == "linear":
        return last
    return nn.Sequential(nn.Linear(width, num_experts, bias=False), nn.Tanh(), last)


class MoELayer(nn.Module):
    """Stands in a transformer layer where the dense MLP stood; equals it while all experts are equal.

    `observer`, if set, receives the Gating of every forward pass. While training with gradients, the
    balance loss times the config's balance_coefficient and `balance_scale` is attached to the routing
    weights themselves, inside the layer, so that no form of gradient checkpointing loses it. In a model
    `balance_scale` is 1 / MoE layers; divide it by the gradient accumulation steps when there are several.
    `last_balance` is the detached loss, without the two factors.
    """

    def __init__(
        self,
        settings: MoeSettings,
        width: int,
        experts: StackedExperts,
        shared: DenseExpert | None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.gate = make_router(settings.router, width, settings.num_routed_experts)
        self.experts = experts
        self.shared_expert = shared
        self.dropout = nn.Dropout(dropout)
        self.context = TokenContext()
        self.observer: Callable[[Gating], None] | None = None
        self.balance_scale = 1.0
        self.last_balance: torch.Tensor | None = None

    @property
    def router(self) -> nn.Module:
        """The network from token states to expert logits."""
        return self.gate

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[..., D] -> [..., D], plus `residual` where the dense MLP adds it."""
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        mask_T = self._real_tokens(x_TD)
        prompt_gated = self.settings.gate == "prompt"
        rows_RD, rows_R = self._prompts(x_TD) if prompt_gated else (x_TD, mask_T)
        gating = self._route(rows_RD, rows_R)
        if self.settings.picks_one_expert:
            self.context.expert_B = gating.index_TK[:, 0]
        if prompt_gated:
            gating = _repeat(gating, len(x_TD) // len(rows_RD), mask_T)
        if self.observer is not None:
            self.observer(gating)
        out_TD = self.experts(x_TD, gating.index_TK, gating.weights_TK)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            out_TD = out_TD + (gating.shared_T[:, None] * shared_TD).to(shared_TD.dtype)
        out = self.dropout(out_TD.reshape(hidden.shape))
        return out if residual is None else residual + out

    def _route(self, x_TD: torch.Tensor, mask_T: torch.Tensor) -> Gating:
        s, steering = self.settings, self.context.steering if self.training else FREE
        logits_TN = self.gate(x_TD) if steering.temperature == 1 else self.gate(x_TD) / steering.temperature
        num_selected = steering.num_selected or s.num_experts_per_tok
        forced_T = by_token(steering.expert_B, x_TD)
        has_shared = self.shared_expert is not None
        probabilities_TN, index_TK, weights_TK, shared_T = gate_weights(
            logits_TN, num_selected, s.gate, has_shared, s.gate_shared_weight, forced_T
        )
        alone_T = by_token(steering.alone_B, x_TD)
        if alone_T is not None:  # the routed weights take over the shared expert's: all sum to one again
            shared_T = shared_T.masked_fill(alone_T, 0.0)
            weights_TK = weights_TK / torch.where(alone_T, weights_TK.sum(1), 1.0)[:, None]
        if self.training and torch.is_grad_enabled() and s.balance_coefficient > 0:
            # A router is judged by its own choice, not by one that was forced on it.
            own_TK = index_TK if forced_T is None else probabilities_TN.topk(num_selected, dim=-1).indices
            loss = balance_loss(logits_TN, probabilities_TN, own_TK, mask_T, s.balance_loss)
            self.last_balance = loss.detach()
            weights_TK = _AttachLoss.apply(weights_TK, loss, s.balance_coefficient * self.balance_scale)
        return Gating(probabilities_TN, index_TK, weights_TK, shared_T, mask_T)

    def _real_tokens(self, x_TD: torch.Tensor) -> torch.Tensor:
        mask_BT = self.context.mask_BT
        if mask_BT is None:
            return torch.ones(len(x_TD), dtype=torch.bool, device=x_TD.device)
        if mask_BT.numel() != len(x_TD):
            raise UnsupportedError(
                "tokens reach the experts in pieces",
                given=f"{len(x_TD)} tokens of {mask_BT.numel()}",
                expected="all tokens of a batch at once, padding included",
                fix="switch off chunked or unpadded feed-forward in the model's config",
            )
        return mask_BT.reshape(-1).to(x_TD.device)

    def _prompts(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean state over each prompt's tokens, [B, D], and a mask of ones."""
        prompt_BT = self.context.prompt_BT
        if prompt_BT is None:
            raise UnsupportedError(
                "the prompt gate does not know where the prompts end",
                given="a forward pass without prompt_lengths",
                expected="prompt_lengths, one number of tokens per sequence",
                fix="pass prompt_lengths to the model, score through moemerge, or use the merged model",
            )
        weight_BT = prompt_BT.to(x_TD.device, x_TD.dtype)
        x_BTD = x_TD.reshape(*weight_BT.shape, -1)
        mean_BD = (weight_BT[..., None] * x_BTD).sum(1) / weight_BT.sum(1, keepdim=True).clamp(min=1)
        return mean_BD, torch.ones(len(mean_BD), dtype=torch.bool, device=x_TD.device)


def _repeat(gating: Gating, length: int, mask_T: torch.Tensor) -> Gating:
    """A gating per sequence as one per token: `length` tokens each, padding included."""
    rows = (gating.probabilities_TN, gating.index_TK, gating.weights_TK, gating.shared_T)
    s_TN, index_TK, weights_TK, shared_T = (row.repeat_interleave(length, 0) for row in rows)
    return Gating(s_TN, index_TK, weights_TK, shared_T, mask_T)


def moe_layers(model: nn.Module) -> dict[int, MoELayer]:
    """The MoE layers of `model` by the number of their transformer layer, in order."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    return dict(zip(layers[0].settings.layers, layers, strict=True)) if layers else {}
