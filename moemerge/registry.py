"""Open sets (coefficient methods, probes, stages): names that point to members, imported late.

Other packages add members by entry points, which are listed without importing anything.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from moemerge.errors import UnsupportedError, first_line, unexpected, unknown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")
FUNCTION = ("__call__",)
# Packages whose members this process has used: results depend on them.
USED: set[str] = set()

log = logging.getLogger(__name__)


class Registry(Generic[T]):
    """A set of named members, each given as "module:attribute" and imported when first asked for.

    group: other packages add members by entry points of the group moemerge.GROUP; "" for a closed set.
    needs: the attributes by which a member is told from anything else.
    """

    def __init__(
        self, kind: str, members: Mapping[str, str], group: str = "", needs: tuple[str, ...] = FUNCTION
    ) -> None:
        self.kind, self.group, self.needs = kind, group, needs
        self._members = members

    def __iter__(self) -> Iterator[str]:
        yield from self._members
        yield from self.added

    def __contains__(self, name: object) -> bool:
        return name in self._members or name in self.added

    def get(self, name: str) -> T:
        """The member called `name`.

        Raises OptionError, with a near name, if there is none; UnsupportedError, naming the package, if that
        of another package cannot be imported or is no such member.
        """
        if name in self._members:
            module, attribute = self._members[name].split(":")
            return cast(T, getattr(importlib.import_module(module), attribute))
        if name in self.added:
            return cast(T, self._load(name))
        raise unknown(self.kind, name, self)

    def package(self, name: str) -> str:
        """The name of the package that a member comes from; "" if that cannot be told."""
        if name not in self.added:
            return "moemerge"
        point = self.added[name][0]
        return point.dist.name if point.dist else ""

    @cached_property
    def added(self) -> Mapping[str, list[EntryPoint]]:
        """What other packages add, by name; none of it is imported. moemerge's own names stay its own."""
        added: dict[str, list[EntryPoint]] = {}
        for point in _entry_points(f"moemerge.{self.group}") if self.group else ():
            if point.name in self._members:
                log.warning(
                    "%s %s of %s is not used: moemerge has its own", self.kind, point.name, _maker(point)
                )
            else:
                added.setdefault(point.name, []).append(point)
        return added

    def _load(self, name: str) -> object:
        point, *others = self.added[name]
        if others:
            raise self._fault(name, "is added by several packages", "one package that adds it")
        try:
            member = point.load()
        except BaseException as error:
            if not unexpected(error) and not isinstance(error, SystemExit):
                raise
            why = f"cannot be imported ({type(error).__name__}: {first_line(error)})"
            raise self._fault(name, why, "a package that can be imported here") from error
        if any(not hasattr(member, attribute) for attribute in self.needs):
            form = "a function" if self.needs == FUNCTION else f"an object with {', '.join(self.needs)}"
            raise self._fault(name, f"is {type(member).__name__}", f"{form}, see docs/extending.md")
        if point.dist is not None:
            USED.add(point.dist.name)
        return member

    def _fault(self, name: str, why: str, expected: str) -> UnsupportedError:
        points = self.added[name]
        makers = ", ".join(map(_maker, points))
        return UnsupportedError(
            f"{self.kind} {name} {why}",
            given=f"{', '.join(point.value for point in points)}, which {makers} adds",
            expected=expected,
            fix=f"update, repair or uninstall {makers}; or choose another {self.kind}",
        )


def _entry_points(group: str) -> Iterable[EntryPoint]:
    from importlib.metadata import entry_points

    try:
        return entry_points(group=group)
    except Exception as error:  # one damaged file of any installed package stops them all
        log.warning("what other packages add cannot be listed, and is not used: %s", first_line(error))
        return ()


def _maker(point: EntryPoint) -> str:
    """The package that adds a member."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a package without a name"
