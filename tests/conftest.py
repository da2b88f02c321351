"""Fixtures of every tier."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_MARK = "MPSL_TEST_RUN"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="run the long campaigns too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--campaign"):
        for item in items:
            if "campaign" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a campaign; runs with --campaign"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data pieces, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("MPSL_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (MPSL_TEST_DATA)")
    return folder


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size at a new folder, or a skip where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def until(holds: Callable[[], bool], seconds: float = 60.0, what: str = "condition") -> None:
    """Wait until something holds; fail when it does not within the time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def role_of(process: int) -> tuple[int, bool] | None:
    """The rank of a process, and whether it is the rank's child that hosts clients.

    A fork has the environment of its parent in ``/proc``, but a name of its own.
    """
    folder = Path(f"/proc/{process}")
    try:
        variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        name = (folder / "comm").read_text().strip()
    except OSError:
        return None
    if told := re.fullmatch(r"rank(\d+)( hosts)?", name):
        return int(told[1]), bool(told[2])
    known = dict(variable.split("=", 1) for variable in variables if "=" in variable)
    return (int(known["RANK"]), "MPSL_DIST_SUPERVISED" in known) if "RANK" in known else None


@dataclass
class World:
    """The processes of one launch, found again by a mark in their environment."""

    process: subprocess.Popen[str]
    mark: str
    log: Path

    def members(self) -> list[int]:
        """Ids of all living processes of this launch, the launcher first."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                variables = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"{_MARK}={self.mark}".encode() in variables and state != "Z":
                found.append(int(entry.name))
        return sorted(found)

    def rank(self, number: int, hosts: bool = False) -> int:
        """Id of the process that runs a rank, or of its child that hosts the rank's clients."""
        for member in self.members():
            role = role_of(member)
            if role and role[0] == number and (role[1] or not hosts):
                return member
        raise AssertionError(f"no process {'hosts' if hosts else 'runs'} rank {number}")

    def finish(self, seconds: float = 120.0) -> tuple[int, str]:
        """Wait for the end; gives the exit status and all output. No process may be left."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"not finished in {seconds} s:\n{self.output()}") from None
        until(lambda: not self.members(), 30, "processes left behind")
        return status, self.output()

    def output(self) -> str:
        """Everything printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        """Kill what is left."""
        for member in self.members():
            try:
                os.kill(member, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)


Launch = Callable[..., World]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start a command; whatever of it still lives after the test is killed."""
    with launcher(tmp_path) as start:
        yield start


@contextmanager
def launcher(folder: Path) -> Iterator[Launch]:
    """The same for fixtures of wider scope; ``folder`` is the working directory."""
    worlds: list[World] = []

    def start(command: Sequence[str], **variables: str) -> World:
        mark, log = uuid.uuid4().hex, folder / f"output-{len(worlds)}.txt"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        environment |= {_MARK: mark, "OMP_NUM_THREADS": "1", **variables}
        with log.open("w") as output:
            process = subprocess.Popen(
                list(command),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=folder,
                text=True,
                start_new_session=True,
            )
        worlds.append(World(process, mark, log))
        return worlds[-1]

    try:
        yield start
    finally:
        for world in worlds:
            world.end()


def torchrun_line(ranks: int, *words: str) -> list[str]:
    """The command that starts ranks on this host."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*line, "--nproc-per-node", str(ranks), *words]


@pytest.fixture
def torchrun(launch: Launch) -> Launch:
    """Start ranks with torchrun: ``torchrun(ranks, "-m", "mpsl_dist", ...)``."""
    return lambda ranks, *words, **variables: launch(torchrun_line(ranks, *words), **variables)
