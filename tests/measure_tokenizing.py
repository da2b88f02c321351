"""Measure: the clients of a worker tokenized one by one, and as one batched operation.

``python tests/measure_tokenizing.py`` prints milliseconds of forward and backward for equal
mini-batches, on one thread. One batched operation is ``torch.func.vmap`` over stacked weights.

Shape legend: ``n`` clients, ``b`` samples of each, ``l`` length in tokens, ``d`` width.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from mpsl_dist.models.tokenizers import (
    PatchTokenizer,
    TextTokenizer,
    Tokenizers,
    copy_of,
    fuse,
    token_table,
)

#: Clients, samples of each, side of a picture, side of a patch, width.
CASES = [(25, 4, 8, 4, 64), (50, 2, 28, 4, 64), (25, 4, 28, 4, 384), (5, 8, 224, 16, 384)]
LENGTH, VOCABULARY, REPEATS = 10, 1_000, 15


class Clients:
    """Clients with tokenizers and a mini-batch each."""

    def __init__(self, clients: int, samples: int, side: int, patch: int, width: int) -> None:
        torch.manual_seed(0)
        table = token_table(VOCABULARY, width, trainable=False)
        parts = {
            "image": PatchTokenizer(1, side, side, patch, patch, width),
            "text": TextTokenizer(table, LENGTH),
        }
        self.first = Tokenizers(parts, width, pre_norm=True)
        self.own = [copy_of(self.first) for _ in range(clients)]
        self.inputs = [
            {
                "image": torch.randn(samples, 1, side, side),
                "text": torch.randint(0, VOCABULARY, (samples, LENGTH)),
            }
            for _ in range(clients)
        ]
        shape = (samples, sum(self.first.lengths), width)
        self.gradients_bld = [torch.randn(shape) for _ in range(clients)]
        self.trained = [[p for p in own.parameters() if p.requires_grad] for own in self.own]

    def one_by_one(self) -> list[Tensor]:
        """Return every client's tokens (b, l, d)."""
        pairs = zip(self.own, self.inputs, strict=True)
        return [fuse(own(inputs), "early")[0] for own, inputs in pairs]

    def together(self) -> Sequence[Tensor]:
        """Return the same from one batched operation."""
        named = dict(self.first.named_parameters())
        frozen = {name: p for name, p in named.items() if not p.requires_grad}
        names = [name for name in named if name not in frozen]
        stacked = {
            name: torch.stack(parts)
            for name, parts in zip(names, zip(*self.trained, strict=True), strict=True)
        }
        inputs = {name: torch.stack([own[name] for own in self.inputs]) for name in self.inputs[0]}
        base = copy.deepcopy(self.first)

        def one(weights: dict[str, Tensor], own: dict[str, Tensor]) -> Tensor:
            return fuse(functional_call(base, {**frozen, **weights}, (own,)), "early")[0]

        return [tokens_bld.clone() for tokens_bld in vmap(one)(stacked, inputs).unbind()]

    def step(self, tokenize: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Return every client's gradients."""
        trained = [p for own in self.trained for p in own]
        return torch.autograd.grad(tokenize(), trained, self.gradients_bld)


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of a call."""
    run()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return 1e3 * statistics.median(taken)


def main() -> None:
    torch.set_num_threads(1)
    print("clients samples side width   one by one   together   largest difference")
    for case in CASES:
        clients = Clients(*case)
        pairs = zip(clients.step(clients.one_by_one), clients.step(clients.together), strict=True)
        apart = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        ours = milliseconds(lambda c=clients: c.step(c.one_by_one))
        theirs = milliseconds(lambda c=clients: c.step(c.together))
        count, samples, side, _, width = case
        words = f"{count:7} {samples:7} {side:4} {width:5}"
        print(f"{words} {ours:9.2f} ms {theirs:7.2f} ms   {apart:.1e}")


if __name__ == "__main__":
    main()
