"""Every way of being started, as the launchers' variables tell it."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

import pytest

from mpsl_dist.runtime import network
from mpsl_dist.runtime.environment import (
    SLURM_PORTS,
    LaunchError,
    expand_counts,
    expand_hosts,
    resolve,
    slurm_port,
)
from mpsl_dist.runtime.meeting import open_store

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
}
SRUN = {
    "SLURM_JOB_ID": "417",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
SUBMITIT = {**SRUN, "SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": "/logs"}
#: ``srun --ntasks-per-node=1 torchrun``: Slurm counts two agents, torchrun eight workers.
AGENT = {
    **SRUN,
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
BY_HAND = {
    name: value
    for name, value in TORCHRUN.items()
    if name.startswith(("RANK", "WORLD", "LOCAL", "MASTER"))
}
ONE_HOST = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "4", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
WITHOUT_STORE = {**ONE_HOST, "TORCHELASTIC_USE_AGENT_STORE": "False"}
SRUN_ON_ONE = {"SLURM_STEP_NODELIST": "gpu07", "SLURM_STEP_TASKS_PER_NODE": "4"}
BATCH = {
    "SLURM_JOB_ID": "417",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "launcher", "place", "meeting"),
    [
        pytest.param(TORCHRUN, "torchrun", (5, 8, 1, 4, 1, 2), "env://", id="torchrun"),
        pytest.param(
            BY_HAND,
            "torchrun",
            (5, 8, 1, 4, 1, 2),
            "rank0://10.0.0.1:29400",
            id="another launcher",
        ),
        pytest.param(
            {**TORCHRUN, "GROUP_RANK": "2", "GROUP_WORLD_SIZE": "3"},
            "torchrun",
            (5, 8, 1, 4, 2, 3),
            "env://",
            id="unequal nodes",
        ),
        pytest.param(SRUN, "slurm", (2, 4, 0, 2, 1, 2), "rank0://gpu07:", id="srun"),
        pytest.param(SUBMITIT, "slurm", (2, 4, 0, 2, 1, 2), "rank0://gpu07:", id="submitit"),
        pytest.param(
            {**AGENT, **TORCHRUN}, "torchrun", (5, 8, 1, 4, 1, 2), "env://", id="srun torchrun"
        ),
        pytest.param(
            {**BATCH, **TORCHRUN}, "torchrun", (5, 8, 1, 4, 1, 2), "env://", id="sbatch torchrun"
        ),
        pytest.param(
            without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),
            "slurm",
            (2, 4, 0, 2, 1, 2),
            "rank0://gpu07:",
            id="srun with the job's shape only",
        ),
        pytest.param(
            {**SRUN, "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[01-08]"},
            "slurm",
            (2, 4, 0, 2, 1, 2),
            "rank0://gpu07:",
            id="a step smaller than its job",
        ),
        pytest.param(
            {**SRUN, "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
            "slurm",
            (2, 4, 0, 2, 1, 2),
            "rank0://gpu07:",
            id="srun with the same ranks by hand",
        ),
        pytest.param(
            {**SRUN, "MASTER_ADDR": "192.168.0.7", "MASTER_PORT": "7777"},
            "slurm",
            (2, 4, 0, 2, 1, 2),
            "rank0://192.168.0.7:7777",
            id="srun with the meeting place by hand",
        ),
        pytest.param(
            {**SRUN, "MASTER_ADDR": "fd00::7", "MASTER_PORT": "7777"},
            "slurm",
            (2, 4, 0, 2, 1, 2),
            "rank0://[fd00::7]:7777",
            id="IPv6",
        ),
        pytest.param(
            {**ONE_HOST, "TORCHELASTIC_USE_AGENT_STORE": "True"},
            "torchrun",
            (1, 4, 1, 4, 0, 1),
            "env://",
            id="torchrun on one host",
        ),
        pytest.param(
            WITHOUT_STORE,
            "torchrun",
            (1, 4, 1, 4, 0, 1),
            "rank0://127.",
            id="torchrun on one host without its store",
        ),
        pytest.param(
            {**BY_HAND, "WORLD_SIZE": "4", "RANK": "1"},
            "torchrun",
            (1, 4, 1, 4, 0, 1),
            "rank0://127.",
            id="another launcher on one host",
        ),
        pytest.param(
            {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "False"},
            "torchrun",
            (5, 8, 1, 4, 1, 2),
            "rank0://10.0.0.1:29400",
            id="torchrun without its store",
        ),
        pytest.param(
            {**ONE_HOST, "MPSL_DIST_LAUNCH_FOLDER": "/tmp/x"},
            "mpsl_dist",
            (1, 4, 1, 4, 0, 1),
            "file:///tmp/x/world",
            id="the one command",
        ),
        pytest.param(
            {**SRUN, "SLURM_NODEID": "0", **SRUN_ON_ONE},
            "slurm",
            (2, 4, 0, 4, 0, 1),
            "rank0://127.",
            id="srun on one host",
        ),
    ],
)
def test_started_as_a_rank(variables, launcher, place, meeting):
    found = resolve(variables)
    assert found.launcher == launcher
    assert place == (
        found.rank,
        found.world,
        found.local_rank,
        found.local_world,
        found.node,
        found.nodes,
    )
    assert found.init_method.startswith(meeting)


own_addresses = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="one address of loopback is all there is here"
)


@own_addresses
def test_runs_of_one_host_meet_at_addresses_of_their_own():
    srun = {**SRUN, "SLURM_NODEID": "0", **SRUN_ON_ONE}
    runs = [
        WITHOUT_STORE,
        {**WITHOUT_STORE, "TORCHELASTIC_RUN_ID": "another"},
        {**WITHOUT_STORE, "MASTER_PORT": "29402"},
        srun,
        {**srun, "SLURM_STEP_ID": "1"},
    ]
    rank = {"RANK": "0", "LOCAL_RANK": "0"}, {"SLURM_PROCID": "0"}
    meetings = [resolve(run).init_method for run in runs]
    assert meetings == [resolve({**run, **rank["SLURM_PROCID" in run]}).init_method for run in runs]
    addresses = {meeting.rpartition(":")[0] for meeting in meetings}
    assert len(addresses) == len(runs) and "rank0://127.0.0.1" not in addresses


@own_addresses
def test_a_rank_that_waits_for_the_store_knocks_at_no_other_door():
    """RPC of another run, which listens on 127.0.0.1, would not survive it."""
    came = []

    def answer(other: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it closes at the end
            while True:
                stranger, address = other.accept()
                came.append(address)
                stranger.close()

    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=answer, args=(other,), daemon=True).start()
        port = str(other.getsockname()[1])
        with pytest.raises(RuntimeError, match=port):
            open_store(resolve({**WITHOUT_STORE, "MASTER_PORT": port}), 0.3)
        other.shutdown(socket.SHUT_RDWR)
    assert not came


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, id="a shell"),
        pytest.param({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, id="a shell with an address"),
        pytest.param(without(BATCH, "SLURM_PROCID"), id="salloc"),
        pytest.param(BATCH, id="batch script"),
        pytest.param({**BATCH, "SLURM_STEP_ID": str(0xFFFFFFFB)}, id="numbered batch script"),
        pytest.param({**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFA)}, id="interactive step"),
        pytest.param(
            {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, id="srun --pty bash"
        ),
    ],
)
def test_started_plainly(variables):
    assert resolve(variables) is None


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        pytest.param({"RANK": "0"}, ["WORLD_SIZE", "MASTER_ADDR", "RANK are|RANK is"], id="RANK"),
        pytest.param({"TORCHELASTIC_RUN_ID": "x"}, ["RANK", "TORCHELASTIC_RUN_ID"], id="run id"),
        pytest.param(without(TORCHRUN, "MASTER_PORT"), ["MASTER_PORT"], id="no port"),
        pytest.param({**TORCHRUN, "MASTER_ADDR": ""}, ["MASTER_ADDR"], id="empty address"),
        pytest.param({**TORCHRUN, "RANK": "8"}, ["RANK=8", "WORLD_SIZE=8"], id="rank too high"),
        pytest.param({**TORCHRUN, "RANK": "one"}, ["RANK", "'one'"], id="no number"),
        pytest.param({**TORCHRUN, "WORLD_SIZE": "0"}, ["WORLD_SIZE"], id="empty world"),
        pytest.param({**TORCHRUN, "LOCAL_RANK": "4"}, ["LOCAL_RANK=4"], id="local rank"),
        pytest.param({**TORCHRUN, "MASTER_PORT": "70000"}, ["MASTER_PORT", "70000"], id="port"),
        pytest.param({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, ["LOCAL_WORLD_SIZE=9"], id="local"),
        pytest.param(without(SRUN, "SLURM_JOB_ID"), ["SLURM_JOB_ID", "SLURM_PROCID"], id="job"),
        pytest.param(
            without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_LOCALID"),
            ["SLURM_STEP_NODELIST", "SLURM_LOCALID"],
            id="no nodes",
        ),
        pytest.param({**SRUN, "SLURM_PROCID": "4"}, ["SLURM_PROCID=4"], id="task too high"),
        pytest.param({**SRUN, "SLURM_NODEID": "2"}, ["SLURM_NODEID=2"], id="node too high"),
        pytest.param(
            {**SRUN, "SLURM_STEP_NODELIST": "gpu7"},
            ["SLURM_STEP_NODELIST=gpu7", "SLURM_STEP_TASKS_PER_NODE"],
            id="shape",
        ),
        pytest.param({**SRUN, "RANK": "3"}, ["RANK=3", "SLURM_PROCID=2"], id="ranks differ"),
        pytest.param(
            {**SRUN, "WORLD_SIZE": "8"}, ["WORLD_SIZE=8", "SLURM_STEP_NUM_TASKS=4"], id="worlds"
        ),
        pytest.param({**SRUN, "MASTER_PORT": "x"}, ["MASTER_PORT"], id="Slurm port"),
    ],
)
def test_partial_and_conflicting_sets_name_the_variables(variables, named):
    with pytest.raises(LaunchError) as error:
        resolve(variables)
    for pattern in named:
        assert any(option in str(error.value) for option in pattern.split("|"))


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu5", ["gpu5"]),
        ("a,b", ["a", "b"]),
        ("node[01-03,07],gpu5", ["node01", "node02", "node03", "node07", "gpu5"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[09-11]-ib", ["n09-ib", "n10-ib", "n11-ib"]),
        ("rack[1-2]node[1-2]", ["rack1node1", "rack1node2", "rack2node1", "rack2node2"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
    ],
)
def test_host_lists(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "a,,b", "n[1-", "n]1[", "n[2-1]", "n[a-b]", "n[]", "a,"])
def test_no_host_list(text):
    with pytest.raises(LaunchError, match="no Slurm node list"):
        expand_hosts(text)


def test_task_counts():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(LaunchError, match="2x3"):
        expand_counts("2x3")


def test_ports_of_jobs_that_may_share_a_node_differ():
    for jobs, steps in ((range(9000, 14000), range(1)), (range(9960, 10041), range(61))):
        ports = [slurm_port(job, step) for job in jobs for step in steps]
        assert len(set(ports)) == len(ports)
        assert all(port in SLURM_PORTS and port + 1 in SLURM_PORTS for port in ports)


def test_interface():
    here = resolve({**TORCHRUN, "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"})
    assert here.one_host
    assert here.interface() == network.loopback()
    existing = network.interfaces()[-1]
    assert resolve({**TORCHRUN, "TP_SOCKET_IFNAME": existing}).interface() == existing
    with pytest.raises(LaunchError, match=r"runtime\.interface.*'nope'"):
        here.interface("nope")
    with pytest.raises(LaunchError, match=r"TP_SOCKET_IFNAME.*'nope'"):
        resolve({**TORCHRUN, "TP_SOCKET_IFNAME": "nope"}).interface()


@pytest.mark.skipif(not hasattr(socket, "if_nameindex"), reason="no list of interfaces here")
def test_interface_towards_the_master():
    for address in ("127.0.0.1", "127.0.0.2", "localhost"):
        several = resolve({**TORCHRUN, "MASTER_ADDR": address})
        assert not several.one_host
        assert several.interface() == network.loopback()
    with pytest.raises(LaunchError, match=r"host\.invalid.*MASTER_ADDR"):
        resolve({**TORCHRUN, "MASTER_ADDR": "host.invalid"}).interface()


def test_where_rank_0_listens():
    assert network.listening_address("127.0.0.1") == "127.0.0.1"
    assert network.listening_address("127.0.0.2") == "127.0.0.2"
    assert network.listening_address("localhost") == "127.0.0.1"
    with pytest.raises(LaunchError, match=r"host\.invalid.*MASTER_ADDR"):
        network.listening_address("host.invalid")


def test_a_name_of_loopback_alone_is_not_where_others_arrive(monkeypatch):
    towards = {"gpu07": "127.0.1.1", network._ELSEWHERE: "192.0.2.1"}
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *a, **k: real(towards[name], *a, **k))
    monkeypatch.setattr(network, "_local_address", lambda address: f"towards {address}")
    assert network.listening_address("gpu07") == f"towards {network._ELSEWHERE}"
