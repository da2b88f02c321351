"""Workers that are killed, started again and let in: the run equals one process that knows when."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import reference
import torch
import yaml
from conftest import World, until
from test_lost_workers import CONFIG, hosting, lines, steps_done

from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.config import from_dict
from mpsl_dist.data.partition import shares
from mpsl_dist.records import state
from mpsl_dist.runtime import meeting

CLIENTS, WORLD = 6, 4


def test_torch_still_has_the_private_names_that_a_new_generation_sets() -> None:
    """If this fails, torch numbers its worlds in another way: see ``number_generation``."""
    from torch.distributed import rpc
    from torch.distributed.rpc import backend_registry

    assert isinstance(rpc._init_counter, int)
    assert isinstance(rpc.api._all_gather_sequence_id, dict)
    assert backend_registry.rpc_constants is rpc.constants
    before = rpc._init_counter, rpc.constants.DEFAULT_PROCESS_GROUP_TIMEOUT
    try:
        meeting.number_generation(7, 3.0)
        assert rpc._init_counter == 7 and not rpc.api._all_gather_sequence_id
        assert rpc.constants.DEFAULT_PROCESS_GROUP_TIMEOUT.total_seconds() == 3.0
    finally:
        rpc._init_counter, rpc.constants.DEFAULT_PROCESS_GROUP_TIMEOUT = before


@pytest.mark.parametrize(
    ("how", "keeps", "server", "once_more"),
    [
        ("command", None, {}, False),
        pytest.param("command", None, {"replicas": 2}, True, marks=pytest.mark.campaign),
        pytest.param(
            "command", None, {"replicas": 2, "shard": True}, False, marks=pytest.mark.campaign
        ),
        pytest.param("torchrun", 5, {}, True, marks=pytest.mark.campaign),
    ],
)
def test_workers_killed_and_returned_train_as_the_reference_does(
    how: str, keeps: int | None, server: dict, once_more: bool, torchrun, launch, tmp_path: Path
) -> None:
    """Once alone, once two at the same moment, of which one is gone for good; maybe once more."""
    settings = json.loads(json.dumps(CONFIG))
    settings["server"], replicas = server, server.get("replicas", 1)
    settings["faults"] |= {"rejoin": "now", "restarts": 1, "save_clients_every": keeps}
    # Thousands of steps pass while workers are away. Training is chaotic: at the rate of CONFIG
    # the rounding of one sum in another order has grown beyond 1e-9 by then.
    slow = {"server": {"lr": 1e-5}, "client": {"lr": 1e-5}}
    settings["training"] |= {"epochs": 10_000, "precision": "float64"} | slow
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    words = ["-m", "mpsl_dist", "train", str(config)]
    world = launch([sys.executable, *words]) if how == "command" else torchrun(WORLD, *words)
    one, two, three = range(replicas, replicas + 3)
    until(lambda: steps_done(tmp_path) >= 6, 240, "six steps")
    first = kill(world, two)
    came_back(tmp_path, 2)
    kill(world, two, three, but=first)
    came_back(tmp_path, 4)  # worker three's clients; the other is started again only once
    if once_more:
        kill(world, one)
        came_back(tmp_path, 6)
    done = steps_done(tmp_path)
    until(lambda: steps_done(tmp_path) >= done + 10, 120, "ten more steps")
    os.kill(world.rank(0), signal.SIGINT)
    _, output = world.finish(120)
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    returned = 6 if once_more else 4
    assert summary["status"] == "stopped", output
    assert (summary["clients_lost"], summary["clients_returned"]) == (2, returned), output
    assert_equals_the_reference(settings, tmp_path / "runs" / "run", keeps, returned)


def kill(world: World, *ranks: int, but: dict[int, int] | None = None) -> dict[int, int]:
    """Kill the processes that host these workers' clients, all at once; gives rank -> id."""
    found: dict[int, int] = {}

    def there() -> bool:
        for rank in ranks:
            try:
                found[rank] = hosting(world, rank)
            except AssertionError:
                return False
        return not but or all(found.get(rank) != process for rank, process in but.items())

    until(there, 60, "processes that host clients")
    for process in found.values():
        os.kill(process, signal.SIGKILL)
    return found


def came_back(folder: Path, clients: int) -> None:
    def all_have() -> bool:
        return lines(folder)[-1].get("clients_returned", 0) >= clients

    until(all_have, 180, f"{clients} returns")


@dataclass(frozen=True)
class Event:
    """What became of a client before this step (from 0): ``lost``, ``stateless`` or ``back``.

    ``stateless``: it was lost while owners stepped, and only its own state with it.
    """

    what: str
    client: int
    step: int


def history(log: str, steps_per_epoch: int) -> list[Event]:
    found = []
    for line in log.splitlines():
        if back := re.search(r"clients? ([\d, -]+) came back, step (\d+)", line):
            numbers = [n for part in back[1].split(", ") for n in _range(part)]
            found += [Event("back", n, int(back[2])) for n in numbers]
        elif lost := re.search(r"client (\d+) is lost: .* lost in (\w+)(.*)", line):
            what = "stateless" if lost[2] == "step" else "lost"
            found.append(Event(what, int(lost[1]), _step_of(lost, steps_per_epoch)))
    return found


def _step_of(lost: re.Match, steps_per_epoch: int) -> int:
    if epoch := re.match(r", epoch (\d+)", lost[3]):
        return int(epoch[1]) * steps_per_epoch
    return int(re.search(r", step (\d+)", lost[3])[1]) + (lost[2] == "step")


def _range(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def assert_equals_the_reference(
    settings: dict, run: Path, keeps: int | None, returned: int
) -> None:
    chosen = from_dict(settings)
    holdings = Holdings.load(chosen)
    sizes = [len(holdings.of(n)[0]) for n in range(CLIENTS)]
    epoch = len(shares(sizes, chosen.training.batch_size, chosen.client_share))
    events = history((run / "rank0.log").read_text(), epoch)
    steps = steps_done(run.parents[1])
    absent = absences(events, steps)
    told = Returns(events, absent, sizes, keeps)
    expected = reference.train(chosen, steps, lambda n, step: step in absent[n], told.before)
    assert told.welcomed == returned
    losses = [line["loss"] for line in lines(run.parents[1]) if line["split"] == "train"]
    assert losses == pytest.approx(expected["losses"], rel=1e-9)
    checkpoint = run / "checkpoints" / f"step-{steps:08d}"
    server = torch.load(checkpoint / state.SERVER)["model"]
    for key, value in server.items():
        torch.testing.assert_close(value, expected["server"][key], rtol=0, atol=1e-9)
    there = [n for n in range(CLIENTS) if steps - 1 not in absent[n]]
    assert len(there) == 4
    for n in there:
        own = torch.load(checkpoint / state.client_file(n))["tokenizers"]
        for key, value in own.items():
            torch.testing.assert_close(value, expected["clients"][n][key], rtol=0, atol=1e-9)


def absences(events: list[Event], steps: int) -> dict[int, set[int]]:
    absent: dict[int, set[int]] = {n: set() for n in range(CLIENTS)}
    for event in events:
        rest = set(range(event.step, steps))
        if event.what == "back":
            absent[event.client] -= rest
        else:
            absent[event.client] |= rest
    return absent


@dataclass
class Returns:
    """What the reference does before a step: clients that come back begin with a state."""

    events: list[Event]
    absent: dict[int, set[int]]
    sizes: list[int]
    keeps: int | None
    kept: dict[int, tuple[dict, dict]] = field(default_factory=dict)
    welcomed: int = 0

    def before(self, step: int, clients: list, optimizers: list) -> None:
        now = {what: self._who(what, step) for what in ("back", "stateless")}
        if self.keeps and step and step % self.keeps == 0:
            for n in set(range(CLIENTS)) - now["back"] - now["stateless"]:
                if step - 1 not in self.absent[n]:
                    self.kept[n] = copy.deepcopy(
                        (clients[n].state_dict(), optimizers[n].state_dict())
                    )
        others = [n for n in range(CLIENTS) if step not in self.absent[n]]
        others = [n for n in others if n not in now["back"]]
        for n in now["back"]:
            self.welcomed += 1
            if n in self.kept:
                weights, moments = copy.deepcopy(self.kept[n])
                clients[n].load_state_dict(weights)
                optimizers[n].load_state_dict(moments)
            else:
                self._average(others, n, clients)
                optimizers[n].state.clear()

    def _who(self, what: str, step: int) -> set[int]:
        return {e.client for e in self.events if (e.what, e.step) == (what, step)}

    def _average(self, others: list[int], client: int, clients: list) -> None:
        total = sum(self.sizes[n] for n in others)
        for parts in zip(*[c.parameters() for c in clients], strict=True):
            mean = sum(parts[n].data * self.sizes[n] / total for n in others)
            parts[client].data.copy_(mean)
