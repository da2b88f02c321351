"""Where the seconds of a step go: watches that are laid around methods from outside.

No actor, link or method knows of it. On a GPU every change of phase waits until the device has
done what it was asked, so that its work counts where it was asked for.
"""

from __future__ import annotations

import functools
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mpsl_dist.actors.client import Client
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.references import Local
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.methods.centralized import Centralized
from mpsl_dist.methods.hosting import build_clients
from mpsl_dist.methods.method import Method
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.split_link import Step
from mpsl_dist.records.traffic import KINDS

#: Phase of a step -> what a reader sees.
PHASES = {
    "data": "read data",
    "tokenize": "tokenize",
    "send": "send",
    "forward": "encoder forward",
    "loss": "loss round trip",
    "backward": "backward",
    "owners": "owners' step",
    "rest": "rest",
}
#: What a client does on these messages is its part of the phase.
_MESSAGES = {
    "tokenize": "tokenize",
    "loss": "loss",
    "pairs": "loss",
    "step": "owners",
    "accumulate": "owners",
    "take_gradients": "owners",
    "step_on_sum": "owners",
}
#: Seconds by phase.
Seconds = dict[str, float]


class Watch:
    """Adds up the seconds of phases; within a phase, an inner one's time is its own alone.

    Parameters
    ----------
    device : str
        Where the work is done.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        #: Thread -> its seconds.
        self._seconds: dict[int, Seconds] = {}
        self._here = threading.local()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens within, on this thread, as this phase."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def lay(self, owner: Any, name: str, phase: str) -> None:
        """Have a method of an object count as a phase."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.phase(phase):
                return inner(*arguments, **options)

        setattr(owner, name, timed)

    def lay_wait(self, owner: Any, name: str, phase: str) -> None:
        """The same for one that begins something and returns a function that waits for its end."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*arguments: Any) -> Callable[[], Any]:
            with self.phase(phase):
                wait = inner(*arguments)

            def timed_wait() -> Any:
                with self.phase(phase):
                    return wait()

            return timed_wait

        setattr(owner, name, timed)

    def take(self) -> tuple[Seconds, Seconds]:
        """Return what this thread and what all others have spent, and begin again from zero."""
        threads, self._seconds = self._seconds, {}
        own = threads.pop(threading.get_ident(), {})
        return own, _sum(threads.values())

    @property
    def _open(self) -> list[str]:
        if not hasattr(self._here, "open"):
            self._here.open = []
        return self._here.open

    def _charge(self) -> None:
        """Count the time since the last change of phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            own = self._seconds.setdefault(threading.get_ident(), {})
            name = self._open[-1]
            own[name] = own.get(name, 0.0) + now - self._here.since
        self._here.since = now


def _sum(parts: Iterable[Mapping[str, float]]) -> Seconds:
    total: Seconds = {}
    for part in parts:
        for name, seconds in part.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


# -- at the clients ----------------------------------------------------------------------------


def build_timed_clients(
    experiment: Experiment,
    numbers: Sequence[int],
    holdings: Holdings,
    reference: Callable[[Any], Any] = Local,
) -> list[Client]:
    """Build clients as :func:`~mpsl_dist.methods.hosting.build_clients`, with a watch each.

    They understand two messages more, whose answers are numbers of seconds and bytes:
    ``take_seconds`` and ``peak_memory``.
    """
    clients = build_clients(experiment, numbers, holdings, reference)
    for client in clients:
        watch = Watch(client.device)
        watch.lay(client.data, "batch", "data")
        for message, phase in _MESSAGES.items():
            watch.lay(client, message, phase)
        client.take_seconds = lambda watch=watch: _sum(watch.take())
        client.peak_memory = peak_memory
    return clients


def peak_memory() -> dict[str, int]:
    """Return the most bytes that this process has held so far: resident, and on GPUs allocated."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        found["gpu"] = sum(map(torch.cuda.max_memory_allocated, devices))
    return found


# -- at the server -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What was measured of one step.

    Attributes
    ----------
    seconds : float
    phases : dict of str to float
        Seconds by phase, of :data:`PHASES`; they add up to ``seconds``.
    slowest_worker : dict of str to float
        The most seconds that a worker spent by itself on its part of each phase.
    sent : dict of str to int
        Bytes of tensors by kind, of all clients.
    """

    seconds: float
    phases: Seconds
    slowest_worker: Seconds
    sent: dict[str, int]


class Timed:
    """A method with a watch around it.

    Parameters
    ----------
    method : Method
        MPSL, naive PSL or centralized training; where it has clients, those of
        :func:`build_timed_clients`.
    device : str
        The server's.
    """

    def __init__(self, method: Method, device: str) -> None:
        self.method = method
        self.watch = Watch(device)
        lay = _around_centralized if isinstance(method, Centralized) else _around_split
        lay(method, self.watch)

    def turn(self, epoch_step: int, number: int) -> Turn:
        """Train a step, and return what was measured of it."""
        method = self.method
        before = method.traffic.totals()
        with self.watch.phase("rest"):
            method.step(epoch_step, number)
        sent = method.traffic.since(before)["by_kind"]
        own, others = self.watch.take()
        seconds = sum(own.values())
        if method.clients is None:
            return Turn(seconds, split(own, others, []), {}, sent)
        link = method.clients
        clients = link.start("take_seconds", link.everyone(), f"step {number}")()
        workers = [_sum([clients[n] for n in hosted]) for hosted in link.fleet.hosted.values()]
        slowest = {
            phase: max(worker.get(phase, 0.0) for worker in workers)
            for phase in dict.fromkeys(_MESSAGES.values(), 0.0) | {"data": 0.0}
        }
        if facts_of(method.experiment).backwards == "one":
            waited_for = [max(workers, key=_first)]
        else:
            waited_for = list(clients.values())
        return Turn(seconds, split(own, others, waited_for), slowest, sent)


def _first(seconds: Mapping[str, float]) -> float:
    return seconds.get("data", 0.0) + seconds.get("tokenize", 0.0)


def _around_centralized(method: Centralized, watch: Watch) -> None:
    learner = method.learner
    for data in method.held:
        watch.lay(data, "batch", "data")
    watch.lay(learner.model.tokenizers, "forward", "tokenize")
    watch.lay(learner.model.server_model, "forward", "forward")
    watch.lay(learner, "loss", "loss")
    watch.lay(learner, "gradients", "backward")
    for stepper in learner.steppers.values():
        watch.lay(stepper, "step", "owners")


def _around_split(method: Mpsl, watch: Watch) -> None:
    link, opened = method.clients, method.clients.step

    @contextmanager
    def step(*arguments: Any) -> Iterator[Step]:
        with watch.phase("rest"), opened(*arguments) as one:
            watch.lay(one, "tokenize", "send")  # what workers do of it is taken off in split
            for name in ("loss", "pairs"):
                watch.lay(one, name, "loss")
            watch.lay(one, "backward", "backward")
            for name in ("step_clients", "accumulate", "take_gradients"):
                watch.lay_wait(one, name, "owners")
            yield one

    link.step = step
    watch.lay(method.server, "forward", "forward")
    watch.lay(method.server, "step", "owners")
    watch.lay(method, "step_owners", "owners")
    for name in ("take_gradients", "step_on_sum", "tokenizer_weights", "set_tokenizer_weights"):
        watch.lay(link, name, "owners")


def split(
    own: Mapping[str, float], others: Mapping[str, float], waited_for: Sequence[Seconds]
) -> Seconds:
    """Return the seconds of a step by phase; they add up to ``own``'s sum.

    Parameters
    ----------
    own : mapping of str to float
        What the thread spent that trains the step.
    others : mapping of str to float
        What other threads spent for it while that one rested. They overlap (naive PSL has one for
        every client), so each of their phases has its share of the rest.
    waited_for : sequence of dict
        The own seconds of every worker (or client) that tokenized while the server waited: part of
        ``send`` until now.
    """
    within = dict.fromkeys(PHASES, 0.0) | dict(others or own)
    for seconds in waited_for:
        for phase in ("data", "tokenize"):
            moved = min(seconds.get(phase, 0.0), within["send"])
            within[phase] += moved
            within["send"] -= moved
    if not others:
        return within
    overlap = own.get("rest", 0.0) / sum(others.values())
    return {
        phase: seconds * overlap + (own.get(phase, 0.0) if phase != "rest" else 0.0)
        for phase, seconds in within.items()
    }


def directions(sent: Mapping[str, float]) -> dict[str, float]:
    """Return bytes ``up`` and ``down`` of bytes by kind."""
    return {
        way: sum(count for kind, count in sent.items() if KINDS[kind][0] == way)
        for way in ("up", "down")
    }
