"""Small MoEs with experts that differ, and preference pairs, for the tests of route, fit and merge."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import save_dense
from torch import Tensor, nn

from moemerge.data.reading import read_pairs
from moemerge.data.tokenise import EncodedPair, encode_pairs
from moemerge.fitting.objectives.base import mixture
from moemerge.fitting.pair_objective import PairObjective
from moemerge.fitting.targets import Targets
from moemerge.merging.merged_model import MergedModel, MergeGradient
from moemerge.models.loading import load_tokenizer
from moemerge.options.base import TextFormat
from moemerge.options.fit import FitSettings
from moemerge.stages.upcycle import upcycle

N, K = 3, 2
# Coefficients of three layers to merge by.
ALPHA = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
SHARED = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)


def rewrite(folder: Path, change: Callable[[str, Tensor], Tensor | None]) -> Path:
    """Replace every tensor of a one-file checkpoint by `change(name, tensor)`; None drops it."""
    path = folder / "model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})
    return folder


def make_moe(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: object
) -> Path:
    """An upcycled MoE whose shared and routed experts, router and head were all moved by large random noise.

    The dense model it came from lies beside it, in dense-NAME.
    """
    dense = save_dense(folder.parent / f"dense-{folder.name}", family)
    upcycle(model=str(dense), output=folder, num_routed_experts=N, num_experts_per_tok=K, **options)
    generator = torch.Generator().manual_seed(1)

    def noisy(name: str, tensor: Tensor) -> Tensor:
        head = name.startswith(("score", "classifier"))
        scale = 0.15 if "expert" in name else 2.0 if head or ".gate." in name else 0.0
        return (tensor + scale * torch.randn(tensor.shape, generator=generator)).to(dtype)

    if dtype != torch.float32:
        config, name = json.loads((folder / "config.json").read_text()), str(dtype).split(".")[1]
        config |= {"dtype": name, "moemerge": {**config["moemerge"], "dense_dtype": name}}
        (folder / "config.json").write_text(json.dumps(config))
    return rewrite(folder, noisy)


def random_pairs(count: int, seed: int = 0, subsets: tuple[str, ...] = ("",)) -> list[dict[str, str]]:
    """Rows with a prompt and two different answers of unlike lengths; two rows share each prompt."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(61)}" for _ in range(draw.randint(low, high)))

    rows = []
    for number in range(count):
        prompt = words(2, 5) if number % 2 == 0 else rows[-1]["prompt"]
        row = {"prompt": prompt, "chosen": f" {words(2, 9)}", "rejected": f" {words(10, 14)} w0"}
        rows.append({**row, "subset": subsets[number % len(subsets)]} if subsets != ("",) else row)
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """`rows` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def objective_of(
    merged: MergedModel, pairs: list[EncodedPair], size: int = 8, **settings: object
) -> PairObjective:
    """The objective with all pairs on both sides; `size` pairs per forward pass."""
    tokenizer, wanted = merged.source.tokenizer(), FitSettings(**settings)
    term = mixture(wanted.objectives, Targets(merged, tokenizer, pairs, wanted))
    numbers = list(range(len(pairs)))
    return PairObjective(merged, tokenizer, pairs, numbers, numbers, term, size)


def gradient_of(
    merged: MergedModel, pairs: list[EncodedPair], size: int = 8, **settings: object
) -> MergeGradient:
    """Loss and gradient over all pairs at the coefficients that `merged` has now."""
    alpha_LN, shared_L = merged.alpha_LN, merged.shared_L
    return objective_of(merged, pairs, size, **settings).gradient(alpha_LN, shared_L, range(len(pairs)))


def encode(moe: Path, rows: list[dict[str, str]], folder: Path) -> list[EncodedPair]:
    pairs, report = read_pairs(str(write_rows(folder / "rows.jsonl", rows)), TextFormat())
    return encode_pairs(load_tokenizer(str(moe)), pairs, TextFormat(), report)


def widen_norms(model: nn.Module) -> None:
    """RMSNorm in float64: transformers' runs in float32 whatever it is given, too coarse for differences."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                wide = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                wide.weight = child.weight
                setattr(parent, name, wide)


def stock_merge(config: Path, output: Path) -> Path:
    """mergekit's own merge of a YAML file, in this process, started in the file's folder."""
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge

    # mergekit keeps what it knows of models by path, and a relative path is another model elsewhere.
    LoaderCache.loaders.clear()
    infer_architecture_info.cache_clear()
    text = config.read_text()
    before = Path.cwd()
    os.chdir(config.parent)
    try:
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(text)),
            str(output),
            MergeOptions(),
            config_source=text,
        )
    finally:
        os.chdir(before)
    return output
