"""Layers below the first merged one run once per batch: the same bits, fewer passes, nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_moe import gradient_of, make_moe, objective_of, random_pairs, rewrite, write_rows
from tiny_models import batch, save_dense, tiny_dense
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import encode_pairs
from moemerge.merging.coefficients import Coefficients
from moemerge.merging.merged_model import MergedModel
from moemerge.merging.sources.models import ModelList
from moemerge.models import state_store
from moemerge.models.frozen_layers import layers_of, run_frozen_once
from moemerge.models.state_store import StateStore
from moemerge.options.base import TextFormat
from moemerge.stages.fit import fit

LAYER = {"llama": LlamaDecoderLayer, "bert": BertLayer}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", random_pairs(40, seed=4)))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Experts in the last layer only."""
    return str(make_moe(tmp_path_factory.mktemp("moe") / "moe", layers="last:1"))


def of_upper_layers(folder: Path, family: str, seed: int) -> str:
    """A model that differs from others of its family in what stands above its second layer."""
    generator = torch.Generator().manual_seed(seed)

    def trained(name: str, tensor: Tensor) -> Tensor:
        upper = ".2." in name or name.startswith(("score", "classifier", "model.norm", "bert.pooler"))
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor + (0.3 if upper else 0.0) * noise

    return str(rewrite(save_dense(folder, family), trained))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Options that name a base and two models of a family, trained in upper layers."""
    home = tmp_path_factory.mktemp("models")

    def of(family: str) -> dict[str, Any]:
        names = [home / f"{family}-{seed}" for seed in range(3)]
        made = [
            str(folder) if folder.exists() else of_upper_layers(folder, family, seed)
            for seed, folder in enumerate(names)
        ]
        return {"base": made[0], "models": made[1:]}

    return of


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layer number of each pass through a layer."""
    seen: list[int] = []

    def counted(kind: type[nn.Module]) -> None:
        forward = kind.forward

        def count(self: Any, *args: Any, **kwargs: Any) -> Any:
            number = self.self_attn.layer_idx if kind is LlamaDecoderLayer else self.attention.self.layer_idx
            seen.append(number)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", count)

    for kind in LAYER.values():
        counted(kind)
    return seen


def fitted(folder: Path, passes: list[int], **options: Any) -> tuple[Coefficients, dict[str, Any], list[int]]:
    """Coefficients, the report, and how often each layer ran."""
    passes.clear()
    fit(output=folder, max_epochs=4, micro_batch_size=4, level=1.0, threads=1, **options)
    names = [path.name for path in folder.iterdir()]
    assert not [name for name in names if "state" in name or name.startswith("tmp")]
    report = json.loads((folder / "report.json").read_text())
    return Coefficients.load(folder), report, [passes.count(number) for number in range(3)]


SUM = {"coordinates": "sum", "l2": 0.01}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("moe", {"shared_weight": "learned", "objectives": {"bradley_terry": 1.0, "alignment": 0.5}}),
        ("llama", {"granularity": "group", "optimizer": "adam", "batch_size": 8, "folds": 2}),
        ("bert", SUM),
        pytest.param("llama", SUM | {"objectives": {"alignment": 1.0}}, marks=pytest.mark.slow),
        pytest.param("llama", {"method": "least_squares"}, marks=pytest.mark.slow),
        pytest.param("bert", {"method": "grid", "grid": [0.0, 0.4]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_same_bits_with_fewer_passes(
    family: str,
    options: dict[str, Any],
    pairs: str,
    moe: str,
    models: Callable[[str], dict[str, Any]],
    passes: list[int],
    tmp_path: Path,
) -> None:
    """In memory, and with so little of it that most states go into the file."""
    members = {"model": moe} if family == "moe" else models(family)
    given = {**members, "pairs": pairs, **options}
    plain, report, often = fitted(tmp_path / "plain", passes, cache_memory=0, **given)
    assert often[0] == often[1] == often[2] > 10
    for name, memory in (("file", 4e-5), *([("memory", 1.0)] if family == "llama" else [])):
        cached, same, fewer = fitted(tmp_path / name, passes, cache_memory=memory, **given)
        assert torch.equal(cached.alpha_LN, plain.alpha_LN) and torch.equal(cached.shared_L, plain.shared_L)
        assert same == report
        assert fewer[0] == fewer[1] < 0.75 * often[0] and fewer[2] >= often[2]


def test_models_that_are_equal_have_no_gradient(
    models: Callable[[str], dict[str, Any]], pairs: str, tmp_path: Path
) -> None:
    same = models("llama")["base"]
    source = ModelList([same, same])
    rows = len(source.blocks())
    merged = MergedModel(source, torch.full((rows, 2), 0.5).double(), torch.zeros(rows).double())
    read, report = read_pairs(pairs, TextFormat())
    found = gradient_of(merged, encode_pairs(source.tokenizer(), read[:2], TextFormat(), report))
    assert found.loss > 0 and not found.alpha_LN.any()


def test_only_batches_that_come_again_are_kept_while_they_may(
    models: Callable[[str], dict[str, Any]], pairs: str, tmp_path: Path
) -> None:
    source = ModelList(**models("llama"))
    shape = (len(source.blocks()), 2)
    point = torch.full(shape, 0.5).double(), torch.full(shape[:1], 0.5).double()
    merged = MergedModel(source, *point)
    read, report = read_pairs(pairs, TextFormat())
    objective = objective_of(merged, encode_pairs(source.tokenizer(), read[:8], TextFormat(), report), size=4)
    with StateStore(tmp_path, 1e9) as store:
        merged.run_lower_layers_once(objective.pairs[0], store)
        objective.gradient(*point, [*reversed(range(8))])  # as Adam draws them, if all go into one batch
        assert len(store) == 0
        for _ in range(2):
            objective.gradient(*point, range(8))
            assert len(store) == 2
        replace(objective, train=[0, 1, 2]).measure(*point, "train")
        assert len(store) == 1


@pytest.mark.parametrize("family", ["bloom", "deberta-v2", "falcon", "gpt2", "modernbert", "mpnet", "opt"])
def test_layers_of_other_architectures(family: str, tmp_path: Path) -> None:
    """Some give tuples, take masks of other kinds, positions or biases from outside, or a mask none."""
    model, texts = tiny_dense(family).requires_grad_(False), batch()
    stack = layers_of(model)
    assert stack is not None
    stack[2].requires_grad_(True)

    def run() -> list[Tensor]:
        return [model(**texts).logits]

    expected = run()[0].detach()
    with StateStore(tmp_path, 1e9) as store:
        frozen = run_frozen_once(model, run, store)
        assert frozen is not None and [layer.module for layer in frozen.layers] == list(stack[:2])
        kept, found = run()[0], run()[0]
        assert len(store) == 1 and torch.equal(kept, expected) and torch.equal(found, expected)
        texts["input_ids"] = texts["input_ids"].flip(0)  # other texts under the same mask
        assert not torch.equal(run()[0], expected)
        with torch.no_grad():
            next(stack[2].parameters()).mul_(2)
        after = run()[0]
        frozen.remove()
    assert torch.equal(after, run()[0])


class _Tricky(nn.Module):
    """Layers that pass more than states: each leaves a number for the next one to take up."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Leaving(self) for _ in range(3))
        self.left, self.hidden = 0.0, hidden
        self.layers[2].requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        self.left = 1.0
        for layer in self.layers:
            x = layer(x) if self.hidden else layer(2 * x)
        return x


class _Leaving(nn.Module):
    def __init__(self, home: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).requires_grad_(False)
        self.home = SimpleNamespace(module=home)

    def forward(self, x: Tensor) -> Tensor:
        self.home.module.left += 0.25 * self.home.module.hidden
        return self.linear(x) * self.home.module.left


@pytest.mark.parametrize("hidden", [True, False])
def test_a_model_in_which_it_does_not_go_stays_as_it_was(hidden: bool, tmp_path: Path) -> None:
    """Where layers leave something beside their states, or states change between them."""
    torch.manual_seed(0)
    model, x = _Tricky(hidden), torch.randn(2, 3, 4)
    expected = model(x).detach()
    with StateStore(tmp_path, 1e9) as store:
        frozen: Any = run_frozen_once(model, lambda: [model(x)], store)  # type: ignore[arg-type]
        # Of a stack that is no chain the first layer can still be passed over.
        assert frozen is None if hidden else len(frozen.layers) == 1
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_store_gives_back_the_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    given = {bytes([i]): torch.randn(2, 3, 5 + i).to(dtype) for i in range(4)}
    size = 2 * 3 * 5 * dtype.itemsize
    with StateStore(tmp_path, size) as store:
        for _ in range(2):  # the second time after all was forgotten
            for key, tensor in given.items():
                store.put(key, tensor)
            # The first fits into memory; the file that holds the others has no name.
            assert len(store) == 4 and list(tmp_path.iterdir()) == []
            for key, tensor in given.items():
                found = store.get(key, torch.device("cpu"))
                assert found is not None and found.dtype == dtype and torch.equal(found, tensor)
                found.zero_()  # a copy
                again = store.get(key, torch.device("cpu"))
                assert again is not None and torch.equal(again, tensor)
            store.clear()
            assert len(store) == 0 and store.get(b"\0", torch.device("cpu")) is None


def test_a_store_takes_half_of_the_disk_and_outlives_a_failing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = torch.randn(100)
    free = [1000]
    monkeypatch.setattr(state_store, "free_space", lambda _: free[0])
    with StateStore(tmp_path, 0) as store:
        for key, left in ((b"a", 1000), (b"b", 1199), (b"c", 10**6)):
            free[0] = left
            store.put(key, one)
        # After the first, 400 bytes are held: 400 more would leave less free than they take in all.
        assert len(store) == 1 and store.get(b"a", one.device) is not None
    free[0] = 10**6
    with StateStore(tmp_path / "lost", 0) as store:
        store.put(b"a", one)
        assert len(store) == 0 and "cannot be kept" in caplog.text
