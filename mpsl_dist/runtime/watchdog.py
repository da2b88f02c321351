"""Names who is late before it counts as lost."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from dataclasses import dataclass, field

_log = logging.getLogger("mpsl_dist")


@dataclass
class _Awaited:
    who: str
    phase: str
    since: float = field(default_factory=time.monotonic)
    told: bool = False


class Watchdog:
    """Warns, once a call, of calls that have taken half of their time.

    Parameters
    ----------
    timeout : float
        Seconds until a call counts as failed.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._awaited: dict[int, _Awaited] = {}
        self._numbers = itertools.count()

    def expect(self, who: str, phase: str) -> int:
        """Note that a call begins; return its number for :meth:`done`."""
        number = next(self._numbers)
        self._awaited[number] = _Awaited(who, phase)
        return number

    def done(self, number: int) -> None:
        """Note that a call has ended, one way or the other."""
        self._awaited.pop(number, None)

    def start(self) -> None:
        """Watch from now on, on a thread of its own, for as long as the process lives."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def late(self) -> list[str]:
        """Return a line for every call that has taken half of its time and was not yet told."""
        now, lines = time.monotonic(), []
        for call in list(self._awaited.values()):
            if not call.told and now - call.since > self.timeout / 2:
                call.told = True
                lines.append(
                    f"{call.who}: no answer to {call.phase} for {now - call.since:.0f} s; "
                    f"lost after {self.timeout:g} s"
                )
        return lines

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.timeout / 8))
            for line in self.late():
                _log.warning("%s", line)
                print(line, flush=True)
