"""What a further client costs, and what many of them share."""

from __future__ import annotations

import gc
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import toys
from local_fleet import in_one_process, steps_of

from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.analysis.cost import cost_of
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.runtime.answers import name_clients

#: More than the server averages at once.
MANY = 80


def many(**changes: Any) -> Experiment:
    training = to_dict(toys.experiment())["training"] | {"batch_size": 90}
    data = {"partition": {"kind": "iid"}}
    return toys.experiment(**{"clients": MANY, "training": training, "data": data} | changes)


def held(*roots: object) -> dict[int, int]:
    """Bytes of every storage that is reachable from objects, by its address."""
    found, seen, waiting = {}, set(), list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(
            one, type | ModuleType | FunctionType | BuiltinFunctionType
        ):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, np.ndarray):
            found[one.__array_interface__["data"][0]] = one.nbytes
        waiting.extend(gc.get_referents(one))
    return found


def trained(method: Mpsl) -> int:
    return sum(p.nbytes for p in method.clients.references[0].parameters())


@pytest.mark.parametrize("mode", ["none", "gradients"])
def test_a_further_client_takes_four_times_what_it_trains_and_its_index(mode: str) -> None:
    sync = {"mode": mode, "every": 2}  # the third step's gradients are kept
    taken = []
    for clients in (5, 6):
        method = in_one_process(toys.experiment(clients=clients, tokenizer_sync=sync))
        steps_of(method, 3)
        method.begin_epoch(1)  # the last mini-batch is put away
        taken.append(sum(held(method.clients.fleet.host).values()))
    index = method.clients.references[5].data.indices.nbytes
    further = taken[1] - taken[0]
    assert 3 * trained(method) <= further <= 4 * trained(method) + index


def test_clients_of_a_host_share_what_is_frozen_and_the_data_and_nothing_that_is_trained() -> None:
    method = in_one_process(toys.experiment())
    one, other = (held(method.clients.references[n]) for n in (0, 1))
    shared = set(one) & set(other)
    tokenizers = method.clients.references[0].tokenizers.local_value()
    for p in tokenizers.parameters():
        assert (p.data_ptr() in shared) == (not p.requires_grad)
    for x in (*method.splits.train.inputs.values(), *method.splits.test.inputs.values()):
        assert x.data_ptr() in shared


@pytest.mark.parametrize("test_at", ["server", "clients"])
def test_a_worker_keeps_the_samples_of_its_own_clients_alone(test_at: str) -> None:
    everything = Holdings.load(toys.experiment(data={"test_at": test_at}))
    numbers = [1, 3]
    own = everything.only(numbers)
    sizes = [everything.sizes[n] for n in numbers]
    assert len(own.splits.train.labels) == sum(sizes) < len(everything.splits.train.labels)
    assert len(own.splits.test.labels) == sum(len(everything.tests[n]) for n in numbers)
    for n, size in zip(numbers, sizes, strict=True):
        before, after = everything.of(n), own.of(n)
        for data in (before[0], after[0]):
            data.begin_epoch(0, [size])
        for data in (before[1], after[1]):
            data.lay_out([len(data)])
        for one, other in zip(before, after, strict=True):
            was, now = one.batch(0), other.batch(0)
            assert torch.equal(was.labels, now.labels)
            assert all(torch.equal(was.inputs[name], now.inputs[name]) for name in was.inputs)


def average_of(method: Mpsl) -> dict[str, torch.Tensor]:
    link = method.clients
    return link.mean_tokenizers(link.present, method.sizes, "step 3", "sync_up")


def expected_average(method: Mpsl, clients: list[int]) -> dict[str, torch.Tensor]:
    """The mean of all at once."""
    states = {n: method.clients.references[n].tokenizer_weights() for n in clients}
    total = sum(method.sizes[n] for n in clients)
    parts = {n: method.sizes[n] / total for n in clients}
    return {
        name: torch.stack([states[n][name].double() * parts[n] for n in clients]).sum(0).float()
        for name in states[clients[0]]
    }


@pytest.fixture(scope="module")
def drifted() -> Mpsl:
    """Many clients with tokenizers of their own."""
    method = in_one_process(many(faults={"on_nonfinite": "skip_client"}))
    steps_of(method, 2)
    return method


def test_tokenizers_are_averaged_as_they_come_and_few_are_there_at_once(drifted: Mpsl) -> None:
    drifted.clients.calls.clear()
    found = average_of(drifted)
    assert [len(asked) for _, asked in drifted.clients.calls] == [64, 16]
    for name, value in expected_average(drifted, list(range(MANY))).items():
        # A sum in float64 in another order may round to the next float32.
        torch.testing.assert_close(found[name], value, rtol=2.5e-7, atol=0)


def test_whoever_is_left_out_or_lost_on_the_way_is_in_no_average(
    drifted: Mpsl, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = {"x": torch.full((1,), torch.nan)}
    clients, link = drifted.clients.references, drifted.clients
    for n in range(64):  # all that are asked at first
        monkeypatch.setattr(clients[n], "tokenizer_weights", lambda: spoiled)
    monkeypatch.setattr(clients[70], "tokenizer_weights", lambda: 1 / 0)
    monkeypatch.setattr(link, "lost", set())
    found = average_of(drifted)
    monkeypatch.undo()
    others = [n for n in range(64, MANY) if n != 70]
    for name, value in expected_average(drifted, others).items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)


def test_very_many_clients_are_not_all_named() -> None:
    numbers = [*range(0, 1000, 4)]
    assert name_clients(numbers).startswith("clients 0, 4, 8, ")
    assert name_clients(numbers).endswith(" and 225 more")
    assert name_clients(range(250)) == "clients 0-249"


def test_cost_says_what_a_workers_clients_take() -> None:
    chosen = many(clients_per_worker=20)
    small = {"data": {"name": "digits-qa"}}
    changed = to_dict(chosen) | small
    changed["plugins"] = []
    found = cost_of(toys.from_dict(changed))

    def of(owner: str, part: str) -> float:
        return found.value("memory", "mpsl", owner, part, "peak")

    shared, all_own = of("worker", "frozen, once"), of("worker", "clients' own, 20 times")
    assert of("worker", "total") == shared + all_own
    assert shared + all_own / 20 == of("client", "total") > shared > 0
