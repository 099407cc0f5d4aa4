"""A recipe: the settings of a whole run, a section per stage.

A stage's *settings* are what a recipe holds; its *options* add the paths that it reads and writes. Both stand
in the stage's own file beside this one.
"""

from __future__ import annotations

from pydantic import Field

from moemerge.options.base import MAX_SEED, Options, Output, Source
from moemerge.options.baselines import BaselineSettings
from moemerge.options.data import DataSettings
from moemerge.options.evaluate import EvaluateSettings
from moemerge.options.fit import FitSettings
from moemerge.options.merge import MergeSettings
from moemerge.options.optimise import OptimiseSettings
from moemerge.options.publish import PublishSettings
from moemerge.options.route import RouteSettings
from moemerge.options.sample import SampleSettings
from moemerge.options.strength import StrengthSettings
from moemerge.options.synthetic import SyntheticSettings
from moemerge.options.train import TrainSettings
from moemerge.options.upcycle import UpcycleSettings

WITH_INPUTS = (
    "data",
    "strength",
    "base",
    "train",
    "control",
    "sample",
    "evaluate",
    "optimise",
)  # sections that may name files and models


class Recipe(Options):
    """A whole run. Sections are the stages' settings; `model` and `data` may come from `synthetic`."""

    output: Output = Field(description="folder of the run; one subfolder per step")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of every stage")
    seeds: list[int] = Field(
        default_factory=list,
        description="a whole run for each of these, in place of seed, and their comparison",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    model: Source | None = Field(None, description="dense reward model, base LM or encoder")
    synthetic: SyntheticSettings | None = Field(None, description="make model and data: no input needed")
    data: DataSettings | None = Field(None, description="preference data")
    strength: StrengthSettings | None = Field(
        None, description="a vote on the training pairs' labels; all trainings then take the treated pairs"
    )
    base: TrainSettings | None = Field(None, description="train the dense reward model first")
    upcycle: UpcycleSettings = Field(default_factory=UpcycleSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    control: TrainSettings | None = Field(None, description="the dense model trained with the same budget")
    baselines: BaselineSettings = Field(default_factory=BaselineSettings)
    route: RouteSettings = Field(default_factory=RouteSettings)
    fit: FitSettings = Field(default_factory=FitSettings)
    also_merge: list[str] = Field(
        default_factory=list,
        description="other coefficient methods to merge and compare; shared_weight learned is 0.5 in these",
    )
    merge: MergeSettings = Field(default_factory=MergeSettings)
    sample: SampleSettings | None = Field(
        None, description="draw a policy's answers, which evaluate scores as candidate set sampled"
    )
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    optimise: OptimiseSettings | None = Field(
        None, description="optimise a policy against the merged model, and against the control"
    )
    publish: PublishSettings = Field(default_factory=PublishSettings)
