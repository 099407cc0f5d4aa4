"""The stage few_shot: a scorer from a few pairs, its control, and what evaluate makes of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_policy import save_policy
from small_training import rows, write
from transformers import AutoModelForCausalLM

from moemerge.artifacts.json_file import read_object, write_json
from moemerge.data.reading import read_pairs
from moemerge.data.rows import RowReport
from moemerge.data.tokenise import encode_pairs
from moemerge.errors import CheckpointError, DataError, OptionError
from moemerge.models.attention_heads import AttentionHeads
from moemerge.models.scorers import open_scorer
from moemerge.models.scorers.activation import read_heads
from moemerge.options.base import TextFormat
from moemerge.stages import few_shot as few_shot_stage
from moemerge.stages.evaluate import evaluate
from moemerge.stages.few_shot import few_shot

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"yes": "w1", "no": "w2", "examples": 12, "shots": 2, "steps": 30, "masks": 4}
QUICK |= {"resamples": 100, "draws": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, pairs that single words tell apart, and what few_shot makes of them; read only."""
    folder = tmp_path_factory.mktemp("few")
    save_policy(folder / "lm", num_hidden_layers=2, max_position_embeddings=512)
    write(folder / "pairs.jsonl", rows(50, 1))
    few_shot(str(folder / "lm"), str(folder / "pairs.jsonl"), output=folder / "made", **QUICK)
    return folder


def differences(home: Path, scorer: Path) -> np.ndarray:
    opened = open_scorer(scorer)
    pairs = read_pairs(str(home / "pairs.jsonl"), TextFormat())[0]
    encoded = encode_pairs(opened.reader(), pairs, TextFormat(), RowReport("", total=len(pairs)))
    scores = opened.load(CPU).score([text for e in encoded for text in (e.chosen, e.rejected)], 512)
    return scores.view(-1, 2).diff(dim=1)[:, 0].neg().numpy()


def test_scores_are_those_of_a_plain_model_whose_heads_are_replaced(home: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(home / "lm")
    heads = AttentionHeads(plain.base_model)
    opened = open_scorer(home / "made")
    pairs = read_pairs(str(home / "pairs.jsonl"), TextFormat())[0][:5]
    encoded = encode_pairs(opened.reader(), pairs, TextFormat(), RowReport("", total=5))
    texts = [text for e in encoded for text in (e.chosen, e.rejected)]
    yes, no = opened.reader().verdicts
    mask, means = read_heads(home / "made" / "heads.safetensors", heads.shape)
    _, direction = read_heads(home / "made" / "probe" / "heads.safetensors", heads.shape)
    found, probed = (open_scorer(home / "made" / at).load(CPU).score(texts, 300) for at in (".", "probe"))
    assert mask.any()
    for text, score, projection in zip(texts, found.tolist(), probed.tolist(), strict=True):
        end = torch.tensor([len(text.ids) - 1])
        with heads.replacing(end, means, mask[None]), torch.no_grad():
            logits_V = plain(torch.tensor([text.ids])).logits[0, -1]
        assert score == pytest.approx(float(logits_V[yes] - logits_V[no]), abs=1e-5)
        with heads.reading(end) as read, torch.no_grad():
            plain(torch.tensor([text.ids]))
        assert projection == pytest.approx(float((torch.stack(read, 1)[0] * direction).sum()), abs=1e-4)


def test_what_is_reported_is_what_the_scorers_say(home: Path) -> None:
    numbers = read_object(home / "made" / "few_shot.json")
    assert numbers["examples"] == 12 and numbers["held_out"] > 20 and len(numbers["losses"]) == 30
    assert set(numbers["arms"]) == {"activation", "probe", "judge"}
    for arm in numbers["arms"].values():
        assert arm["low"] <= arm["accuracy"] <= arm["high"]
    against = numbers["activation_minus"]["probe"]
    arms = {name: arm["accuracy"] for name, arm in numbers["arms"].items()}
    assert against["difference"] == pytest.approx(arms["activation"] - arms["probe"])
    assert against["low"] <= against["difference"] <= against["high"]
    page = (home / "made" / "report.md").read_text()
    assert "ridge regression on the same examples" in page and (home / "made" / "choice.png").exists()


def test_the_probe_learns_what_single_words_tell(home: Path) -> None:
    """On its examples it is right nearly always; it is no constant."""
    found_P = differences(home, home / "made" / "probe")
    assert (found_P > 0).mean() > 0.5 and found_P.std() > 0


def test_evaluate_takes_both_as_scorers(home: Path, tmp_path: Path) -> None:
    models = {"few": str(home / "made"), "probe": str(home / "made" / "probe")}
    pairs = {"t": str(home / "pairs.jsonl")}
    out = evaluate(models, pairs=pairs, probes=["accuracy"], resamples=100, output=tmp_path / "e")
    report = read_object(out / "report.json")
    assert report["models"]["few"]["class"] == "activation (LlamaForCausalLM)"
    measured = report["probes"]["accuracy"]["sets"]["t"]["all"]["models"]
    expected = {name: (differences(home, Path(path)) > 0).mean() for name, path in models.items()}
    assert {name: numbers["accuracy"] for name, numbers in measured.items()} == pytest.approx(expected)


def test_equal_seeds_make_equal_folders_and_a_killed_one_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (str(home / "lm"), str(home / "pairs.jsonl"))
    probe = few_shot_stage._Task.direction

    def dies(self: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(few_shot_stage._Task, "direction", dies)
    with pytest.raises(KeyboardInterrupt):
        few_shot(*given, output=tmp_path / "made", **QUICK)
    monkeypatch.setattr(few_shot_stage._Task, "direction", probe)
    monkeypatch.setattr(few_shot_stage._Task, "means", dies)  # they are there already
    out = few_shot(*given, output=tmp_path / "made", **QUICK)
    for name in ("heads.safetensors", "probe/heads.safetensors", "few_shot.json", "scorer.json"):
        assert (out / name).read_bytes() == (home / "made" / name).read_bytes(), name
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_ranked_and_greedy_with_pairs_of_their_own_to_measure_on(home: Path, tmp_path: Path) -> None:
    model = save_policy(tmp_path / "lm", seed=2, max_position_embeddings=512)
    core = json.loads((model / "tokenizer.json").read_text())
    words = core["model"]["vocab"]
    words |= {"A": words.pop("w59"), "B": words.pop("w60")}
    (model / "tokenizer.json").write_text(json.dumps(core))
    held = write(tmp_path / "held.jsonl", rows(9, 5) + rows(50, 1)[:4])
    quick = {**QUICK, "examples": 8, "form": "ranked", "select": "greedy", "held_out": held}
    out = few_shot(str(model), str(home / "pairs.jsonl"), output=tmp_path / "out", **quick)
    numbers = read_object(out / "few_shot.json")
    assert 9 <= numbers["held_out"] <= 13 and not numbers["losses"] and numbers["heads"]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(9, 5)]
    files = {"there": held, "back": write(tmp_path / "turned.jsonl", turned)}
    opened = open_scorer(out)
    loaded, found = opened.load(CPU), {}
    for name, file in files.items():
        pairs = read_pairs(file, TextFormat())[0][:9]
        encoded = encode_pairs(opened.reader(), pairs, TextFormat(), RowReport("", total=9))
        scores = loaded.score([text for e in encoded for text in (e.chosen, e.rejected)], 10_000)
        found[name] = (scores.view(-1, 2)[:, 0] - scores.view(-1, 2)[:, 1]).numpy()
    np.testing.assert_allclose(found["there"], -found["back"], atol=1e-5)


@pytest.mark.parametrize(
    "changes, kind, said",
    [
        ({"yes": "Yes"}, OptionError, "not two tokens"),
        ({"examples": 60}, DataError, "too few pairs"),
        ({"examples": 7}, OptionError, "bad option examples"),
        ({"masks": 1}, OptionError, "bad option masks"),
        ({"select": "best"}, OptionError, "bad option select"),
        ({"max_length": 10}, DataError, "longer than 10 tokens"),
    ],
)
def test_what_nothing_can_be_made_of_is_refused(
    home: Path, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        few_shot(str(home / "lm"), str(home / "pairs.jsonl"), output=tmp_path / "x", **{**QUICK, **changes})
    assert not list(tmp_path.iterdir())


def test_heads_of_another_model_are_refused(home: Path, tmp_path: Path) -> None:
    other = save_policy(tmp_path / "lm", seed=9, num_hidden_layers=2, max_position_embeddings=512)
    fields = read_object(home / "made" / "scorer.json") | {"heads": str(home / "made" / "heads.safetensors")}
    write_json(tmp_path / "a.scorer.json", fields | {"model": str(other)})
    with pytest.raises(CheckpointError, match="another language model"):
        open_scorer(tmp_path / "a.scorer.json").load(CPU)
    smaller = save_policy(tmp_path / "small", num_hidden_layers=1, max_position_embeddings=512)
    write_json(tmp_path / "a.scorer.json", fields | {"model": str(smaller), "fingerprint": None})
    with pytest.raises(CheckpointError, match="heads of an activation scorer"):
        open_scorer(tmp_path / "a.scorer.json").load(CPU)
