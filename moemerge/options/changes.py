"""Options of changes."""

from __future__ import annotations

from pydantic import Field

from moemerge.options.base import Run, Several, Source


class ChangesOptions(Run):
    """Options of `moemerge changes`."""

    models: Several = Field(description="two models or more; without name= each gets its own")
    base: Source = Field(description="the model that all of them were trained from")
