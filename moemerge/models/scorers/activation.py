"""Activation reward models (arXiv 2507.01368): a language model some of whose attention heads are replaced.

What is read is its verdict; or, as a probe, the heads themselves are read.

B texts, L layers, H heads, E numbers of a head, S heads in play.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moemerge.artifacts.manifest import model_fingerprint
from moemerge.data.tokenise import Encoded
from moemerge.errors import CheckpointError
from moemerge.models.attention_heads import AttentionHeads
from moemerge.models.language_model import LanguageModel
from moemerge.models.scorers.base import refuse_parts
from moemerge.models.scorers.verdicts import LoadedVerdicts, VerdictScorer
from moemerge.models.scoring import batches
from moemerge.options.placement import WHOLE, Placement
from moemerge.options.scorers import Activation, Question


class ActivationScorer(VerdictScorer[Activation]):
    """What few_shot wrote, opened; see options.scorers.Activation."""

    def load(self, device: torch.device, placement: Placement = WHOLE) -> LoadedActivation:
        """Raises as load_language_model, CheckpointError for another model or heads that it lacks."""
        refuse_parts(self.source, placement)
        known = self.options.fingerprint
        if known is not None and model_fingerprint(self._folder.folder) != known:
            raise CheckpointError(
                f"{self.source} was made for another language model",
                given=f"{self._folder.source}, whose weights or config are not those of then",
                expected="the model that few_shot was given",
                fix="set model in its scorer.json to where that model lies, or run few_shot again",
            )
        model = LanguageModel(self._folder, device)
        heads = AttentionHeads(model.trunk)
        mask_LH, values_LHE = read_heads(Path(self.options.heads), heads.shape)
        projects = self.options.read == "projection"
        return LoadedActivation(
            model, heads, self.reader().verdicts, self.options, mask_LH, values_LHE, projects
        )


class LoadedActivation(LoadedVerdicts):
    """An activation scorer in memory. mask_LH: the heads in play; projects: whether these are read.

    Its scores are log-odds with heads replaced, or the heads' projection.
    """

    kind = "activation"

    def __init__(
        self,
        model: LanguageModel,
        heads: AttentionHeads,
        verdicts: Sequence[int],
        question: Question,
        mask_LH: Tensor,
        values_LHE: Tensor,
        projects: bool = False,
    ) -> None:
        super().__init__(model, verdicts, question)
        self._heads, self._projects, device = heads, projects, model.trunk.device
        self._mask_LH, self._values_LHE = mask_LH.to(device), values_LHE.to(device)

    def _of_batch(self, texts: Sequence[Encoded]) -> Tensor:
        if self._projects:
            return self._projection(texts)
        masks_BLH = self._mask_LH.expand(len(texts), *self._mask_LH.shape)
        with self._heads.replacing(self._model.ends(texts), self._values_LHE, masks_BLH):
            return super()._of_batch(texts)

    def _projection(self, texts: Sequence[Encoded]) -> Tensor:
        read_BLHE = _read(self._model, self._heads, texts).double()
        direction_LHE = (self._values_LHE * self._mask_LH[..., None]).cpu().double()
        return self._weight * (read_BLHE * direction_LHE).sum((1, 2, 3))


def activations(
    model: LanguageModel, heads: AttentionHeads, texts: Sequence[Encoded], batch_tokens: int
) -> Tensor:
    """What each head gives at the last token of each text, [len(texts), L, H, E] float32 on the CPU."""
    found = torch.zeros(len(texts), *heads.shape)
    for rows in batches([len(text.ids) for text in texts], batch_tokens):
        found[rows] = _read(model, heads, [texts[row] for row in rows])
    return found


@torch.inference_mode()
def _read(model: LanguageModel, heads: AttentionHeads, texts: Sequence[Encoded]) -> Tensor:
    with heads.reading(model.ends(texts)) as read:
        model.states(texts)
    return torch.stack(read, dim=1)


def write_heads(path: Path, mask_LH: Tensor, values_LHE: Tensor) -> None:
    """The places of the heads in play, [S, 2], layer and head, and the numbers of each, [S, E]."""
    places_S2 = mask_LH.nonzero().contiguous()
    values_SE = values_LHE[mask_LH].float().contiguous()
    save_file({"places": places_S2, "values": values_SE}, path, {"format": "moemerge-heads-1"})


def read_heads(path: Path, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """What write_heads wrote, for a model of L, H, E: mask_LH and values_LHE, 0 for the other heads.

    Raises CheckpointError for anything else; nothing is read that is larger than all heads of the model.
    """
    layers, heads, size = shape
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            count = shapes.get("places", (0,))[0]
            if shapes != {"places": (count, 2), "values": (count, size)} or count > layers * heads:
                raise ValueError(f"tensors {shapes}, for a model of {layers} layers, {heads} heads of {size}")
            places_S2, values_SE = file.get_tensor("places"), file.get_tensor("values")
        mask_LH, values_LHE = torch.zeros(layers, heads, dtype=torch.bool), torch.zeros(shape)
        ends_2 = torch.tensor([layers, heads])
        if places_S2.dtype != torch.long or not ((places_S2 >= 0) & (places_S2 < ends_2)).all():
            raise ValueError(f"places that a model of {layers} layers of {heads} heads lacks")
        if values_SE.dtype != torch.float32 or not values_SE.isfinite().all():
            raise ValueError("values that are no finite float32 numbers")
        mask_LH[places_S2[:, 0], places_S2[:, 1]] = True
        if int(mask_LH.sum()) != count:
            raise ValueError("a place that is there twice")
    except (OSError, SafetensorError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"the heads of an activation scorer cannot be read: {path}",
            given=f"{error}"[:300],
            expected="a file that few_shot wrote for this language model",
            fix="run few_shot again",
        ) from error
    values_LHE[places_S2[:, 0], places_S2[:, 1]] = values_SE
    return mask_LH, values_LHE
