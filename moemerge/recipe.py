"""Every option of every stage, declared once: recipes, flags, help and checks follow from here.

A stage's *settings* are what a recipe holds; its *options* add the paths that it reads and writes.
This file imports nothing heavy: `moemerge --help` and `moemerge check` depend on that.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from moemerge.attack_settings import AttackSettings as AttackSettings
from moemerge.comparison_settings import BaselineSettings as BaselineSettings
from moemerge.comparison_settings import Compare as Compare
from moemerge.data_settings import Data as Data
from moemerge.data_settings import DataSettings as DataSettings
from moemerge.data_settings import Synthetic as Synthetic
from moemerge.data_settings import SyntheticSettings as SyntheticSettings
from moemerge.evaluate_settings import EvaluateSettings as EvaluateSettings
from moemerge.fit_settings import FitSettings as FitSettings
from moemerge.options import (
    MAX_SEED,
    OURS,
    Layers,
    Members,
    Options,
    Output,
    Run,
    Source,
    Sources,
    TextFormat,
)
from moemerge.policy_settings import Optimise as Optimise
from moemerge.policy_settings import OptimiseSettings as OptimiseSettings
from moemerge.policy_settings import Sample as Sample
from moemerge.policy_settings import SampleSettings

STEERING = ("shared_dropout", "router_temperature", "top1_warmup", "assign")


class UpcycleSettings(Options):
    """dense reward model -> mixture of experts that computes the same function."""

    num_routed_experts: int = Field(7, ge=2, description="routed experts per layer (N)")
    num_experts_per_tok: int = Field(5, ge=1, description="routed experts per token (K)")
    shared_expert: bool = Field(True, description="keep one expert that sees every token")
    layers: Layers = Field("all", description="which layers: all, first:4, last:4, or 0,2,5-7")
    gate: Literal["xft", "topk", "prompt"] = Field(
        "xft",
        description="xft: normalised, shared 1 - max s; topk: renormalised; prompt: one gate per prompt",
    )
    gate_shared_weight: float = Field(0.5, ge=0, lt=1, description="shared expert's weight under gate topk")
    router: Literal["linear", "mlp"] = Field("linear", description="router network")
    router_init: Literal["normal", "zero"] = Field(
        "normal",
        description="router's last layer at the start; zero always picks the first K experts at first",
    )
    router_init_std: float = Field(0.02, gt=0, description="standard deviation of router_init: normal")
    expert_noise: float = Field(
        0.0, ge=0, description="noise on the copies, in units of each matrix's standard deviation"
    )
    balance_coefficient: float = Field(
        0.01, ge=0, description="weight of the balance loss, kept in the config"
    )
    balance_loss: Literal["cv", "switch"] = Field("cv", description="cv: cv^2 of importance and load; switch")
    shard_size: int = Field(5_000_000_000, ge=1, description="largest shard in bytes")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    @model_validator(mode="after")
    def _experts_fit(self) -> UpcycleSettings:
        if self.num_experts_per_tok > self.num_routed_experts:
            raise ValueError("num_experts_per_tok is larger than num_routed_experts")
        return self


class Upcycle(UpcycleSettings, Run):
    """Options of `moemerge upcycle`."""

    model: Source = Field(description="dense reward model, base LM or encoder: folder or hub name")


class TrainSettings(Options):
    """Bradley-Terry training on preference pairs with TRL's RewardTrainer."""

    epochs: float = Field(1.0, gt=0, description="passes over the training pairs")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    batch_size: int = Field(8, ge=1, description="pairs per device and step")
    gradient_accumulation: int = Field(1, ge=1, description="steps summed into one update")
    learning_rate: float = Field(1e-5, gt=0, description="of everything that has no rate of its own")
    expert_learning_rate: float | None = Field(
        None,
        gt=0,
        description="of routed and shared experts, or of a dense model's MLPs (default: learning_rate)",
    )
    router_learning_rate: float | None = Field(None, gt=0, description="of routers (default: learning_rate)")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of steps with rising learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="learning rate after warm-up"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    trainable: Literal["full", "experts", "lora"] = Field(
        "full", description="full; experts: experts, routers and head; lora: those plus LoRA on attention"
    )
    train_layers: Layers = Field("all", description="transformer layers that train; the head always does")
    lora_rank: int = Field(16, ge=1, description="rank of LoRA on attention")
    lora_alpha: float = Field(32.0, gt=0, description="scale of LoRA on attention")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on a GPU, float32 on CPU"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
    group_by_length: bool = Field(
        False, description="batches of similar length: faster where lengths vary, but a less random order"
    )
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations (default: ten per run)")
    patience: int | None = Field(
        3, ge=1, description="evaluations without progress before stopping; none: never"
    )
    choose_by: Literal["loss", "accuracy"] = Field(
        "loss",
        description="what chooses steps and trials on validation pairs; loss minds how sure the scores are, "
        "accuracy only their order (and takes the first of equals)",
    )
    shared_dropout: float = Field(
        0.0, ge=0, lt=1, description="chance that a pair is scored without the shared expert, in all layers"
    )
    router_temperature: float = Field(
        1.0, gt=0, description="divides the router's logits at the first step, then falls or rises to 1"
    )
    temperature_share: float = Field(
        0.5, gt=0, le=1, description="share of steps after which the router's temperature is 1"
    )
    top1_warmup: float = Field(
        0.0, ge=0, le=1, description="share of steps with one routed expert per token, at the start"
    )
    assign: Literal["router", "subset", "shards"] = Field(
        "router",
        description="who picks a pair's routed expert at the start: its router, subset, or random shard",
    )
    assign_share: float = Field(0.5, gt=0, le=1, description="share of steps with experts by subset or shard")
    assign_order: list[str] = Field(
        default_factory=list,
        description="subsets of expert 0, 1, ..., and round again (default: all, by name)",
    )
    search: dict[str, list[float]] = Field(
        default_factory=dict,
        description="values to try per option, e.g. learning_rate: [1e-5, 3e-5]; choose_by chooses",
    )

    @model_validator(mode="after")
    def _search_known(self) -> TrainSettings:
        allowed = {"learning_rate", "expert_learning_rate", "router_learning_rate", "epochs", "weight_decay"}
        unknown = set(self.search) - allowed
        if unknown:
            raise ValueError(f"search takes {', '.join(sorted(allowed))}; not {', '.join(sorted(unknown))}")
        return self

    @model_validator(mode="after")
    def _order_of_subsets(self) -> TrainSettings:
        if self.assign_order and self.assign != "subset":
            raise ValueError("assign_order needs assign: subset")
        if len(set(self.assign_order)) < len(self.assign_order):
            raise ValueError("assign_order names a subset twice")
        return self

    def steered(self) -> list[str]:
        """Names of the options set here that only a MoE can follow."""
        defaults = {name: type(self).model_fields[name].default for name in STEERING}
        return [name for name, default in defaults.items() if getattr(self, name) != default]


class Train(TrainSettings, TextFormat, Run):
    """Options of `moemerge train`."""

    model: Source = Field(
        description="MoE or dense reward model, or a base model (fresh head): folder or hub name"
    )
    pairs: Source = Field(description="training pairs")
    validation: Source | None = Field(None, description="held-out pairs for early stopping and search")
    flops_of: Source | None = Field(
        None, description="train longer: as many FLOPs as these options are with this model, such as a MoE"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class RouteSettings(Options):
    """Routing statistics of a MoE over preference pairs."""

    max_pairs: int | None = Field(None, ge=1, description="use the first so many pairs")
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass")
    diversity: Literal["none", "weights", "all"] = Field(
        "none",
        description="how experts differ; weights: their updates; all: also verdicts, loss barriers and "
        "speculative experts (with 7 experts 100 passes over probe_pairs)",
    )
    probe_pairs: int = Field(200, ge=8, description="with diversity all: use the first so many pairs")


class Route(RouteSettings, TextFormat, Run):
    """Options of `moemerge route`."""

    model: Source = Field(description="MoE folder")
    pairs: Source = Field(description="preference pairs")


class Fit(FitSettings, Members, TextFormat, Run):
    """Options of `moemerge fit`."""

    routing: Source | None = Field(None, description="folder written by route; needed by usage and match")
    pairs: Source | None = Field(None, description="fitting pairs; needed by all that looks at data")
    validation: Source | None = Field(
        None, description="held-out pairs (default: a share of the fitting pairs)"
    )
    start: Source | None = Field(
        None, description="coefficients of the same members to start from, in place of initial"
    )
    candidates: Source | None = Field(
        None, description="robust_rounds: scored candidates, whose overrated answers become pairs"
    )

    @model_validator(mode="after")
    def _inputs_fit(self) -> Fit:
        if self.start and self.initial != "auto":
            raise ValueError("start and initial say two things: give one of them")
        if self.folds and self.validation:
            raise ValueError("folds go over the fitting pairs: give no validation")
        if self.candidates and not self.robust_rounds:
            raise ValueError("candidates need robust_rounds")
        return self


class MergeSettings(Options):
    """MoE or models + coefficients -> dense reward model of the original architecture."""

    method: str = Field(OURS, description="ours, or a method of mergekit: linear, ties, karcher, ...")
    parameters: dict[str, float | bool | str] = Field(
        default_factory=dict, description="of a method of mergekit, e.g. density=0.5, for all experts"
    )
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = Field(
        "keep", description="dtype of the result; keep: that of the dense model"
    )
    shard_size: int = Field(5_000_000_000, ge=1, description="largest shard in bytes")

    @model_validator(mode="after")
    def _parameters_have_a_method(self) -> MergeSettings:
        if self.method == OURS and self.parameters:
            raise ValueError("routing_normalized_average takes coefficients, no parameters")
        return self


class Merge(MergeSettings, Members, Run):
    """Options of `moemerge merge`."""

    coefficients: Source | None = Field(
        None, description="folder written by fit; a method of mergekit takes them as its weight"
    )
    weights: list[float] = Field(
        default_factory=list,
        description="with models: a weight for each, the base first if there is one; no coefficients then; "
        "their sum does not matter (default: equal)",
    )

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> Merge:
        if self.model and self.method == OURS and self.coefficients is None:
            raise ValueError("routing_normalized_average needs coefficients, the folder written by fit")
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> Merge:
        if self.weights and (self.model or self.coefficients):
            raise ValueError("weights go with models, in place of coefficients")
        if self.weights and len(self.weights) != len(self.models) + bool(self.base):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.models) + bool(self.base)} models")
        if self.weights and (min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf):
            raise ValueError("weights must be finite, none below zero and one above")
        return self


class Export(Members, Run):
    """Options of `moemerge export`."""

    form: Literal["dense", "qwen2_moe"] = Field(
        "dense", description="dense: each member by itself; qwen2_moe: a MoE as stock transformers knows it"
    )
    coefficients: Source | None = Field(
        None, description="folder written by fit: also writes linear.yml, the merge for stock mergekit"
    )
    shard_size: int = Field(5_000_000_000, ge=1, description="largest shard in bytes")

    @model_validator(mode="after")
    def _form_fits(self) -> Export:
        if self.form != "dense" and (self.models or self.coefficients):
            raise ValueError(f"form {self.form} goes with a MoE as model, and without coefficients")
        return self


class Evaluate(EvaluateSettings, TextFormat, Run):
    """Options of `moemerge evaluate`."""

    models: Sources = Field(description="folders or hub names; without name= each gets its own")
    data: Sources = Field(
        default_factory=dict,
        description="files or hub name:split; their columns tell pairs, candidates and rewardbench apart",
    )
    pairs: Sources = Field(default_factory=dict, description="files or hub name:split, preference pairs")
    candidates: Sources = Field(
        default_factory=dict, description="files or hub name:split, prompts with scored candidates"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class Attack(AttackSettings, TextFormat, Run):
    """Options of `moemerge attack`."""

    model: Source = Field(description="reward model: folder or hub name")
    pairs: Source = Field(description="preference pairs whose rejected answers are edited")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class PublishSettings(Options):
    """Model card and push to the Hugging Face Hub."""

    repo: str | None = Field(None, description="owner/name on the hub; without it only the card is written")
    push: bool = Field(False, description="push; otherwise only write and show what would be pushed")
    public: bool = Field(False, description="make the repository public")
    license: str | None = Field(
        None, description="licence id for the card (default: taken from the dense model)"
    )
    datasets: list[str] = Field(default_factory=list, description="dataset ids for the card")
    base_model: str | None = Field(None, description="hub name of the dense model for the card")


class Publish(PublishSettings, Run):
    """Options of `moemerge publish`."""

    model: Source = Field(description="folder with a model, written by merge, train, upcycle or export")
    evaluation: Source | None = Field(None, description="folder written by evaluate, for the card")
    endpoint: str | None = Field(None, description="another hub's address (default: huggingface.co)")
    yes: bool = Field(False, description="confirm the push; without it, push shows what would be sent")


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
