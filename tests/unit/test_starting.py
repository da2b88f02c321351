"""Processes that go on from this one, as forks or begun anew; every parent is a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: A parent that has changed after its start; its child tells how it finds itself.
PARENT = """
import json, os, signal, sys, threading, types
from pathlib import Path
from mpsl_dist.runtime import starting

ANEW = "import json, os; print(json.dumps({'anew': True, 'rank': os.environ['RANK']}))"
found_at_start = []
def noted(*_): pass
def leave_thread(): threading.Thread(target=threading.Event().wait, daemon=True).start()
def ignore_ends(): signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def use_cuda(): sys.modules["torch"] = types.SimpleNamespace(cuda=Used, default_generator=Generator)
class Used:
    def _is_in_bad_fork(): return True
class Generator:
    def seed(): pass

def tell():
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL}
    usual |= {"SIGUSR2": signal.SIG_DFL, "SIGHUP": signal.SIG_IGN}
    print(json.dumps({
        "anew": False,
        "rank": os.environ["RANK"],
        "shares": found_at_start,
        "name": Path("/proc/self/comm").read_text().strip(),
        "apart": os.getsid(0) == os.getpgrp() == os.getpid() != parent,
        "child": os.getppid() == parent,
        "threads": len(os.listdir("/proc/self/task")),
        "signals": all(signal.getsignal(getattr(signal, n)) == h for n, h in usual.items()),
    }))
    return 3
def exits(): sys.exit(2)
def fails(): raise ValueError("no such client")
def dies(): os.kill(os.getpid(), signal.SIGKILL)

parent = os.getpid()
found_at_start.append("torch")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, noted)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
before, does = sys.argv[1:]
if before != "nothing":
    globals()[before]()
go_on = globals().get(does)
child = starting.start(["-c", ANEW], go_on, {"RANK": "2"}, apart=True, name="rank2 hosts")
status = child.wait()
assert child.poll() == child.wait() == status
child.kill()  # no error: it has ended
print(status)
"""


def child_of(before: str, does: str) -> tuple[dict, int, str]:
    """What a child tells of itself, its exit status, and what it leaves on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PARENT, before, does],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    *told, status = done.stdout.splitlines()
    return json.loads(told[0]) if told else {}, int(status), done.stderr


def test_a_fork_shares_its_parents_state_and_is_else_as_begun_anew() -> None:
    assert child_of("nothing", "tell") == (
        {
            "anew": False,
            "rank": "2",
            "shares": ["torch"],
            "name": "rank2 hosts",
            "apart": True,
            "child": True,
            "threads": 1,
            "signals": True,
        },
        3,
        "",
    )


@pytest.mark.parametrize(
    ("before", "does"),
    [
        pytest.param("leave_thread", "tell", id="another thread runs"),
        pytest.param("use_cuda", "tell", id="CUDA was used"),
        pytest.param("nothing", "none", id="a fork is not wanted"),
    ],
)
def test_where_no_fork_is_safe_the_process_begins_anew(before: str, does: str) -> None:
    assert child_of(before, does) == ({"anew": True, "rank": "2"}, 0, "")


def test_the_status_of_a_fork_is_that_of_a_process() -> None:
    assert child_of("nothing", "exits") == ({}, 2, "")
    assert child_of("nothing", "dies") == ({}, -signal.SIGKILL, "")
    # As of a parent whose own parent ignores the end of its children.
    assert child_of("ignore_ends", "exits") == ({}, 2, "")
    told, status, said = child_of("nothing", "fails")
    assert (told, status) == ({}, 1) and said.endswith("ValueError: no such client\n")


DRAWS = """
import random, numpy.random, torch
from mpsl_dist.runtime.starting import start
def draw():
    print(random.random(), numpy.random.rand(), torch.rand(1).item(), sep="\\n")
    return 0
for _ in range(2):
    assert start([], draw, {}).wait() == 0
"""


def test_forks_draw_numbers_of_their_own() -> None:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", DRAWS]
    drawn = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=60).stdout
    assert len(set(drawn.split())) == 6, drawn
