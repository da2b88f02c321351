"""How many clients a step has under the paper's partition and under the released code's.

    python tests/measure_partition.py DATA

DATA holds ``meld/`` (its csv files) and ``coco-qa-full-text/`` (its answers), whose real labels are
taken; the other datasets' classes are taken as equally frequent. Nothing is trained.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpsl_dist.data import DataError
from mpsl_dist.data.catalog import DATASETS
from mpsl_dist.data.partition import partition, shares

#: Dataset -> the batch size of ``configs/paper``.
BATCHES = {"coco-qa": 500, "t4sa": 400, "kinetics-sounds": 500, "ucf101": 300, "meld": 500}
RULES = (("dirichlet", 0.1, 1), ("dirichlet-balanced", 0.1, 10), ("dirichlet-balanced", 0.5, 10))
SEEDS = range(10)


def labels_of(name: str, folder: Path) -> Tensor:
    """Return a dataset's training labels: the real ones, or equally frequent classes."""
    if name == "coco-qa":
        answers = folder / "coco-qa-full-text" / "train" / "answers.txt"
        texts = answers.read_text("utf-8").splitlines()
    elif name == "meld":
        texts = []
        for path in sorted((folder / "meld").glob("*.csv")):
            with path.open(encoding="utf-8", newline="") as file:
                texts += [row["Emotion"] for row in csv.DictReader(file)]
    else:
        facts = DATASETS[name]
        return torch.arange(facts.samples[0]) % facts.classes
    numbers = {text: number for number, text in enumerate(sorted(set(texts)))}
    return torch.tensor([numbers[text] for text in texts])


def row(name: str, labels: Tensor, clients: int, rule: tuple[str, float, int]) -> str:
    """Return a line of the table."""
    kind, alpha, minimum = rule
    means, steps, failed = [], [], 0
    for seed in SEEDS:
        try:
            parts = partition(labels, clients, kind, alpha, minimum, seed)
        except DataError:
            failed += 1
            continue
        plan = shares([len(part) for part in parts], BATCHES[name], "equal")
        means.append(float((plan > 0).sum(1).mean()))
        steps.append(len(plan))
    central = -(-len(labels) // BATCHES[name])
    cells = [name, str(clients), f"{kind}, α={alpha:g}", f"{failed} of {len(SEEDS)}"]
    if means:
        cells += [f"{np.mean(means):.0f} ({min(means):.0f} to {max(means):.0f})"]
        cells += [f"{np.mean(steps) / central:.1f}"]
    else:
        cells += ["–", "–"]
    return f"| {' | '.join(cells)} |"


def main(folder: Path) -> None:
    """Print the table."""
    print("| | N | rule | gives up | clients of a step | steps, centralized 1 |")
    print("|---|---|---|---|---|---|")
    for name in BATCHES:
        labels = labels_of(name, folder)
        for clients in (25, 100):
            for rule in RULES:
                print(row(name, labels, clients, rule), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
