"""Options of upcycle."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from moemerge.options.base import Options, Run, Source, Sources


class UpcycleSettings(Options):
    """dense reward model -> mixture of experts that computes the same function."""

    num_routed_experts: int = Field(7, ge=2, description="routed experts per layer (N)")
    num_experts_per_tok: int = Field(5, ge=1, description="routed experts per token (K)")
    shared_expert: bool = Field(True, description="keep one expert that sees every token")
    layers: str = Field("all", description="which layers: all, first:4, last:4, or 0,2,5-7")
    gate: Literal["xft", "topk", "prompt"] = Field(
        "xft",
        description="xft: the shared expert weighs 1 - the largest router probability, the routed ones the "
        "rest; topk: renormalised, beside a shared expert of fixed weight; prompt: xft, one gate per prompt",
    )
    gate_shared_weight: float = Field(0.5, ge=0, lt=1, description="gate topk: weight of the shared expert")
    router: Literal["linear", "mlp"] = Field("linear", description="router network")
    router_init: Literal["normal", "zero"] = Field(
        "normal",
        description="initial values of the router's last layer; zero: the first K experts are picked at "
        "first",
    )
    router_init_std: float = Field(0.02, gt=0, description="standard deviation of router_init: normal")
    expert_noise: float = Field(
        0.0, ge=0, description="noise on the copies, in units of each matrix's standard deviation"
    )
    balance_coefficient: float = Field(
        0.01, ge=0, description="weight of the balance loss, kept in the config"
    )
    balance_loss: Literal["cv", "switch"] = Field(
        "cv",
        description="cv: squared variation of importance and load; switch: that of Switch Transformers",
    )
    fresh_head: bool = Field(
        False,
        description="draw a new reward head where the model's own is missing or under another name (a plain "
        "base model always gets one)",
    )
    shard_size: int = Field(5_000_000_000, ge=1, description="largest shard in bytes")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    @model_validator(mode="after")
    def _experts_fit(self) -> UpcycleSettings:
        if self.num_experts_per_tok > self.num_routed_experts:
            raise ValueError("num_experts_per_tok is larger than num_routed_experts")
        return self


class Upcycle(UpcycleSettings, Run):
    """Options of `moemerge upcycle`."""

    POSITIONAL = ("model",)

    model: Source = Field(description="dense reward model, base LM or encoder: folder or hub name")
    experts: Sources = Field(
        default_factory=dict,
        description="two models or more of the same architecture, whose MLPs become the routed experts; "
        "a token takes one of them unless num_experts_per_tok says otherwise; everything "
        "else comes from model (default: copies of the model's own MLPs)",
    )
    heads: Literal["shared", "by_expert"] = Field(
        "shared",
        description="shared: the model's own head; by_expert, with gate prompt and experts: a text is scored "
        "by the head of the model whose MLPs it goes through",
    )
    calibration: Source | None = Field(
        None,
        description="with heads by_expert: folder written by calibrate; each model's head is divided by its "
        "scale",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_expert_per_model(cls, values: dict[str, Any]) -> dict[str, Any]:
        """With `experts` as many as there are models, and one of them per token, unless it is said."""
        if not values.get("experts"):
            return values
        if len(values["experts"]) < 2:
            raise ValueError("experts: two models or more, each the MLPs of one expert; or none, for copies")
        return {"num_routed_experts": len(values["experts"]), "num_experts_per_tok": 1} | values

    @model_validator(mode="after")
    def _as_many_experts(self) -> Upcycle:
        if self.experts and len(self.experts) != self.num_routed_experts:
            raise ValueError(f"num_routed_experts: {len(self.experts)}, as many as there are experts")
        return self

    @model_validator(mode="after")
    def _heads_have_experts(self) -> Upcycle:
        if self.calibration and self.heads == "shared":
            raise ValueError("calibration goes with heads by_expert: it divides the experts' heads")
        one = self.gate == "prompt" and self.num_experts_per_tok == 1 and not self.shared_expert
        if self.heads == "by_expert" and not (self.experts and one):
            raise ValueError(
                "heads by_expert goes with experts, gate prompt, shared_expert false and "
                "num_experts_per_tok 1: one model's MLPs and head for each prompt"
            )
        return self
