"""A run between two hosts through WireGuard, by the lines of ``docs/doors.md``, and without it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Launch, World, until
from test_two_hosts import ADDRESSES, TINY, Host, hosts  # noqa: F401

Pair = tuple[Host, Host]
PAGE = (ROOT / "docs" / "doors.md").read_text("utf-8")
#: What a run says in the clear: at the door, to meet, and in the first calls.
IN_THE_CLEAR = (b"mpsl_dist door 1", b"worker1", b"digits-qa")

CAPTURE = """
import signal, socket, struct, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
tap.setsockopt(socket.SOL_SOCKET, 33, 2**26)  # SO_RCVBUFFORCE
tap.bind((sys.argv[1], 3))  # ETH_P_ALL
print("capturing", flush=True)
try:
    with open(sys.argv[2], "wb", 0) as file:
        while True:
            file.write(tap.recv(2**17))
finally:
    print("lost", struct.unpack("II", tap.getsockopt(263, 6, 8))[1])  # PACKET_STATISTICS
"""
REACH = """
import socket, sys
cable, *places = sys.argv[1:]
for place in places:
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, 25, cable.encode())  # SO_BINDTODEVICE
        caller.settimeout(1)
        address, port = place.rsplit(":", 1)
        if caller.connect_ex((address, int(port))) == 0:
            print(place)
"""


class Capture:
    """All that passes through the cable, seen from one host."""

    def __init__(self, host: Host, launch: Launch, file: Path) -> None:
        self.file = file
        line = ["ip", "netns", "exec", host.name, sys.executable, "-c", CAPTURE]
        self.world = launch([*line, host.cable, str(file)])
        until(lambda: "capturing" in self.world.output(), 30, "the capture")

    def end(self) -> bytes:
        self.world.process.send_signal(signal.SIGTERM)
        _, output = self.world.finish(30)
        assert "lost 0\n" in output, output
        return self.file.read_bytes()


def start(
    host: Host, launch: Launch, rank: int, server: str, interface: str, *words: str, token: str
) -> World:
    """Start one rank by the page's line, of three."""
    (exports,) = re.findall(r"^ +export (WORLD_SIZE=.*)$", PAGE, re.M)
    lines = re.findall(r"^ +RANK=\d python (-m mpsl_dist train) CONFIG (\S+)=wg0", PAGE, re.M)
    command, key = lines[0]
    assert all(line == lines[0] for line in lines)
    variables = dict(word.split("=") for word in exports.split())
    variables |= {"RANK": str(rank), "MASTER_ADDR": server, "MPSL_DIST_TOKEN_FILE": token}
    # Two namespaces share a memory, which payloads would take otherwise.
    settings = ["clients=2", "runtime.channels=tcp", f"{key}={interface}", *words]
    enter = ["ip", "netns", "exec", host.name, sys.executable]
    return launch([*enter, *command.split(), str(TINY), *settings], **variables)


@pytest.fixture
def token(tmp_path: Path) -> str:
    """Made by the page's line."""
    (line,) = re.findall(r"^ +(\(umask .*> )run.token\)$", PAGE, re.M)
    file = tmp_path / "run.token"
    subprocess.run(["sh", "-c", f"{line} {file})"], check=True)
    return str(file)


@pytest.fixture
def tunnel(hosts: Pair, launch: Launch, tmp_path: Path) -> Pair:  # noqa: F811
    """The two hosts with the page's ``wg0`` between them."""
    missing = [name for name in ("wg", "wg-quick", "ss") if shutil.which(name) is None]
    if not (shutil.which("wireguard-go") or Path("/sys/module/wireguard").exists()):
        missing.append("wireguard-go or the kernel's module")
    if missing:
        pytest.skip(f"no {', '.join(missing)} here")
    keys = {"SERVER_HOST": ADDRESSES[0]}
    for side in ("SERVER", "WORKER"):
        private = subprocess.run(["wg", "genkey"], check=True, capture_output=True).stdout
        public = subprocess.run(["wg", "pubkey"], input=private, check=True, capture_output=True)
        keys[f"{side}_PRIVATE_KEY"] = private.decode().strip()
        keys[f"{side}_PUBLIC_KEY"] = public.stdout.decode().strip()
    files = re.findall(r"^ +\[Interface\]\n(?:(?: +.*)?\n)+", PAGE, re.M)
    for host, text in zip(hosts, files, strict=True):
        folder = tmp_path / host.name
        folder.mkdir(mode=0o700)
        for name, key in keys.items():
            text = text.replace(name, key)
        (folder / "wg0.conf").write_text(text)
        (folder / "wg0.conf").chmod(0o600)
        # The program in user space, where there is one, speaks through a file of this name.
        alone = "mkdir -p /run/wireguard && mount -t tmpfs none /run/wireguard"
        enter = ["ip", "netns", "exec", host.name, "unshare", "--mount", "sh", "-c"]
        made = launch([*enter, f"{alone} && exec wg-quick up {folder}/wg0.conf"])
        if made.process.wait(30):
            pytest.skip(f"no WireGuard here: {made.output()}")
    return hosts


def listening(host: Host) -> set[str]:
    """``address:port`` of all that listens on a host."""
    return {line.split()[3] for line in host.do("ss", "-ltnH").splitlines()}


def reached(host: Host, places: set[str]) -> set[str]:
    """Which of them a host reaches over the bare cable."""
    return set(host.do(sys.executable, "-c", REACH, host.cable, *sorted(places)).split())


def steps(folder: Path) -> int:
    metrics = folder / "runs" / "tiny" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_nothing_of_a_run_is_outside_its_tunnel(
    tunnel: Pair, launch: Launch, token: str, tmp_path: Path
) -> None:
    capture, addresses = Capture(tunnel[0], launch, tmp_path / "frames"), ("10.8.0.1", "10.8.0.2")
    words = ("training.epochs=1000", "checkpoint.every_epochs=0")
    worlds = [
        start(tunnel[rank > 0], launch, rank, addresses[0], "wg0", *words, token=token)
        for rank in range(3)
    ]
    until(lambda: steps(tmp_path) >= 3, 200, "three steps")
    for (here, there), address in zip((tunnel, tunnel[::-1]), addresses, strict=True):
        doors = listening(here)
        assert doors and all(door.startswith((f"{address}:", "127.0.0.1:")) for door in doors)
        ports = {door.rsplit(":", 1)[1] for door in doors}
        outside = {f"{where}:{port}" for where in (address, *ADDRESSES) for port in ports}
        assert not reached(there, outside)
    # What keeps them out is the firewall's line of the page: without it they come in.
    inside = {door for door in listening(tunnel[0]) if door.startswith(addresses[0])}
    tunnel[0].do("iptables", "--flush", "INPUT")
    assert reached(tunnel[1], inside) == inside
    worlds[0].process.send_signal(signal.SIGTERM)
    ended = [world.finish(120) for world in worlds]
    assert "who joins must prove the token" in ended[0][1]
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["status"] == "stopped", ended
    frames = capture.end()
    sent = sum(line["bytes"]["up"] for line in map(json.loads, metrics(tmp_path)))
    assert len(frames) > sent  # all clients are on the other host
    assert not [word for word in IN_THE_CLEAR if word in frames]


def metrics(folder: Path) -> list[str]:
    return (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()


@pytest.mark.campaign
def test_without_a_tunnel_a_stranger_is_refused_but_all_is_read(
    hosts: Pair,  # noqa: F811
    launch: Launch,
    token: str,
    tmp_path: Path,
) -> None:
    capture = Capture(hosts[0], launch, tmp_path / "frames")

    def begin(rank: int, secret: str) -> World:
        host = hosts[rank > 0]
        words = (ADDRESSES[0], host.cable, "training.epochs=1")
        return start(host, launch, rank, *words, token=secret)

    worlds, stranger = [begin(0, token), begin(1, token)], begin(2, "")
    status, output = stranger.finish(200)
    assert status == 2 and "Traceback" not in output, output
    assert f"rank 2 on {socket.gethostname()}" in output and "has another token" in output
    assert f"refused {ADDRESSES[1]}, which did not prove the run's token" in worlds[0].output()
    ended = [world.finish(200) for world in (*worlds, begin(2, token))]
    assert [status for status, _ in ended] == [0, 0, 0], ended
    assert listening(hosts[0]) == set()
    frames = capture.end()
    assert all(word in frames for word in IN_THE_CLEAR)
