"""What is wrong with the rows that a run reads, found before it trains on them."""

from __future__ import annotations

from collections.abc import Iterable

from moemerge.data.pairs import prompt_key
from moemerge.errors import DataError
from moemerge.fitting.methods import FINDS_SHARED
from moemerge.options.data import Data
from moemerge.options.fit import Fit
from moemerge.run.steps import Step
from moemerge.stages.data import read_parts


def check_rows(data: Data, steps: Iterable[Step]) -> None:
    """Read and split the pairs as the step data will, and see that coefficients can be fitted to their part.

    Raises DataError and OptionError as that step does, and DataError for too few prompts to hold some out.
    """
    prompts = {
        str(data.output / f"{name}.jsonl.gz"): len({prompt_key(pair) for pair in pairs})
        for name, pairs in read_parts(data).items()
    }
    for step in steps:
        fit = step.options
        if isinstance(fit, Fit) and fit.method in FINDS_SHARED and fit.validation is None:
            found, least = prompts.get(str(fit.pairs)), max(2, fit.folds)
            if found is not None and found < least:
                raise _too_few(step.name, found, least, data)


def _too_few(step: str, found: int, least: int, data: Data) -> DataError:
    several = f", or lower fit.folds to {found}" if found > 1 else ""
    return DataError(
        f"{step}: no pairs can be held out",
        given=f"data.{'fit' if data.fit else 'validation'}: pairs of {found} prompt{'s' * (found > 1)}",
        expected=f"pairs of {least} prompts at least, as no prompt is on both sides",
        fix=f"{_more(data)}{several}",
    )


def _more(data: Data) -> str:
    """How the part that coefficients are fitted to comes to more prompts."""
    if data.fit or data.validation:
        return "give pairs of more prompts there"
    return "raise data.validation_share, or name a file of pairs to fit to: data.fit"
