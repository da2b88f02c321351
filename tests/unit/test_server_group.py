"""What the configuration, the ranks and the shares of a group of replicas are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys

from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.server import Server
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import processes_of, unread
from mpsl_dist.errors import ConfigError, RemoteError
from mpsl_dist.methods import server_group
from mpsl_dist.methods.server_group import Replica, ServerGroup, build_server, shares
from mpsl_dist.models.gapped import Crossing, Gapped, converted, tensors_of
from mpsl_dist.runtime.placement import gpu_of, replicas_here
from mpsl_dist.runtime.replicas import _buckets
from mpsl_dist.runtime.world import rank_name


def test_a_group_adds_its_replicas_to_the_processes() -> None:
    chosen = toys.experiment(clients_per_worker=2, server={"replicas": 3})
    assert processes_of(chosen) == 5 and unread(chosen) == []
    names = [rank_name(rank, 3) for rank in range(5)]
    assert names == ["server", "replica1", "replica2", "worker3", "worker4"]


@pytest.mark.parametrize("method", ["psl", "fedavg", "fedclip", "centralized"])
def test_methods_without_a_group_refuse_replicas(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"server.replicas: 2, but method={method} has one"):
        toys.experiment(method=method, server={"replicas": 2})


def test_more_replicas_than_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"server.replicas: 5 for 4 clients"):
        toys.experiment(server={"replicas": 5})
    with pytest.raises(ConfigError, match=r"server.replicas: must be at least 1"):
        toys.experiment(server={"replicas": 0})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"server": {"shard": True}}, "needs server.replicas of at least 2"),
        ({"training": {"compile": True}}, "not with training.compile"),
        ({"training": {"autocast": "bf16"}}, "not with training.autocast"),
        ({"wire": {"cache_prefix": True}}, "wire.cache_prefix: one replica alone"),
        ({"method": "psl", "server": {"replicas": 1, "shard": True}}, "server.shard"),
    ],
)
def test_what_shards_cannot_be_had_with_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        toys.experiment(**{"server": {"replicas": 2, "shard": True}} | changes)


def test_replicas_have_the_first_gpus_to_themselves_where_there_are_more() -> None:
    assert [gpu_of(rank, 4, replicas=2) for rank in range(7)] == [0, 1, 2, 3, 2, 3, 2]
    assert [gpu_of(rank, 2, replicas=2) for rank in range(5)] == [0, 1, 0, 1, 0]
    assert [replicas_here(3, first, 2) for first in (0, 2, 4)] == [2, 1, 0]


def smashed(sizes: Sequence[int]) -> dict[int, list[torch.Tensor]]:
    return {10 + n: [torch.randn(size, 11, 16)] for n, size in enumerate(sizes)}


def test_every_client_is_whole_in_one_share_and_shares_are_about_equal() -> None:
    held = smashed([6, 1, 5, 2])
    dealt = shares(held, 2)
    assert [sorted(share) for share in dealt] == [[10, 11], [12, 13]]
    assert all(share[n][0] is held[n][0] for share in dealt for n in share)
    assert [len(share) for share in shares(smashed([3]), 3)] == [1, 0, 0]


class Others:
    """One more replica, in this process, that keeps what it is told."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.told: list[tuple[str, Any]] = []

    def start(self, message: str, arguments: Sequence[Sequence[Any]]) -> Any:
        self.told.append((message, arguments[0]))
        answer = getattr(self.replica, message)(*arguments[0])
        return lambda: [answer]


def group_of_two(toy: Experiment | None = None) -> tuple[ServerGroup, Others]:
    toy, splits = toy or toys.experiment(server={"replicas": 2}), toys.load(("image", "text"))
    own, other = (Replica(build_server(toy, splits, [5, 6])) for _ in range(2))
    others = Others(other)
    return ServerGroup(own, others, 2, lambda: other.server.model), others


def gradients_of(replica: Replica) -> list[torch.Tensor]:
    return [p.grad for p in replica.server.model.parameters()]


def test_a_group_predicts_what_one_server_does_and_each_client_is_served_once() -> None:
    (group, others), held = group_of_two(), smashed([6, 1, 5, 2])
    predictions = group.forward(held)
    assert list(predictions) == list(held)
    alone = group.own.server.forward(held)
    for client, slice_bk in predictions.items():
        torch.testing.assert_close(slice_bk, alone[client])
    ((message, (share, asked)),) = others.told
    assert (
        message == "forward" and sorted(share) == [12, 13] and asked == {12: [False], 13: [False]}
    )
    with torch.no_grad():  # a test is replica 0's alone
        group.forward(held)
    assert len(others.told) == 1


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_so_it_is_with_samples_that_lack_parts(fusion: str) -> None:
    """One client has no texts, one whole mini-batches, two lack parts of some samples."""
    torch.manual_seed(0)
    toy = toys.experiment(server={"replicas": 2}, model={"fusion": fusion})
    (group, _), alone = group_of_two(toy), build_server(toy, toys.load(("image", "text")), [5, 6])
    masks = {n: torch.tensor([[1, n % 3 > 0], [1, n > 0], [n < 2, 1]]) > 0 for n in range(4)}
    masks[0][:, 1], masks[0][2, 0] = False, True
    held: dict[int, Crossing] = {
        n: Gapped(
            tuple(
                torch.randn(rows, length, 16)
                for rows, length in zip(present.sum(0).tolist(), (5, 6), strict=True)
                if rows
            ),
            present,
        )
        for n, present in masks.items()
    }
    whole = [torch.randn(3, 5, 16), torch.randn(3, 6, 16)]
    held[1] = whole if fusion == "late" else [torch.cat(whole, dim=1)]
    found = []
    for server in (group, alone):
        inputs = {
            n: converted(sent, lambda own: [x.clone().requires_grad_() for x in own])
            for n, sent in held.items()
        }
        predictions = server.forward(inputs)
        torch.cat(list(predictions.values())).square().sum().backward()
        found.append([*predictions.values()])
        found[-1] += [x.grad for sent in inputs.values() for x in tensors_of(sent)]
    replicas = zip(*map(gradients_of, (group.own, group.others.replica)), strict=True)
    found[0] += [sum(parts) for parts in replicas]
    found[1] += [p.grad for p in alone.model.parameters()]
    assert len(found[0]) == 4 + 6 + (fusion == "late") + len(gradients_of(group.own))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("trained", [True, False])
def test_a_groups_gradients_add_up_to_those_of_one_server(trained: bool) -> None:
    """With tokenizers that are trained, and with frozen ones."""
    (group, _), held = group_of_two(), smashed([6, 1, 5, 2])
    for tensors in held.values():
        tensors[0].requires_grad_(trained)
    torch.cat(list(group.forward(held).values())).square().sum().backward()
    ours = [tensors[0].grad for tensors in held.values()]
    sums = zip(*map(gradients_of, (group.own, group.others.replica)), strict=True)
    found = [sum(parts) for parts in sums]
    alone = group.own.server
    alone.model.zero_grad()
    fresh = {n: [x.detach().requires_grad_(trained)] for n, (x,) in held.items()}
    torch.cat(list(alone.forward(fresh).values())).square().sum().backward()
    for tensors, gradient in zip(fresh.values(), ours, strict=True):
        assert (gradient is None) == (not trained)
        if trained:
            torch.testing.assert_close(gradient, tensors[0].grad)
    for parameter, gradient in zip(alone.model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_backward_that_comes_when_another_step_has_begun_reaches_no_replica() -> None:
    (group, others), held = group_of_two(), smashed([6, 1, 5, 2])
    for (tensor,) in held.values():
        tensor.requires_grad_()
    late, now = (torch.cat(list(group.forward(held).values())).sum() for _ in range(2))
    late.backward()
    assert [message for message, _ in others.told] == ["forward", "forward"]
    assert all(tensor.grad is None for (tensor,) in held.values())
    now.backward()
    assert others.told[-1][0] == "backward"
    assert all(tensor.grad is not None for (tensor,) in held.values())


def test_a_group_of_which_a_replica_has_failed_does_nothing_more() -> None:
    (group, others), held = group_of_two(), smashed([6, 1, 5, 2])
    others.start = lambda *_: 1 / 0
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            group.forward(held)
        others.start = lambda *_: pytest.fail("asked")


def test_of_a_group_that_does_not_meet_the_replica_whose_fault_it_is_is_named() -> None:
    def lost() -> list[str]:
        raise RemoteError("replica1: lost in join")

    others = SimpleNamespace(name="replicas 0", count=2, start=lambda *_: lost)
    own = SimpleNamespace(join=lambda *_: 1 / 0)  # as of a meeting that nobody comes to
    with pytest.raises(RemoteError, match="replica1: lost in join"):
        server_group._join(own, others, False, 1.0)


def test_every_replica_continues_from_replica_0s_checkpoint(tmp_path: Path) -> None:
    group, others = group_of_two()
    own, other = group.own, others.replica
    saved = {name: x.clone() for name, x in group.model.state_dict().items()}
    group.save(str(tmp_path))
    for replica in (own, other):
        for parameter in replica.server.model.parameters():
            parameter.data.add_(1)
    group.restore(str(tmp_path))
    for replica in (own, other):
        for name, x in replica.server.model.state_dict().items():
            assert torch.equal(x, saved[name]), name


def test_a_replica_without_clients_steps_on_the_others_gradients() -> None:
    layer = torch.nn.Linear(2, 2)
    toy = toys.experiment(training={"server": {"name": "sgd", "lr": 1.0}})
    server = Server(layer, Stepper(layer.parameters(), toy.training.server))
    replica, total = Replica(server), torch.ones(2, 2)
    assert replica.forward({}, {}) == {} and replica.backward({}) == {}
    replica.reduction = SimpleNamespace(sum=lambda own, parameters: [total, None])
    before = [p.detach().clone() for p in layer.parameters()]
    replica.step(0, (1, 1))
    assert torch.equal(layer.weight, before[0] - 1) and torch.equal(layer.bias, before[1])


def test_buckets_hold_every_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpsl_dist.runtime.replicas._BUCKET", 40)
    tensors = [torch.full((size,), float(size)) for size in (3, 30, 4, 5, 6)]
    sizes = [[len(tensor) for tensor in bucket] for bucket in _buckets(tensors)]
    assert sizes == [[6, 5], [4, 30], [3]]
