"""Who is late is named before it counts as lost; who was told to stop stops in time."""

from __future__ import annotations

import signal
import subprocess
import sys

from conftest import until

from mpsl_dist.runtime.watchdog import Watchdog

STOP = """
import os, threading
from mpsl_dist.runtime.process import StopRequest
stop = StopRequest(PATIENCE)
stop.listen()
print("listening", flush=True)
threading.Lock().acquire() and os.read(os.pipe()[0], 1)  # the main thread hangs, signals or not
"""


def test_a_late_call_is_told_once_and_an_answered_one_never() -> None:
    watch = Watchdog(timeout=0.4)
    answered, late = watch.expect("worker1", "loss, step 3"), []
    watch.done(answered)
    watch.expect("worker2 (client 4)", "tokenize, step 3")
    until(lambda: late.extend(watch.late()) or bool(late), 10, "a warning")
    assert watch.late() == [] and len(late) == 1
    assert late[0].startswith("worker2 (client 4): no answer to tokenize, step 3 for 0 s")
    assert "lost after 0.4 s" in late[0]


def test_a_process_that_hangs_ends_in_time_after_a_signal() -> None:
    script = STOP.replace("PATIENCE", "0.5")
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "listening\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and "not at an end 0.5 s after SIGTERM" in said
