"""Gates, balance loss and experts against independent answers. Letters as in moemerge.models.moe."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY_MOE, tiny_moe
from torch.utils.checkpoint import checkpoint

from moemerge.errors import CheckpointError, UnsupportedError
from moemerge.models.moe import Gating, MoELayer, balance_loss, gate_weights, moe_layers
from moemerge.models.moe_settings import MoeSettings


def random_logits(num_tokens: int = 50, num_experts: int = 7) -> torch.Tensor:
    return torch.randn(
        num_tokens, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


def test_zero_logits_give_the_published_weights() -> None:
    """N=7, K=5: shared 1 - 1/7, five routed of (1/7)/5, two of nothing."""
    _, index_TK, weights_TK, shared_T = gate_weights(torch.zeros(1, 7), 5, "xft", True)
    assert shared_T.item() == pytest.approx(6 / 7, abs=1e-6)
    assert weights_TK[0].tolist() == pytest.approx([1 / 35] * 5, abs=1e-7)
    assert round(shared_T.item(), 3) == 0.857 and round(weights_TK[0, 0].item(), 4) == 0.0286
    assert index_TK[0].unique().numel() == 5


def test_xft_gate_by_hand() -> None:
    """Two softmaxes, written out for one token."""
    logits = random_logits(1)
    s = (logits[0].exp() / logits[0].exp().sum()).tolist()
    top = sorted(range(7), key=lambda i: -s[i])[:3]
    total = sum(torch.tensor(s[i], dtype=torch.float64).exp().item() for i in top)
    expected = [s[top[0]] * torch.tensor(s[i], dtype=torch.float64).exp().item() / total for i in top]
    _, index_TK, weights_TK, shared_T = gate_weights(logits, 3, "xft", True)
    assert index_TK[0].tolist() == top
    assert weights_TK[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert shared_T.item() == pytest.approx(1 - s[top[0]], rel=1e-12)


@pytest.mark.parametrize("kind", ["xft", "topk", "prompt"])
@pytest.mark.parametrize("has_shared", [True, False])
@pytest.mark.parametrize("selected", [1, 3, 7])
def test_gates_sum_to_one_and_select_exactly_k(kind: str, has_shared: bool, selected: int) -> None:
    _, index_TK, weights_TK, shared_T = gate_weights(random_logits(), selected, kind, has_shared, 0.3)
    torch.testing.assert_close(weights_TK.sum(1) + shared_T, torch.ones(50, dtype=torch.float64))
    assert all(row.unique().numel() == selected for row in index_TK)
    assert (weights_TK > 0).all()
    assert (shared_T > 0).all() if has_shared else (shared_T == 0).all()


def test_topk_gate_has_a_fixed_shared_weight() -> None:
    s_TN, index_TK, weights_TK, shared_T = gate_weights(random_logits(), 2, "topk", True, 0.3)
    top_TK = s_TN.gather(1, index_TK)
    assert shared_T.tolist() == pytest.approx([0.3] * 50)
    torch.testing.assert_close(weights_TK, 0.7 * top_TK / top_TK.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", ["cv", "switch"])
def test_balance_loss_against_loops(kind: str) -> None:
    """Token by token, expert by expert, padding left out."""
    logits, mask = random_logits(20, 4), torch.arange(20) % 3 != 0
    s_TN, index_TK, _, _ = gate_weights(logits, 2, "xft", True)
    importance, chances, counts, mass = [0.0] * 4, [0.0] * 4, [0] * 4, [0.0] * 4
    normal = torch.distributions.Normal(0.0, 1.0)
    for t in range(20):
        if not mask[t]:
            continue
        for i in range(4):
            others = sorted((logits[t, j].item() for j in range(4) if j != i), reverse=True)
            chances[i] += normal.cdf(logits[t, i] - others[1]).item()
            mass[i] += s_TN[t, i].item()
            if i in index_TK[t]:
                importance[i] += s_TN[t, i].item()
                counts[i] += 1
    tokens = int(mask.sum())
    if kind == "switch":
        expected = 4 * sum(counts[i] / (2 * tokens) * mass[i] / tokens for i in range(4))
    else:
        expected = sum(
            torch.tensor(x).var().item() / torch.tensor(x).mean().item() ** 2 for x in (importance, chances)
        )
    assert balance_loss(logits, s_TN, index_TK, mask, kind).item() == pytest.approx(expected, rel=1e-5)


def test_perfect_balance_is_the_minimum() -> None:
    logits = torch.eye(4, dtype=torch.float64) * 5
    mask = torch.ones(4, dtype=torch.bool)
    s_TN, index_TK, _, _ = gate_weights(logits, 1, "xft", True)
    assert balance_loss(logits, s_TN, index_TK, mask, "cv").item() == pytest.approx(0, abs=1e-12)
    assert balance_loss(logits, s_TN, index_TK, mask, "switch").item() == pytest.approx(1)
    collapsed = logits[[0, 0, 0, 0]]
    s_TN, index_TK, _, _ = gate_weights(collapsed, 1, "xft", True)
    assert balance_loss(collapsed, s_TN, index_TK, mask, "cv").item() > 1
    assert balance_loss(collapsed, s_TN, index_TK, mask, "switch").item() > 2


@pytest.mark.parametrize("mode", ["plain", "reentrant", "non-reentrant"])
def test_attached_balance_gradient_equals_explicit_loss(mode: str) -> None:
    """Gradient of score + coefficient * scale * balance, in every form of checkpointing."""
    layer = moe_layers(tiny_moe())[0].double().train()
    layer.balance_scale = 0.5
    x_TD = torch.randn(
        30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    layer.context.mask_BT = torch.arange(30).reshape(1, 30) < 20
    call = layer if mode == "plain" else lambda x: checkpoint(layer, x, use_reentrant=mode == "reentrant")
    call(x_TD).square().sum().backward()
    attached = [layer.gate.weight.grad.clone(), x_TD.grad.clone()]

    layer.zero_grad()
    x_TD.grad = None
    layer.settings = MoeSettings.read({**layer.settings.to_dict(), "balance_coefficient": 0.0})
    output_TD = layer(x_TD)
    logits_TN = layer.gate(x_TD)
    s_TN, index_TK, _, _ = gate_weights(logits_TN, 2, "xft", True)
    balance = balance_loss(logits_TN, s_TN, index_TK, layer.context.mask_BT[0], "cv")
    (output_TD.square().sum() + 0.1 * 0.5 * balance).backward()
    for ours, explicit in zip(attached, [layer.gate.weight.grad, x_TD.grad], strict=True):
        torch.testing.assert_close(ours, explicit, rtol=1e-9, atol=1e-12)
    assert layer.last_balance is not None and layer.last_balance.item() == pytest.approx(balance.item())


def test_balance_is_silent_in_eval_and_without_gradients() -> None:
    model = tiny_moe().eval()
    model(input_ids=torch.tensor([[5, 6, 7]]))
    with torch.no_grad():
        model.train()(input_ids=torch.tensor([[5, 6, 7]]))
    assert all(layer.last_balance is None for layer in moe_layers(model).values())


def test_moe_layer_against_a_loop_over_experts() -> None:
    layer = moe_layers(tiny_moe())[1].double().eval()
    x_TD = torch.randn(9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _, index_TK, weights_TK, shared_T = gate_weights(layer.gate(x_TD), 2, "xft", True)
    for t in range(9):
        expected = shared_T[t] * layer.shared_expert(x_TD[t : t + 1])[0]
        for k in range(2):
            i = int(index_TK[t, k])
            gate, up = (layer.experts.gate_up_proj[i] @ x_TD[t]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected = expected + weights_TK[t, k] * (layer.experts.down_proj[i] @ inner)
        torch.testing.assert_close(layer(x_TD)[t], expected)


def test_gradients_of_grouped_mm_and_eager_agree() -> None:
    grads = []
    for kernel in ("grouped_mm", "eager"):
        model = tiny_moe().train()
        model.set_experts_implementation(kernel)
        model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6)


def test_observer_sees_every_token_and_the_padding_mask() -> None:
    model = tiny_moe().eval()
    seen: list[Gating] = []
    moe_layers(model)[2].observer = seen.append
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    model(input_ids=torch.full((2, 4), 7), attention_mask=mask)
    assert len(seen) == 1 and seen[0].mask_T.tolist() == mask.reshape(-1).bool().tolist()
    assert seen[0].weights_TK.shape == (8, 2) and seen[0].probabilities_TN.shape == (8, 4)


def test_padding_does_not_change_scores_nor_balance() -> None:
    model = tiny_moe().train()
    ids, padded = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0]])
    plain = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    balance = moe_layers(model)[0].last_balance
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits, plain)
    torch.testing.assert_close(moe_layers(model)[0].last_balance, balance)


def test_prompt_gate_ignores_the_answer() -> None:
    """The same prompt gets the same gate whatever follows, on either side of padding."""
    model = tiny_moe(gate="prompt").eval()
    seen: list[Gating] = []
    moe_layers(model)[2].observer = seen.append
    lengths = torch.tensor([2, 2])
    model(
        input_ids=torch.tensor([[5, 6, 7, 8], [5, 6, 40, 0]]),
        attention_mask=torch.tensor([[1] * 4, [1, 1, 1, 0]]),
        prompt_lengths=lengths,
    )
    model(
        input_ids=torch.tensor([[0, 5, 6, 7], [0, 5, 6, 9]]),
        attention_mask=torch.tensor([[0, 1, 1, 1]] * 2),
        prompt_lengths=lengths,
    )
    rows = torch.cat([gating.probabilities_TN for gating in seen])
    torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-4, atol=1e-6)
    with pytest.raises(UnsupportedError, match="prompt_lengths"):
        model(input_ids=torch.tensor([[5, 6]]))


def test_autocast_runs_the_experts_in_half_precision() -> None:
    layer = moe_layers(tiny_moe())[0].eval()
    seen: list[torch.dtype] = []
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(module.down_proj.dtype))
    x_TD = torch.randn(16, 32)
    full = layer(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x_TD)
    assert torch.bfloat16 in seen and layer.experts.down_proj.dtype == torch.float32
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.02)


def test_settings_refuse_unknown_and_missing_keys() -> None:
    with pytest.raises(CheckpointError, match="unknown key 'gates'"):
        MoeSettings.read({**TINY_MOE, "gates": 1})
    with pytest.raises(CheckpointError, match="missing key 'gate'"):
        MoeSettings.read({k: v for k, v in TINY_MOE.items() if k != "gate"})


def test_pieces_of_a_batch_are_refused() -> None:
    layer = moe_layers(tiny_moe())[0]
    assert isinstance(layer, MoELayer)
    layer.context.mask_BT = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="in pieces"):
        layer(torch.randn(4, 32))
