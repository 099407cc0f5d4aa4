"""What was written, held against what was meant: every tensor's shape, dtype and bits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor, uint8
from tqdm.auto import tqdm
from xxhash import xxh3_128

from moemerge.artifacts.progress import hidden
from moemerge.errors import CheckpointError

SHOWN, AHEAD = 5, 4


def tensor_digest(tensor: Tensor) -> str:
    """A fast digest (XXH3, 128 bits) of shape, dtype and bits: it tells damage, not forgery."""
    digest = xxh3_128(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(uint8).numpy().data)
    return digest.hexdigest()


def require_as_meant(folder: Path, meant: Mapping[str, str], found: Iterable[tuple[str, Tensor]]) -> None:
    """Raise CheckpointError unless the tensors `found` in `folder` have the names and digests `meant`."""
    seen: set[str] = set()
    for name, digest in tqdm(
        _digests(found), desc="read back", total=len(meant), leave=False, disable=hidden()
    ):
        seen.add(name)
        if digest != meant.get(name, digest):
            raise _not_as_meant(folder, f"{name} differs from what was written")
    if seen != meant.keys():
        names = sorted(seen ^ meant.keys())[:SHOWN]
        raise _not_as_meant(folder, f"missing or left over: {', '.join(names)}")


def _digests(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Names and digests of `tensors`, a few at a time: hashing leaves the interpreter free."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[tuple[str, Future[str]]] = deque()
        for name, tensor in tensors:
            waiting.append((name, pool.submit(tensor_digest, tensor)))
            if len(waiting) > AHEAD:
                first, digest = waiting.popleft()
                yield first, digest.result()
        yield from ((name, digest.result()) for name, digest in waiting)


def _not_as_meant(folder: Path, given: str) -> CheckpointError:
    return CheckpointError(
        f"the model in {folder} was not written as meant",
        given=given,
        expected="to read back, bit for bit, what was written",
        fix="check the disk, then run the same command again",
    )
