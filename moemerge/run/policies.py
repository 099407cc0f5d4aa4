"""What a recipe's `sample` and `optimise` add to its run: candidates from a policy, policy gradients."""

from __future__ import annotations

from collections.abc import Iterator

from moemerge.errors import MoemergeError, OptionError
from moemerge.options.data import DataSettings
from moemerge.options.recipe import Recipe
from moemerge.run.baselines import dense_rival

SAMPLED = "sampled"  # the candidate set that `sample` draws


def optimised(recipe: Recipe) -> tuple[str, str]:
    """The models that a policy is optimised against: the dense rival, and the recipe's merge."""
    return dense_rival(recipe), f"merge-{recipe.fit.method}"


def faults(recipe: Recipe) -> Iterator[MoemergeError]:
    """Answers without gold scores or room, and a candidate set that has the sampled one's name."""
    data = recipe.data or DataSettings()
    if recipe.sample and not (recipe.sample.has_gold or recipe.evaluate.has_gold):
        yield OptionError(
            "sampled answers have no gold scores",
            given="sample, without gold_model and gold_function in it or in evaluate",
            expected="one that grades them",
            fix="set sample.gold_model or sample.gold_function",
        )
    if recipe.sample and SAMPLED in data.candidates:
        yield OptionError(
            f"two candidate sets are called {SAMPLED}",
            given=f"data.candidates.{SAMPLED}, and sample",
            expected="another name",
            fix=f"rename data.candidates.{SAMPLED}",
        )
    for name, section in {"sample": recipe.sample, "optimise": recipe.optimise}.items():
        if section and section.max_new_tokens >= data.max_length:
            yield OptionError(
                f"{name} leaves no room for a prompt",
                given=f"{name}.max_new_tokens {section.max_new_tokens}, data.max_length {data.max_length}",
                expected="answers that are shorter than max_length",
                fix=f"lower {name}.max_new_tokens, or raise data.max_length",
            )
