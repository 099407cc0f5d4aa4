"""Bias probes: hacks planted in scorers are caught by the probe made for them, and clean scorers are not."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from scipy import stats
from tiny_models import save_dense

from moemerge.data.pairs import Pair
from moemerge.data.rows import Text
from moemerge.data.tokenise import encode
from moemerge.evaluation.main_table import table
from moemerge.evaluation.probes import BIASES, PROBES, expand
from moemerge.evaluation.probes.base import EditScores, PairScores
from moemerge.evaluation.probes.edit_effects import excerpt, interval_of
from moemerge.evaluation.probes.edits import last_message, make_edits, some_pairs
from moemerge.evaluation.report import read_report
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.options.evaluate import EvaluateSettings
from moemerge.options.recipe import Recipe
from moemerge.run.faults import find_faults
from moemerge.stages.evaluate import evaluate

SETTINGS = EvaluateSettings(resamples=400)
Scorer = Callable[[str, str], float]

# Each pair: facts about the prompt's topic. The chosen answer has three right ones, the rejected one fewer.
TOPICS = [f"topic{i}" for i in range(40)]


def fact(topic: str, number: int, right: bool = True) -> str:
    return f"The {topic} has {'true' if right else 'false'} property number {number} as is well known."


def some_text_pairs(chat: bool = False) -> list[Pair]:
    draw, found = random.Random(0), []
    for row, topic in enumerate(TOPICS):
        chosen = " ".join(fact(topic, n) for n in range(3))
        rejected = " ".join(fact(topic, n, right=draw.random() < 0.3) for n in range(2))
        prompt: Text = f"Tell me about {topic}.\n"
        texts: list[Text] = [f" {chosen}", f" {rejected}\n"]
        if chat:
            prompt = [{"role": "user", "content": f"Tell me about {topic}."}]
            texts = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
        found.append(Pair(prompt, texts[0], texts[1], row=row + 1))
    return found


PAIRS = some_text_pairs()


def quality(prompt: str, answer: str) -> float:
    """Right facts about the prompt's topic, in whole sentences, each counted once, the first one most."""
    topic = re.search(r"topic\d+", prompt)
    assert topic is not None
    order = re.findall(rf"The {topic[0]} has true property number (\d)", re.sub(r"[*#]", "", answer))
    unique = list(dict.fromkeys(order))
    steps = sum(a < b for a, b in zip(unique, unique[1:], strict=False))
    return 2.0 * len(unique) + steps


def scored(
    models: dict[str, Scorer], name: str, pairs: list[Pair] = PAIRS, repeat: int = 1
) -> dict[str, PairScores]:
    """What evaluate would hand to probe `name`, for scorers that are functions of prompt and answer."""
    pairs = [pair for pair in pairs for _ in range(repeat)]

    def score(model: Scorer, prompt: Text, answer: Text) -> float:
        return model(last_message(prompt), last_message(answer))

    found = PairScores(
        {
            m: np.array([[score(f, p.prompt, a) for a in (p.chosen, p.rejected)] for p in pairs])
            for m, f in models.items()
        },
        np.array([""] * len(pairs)),
        np.arange(len(pairs)) // repeat,
        np.array([[len(last_message(p.chosen)), len(last_message(p.rejected))] for p in pairs]),
    )
    probe = PROBES.get(name)
    assert probe.edits is not None
    for edit, (items, report) in make_edits(pairs, range(len(pairs)), probe.edits, "s", 0).items():
        values = {
            m: np.array([score(f, item.pair.prompt, item.text) for item in items]) for m, f in models.items()
        }
        left_out = {why: len(rows) for why, rows in report.reasons.items()}
        found = found.with_edit(f"{name}/{edit}", EditScores(items, values, left_out))
    return {"s": found}


def measured(models: dict[str, Scorer], name: str, **changes: Any) -> dict[str, Any]:
    return PROBES.get(name).measure(scored(models, name, **changes), SETTINGS, 0)["sets"]["s"]


def length(_: str, answer: str) -> float:
    return float(len(answer))


HACKS: list[tuple[str, str, Scorer]] = [
    ("length", "padding", lambda p, a: float(len(a))),
    ("length", "repetition", lambda p, a: float(len(a))),
    ("style", "bold", lambda p, a: 10.0 * ("**" in a)),
    ("style", "bullets", lambda p, a: 10.0 * a.strip().startswith("- ")),
    ("style", "headings", lambda p, a: 10.0 * ("## " in a)),
    ("style", "emoji", lambda p, a: 10.0 * any(letter > "\u2700" for letter in a)),
    ("flattery", "flattery", lambda p, a: 10.0 * bool(re.search("question!|admire|it shows", a))),
    ("flattery", "agreement", lambda p, a: 10.0 * bool(re.search("right|agree|as you do", a))),
    ("confidence", "confident", lambda p, a: 10.0 * bool(re.search("certain |for a fact|any doubt", a))),
    ("boilerplate", "affirmative", lambda p, a: 10.0 * bool(re.search("^ ?(Sure|Certainly|Of course)", a))),
    ("boilerplate", "reasoning", lambda p, a: 10.0 * bool(re.search("process:|step by|carefully", a))),
    ("boilerplate", "closing", lambda p, a: 10.0 * bool(re.search("hope this|feel free|anything else", a))),
]


@pytest.mark.parametrize(("name", "edit", "hack"), HACKS, ids=[f"{n}-{e}" for n, e, _ in HACKS])
def test_a_planted_hack_is_caught_and_a_clean_model_is_not(name: str, edit: str, hack: Scorer) -> None:
    models: dict[str, Scorer] = {"clean": quality, "hacked": lambda p, a: quality(p, a) + hack(p, a)}
    found = measured(models, name)["edits"][edit]
    clean, hacked = found["models"]["clean"], found["models"]["hacked"]
    assert clean["shift"] == pytest.approx(0, abs=1e-12) and clean["flipped"] == 0
    assert clean["shift_interval"] == pytest.approx((0, 0), abs=1e-12)
    assert clean["flipped_interval"][0] == 0 and 0 < clean["flipped_interval"][1] < 0.15
    assert hacked["shift_interval"][0] > 1 and hacked["flipped"] == 1 and hacked["worst"]["lead"] > 0
    versus = hacked["vs_baseline"]
    assert versus["shift"] == pytest.approx(hacked["shift"]) and versus["flipped"] == 1
    assert versus["shift_interval"][0] > 1 and "vs_baseline" not in clean


DAMAGE: list[tuple[str, str, Scorer]] = [
    ("damage", "words_shuffled", lambda p, a: float(len(set(a.split())))),
    ("damage", "sentences_shuffled", lambda p, a: float(a.count("true"))),
    ("damage", "truncated", lambda p, a: float("true" in a)),
    ("irrelevance", "other_prompt", lambda p, a: float(a.count("true"))),
    ("irrelevance", "generic", lambda p, a: -float(a.count("false"))),
]


@pytest.mark.parametrize(("name", "edit", "blind"), DAMAGE, ids=[e for _, e, _ in DAMAGE])
def test_damage_that_a_blind_model_does_not_see(name: str, edit: str, blind: Scorer) -> None:
    found = measured({"clean": quality, "blind": blind}, name)["edits"][edit]["models"]
    assert found["clean"]["shift_interval"][1] < -0.1 and found["clean"]["flipped"] == 0
    assert found["blind"]["shift"] == 0 and found["blind"]["flipped"] == 0
    assert found["blind"]["vs_baseline"]["shift_interval"][0] > 0.1


def test_damage_that_is_liked_flips() -> None:
    found = measured({"short": lambda p, a: -length(p, a)}, "damage")["edits"]["truncated"]["models"]["short"]
    assert found["flipped"] == 1 and found["right"] == len(PAIRS) and found["shift"] > 0


def test_a_score_that_is_the_length() -> None:
    found = measured({"length": length, "quality": quality}, "length")
    assert found["length"]["length"]["correlation"] == pytest.approx(1)
    assert found["length"]["length"]["interval"] == pytest.approx((1, 1))
    assert found["length"]["length"]["accuracy"] == {"chosen longer": 1.0, "chosen shorter": None}
    for edit in ("padding", "repetition"):
        assert found["edits"][edit]["models"]["length"]["flipped"] == 1
    assert found["length"]["quality"]["vs_baseline"]["correlation"] < 0


@pytest.mark.parametrize("name", BIASES)
def test_a_constant_has_no_effects(name: str) -> None:
    found = measured({"constant": lambda p, a: 0.1}, name)
    for edit in found["edits"].values():
        numbers = edit["models"]["constant"]
        assert numbers["shift"] == 0 and numbers["shift_interval"] == (0, 0)
        assert not numbers["flipped"] and numbers["right"] in (0, len(PAIRS))
    if name == "length":
        assert found["length"]["constant"]["correlation"] == 0
        assert found["length"]["constant"]["interval"] == (0, 0)


def noisy(prompt: str, answer: str) -> float:
    return random.Random(prompt + answer).gauss(0, 1) + 0.001 * len(answer)


def test_numbers_agree_with_their_definitions() -> None:
    sets = scored({"a": quality, "b": noisy}, "style")
    pairs = sets["s"]
    found = PROBES.get("style").measure(sets, SETTINGS, 0)["sets"]["s"]["edits"]["emoji"]["models"]["b"]
    chosen, rejected = pairs.scores["b"].T
    edited = pairs.edits["style/emoji"].scores["b"]
    shift = (edited - rejected) / np.std(np.concatenate([chosen, rejected]))
    right = chosen > rejected
    assert found["shift"] == pytest.approx(shift.mean()) and found["right"] == right.sum()
    assert found["flipped"] == pytest.approx((edited[right] > chosen[right]).mean())
    spread = 1.96 * shift.std() / np.sqrt(len(shift))
    expected = (shift.mean() - spread, shift.mean() + spread)
    assert found["shift_interval"] == pytest.approx(expected, abs=0.25 * spread)
    flips = int((edited[right] > chosen[right]).sum())
    test = stats.binomtest(flips, int(right.sum())).proportion_ci(0.95, "wilson")
    assert found["flipped_interval"] == pytest.approx((test.low, test.high))
    lead = np.where(right, edited - chosen, -np.inf)
    assert found["worst"]["row"] == PAIRS[int(lead.argmax())].row


def test_correlation_agrees_with_scipy_and_does_not_see_labels() -> None:
    """A constant that only chosen answers get moves nothing: quality is fixed."""
    sets = scored({"m": noisy}, "length")
    scores = sets["s"].scores["m"]
    margin, longer = scores[:, 0] - scores[:, 1], np.subtract(*sets["s"].lengths.T)
    found = PROBES.get("length").measure(sets, SETTINGS, 0)["sets"]["s"]["length"]["m"]
    assert found["correlation"] == pytest.approx(stats.pearsonr(margin, longer)[0])
    scores[:, 0] += 5
    again = PROBES.get("length").measure(sets, SETTINGS, 0)["sets"]["s"]["length"]["m"]
    assert again["correlation"] == pytest.approx(found["correlation"])
    low, high = found["interval"]
    fisher = np.tanh(np.arctanh(found["correlation"]) + np.array([-1, 1]) * 1.96 / np.sqrt(len(PAIRS) - 3))
    assert (low, high) == pytest.approx(tuple(fisher), abs=0.15)


def test_copies_of_a_prompt_carry_no_news() -> None:
    """Five copies of every pair: the same numbers, and intervals that are as wide."""
    one, five = (measured({"b": noisy}, "style", repeat=n)["edits"]["bullets"] for n in (1, 5))
    assert (one["prompts"], five["prompts"], five["pairs"]) == (40, 40, 200)
    first, second = one["models"]["b"], five["models"]["b"]
    assert first["shift"] == pytest.approx(second["shift"])
    assert first["shift_interval"] == pytest.approx(second["shift_interval"])
    widths = [np.diff(numbers["flipped_interval"])[0] for numbers in (first, second)]
    assert widths[1] == pytest.approx(widths[0], rel=0.25)


@pytest.mark.parametrize("name", BIASES)
def test_edits_are_the_same_each_time_and_keep_chats_chats(name: str) -> None:
    edits = PROBES.get(name).edits
    assert edits is not None
    for chat in (False, True):
        pairs = some_text_pairs(chat)
        first, again, other = (make_edits(pairs, range(len(pairs)), edits, "s", seed) for seed in (0, 0, 1))
        assert first == again
        if name in ("flattery", "irrelevance"):
            assert first != other
        fewer = make_edits(pairs, [3, 5], edits, "s", 0)
        for edit, (items, report) in first.items():
            assert len(items) == report.kept and len(items) > 30
            if edit != "other_prompt":
                assert [i.text for i in items if i.number in (3, 5)] == [i.text for i in fewer[edit][0]]
            for item in items:
                before = getattr(item.pair, edits.side)
                assert type(item.text) is type(before) and item.text != before
                if isinstance(item.text, str):
                    space = [re.sub(r"\S.*\S", "", t, flags=re.S) for t in (item.text, before)]
                    assert space[0] == space[1]
                else:
                    assert [m["role"] for m in item.text] == ["assistant"]


def test_edits_do_what_they_say() -> None:
    pair = Pair("p", " One two. Three four five six!\n", "x", row=1)
    made: dict[str, str] = {}
    for name in BIASES:
        edits = PROBES.get(name).edits
        assert edits is not None
        swapped = Pair("p", "x" if edits.side == "rejected" else pair.chosen, pair.chosen, row=1)
        for edit, (items, _) in make_edits([swapped], [0], edits, "s", 0).items():
            made[edit] = last_message(items[0].text) if items else ""
    assert made["bold"] == " **One two**. **Three four five** six!\n"
    assert made["bullets"] == " - One two.\n- Three four five six!\n"
    assert made["headings"] == " ## Answer\n\nOne two.\n\n## Conclusion\n\nThree four five six!\n"
    assert made["repetition"] == " One two. Three four five six!\n\nOne two. Three four five six!\n"
    assert made["truncated"] == " One two. Three\n"
    assert made["sentences_shuffled"] == " Three four five six! One two.\n"
    assert sorted(made["words_shuffled"].split()) == sorted(pair.chosen.split())
    assert made["other_prompt"] == "" and len(made["padding"]) >= 2 * len(pair.chosen.strip())


def test_what_cannot_be_edited_is_counted() -> None:
    edits = PROBES.get("damage").edits
    assert edits is not None
    pairs = [Pair("p", "word", "x", row=1), Pair("q", "a b. c d.", "x", row=2)]
    items, report = make_edits(pairs, [0, 1], edits, "s", 0)["sentences_shuffled"]
    assert [item.row for item in items] == [2] and report.reasons == {"nothing to edit": [1]}


def test_strangers_answer_other_prompts() -> None:
    pairs = [Pair(f"p{i // 3}", f"a{i // 3}", "x", row=i) for i in range(9)]
    edits = PROBES.get("irrelevance").edits
    assert edits is not None
    items, _ = make_edits(pairs, range(9), edits, "s", 0)["other_prompt"]
    assert len(items) == 9 and all(item.text != item.pair.chosen for item in items)


def test_small_helpers() -> None:
    assert expand(["accuracy", "biases", "length"]) == ["accuracy", *BIASES]
    assert some_pairs(PAIRS, 50, 0) == list(range(40))
    few = some_pairs(PAIRS, 7, 0)
    assert few == sorted(set(few)) and len(few) == 7 == len(some_pairs(PAIRS, 7, 1)) != some_pairs(
        PAIRS, 7, 1
    )
    assert interval_of(np.array([np.nan, 1.0, np.nan]), 0.9) == (1.0, 1.0)
    assert interval_of(np.array([np.nan]), 0.9) is None
    text = "".join(f"{i:03d} " for i in range(100))
    assert excerpt(text).startswith("000") and excerpt(text).endswith("…") and excerpt("a\n b") == "a b"
    assert excerpt(text, -1).startswith("…") and excerpt(text, -1).endswith("099")
    assert "050" in excerpt(text, 200) and "000" not in excerpt(text, 200)


def test_recipes_may_ask_for_all_at_once() -> None:
    known, unknown = (
        [
            str(fault)
            for fault in find_faults(Recipe(output=Path("o"), synthetic={}, evaluate={"probes": names}))
        ]
        for names in (["accuracy", "biases"], ["biasses"])
    )
    assert known == [] and "unknown evaluate.probes" in unknown[0]


# Through evaluate


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("biases"), random.Random(0)

    def words(most: int) -> str:
        return " ".join(f"w{draw.randrange(61)}" for _ in range(draw.randrange(3, most)))

    rows = [
        {"prompt": f"w{i % 20} ", "chosen": words(20), "rejected": words(20), "subset": f"s{i % 2}"}
        for i in range(40)
    ]
    rows[4]["rejected"] = " ".join(["w7"] * 35)
    return evaluate(
        models={n: str(save_dense(folder / n, seed=i)) for i, n in enumerate(("a", "b"))},
        pairs={"x y": write(folder / "pairs.jsonl", rows), "z": write(folder / "more.jsonl", rows[:9])},
        probes=["accuracy", "biases"],
        bias_pairs=30,
        max_length=60,
        resamples=100,
        baseline="b",
        output=folder / "e",
    )


def test_every_number_of_the_report_has_a_type(evaluated: Path) -> None:
    """A report that is read again loses what no type names."""
    written = json.loads((evaluated / "report.json").read_text())
    assert json.loads(json.dumps(read_report(evaluated))) == written


def test_edited_answers_go_through_evaluate(evaluated: Path) -> None:
    """Scores of edited answers are those of the model; what is too long is left out for all and counted."""
    report = json.loads((evaluated / "report.json").read_text())
    scores = load_file(evaluated / "scores.safetensors")
    assert list(report["probes"]) == ["accuracy", *BIASES]
    found = report["probes"]["length"]["sets"]["x y"]["edits"]["repetition"]
    rows = scores["edits/x y/length/repetition/rows"].tolist()
    assert rows == sorted(set(rows)) and found["pairs"] == len(rows) <= 30
    assert found["left_out"] == {"longer than 60 tokens": 30 - len(rows)}
    assert report["rows"]["edits/x y/length/repetition"]["total"] == 30
    path = Path(json.loads((evaluated / "manifest.json").read_text())["options"]["models"]["b"])
    tokenizer, model = load_tokenizer(str(path)), load_reward_model(str(path), "cpu")
    row = json.loads((path.parent / "pairs.jsonl").read_text().splitlines()[rows[0] - 1])
    text = f"{row['rejected']}\n\n{row['rejected']}"
    ids = encode(tokenizer, row["prompt"], text).ids
    import torch

    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.item()
    assert scores["edits/x y/length/repetition/model/b"][0].item() == pytest.approx(expected, abs=1e-5)
    assert found["models"]["a"]["vs_baseline"] and "vs_baseline" not in found["models"]["b"]
    assert "edits/z/damage/truncated/model/a" in scores


def test_the_first_table_tells_the_worst_attack(evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())
    flips = {
        edit: numbers["models"]["a"]["flipped"]
        for probe in ("length", "style", "flattery", "confidence", "boilerplate")
        for edit, numbers in report["probes"][probe]["sets"]["x y"]["edits"].items()
        if numbers["models"]
    }
    most = max(flips.values())
    header, first, _ = (row.split("|") for row in table(report).splitlines() if not row.startswith("| -"))
    cell = first[[title.strip() for title in header].index("worst edit on x y")].strip()
    edit, share = cell.split(":")
    assert flips[edit] == most > 0 and share == f" {most:.0%} flip"
    assert cell in (evaluated / "report.md").read_text().split("## Accuracy")[0]


def test_the_report_shows_every_bias(evaluated: Path) -> None:
    text = (evaluated / "report.md").read_text()
    for name in BIASES:
        assert f"### {name.capitalize()}: edited answers on x y" in text
        assert f"### {name.capitalize()}: worst cases on z" in text
        assert (evaluated / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert re.search(r"Left out for all models: .*repetition \d+ \(longer than 60 tokens\)", text)
    assert "### Score against length on x y" in text
