"""Who else is told of a run's metrics, beside ``metrics.jsonl``: event files, and a user's hook."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpsl_dist import plugins
from mpsl_dist.errors import ConfigError
from mpsl_dist.typed import flatten

#: Is given every line of ``metrics.jsonl``, and ``summary.json`` at the end, with ``split: end``.
Tracker = Callable[[dict[str, Any]], object]


class Trackers:
    """Tells trackers of a run; one that fails is told no more, and the run goes on.

    Parameters
    ----------
    trackers : mapping of str to Tracker
        By the key of the configuration that asks for each.
    warn : callable
        Tells the user of one that failed.
    """

    def __init__(self, trackers: Mapping[str, Tracker], warn: Callable[[str], None]) -> None:
        self._trackers, self._warn = dict(trackers), warn

    def tell(self, line: Mapping[str, Any]) -> None:
        """Hand a line to every tracker, to each a copy of its own."""
        for key, tracker in list(self._trackers.items()):
            try:
                tracker(_copy(line))
            except (Exception, SystemExit) as error:
                del self._trackers[key]
                reason = f"{type(error).__name__}: {error}"
                self._warn(f"{key} failed and is told no more; the run goes on: {reason}")


def find(folder: Path, tensorboard: bool, hook: str | None) -> dict[str, Tracker]:
    """Return the trackers that an experiment asks for; nothing is written before the first line.

    Parameters
    ----------
    folder : Path
        The run directory.
    tensorboard : bool
        Whether TensorBoard's event files are to be written.
    hook : str, optional
        A :data:`Tracker`'s place, "package.module:name".

    Raises
    ------
    ConfigError
        If there is no such hook, or what writes event files is not installed.
    """
    found: dict[str, Tracker] = {}
    if tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            advice = "pip install 'mpsl_dist[tensorboard]'"
            raise ConfigError(f"tracking.tensorboard: tensorboard is not installed; {advice}")
        found["tracking.tensorboard"] = EventFiles(folder / "tensorboard")
    if hook is not None:
        told = plugins.resolve(hook, "tracking.hook")
        if not callable(told):
            raise ConfigError(f"tracking.hook: {hook} is no function, found {told!r}")
        found["tracking.hook"] = lambda line: told({"run": str(folder), **line})
    return found


class EventFiles:
    """TensorBoard's event files: every number of a line, as ``train/loss``, ``test/accuracy``.

    Parameters
    ----------
    folder : Path
        Is created with the first line. What an earlier part of the run wrote there of that step and
        later ones is hidden: a resumed run writes it again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def __call__(self, line: dict[str, Any]) -> None:
        split = line.pop("split")
        if split == "end":
            if self._writer:
                self._writer.close()
            return
        step, _ = line.pop("step"), line.pop("epoch")
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step, flush_secs=10)
        for key, value in flatten({**line.pop("metric", {}), **line}).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{split}/{key.replace('.', '/')}", value, step)


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that shares no mapping with the original."""
    return {
        key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()
    }
