"""The launching process: which processes it ends, and which it leaves alone."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpsl_dist.runtime import launch

#: A rank that leaves a process of its group behind, which holds standard output open.
LEAVES_ONE = "import subprocess; subprocess.Popen(['sleep', '60'])"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Handlers as they were."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_group_is_ended_while_its_rank_is_remembered_and_never_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, writing = os.pipe()
    known, killpg = [], os.killpg

    def remembering(group: int, number: int) -> None:
        # From when a rank was waited for its number may be another's.
        known.append(Path(f"/proc/{group}").exists())
        killpg(group, number)

    def started(*words: object, **how: object) -> subprocess.Popen:
        command = [sys.executable, "-c", LEAVES_ONE]
        return subprocess.Popen(command, start_new_session=True, stdout=writing)

    monkeypatch.setattr(os, "killpg", remembering)
    monkeypatch.setattr(launch, "start", started)
    assert launch.run(2, [], grace=5.0) == 0
    os.close(writing)
    assert known == [True, True]
    assert select.select([reading], [], [], 30.0)[0]  # whoever was left has ended
    os.close(reading)
