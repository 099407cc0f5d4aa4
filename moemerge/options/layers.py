"""The option that picks layers, read: all, first:4, last:4, or numbers and ranges."""

from __future__ import annotations

from moemerge.errors import OptionError


def parse_layers(spec: str, count: int) -> list[int]:
    """Layer numbers that `spec` (all, first:4, last:4, 0,2,5-7) picks out of `count` layers.

    Raises OptionError for a spec that cannot be read or leaves the model.
    """
    try:
        layers = _layer_numbers(spec.replace(" ", ""), count)
        if layers and min(layers) >= 0 and max(layers) < count:
            return layers
    except ValueError:
        pass
    raise OptionError(
        "layers cannot be picked",
        given=f"{spec!r} for a model of {count} layers",
        expected=f"all, first:4, last:4, or numbers from 0 to {count - 1} such as 0,2,5-7",
        fix="correct the layers option",
    )


def _layer_numbers(spec: str, count: int) -> list[int]:
    if spec == "all":
        return list(range(count))
    word, _, number = spec.partition(":")
    if word == "first":
        return _range(0, int(number), count)
    if word == "last":
        return _range(count - int(number), count, count)
    ranges = [part.partition("-") for part in spec.split(",")]
    return sorted({n for lo, _, hi in ranges for n in _range(int(lo), int(hi or lo) + 1, count)})


def _range(start: int, stop: int, count: int) -> list[int]:
    """Numbers from `start` to before `stop`; ValueError, before they are made, if they leave the model."""
    if start < 0 or stop > count:
        raise ValueError
    return list(range(start, stop))
