"""A MoE several times larger than the memory that fit may have. Linux only; a minute, 3 GB of disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_moe import random_pairs, write_rows
from tiny_models import save_dense

from moemerge.merging.coefficients import Coefficients
from moemerge.stages.upcycle import upcycle

ROOT = Path(__file__).parent.parent.parent
# ulimit -d: anonymous memory and private mappings; what the libraries have taken when imported comes on top.
LIMITED = """
import resource, sys
import moemerge
from moemerge import fit, load_moe
from moemerge.stages.fit import MergedModel
import torch, scipy.optimize, transformers.models.llama.modeling_llama
import matplotlib.figure, matplotlib.backends.backend_agg
torch.set_num_threads(1)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + 450 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print("limit", limit)
if sys.argv[1] == "load":
    load_moe(sys.argv[2])
else:
    fit(model=sys.argv[2], pairs=sys.argv[3], output=sys.argv[4], initial="uniform", max_epochs=2, level=1.0,
        threads=1, sensitivity=False)
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of this kind are Linux's")
def test_a_moe_several_times_larger_than_the_memory_limit_is_fitted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 30, "num_attention_heads": 4}
    dense = save_dense(tmp_path / "dense", **sizes, head_dim=32)
    moe = upcycle(
        model=str(dense), output=tmp_path / "moe", num_routed_experts=128, num_experts_per_tok=2,
        expert_noise=0.5, shard_size=60_000_000,
    )  # fmt: skip
    size = sum(path.stat().st_size for path in moe.glob("*.safetensors"))
    pairs = write_rows(tmp_path / "pairs.jsonl", random_pairs(24))
    done = run("fit", moe, pairs, tmp_path / "fit")
    assert done.returncode == 0, done.stderr[-3000:]
    limit = int(done.stdout.split("limit ")[1].split()[0])
    assert size > 3 * limit, f"MoE of {size} bytes, limit {limit}"
    assert Coefficients.load(tmp_path / "fit").alpha_LN.shape == (30, 128)
    assert run("load", moe).returncode != 0, "the limit is one: the MoE itself cannot be loaded"
