"""Wall time of starting moemerge: median of 20 fresh processes each. Prints a markdown row."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date

RUNS = 20
CASES = {
    "bare python": ["-c", "pass"],
    "import moemerge": ["-c", "import moemerge"],
    "moemerge --help": ["-m", "moemerge", "--help"],
    "moemerge train --help": ["-m", "moemerge", "train", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one fresh Python process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Time all cases in turn, so that load on the machine falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(RUNS):
        for name, arguments in CASES.items():
            times[name].append(seconds(arguments))
    cells = [f"{statistics.median(found):.3f} ({min(found):.3f})" for found in times.values()]
    print("| date | machine | load | " + " | ".join(f"{name}, s" for name in CASES) + " |")
    print("| --- | --- | --- |" + " ---: |" * len(CASES))
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    print(f"| {date.today()} | {machine} | {os.getloadavg()[0]:.1f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
