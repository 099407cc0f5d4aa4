"""The command line in two processes that work together, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate.state import AcceleratorState
from forked import Ended, forked_together
from torch.distributed import TCPStore
from torch.distributed.fsdp import FSDPModule  # noqa: F401 (a second to import: once here, not in each fork)

from moemerge.run import cli

ROOT = Path(__file__).parents[2]


def ranks(flags: list[str], first: Callable[[int], object] = lambda rank: None) -> list[Ended]:
    """In two forks, with what torchrun tells each in its environment; `first` runs in each before."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    every = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    every |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}

    def rank(number: int) -> None:
        os.environ.update(every | {"RANK": str(number), "LOCAL_RANK": str(number)})
        AcceleratorState._reset_state(reset_partial_state=True)  # a fork knows what earlier tests set up
        first(number)
        cli.main(flags)

    return forked_together([partial(rank, number) for number in range(2)])


def torchrun(flags: list[str]) -> list[Ended]:
    """By torchrun itself, whose output is that of both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "moemerge", *flags], capture_output=True, text=True, cwd=ROOT, timeout=900
    )
    return [Ended(done.returncode, done.stdout, done.stderr)]
