"""Stage calibrate: how loud each reward model is, so that several can be merged or summed on one scale.

Shapes: P pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch

from moemerge.artifacts.manifest import model_fingerprint
from moemerge.artifacts.ranks import led
from moemerge.artifacts.stage import Draft, stage
from moemerge.data.draw import first
from moemerge.data.pairs import Pair, numbered, prompt_key
from moemerge.data.reading import read_pairs
from moemerge.data.rows import RowReport
from moemerge.data.tokenise import EncodedPair, encode_pairs
from moemerge.errors import DataError
from moemerge.merging.calibration import Calibration, Scale, spread
from moemerge.models.device import free_memory, use_device
from moemerge.models.folder import ModelFolder
from moemerge.models.loading import load_reward_model, load_tokenizer
from moemerge.models.scoring import score_pairs
from moemerge.options.calibrate import Calibrate
from moemerge.reports.statistics import Floats
from moemerge.reports.table import Table, percent

log = logging.getLogger(__name__)


@stage("calibrate", Calibrate, shares_work=True)
def calibrate(options: Calibrate, draft: Draft) -> None:
    """Write each model's scale, with an interval: calibration.json, for merge and fit, and calibration.md.

    A scale is the median difference, whatever its sign, of the scores of two answers to one prompt, over
    0.6745: their standard deviation where they are normal. Labels are not used. One model is in memory at a
    time. Raises DataError for unusable pairs and for a model that gives most answers the same score.
    """
    device = use_device(options)
    pairs, report = read_pairs(options.pairs, options)
    # Each tokenizer leaves out rows of its own.
    wanted = first(pairs, options.max_pairs, report)
    reports = {name: deepcopy(report) for name in options.models}
    scales = {
        name: _scale(options, name, path, wanted, reports[name], device)
        for name, path in options.models.items()
    }
    calibration = Calibration(scales)
    calibration.save(draft.folder)
    text = "\n".join(["# Scales of reward models\n", _table(calibration, options.confidence).markdown()])
    (draft.folder / "calibration.md").write_text(text, encoding="utf-8")
    draft.results["scales"] = {name: scale.scale for name, scale in scales.items()}
    draft.results["rows"] = {name: rows.told() for name, rows in reports.items()}


def _scale(
    options: Calibrate, name: str, path: str, pairs: Sequence[Pair], report: RowReport, device: torch.device
) -> Scale:
    """One model's scale on the pairs that its tokenizer can take."""
    folder = ModelFolder(path)
    folder.require_one_output()
    tokenizer = load_tokenizer(folder)
    encoded = encode_pairs(tokenizer, pairs, options, report)
    model = load_reward_model(folder, device, placement=options)
    scores_P2 = score_pairs(model, tokenizer, encoded, options.batch_tokens, name).double().numpy()
    del model
    free_memory()
    low_high = _spread(options, name, scores_P2[:, 0] - scores_P2[:, 1], encoded)
    scale, low, high = map(float, low_high)
    fingerprint = led(lambda: model_fingerprint(folder.folder))
    return Scale(path, fingerprint, scale, low, high, len(encoded))


def _spread(options: Calibrate, name: str, differences_P: Floats, encoded: list[EncodedPair]) -> Floats:
    prompts_P = np.array(numbered(prompt_key(pair.pair) for pair in encoded))
    try:
        return spread(differences_P, prompts_P, options.resamples, options.confidence, options.seed)
    except DataError as error:
        parts = {"given": error.given, "expected": error.expected, "fix": error.fix}
        raise DataError(f"{name}: {error.what}", **parts) from None


def _table(calibration: Calibration, confidence: float) -> Table:
    rows = [
        [name, f"{scale.scale:.4g}", f"{scale.low:.4g} to {scale.high:.4g}", str(scale.pairs)]
        for name, scale in calibration.models.items()
    ]
    note = "scale: median of |score difference| of two answers to one prompt, over 0.6745."
    return Table("Scales", ["model", "scale", f"{percent(confidence)} interval", "pairs"], rows, note)
