"""What clients cost on one machine: memory, start-up and time of a step, by their number.

    python tests/measure_clients.py [key.path=value ...] [--clients 10,100,1000] [--workers 4]

Every row is one epoch of the quickstart by the command line, all rows with one global batch of as
many samples as the largest row has clients. Memory is what a process has to itself at its peak
(``Private_Dirty``: what a fork shares with its parent is left out, as are libraries and mapped
files). Cores' seconds are those that all processes took until the first step was done, which other
programs on the machine hardly change. A run that leaves the machine less than ``--spare`` GiB is
ended.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, World, launcher, role_of

from mpsl_dist import config
from mpsl_dist.actors.assembly import build_tokenizers
from mpsl_dist.actors.holdings import load_data

KIB, MIB = 2**10, 2**20


def own_memory(pid: int) -> int:
    """Bytes that a process has to itself; 0 if it is gone."""
    try:
        parts = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return KIB * sum(int(line.split()[1]) for line in parts.splitlines() if "Private_Dirty" in line)


def processor_seconds(pid: int) -> float:
    """Seconds of processors that a process, and its children that have ended, took so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def spare() -> float:
    """GiB of memory that the machine has left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return int(kib) * KIB / 2**30


def watch(
    run: World, folder: Path, least: float
) -> tuple[dict[tuple[int, bool], int], float, float]:
    """Follow a run to its end.

    Gives the peak memory of every rank's processes, the seconds to the first step, and the
    processors' seconds of all processes by its end.
    """
    begin, started, spent, next_look = time.monotonic(), 0.0, 0.0, 0.0
    peak: dict[tuple[int, bool], int] = {}
    metrics = folder / "metrics.jsonl"
    while run.process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        if not started and metrics.exists() and (lines := metrics.read_text().splitlines()):
            started = now - begin - json.loads(lines[0])["seconds"]
            spent = sum(map(processor_seconds, run.members()))
            next_look = now
        if now < next_look:
            continue
        for pid in run.members():
            if role := role_of(pid):
                peak[role] = max(peak.get(role, 0), own_memory(pid))
        if spare() < least:
            run.end()
            sys.exit(f"ended: less than {least:g} GiB of memory were left")
        next_look = 5 * time.monotonic() - 4 * now  # a look costs processors' time too
    status, output = run.finish()
    if status:
        sys.exit(output)
    return peak, started, spent


def measure(clients: int, workers: int, words: list[str], least: float) -> tuple[int, int, str]:
    """Run one row; gives all workers' memory in bytes, how many there were, and the row."""
    each = -(-clients // workers)
    with tempfile.TemporaryDirectory() as folder, launcher(Path(folder)) as launch:
        line = [sys.executable, "-m", "mpsl_dist", "train", str(ROOT / "configs/quickstart.yaml")]
        line += ["name=run", f"output={folder}", "training.epochs=1", f"clients={clients}"]
        line += [f"clients_per_worker={each}", "runtime.worker_threads=1", *words]
        run = Path(folder) / "run"
        peak, started, spent = watch(launch(line), run, least)
        seconds = json.loads((run / "summary.json").read_text())["seconds"]["step_median"]
    server, hosts = peak.pop((0, False)), sum(peak.values())
    count = len({rank for rank, _ in peak})
    row = f"{clients:7} {count:7} {started:10.1f} {spent:9.1f} {seconds:8.2f} {server / MIB:9.0f} "
    return hosts, count, row + f"{hosts / count / MIB:9.0f}"


def trained_bytes(words: list[str]) -> int:
    """Bytes of one client's trained parameters."""
    chosen = config.load(ROOT / "configs/quickstart.yaml", words)
    parts = build_tokenizers(chosen, load_data(chosen)).parameters()
    return sum(p.nbytes for p in parts if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", default="10,100,1000")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--spare", type=float, default=3.0)
    options, words = parser.parse_known_args()
    numbers = [int(number) for number in options.clients.split(",")]
    words = [f"training.batch_size={max(numbers)}", *words]
    print(f"a client trains {trained_bytes(words) / KIB:.1f} KiB; MiB by process")
    print("clients workers start-up,s of cores step,s    server  a worker  KiB per further client")
    before: tuple[int, int, int] | None = None
    for clients in numbers:
        hosts, workers, row = measure(clients, options.workers, words, options.spare)
        if before and before[2] == workers:
            row += f" {(hosts - before[0]) / (clients - before[1]) / KIB:12.1f}"
        print(row, flush=True)
        before = hosts, clients, workers


if __name__ == "__main__":
    main()
