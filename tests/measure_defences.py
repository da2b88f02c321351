"""What a step costs under each row of a sweep of defences, in processor time.

    python tests/measure_defences.py [configs/sweeps/privacy.yaml] [--steps 40]

Server and clients of every row live in this process, without RPC, on one thread, and take their
steps in turns, so that other programs hardly change the ratios: means over all steps, and quartiles
of single ones. Codecs and masks are in it, sockets are not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from conftest import ROOT
from local_fleet import in_one_process

sys.path.insert(0, str(ROOT / "launch"))

import sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", nargs="?", default=str(ROOT / "configs/sweeps/privacy.yaml"))
    parser.add_argument("--steps", type=int, default=40)
    options, words = parser.parse_known_args()
    runs, _ = sweep.read(Path(options.sweep), [*words, "seed=1"])
    methods: dict[str, Any] = {}
    for run in runs:
        row = run.experiment.name.rpartition("-seed")[0]
        if row not in methods:
            methods[row] = in_one_process(run.experiment)
            methods[row].begin_epoch(0)
    spent: dict[str, list[float]] = {row: [] for row in methods}
    for step in range(options.steps):
        for row, method in methods.items():
            begun = time.process_time()
            method.step(step, step)
            spent[row].append(time.process_time() - begun)
    first = next(iter(methods))
    for row, seconds in spent.items():
        ratios = [a / b for a, b in zip(seconds, spent[first], strict=True)]
        low, _, high = statistics.quantiles(ratios[len(ratios) // 8 :], n=4)
        mean = sum(seconds[1:]) / sum(spent[first][1:])
        milliseconds = 1e3 * statistics.median(seconds)
        print(f"{row:36} {milliseconds:7.1f} ms {mean:6.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
