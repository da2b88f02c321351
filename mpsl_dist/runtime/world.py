"""The RPC world: start, stop, and objects that live on the workers.

Server and workers are named ``server`` and ``worker1`` ... ``workerW`` after their ranks; where the
server has replicas, these have the ranks between, and are named ``replica1`` ...
"""

from __future__ import annotations

import itertools
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import rpc

from mpsl_dist.errors import Failure, RemoteError
from mpsl_dist.runtime.environment import Environment
from mpsl_dist.runtime.meeting import GENERATION, Notices, number_generation, open_store

SERVER = "server"
#: What the server tells a worker's main thread: ``("end", together)`` or ``("meet", generation)``;
#: a call from afar finds only what a module names. Where data stay with their owners, ``("agreed",
#: 0)`` or ``("refused", why)`` comes first.
Word = tuple[str, Any]
_words: queue.SimpleQueue[Word] = queue.SimpleQueue()
#: What :func:`create` made here, by the number that the server knows it by.
_residents: dict[int, Any] = {}
_numbers = itertools.count()
#: What :func:`settle` keeps its value by.
_HOME = -1
#: Seconds for a worker to take note of a word.
_FAREWELL = 10.0
#: Seconds from leaving a generation until its connections are closed: torch goes on for about 13 s,
#: longer on a busy machine, to tell a lost worker that a backward is over.
_AFTERLIFE = 60.0
#: Seconds after which an agent whose connections do not close is left as it is.
_STUCK = 5.0


def rank_name(rank: int, replicas: int = 1) -> str:
    """Return the RPC name of a rank, where the first ``replicas`` ranks are the server's."""
    if rank == 0:
        return SERVER
    return f"replica{rank}" if rank < replicas else f"worker{rank}"


@dataclass(frozen=True)
class Place:
    """Where a process of the world stands, and how it speaks.

    Attributes
    ----------
    launched : Environment
        Its rank, and where the ranks meet.
    timeout, start_timeout : float
        Seconds for a call, and for all ranks to meet at the start.
    interface : str
        Network interface that TensorPipe listens on.
    tcp_only : bool
        Keep same-host payloads on the socket instead of process-memory reads.
    replicas : int
        How many ranks, from 0, are the server's.
    """

    launched: Environment
    timeout: float
    start_timeout: float
    interface: str
    tcp_only: bool
    replicas: int = 1


class World:
    """This process's part in the RPC world, through all of its generations.

    Parameters
    ----------
    place : Place
    generation : int
        How often the world has been made anew before.

    Raises
    ------
    RemoteError
        If the store where the ranks meet is not reached in time.
    """

    def __init__(self, place: Place, generation: int = 0) -> None:
        self.place = place
        self.launched = place.launched
        self.generation = generation
        #: Agents of generations that were left, and when; those whose connections are closed.
        self._left: list[tuple[Any, float]] = []
        self._ended: list[Any] = []
        os.environ["TP_SOCKET_IFNAME"] = place.interface
        # RPC's start meets in a gloo group, which else goes by what the host's name resolves to.
        os.environ["GLOO_SOCKET_IFNAME"] = place.interface
        # RPC's own barrier uses a process group in a way that warns its user, who can't mend it.
        warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)
        try:
            self.notices = Notices(open_store(self.launched, place.start_timeout))
        except RuntimeError as error:
            raise self._not_met(error, place.start_timeout) from error

    @property
    def workers(self) -> range:
        """The ranks of all workers, and of the server's other replicas, which stay like them."""
        return range(1, self.launched.world)

    def start(self, seconds: float | None = None) -> None:
        """Join this generation; returns when every rank has joined.

        Parameters
        ----------
        seconds : float, optional
            For all to meet, if not the place's.

        Raises
        ------
        RemoteError
            If not all ranks meet in time.
        """
        seconds = seconds or self.place.start_timeout
        number_generation(self.generation, seconds)
        # Shared memory can fail with more than 18 workers on one host: sockets always.
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=16,
            rpc_timeout=seconds,
            init_method=f"{GENERATION}://{self.generation}",
            _transports=["uv"],
            _channels=_channels(self.place),
        )
        try:
            rpc.init_rpc(
                rank_name(self.launched.rank, self.place.replicas),
                rank=self.launched.rank,
                world_size=self.launched.world,
                rpc_backend_options=options,
            )
        except RuntimeError as error:
            raise self._not_met(error, seconds) from error
        rpc._set_rpc_timeout(self.place.timeout)

    def leave(self) -> None:
        """Leave this generation by oneself, if one is in it.

        Its agent lives on for a while, see :data:`_AFTERLIFE`: ``rpc.shutdown(graceful=False)``
        waits for ever, or ends the process, while torch has not done with a worker that was lost.
        """
        if not rpc.api._is_current_rpc_agent_set():
            return
        self._end_agents()
        self._left.append((rpc.api._get_current_rpc_agent(), time.monotonic()))
        rpc.api._destroy_rref_context(True)
        rpc.api._cleanup_python_rpc_handler()
        rpc.api._reset_current_rpc_agent()

    def _end_agents(self) -> None:
        """Close the connections of generations that were left long ago.

        Their agents are kept: to destroy one can end the process, and what they hold is idle.
        """
        now = time.monotonic()
        while self._left and now - self._left[0][1] >= _AFTERLIFE:
            agent, _ = self._left.pop(0)
            self._ended.append(agent)
            ending = threading.Thread(target=agent.shutdown, daemon=True)
            ending.start()
            ending.join(_STUCK)

    def dismiss(self, together: bool = True) -> None:
        """Tell the workers, as the server, that the run is over, and leave with them.

        Parameters
        ----------
        together : bool
            Whether all are there. Otherwise nobody waits for the others, and who does not answer
            is left behind. RPC is then still on: torch aborts a process that takes it down while a
            call to the lost is under way, so the caller ends by
            :func:`mpsl_dist.runtime.process.leave`.

        Raises
        ------
        RemoteError
            If ``together`` and a worker does not answer.
        """
        self.notices.say("over")
        told = tell(self.workers, ("end", together))
        if together:
            silent = [rank for rank in self.workers if rank not in told]
            if silent:
                names = ", ".join(rank_name(rank, self.place.replicas) for rank in silent)
                raise RemoteError(f"{names}: lost at the end of the run")
            stop()

    def _not_met(self, error: RuntimeError, seconds: float) -> RemoteError:
        return RemoteError(
            f"the {self.launched.world} processes did not all meet at {self.launched.address} "
            f"within {seconds:.0f} s (runtime.start_timeout), seen from rank "
            f"{self.launched.rank}: {brief(error)}"
        )


def _channels(place: Place) -> list[str] | None:
    """Return the ways of payloads that RPC chooses from, best first; None for all of torch's."""
    if place.tcp_only:
        return ["basic"]
    # A third one, for several hosts, opens sixteen ports in each process: doors to be shut by
    # whoever knocks there by mistake.
    return ["cma", "basic"] if place.launched.one_host and sys.platform == "linux" else None


def tell(ranks: Iterable[int], word: Word) -> set[int]:
    """Tell workers a word; return the ranks that took note of it."""
    asked = {rank: rpc.rpc_async(rank, _hear, args=(word,), timeout=_FAREWELL) for rank in ranks}
    told = set()
    for rank, answer in asked.items():
        try:
            answer.wait()
            told.add(rank)
        except RuntimeError:
            continue
    return told


def _hear(word: Word) -> None:
    _words.put(word)


def await_word() -> Word:
    """Return the server's next word to this worker, when there is one."""
    return _words.get()


def stop() -> None:
    """Leave the RPC world once every rank does; a worker's, after the word ``end``."""
    rpc.shutdown(graceful=True)


def reference(value: Any) -> rpc.RRef:
    """Return an RRef to an object that lives in this process."""
    return rpc.RRef(value)


def ping(rank: int, timeout: float) -> bool:
    """Return whether a rank answers within ``timeout`` seconds, however busy its Python is.

    An operator of torch answers without Python's lock, which a long call may hold for minutes.
    """
    try:
        rpc.rpc_sync(rank, torch.add, args=(torch.zeros(1), 1), timeout=timeout)
    except RuntimeError:
        return False
    return True


def pong() -> bool:
    """Answer a ping."""
    return True


def create(
    function: Callable[..., Any],
    arguments: Mapping[int, Sequence[Any]],
    timeout: float,
    number: int | None = None,
    who: Callable[[int], str] = rank_name,
) -> tuple[int, dict[int, RemoteError]]:
    """Call ``function`` on workers, all at once; the objects that it returns stay there.

    Parameters
    ----------
    function : callable
        Builds the object.
    arguments : mapping of int to sequence
        Rank -> positional arguments.
    timeout : float
        Seconds until it counts as failed; building clients takes longer than a step.
    number : int, optional
        Of an earlier call, whose objects these join.
    who : callable
        Returns a rank in the user's words.

    Returns
    -------
    number : int
        What every worker knows its object by, see :func:`resident`.
    failed : dict of int to RemoteError
        Rank -> why there is none.
    """
    number = next(_numbers) if number is None else number
    kept = {rank: (number, function, values) for rank, values in arguments.items()}
    _, failed = _call(_keep, kept, timeout, who)
    return number, failed


def ask(
    function: Callable[..., Any], arguments: Mapping[int, Sequence[Any]], timeout: float
) -> dict[int, Any]:
    """Call ``function`` on workers, all at once; return what it returns there, by rank.

    Raises
    ------
    RemoteError
        If a worker is lost, or the function fails.
    """
    answers, failed = _call(function, arguments, timeout)
    for error in failed.values():
        raise error
    return answers


def _call(
    function: Callable[..., Any],
    arguments: Mapping[int, Sequence[Any]],
    timeout: float,
    who: Callable[[int], str] = rank_name,
) -> tuple[dict[int, Any], dict[int, RemoteError]]:
    futures = {
        rank: rpc.rpc_async(rank, _answer, args=(function, tuple(values)), timeout=timeout)
        for rank, values in arguments.items()
    }
    answers, failed = {}, {}
    for rank, future in futures.items():
        try:
            answer = future.wait()
        except RuntimeError as error:
            failed[rank] = RemoteError(f"{who(rank)}: lost in set-up: {brief(error)}")
            continue
        if isinstance(answer, Failure):
            words = f"{who(rank)}: set-up: {answer.message}"
            failed[rank] = RemoteError(words, answer.details, answer.user_error)
        else:
            answers[rank] = answer
    return answers, failed


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        return Failure.of(error)


def _keep(number: int, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    _residents[number] = function(*arguments)


def settle(value: Any) -> None:
    """Keep what this process has of its own, for calls that come to it; see :func:`home`."""
    _residents[_HOME] = value


def home() -> Any:
    """Return what this process settled with."""
    return resident(_HOME)


def resident(number: int) -> Any:
    """Return what :func:`create` made in this process.

    Not by RRefs, which do not outlive the generation of the world that they were made in.

    Raises
    ------
    RuntimeError
        If there is none: this process stands in for a worker that is missing.
    """
    if number not in _residents:
        raise RuntimeError("no clients are hosted here")
    return _residents[number]


def brief(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def set_threads(count: int) -> None:
    """Set torch's compute threads of this process."""
    torch.set_num_threads(max(1, count))
