"""How ranks meet again: who comes, who does not, and who dies on the way. RPC itself is faked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from mpsl_dist.errors import LaunchError, RemoteError
from mpsl_dist.runtime import generations, world
from mpsl_dist.runtime.generations import Generations, come_back, follow
from mpsl_dist.runtime.meeting import Notices

WORLD = 4


@dataclass
class FakedWorld:
    """Starts unless ``fails`` says otherwise of its rank and generation."""

    store: Any
    rank: int
    fails: Callable[[int, int], bool] = lambda rank, generation: False
    generation: int = 0
    started: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.notices = Notices(self.store)
        self.launched = SimpleNamespace(rank=self.rank, world=WORLD)
        self.workers = range(1, WORLD)

    def start(self, seconds: float) -> None:
        if self.fails(self.rank, self.generation):
            raise RemoteError("somebody died while all met")
        self.started.append(self.generation)

    def leave(self) -> None:
        pass


def proved(ranks, seconds: float) -> None:
    """No token is asked for."""


class Left(Exception):
    """A process ended itself."""


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch):
    """``meet(living, back, fails)``: the server's answer, and what became of every worker."""
    monkeypatch.setattr(generations, "_MEET", 0.5)
    monkeypatch.setattr(generations, "_LOOK", 0.01)
    filled: list[set[int]] = []
    monkeypatch.setattr(Generations, "_fill", lambda self, g, missing: filled.append(missing))

    def end(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(generations.process, "leave", end)
    with ThreadPoolExecutor(8) as threads:

        def meet(
            living: set[int],
            back: set[int],
            fails: Callable[[int, int], bool] = lambda rank, generation: False,
            dead: set[int] = frozenset(),
            admit: Callable[..., None] = proved,
            later: set[int] = frozenset(),
        ) -> tuple[set[int], dict[int, FakedWorld], dict[int, Future]]:
            store = HashStore()
            worlds = {rank: FakedWorld(store, rank, fails) for rank in range(WORLD)}
            futures: dict[int, Future] = {}

            def tell(ranks, word):
                for rank in living - dead:
                    futures[rank] = threads.submit(follow, worlds[rank], word[1])
                for rank in later:
                    futures[rank] = threads.submit(come_back, worlds[rank], 1, proved)
                return living

            monkeypatch.setattr(generations, "tell", tell)
            server = Generations(worlds[0], admit)
            for rank in back:
                futures[rank] = threads.submit(come_back, worlds[rank], 1, proved)
            while server.waiting() != back:
                pass
            here = server.renew(back)
            return here, worlds, futures

        meet.filled = filled
        yield meet


def test_the_living_and_those_who_came_back_meet_in_the_next_generation(meeting) -> None:
    here, worlds, futures = meeting({1, 3}, {2})
    assert here == {1, 2, 3} and meeting.filled == [set()]
    for future in futures.values():
        future.result(10)
    assert all(world.started == [1] for world in worlds.values())
    assert not Generations(worlds[0], proved).waiting() - {2}


def test_who_is_missing_is_stood_in_for(meeting) -> None:
    here, _, futures = meeting({1}, {2})
    assert here == {1, 2} and meeting.filled == [{3}]
    for future in futures.values():
        future.result(10)


def test_who_dies_on_the_way_is_left_out(meeting) -> None:
    here, _, _ = meeting({1, 3}, {2}, dead={3})
    assert here == {1, 2} and meeting.filled == [{3}]


def test_a_generation_that_fails_is_met_again(meeting) -> None:
    here, worlds, futures = meeting({1, 3}, {2}, fails=lambda rank, generation: generation == 1)
    assert here == {1, 2, 3}
    for future in futures.values():
        future.result(10)
    assert all(world.started == [2] and world.generation == 2 for world in worlds.values())


def test_a_worker_that_alone_fails_to_meet_ends_to_be_started_again(meeting) -> None:
    _, worlds, futures = meeting({1, 3}, {2}, fails=lambda rank, generation: rank == 3)
    with pytest.raises(Left):
        futures[3].result(10)
    for rank in (1, 2):
        futures[rank].result(10)
    assert worlds[1].started == worlds[2].started == [1]


def test_the_run_ends_where_no_generation_meets(meeting) -> None:
    with pytest.raises(RemoteError, match="somebody died"):
        meeting({1, 3}, {2}, fails=lambda rank, generation: rank == 0)


def test_who_does_not_prove_the_token_stays_out(meeting) -> None:
    def refuse(ranks, seconds: float) -> None:
        raise LaunchError("rank 2 disagrees")

    here, _, _ = meeting({1, 3}, {2}, admit=refuse)
    assert here == {1, 3} and meeting.filled == [{2}]


def test_a_worker_that_comes_back_to_a_run_that_is_over_is_told(monkeypatch) -> None:
    store = HashStore()
    Notices(store).say("over")
    assert come_back(FakedWorld(store, 2), 1, proved) is False


def test_a_call_to_its_dead_predecessor_is_not_a_workers_own(monkeypatch) -> None:
    monkeypatch.setattr(generations, "_LOOK", 0.01)
    store = HashStore()
    notices, world = Notices(store), FakedWorld(store, 2)
    notices.say("call/2", 5)
    with ThreadPoolExecutor(1) as threads:
        returned = threads.submit(come_back, world, 2, proved)
        while notices.told("back/2") is None:
            pass
        assert not returned.done()
        notices.say("call/2", 6)
        notices.say("plan/6", [2])
        notices.say("outcome/6", "met")
        assert returned.result(10) is True
    assert world.started == [6]


def test_who_comes_back_meanwhile_is_let_in_too(meeting) -> None:
    """Rank 1 died on its way out, and its successor comes back while the others wait."""
    here, worlds, futures = meeting({1, 3}, {2}, dead={1}, later={1})
    assert here == {1, 2, 3}
    for future in futures.values():
        future.result(10)
    assert worlds[1].started == [1]


def test_a_step_in_which_nobody_comes_back_costs_one_look_at_the_store() -> None:
    server = Generations(FakedWorld(HashStore(), 0), proved)
    looked, told = [], server.world.notices.told
    server.world.notices.told = lambda key: looked.append(key) or told(key)
    assert server.waiting() == set() and len(looked) == 1


def test_an_agent_is_ended_long_after_it_was_left_and_never_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over, asked, reset, api = threading.Event(), [], [], world.rpc.api
    monkeypatch.setattr(world, "_STUCK", 0.05)
    monkeypatch.setattr(api, "_is_current_rpc_agent_set", lambda: True)
    agents = [
        SimpleNamespace(shutdown=lambda n=n: asked.append(n) or over.wait(10)) for n in range(3)
    ]
    current = iter(agents)
    monkeypatch.setattr(api, "_get_current_rpc_agent", lambda: next(current))
    monkeypatch.setattr(api, "_destroy_rref_context", lambda ignore: None)
    monkeypatch.setattr(api, "_cleanup_python_rpc_handler", lambda: None)
    monkeypatch.setattr(api, "_reset_current_rpc_agent", lambda: reset.append(True))
    member = world.World.__new__(world.World)
    member._left, member._ended = [], []
    member.leave()
    member.leave()
    assert not asked and len(reset) == 2
    monkeypatch.setattr(world, "_AFTERLIFE", 0.0)
    member.leave()
    over.set()
    assert asked == [0, 1] and len(reset) == 3
    assert member._ended == agents[:2] and [agent for agent, _ in member._left] == agents[2:]
