"""Finding one's way: shipped experiments, what keys mean, a run that is under way."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from mpsl_dist.errors import ConfigError

#: Seconds between two looks at a run.
_LOOK = 1.0


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add ``configs``, ``explain`` and ``watch`` to the command line."""
    configs = commands.add_parser("configs", help="list, show or copy the shipped experiments")
    actions = configs.add_subparsers(dest="action")
    show = actions.add_parser("show", help="print one")
    show.add_argument("name", help="as listed; its last word will do")
    copy = actions.add_parser("copy", help="copy one to a file of your own; nothing is overwritten")
    copy.add_argument("name", help="as listed; its last word will do")
    copy.add_argument("to", metavar="FILE.yaml")
    configs.set_defaults(run=_configs)
    explain = commands.add_parser("explain", help="what a key of the configuration means")
    explain.add_argument("key", nargs="?", help="a key or a section; without one, the sections")
    explain.add_argument("--out", metavar="FILE.md", help="write all keys as a page")
    explain.set_defaults(run=_explain)
    watch = commands.add_parser("watch", help="look on at a run, wherever it was started")
    watch.add_argument("run_directory", metavar="RUN", help="a run directory, runs/<name>")
    once = "print how it stands and end, as is done without a terminal"
    watch.add_argument("--once", action="store_true", help=once)
    watch.set_defaults(run=_watch)


def _configs(options: argparse.Namespace) -> int:
    from mpsl_dist.config import shipped

    if options.action == "show":
        print(shipped.find(options.name).read_text(encoding="utf-8"), end="")
    elif options.action == "copy":
        print(f"wrote {shipped.copy(options.name, Path(options.to))}")
    else:
        names = shipped.names()
        width = max(map(len, names), default=0)
        lines = [f"{name:<{width}}  {shipped.line_of(shipped.find(name))}" for name in names]
        print("\n".join(lines))
    return 0


def _explain(options: argparse.Namespace) -> int:
    from mpsl_dist.analysis import reference

    if options.out:
        if options.key:
            raise ConfigError("--out writes all keys; leave the key away")
        Path(options.out).write_text(reference.page(), encoding="utf-8")
        print(f"wrote {options.out}")
        return 0
    print(reference.explain(options.key) if options.key else reference.sections())
    return 0


def _watch(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from mpsl_dist.analysis import watch

    folder, console = Path(options.run_directory), Console()
    if options.once or not console.is_terminal:
        standing = watch.Watcher(folder).look()
        for name, text in watch.rows(standing):
            print(f"{name:<10} {text}")
        return standing.exit_status
    with contextlib.suppress(KeyboardInterrupt), Live(console=console) as live:
        standing = watch.follow(
            folder,
            lambda now: live.update(watch.panel(now, console.width), refresh=True),
            lambda: time.sleep(_LOOK),
        )
        return standing.exit_status
    print("the run goes on", file=sys.stderr)
    return 0
