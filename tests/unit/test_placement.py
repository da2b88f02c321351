"""Which client on which worker."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mpsl_dist.actors.choices import describe
from mpsl_dist.runtime.placement import gpu_of, place


def test_clients_are_spread_by_their_data():
    assert place([100, 10, 20, 90], 2) == [[0, 1], [2, 3]]
    assert place([5, 5, 5], 3) == [[0], [1], [2]]
    assert place([1, 2, 3], 1) == [[0, 1, 2]]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60), st.data())
def test_everyone_is_placed_once_and_no_worker_is_empty_or_crowded(sizes, data):
    workers = data.draw(st.integers(1, len(sizes)))
    placed = place(sizes, workers)
    assert sorted(client for clients in placed for client in clients) == list(range(len(sizes)))
    assert len(placed) == workers
    assert max(map(len, placed)) <= -(-len(sizes) // workers)
    if all(sizes):
        assert min(map(len, placed)) >= 1


def test_the_server_has_its_gpu_to_itself_where_there_are_several():
    assert [gpu_of(rank, 4, replicas=1) for rank in range(8)] == [0, 1, 2, 3, 1, 2, 3, 1]
    assert [gpu_of(rank, 4, replicas=0) for rank in range(5)] == [0, 1, 2, 3, 0]
    assert [gpu_of(rank, 1, replicas=1) for rank in range(3)] == [0, 0, 0]


def test_a_device_is_described_by_its_own_number_with_a_mocked_gpu(monkeypatch) -> None:
    names = {"cuda:0": "A", "cuda:1": "B"}
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: names[device])
    assert describe("cuda:1") == "cuda:1 (B)" and describe("cpu") == "cpu"
