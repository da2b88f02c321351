"""How long reading takes: on demand, with processes forked anew for every client and epoch, shared.

    python tests/measure_loaders.py [--clients 4] [--epochs 5] [--seconds-of-model 0.1]

Pictures of 320x240 with a question each are read step by step, as the clients of one worker do;
after every step the process waits as long as a model would compute elsewhere.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mpsl_dist.data import Batch
from mpsl_dist.data.decode import text
from mpsl_dist.data.decode.samples import FileDataset, Sample, View
from mpsl_dist.data.loading import Loaders

STEPS, SIZE = 4, 8


def pictures(folder: Path, count: int) -> FileDataset:
    noise = np.random.default_rng(0)
    samples = []
    for n in range(count):
        pixels = noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        path = folder / f"{n}.jpg"
        Image.fromarray(pixels).resize((320, 240)).save(path)
        samples.append(Sample(image=str(path), text=f"what is in picture {n}"))
    labels = torch.zeros(count, dtype=torch.long)
    return FileDataset(samples, labels, View(("image", "text"), text_length=77))


class Alone:
    """A client's mini-batches as items."""

    def __init__(self, dataset: FileDataset, batches: list[list[int]], seed: int) -> None:
        self.dataset, self.batches, self.seed = dataset, batches, seed

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        return self.dataset.fetch(self.batches[step], self.seed)


def anew(dataset: FileDataset, plans: list[list[list[int]]], epochs: int) -> Iterator[None]:
    for epoch in range(epochs):
        text._tokenizer.cache_clear()  # as it is in a process that reads nothing itself
        streams = [
            iter(DataLoader(Alone(dataset, plan, epoch), batch_size=None, num_workers=1))
            for plan in plans
        ]
        for _ in range(STEPS):
            for stream in streams:
                next(stream)
            yield


def shared(
    dataset: FileDataset, plans: list[list[list[int]]], epochs: int, each: int = 1
) -> Iterator[None]:
    loaders = Loaders([dataset], each)
    readers = [loaders.reader(dataset) for _ in plans]
    for epoch in range(epochs):
        for reader, plan in zip(readers, plans, strict=True):
            reader.plan(dict(enumerate(plan)), epoch)
        for step in range(STEPS):
            for reader in readers:
                reader.batch(step)
            yield


def seconds(steps: Callable[[], Iterator[None]], wait: float) -> float:
    text._tokenizer.cache_clear()
    begin = time.perf_counter()
    for _ in steps():
        time.sleep(wait)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seconds-of-model", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    clients, epochs, wait = options.clients, options.epochs, options.seconds_of_model
    with tempfile.TemporaryDirectory() as folder:
        dataset = pictures(Path(folder), clients * STEPS * SIZE)
        order = torch.arange(clients * STEPS * SIZE).reshape(clients, STEPS, SIZE)
        plans = order.tolist()
        ways = {
            "on demand (data.loaders=0)": lambda: shared(dataset, plans, epochs, each=0),
            "processes forked anew": lambda: anew(dataset, plans, epochs),
            "processes that last (data.loaders=1)": lambda: shared(dataset, plans, epochs),
        }
        taken = {name: seconds(way, wait) for name, way in ways.items()}
    last = list(taken.values())[-1]
    for name, found in taken.items():
        print(f"{name}: {found:.1f} s, {found / last:.1f} times the last")


if __name__ == "__main__":
    main()
