"""Who is let into a run over several hosts, over real sockets of loopback."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import toys
from conftest import until

from mpsl_dist.errors import LaunchError, RefusedError, RemoteError
from mpsl_dist.methods import processes
from mpsl_dist.runtime import admission, network, token
from mpsl_dist.runtime.admission import Card
from mpsl_dist.runtime.environment import Environment
from mpsl_dist.runtime.token import read_token

TOKEN = b"sixteen bytes and more"
FACTS = {"mpsl_dist": "0.1.0", "torch": "2.11.0", "data.shape": (3, 4), "faults.min_clients": 1}
NONCE = bytes(32)


@dataclass
class Door:
    """A server that waits for its workers, on a thread of its own."""

    workers: tuple[int, ...]
    place: tuple[str, int]
    secret: bytes = TOKEN
    timeout: float = 20.0
    told: list[str] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._admit, daemon=True)
        self.thread.start()

    def _admit(self) -> None:
        card = Card(0, "front", FACTS)
        try:
            admission.admit(
                self.place, self.workers, card, self.secret, self.timeout, self.told.append
            )
        except Exception as error:
            self.error = error

    def end(self) -> Exception | None:
        """Wait until it has closed; gives what it raised."""
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.error

    def knock(self, *words: bytes) -> socket.socket:
        """Connect as a stranger who sends these bytes."""
        stranger = socket.socket()
        until(lambda: stranger.connect_ex(self.place) == 0, 10, "a door")
        for word in words:
            stranger.sendall(word)
        return stranger


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, int]:
    """Where nobody listens yet, and no other program will."""
    with socket.create_server((network.own_loopback(str(tmp_path)), 0)) as free:
        return free.getsockname()


def enter(place: tuple[str, int], rank: int, secret: bytes = TOKEN, **facts: Any) -> None:
    admission.enter(place, Card(rank, f"host{rank}", FACTS | facts), secret, 20)


def entering(door: Door, rank: int) -> threading.Thread:
    """Have a worker enter on a thread of its own."""
    thread = threading.Thread(target=enter, args=(door.place, rank), daemon=True)
    thread.start()
    return thread


def entering_twice(door: Door) -> list[str]:
    """Have rank 1 enter, and another rank 1 refused, so that the first is surely in."""
    outcomes: list[str] = []

    def attempt() -> None:
        try:
            enter(door.place, 1)
            outcomes.append("in")
        except RefusedError as error:
            outcomes.append(str(error))

    for _ in range(2):
        threading.Thread(target=attempt, daemon=True).start()
    until(lambda: bool(outcomes), 10, "the second one's refusal")
    return outcomes


def test_all_are_let_in_once_all_are_there(place: tuple[str, int]) -> None:
    door = Door((1, 2), place)
    first = entering(door, 1)
    enter(place, 2)
    first.join(10)
    assert door.end() is None and not first.is_alive() and not door.told


def test_a_worker_may_come_before_its_server(place: tuple[str, int]) -> None:
    worker = threading.Thread(target=enter, args=(place, 1), daemon=True)
    worker.start()
    door = Door((1,), place)
    worker.join(10)
    assert not worker.is_alive() and door.end() is None


@pytest.mark.parametrize("secret", [b"", b"another sixteen bytes"])
def test_without_the_token_nobody_enters_and_nobody_else_is_kept_out(
    secret: bytes, place: tuple[str, int]
) -> None:
    door = Door((1,), place)
    with pytest.raises(RefusedError, match=r"rank 1 on host1.*another token.*MPSL_DIST_TOKEN_FILE"):
        enter(place, 1, secret)
    until(lambda: bool(door.told), 10, "a word about it")
    assert "refused 127.0.0.1, which did not prove the run's token" in door.told[0]
    enter(place, 1)
    assert door.end() is None


def test_a_run_without_a_token_still_compares(place: tuple[str, int]) -> None:
    door = Door((1,), place, secret=b"")
    with pytest.raises(RefusedError, match="torch is 2.10.0 there and 2.11.0 at the server"):
        enter(place, 1, b"", torch="2.10.0")
    assert isinstance(door.end(), LaunchError)


def test_a_disagreement_is_told_to_all_with_host_and_difference(place: tuple[str, int]) -> None:
    door = Door((1, 2), place)
    outcomes = entering_twice(door)
    with pytest.raises(RefusedError) as found:
        enter(place, 2, **{"faults.min_clients": 2, "mpsl_dist": "0.2.0"})
    assert str(found.value) == (
        "rank 2 on host2 disagrees: faults.min_clients is 2 there and 1 at the server; "
        "mpsl_dist is 0.2.0 there and 0.1.0 at the server"
    )
    error = door.end()
    assert type(error) is LaunchError and str(error) == str(found.value)
    until(lambda: len(outcomes) == 2, 10, "the other's word")
    assert outcomes[1] == str(found.value)


STRANGERS: dict[str, tuple[bytes, ...]] = {
    "silent": (),
    "in mid-greeting": (token._GREETING + NONCE[:5],),
    "in mid-card": (token._GREETING + NONCE, NONCE, (100).to_bytes(4, "big"), b"{"),
    "garbage": (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + bytes(range(256)) * 9,),
    "too long": (token._GREETING + NONCE, NONCE, (2**32 - 1).to_bytes(4, "big")),
    "a card without a seal": (token._GREETING + NONCE, NONCE, (2).to_bytes(4, "big"), b"{}"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_are_refused_and_disturb_nobody(
    stranger: str,
    place: tuple[str, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(token, "PATIENCE", 1.0)
    door = Door((1, 2), place)
    first = entering(door, 1)
    strangers = [door.knock(*STRANGERS[stranger]) for _ in range(30)]
    until(lambda: bool(door.told), 10, "a word about them")
    assert len(door.told) == 1 and "refused 127.0.0.1" in door.told[0]
    late = door.knock(*STRANGERS[stranger])
    enter(place, 2)  # with a stranger at the door
    assert door.end() is None
    first.join(10)
    assert not first.is_alive() and not caplog.records
    for each in [*strangers, late]:
        each.close()


def test_one_who_sends_slowly_has_no_longer_than_the_silent(
    place: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token, "PATIENCE", 0.5)
    door = Door((1,), place)
    with closing(door.knock()) as slow:
        for byte in token._GREETING + NONCE:
            if door.told:
                break
            slow.sendall(bytes([byte]))
            time.sleep(0.1)
    assert door.told and "slow" in door.told[0]
    enter(place, 1)
    assert door.end() is None


@pytest.fixture
def overheard(place: tuple[str, int]) -> Iterator[Callable[[], tuple[bytes, bytes]]]:
    """A wire between a worker and a server; gives what the worker and the server said."""
    with socket.create_server(("127.0.0.1", 0)) as wire:
        said: dict[str, bytes] = {"worker": b"", "server": b""}

        def carry(source: socket.socket, target: socket.socket, who: str) -> None:
            while block := source.recv(4096):
                said[who] += block
                target.sendall(block)
            target.shutdown(socket.SHUT_WR)

        def listen() -> tuple[bytes, bytes]:
            door = Door((1,), place)
            worker = threading.Thread(target=enter, args=(wire.getsockname(), 1), daemon=True)
            worker.start()
            near, _ = wire.accept()
            far = door.knock()
            ways = [(near, far, "worker"), (far, near, "server")]
            threads = [threading.Thread(target=carry, args=way, daemon=True) for way in ways]
            for thread in threads:
                thread.start()
            for thread in (*threads, worker):
                thread.join(10)
            assert door.end() is None and not worker.is_alive()
            return said["worker"], said["server"]

        yield listen


@contextmanager
def false_server(place: tuple[str, int], says: bytes) -> Iterator[None]:
    """Say these bytes to the first who comes, and nothing more."""
    with socket.create_server(place) as door:

        def serve() -> None:
            peer, _ = door.accept()
            with peer:
                peer.sendall(says)
                while peer.recv(4096):
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(10)


def test_what_was_overheard_opens_no_door(
    overheard: Callable[[], tuple[bytes, bytes]], place: tuple[str, int]
) -> None:
    by_worker, by_server = overheard()
    assert TOKEN not in by_worker + by_server
    door = Door((1,), place)
    with closing(door.knock(by_worker)):
        until(lambda: bool(door.told), 10, "a word about it")
    assert "another token" in door.told[0]
    enter(place, 1)
    assert door.end() is None
    with false_server(place, by_server), pytest.raises(RefusedError, match="another token"):
        enter(place, 1)


@pytest.mark.parametrize(
    ("says", "why"),
    [(b"", "silent"), (bytes(500), "another token"), (NONCE * 2 + b"\xff" * 4, "more than it may")],
    ids=["nothing", "garbage", "too much"],
)
def test_a_worker_waits_for_no_false_server(
    says: bytes, why: str, place: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token, "PATIENCE", 0.5)
    with false_server(place, says), pytest.raises(RefusedError, match=why):
        enter(place, 1)


def test_a_rank_enters_once(place: tuple[str, int]) -> None:
    door = Door((1, 2), place)
    with pytest.raises(RefusedError, match="rank 7 on host7: not awaited"):
        enter(place, 7)
    outcomes = entering_twice(door)
    enter(place, 2)
    until(lambda: len(outcomes) == 2, 10, "the other's word")
    assert outcomes == ["rank 1 on host1: rank 1 on host1 came before", "in"]
    assert door.end() is None


def test_who_leaves_before_the_others_are_there_may_come_back(place: tuple[str, int]) -> None:
    door = Door((1, 2), place)
    with pytest.raises(RefusedError, match="no server let it in"):
        admission.enter(place, Card(1, "host1", FACTS), TOKEN, 0.5)
    until(lambda: bool(door.told), 10, "a word about it")
    assert "rank 1 on host1 left" in door.told[0]
    first = entering(door, 1)
    enter(place, 2)
    first.join(10)
    assert door.end() is None and not first.is_alive()


class Joined(Exception):
    """RPC would begin."""


def joining(rank: int, door: tuple[str, int], **settings: Any) -> Callable[[], None]:
    """What a rank of two hosts does before RPC begins."""
    address, port = door
    place = Environment("torchrun", rank, 2, 0, 1, rank, 2, address, port - 1, "rank0://")

    def join() -> None:
        with pytest.raises(Joined):
            processes.join(toys.experiment(**settings), place)

    return join


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({}, ""),
        ({"runtime": {"interface": "lo"}}, ""),
        ({"seed": 5}, "seed is 5 there and 2024 at the server"),
        ({"output": "elsewhere"}, "output is elsewhere there and runs at the server"),
    ],
)
def test_a_run_of_two_hosts_is_one_experiment(
    settings: dict[str, Any],
    differs: str,
    place: tuple[str, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.delenv(token.TOKEN_FILE, raising=False)
    monkeypatch.setattr(processes.world, "World", Mock(side_effect=Joined))
    with ThreadPoolExecutor() as pool:
        server = pool.submit(joining(0, place))
        worker = pool.submit(joining(1, place, **settings))
        for side, error in ((server, LaunchError), (worker, RefusedError)):
            if differs:
                with pytest.raises(error, match=f"rank 1 on .* disagrees: {differs}$"):
                    side.result(30)
            else:
                side.result(30)
    assert "no MPSL_DIST_TOKEN_FILE: who reaches them joins" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"root": "/data/own.csv", "cache": "/tmp/cache", "loaders": 2}, ""),
        ({"text_length": 8}, "data.text_length is 8 there and None at the server"),
        ({"classes": ["a", "b"]}, r"data.classes is \['a', 'b'\] there and None at the server"),
        ({"place": "simulated"}, "data.place is simulated there and own at the server"),
    ],
)
def test_hosts_with_their_own_data_differ_in_their_own_matters_alone(
    settings: dict[str, Any],
    differs: str,
    place: tuple[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(token.TOKEN_FILE, raising=False)
    monkeypatch.setattr(processes.world, "World", Mock(side_effect=Joined))
    own = {"place": "own"}
    with ThreadPoolExecutor() as pool:
        server = pool.submit(joining(0, place, data=own))
        there = {"data": own | settings, "device": "cpu", "output": "x", "weights": {"root": "y"}}
        if "place" in settings:
            there = {"data": settings}
        worker = pool.submit(joining(1, place, **there))
        for side, error in ((server, LaunchError), (worker, RefusedError)):
            if differs:
                with pytest.raises(error, match=f"rank 1 on .* disagrees: .*{differs}"):
                    side.result(30)
            else:
                side.result(30)


def test_there_is_a_port_for_the_proof() -> None:
    with pytest.raises(LaunchError, match="MASTER_PORT=65535"):
        joining(1, ("127.0.0.1", 65536))()


def test_who_does_not_come_is_named(place: tuple[str, int]) -> None:
    door = Door((1, 2, 3), place, timeout=1.0)
    with pytest.raises(RefusedError, match="rank 1, 3 did not come"):
        enter(place, 2)
    error = door.end()
    assert type(error) is RemoteError and "start_timeout" in str(error)
    with pytest.raises(RefusedError, match="no server let it in"):
        admission.enter(place, Card(1, "host1", FACTS), TOKEN, 0.5)


def test_a_taken_port_is_named(place: tuple[str, int]) -> None:
    with socket.create_server(place):
        error = Door((1,), place).end()
    assert type(error) is LaunchError and "MASTER_PORT" in str(error)


@pytest.mark.parametrize("text", ["[]", "{}", "[" * 60_000, json.dumps({"rank": [], "host": ""})])
def test_no_card_is_no_surprise(text: str) -> None:
    with pytest.raises(token.Stranger):
        Card.read(text.encode())


def test_the_token_is_a_file_of_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "token"
    variables = {token.TOKEN_FILE: str(file)}
    assert read_token({}) == b""
    with pytest.raises(LaunchError, match="No such file"):
        read_token(variables)
    file.write_bytes(TOKEN + b"\n")
    file.chmod(0o640)
    with pytest.raises(LaunchError, match=f"chmod 600 {file}"):
        read_token(variables)
    file.chmod(0o600)
    assert read_token(variables) == TOKEN
    file.write_bytes(b"too short\n")
    with pytest.raises(LaunchError, match="9 bytes, at least 16"):
        read_token(variables)
