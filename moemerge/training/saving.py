"""Writing a reward model that has learned; one in parts is put together weight by weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.artifacts.disk import flush_and_forget, flush_tree
from moemerge.artifacts.ranks import leads
from moemerge.artifacts.read_back import require_as_meant, tensor_digest
from moemerge.models import processes
from moemerge.models.checkpoint import write_checkpoint
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model, without_weights
from moemerge.models.portable import make_portable, name_label
from moemerge.options.train import Train
from moemerge.training.bench import Bench
from moemerge.training.parts import load_trained
from moemerge.training.trials import finished, prepare, require_finite

SHARD = 5_000_000_000  # bytes


def write_finished(bench: Bench, options: Train, home: Path, step: int, folder: Path) -> None:
    """Write the model with the weights of `step` (0: its own) of the trial in `home`, read back bit for bit.

    All processes come here together, and the first one writes.
    """
    if options.sharded:
        _write_gathered(bench, options, home, step, folder)
    elif leads():
        model = finished(bench, options, home, step)
        save_model(model, bench.tokenizer, folder, options.trust_remote_code)


def _write_gathered(bench: Bench, options: Train, home: Path, step: int, folder: Path) -> None:
    """Each weight is put together in all processes, written by the first one, and forgotten."""
    model, roles = prepare(bench, options, bench.device, sharded=True)
    if step:
        load_trained(model, home / f"checkpoint-{step}")
    require_finite(model, roles)
    if leads():
        write_checkpoint(folder, _gathered(model), SHARD)
        _write_beside(model, folder, options.trust_remote_code)
        bench.tokenizer.save_pretrained(folder)
        make_portable(folder)
    else:
        for _ in _gathered(model):
            pass
    processes.wait()  # until it is read back


def _write_beside(model: PreTrainedModel, folder: Path, trust_remote_code: bool) -> None:
    """Write what lies beside the weights, by a model that has none: one in parts would put all together."""
    empty = without_weights(model.config, trust_remote_code, model.dtype)
    empty.config.distributed_config = None
    name_label(empty.config)
    empty.save_pretrained(folder, state_dict={})


@torch.no_grad()
def _gathered(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.state_dict().items():
        yield name, processes.whole(weight).cpu()


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, trust_remote_code: bool
) -> None:
    """Save both as an ordinary HF folder; the model is loaded again from the disk, and compared bit for bit.

    Raises ArtifactError if they differ.
    """
    name_label(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_portable(folder)
    flush_tree(folder)
    for path in folder.glob("*.safetensors"):
        flush_and_forget(path)
    meant = {name: tensor_digest(tensor) for name, tensor in model.state_dict().items()}
    saved = load_reward_model(ModelFolder(folder, trust_remote_code), "cpu", model.dtype)
    require_as_meant(folder, meant, saved.state_dict().items())
