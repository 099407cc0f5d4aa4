"""What training minimises: each loss against its formula, TRL's own, or a loop over pairs; weights of 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import brute_force, history, moved, raiser, rows, run, trainer_of, write
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid

from moemerge.errors import DataError, OptionError
from moemerge.training.losses.contrast import masks

STEADY = {"schedule": "constant", "warmup": 0.0, "patience": None}
pytestmark = pytest.mark.usefixtures("no_figures")


def batch_of(trainer: Any, count: int = 8) -> dict[str, Any]:
    """The first pairs as one batch."""
    return dict(trainer.data_collator([trainer.train_dataset[row] for row in range(count)]))


def loss_of(trainer: Any, count: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    """What the trainer minimises over the first pairs, and its gradients."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, count))
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def scores(trainer: Any, count: int = 8) -> tuple[Tensor, Tensor]:
    """Scores of chosen and rejected, each text alone, with their graph."""
    batch = batch_of(trainer, count)
    lengths = batch["attention_mask"].sum(1).tolist()
    texts = [ids[:length] for ids, length in zip(batch["input_ids"], lengths, strict=True)]
    one_by_one = torch.stack([trainer.model(text[None]).logits[0, 0] for text in texts])
    return one_by_one[:count], one_by_one[count:]


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_margin_and_center_are_trls_own(world: Path, tmp_path: Path) -> None:
    """TRL's compute_loss with a margin column and center_rewards_coefficient, bit for bit."""
    ours = trainer_of(world, tmp_path / "a", "dense", "margin", margin="column", center=0.03)
    theirs = trainer_of(world, tmp_path / "b", "dense", "margin", margin="column")
    assert theirs.mixture is None and "margin" in theirs.train_dataset.column_names
    assert ours.mixture is not None and "margin" not in ours.train_dataset.column_names
    plain, _ = loss_of(theirs)
    theirs.args.center_rewards_coefficient = 0.03
    (loss, gradients), (wanted, theirs_gradients) = loss_of(ours), loss_of(theirs)
    assert torch.equal(loss, wanted) and loss > plain
    same(gradients, theirs_gradients)


@pytest.mark.parametrize("margin", ["none", "column"])
def test_label_smoothing_is_the_formula(world: Path, tmp_path: Path, margin: str) -> None:
    options = {"label_smoothing": 0.2, "objectives": {"bradley_terry": 0.5}, "margin": margin}
    trainer = trainer_of(world, tmp_path, "dense", "margin", **options)
    trainer.model.double()
    loss, gradients = loss_of(trainer)
    trainer.model.zero_grad()
    chosen, rejected = scores(trainer)
    margins = [row["margin"] if margin == "column" else 0.0 for row in rows(8, 4, margin=True)]
    d = chosen - rejected - torch.tensor(margins, dtype=torch.float32).double()
    wanted = -0.5 * (0.8 * torch.sigmoid(d).log() + 0.2 * torch.sigmoid(-d).log()).mean()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, trainer.model.get_parameter(name).grad, rtol=1e-8, atol=1e-12)


def test_doubts_are_label_smoothing_of_each_pair(world: Path, tmp_path: Path) -> None:
    """By the formula; a doubt of 1 is the other label, and of 0 plain training."""
    doubts = [0.0, 1.0, 0.3, 0.25, 0.5, 0.0, 0.9, 0.1]
    made = [row | {"doubt": doubt} for row, doubt in zip(rows(8, 4), doubts, strict=True)]
    write(tmp_path / "doubted.jsonl", made)
    for name in ("dense", "held.jsonl"):
        (tmp_path / name).symlink_to(world / name)
    options = {"label_smoothing": "column", "batch_size": 8}
    trainer = trainer_of(tmp_path, tmp_path / "home", "dense", "doubted", **options)
    trainer.model.double()
    loss, _ = loss_of(trainer)
    chosen, rejected = scores(trainer)
    d, e = chosen - rejected, torch.tensor(doubts).double()
    wanted = -((1 - e) * torch.sigmoid(d).log() + e * torch.sigmoid(-d).log()).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-7)  # doubts are float32, as margins are
    del made[3]["doubt"]
    write(tmp_path / "doubted.jsonl", made)
    with pytest.raises(DataError, match=r"(?s)1 of 8 pairs have no doubt.*none in rows 4\n"):
        run(tmp_path, tmp_path / "out", "dense", pairs=str(tmp_path / "doubted.jsonl"), **options)
    assert not (tmp_path / "out").exists()


def test_contrast_is_a_double_loop_over_pairs(world: Path, tmp_path: Path) -> None:
    options = {
        "objectives": {"contrast": 2.0},
        "contrast_temperature": 0.3,
        "contrast_dropout": 0.25,
        "seed": 5,
    }
    trainer = trainer_of(world, tmp_path, "dense", **options)
    trainer.model.double()
    states: list[Tensor] = []
    handle = trainer.model.score.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0, -1]))
    scores(trainer, 5)
    handle.remove()
    h = [states[i] - states[5 + i] for i in range(5)]
    views = masks(5, 0, torch.arange(5), torch.stack(h), 0.25)
    assert 0.1 < (views == 0).double().mean() < 0.4 and not torch.equal(views[0], views[1])
    wanted = 0.0
    for i in range(5):
        cosines = [cosine_similarity(h[i] * views[0, i], h[j] * views[1, j], dim=0) / 0.3 for j in range(5)]
        wanted -= math.log(cosines[i].exp().item() / sum(cosine.exp().item() for cosine in cosines)) / 5
    assert loss_of(trainer, 5)[0].item() == pytest.approx(2 * wanted, rel=1e-9)
    # Drawn from seed, step and place: the same in any order, other at another step.
    turned = masks(5, 0, torch.tensor([4, 1]), torch.stack(h[:2]), 0.25)
    assert torch.equal(turned, views[:, [4, 1]])
    assert not torch.equal(masks(5, 1, torch.arange(5), torch.stack(h), 0.25), views)


def test_a_weight_of_zero_is_plain_training_bit_for_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is built. Nor does a mixture that comes to plain Bradley-Terry train otherwise."""
    options = {"max_steps": 2, "learning_rate": 1e-3, "batch_size": 6, "shared_dropout": 0.3, **STEADY}
    run(world, tmp_path / "plain", **options)
    monkeypatch.setattr("moemerge.training.losses.contrast.contrast", raiser("built"))
    run(world, tmp_path / "zero", objectives={"bradley_terry": 1, "contrast": 0}, **options)
    assert not moved(tmp_path / "plain", tmp_path / "zero")
    assert history(tmp_path / "plain") == history(tmp_path / "zero")
    run(world, tmp_path / "nearly", label_smoothing=1e-300, **options)  # 1 - 1e-300 is 1
    assert not moved(tmp_path / "plain", tmp_path / "nearly")


def test_terms_are_logged_by_name_with_their_gradients(world: Path, tmp_path: Path) -> None:
    """The held-out loss stays plain; the balance loss takes no part in the ratios; all is in the results."""
    objectives = {"bradley_terry": 2.0, "contrast": 0.1}
    options = {"max_steps": 2, "eval_steps": 1, "learning_rate": 1e-3, "center": 0.5, "held": True}
    results = run(world, tmp_path / "out", objectives=objectives, **options, **STEADY)
    first, second = (entry for entry in history(tmp_path / "out") if "loss" in entry)
    parts = [first[f"{name}_loss"] for name in ("bradley_terry", "contrast", "center")]
    assert first["loss"] == pytest.approx(2 * parts[0] + 0.1 * parts[1] + 0.5 * parts[2], abs=2e-4)
    assert first["bradley_terry_gradient_ratio"] == pytest.approx(2, rel=1e-6)
    assert first["contrast_gradient_ratio"] > 0 and "contrast_gradient_ratio" not in second
    assert results["terms"]["contrast"] == {
        "first": first["contrast_loss"],
        "last": second["contrast_loss"],
        "gradient_ratio": first["contrast_gradient_ratio"],
    }
    assert results["terms"].keys() == {"bradley_terry", "contrast", "center"}
    assert brute_force(tmp_path / "out", world / "held.jsonl") == pytest.approx(
        tuple(results["after"].values()), abs=1e-6
    )


def test_a_gradient_ratio_is_of_the_trunk(world: Path, tmp_path: Path) -> None:
    trainer = trainer_of(world, tmp_path, "dense", label_smoothing=0.1, center=0.2, max_steps=1, batch_size=8)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    fresh = trainer_of(world, tmp_path / "b", "dense", label_smoothing=0.1, max_steps=1, batch_size=8)
    inputs = next(iter(fresh.get_train_dataloader()))
    lengths, ids = inputs["attention_mask"].sum(1).tolist(), inputs["input_ids"]
    one_by_one = [fresh.model(row[None, :n]).logits[0, 0] for row, n in zip(ids, lengths, strict=True)]
    chosen, rejected = torch.stack(one_by_one).chunk(2)
    trunk = list(fresh.model.model.parameters())

    def norm(loss: Tensor) -> float:
        gradients = torch.autograd.grad(loss, trunk, retain_graph=True)
        return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))

    d = chosen - rejected
    plain = norm(-logsigmoid(d).mean())
    smoothed = norm(-(0.9 * logsigmoid(d) + 0.1 * logsigmoid(-d)).mean())
    assert logged["bradley_terry_gradient_ratio"] == pytest.approx(smoothed / plain, rel=1e-4)
    centred = norm(0.2 * (chosen + rejected).square().mean())
    assert logged["center_gradient_ratio"] == pytest.approx(centred / plain, rel=1e-4)


def test_encoders_are_contrasted_too(world: Path, tmp_path: Path) -> None:
    from tiny_models import save_dense

    save_dense(tmp_path / "bert", "bert")
    given = {"pairs": str(world / "train.jsonl"), "objectives": {"bradley_terry": 1, "contrast": 1}}
    results = run(tmp_path, tmp_path / "out", "bert", max_steps=2, learning_rate=1e-3, **given)
    assert results["terms"]["contrast"]["gradient_ratio"] > 0


def test_faults_name_the_remedy(world: Path, tmp_path: Path) -> None:
    for options, text in (
        ({"objectives": {"bradley_tery": 1}}, "(?s)unknown objective.*did you mean 'bradley_terry'"),
        ({"objectives": {"bradley_terry": 0}}, "with a weight above 0"),
        ({"objectives": {"bradley_terry": 1, "contrast": -1}}, "none below"),
        ({"objectives": {}}, "with a weight above 0"),
        ({"objectives": {"bradley_terry": 1, "contrast": 1}, "batch_size": 1}, "several pairs in a batch"),
        ({"objectives": {"contrast": 1}, "margin": "column"}, "need bradley_terry"),
        ({"label_smoothing": 0.5}, r"label_smoothing is outside \[0, 0.5\)"),
        ({"label_smoothing": "colum"}, "did you mean 'column'"),
    ):
        with pytest.raises(OptionError, match=text):
            run(world, tmp_path / "out", "dense", **options)
    with pytest.raises(DataError, match="no margin"):
        run(world, tmp_path / "out", "dense", margin="column", objectives={"bradley_terry": 0.5})
    assert not (tmp_path / "out").exists()
