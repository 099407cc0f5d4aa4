"""Options of train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from moemerge.errors import suggest
from moemerge.options.base import Run, Source, SourceList, Sources, TextFormat
from moemerge.options.head import HeadOptions
from moemerge.options.trainer import own_keys

if TYPE_CHECKING:
    from typing_extensions import Self

EVALUATIONS = 10  # per training
SEARCHABLE = {
    *("learning_rate", "expert_learning_rate", "router_learning_rate", "head_learning_rate"),
    *("epochs", "weight_decay"),
}
# What takes part only beside one of these objectives.
ONLY_WITH = {
    "language_head": ("policy", "language"),
    "policy_temperature": ("policy", "language"),
    "language_form": ("language",),
    "contrast_temperature": ("contrast",),
    "contrast_dropout": ("contrast",),
}
# What is minimised, and how: all that plain Bradley-Terry has at its defaults.
LOOKAHEAD = ("lookahead", "lookahead_rate", "lookahead_sets")
LOSS = ("objectives", "label_smoothing", "margin", "center", *LOOKAHEAD, *ONLY_WITH)
# What looks at weights outside of the model's own forward and backward pass.
NEED_FLOAT32 = ("lookahead", "policy", "language")
NEED_WHOLE = ("lora", "head", *NEED_FLOAT32)
STEERING = ("shared_dropout", "router_temperature", "top1_warmup", "assign")


class TrainSettings(HeadOptions):
    """Bradley-Terry training on preference pairs with TRL's RewardTrainer."""

    epochs: float = Field(1.0, gt=0, description="passes over the training pairs")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    batch_size: int = Field(8, ge=1, description="pairs per step; several processes share them")
    gradient_accumulation: int = Field(1, ge=1, description="batches per optimiser step")
    learning_rate: float = Field(
        1e-5, gt=0, description="learning rate of everything that has no rate of its own"
    )
    expert_learning_rate: float | None = Field(
        None,
        gt=0,
        description="learning rate of experts, the shared one too, or of a dense model's MLPs (default: "
        "learning_rate)",
    )
    router_learning_rate: float | None = Field(
        None, gt=0, description="learning rate of routers (default: learning_rate)"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of steps with rising learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="learning rate after warm-up"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    trainable: Literal["full", "experts", "lora"] = Field(
        "full", description="full; experts: experts, routers and head; lora: those plus LoRA on attention"
    )
    train_layers: str = Field("all", description="transformer layers that train; the head always does")
    lora_rank: int = Field(16, ge=1, description="rank of LoRA on attention")
    lora_alpha: float = Field(32.0, gt=0, description="scale of LoRA on attention")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on a GPU, float32 on CPU"
    )
    weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="type of weights and gradients, also as saved; bfloat16: 12 bytes a weight in place of "
        "16; moments are float32, and updates are rounded at random, so that small ones are not lost",
    )
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
    group_by_length: bool = Field(
        False, description="batches of similar length: faster where lengths vary, but a less random order"
    )
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations (default: ten per run)")
    patience: int | None = Field(
        3, ge=1, description="evaluations without improvement before stopping; none: never"
    )
    choose_by: Literal["loss", "accuracy"] = Field(
        "loss",
        description="criterion on validation pairs for choosing steps and trials; loss depends on how "
        "confident the scores are, accuracy only on their order (and takes the first of "
        "equals)",
    )
    shared_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probability that a pair is scored without the shared expert, in all layers",
    )
    router_temperature: float = Field(
        1.0, gt=0, description="divides the router's logits at the first step, then falls or rises to 1"
    )
    temperature_share: float = Field(
        0.5, gt=0, le=1, description="share of steps until the router's temperature is 1"
    )
    top1_warmup: float = Field(
        0.0, ge=0, le=1, description="share of steps with one routed expert per token, at the start"
    )
    assign: Literal["router", "subset", "shards"] = Field(
        "router",
        description="what picks a pair's routed expert at the start: the router, its subset, or a random "
        "shard",
    )
    assign_share: float = Field(0.5, gt=0, le=1, description="share of steps with experts by subset or shard")
    assign_order: list[str] = Field(
        default_factory=list,
        description="subsets of expert 0, 1, ..., and round again (default: all, by name)",
    )
    objectives: dict[str, float] = Field(
        default_factory=lambda: {"bradley_terry": 1.0},
        description="what training minimises, with weights (0: left out): bradley_terry, on labels; policy, "
        "DPO on the same pairs by a language head on the trunk; language, likely chosen answers by it; "
        "contrast, which tells the pairs of a batch apart by their states' differences",
    )
    label_smoothing: float | Literal["column"] = Field(
        0.0,
        description="bradley_terry: label smoothing, the share of labels assumed to be wrong, below 0.5; "
        "column: each pair's own, from the data's column doubt",
    )
    margin: Literal["none", "column"] = Field(
        "none", description="bradley_terry: margin that chosen must win by: the data's margin column"
    )
    center: float = Field(
        0.0, ge=0, description="weight of mean (chosen score + rejected score)^2, which keeps scores near 0"
    )
    language_head: Source | None = Field(
        None,
        description="policy and language: the language model that the reward model was made from, whose head "
        "is used, frozen (default: the model's own head, or its embeddings where the architecture ties them)",
    )
    policy_temperature: float = Field(
        0.1, gt=0, description="policy: factor on log-odds; language_form sigmoid: on the log-probability"
    )
    language_form: Literal["mean", "sigmoid"] = Field(
        "mean",
        description="language: -log pi per token of the chosen answer; sigmoid: GRM's, -log sigmoid of "
        "policy_temperature times their sum",
    )
    contrast_temperature: float = Field(0.05, gt=0, description="contrast: temperature that divides cosines")
    contrast_dropout: float = Field(
        0.1, gt=0, lt=1, description="contrast: dropout on a state in each of its two views"
    )
    lookahead: Source | None = Field(
        None,
        description="MetaRM: sets of three or more answers of the policy, whose gold is not used; gradients "
        "are taken where the model tells these answers further apart",
    )
    lookahead_rate: float = Field(
        0.01, ge=0, description="lookahead: size of its step relative to the norm of the weights"
    )
    lookahead_sets: int = Field(4, ge=1, description="lookahead: sets per batch")
    fresh_head: bool = Field(
        False,
        description="draw a new reward head where the model's own is missing or under another name (a plain "
        "base model always gets one)",
    )
    search: dict[str, list[float]] = Field(
        default_factory=dict,
        description="values to try per option, e.g. learning_rate: [1e-5, 3e-5]; choose_by chooses",
    )

    sharded: bool = Field(
        False,
        description="several processes: each holds a part of weights, gradients and moments, and never more "
        "than a layer whole (FSDP2), in place of all of them (DDP)",
    )
    trainer: Annotated[dict[str, Any], AfterValidator(own_keys)] = Field(
        default_factory=dict,
        description="any other key of TRL's RewardConfig, e.g. report_to: tensorboard, optim: adafactor",
    )

    @field_validator("search")
    @classmethod
    def _search_can_be_done(
        cls, search: dict[str, list[float]], info: ValidationInfo
    ) -> dict[str, list[float]]:
        unknown = sorted(set(search) - SEARCHABLE)
        if unknown:
            raise ValueError(f"only {', '.join(sorted(SEARCHABLE))}; not {', '.join(unknown)}")
        if not all(search.values()):
            raise ValueError("at least one value per option")
        if "epochs" in search and info.data.get("max_steps"):
            raise ValueError("other options than epochs while max_steps overrides these")
        return search

    @model_validator(mode="after")
    def _weights_have_no_other_use(self) -> TrainSettings:
        used = {
            self.trainable,
            *self.minimised,
            *(name for name in ("lookahead", "head") if getattr(self, name)),
        }
        if self.sharded and (clash := used.intersection(NEED_WHOLE)):
            raise ValueError(f"{min(clash)} needs whole weights: leave it out, or sharded")
        if self.weights != "float32" and (clash := used.intersection(NEED_FLOAT32)):
            raise ValueError(f"{min(clash)} needs weights float32: leave it out, or weights {self.weights}")
        return self

    @model_validator(mode="after")
    def _order_of_subsets(self) -> TrainSettings:
        if self.assign_order and self.assign != "subset":
            raise ValueError("assign_order needs assign: subset")
        if len(set(self.assign_order)) < len(self.assign_order):
            raise ValueError("assign_order names a subset twice")
        return self

    @model_validator(mode="after")
    def _objectives_make_sense(self) -> TrainSettings:
        weights = self.objectives.values()
        if isinstance(self.label_smoothing, float) and not 0 <= self.label_smoothing < 0.5:
            raise ValueError("label_smoothing is outside [0, 0.5)")
        if not all(weight >= 0 for weight in weights) or not any(weights):
            raise ValueError("objectives needs one or more with a weight above 0, and none below")
        if (self.label_smoothing or self.margin != "none") and not self.objectives.get("bradley_terry"):
            raise ValueError("label_smoothing and margin need bradley_terry among objectives")
        for name, wanted in ONLY_WITH.items():
            if self.differs(name) and not any(map(self.objectives.get, wanted)):
                raise ValueError(f"{name} needs {' or '.join(wanted)} among objectives")
        for name in ("lookahead_rate", "lookahead_sets"):
            if self.differs(name) and self.lookahead is None:
                raise ValueError(f"{name} needs lookahead")
        return self

    @property
    def minimised(self) -> dict[str, float]:
        """The objectives that take part: those whose weight is not 0."""
        return {name: weight for name, weight in self.objectives.items() if weight}

    def steered(self) -> list[str]:
        """Names of the options set here that only a MoE can follow."""
        return [name for name in STEERING if self.differs(name)]

    def total_steps(self, num_pairs: int) -> int:
        """Updates of a whole run over `num_pairs` pairs."""
        passes = math.ceil(num_pairs / self.batch_size)
        per_epoch = math.ceil(passes / self.gradient_accumulation)
        return self.max_steps or math.ceil(self.epochs * per_epoch)

    def steps_between_evaluations(self, num_pairs: int) -> int:
        """Optimiser steps from one evaluation on held-out pairs to the next."""
        return self.eval_steps or max(1, self.total_steps(num_pairs) // EVALUATIONS)

    def scaled(self, factor: float) -> Self:
        """These with `factor` times the epochs, those of a search too, and steps (rounded, at least one).

        The schedule of the learning rate stretches along; so do evaluations, unless `eval_steps` says
        otherwise.
        """
        search = {
            name: [factor * value for value in values] if name == "epochs" else values
            for name, values in self.search.items()
        }
        steps = self.max_steps and max(1, round(factor * self.max_steps))
        return self.model_copy(update={"epochs": factor * self.epochs, "max_steps": steps, "search": search})


class Train(TrainSettings, TextFormat, Run):
    """Options of `moemerge train`."""

    POSITIONAL = ("model", "pairs")

    model: Source = Field(
        description="MoE or dense reward model, or a base model (fresh head): folder or hub name"
    )
    pairs: Source = Field(description="training pairs")
    more_pairs: Sources = Field(
        default_factory=dict,
        description="further training pairs by name, such as what attack found (patch=attack/patch.jsonl)",
    )
    shares: dict[str, float] = Field(
        default_factory=dict,
        description="of more_pairs: their share of all training pairs, drawn at random, repeatedly if "
        "they are few (default: each of their rows once)",
    )
    validation: Source | None = Field(None, description="held-out pairs for early stopping and search")
    flops_of: SourceList = Field(
        default_factory=list,
        description="train for as many FLOPs as these: outputs of train and strength, what they took; "
        "another model, such as a MoE to be trained, what these options would take with it",
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    @field_validator("flops_of", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _shares_are_of_more_pairs(self) -> Train:
        if clash := self.more_pairs.keys() & {"pairs", "validation", "lookahead"}:
            raise ValueError(f"more_pairs: another name than {min(clash)}")
        for name in self.shares:
            if name not in self.more_pairs:
                raise ValueError(f"shares: {suggest(name, self.more_pairs)}; {name} is not in more_pairs")
        if not all(share > 0 for share in self.shares.values()) or sum(self.shares.values()) >= 1:
            raise ValueError("shares are above 0, and below 1 together: the rest are those of pairs")
        return self

    @model_validator(mode="after")
    def _search_needs_validation(self) -> Train:
        if self.search and self.validation is None:
            raise ValueError("search needs validation, held-out pairs to choose by")
        return self
