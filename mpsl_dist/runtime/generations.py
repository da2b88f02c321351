"""How the world is made anew when lost workers come back.

The server tells all that are left to meet again (*words*, over RPC), and leaves. From there on they
speak by the run's store: whoever has left says that it is ``here``, the server says who takes part
(the *plan*), all start RPC again, and the server says whether that worked or is tried once more
without those that died meanwhile. Living processes keep their clients in memory and their numbers;
at the place of a worker that is still missing stands a process that hosts nobody
(:mod:`mpsl_dist.runtime.standin`), because torch wants every number filled.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, replace

from mpsl_dist.errors import LaunchError, RemoteError
from mpsl_dist.runtime import process
from mpsl_dist.runtime.world import World, tell

#: Seconds for the ranks of a generation to say that they are here, and to start RPC.
_MEET = 60.0
#: How often a generation is tried before the run ends.
_TRIES = 4
#: Seconds between two looks of a worker that came back.
_LOOK = 0.2
_log = logging.getLogger("mpsl_dist")


class Generations:
    """The server's side.

    Parameters
    ----------
    world : World
        The first generation, joined.
    admit : callable
        ``admit(ranks, seconds)`` lets workers in that prove the run's token.
    """

    def __init__(self, world: World, admit: Callable[[Collection[int], float], None]) -> None:
        self.world = world
        self._admit = admit
        self._seen: dict[int, str] = {}
        self._returns: str | None = None
        self._calls = 0
        self._standins: dict[int, subprocess.Popen] = {}

    def waiting(self) -> set[int]:
        """Return the ranks of workers that have come back and wait to be let in."""
        count = self.world.notices.told("returns")
        if count == self._returns:  # one look at the store where nobody has come back
            return set()
        self._returns = count
        said = {rank: self.world.notices.told(f"back/{rank}") for rank in self.world.workers}
        return {rank for rank, count in said.items() if count and count != self._seen.get(rank)}

    def renew(self, back: Collection[int]) -> set[int]:
        """Make the world anew with these; return the ranks of all workers that are in it.

        Raises
        ------
        RemoteError
            If the world can't be made anew.
        """
        world, following = self.world, self.world.generation + 1
        living = tell(set(world.workers) - set(back) - self._standins.keys(), ("meet", following))
        world.leave()
        world.notices.say(f"left/{following}")
        _log.info("generation %d: ranks %s left, %s came back", following, living, set(back))
        expected = living | self._call(back, following)
        for generation in range(following, following + _TRIES):
            expected = self._gather(generation, expected)
            try:
                self._meet(generation, expected)
                _log.info("generation %d: ranks %s met", generation, expected)
                return expected
            except RemoteError as error:
                _log.warning("generation %d: %s", generation, error)
                failure = error
        raise failure

    def _call(self, ranks: Collection[int], generation: int) -> set[int]:
        """Call workers that came back to this generation; return those that are let in."""
        self._calls += 1
        for rank in ranks:
            self._seen[rank] = self.world.notices.told(f"back/{rank}") or ""
            self.world.notices.say(f"call/{rank}", f"{generation} {self._calls}")
        try:
            self._admit(ranks, _MEET)
        except (LaunchError, RemoteError) as error:
            _log.warning("%s", error)
            return set()
        return set(ranks)

    def _gather(self, generation: int, expected: set[int]) -> set[int]:
        """Wait for these, and for who comes back meanwhile; return who is here."""
        deadline = time.monotonic() + _MEET
        while True:
            here = {
                r for r in expected if self.world.notices.told(_here(generation, r)) is not None
            }
            if here == expected or time.monotonic() > deadline:
                return here
            if back := self.waiting():
                expected = expected | self._call(back, generation)
            time.sleep(_LOOK / 10)

    def _meet(self, generation: int, present: set[int]) -> None:
        world = self.world
        self._fill(generation, set(world.workers) - present)
        world.notices.say(f"plan/{generation}", json.dumps(sorted(present)))
        world.generation = generation
        try:
            world.start(_MEET)
        except RemoteError:
            world.leave()
            world.notices.say(f"outcome/{generation}", "again")
            raise
        world.notices.say(f"outcome/{generation}", "met")

    def _fill(self, generation: int, missing: set[int]) -> None:
        """Start a process at the place of every missing worker, on this host."""
        for old in self._standins.values():
            old.kill()
            old.wait()
        self._standins = {}
        for rank in sorted(missing):
            launched = replace(self.world.launched, rank=rank)
            place = asdict(replace(self.world.place, launched=launched, start_timeout=_MEET))
            words = json.dumps({"place": place, "generation": generation})
            line = [sys.executable, "-m", "mpsl_dist.runtime.standin", words]
            self._standins[rank] = subprocess.Popen(line, env=os.environ | {"RANK": str(rank)})


def come_back(world: World, count: int, enter: Callable[[Collection[int], float], None]) -> bool:
    """Wait, as a worker started again for the ``count``-th time, until the server lets it in.

    Parameters
    ----------
    enter : callable
        ``enter((), seconds)`` proves the run's token to the server.

    Returns
    -------
    bool
        Whether it did; False where the run has ended without it.
    """
    rank = world.launched.rank
    before = world.notices.told(f"call/{rank}")
    world.notices.say(f"back/{rank}", count)
    world.notices.count("returns")
    while (called := world.notices.told(f"call/{rank}")) == before:
        if world.notices.told("over") is not None:
            return False
        time.sleep(_LOOK)
    assert called is not None
    enter((), _MEET)
    _attend(world, int(called.split()[0]))
    return True


def follow(world: World, generation: int) -> None:
    """Leave the world with the server, and meet in its next generation."""
    world.notices.wait(f"left/{generation}", 2 * _MEET)
    world.leave()
    _attend(world, generation)


def _attend(world: World, generation: int) -> None:
    """Meet, again if need be; a worker that comes too late ends, to be started again."""
    rank = world.launched.rank
    while True:
        world.notices.say(_here(generation, rank))
        if rank not in json.loads(world.notices.wait(f"plan/{generation}", 4 * _MEET)):
            process.leave(1)
        world.generation, started = generation, True
        try:
            world.start(_MEET)
        except RemoteError:
            started = False
        met = world.notices.wait(f"outcome/{generation}", 2 * _MEET) == "met"
        if met and started:
            return
        world.leave()
        if met:
            process.leave(1)
        generation += 1


def _here(generation: int, rank: int) -> str:
    return f"here/{generation}/{rank}"
