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

from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.runtime import rpc

#: What one client's backward leaves: its weighted loss, and the server's gradients.
Served = tuple[float, dict[Tensor, Tensor]]


class Psl(Mpsl):
    """As :class:`Mpsl`, but with one server forward and backward per client."""

    def step(self, epoch_step: int, step: int) -> float:
        """Train one step; gives the global loss."""
        sizes = {n: int(size) for n, size in enumerate(self.plan[epoch_step]) if size}
        total = sum(sizes.values())
        # Parameters wait until every client's loss is known to be finite.
        all_finite = threading.Barrier(len(sizes))

        def serve(client: int) -> Served:
            try:
                return self._serve(client, sizes[client] / total, epoch_step, step, all_finite.wait)
            except Exception:
                all_finite.abort()
                raise

        # An autograd context belongs to its thread, so every client has one of each.
        with ThreadPoolExecutor(len(sizes)) as threads:
            served = _results([threads.submit(serve, client) for client in sizes])
        self.server.step(step, _sum(gradients for _, gradients in served))
        self._synchronise(step)
        return sum(loss for loss, _ in served)

    def _serve(
        self, n: int, weight: float, epoch_step: int, step: int, proceed: Callable[[], int]
    ) -> Served:
        where = f"step {step}"
        with rpc.autograd_context() as context:
            smashed = self.clients.call("tokenize", {n: (epoch_step,)}, where)
            predictions = self.server.forward(smashed)
            loss = self._clients_loss(predictions, epoch_step, step) * weight
            self._count(smashed)
            proceed()
            self._backward(context, loss, where)
            if self.experiment.model.train_tokenizers:
                summed = self.experiment.tokenizer_sync.mode == "gradients"
                method, arguments = ("accumulate", ()) if summed else ("step", (step,))
                self.clients.call(method, {n: arguments}, where, context)
            return loss.item(), context.gradients()

    def _synchronise(self, step: int) -> None:
        sync, where = self.experiment.tokenizer_sync, f"step {step}"
        due = (step + 1) % sync.every == 0 or step + 1 == self.total_steps
        if not due or not self.experiment.model.train_tokenizers:
            return
        if sync.mode == "gradients":
            nothing_more: dict[Tensor, Tensor] = {}
            answers = self.clients.call("take_gradients", self._everyone(nothing_more), where)
            self._step_on_sum(answers, step, where)
        elif sync.mode == "weights":
            self._average_weights(where)


def _results(futures: list[Future[Served]]) -> list[Served]:
    """Give all results in order, or raise the failure that broke the others off."""
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
