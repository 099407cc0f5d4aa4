"""A chain of artifacts as the stages leave it, for the tests of publish and push."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_models import save_dense

from moemerge.artifacts.stage import artifact
from moemerge.merging.coefficients import Coefficients
from moemerge.options.fit import Fit
from moemerge.options.merge import Merge
from moemerge.options.train import Train
from moemerge.stages.evaluate import evaluate


def make_chain(root: Path) -> dict[str, Path]:
    """train -> fit -> merge -> evaluate in `root`, by name."""
    pairs = root / "pairs.jsonl"
    rows = [{"prompt": f"w{i}", "chosen": f" w{i + 1} w3", "rejected": f" w{i + 2}"} for i in range(20)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with artifact(
        "train", Train(model="org/dense-rm", pairs=str(pairs), output=root / "train", epochs=2)
    ) as draft:
        save_dense(draft.folder)
        (draft.folder / "history.json").write_text("[]")
    with artifact("fit", Fit(model=str(root / "train"), method="uniform", output=root / "fit")) as draft:
        alpha_LN = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
        Coefficients.of_layers([0, 1], alpha_LN, torch.full((2,), 0.5, dtype=torch.float64)).save(
            draft.folder
        )
    merge = Merge(model=str(root / "train"), coefficients=str(root / "fit"), output=root / "merged")
    with artifact("merge", merge) as draft:
        save_dense(draft.folder, seed=1)
        draft.results["table"] = list(Coefficients.load(root / "fit").table())
    models = {"trained": str(root / "train"), "ours": str(root / "merged")}
    evaluate(models=models, pairs={"hh": str(pairs)}, resamples=100, output=root / "evaluation")
    return {name: root / name for name in ("train", "fit", "merged", "evaluation")}
