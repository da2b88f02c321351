"""torchrun across two hosts, which are network and host-name namespaces of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Launch, World, until

TINY = Path(__file__).with_name("tiny.yaml")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29417


def _lacking() -> str | None:
    """Return what this machine lacks for two namespaces with a firewall between them."""
    missing = [name for name in ("ip", "iptables", "unshare") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here"
    if os.geteuid():
        return "only root makes network namespaces"
    probe = f"mpsl-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    filters = subprocess.run(["ip", "netns", "exec", probe, "iptables", "-L"], capture_output=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    return "no iptables in namespaces here" if filters.returncode else None


@dataclass
class Host:
    """One namespace, joined to the other by a virtual cable."""

    name: str
    cable: str
    address: str
    names: Path

    def do(self, *words: str) -> str:
        """Run a short command on this host."""
        line = ["ip", "netns", "exec", self.name, *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout

    def received(self) -> int:
        """Bytes that came through the cable."""
        shown = json.loads(self.do("ip", "-json", "-statistics", "link", "show", self.cable))
        return shown[0]["stats64"]["rx"]["bytes"]

    def torchrun(self, launch: Launch, *words: str, **variables: str) -> World:
        """Start this host's two ranks, by the line that the documentation gives."""
        enter = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount"]
        # Like any host, it can look up its own name.
        names = f"mount --bind {self.names} /etc/hosts && hostname {self.name}"
        named = ["sh", "-c", f'{names} && exec "$@"', "sh"]
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}"]
        ranks = ["--local-addr", self.address, "--nproc-per-node", "2"]
        # Two namespaces share a memory, which payloads would take otherwise.
        task = ["-m", "mpsl_dist", "train", str(TINY), "runtime.channels=tcp", *words]
        return launch([*enter, *named, *line, *meet, *ranks, *task], **variables)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    reason = _lacking()
    if reason:
        pytest.skip(reason)
    names = tmp_path / "hosts"
    pair = tuple(
        Host(f"mpsl-{os.getpid()}-{side}", f"mpsl{side}{os.getpid() % 10**8}", address, names)
        for side, address in zip("ab", ADDRESSES, strict=True)
    )
    lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in pair)]
    names.write_text("\n".join(lines) + "\n")
    try:
        for host in pair:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
            host.do("ip", "link", "set", "lo", "up")
        a, b = pair
        cable = ["link", "add", a.cable, "netns", a.name, "type", "veth", "peer", "name", b.cable]
        subprocess.run(["ip", *cable, "netns", b.name], check=True)
        for host in pair:
            host.do("ip", "address", "add", f"{host.address}/24", "dev", host.cable)
            host.do("ip", "link", "set", host.cable, "up")
        yield pair
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def test_torchrun_across_two_hosts_trains_and_shuts_down(hosts, launch: Launch, tmp_path: Path):
    worlds = [host.torchrun(launch, "training.epochs=1") for host in hosts]
    ended = [world.finish(240) for world in worlds]
    assert [status for status, _ in ended] == [0, 0], ended
    found = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert found["status"] == "completed"
    # At least one client is not on the server's host, and its activations took the cable.
    share = found["communication"]["up_bytes_per_client_per_epoch"]
    assert max(host.received() for host in hosts) > share / 2


def test_firewall_in_mid_run_ends_it_with_a_clear_error(hosts, launch: Launch, tmp_path: Path):
    timeout = 25
    words = ("training.epochs=500", f"runtime.rpc_timeout={timeout}", "faults.on_loss=stop")
    worlds = [host.torchrun(launch, *words) for host in hosts]
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"

    def stepping() -> bool:
        assert all(world.process.poll() is None for world in worlds), worlds[0].output()
        return metrics.exists() and metrics.read_text().count("\n") >= 3

    until(stepping, 240, "first steps")
    hosts[0].do("iptables", "--append", "INPUT", "--in-interface", hosts[0].cable, "--jump", "DROP")
    summary = tmp_path / "runs" / "tiny" / "summary.json"
    until(summary.exists, 3 * timeout + 10, "the server's report")
    reason = json.loads(summary.read_text())["reason"]
    assert "lost" in reason and any(f" on {host.name} (client" in reason for host in hosts), reason
    # torchrun may first wait for the store that the firewall cuts off, 60 s at a time.
    ended = [world.finish(300) for world in worlds]
    assert all(status != 0 for status, _ in ended), ended
    assert any(reason in output for _, output in ended), ended


def _hosting_clients(world: World) -> list[int]:
    """Ids of the processes of a host that host clients, the children of their ranks' own."""
    return [n for n in world.members() if b"MPSL_DIST_SUPERVISED=" in _variables(n)]


def _variables(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/environ").read_bytes()
    except OSError:  # it has just ended
        return b""


@pytest.mark.campaign
def test_a_worker_that_comes_back_on_another_host_proves_the_token(
    hosts, launch: Launch, tmp_path: Path
):
    token = tmp_path / "run.token"
    token.write_text("0123456789abcdef" * 2)
    token.chmod(0o600)
    words = ("training.epochs=100000", "faults.rejoin=now")
    worlds = [host.torchrun(launch, *words, MPSL_DIST_TOKEN_FILE=str(token)) for host in hosts]
    run = tmp_path / "runs" / "tiny"

    def steps() -> list[dict]:
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    until(lambda: len(steps()) >= 3, 240, "first steps")
    # The server's host has one worker beside it, the other one two.
    far, near = sorted(worlds, key=lambda world: len(_hosting_clients(world)), reverse=True)
    os.kill(_hosting_clients(far)[0], signal.SIGKILL)
    until(lambda: steps()[-1].get("clients_returned", 0) > 0, 120, "a return")
    assert steps()[-1]["clients_lost"] == 0
    os.kill(near.rank(0), signal.SIGINT)
    outputs = [world.finish(120)[1] for world in (near, far)]
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped", outputs
    assert outputs[0].count("who joins must prove the token") == 2, outputs[0]
