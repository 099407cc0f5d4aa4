"""Writing a reward model that has learned."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moemerge.artifacts.disk import flush_and_forget, flush_tree
from moemerge.artifacts.read_back import require_as_meant, tensor_digest
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, trust_remote_code: bool
) -> None:
    """Save both as an ordinary HF folder; the model is loaded again from the disk, and compared bit for bit.

    Raises ArtifactError if they differ.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flush_tree(folder)
    for path in folder.glob("*.safetensors"):
        flush_and_forget(path)
    meant = {name: tensor_digest(tensor) for name, tensor in model.state_dict().items()}
    saved = load_reward_model(ModelFolder(folder, trust_remote_code), "cpu", model.dtype)
    require_as_meant(folder, meant, saved.state_dict().items())
