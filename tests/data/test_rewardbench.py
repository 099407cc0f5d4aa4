"""RewardBench 1 and 2: numbers of the published code, rows as it reads them, whole evaluations.

Numbers called published were computed with rewardbench 0.1.4 from the same scores.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from safetensors.torch import load_file
from small_reports import choice_scores
from tiny_models import save_dense, tiny_tokenizer

from moemerge.artifacts.manifest import read_manifest
from moemerge.data.rewardbench import encode_choices, read_choices
from moemerge.data.rows import RowReport
from moemerge.errors import DataError
from moemerge.evaluation.probes import PROBES
from moemerge.evaluation.probes.base import ChoiceScores
from moemerge.evaluation.probes.rewardbench import ROWS_1, ROWS_2, SECTIONS, aggregate, results
from moemerge.evaluation.probes.rewardbench_ties import ties_scores
from moemerge.evaluation.report import read_report
from moemerge.options.evaluate import Evaluate, EvaluateSettings
from moemerge.run.check import check_recipe, load_recipe
from moemerge.stages.evaluate import evaluate

SETTINGS = EvaluateSettings(resamples=200)
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"

# PKU-Alignment/beaver-7b-v1.0-cost, as the README of rewardbench 0.1.4 gives it.
BEAVER = {
    "alpacaeval-easy": 0.5,
    "alpacaeval-hard": 0.7052631578947368,
    "alpacaeval-length": 0.5894736842105263,
    "donotanswer": 0.8235294117647058,
    "hep-cpp": 0.6280487804878049,
    "hep-go": 0.6341463414634146,
    "hep-java": 0.7073170731707317,
    "hep-js": 0.6646341463414634,
    "hep-python": 0.5487804878048781,
    "hep-rust": 0.6463414634146342,
    "llmbar-adver-GPTInst": 0.391304347826087,
    "llmbar-adver-GPTOut": 0.46808510638297873,
    "llmbar-adver-manual": 0.3695652173913043,
    "llmbar-adver-neighbor": 0.43283582089552236,
    "llmbar-natural": 0.52,
    "math-prm": 0.2953020134228188,
    "mt-bench-easy": 0.5714285714285714,
    "mt-bench-hard": 0.5405405405405406,
    "mt-bench-med": 0.725,
    "refusals-dangerous": 0.97,
    "refusals-offensive": 1,
    "xstest-should-refuse": 1,
    "xstest-should-respond": 0.284,
}
BEAVER_SECTIONS = {
    "Chat": 0.6089385474860335,
    "Chat Hard": 0.44956140350877194,
    "Safety": 0.7216216216216216,
    "Reasoning": 0.46675669776831996,
}
TIES = {
    "ref:0": ([2.0, 0.5, -1.0], 1),
    "tied:0": ([3.0, 2.5, 2.75, 1.0, 0.0], 3),
    "ref:1": ([1.0, 0.9], 1),
    "tied:1": ([2.0, 1.0, 0.5, -1.0], 2),
    "ref:2": ([0.0, 0.5], 1),
    "tied:2": ([4.0, 3.5, 3.0, -2.0], 3),
    "ref:3": ([1.5, 0.25], 1),
    "tied:3": ([2.0, 2.0, 2.0, 0.0], 3),
    "ref:4": ([1.0, 0.0], 1),
    "tied:4": ([2.0, 1.5, 1.0], 1),
    "tied:5": ([2.0, 1.0, 3.0], 2),
    "ref:6": ([1.0, 1.0], 1),
    "tied:6": ([1.0, 1.0, 1.0, 1.0], 2),
}
TIES_PUBLISHED = 0.6120943191398207


def ties_rows(rows: dict[str, tuple[list[float], int]]) -> list[dict[str, Any]]:
    return [
        {"id": name, "scores": scores, "correct": correct, "subset": "Ties"}
        for name, (scores, correct) in rows.items()
    ]


def measure(sets: dict[str, ChoiceScores], settings: EvaluateSettings = SETTINGS) -> dict[str, Any]:
    measured: dict[str, Any] = PROBES.get("rewardbench").measure(sets, settings, 0)["sets"]
    return measured


# Aggregation


def test_published_sections_of_a_published_model() -> None:
    sections, overall = aggregate(BEAVER, 1)
    assert sections == pytest.approx(BEAVER_SECTIONS)
    assert overall == {"four sections": pytest.approx(np.mean(list(BEAVER_SECTIONS.values())))}


def test_the_rows_of_version_1_give_the_same_sections() -> None:
    """From rows on: as many right as the published shares say, in files of the benchmark's size."""
    rows = []
    for subset, share in BEAVER.items():
        right = round(share * ROWS_1[subset])
        rows += [{"scores": [float(i < right), 0.5], "subset": subset} for i in range(ROWS_1[subset])]
    assert len(rows) == 2985
    measured = measure({"v1": choice_scores(rows, version=1)})["v1"]
    found = {name: part["models"]["m"]["score"] for name, part in measured["sections"].items()}
    assert found == pytest.approx(BEAVER_SECTIONS) and measured["missing"] == []
    assert all(part["rows"] == part["expected"] for part in measured["subsets"].values())
    low, high = measured["sections"]["Safety"]["models"]["m"]["interval"]
    assert low < found["Safety"] < high and high - low == pytest.approx(0.05, abs=0.02)


def test_weights_are_the_corrected_ones() -> None:
    assert SECTIONS["Safety"]["xstest-should-refuse"] == 154
    assert SECTIONS["Safety"]["xstest-should-respond"] == 250
    assert SECTIONS["Reasoning"]["math-prm"] == 6 * SECTIONS["Reasoning"]["hep-go"] == 984
    assert ROWS_1["math-prm"] == 447 and sum(ROWS_1.values()) == 2985 and sum(ROWS_2.values()) == 1865


def test_prior_sets_weigh_half_a_section() -> None:
    prior = {"anthropic_helpful": 0.6, "anthropic_hhh": 0.8, "shp": 0.5, "summarize": 0.7}
    sections, overall = aggregate({**BEAVER, **prior}, 1)
    assert sections["Prior sets"] == pytest.approx(0.65)
    expected = (2 * sum(BEAVER_SECTIONS.values()) + 0.65) / 9
    assert overall["with prior sets"] == pytest.approx(expected)
    assert overall["four sections"] == pytest.approx(sum(BEAVER_SECTIONS.values()) / 4)
    # Those that are there count, as in the published code.
    assert aggregate({"shp": 0.5, "summarize": 0.7, "mtbench_human": 0.1}, 1) == (
        {"Prior sets": pytest.approx(0.6)},
        {},
    )


def test_part_of_a_section_is_its_own_mean_and_a_missing_section_leaves_no_overall() -> None:
    some = {name: BEAVER[name] for name in ("hep-go", "math-prm", "donotanswer")}
    sections, overall = aggregate(some, 1)
    assert list(sections) == ["Safety", "Reasoning"] and overall == {}
    assert sections["Reasoning"] == pytest.approx((164 * BEAVER["hep-go"] + 984 * BEAVER["math-prm"]) / 1148)
    assert aggregate({name: 0.5 for name in ROWS_2}, 2) == ({}, {"six subsets": 0.5})
    assert aggregate({"Math": 0.5}, 2) == ({}, {})


def test_prior_sets_join_every_file_of_version_1_under_their_own_names() -> None:
    core = choice_scores([{"scores": [1, 0], "subset": name} for name in ROWS_1], version=1)
    shp = choice_scores([{"scores": [0, 1], "subset": "its own"}, {"scores": [1, 0]}], version=1)
    measured = measure({"one": core, "shp": shp, "two": core})
    assert list(measured) == ["one", "two"]
    for found in measured.values():
        assert found["subsets"]["shp"]["models"]["m"]["score"] == 0.5
        assert found["overall"]["with prior sets"]["models"]["m"]["score"] == pytest.approx(8.5 / 9)
    alone = measure({"shp": shp, "v2": choice_scores(ties_rows(TIES))})
    assert list(alone) == ["v2", "Prior sets"]
    assert alone["Prior sets"]["overall"] == {} and alone["Prior sets"]["missing"] == []


# Rows


def test_a_tie_is_an_error_in_version_1_and_a_share_in_version_2() -> None:
    rows = [{"scores": [1, 1]}, {"scores": [2, 1]}, {"scores": [0, 1]}]
    for version, expected in ((1, [0, 1, 0]), (2, [0.5, 1, 0])):
        found, tied = results(choice_scores(rows).scores["m"], choice_scores(rows, version))
        assert found.tolist() == expected and tied.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3, 1, 2, 0], 1),
        ([3, 3, 2, 0], 1 / 2),
        ([3, 3, 3, 3], 1 / 4),
        ([1, 3, 3, 0], 0),
        ([3, 1, 3, 3], 1 / 3),
    ],
)
def test_best_of_four(scores: list[float], expected: float) -> None:
    rows = choice_scores([{"scores": scores}, {"scores": [0, 1]}])
    assert results(rows.scores["m"], rows)[0].tolist() == pytest.approx([expected, 0])


def test_constant_random_and_length_scores_of_version_2() -> None:
    random = np.random.default_rng(0)
    rows = []
    for subset, count in ROWS_2.items():
        for number in range(count if subset != "Ties" else 0):
            lengths = random.integers(1, 99, 4)
            scores = {"constant": [0.0] * 4, "length": lengths, "random": random.normal(size=4)}
            rows.append({"scores": scores, "lengths": lengths, "subset": subset, "id": str(number)})
    measured = measure({"v2": choice_scores(rows)})["v2"]
    assert measured["overall"] == {} and measured["missing"] == ["Ties"]
    for part in measured["subsets"].values():
        scores = {model: n["score"] for model, n in part["models"].items()}
        assert scores["constant"] == 0.25 and scores["length"] == part["always_longer"]
        low, high = part["models"]["random"]["interval"]
        assert low < 0.25 < high
        assert part["models"]["constant"]["tied"] == part["rows"]


# Ties


def test_ties_is_the_published_number() -> None:
    rows = choice_scores(ties_rows(TIES))
    assert ties_scores([rows.scores["m"]], rows, 10, 0)[0, 0] == pytest.approx(TIES_PUBLISHED)
    measured = measure({"v2": rows})["v2"]["subsets"]["Ties"]
    low, high = measured["models"]["m"]["interval"]
    assert measured["models"]["m"]["score"] == pytest.approx(TIES_PUBLISHED) and low < TIES_PUBLISHED < high


def ties_of(rows: dict[str, tuple[list[float], int]]) -> float:
    table = choice_scores(ties_rows(rows))
    return float(ties_scores([table.scores["m"]], table, 10, 0)[0, 0])


def test_ties_by_hand() -> None:
    tanh = math.tanh
    ref, tied = ([2.0, 0.5], 1), ([3.0, 2.5, 1.0], 2)  # margins 1.5 and 1.5, spread 0.5
    assert ties_of({"ref:7": ref, "tied:7": tied}) == pytest.approx(1 + 0.01 * tanh(3 - 1))
    wide = ([3.0, 1.0, 0.5], 2)  # margin 0.5, spread 2
    assert ties_of({"ref:7": ref, "tied:7": wide}) == pytest.approx(0.6 + 0.01 * tanh(0.25 - 1))
    weak = ([1.0, 0.75], 1)  # its margin is below the spread: only the easier of the two tests is passed
    assert ties_of({"ref:7": weak, "tied:7": tied}) == pytest.approx(0.8 + 0.01 * tanh(0.5 - 1))
    equal = ([2.0, 2.0, 1.0], 2)  # no spread: nothing to divide by
    assert ties_of({"ref:7": ref, "tied:7": equal}) == pytest.approx(1)
    assert ties_of({"ref:7": ([0.0, 1.0], 1), "tied:7": ([0.0, 1.0, 2.0], 2)}) == pytest.approx(
        0.01 * tanh(-3)
    )
    assert ties_of({"ref:7": ([0.0] * 3, 1), "tied:7": ([0.0] * 5, 2)}) == 0
    assert ties_of({"ref:7": ref}) == pytest.approx(0.3) and ties_of({"tied:7": tied}) == pytest.approx(0.3)


def test_order_of_rows_and_wrong_answers_and_scale_change_nothing() -> None:
    random = np.random.default_rng(0)
    rows = ties_rows(TIES) + [
        {"scores": random.normal(size=4), "subset": "Math", "id": str(i)} for i in range(20)
    ]
    moved = []
    for place in random.permutation(len(rows)):
        row = dict(rows[place])
        scores, correct = np.asarray(row["scores"], dtype=float), row.get("correct", 1)
        order = [*range(correct), *random.permutation(np.arange(correct, len(scores)))]
        moved.append(row | {"scores": 4 * scores[order] - 3})
    one, other = (measure({"v2": choice_scores(some)})["v2"]["subsets"] for some in (rows, moved))
    for subset in ("Math", "Ties"):
        assert one[subset]["models"]["m"]["score"] == pytest.approx(other[subset]["models"]["m"]["score"])


def test_intervals_cover() -> None:
    """The overall score of version 2, with a Ties subset, over benchmarks drawn anew."""
    settings = EvaluateSettings(resamples=200)

    def draw(random: np.random.Generator, size: int) -> ChoiceScores:
        rows = []
        for subset in ROWS_2:
            for i in range(size):
                if subset != "Ties":
                    rows.append({"scores": random.normal(size=4) + [1, 0, 0, 0], "subset": subset})
                    continue
                for name, correct in ((f"ref:{i}", 1), (f"tied:{i}", 3)):
                    scores = 0.7 * random.normal(size=correct + 2) + np.repeat([2.0, 0.0], [correct, 2])
                    rows.append({"scores": scores, "correct": correct, "subset": subset, "id": name})
        return choice_scores(rows)

    random = np.random.default_rng(0)
    truth = measure({"b": draw(random, 1500)}, EvaluateSettings(resamples=100))["b"]["overall"]
    expected, covered = truth["six subsets"]["models"]["m"]["score"], 0
    for _ in range(60):
        part = measure({"b": draw(random, 40)}, settings)["b"]["overall"]["six subsets"]
        low, high = part["models"]["m"]["interval"]
        covered += low <= expected <= high
    assert covered >= 54


def test_models_are_compared_on_the_same_rows() -> None:
    random = np.random.default_rng(0)
    rows = []
    for subset in ROWS_1:
        for _ in range(10):
            noise = random.normal(size=2)
            scores = {"a": noise + [0.5, 0], "b": noise + [0.6, 0], "c": random.normal(size=2)}
            rows.append({"scores": scores, "subset": subset})
    part = measure({"v1": choice_scores(rows, 1)})["v1"]["overall"]["four sections"]
    named = {(c["first"], c["second"]): c for c in part["comparisons"]}
    assert list(named) == [("a", "b"), ("a", "c"), ("b", "c")]
    scores = {model: n["score"] for model, n in part["models"].items()}
    for (one, other), found in named.items():
        assert found["difference"] == pytest.approx(scores[one] - scores[other])
    width = {pair: np.diff(c["interval"])[0] for pair, c in named.items()}
    assert width["a", "b"] < 0.6 * width["a", "c"], "noise that two models share must cancel"


def test_of_many_models_each_is_compared_with_the_baseline() -> None:
    random = np.random.default_rng(0)
    rows = [
        {"scores": {f"m{i}": random.normal(size=2) for i in range(21)}, "subset": subset} for subset in ROWS_1
    ]
    measured = PROBES.get("rewardbench").measure({"v1": choice_scores(rows, 1)}, SETTINGS, 0)
    part = measured["sets"]["v1"]["overall"]["four sections"]
    assert [(c["first"], c["second"]) for c in part["comparisons"]] == [("m0", f"m{i}") for i in range(1, 21)]
    titles = [table.title for table in PROBES.get("rewardbench").tables(measured)]
    assert titles[1] == "Each model and the baseline on RewardBench 1, v1"


# Reading and encoding


def chat_tokenizer(bos: bool = False) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ("<bos> " if bos else "") + TEMPLATE
    if bos:
        from tokenizers import processors

        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        number = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", number)]
        )
    return tokenizer


def options(**changes: Any) -> Evaluate:
    return Evaluate(models={"m": "x"}, output=Path("unused"), **changes)


V1 = {
    "id": 30,
    "prompt": "w1 w2",
    "chosen": "w3",
    "rejected": "w4 w5",
    "subset": "hep-go",
    "chosen_model": "x",
}
V2 = {
    "id": "tied:4",
    "prompt": "w1",
    "chosen": ["w2", "w3"],
    "rejected": ["w4", "w5", "w6"],
    "num_correct": 2,
    "num_incorrect": 3,
    "total_completions": 5,
    "models": ["a"],
    "subset": "Ties",
    "additional_metadata": {"category": None},
}
PRIOR = {
    "prompt": [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ],
    "chosen": "w4",
    "rejected": "w5",
    "subset": "its own",
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_in_their_own_columns(suffix: str, tmp_path: Path) -> None:
    for name, row in {"v1": V1, "v2": V2, "prior": PRIOR}.items():
        [choice], report = read_choices(write(tmp_path / (name + suffix), [row]), options())
        assert report.kept == 1 and choice.row == 1
        if name == "v1":
            assert (choice.version, choice.turns, choice.texts) == (1, ["w1 w2"], ["w3", "w4 w5"])
            assert (choice.num_correct, choice.subset, choice.id) == (1, "hep-go", "30")
        elif name == "v2":
            assert (choice.version, choice.num_correct, choice.id) == (2, 2, "tied:4")
            assert choice.texts == ["w2", "w3", "w4", "w5", "w6"]
        else:
            assert choice.turns == ["w1", "w2", "w3"] and choice.texts == ["w4", "w5"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({**V2, "id": "4"}, "id of a row of Ties"),
    ({**V2, "num_correct": 1}, "num_correct"),
    ({**V2, "rejected": "w4"}, "neither texts nor lists"),
    ({**V2, "rejected": []}, "neither texts nor lists"),
    ({**V2, "subset": None}, "subset is not text"),
    ({**V1, "chosen": None}, "neither texts nor lists"),
    ({**V1, "prompt": None}, "prompt is neither"),
    ({**PRIOR, "prompt": PRIOR["prompt"][:2]}, "last turn"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_broken_rows_are_refused_or_skipped_and_counted(
    row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    good = V2 if isinstance(row["chosen"], list) else V1
    source = write(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(DataError, match=reason):
        read_choices(source, options())
    choices, report = read_choices(source, options(bad_rows="skip"))
    assert len(choices) == 1 and report.bad == 1


def test_mixed_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mixes both versions"):
        read_choices(write(tmp_path / "rows.jsonl", [V1, V2]), options())


def encoded(tokenizer: Any, row: dict[str, Any], tmp_path: Path, **changes: Any) -> Any:
    choices, report = read_choices(write(tmp_path / "row.jsonl", [row]), options(**changes))
    return encode_choices(tokenizer, choices, options(**changes), report)[0].answers


def test_texts_go_through_the_chat_template_by_turns(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    chosen, _ = encoded(tokenizer, PRIOR, tmp_path)
    expected = "user w1 <eos> assistant w2 <eos> user w3 <eos> assistant w4 <eos>"
    assert chosen.ids == tokenizer(expected)["input_ids"] and chosen.cut == 0
    assert chosen.prompt_length == 9


def test_of_a_doubled_bos_one_is_left(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(bos=True)
    doubled = tokenizer("<bos> user w1 w2 <eos> assistant w3 <eos>")["input_ids"]
    assert doubled[:2] == [tokenizer.bos_token_id] * 2
    chosen, _ = encoded(tokenizer, V1, tmp_path)
    assert chosen.ids == doubled[1:] and chosen.prompt_length == 5


@pytest.mark.parametrize("version", [1, 2])
def test_long_texts_are_cut_on_the_side_of_the_published_scripts(version: int, tmp_path: Path) -> None:
    tokenizer, row = chat_tokenizer(), V1 if version == 1 else {**V1, "chosen": ["w3"], "rejected": ["w4 w5"]}
    full, _ = encoded(tokenizer, row, tmp_path)
    short, other = encoded(tokenizer, row, tmp_path, rewardbench_max_length=6)
    assert len(full.ids) == 7 and (short.cut, other.cut) == (1, 2)
    if version == 1:
        assert short.ids == full.ids[-6:] and short.prompt_length == full.prompt_length - 1
    else:
        assert short.ids == full.ids[:6] and short.prompt_length == full.prompt_length
    again, _ = encoded(tokenizer, row, tmp_path)
    assert again.ids == full.ids, "cutting must not stay in the tokenizer"


def test_plain_texts_for_tokenizers_without_a_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="set rewardbench_template to plain"):
        encoded(tokenizer, V1, tmp_path)
    chosen, _ = encoded(tokenizer, V1, tmp_path, rewardbench_template="plain")
    assert chosen.ids == tokenizer("w1 w2\nw3<eos>")["input_ids"] and chosen.prompt_length == 2


def test_rows_that_the_template_refuses_are_bad() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    from moemerge.data.rewardbench import Choice

    report = RowReport("x", total=1)
    with pytest.raises(DataError, match="template refuses"):
        encode_choices(tokenizer, [Choice(["a"], ["b", "c"], 1, 1)], options(), report)


# A whole evaluation


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    models = {}
    for seed in range(3):
        models[f"rm{seed}"] = str(save_dense(folder / f"rm{seed}", seed=seed))
        chat_tokenizer().save_pretrained(models[f"rm{seed}"])
    random = np.random.default_rng(0)

    def text(longest: int = 9) -> str:
        return " ".join(f"w{n}" for n in random.integers(0, 60, random.integers(1, longest)))

    v1 = [
        {**V1, "subset": s, "prompt": text(), "chosen": text(), "rejected": text()} for s in list(ROWS_1) * 2
    ]
    prior = [{**PRIOR, "chosen": text(), "rejected": text()} for _ in range(5)]
    one = {"chosen": ["w1 w9"], "num_correct": 1}
    v2 = [
        {**V2, **one, "id": str(i), "subset": s, "prompt": text(), "rejected": [text() for _ in "abc"]}
        for i, s in enumerate(name for name in ROWS_2 if name != "Ties")
    ]
    v2 += [{**V2, "id": f"{kind}:{i}", "prompt": text()} for i in range(3) for kind in ("ref", "tied")]
    v2[0]["rejected"][0] = " ".join(["w7"] * 60)
    files = {"v1": write(folder / "v1.jsonl", v1), "shp": write(folder / "shp.jsonl", prior)}
    files["v2"] = write(folder / "v2.parquet", v2)
    return evaluate(
        models=models,
        rewardbench=files,
        pairs={"pairs": write(folder / "pairs.jsonl", v1)},
        sections={"code": [name for name in ROWS_1 if name.startswith("hep")]},
        rewardbench_max_length=40,
        resamples=200,
        output=folder / "e",
    )


def test_whole_evaluation(evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())
    measured = report["probes"]["rewardbench"]["sets"]
    assert list(measured) == ["v1", "v2"]
    assert list(measured["v1"]["overall"]) == ["four sections", "with prior sets"]
    scores = load_file(evaluated / "scores.safetensors")
    v1 = scores["rewardbench/v1/model/rm1"].reshape(-1, 2)
    right = (v1[:, 0] > v1[:, 1]).double().reshape(2, -1).mean(dim=0).tolist()
    sections, overall = aggregate(dict(zip(ROWS_1, right, strict=True)), 1)
    assert measured["v1"]["sections"]["Chat"]["models"]["rm1"]["score"] == pytest.approx(sections["Chat"])
    assert measured["v1"]["overall"]["four sections"]["models"]["rm1"]["score"] == pytest.approx(
        overall["four sections"]
    )
    main = read_manifest(evaluated)["results"]["main"]["rewardbench"]
    assert main["v1"]["four sections"]["rm1"] == pytest.approx(overall["four sections"])
    assert set(main["v2"]) == {"six subsets"}
    assert {"accuracy.png", "calibration.png", "rewardbench.png"} == set(report["plots"])


def test_results_in_its_own_form(evaluated: Path) -> None:
    """A score per subset as its scripts give it, counted from the rows' scores beside it."""
    home = evaluated / "rewardbench"
    assert {path.name for path in home.iterdir()} == {"v1", "v2"}
    one, rows, prior = (
        json.loads((home / f"v1/rm1{e}.json").read_text()) for e in ("", ".scores", ".pref-sets")
    )
    assert one.keys() - {"model", "model_type", "chat_template"} == set(ROWS_1)
    assert one["model_type"] == "Seq. Classifier"
    assert one["chat_template"] == "tokenizer"
    assert prior.keys() - one.keys() == {"shp"}, "the one prior set that was given"
    right = [int(a > b) for a, b in zip(rows["scores_chosen"], rows["scores_rejected"], strict=True)]
    assert rows["results"] == right
    for subset in ROWS_1:
        mine = [value for value, name in zip(right, rows["subset"], strict=True) if name == subset]
        assert one[subset] == pytest.approx(sum(mine) / len(mine))
    two, rows = (json.loads((home / f"v2/rm0{e}.json").read_text()) for e in ("", ".scores"))
    assert set(ROWS_2) <= two.keys() and len(rows["scores"]) == len(rows["num_correct"])
    for subset in set(ROWS_2) - {"Ties"}:
        mine = [value for value, name in zip(rows["results"], rows["subset"], strict=True) if name == subset]
        assert two[subset] == pytest.approx(sum(mine) / len(mine))
    assert all(
        (r is None) == (name == "Ties") for r, name in zip(rows["results"], rows["subset"], strict=True)
    )


def test_every_number_of_the_report_has_a_type(evaluated: Path) -> None:
    """A report that is read again loses what no type names."""
    written = json.loads((evaluated / "report.json").read_text())
    assert json.loads(json.dumps(read_report(evaluated))) == written


def test_protocol_is_printed(evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())["protocol"]
    assert report["sets"]["pairs/pairs"]["truncation"] == "never; longer rows: refuse"
    assert report["sets"]["pairs/pairs"]["max_length"] == 1024
    v2 = report["sets"]["rewardbench/v2"]
    assert v2["max_length"] == 40 == v2["longest"] and v2["truncation"] == "right"
    assert v2["cut_texts"] == {"rm0": 1, "rm1": 1, "rm2": 1}
    assert report["sets"]["rewardbench/v1"]["truncation"] == "left"
    assert report["models"]["rm0"]["chat_template"].startswith("sha256 ")
    text = (evaluated / "report.md").read_text()
    assert "### How the texts were read" in text and "1 cut for rm0" in text
    for title in (
        "RewardBench 1 on v1",
        "RewardBench 2 on v2",
        "Accuracy on pairs, by section",
        "Tokenizers",
    ):
        assert f"### {title}" in text


def test_a_recipe_takes_files_beside_it_and_tells_which_are_missing(tmp_path: Path) -> None:
    write(tmp_path / "v1.jsonl", [V1])
    recipe = tmp_path / "recipe.yml"
    lines = "output: run\nsynthetic: {}\nevaluate: {rewardbench: {one: v1.jsonl, two: ./v2.parquet}}\n"
    recipe.write_text(lines)
    [fault] = check_recipe(recipe)
    assert fault.what == "evaluate.rewardbench.two does not exist"
    recipe.write_text(lines.replace(", two: ./v2.parquet", ""))
    assert load_recipe(recipe).evaluate.rewardbench == {"one": str(tmp_path / "v1.jsonl")}
