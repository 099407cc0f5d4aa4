"""The MoE layer against transformers' own MoE block of the same shape, and against the operations it needs.

python benchmarks/moe_layer.py [--tokens 2048 --hidden 576 --inner 1536 --repeats 9]

Forward and forward + backward of moemerge's layer and of Qwen2MoeSparseMoeBlock (one shared expert, N
routed, K per token), in turn in one process. Prints medians, ratios, and seconds per floating-point
operation relative to the dense MLP's (1.0: as efficient as the dense layer).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, Qwen2MoeConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moemerge.models.families import FAMILIES
from moemerge.models.moe import DenseExpert, MoELayer, StackedExperts
from moemerge.models.moe_settings import MoeSettings


def our_layer(hidden: int, inner: int, experts: int, selected: int) -> MoELayer:
    """moemerge's layer over a Llama MLP."""
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner)
    config._experts_implementation = "grouped_mm"
    settings = MoeSettings(experts, selected, True, [0], "xft", 0.5, "linear", 0.02, 0.0, "cv", "float32")
    mlp = LlamaMLP(config)
    shared = DenseExpert({m: getattr(mlp, p.split(".")[1]) for m, p in FAMILIES["llama"].matrices}, "silu")
    shapes: dict[str, tuple[int, ...]] = {
        "gate_up_proj": (experts, 2 * inner, hidden),
        "down_proj": (experts, hidden, inner),
    }
    layer = MoELayer(settings, hidden, StackedExperts(config, shapes, "silu"), shared)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer


def their_layer(hidden: int, inner: int, experts: int, selected: int) -> torch.nn.Module:
    """transformers' Qwen2-MoE block of the same shape."""
    config = Qwen2MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=selected,
    )
    config._experts_implementation = "grouped_mm"
    layer = Qwen2MoeSparseMoeBlock(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer


def seconds(layer: torch.nn.Module, x_BTD: torch.Tensor, backward: bool) -> float:
    """One forward pass, with its backward if asked for."""
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = layer(x_BTD)
        out = out[0] if isinstance(out, tuple) else out
        if backward:
            out.sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Time the three layers in turn and print a row per setting."""
    parser = argparse.ArgumentParser()
    for name, value in (("tokens", 2048), ("hidden", 576), ("inner", 1536), ("repeats", 9), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    x_BTD = torch.randn(4, a.tokens // 4, a.hidden, requires_grad=True)
    dense = LlamaMLP(LlamaConfig(hidden_size=a.hidden, intermediate_size=a.inner))
    for experts, selected in ((7, 2), (7, 5)):
        layers = [make(a.hidden, a.inner, experts, selected) for make in (our_layer, their_layer)] + [dense]
        for backward in (False, True):
            rows = [[seconds(layer, x_BTD, backward) for layer in layers] for _ in range(a.repeats + 1)][1:]
            ours, theirs, plain = (statistics.median(row[i] for row in rows) for i in range(3))
            ratio = statistics.median(row[0] / row[1] for row in rows)
            efficiency = statistics.median(row[0] / ((selected + 1) * row[2]) for row in rows)
            print(
                f"| MoE layer, N={experts} K={selected}, {'forward + backward' if backward else 'forward'}"
                f" | {a.tokens} tokens, {a.hidden} x {a.inner}, float32, {a.threads} thread"
                f" | {ours * 1e3:.0f} ms, theirs {theirs * 1e3:.0f} ms ({ratio:.2f}x),"
                f" per operation {efficiency:.2f}x the dense layer |"
            )


if __name__ == "__main__":
    main()
