"""Open sets (coefficient methods, probes, stages): names that point to members, imported late."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Generic, TypeVar, cast

from moemerge.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """A set of named members, each given as "module:attribute" and imported when first asked for."""

    def __init__(self, kind: str, members: dict[str, str]) -> None:
        self.kind = kind
        self._members = members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def get(self, name: str) -> T:
        """The member called `name`. Raises OptionError, with a near name, if there is none."""
        if name not in self._members:
            raise unknown(self.kind, name, self._members)
        module, attribute = self._members[name].split(":")
        return cast(T, getattr(importlib.import_module(module), attribute))
