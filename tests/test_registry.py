"""Open sets, and what other packages add to them by entry points."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_heads import under_head
from small_moe import make_moe, random_pairs, write_rows
from tiny_models import save_dense
from transformers import AutoModelForSequenceClassification

from moemerge import registry
from moemerge.artifacts.manifest import read_manifest
from moemerge.artifacts.staleness import other_versions
from moemerge.errors import CheckpointError, Faults, MoemergeError, OptionError, UnsupportedError
from moemerge.evaluation.probes import PROBES
from moemerge.fitting.methods import METHODS
from moemerge.fitting.objectives import OBJECTIVES
from moemerge.fitting.optimisers import OPTIMISERS
from moemerge.models import families
from moemerge.models.families import FAMILIES
from moemerge.models.heads import HEADS
from moemerge.models.loading import load_reward_model
from moemerge.models.scorers import open_scorer
from moemerge.options.scorers import SCORERS
from moemerge.registry import Registry
from moemerge.run.check import load_recipe
from moemerge.stages.evaluate import evaluate
from moemerge.stages.fit import fit
from moemerge.stages.merge import merge
from moemerge.stages.publish import publish
from moemerge.stages.train import train
from moemerge.stages.upcycle import upcycle
from moemerge.training.losses import LOSSES

OPEN: tuple[Registry, ...] = (METHODS, OBJECTIVES, OPTIMISERS, LOSSES, PROBES, HEADS, SCORERS, families.ADDED)
Install = Callable[..., Path]

PROBE = """
from moemerge.evaluation.probes.base import Probe
from moemerge.reports.table import Table

def measure(scores, settings, seed):
    return {"confidence": settings.confidence, "loudest": {name: max(s.scores) for name, s in scores.items()}}

def tables(result):
    return [Table("Loudest", ["set", "model"], [[*row] for row in result["loudest"].items()])]

PROBE = Probe("pairs", measure, tables, lambda result, folder: [])
"""
WHOLE = """
class Whole:
    def __getattr__(self, name): return None
    def __call__(self): ...

IT = Whole()
"""
METHOD = """
import torch
from moemerge.fitting.problem import FitOutcome

def last_expert(problem):
    alpha_LN = torch.zeros(len(problem.blocks), problem.num_experts, dtype=torch.float64)
    alpha_LN[:, -1] = 1
    shared_L = torch.zeros(len(problem.blocks), dtype=torch.float64)
    return FitOutcome(alpha_LN, shared_L, {"verdict": "The last."})
"""
HEAD = """
import torch
from moemerge.models.heads.base import Head

class Squares(Head):
    outputs = ("weights",)

    def __init__(self, in_features, settings):
        super().__init__(in_features, settings)
        self.weights = torch.nn.Parameter(torch.zeros(in_features))

    def score(self, states):
        return states**2 @ self.weights.to(states.dtype)

    def draw(self, generator, start):
        with torch.no_grad():
            self.weights.normal_(generator=generator)
"""
SCORER = """
import torch
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_tokenizer
from moemerge.options.base import Options, Source

class Size(Options):
    tokenizer: Source
    weight: float = 1.0

class Sized:
    facts = {"class": "size", "parameters": 0, "active_parameters": 0, "flops_per_token": 0}

    def __init__(self, weight):
        self.weight = weight

    def score(self, encoded, batch_tokens, progress="", alone=False):
        return torch.tensor([self.weight * len(text.ids) for text in encoded])

class SizeScorer:
    Options = Size

    def __init__(self, source, options, trust_remote_code=False):
        self.source, self.options = source, options

    def reader(self):
        return load_tokenizer(ModelFolder(self.options.tokenizer))

    def load(self, device, placement=None):
        return Sized(self.options.weight)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts packages where Python finds them, each with its entry points, by group."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    registry.USED.clear()

    def forget() -> None:
        for opened in OPEN:
            opened.__dict__.pop("added", None)

    def put(name: str, text: str, version: str = "1.2", **points: Mapping[str, str]) -> Path:
        forget()
        module = site / f"{name}.py"
        module.write_text(text)
        told = site / f"{name}-{version}.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = (
            f"[moemerge.{group}]\n" + "".join(f"{key} = {value}\n" for key, value in members.items())
            for group, members in points.items()
        )
        (told / "entry_points.txt").write_text("".join(lines))
        return module

    yield put
    forget()
    for name in [name for name in sys.modules if (site / f"{name}.py").exists()]:
        del sys.modules[name]


@pytest.mark.parametrize("opened", OPEN, ids=lambda opened: opened.group)
def test_other_packages_add_to_every_open_set_and_are_imported_when_named(
    opened: Registry, install: Install
) -> None:
    install("loud", WHOLE, **{opened.group: {"loud": "loud:IT"}})
    assert list(opened)[-1] == "loud" and "loud" in opened and "quiet" not in opened
    with pytest.raises(OptionError, match="did you mean 'loud'"):
        opened.get("loudd")
    assert "loud" not in sys.modules
    assert type(opened.get("loud")).__name__ == "Whole"
    assert registry.USED == {"loud"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import not_there", "cannot be imported (ModuleNotFoundError: No module named 'not_there')"),
        ("1 / 0", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("import sys; sys.exit(3)", "cannot be imported (SystemExit: 3)"),
        ("def other(): ...", "cannot be imported (AttributeError: module 'bad' has no attribute 'IT')"),
        ("IT = 5", "is int"),
    ],
)
def test_a_broken_package_is_named(text: str, said: str, install: Install) -> None:
    install("bad", text, methods={"worst": "bad:IT"})
    with pytest.raises(UnsupportedError) as caught:
        METHODS.get("worst")
    assert caught.value.what == f"coefficient method worst {said}"
    assert caught.value.given == "bad:IT, which bad 1.2 adds"
    assert "repair or uninstall bad 1.2" in caught.value.fix
    METHODS.get("uniform")  # the others still work


def test_an_interrupt_while_a_package_is_imported_is_no_fault_of_its(install: Install) -> None:
    install("slow", "raise KeyboardInterrupt", methods={"slow": "slow:IT"})
    with pytest.raises(KeyboardInterrupt):
        METHODS.get("slow")


def test_a_name_has_one_owner(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("first", "def IT(): ...", methods={"mine": "first:IT", "uniform": "first:IT"})
    install("second", "def IT(): ...", methods={"mine": "second:IT"})
    with pytest.raises(UnsupportedError, match="added by several packages") as caught:
        METHODS.get("mine")
    assert "first 1.2" in caught.value.given and "second 1.2" in caught.value.given
    assert METHODS.get("uniform").__module__ == "moemerge.fitting.methods.uniform"
    assert "uniform of first 1.2 is not used" in caplog.text


def test_a_damaged_list_of_entry_points_stops_nothing(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    module = install("torn", "", methods={"mine": "torn:IT"})
    (module.parent / "torn-1.2.dist-info" / "entry_points.txt").write_text("[moemerge.methods]\nnonsense\n")
    with caplog.at_level(logging.WARNING):
        assert "uniform" in list(METHODS) and "mine" not in METHODS
    assert "cannot be listed" in caplog.text


def test_check_finds_broken_packages_before_a_run(
    install: Install, tmp_path: Path, dense_folder: Path
) -> None:
    install("bad", "import not_there", methods={"worst": "bad:IT"}, probes={"deaf": "bad:IT"})
    pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(10))
    recipe = {
        "output": str(tmp_path / "run"),
        "model": str(dense_folder),
        "data": {"train": str(pairs), "test_share": 0.2, "validation_share": 0.2},
        "fit": {"method": "worst"},
        "evaluate": {"probes": ["accuracy", "deaf"]},
    }
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    with pytest.raises(Faults) as caught:
        load_recipe(tmp_path / "r.yml")
    assert [fault.what.split(" (")[0] for fault in caught.value.faults] == [
        "coefficient method worst cannot be imported",
        "probe deaf cannot be imported",
    ]


def test_a_probe_of_another_package_is_measured_shown_and_recorded(
    install: Install, tmp_path: Path, dense_folder: Path
) -> None:
    install("loud", PROBE, probes={"loudest": "loud:PROBE"})
    pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(10))
    output = evaluate(
        models={"dense": str(dense_folder)},
        pairs={"test": str(pairs)},
        probes=["accuracy", "loudest"],
        resamples=100,
        output=tmp_path / "report",
    )
    assert json.loads((output / "report.json").read_text())["probes"]["loudest"]["loudest"] == {
        "test": "dense"
    }
    assert "Loudest" in (output / "report.html").read_text()
    manifest = read_manifest(output)
    assert manifest["versions"]["loud"] == "1.2"
    registry.USED.clear()
    assert other_versions(manifest) == []
    manifest["versions"]["loud"] = "1.1"
    assert other_versions(manifest) == ["loud 1.1 (now 1.2)"]


def test_a_method_of_another_package_fits(install: Install, tmp_path: Path) -> None:
    install("last", METHOD, methods={"last_expert": "last:last_expert"})
    moe = make_moe(tmp_path / "moe")
    fitted = fit(
        moe, write_rows(tmp_path / "p.jsonl", random_pairs(10)), method="last_expert", output=tmp_path / "c"
    )
    merged = load_file(merge(moe, fitted, output=tmp_path / "merged") / "model.safetensors")
    experts = load_file(moe / "model.safetensors")
    expected = experts["model.layers.0.mlp.experts.down_proj"][-1]
    assert torch.equal(merged["model.layers.0.mlp.down_proj.weight"], expected)


def test_an_architecture_of_another_package_is_upcycled(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FAMILIES, "llama")
    dense = save_dense(tmp_path / "dense")
    with pytest.raises(MoemergeError, match="architecture is not supported"):
        upcycle(model=dense, output=tmp_path / "refused")
    text = "from moemerge.models.families.base import Family\nLLAMA = Family('llama')\n"
    install("sheep", text, families={"llama": "sheep:LLAMA", "never-heard-of": "sheep:OTHER"})
    moe = upcycle(model=dense, num_routed_experts=3, num_experts_per_tok=2, output=tmp_path / "moe")
    assert read_manifest(moe)["versions"]["sheep"] == "1.2"


def test_a_head_of_another_package_is_trained_merged_and_named(install: Install, tmp_path: Path) -> None:
    install("boxes", HEAD, heads={"squares": "boxes:Squares"})
    pairs = write_rows(tmp_path / "p.jsonl", random_pairs(8))
    given = {"max_steps": 1, "head_seed": 3, "head_dropout": 0.0}
    trained = train(
        save_dense(tmp_path / "dense"), pairs, head="squares", output=tmp_path / "trained", **given
    )
    manifest = read_manifest(trained)
    assert manifest["results"]["needs"] == "moemerge, boxes" and manifest["versions"]["boxes"] == "1.2"
    merged = merge(models=[trained, trained], output=tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    ids = torch.tensor([[5, 7, 9]])
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0, -1]
        assert model(ids).logits.item() == pytest.approx((states**2 @ model.score.weights).item(), rel=1e-5)
    card = (publish(merged, output=tmp_path / "card") / "README.md").read_text()
    assert "`squares`" in card and "pip install moemerge boxes" in card


def test_a_model_whose_heads_package_is_not_there_says_what_it_lacks(
    install: Install, tmp_path: Path, dense_folder: Path
) -> None:
    module = install("boxes", HEAD, heads={"squares": "boxes:Squares"})
    folder = under_head(dense_folder, tmp_path / "model", "squares")
    (module.parent / "boxes-1.2.dist-info/entry_points.txt").unlink()
    HEADS.__dict__.pop("added")
    with pytest.raises(CheckpointError, match=r"(?s)'squares'.*packages, that wrote it"):
        load_reward_model(folder, "cpu")


def test_a_scorer_of_another_package_is_evaluated(
    install: Install, tmp_path: Path, dense_folder: Path
) -> None:
    install("sizes", SCORER, scorers={"size": "sizes:SizeScorer"})
    scorer = tmp_path / "short.scorer.json"
    scorer.write_text(json.dumps({"kind": "size", "tokenizer": str(dense_folder), "weight": -1}))
    pairs = tmp_path / "pairs.jsonl"
    sides = [("w1", "w1 w2"), ("w1 w2 w3", "w1"), ("w4", "w4 w5 w6"), ("w4", "w5 w6")]
    rows = [{"prompt": f"w{i} ", "chosen": a, "rejected": b} for i, (a, b) in enumerate(sides)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = evaluate(
        models={"short": str(scorer)}, pairs={"test": str(pairs)}, probes=["accuracy"], resamples=100,
        output=tmp_path / "report",
    )  # fmt: skip
    sets = json.loads((output / "report.json").read_text())["probes"]["accuracy"]["sets"]
    assert sets["test"]["all"]["models"]["short"]["accuracy"] == 0.75
    assert read_manifest(output)["versions"]["sizes"] == "1.2"
    scorer.write_text(json.dumps({"kind": "size", "tokenizer": str(dense_folder), "wieght": -1}))
    with pytest.raises(OptionError, match="did you mean 'weight'"):
        open_scorer(scorer)
    scorer.write_text(json.dumps({"kind": "sise"}))
    with pytest.raises(OptionError, match="did you mean 'size'"):
        open_scorer(scorer)
