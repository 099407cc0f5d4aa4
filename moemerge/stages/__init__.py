"""The stages, a row each, in pipeline order: commands, flags, the Python door and headlines follow from here.

To add one: its file beside this one, its options in options/, a row, and a line in moemerge/__init__.py
(docs/extending.md). Importing this loads no stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from moemerge.registry import Registry
from moemerge.reports import headlines

if TYPE_CHECKING:
    from moemerge.artifacts.stage import Stage
    from moemerge.options.base import Run


class Row(NamedTuple):
    """What is known of a stage before it is imported.

    name: in manifests, recipes and on the command line; function, options: "module:name" of the stage and of
    its option class; summary: the command's help; headline: from a manifest's results to one line.
    """

    name: str
    function: str
    options: str
    summary: str
    headline: Callable[[Mapping[str, Any]], str]

    @property
    def command(self) -> str:
        """What it is called on the command line."""
        return self.name.replace("_", "-")


ROWS = (
    Row(
        "synthetic",
        "moemerge.stages.synthetic:write_world",
        "moemerge.options.synthetic:Synthetic",
        "Make preference data with a known gold reward.",
        headlines.sizes,
    ),
    Row(
        "data",
        "moemerge.stages.data:prepare",
        "moemerge.options.data:Data",
        "Read, check and split preference data.",
        headlines.sizes,
    ),
    Row(
        "strength",
        "moemerge.stages.strength:strength",
        "moemerge.options.strength:Strength",
        "Measure which labels of preference pairs are doubtful, by a vote of models, and treat them.",
        "{sentence}".format_map,
    ),
    Row(
        "upcycle",
        "moemerge.stages.upcycle:upcycle",
        "moemerge.options.upcycle:Upcycle",
        "Turn a dense reward model into a mixture of experts.",
        headlines.upcycle,
    ),
    Row(
        "train",
        "moemerge.stages.train:train",
        "moemerge.options.train:Train",
        "Train a reward model on preference pairs.",
        headlines.train,
    ),
    Row(
        "route",
        "moemerge.stages.route:route",
        "moemerge.options.route:Route",
        "Count which experts a MoE uses.",
        headlines.route,
    ),
    Row(
        "calibrate",
        "moemerge.stages.calibrate:calibrate",
        "moemerge.options.calibrate:Calibrate",
        "Measure the scale of reward models' scores, to merge the models on one scale.",
        headlines.calibrate,
    ),
    Row(
        "changes",
        "moemerge.stages.changes:changes",
        "moemerge.options.changes:ChangesOptions",
        "Measure how far models' changes from their base agree.",
        headlines.changes,
    ),
    Row(
        "fit",
        "moemerge.stages.fit:fit",
        "moemerge.options.fit:Fit",
        "Find merge coefficients.",
        "{verdict}".format_map,
    ),
    Row(
        "gate",
        "moemerge.stages.gate:gate",
        "moemerge.options.gate:Gate",
        "Fit a MoE's routers: which expert suits which prompt.",
        "{sentence}".format_map,
    ),
    Row(
        "merge",
        "moemerge.stages.merge:merge",
        "moemerge.options.merge:Merge",
        "Merge a MoE, or several models, into one dense reward model.",
        "read-back check passed; largest rounding error {largest_difference:.1e}".format_map,
    ),
    Row(
        "export",
        "moemerge.stages.export:export",
        "moemerge.options.export:Export",
        "Write a model for other tools: experts as dense models, a MoE as Qwen2-MoE, a head as a linear one.",
        headlines.export,
    ),
    Row(
        "sample",
        "moemerge.stages.sample:sample",
        "moemerge.options.sample:Sample",
        "Sample a policy: candidate answers for evaluate.",
        "{answers} answers to {prompts} prompts".format_map,
    ),
    Row(
        "optimise",
        "moemerge.stages.optimise:optimise",
        "moemerge.options.optimise:Optimise",
        "Optimise a policy against reward models; gold and proxy reward over steps.",
        headlines.optimise,
    ),
    Row(
        "evaluate",
        "moemerge.stages.evaluate:evaluate",
        "moemerge.options.evaluate:Evaluate",
        "Compare reward models.",
        headlines.evaluate,
    ),
    Row(
        "few_shot",
        "moemerge.stages.few_shot:few_shot",
        "moemerge.options.few_shot:FewShot",
        "Make a scorer from a language model and a few preference pairs, and compare it with a linear probe.",
        "{sentence}".format_map,
    ),
    Row(
        "explain",
        "moemerge.stages.explain:explain",
        "moemerge.options.explain:Explain",
        "Show what each token adds to a score, which phrases raise it, how early pairs are decided.",
        "{sentence}".format_map,
    ),
    Row(
        "choose",
        "moemerge.stages.choose:choose",
        "moemerge.options.choose:Choose",
        "Choose one of several models by their evaluations: a simpler one, unless a costlier one is better.",
        "{sentence}".format_map,
    ),
    Row(
        "attack",
        "moemerge.stages.attack:attack",
        "moemerge.options.attack:Attack",
        "Search for edited answers that a reward model overrates; write them as training pairs.",
        headlines.attack,
    ),
    Row(
        "robustness",
        "moemerge.stages.robustness:robustness",
        "moemerge.options.robustness:Robustness",
        "Compare attacks on several models: robust accuracy, and what was overturned.",
        "{sentence}".format_map,
    ),
    Row(
        "publish",
        "moemerge.stages.publish:publish",
        "moemerge.options.publish:Publish",
        "Write the model card; push to the hub.",
        headlines.publish,
    ),
    Row(
        "compare",
        "moemerge.stages.compare:compare",
        "moemerge.options.compare:Compare",
        "Compare runs over seeds: means, paired differences, cost.",
        "{models} models, {seeds} seeds".format_map,
    ),
)

STAGES: Registry[Stage] = Registry("stage", {row.name: row.function for row in ROWS})
OPTIONS: Registry[type[Run]] = Registry("stage", {row.name: row.options for row in ROWS})
