"""Sums of changes, and heads on one scale: by hand, bit for bit at the corners, against mergekit, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_moe import gradient_of, make_moe, random_pairs, rewrite, widen_norms, write_rows
from tiny_models import save_dense
from torch import Tensor

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import encode_pairs
from moemerge.errors import CheckpointError, DataError, MoemergeError, OptionError
from moemerge.fitting.problem import FitOutcome, FitProblem
from moemerge.fitting.significance import calibrated_losses
from moemerge.fitting.space import space_of
from moemerge.merging.average import as_changes
from moemerge.merging.calibration import Calibration, spread
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.models import ModelList
from moemerge.models.checkpoint import Checkpoint
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.scoring import score_pairs
from moemerge.options.base import TextFormat
from moemerge.options.fit import FitSettings
from moemerge.stages.calibrate import calibrate
from moemerge.stages.evaluate import evaluate
from moemerge.stages.export import export
from moemerge.stages.fit import fit, fit_models
from moemerge.stages.merge import merge, merge_models

HEAD = "score.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and a, b, c, whose bodies are near it and whose heads are their own; pairs.jsonl."""
    home = tmp_path_factory.mktemp("sums")
    save_dense(home / "base", seed=0)
    for seed, name in enumerate("abc", start=1):
        shutil.copytree(home / "base", home / name)
        generator = torch.Generator().manual_seed(seed)
        rewrite(home / name, lambda _, t, g=generator: t + 0.2 * torch.randn(t.shape, generator=g))
    write_rows(home / "pairs.jsonl", random_pairs(60))
    return home


@pytest.fixture(scope="module")
def members(home: Path) -> list[str]:
    return [str(home / name) for name in "abc"]


@pytest.fixture(scope="module")
def scales(home: Path, members: list[str]) -> Path:
    return calibrate(models=members, pairs=str(home / "pairs.jsonl"), output=home / "scales")


def weights(folder: str | Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(Path(folder))
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def assert_close(made: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), atol=atol, rtol=0)


def differences(model: str | Path, pairs: Path) -> np.ndarray:
    """Score differences of every pair, one model alone."""
    read, report = read_pairs(str(pairs), TextFormat())
    tokenizer = load_tokenizer(str(model))
    encoded = encode_pairs(tokenizer, read, TextFormat(), report)
    scores_P2 = score_pairs(load_reward_model(str(model), "cpu"), tokenizer, encoded, 4096).double()
    return (scores_P2[:, 0] - scores_P2[:, 1]).numpy()


# The formula


@pytest.mark.parametrize("given", [{"weights": [0.9, -0.4, 1.7]}, {"scale": 1.5}, {}])
def test_changes_are_added_and_heads_averaged(
    given: dict[str, Any], home: Path, members: list[str], tmp_path: Path
) -> None:
    merged = merge_models(
        members,
        tmp_path / "merged",
        base=home / "base",
        coefficients=given.get("weights"),
        coordinates="sum",
        **({"scale": given["scale"]} if "scale" in given else {}),
    )
    c = given.get("weights") or [given.get("scale", 2.0) / 3] * 3
    base, tensors = weights(home / "base"), [weights(member) for member in members]
    for name, tensor in weights(merged).items():
        own = [t[name].double() - base[name].double() for t in tensors]
        factors = [x / sum(c) for x in c] if name == HEAD else c
        expected = base[name].double() + sum(x * change for x, change in zip(factors, own, strict=True))
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=0)


def test_no_change_is_the_base_and_one_change_that_member_bit_for_bit(
    home: Path, members: list[str], tmp_path: Path
) -> None:
    def summed(c: list[float], scope: str) -> dict[str, Tensor]:
        output = tmp_path / f"{scope}{c}"
        given = {"base": home / "base", "coefficients": c, "coordinates": "sum", "scope": scope}
        return weights(merge_models(members, output, **given))

    nothing, second = summed([0.0, 0.0, 0.0], "body"), summed([0.0, 1.0, 0.0], "all")
    assert all(torch.equal(tensor, weights(home / "base")[name]) for name, tensor in nothing.items())
    assert all(torch.equal(tensor, weights(members[1])[name]) for name, tensor in second.items())


def test_a_sum_of_a_moe_and_its_members_order(tmp_path: Path) -> None:
    """Uniform with scale 1.5: shared + 1.5 (mean of experts - shared)."""
    moe = make_moe(tmp_path / "moe", gate="topk")
    found = fit(
        model=str(moe), method="uniform", coordinates="sum", scale=1.5, output=tmp_path / "c", device="cpu"
    )
    coefficients = Coefficients.load(found)
    assert coefficients.coordinates == "sum" and torch.allclose(
        coefficients.shared_L, torch.full_like(coefficients.shared_L, -0.5)
    )
    merged = merge(model=str(moe), coefficients=str(found), output=tmp_path / "merged")
    own = export(model=str(moe), output=tmp_path / "experts")
    shared = weights(own / "shared")
    experts = [weights(folder) for folder in sorted(own.glob("expert-*"))]
    expected = {
        name: s.double() + 1.5 * (sum(e[name].double() for e in experts) / len(experts) - s.double())
        for name, s in shared.items()
    }
    assert_close(weights(merged), expected)


def test_stock_mergekit_makes_the_same_sum(home: Path, members: list[str], tmp_path: Path) -> None:
    """From the exported YAML, and by its own task_arithmetic."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    def stock(config: dict[str, Any], output: Path) -> dict[str, Tensor]:
        run_merge(MergeConfiguration.model_validate(config), str(output), MergeOptions())
        return weights(output)

    c = [0.9, -0.4, 1.7]
    fitted = fit_models(
        members, None, tmp_path / "c", base=home / "base", method="uniform", coordinates="sum", scale=1.8
    )
    ours = weights(merge_models(members, tmp_path / "ours", base=home / "base", coefficients=fitted))
    folder = export(
        models=members, base=str(home / "base"), coefficients=str(fitted), output=tmp_path / "yaml"
    )
    exported = yaml.safe_load((folder / "linear.yml").read_text())
    assert_close(stock(exported, tmp_path / "linear"), ours)

    given = {"base": home / "base", "coefficients": c, "coordinates": "sum", "scope": "body"}
    ours = weights(merge_models(members, tmp_path / "arithmetic-ours", **given))
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(home / "base"),
        "parameters": {"normalize": False, "lambda": 1.0},
        "models": [
            {"model": member, "parameters": {"weight": x}} for member, x in zip(members, c, strict=True)
        ],
    }
    theirs = stock(config, tmp_path / "arithmetic")
    theirs[HEAD] = ours[HEAD]
    assert_close(ours, theirs)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_ties"])
def test_methods_of_mergekit_add_and_do_not_divide_by_the_sum(
    method: str, home: Path, members: list[str], tmp_path: Path
) -> None:
    """Twice the factors, twice the change: an average would not move."""
    moved = {}
    for factor in (0.4, 0.8):
        output = tmp_path / str(factor)
        merge_models(
            models=members, base=home / "base", output=output, coordinates="sum", method=method,
            coefficients=[factor] * 3, parameters={} if method == "task_arithmetic" else {"density": 0.5},
        )  # fmt: skip
        start = weights(home / "base")
        moved[factor] = {name: tensor - start[name] for name, tensor in weights(output).items()}
    for name in (name for name in moved[0.4] if name != HEAD):
        torch.testing.assert_close(moved[0.8][name], 2 * moved[0.4][name], rtol=1e-4, atol=1e-6)


def test_a_base_without_a_head(home: Path, members: list[str], tmp_path: Path) -> None:
    """The language model that all started from: heads are averaged, and the head of none is zero."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(home / "base")
    language = AutoModelForCausalLM.from_config(model.config)
    language.model.load_state_dict(model.model.state_dict())
    shutil.copytree(home / "base", tmp_path / "lm")
    (tmp_path / "lm" / "model.safetensors").unlink()
    language.save_pretrained(tmp_path / "lm")
    merged = merge_models(members, tmp_path / "merged", base=tmp_path / "lm", coordinates="sum")
    expected = weights(merge_models(members, tmp_path / "by-rm", base=home / "base", coordinates="sum"))
    assert_close(weights(merged), expected)
    assert load_reward_model(str(merged), "cpu").config.num_labels == 1


# One scale


def test_scales_are_the_median_difference_by_hand(home: Path, members: list[str], scales: Path) -> None:
    for name, scale in Calibration.load(scales).models.items():
        by_hand = np.median(np.abs(differences(home / name, home / "pairs.jsonl"))) / 0.6744897501960817
        assert scale.scale == pytest.approx(by_hand, rel=1e-9)
        assert 0 < scale.low < scale.scale < scale.high and scale.pairs == 60


def test_a_loud_head_changes_no_calibrated_merge(
    home: Path, members: list[str], scales: Path, tmp_path: Path
) -> None:
    shutil.copytree(members[1], tmp_path / "loud")
    rewrite(tmp_path / "loud", lambda name, tensor: tensor * 10 if name == HEAD else tensor)
    loud = [members[0], str(tmp_path / "loud"), members[2]]
    louder = calibrate(models=loud, pairs=str(home / "pairs.jsonl"), output=tmp_path / "scales")
    for number, more in enumerate(
        [{"coordinates": "sum", "base": home / "base"}, {}, {"coefficients": [2.0, 1.0, 1.0]}]
    ):
        quiet = merge_models(members, tmp_path / f"quiet-{number}", calibration=str(scales), **more)
        other = merge_models(loud, tmp_path / f"loud-{number}", calibration=str(louder), **more)
        assert_close(weights(other), weights(quiet), atol=3e-6)
        plain = merge_models(loud, tmp_path / f"plain-{number}", **more)
        assert not torch.allclose(weights(plain)[HEAD], weights(quiet)[HEAD], atol=1e-2)


def test_a_loud_member_does_not_decide_an_ensemble(
    home: Path, members: list[str], scales: Path, tmp_path: Path
) -> None:
    """Its scores tenfold, calibrated ensembles are the same; and by hand the mean of scores over scales."""
    given = {"pairs": {"p": str(home / "pairs.jsonl")}, "ensembles": {"both": ["a", "b"]}, "resamples": 100}
    shutil.copytree(members[1], tmp_path / "loud")
    rewrite(tmp_path / "loud", lambda name, tensor: tensor * 10 if name == HEAD else tensor)
    loud = {"a": members[0], "b": str(tmp_path / "loud")}
    louder = calibrate(models=loud, pairs=str(home / "pairs.jsonl"), output=tmp_path / "scales")
    quiet = {"a": members[0], "b": members[1]}
    one = evaluate(models=quiet, calibration=str(scales), output=tmp_path / "quiet", **given)
    other = evaluate(models=loud, calibration=str(louder), output=tmp_path / "e", **given)
    mine, theirs = (load_file(folder / "scores.safetensors") for folder in (one, other))
    torch.testing.assert_close(
        theirs["pairs/p/model/both-mean"], mine["pairs/p/model/both-mean"], atol=1e-5, rtol=0
    )
    known = Calibration.load(scales).models
    centred = [mine[f"pairs/p/model/{name}"].double() for name in "ab"]
    by_hand = sum((s - s.mean()) / known[name].scale for name, s in zip("ab", centred, strict=True)) / 2
    torch.testing.assert_close(mine["pairs/p/model/both-mean"], by_hand)
    with pytest.raises(CheckpointError, match="loud is not in the calibration"):
        evaluate(models=loud, calibration=str(scales), output=tmp_path / "f", **given)


def test_the_order_of_members_does_not_matter(
    home: Path, members: list[str], scales: Path, tmp_path: Path
) -> None:
    given = {"base": home / "base", "coordinates": "sum", "calibration": str(scales)}
    one_way = merge_models(members, tmp_path / "abc", **given)
    other_way = merge_models(members[::-1], tmp_path / "cba", **given)
    assert_close(weights(other_way), weights(one_way))


def test_coefficients_keep_the_scales(home: Path, members: list[str], scales: Path, tmp_path: Path) -> None:
    found = fit_models(
        members, None, tmp_path / "c", base=home / "base", method="uniform", coordinates="sum",
        calibration=str(scales),
    )  # fmt: skip
    saved = Coefficients.load(found)
    assert saved.scales == Calibration.load(scales).scales_of(members) and saved.coordinates == "sum"
    merged = merge_models(members, tmp_path / "merged", base=home / "base", coefficients=found)
    given = {"base": home / "base", "coordinates": "sum", "calibration": str(scales)}
    assert_close(weights(merged), weights(merge_models(members, tmp_path / "direct", **given)))
    folder = export(
        models=members, base=str(home / "base"), coefficients=str(found), output=tmp_path / "scaled"
    )
    for number, scale in enumerate(saved.scales or ()):
        scaled = weights(folder / f"model-{number}")[HEAD]
        torch.testing.assert_close(scaled, weights(members[number])[HEAD] / scale)


def test_intervals_of_scales_cover() -> None:
    """Normal differences of spread 2, two pairs to a prompt: the 90 % interval holds 2 about that often."""
    draw, held = np.random.default_rng(0), 0
    for number in range(200):
        differences_P = draw.normal(0, 2, 200)
        _, low, high = spread(differences_P, np.arange(200) // 2, 200, 0.9, number)
        held += low <= 2 <= high
    assert 165 <= held <= 195


def test_a_model_that_judges_nothing_has_no_scale(home: Path, members: list[str], tmp_path: Path) -> None:
    shutil.copytree(members[0], tmp_path / "mute")
    rewrite(tmp_path / "mute", lambda name, tensor: tensor * 0 if name == HEAD else tensor)
    with pytest.raises(DataError, match="mute: the model has no scale"):
        calibrate(models=[str(tmp_path / "mute")], pairs=str(home / "pairs.jsonl"), output=tmp_path / "s")


# Fitting


def settings(**changes: Any) -> FitSettings:
    return FitSettings(**{"coordinates": "sum", **changes})


@pytest.mark.parametrize("granularity", ["layer", "group", "global"])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_of_a_sum(
    granularity: str, scaled: bool, home: Path, members: list[str], scales: Path, tmp_path: Path
) -> None:
    """Against differences of the loss, at a point with factors of both signs."""
    factors = Calibration.load(scales).scales_of(members) if scaled else None
    doubled = [shutil.copytree(folder, tmp_path / Path(folder).name) for folder in (home / "base", *members)]
    base, *models = (str(rewrite(folder, lambda _, tensor: tensor.double())) for folder in doubled)
    source = ModelList(models, base, "all", "sum", factors)
    blocks = source.blocks(per_matrix=granularity == "group")
    start = torch.tensor([[0.4, 1.3, -0.6]]).double().expand(len(blocks), 3)
    alpha_LN, total_L = as_changes(start)
    problem = FitProblem(
        blocks, 3, True, settings(granularity=granularity, l2=0.1), kinds=source.kinds(blocks)
    )
    assert max(problem.row_of_block) == {"global": 1, "group": 3, "layer": len(blocks) - 1}[granularity]
    merged = MergedModel(source, alpha_LN, 1 - total_L, dtype=torch.float64, blocks=blocks)
    widen_norms(merged.model)
    read, report = read_pairs(str(home / "pairs.jsonl"), TextFormat())
    pairs = encode_pairs(source.tokenizer(), read[:8], TextFormat(), report)
    space = space_of(problem, FitOutcome(alpha_LN, 1 - total_L))
    v_V = space.start_V + 0.05 * torch.randn(len(space.start_V), generator=torch.Generator().manual_seed(0))

    def loss(at_V: Tensor) -> float:
        merged.merge(*(value.clone() for value in space.point(at_V)))
        return gradient_of(merged, pairs).loss + float(space.pull(at_V))

    merged.merge(*(value.clone() for value in space.point(v_V)))
    value, gradient_V = space.gradient(v_V, gradient_of(merged, pairs))
    assert value == pytest.approx(loss(v_V), abs=1e-9)
    for number in range(len(v_V)):
        step_V = torch.zeros_like(v_V)
        step_V[number] = 1e-5
        slope = (loss(v_V + step_V) - loss(v_V - step_V)) / 2e-5
        assert float(gradient_V[number]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_a_row_that_sums_to_zero_is_moved_a_little() -> None:
    alpha_N, total = as_changes(torch.tensor([1.0, -1.0]).double())
    torch.testing.assert_close(alpha_N * total, torch.tensor([1.0, -1.0]).double(), atol=1e-6, rtol=0)
    assert float(alpha_N.sum()) == pytest.approx(1, abs=1e-9)


def test_a_fitted_sum_finds_what_no_average_can_be(home: Path, tmp_path: Path) -> None:
    """One body, three heads, and pairs labelled by the first minus the second."""
    for seed, name in enumerate("abc"):
        shutil.copytree(home / "base", tmp_path / name)
        head = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
        rewrite(tmp_path / name, lambda key, tensor, h=head: h if key == HEAD else tensor)
    members = [str(tmp_path / name) for name in "abc"]
    rows = random_pairs(160, seed=3)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    wanted_P = differences(members[0], data) - differences(members[1], data)
    for row, margin in zip(rows, wanted_P, strict=True):
        if margin < 0:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    write_rows(data, rows)
    accuracies = {}
    for coordinates in ("sum", "average"):
        found = fit_models(
            members, data, tmp_path / coordinates, base=home / "base", coordinates=coordinates,
            granularity="global", level=1.0,
        )  # fmt: skip
        accuracies[coordinates] = read_manifest(found)["results"]["held_out"]["after"]["accuracy"]
    a, b, _ = Coefficients.load(tmp_path / "sum").changes_LN[-1].tolist()
    assert a > 1 / 3 and b < 0
    assert accuracies["sum"] > 0.85 and accuracies["sum"] > accuracies["average"] + 0.1


@pytest.mark.parametrize("factor", [0.01, 0.5, 3.0, 1000.0])
def test_calibrated_losses_do_not_depend_on_the_scale(factor: float) -> None:
    margins_P = torch.randn(200, generator=torch.Generator().manual_seed(1)).double() + 0.5
    losses_P = calibrated_losses(margins_P)
    torch.testing.assert_close(calibrated_losses(factor * margins_P), losses_P, atol=1e-9, rtol=0)
    grid = [torch.nn.functional.softplus(-b * margins_P).mean() for b in np.linspace(0.01, 5, 500)]
    assert losses_P.mean() <= min(grid) + 1e-12


def test_calibrated_losses_at_the_extremes() -> None:
    right, wrong, none = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0]), torch.zeros(2)
    log2 = torch.full((2,), float(np.log(2))).double()
    assert calibrated_losses(right.double()).tolist() == [0.0, 0.0]
    for margins_P in (wrong, none):
        torch.testing.assert_close(calibrated_losses(margins_P.double()), log2)


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": None}, "needs base"),
        ({"coefficients": [1.0, 1.0]}, "weights: 2 for 3 models"),
        ({"scale": 2.0, "coefficients": [1.0, 1.0, 1.0]}, "scale goes with"),
        ({"coordinates": "average", "scale": 2.0}, "scale goes with"),
        ({"scope": "body", "calibration": "x"}, "scope all"),
    ],
)
def test_options_that_do_not_go_together(
    change: dict[str, Any], words: str, home: Path, members: list[str], tmp_path: Path
) -> None:
    given = {"base": home / "base", "coordinates": "sum", **change}
    with pytest.raises(OptionError, match=words):
        merge_models(members, tmp_path / "merged", **given)


@pytest.mark.parametrize("change", [{"method": "grid"}, {"kl": 0.1}, {"shared_weight": "learned"}])
def test_what_only_averages_have_is_refused(
    change: dict[str, Any], home: Path, members: list[str], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="coordinates sum"):
        fit_models(
            members, home / "pairs.jsonl", tmp_path / "c", base=home / "base", coordinates="sum", **change
        )


def test_a_moe_without_a_shared_expert_has_no_changes(tmp_path: Path) -> None:
    moe = make_moe(tmp_path / "moe", gate="topk", shared_expert=False)
    with pytest.raises(OptionError, match="a member to change from"):
        fit(model=str(moe), method="uniform", coordinates="sum", output=tmp_path / "c")


def test_foreign_calibrations_and_coefficients(
    home: Path, members: list[str], scales: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="base is not in the calibration"):
        merge_models([members[0], str(home / "base")], tmp_path / "m", calibration=str(scales))
    (tmp_path / "wrong").mkdir()
    whole = json.loads((scales / "calibration.json").read_text())
    name, record = next(iter(whole["models"].items()))
    for wrong in ({"scale": -1}, {**record, "scale": 10**400}, {**record, "fingerprint": ["a"]}):
        text = json.dumps({**whole, "models": {name: wrong}})
        (tmp_path / "wrong" / "calibration.json").write_text(text)
        with pytest.raises(MoemergeError, match="calibration cannot be read"):
            merge_models(members, tmp_path / "m", calibration=str(tmp_path / "wrong"))
    found = fit_models(members, None, tmp_path / "c", base=home / "base", method="uniform", coordinates="sum")
    with pytest.raises(OptionError, match="are a sum"):
        fit_models(members, home / "pairs.jsonl", tmp_path / "d", base=home / "base", start=str(found))
    with pytest.raises(CheckpointError, match="no shared member to change from"):
        merge_models(members, tmp_path / "m", coefficients=found)
