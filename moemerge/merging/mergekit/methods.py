"""mergekit's merge methods over a source's members: one tensor at a time, without N dense models of a MoE.

Letters: N weighted members.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import MergeMethod, ParameterScope, TensorGroup
from torch import Tensor

from moemerge.errors import OptionError, suggest
from moemerge.merging.coefficients import Coefficients
from moemerge.options.base import OURS

SHARED, WEIGHT = "shared", "weight"
SUM_TOLERANCE = 1e-6


class HostMethod:
    """The merge method `name` of mergekit with `parameters`; its base is the shared member, if there is one.

    `coefficients` become the method's parameter `weight`: shared_L for the base where the method weighs it,
    (1 - shared_L) * alpha_LN for the others. `weighs` tells whether it has that parameter.
    Raises OptionError for an unknown method or a weight that is given twice.
    """

    def __init__(
        self,
        name: str,
        parameters: dict[str, Any],
        coefficients: Coefficients | None = None,
        seed: int = 0,
    ) -> None:
        self.method = _method(name)
        self.parameters, self.coefficients, self.seed = parameters, coefficients, seed
        scopes = {p.name: p.scope for p in self.method.spec.parameters}
        self._scope, self._known = scopes.get(WEIGHT), scopes.keys()
        if coefficients is not None and self.weighs and WEIGHT in parameters:
            raise OptionError(
                "weights are given twice",
                given=f"coefficients, and parameters weight={parameters[WEIGHT]}",
                expected="one of them",
                fix="leave out either",
            )

    @property
    def weighs(self) -> bool:
        """Whether the method takes a weight per expert."""
        return self._scope in (ParameterScope.INPUT, ParameterScope.NON_BASE)

    def about_the_sum(self, count: int, has_shared: bool) -> str | None:
        """What becomes of a parameter `weight`, which is that of each of `count` members, in a few words.

        None if there is none, if the weights sum to one, or if the method has no parameter `normalize`.
        """
        normalize = next((p for p in self.method.spec.parameters if p.name == "normalize"), None)
        weight = self.parameters.get(WEIGHT)
        if normalize is None or not self.weighs or isinstance(weight, str) or weight is None:
            return None
        weighed = count - (has_shared and self._scope == ParameterScope.NON_BASE)
        total = weight * weighed
        if abs(total - 1) < SUM_TOLERANCE:
            return None
        if self.parameters.get("normalize", normalize.default):
            return (
                f"weight={weight} is that of each member, and {self.method.spec.name} divides by their sum: "
                "all count alike"
            )
        return (
            f"the weights of {weighed} members sum to {total:g}, and {self.method.spec.name} does not divide "
            f"by that: weight={1 / weighed:.6g} or normalize=true makes an average"
        )

    def merge(self, name: str, row: int | None, copies: Iterable[Tensor], has_shared: bool) -> Tensor:
        """The merge of `copies` (the shared one first, if there is one) of the dense tensor `name`.

        `row` is the row of its coefficients, if there are any. Random methods draw from a generator seeded by
        the tensor's name, so the result repeats. Raises OptionError for parameters or a number of members
        that the method does not take.
        """
        tensors = list(copies)
        ids: list[Hashable] = [SHARED] * has_shared + [*range(len(tensors) - has_shared)]
        group = TensorGroup.from_tensors(tensors, ids=ids, base_index=0 if has_shared else None, name=name)
        parameters = {**self._of_sums(), **self.parameters, **self._weights(row, ids)}
        try:
            # Seeded by the name: the draw for a tensor depends on no other, whatever the order of merging.
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
                (merged,) = self.method([group], parameters=parameters)
        except (TypeError, ValueError) as error:
            raise self._refused(error, len(tensors), has_shared) from error
        return merged

    def _of_sums(self) -> dict[str, bool]:
        """normalize false where changes are added: divided by their sum, weights would be an average's."""
        adds = self.coefficients is not None and self.coefficients.coordinates == "sum"
        return {"normalize": False} if adds and "normalize" in self._known else {}

    def _weights(self, row: int | None, ids: list[Hashable]) -> dict[str, dict[Hashable, float]]:
        if self.coefficients is None or row is None or not self.weighs:
            return {}
        shared, *routed = self.coefficients.weights(row, has_shared=True)
        all_weights: dict[Hashable, float] = {SHARED: shared, **dict(enumerate(routed))}
        wanted = ids if self._scope == ParameterScope.INPUT else [i for i in ids if i != SHARED]
        return {WEIGHT: {i: all_weights[i] for i in wanted}}

    def _refused(self, error: Exception, count: int, has_shared: bool) -> OptionError:
        spec = self.method.spec
        known = ", ".join(f"{p.name}{' (needed)' * p.required}" for p in spec.parameters) or "none"
        base = "the shared one as base" if has_shared else "no shared one, so no base"
        fix = "correct method or parameters; coefficients give the weight"
        if not has_shared:
            fix += "; where the method needs a base, give one as base (with a MoE it is the shared expert)"
        return OptionError(
            f"mergekit's method {spec.name} refuses this merge",
            given=f"{count} members, {base}, parameters {self.parameters}: {error}",
            expected=f"parameters: {known}",
            fix=fix,
        )


def method_names() -> list[str]:
    """Our own method, and those of the mergekit that is installed, sorted."""
    return sorted([OURS, *_methods()])


def _methods() -> dict[str, MergeMethod]:
    return {m.spec.name: m for m in registry.registered_methods() if not m.spec.name.startswith(OURS)}


def _method(name: str) -> MergeMethod:
    known = _methods()
    if name in known:
        return known[name]
    raise OptionError(
        "unknown merge method",
        given=name,
        expected=f"one of: {', '.join(method_names())}",
        fix=suggest(name, [OURS, *known]),
    )
