"""``mpsl_dist train`` without a launcher: its ranks, its exit status, its signals, its doors."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toys
import yaml
from conftest import ROOT, Launch, World, role_of, until
from test_runs import FAULTY, steps_done
from test_traffic import ADDRESSES, cable  # noqa: F401

from mpsl_dist.config import to_dict

COMMAND = str(Path(__file__).with_name("toy_command.py"))
#: Every way in which a run's processes die, beside the time that a busy machine takes for it.
SLACK = 15.0
Start = Callable[..., World]


@pytest.fixture
def start(launch: Launch, tmp_path: Path) -> Start:
    """Start a toy run of three processes by the one command; its folder lies in ``private/``."""
    private, config = tmp_path / "private", tmp_path / "toy.yaml"
    private.mkdir()
    experiment = toys.experiment(clients_per_worker=2, faults={"on_loss": "stop"})
    config.write_text(yaml.safe_dump(to_dict(experiment)))

    def run(*words: str, script: str = COMMAND, inside: tuple[str, ...] = ()) -> World:
        line = [*inside, sys.executable, script, "train", str(config), *words]
        return launch(line, TMPDIR=str(private))

    return run


@pytest.fixture
def training(start: Start, tmp_path: Path) -> Start:
    """The same with no end in sight, once it has trained some steps."""

    def run(*words: str, **how: Any) -> World:
        world = start("training.epochs=100000", "checkpoint.every_epochs=0", *words, **how)
        until(lambda: steps_done(tmp_path / "runs" / "toy") >= 3, 200, "three steps")
        return world

    return run


def documented_torchrun() -> list[str]:
    """The words of the line for one host in ``docs/clusters.md``, after torchrun's name."""
    page = (ROOT / "docs" / "clusters.md").read_text("utf-8").replace("\\\n", "")
    (line,) = re.findall(r"^ +TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun (.*)$", page, re.M)
    words = line.split()
    assert words[-4:] == ["-m", "mpsl_dist", "train", "CONFIG"]
    return words[:-4]


@pytest.fixture
def under_torchrun(start: Start, launch: Launch, tmp_path: Path) -> Start:
    """The same under torchrun, by the documented line."""

    def run(*words: str, inside: tuple[str, ...] = ()) -> World:
        line = [*inside, sys.executable, "-m", "torch.distributed.run", *documented_torchrun()]
        endless = ["train", str(tmp_path / "toy.yaml"), "training.epochs=100000", *words]
        world = launch([*line, COMMAND, *endless], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        until(lambda: steps_done(tmp_path / "runs" / "toy") >= 3, 200, "three steps")
        return world

    return run


@pytest.fixture
def quickstart(launch: Launch, tmp_path: Path) -> Start:
    """What ``launch/quickstart.sh`` starts, once its processes have trained some steps."""

    def run(inside: tuple[str, ...] = ()) -> World:
        script = (ROOT / "launch" / "quickstart.sh").read_text()
        (words,) = re.findall(r'^exec "\$venv/bin/python" (.*) "\$@"$', script, re.M)
        *command, config = words.split()
        world = launch([*inside, sys.executable, *command, str(ROOT / config)])
        until(lambda: steps_done(tmp_path / "runs" / "quickstart") >= 3, 200, "three steps")
        return world

    return run


def errors(output: str) -> list[str]:
    """The lines that tell what is wrong; there is no traceback beside them."""
    assert "Traceback" not in output, output
    assert "torch" not in output and not re.search(r"^\[W", output, re.MULTILINE), output
    return [line for line in output.splitlines() if line.startswith("error: ")]


def launch_folders(tmp_path: Path) -> list[Path]:
    """What launches have put where temporary files go."""
    found = (tmp_path / "private").iterdir()
    return [path for path in found if path.name.startswith(("mpsl_dist", "torchelastic"))]


def assert_nothing_left(tmp_path: Path) -> None:
    assert not launch_folders(tmp_path)


def ranks(world: World, number: int) -> list[int]:
    """Ids of a rank and, after it, of the process that hosts its clients."""
    roles = {member: role_of(member) for member in world.members()}
    return [member for member, role in roles.items() if role and role[0] == number]


def listening(world: World) -> set[tuple[str, int]]:
    """Address and port of every TCP socket on which a process of this launch listens."""
    found = set()
    for member in world.members():
        own = set()
        for entry in Path(f"/proc/{member}/fd").iterdir():
            try:
                own.add(os.readlink(entry))
            except OSError:  # closed meanwhile
                continue
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{member}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == "0A" and f"socket:[{rest[5]}]" in own:
                    found.add(_address(local))
    return found


def _address(text: str) -> tuple[str, int]:
    """Read the kernel's form: words of four bytes, each in this machine's order."""
    digits, port = text.split(":")
    words = [bytes.fromhex(digits[i : i + 8]) for i in range(0, len(digits), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, packed), int(port, 16)


def own_addresses() -> list[str]:
    """This host's addresses beside loopback."""
    try:
        shown = subprocess.run(["ip", "-json", "address"], capture_output=True, text=True)
    except OSError:
        return []
    found = [entry["local"] for link in json.loads(shown.stdout) for entry in link["addr_info"]]
    return [a for a in found if not a.startswith(("127.", "fe80:")) and a != "::1"]


def connects(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 2).close()
    except OSError:
        return False
    return True


def test_one_command_trains_to_the_end_and_listens_on_loopback_alone(
    start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "toy"
    world = start("training.epochs=20", "checkpoint.every_epochs=0")
    until(lambda: steps_done(run) >= 3, 200, "three steps")
    (folder,) = launch_folders(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    # The names of forks: torch was imported once for all, while there was one thread alone.
    names = {Path(f"/proc/{member}/comm").read_text().strip() for member in world.members()}
    assert {"rank0", "rank1", "rank2"} <= names
    found = listening(world)
    # RPC, once in each process; a passer-by at any of its ports could end the run.
    assert len(found) == 3 and {address for address, _ in found} <= {"127.0.0.1", "::1"}, found
    ports = {port for _, port in found}
    assert any(connects("127.0.0.1", port) for port in ports)
    for address in own_addresses():
        assert not any(connects(address, port) for port in ports), address
    status, output = world.finish(300)
    assert status == 0 and not errors(output), output
    assert output.startswith("3 processes on this machine; nothing listens outside loopback\n")
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    assert_nothing_left(tmp_path)


REACH = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port)), 2).close()
        print(port)
    except OSError:
        pass
"""
OPEN = """
import socket, time
server = socket.create_server(("", 0))
print(server.getsockname()[1], flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("way", ["quickstart", "under_torchrun"])
def test_neither_another_host_nor_the_own_address_reaches_a_port_of_the_run(
    way: str,
    request: pytest.FixtureRequest,
    launch: Launch,
    cable: tuple[str, str],  # noqa: F811
) -> None:
    here, there = (("ip", "netns", "exec", name) for name in cable)
    world = request.getfixturevalue(way)(inside=here)
    ports = {str(port) for _, port in listening(world)}
    assert len(world.members()) >= 4 and ports
    control = launch([*here, sys.executable, "-c", OPEN])
    until(lambda: control.output().endswith("\n"), 60, "an open port")
    known = control.output().strip()
    for caller in (there, here):
        line = [*caller, sys.executable, "-c", REACH, ADDRESSES[0], known, *ports]
        reached = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
        assert reached == [known]


def test_a_users_mistake_is_one_message_and_status_2(start: Start, tmp_path: Path) -> None:
    status, output = start("training.epochs=x").finish()
    assert status == 2 and len(errors(output)) == 1 and "processes" not in output, output
    # What rank 0 finds in the data.
    status, output = start("model.image_patch=3", "data.partition.minimum=80").finish(200)
    assert status == 2, output
    patch, minimum = sorted(errors(output), key=lambda line: "image_patch" not in line)
    assert "does not divide" in patch and "80 samples" in minimum, output
    # What stands in the way is told with them, and nothing is started.
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "config.yaml").write_text("name: toy\n")
    status, output = start("model.image_patch=3").finish(200)
    assert status == 2 and len(errors(output)) == 2 and "processes" not in output, output
    assert "--resume" in output and "does not divide" in output
    assert_nothing_left(tmp_path)


def test_a_failing_client_is_one_message_and_status_1(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    tests = str(Path(COMMAND).parents[1])
    fault = FAULTY.replace("self.client == 3 and step == 5", "step == 2")
    script.write_text(f"import sys\nsys.path.insert(0, {tests!r})\n{fault}")
    status, output = start(script=str(script)).finish(200)
    (error,) = errors(output)
    expected = r"error: worker\d, tokenize, step 2: client \d: OSError: clip_0042.mp4: truncated"
    expected += r" \(0 clients are left, faults.min_clients is 1\)"
    assert status == 1 and re.fullmatch(expected, error), output
    assert_nothing_left(tmp_path)


def test_a_killed_worker_is_one_message_and_status_1(training: Start, tmp_path: Path) -> None:
    world = training()
    os.kill(world.rank(2), signal.SIGKILL)
    status, output = world.finish(90)
    (error,) = errors(output)
    assert status == 1 and error.startswith("error: worker2 (clients 1-2): lost in "), output


@pytest.mark.campaign
def test_a_run_goes_on_without_a_killed_worker(training: Start, tmp_path: Path) -> None:
    world = training("faults.on_loss=continue", "faults.rejoin=never")
    run, (rank, child) = tmp_path / "runs" / "toy", ranks(world, 2)
    os.kill(child, signal.SIGKILL)
    until(lambda: rank not in world.members(), 30, "the rank's end")
    done = steps_done(run)
    until(lambda: steps_done(run) > done + 3, 60, "three more steps")
    os.killpg(world.process.pid, signal.SIGINT)
    status, output = world.finish(90)
    summary = json.loads((run / "summary.json").read_text())
    assert status == 1 and summary["status"] == "stopped" and not errors(output), output
    assert "worker2 ended by SIGKILL; not started again" in output
    assert_nothing_left(tmp_path)


@pytest.mark.campaign
def test_no_supervised_process_outlives_a_killed_launcher(training: Start) -> None:
    world = training("faults.on_loss=continue", "faults.exit_timeout=15")
    for member in ranks(world, 1):
        os.kill(member, signal.SIGSTOP)  # neither it nor who watches over it can end by itself
    os.kill(world.process.pid, signal.SIGKILL)
    world.process.wait(10)
    until(lambda: len(world.members()) <= 2, 15, "processes outlive their launcher")


def test_a_killed_server_is_one_message_and_status_1(training: Start, tmp_path: Path) -> None:
    world = training()
    os.kill(world.rank(0), signal.SIGKILL)
    status, output = world.finish(90)
    assert status == 1 and errors(output) == ["error: the server ended: SIGKILL"], output
    assert_nothing_left(tmp_path)


def twice(world: World) -> None:
    for _ in range(2):
        os.killpg(world.process.pid, signal.SIGINT)
        time.sleep(0.3)


STOPS: dict[str, Callable[[World], None]] = {
    "Ctrl-C": lambda world: os.killpg(world.process.pid, signal.SIGINT),
    "Ctrl-C twice": twice,
    "SIGINT to the launcher alone": lambda world: os.kill(world.process.pid, signal.SIGINT),
    "SIGTERM to the launcher alone": lambda world: os.kill(world.process.pid, signal.SIGTERM),
}


@pytest.mark.parametrize(
    "how",
    [
        how if how == "Ctrl-C twice" else pytest.param(how, marks=pytest.mark.campaign)
        for how in STOPS
    ],
)
def test_a_stopped_run_leaves_a_checkpoint(how: str, training: Start, tmp_path: Path) -> None:
    world = training()
    STOPS[how](world)
    status, output = world.finish(90)
    run = tmp_path / "runs" / "toy"
    assert status == 1 and not errors(output), output
    assert output.endswith("stopped on request; the same command with --resume continues\n")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert list((run / "checkpoints").glob(f"step-*{summary['steps_completed']}"))
    assert_nothing_left(tmp_path)


def test_a_run_that_has_not_begun_stops_at_once(start: Start, tmp_path: Path) -> None:
    world = start("faults.exit_timeout=300")
    until(lambda: bool(list((tmp_path / "private").glob("*/rank0.pid"))), 200, "the server")
    os.killpg(world.process.pid, signal.SIGINT)
    status, output = world.finish(60)
    assert status == 1 and not errors(output), output
    assert output.endswith("stopped on request, before the first step\n")
    assert_nothing_left(tmp_path)


@pytest.fixture
def stopped_server(training: Start) -> Iterator[World]:
    """A run whose server does nothing at all any more."""
    world = training("faults.exit_timeout=3")
    os.kill(world.rank(0), signal.SIGSTOP)
    yield world


def test_a_run_that_does_not_stop_in_time_is_killed(stopped_server: World, tmp_path: Path) -> None:
    began = time.monotonic()
    os.killpg(stopped_server.process.pid, signal.SIGINT)
    status, output = stopped_server.finish(60)
    assert 3 <= time.monotonic() - began < 3 + SLACK
    (error,) = errors(output)
    assert status == 1 and "faults.exit_timeout=3 s" in error, output
    assert_nothing_left(tmp_path)


def test_no_process_outlives_a_killed_launcher(training: Start, tmp_path: Path) -> None:
    world = training("faults.exit_timeout=20")
    os.kill(world.process.pid, signal.SIGKILL)
    world.process.wait(10)
    until(lambda: not world.members(), 20, "processes outlive their launcher")
    # There was time to write a checkpoint.
    summary = json.loads((tmp_path / "runs" / "toy" / "summary.json").read_text())
    assert summary["status"] == "stopped", summary
    assert_nothing_left(tmp_path)


@pytest.mark.campaign
def test_not_even_one_that_hangs(training: Start) -> None:
    world = training("faults.exit_timeout=5", "runtime.rpc_timeout=600")
    os.kill(world.rank(2), signal.SIGSTOP)  # so that the server waits for it in the backward
    time.sleep(1)
    os.kill(world.process.pid, signal.SIGKILL)
    world.process.wait(10)
    until(lambda: len(world.members()) <= 1, 5, "processes outlive their launcher")


@pytest.mark.campaign
def test_the_line_for_torchrun_listens_on_loopback_alone(under_torchrun: Start) -> None:
    found = listening(under_torchrun())
    assert found and {address for address, _ in found} <= {"127.0.0.1", "::1"}, found
