"""Where the weights of a model go that is too large for one device."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from moemerge.options.base import Options

SHARDED: Any = Field(
    False,
    description="several processes: each holds a part of the weights, and at most a layer whole (FSDP2)",
)


class Placement(Options):
    """Where weights lie (on one device, in parts in several processes, by layers on several), and as what."""

    sharded: bool = SHARDED
    device_map: Literal["one", "auto"] = Field(
        "one",
        description="auto: one process lays layers on all GPUs, then into memory; what has no room stays in "
        "its files, and is read in each pass",
    )
    max_memory: dict[str, PositiveFloat] = Field(
        default_factory=dict,
        description="with device_map auto: gigabytes of weights at most, on a GPU by its number (0=60) or in "
        "memory (cpu=100) (default: nine tenths of what is free)",
    )

    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of weights and states; auto: on a GPU the checkpoint's own, on a CPU float32, though "
        "bfloat16 is faster on one that has it",
    )

    @field_validator("max_memory")
    @classmethod
    def _of_devices(cls, limits: dict[str, float]) -> dict[str, float]:
        for name in limits:
            if name != "cpu" and not (name.isascii() and name.isdecimal()):
                raise ValueError(f"only cpu and numbers of GPUs, not {name!r}")
        return limits

    @model_validator(mode="after")
    def _one_way(self) -> Placement:
        if self.sharded and self.device_map != "one":
            raise ValueError(
                "sharded is for several processes, device_map auto for one: leave one of them out"
            )
        if self.max_memory and self.device_map == "one":
            raise ValueError("max_memory goes with device_map auto")
        return self


WHOLE = Placement()
