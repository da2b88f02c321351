"""The rank that outlives the process which hosts its clients; its children are real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: A child: notes how often it was started again, and does what it is told at that count.
CHILD = """
import os, signal, sys, time
writing, parent, count = map(int, os.environ["MPSL_DIST_SUPERVISED"].split())
open("counts", "a").write(f"{count}\\n")
does = sys.argv[1:][min(count, len(sys.argv) - 2)]
if "joins" in does:
    os.write(writing, b".")
    time.sleep(0.05)
if "killed" in does:
    os.kill(os.getpid(), signal.SIGKILL)
if "silent" in does:
    time.sleep(60)
sys.exit(int(does.split()[-1]))
"""
RANK = """
import sys
from mpsl_dist.runtime.supervisor import supervise
sys.exit(supervise(["child.py", *sys.argv[2:]], 0.5, int(sys.argv[1])))
"""


def supervise(folder: Path, restarts: int, *does: str) -> tuple[int, list[int], str]:
    """Exit status of the rank, how often its child had been started again each time, and stderr."""
    (folder / "child.py").write_text(CHILD)
    (folder / "rank.py").write_text(RANK)
    done = subprocess.run(
        [sys.executable, "rank.py", str(restarts), *does],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    counts = [int(line) for line in (folder / "counts").read_text().split()]
    return done.returncode, counts, done.stderr


def test_a_child_that_ends_well_ends_the_rank(tmp_path: Path) -> None:
    assert supervise(tmp_path, 3, "joins 0") == (0, [0], "")


def test_a_child_that_never_joined_fails_the_rank(tmp_path: Path) -> None:
    assert supervise(tmp_path, 3, "2")[:2] == (2, [0])


def test_a_child_that_is_lost_is_started_again_so_often_and_the_rank_ends_well(
    tmp_path: Path,
) -> None:
    status, counts, said = supervise(tmp_path, 2, "joins killed")
    assert (status, counts) == (0, [0, 1, 2])
    assert said.splitlines() == [
        "worker2 ended by SIGKILL; started again, 1 of 2 times (faults.restarts)",
        "worker2 ended by SIGKILL; started again, 2 of 2 times (faults.restarts)",
        "worker2 ended by SIGKILL; not started again",
    ]


def test_one_that_comes_back_and_is_killed_on_its_way_is_started_again(tmp_path: Path) -> None:
    status, counts, _ = supervise(tmp_path, 3, "joins killed", "killed", "joins 0")
    assert (status, counts) == (0, [0, 1, 2])


def test_one_that_fails_on_its_way_back_would_fail_again(tmp_path: Path) -> None:
    status, counts, said = supervise(tmp_path, 3, "joins killed", "1")
    assert (status, counts) == (0, [0, 1])
    assert said.endswith("worker2 ended with status 1; not started again\n")


def test_where_the_server_is_gone_the_rank_fails(tmp_path: Path) -> None:
    assert supervise(tmp_path, 3, "joins 3")[:2] == (1, [0])


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_child_without_a_sign_of_life_is_killed(restarts: int, tmp_path: Path) -> None:
    status, counts, said = supervise(tmp_path, restarts, "joins silent", "joins 0")
    assert (status, counts) == (0, list(range(restarts + 1)))
    assert "no sign of life for 0.5 s: killed" in said


#: A rank that is a fork itself, as its children are: the last one ends well once it was looked to.
FORKS = """
import os, signal, sys, time
from pathlib import Path
from mpsl_dist.runtime import supervisor

def host():
    supervisor.follow_parent()
    open("counts", "a").write(f"{supervisor.returns()}\\n")
    os.write(int(os.environ["MPSL_DIST_SUPERVISED"].split()[0]), b".")
    if supervisor.returns() < 2:
        os.kill(os.getpid(), signal.SIGKILL)
    while not Path("looked").exists():
        time.sleep(0.02)
    return 0

look = Path("looked").touch
sys.exit(supervisor.supervise(["-c", "raise SystemExit(9)"], 60, 3, look, host))
"""


def test_a_forked_rank_forks_its_child_again_and_follows_its_launching_process(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, (tmp_path / "counts").read_text().split()) == (0, ["0", "1", "2"])
    assert done.stderr.count("worker2 ended by SIGKILL; started again") == 2, done.stderr
