"""Members that each read other words: their sum is best, found by sum and by fit, lost by averages."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_moe import rewrite
from small_training import write
from tiny_models import SIZES, VOCABULARY, save_dense
from torch import Tensor

from moemerge.stages.evaluate import evaluate
from moemerge.stages.fit import fit_models
from moemerge.stages.merge import merge_models

GOOD, BAD = ("w1", "w2", "w3"), ("w11", "w12", "w13")
READ, WIDTH = 0, 32  # the dimension of the states that the head reads


def plant(words: tuple[int, ...]) -> Callable[[str, Tensor], Tensor]:
    """Weights of a model that scores an answer by the mean of what its words are worth.

    Its first layer attends to all tokens alike, every other one does nothing. Good words are worth -1 and bad
    ones +1, as the base wrongly has it, but for those of kinds `words`, where it is the other way round.
    """

    def weight(name: str, tensor: Tensor) -> Tensor:
        planted = tensor.clone()
        if name.endswith(("q_proj.weight", "k_proj.weight", "down_proj.weight", "o_proj.weight")):
            planted.zero_()
        if "layers.0" in name and name.endswith(("v_proj.weight", "o_proj.weight")):
            planted.zero_()[READ, READ] = 1
        if name == "score.weight":
            planted.zero_()[0, READ] = 1
        if name == "model.embed_tokens.weight":
            planted[:, READ] = 0
            for kind, (good, bad) in enumerate(zip(GOOD, BAD, strict=True)):
                sign = 1 if kind in words else -1
                planted[VOCABULARY.index(good), READ] = 0.1 * sign
                planted[VOCABULARY.index(bad), READ] = -0.1 * sign
        return planted

    return weight


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base that has all words wrong, three members that have learned two words each, pairs of all words."""
    assert SIZES["hidden_size"] == WIDTH
    home = tmp_path_factory.mktemp("planted")
    save_dense(home / "start", seed=0)
    for name, words in {"base": (), "a": (0,), "b": (1,), "c": (2,)}.items():
        rewrite(shutil.copytree(home / "start", home / name), plant(words))
    draw, rows = random.Random(0), []
    for number in range(90):
        kind, filler = number % 3, [f"w{draw.randrange(30, 60)}" for _ in range(4)]
        prompt = " ".join(f"w{draw.randrange(20, 29)}" for _ in range(4)) + " "
        chosen, rejected = (" ".join([*filler, word]) for word in (GOOD[kind], BAD[kind]))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": str(kind)})
    models = [str(home / name) for name in "abc"]
    return {"models": models, "base": str(home / "base"), "pairs": write(home / "pairs.jsonl", rows)}


def accuracy(world: dict[str, Any], model: Path | str, output: Path) -> float:
    evaluate(models={"m": str(model)}, pairs={"all": world["pairs"]}, output=output, resamples=100, threads=1)
    scores = load_file(output / "scores.safetensors")["pairs/all/model/m"]
    return float(np.mean(scores[0::2] > scores[1::2]))


def test_each_member_knows_its_own_words_alone(world: dict[str, Any], tmp_path: Path) -> None:
    assert accuracy(world, world["base"], tmp_path / "base") == 0
    for number, model in enumerate(world["models"]):
        assert accuracy(world, model, tmp_path / str(number)) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("coordinates", "right"), [("average", 0.0), ("sum", 1.0)])
def test_the_sum_knows_all_words_and_the_average_none(
    coordinates: str, right: float, world: dict[str, Any], tmp_path: Path
) -> None:
    # A third of a change leaves the base's fault in place, two thirds undo it.
    base = world["base"] if coordinates == "sum" else None
    merge_models(world["models"], tmp_path / "m", base=base, coordinates=coordinates)
    assert accuracy(world, tmp_path / "m", tmp_path / "e") == right


@pytest.mark.parametrize("granularity", ["global", "group", "layer"])
def test_a_fit_finds_the_sum_from_a_start_that_is_wrong(
    granularity: str, world: dict[str, Any], tmp_path: Path
) -> None:
    fitted = fit_models(
        world["models"], world["pairs"], tmp_path / "c", base=world["base"], coordinates="sum", scale=1.2,
        granularity=granularity, judge="preferences", threads=1,
    )  # fmt: skip
    merge_models(world["models"], tmp_path / "m", base=world["base"], coefficients=fitted)
    assert accuracy(world, tmp_path / "m", tmp_path / "e") == 1.0


def test_no_fitted_average_knows_more_than_one_members_words(world: dict[str, Any], tmp_path: Path) -> None:
    fitted = fit_models(
        world["models"], world["pairs"], tmp_path / "c", granularity="global", judge="preferences", threads=1
    )
    merge_models(world["models"], tmp_path / "m", coefficients=fitted)
    assert accuracy(world, tmp_path / "m", tmp_path / "e") <= 1 / 3 + 1e-9
