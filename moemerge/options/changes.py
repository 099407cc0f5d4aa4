"""Options of changes."""

from __future__ import annotations

from pydantic import Field, model_validator

from moemerge.options.base import Run, Source, Sources


class ChangesOptions(Run):
    """Options of `moemerge changes`."""

    models: Sources = Field(description="two models or more; without name= each gets its own")
    base: Source = Field(description="the model that all of them were trained from")

    @model_validator(mode="after")
    def _several(self) -> ChangesOptions:
        if len(self.models) < 2:
            raise ValueError("models: give two at least")
        return self
