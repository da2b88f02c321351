"""Naive parallel split learning: what MPSL's single backward is measured against.

Every client is served by itself: a forward of the encoder over its mini-batch alone, and a backward
of its own. The clients work in parallel, as parallel split learning has it; the gradients that a
step arrives at are MPSL's, because Eq. 4 is a sum over the clients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from mpsl_dist.methods import mpsl
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.sync import is_due

#: What one client's backward leaves: its weighted loss, and the server's gradients.
Served = tuple[float, dict[Tensor, Tensor]]


class Psl(Mpsl):
    """As :class:`Mpsl`, but with one server forward and backward per client."""

    def step(self, epoch_step: int, number: int) -> float:
        """Train one step, and return the global loss L_S; see :meth:`Mpsl.step`."""
        sizes = {n: int(size) for n, size in enumerate(self.plan[epoch_step]) if size}
        total = sum(sizes.values())
        # Parameters wait until every client's loss is known to be finite.
        all_finite = threading.Barrier(len(sizes))

        def serve(client: int) -> Served:
            try:
                weight = sizes[client] / total
                return self._serve(client, weight, epoch_step, number, all_finite.wait)
            except Exception:
                all_finite.abort()
                raise

        # An autograd context belongs to its thread, so every client has one of each.
        with ThreadPoolExecutor(len(sizes)) as threads:
            served = _results([threads.submit(serve, client) for client in sizes])
        self.server.step(number, _sum(gradients for _, gradients in served))
        if is_due(self.sync, number, self.total_steps):
            answers = self.sync.collect(self.clients, f"step {number}")
            self.sync.meet(self.clients, answers, number, self.sizes)
        return sum(loss for loss, _ in served)

    def _serve(
        self, client: int, weight: float, epoch_step: int, number: int, proceed: Callable[[], int]
    ) -> Served:
        with self.clients.step(epoch_step, number, [client]) as step:
            smashed = step.tokenize()
            predictions = self.server.forward(smashed)
            loss = self.objective(step, predictions) * weight
            proceed()
            step.backward(loss)
            self.sync.begin(step, due=False)()
            return loss.item(), step.gradients()


def build(setup: Setup) -> Psl:
    """Build the server here and the clients on the workers of a joined world."""
    return mpsl.build(setup, Psl)


def _results(futures: list[Future[Served]]) -> list[Served]:
    """Return all results in order, or raise the failure that broke the others off."""
    failures = [error for future in futures if (error := future.exception())]
    for error in failures:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]


def _sum(gradients: Iterable[Mapping[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
    total: dict[Tensor, Tensor] = {}
    for one in gradients:
        for parameter, gradient in one.items():
            total[parameter] = total[parameter] + gradient if parameter in total else gradient
    return total
