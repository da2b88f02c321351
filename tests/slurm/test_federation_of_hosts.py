"""A federation of three hosts that cannot read each other's folders, by the page's lines.

The hosts are network and host-name namespaces of this machine; whoever is on one has no privilege
and the group of its own folder alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Launch, World
from federation import SMALL, line_of, make_sites, write_experiment
from test_two_hosts import _lacking

NAMES = ("server", "north", "south")
NETWORK = "10.213.79"
#: Groups of the hosts' folders, and a user who owns them and runs nothing.
FIRST_GROUP, NOBODY = 64_210, 64_209


@dataclass
class Host:
    """One host: its rank, its namespace, and the folder that it alone may read."""

    rank: int
    folder: Path

    @property
    def group(self) -> int:
        return FIRST_GROUP + self.rank

    @property
    def namespace(self) -> str:
        return f"mpsl-{os.getpid()}-{NAMES[self.rank]}"

    @property
    def cable(self) -> str:
        return f"fed{self.rank}{os.getpid() % 10**8}"

    def enter(self, *words: str) -> list[str]:
        """The command that does this on the host, in its folder, without any privilege."""
        alone = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        shell = f'hostname {NAMES[self.rank]} && cd {self.folder} && exec "$@"'
        drop = ["setpriv", f"--regid={self.group}", "--clear-groups", "--bounding-set=-all"]
        return [*alone, "sh", "-c", shell, "sh", *drop, *words]

    def reads(self, path: Path) -> bool:
        """Whether a process of this host can read a file."""
        done = subprocess.run(self.enter("cat", str(path)), capture_output=True, text=True)
        assert done.returncode == 0 or "Permission denied" in done.stderr, done.stderr
        return done.returncode == 0

    def start(self, launch: Launch, *words: str) -> World:
        """Start the host's process by its line of the page."""
        variables, line = line_of(self.rank, self.folder / "birds.csv")
        variables |= {"MASTER_ADDR": f"{NETWORK}.1"}
        return launch(self.enter(sys.executable, *line, *SMALL, *words), **variables)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    reason = _lacking() or (None if shutil.which("setpriv") else "no setpriv here")
    if reason:
        pytest.skip(reason)
    make_sites(tmp_path)
    (tmp_path / "server").mkdir()
    found = [Host(n, tmp_path / name) for n, name in enumerate(NAMES)]
    try:
        for host in found:
            write_experiment(host.folder)
            shutil.chown(host.folder, NOBODY, host.group)
            host.folder.chmod(0o770)
            _link(host, found[0])
        yield found
    finally:
        for host in found:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)


def _link(host: Host, server: Host) -> None:
    """Make the host's namespace, and join it to the bridge in the server's."""

    def do(where: Host, *words: str) -> None:
        line = ["ip", "-netns", where.namespace, *words]
        subprocess.run(line, check=True, capture_output=True)

    subprocess.run(["ip", "netns", "add", host.namespace], check=True)
    do(host, "link", "set", "lo", "up")
    if host is server:
        do(host, "link", "add", host.cable, "type", "bridge")
    else:
        far = f"{host.cable}b"[-15:]
        ends = ["type", "veth", "peer", "name", far, "netns", server.namespace]
        do(host, "link", "add", host.cable, *ends)
        do(server, "link", "set", far, "master", server.cable, "up")
    do(host, "address", "add", f"{NETWORK}.{host.rank + 1}/24", "dev", host.cable)
    do(host, "link", "set", host.cable, "up")


def run(hosts: list[Host], launch: Launch, *words: str) -> list[tuple[int, str]]:
    worlds = [host.start(launch, *words) for host in hosts]
    return [world.finish(240) for world in worlds]


def curve(run: Path) -> list[tuple[object, ...]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["split"], line["loss"], line["metric"]) for line in lines]


def facts(run: Path) -> dict[str, object]:
    return json.loads((run / "summary.json").read_text())["data"]


def test_three_hosts_with_their_own_data_equal_the_simulated_run_and_resume(
    hosts: list[Host], launch: Launch, tmp_path: Path
) -> None:
    for host in hosts:
        for other in hosts[1:]:
            assert host.reads(other.folder / "birds.csv") == (host is other)
    first = run(hosts, launch, "training.epochs=1")
    again = run(hosts, launch, "training.epochs=2", "--resume")
    assert [status for status, _ in first + again] == [0] * 6, first + again
    simulated = ["data.place=simulated", f"data.root={tmp_path / 'all' / 'birds.csv'}"]
    line = ["train", str(write_experiment(tmp_path)), *SMALL, *simulated]
    natural = "data.partition.kind=natural"
    world = launch([sys.executable, "-m", "mpsl_dist", *line, natural])
    assert world.finish(240)[0] == 0, world.output()
    reference, ours = (folder / "runs" / "birds" for folder in (tmp_path, hosts[0].folder))
    assert curve(ours) == curve(reference) and facts(ours) == facts(reference)
    model = Path("model", "model.safetensors")
    assert (ours / model).read_bytes() == (reference / model).read_bytes()
    for host in hosts[1:]:  # what a client leaves stays with it
        own = host.folder / "runs" / "birds"
        kept = {path.name for path in own.rglob("*") if path.is_file()}
        assert kept == {f"rank{host.rank}.log", f"client-{host.rank - 1:04d}.pt"}
    assert not list(ours.rglob("client-*.pt")) and list(ours.rglob("server.pt"))
