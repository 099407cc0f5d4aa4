"""Every option of every stage, declared once: recipes, flags, help and checks follow from here.

A stage's *settings* are what a recipe holds; its *options* add the paths that it reads and writes.
This file imports nothing heavy: `moemerge --help` and `moemerge check` depend on that.
"""

from __future__ import annotations

from pydantic import Field

from moemerge.options.attack import Attack as Attack
from moemerge.options.attack import AttackSettings as AttackSettings
from moemerge.options.base import MAX_SEED, Options, Output, Source
from moemerge.options.compare import BaselineSettings as BaselineSettings
from moemerge.options.compare import Compare as Compare
from moemerge.options.data import Data as Data
from moemerge.options.data import DataSettings as DataSettings
from moemerge.options.data import Synthetic as Synthetic
from moemerge.options.data import SyntheticSettings as SyntheticSettings
from moemerge.options.evaluate import Evaluate as Evaluate
from moemerge.options.evaluate import EvaluateSettings as EvaluateSettings
from moemerge.options.fit import Fit as Fit
from moemerge.options.fit import FitSettings as FitSettings
from moemerge.options.merge import Export as Export
from moemerge.options.merge import Merge as Merge
from moemerge.options.merge import MergeSettings as MergeSettings
from moemerge.options.policy import Optimise as Optimise
from moemerge.options.policy import OptimiseSettings as OptimiseSettings
from moemerge.options.policy import Sample as Sample
from moemerge.options.policy import SampleSettings
from moemerge.options.publish import Publish as Publish
from moemerge.options.publish import PublishSettings as PublishSettings
from moemerge.options.route import Route as Route
from moemerge.options.route import RouteSettings as RouteSettings
from moemerge.options.train import STEERING as STEERING
from moemerge.options.train import Train as Train
from moemerge.options.train import TrainSettings as TrainSettings
from moemerge.options.upcycle import Upcycle as Upcycle
from moemerge.options.upcycle import UpcycleSettings as UpcycleSettings


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
