"""The command line: ``python -m mpsl_dist COMMAND CONFIG.yaml [key.path=value ...]``.

Exit status 0 success, 2 the user's to mend (a message, no traceback), 141 what is printed has no
reader any more (as a shell says of programs that SIGPIPE ended), 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence

from mpsl_dist.commands import models, planning, results, train, ways
from mpsl_dist.commands.ending import user_error
from mpsl_dist.errors import RefusedError, UserError

_NO_READER = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after the program's name; by default those of this process.

    Raises
    ------
    SystemExit
        With status 2, after a usage error; with status 0, after ``--help``.
    """
    try:
        try:
            status = _command(arguments)
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # rich has met it first
                return _NO_READER
            _flush()
            raise
        _flush()
    except BrokenPipeError:
        if not _unread():
            raise
        # Python's own end flushes what is left, into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NO_READER
    return status


def _flush() -> None:
    """Send out what was printed; of a disk that does not take it Python's own end will tell."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError):
        pass


def _unread() -> bool:
    """Return whether standard output is a pipe whose reader has ended; other pipes break too."""
    try:
        looked = select.poll()
        looked.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in looked.poll(0))


def _command(arguments: Sequence[str] | None) -> int:
    """Read the command line, run its command and return the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    for word in rest:  # argparse takes no positionals after an option
        if word.startswith("-") or "=" not in word:
            parser.error(f"unrecognized argument: {word}")
        if "overrides" not in options:
            parser.error(f"{options.command} takes no key.path=value: {word}")
        options.overrides.append(word)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    # What every rank gives to Python: a script of the user's is started again as it was.
    options.again = ["-m", "mpsl_dist", *arguments] if arguments else sys.orig_argv[1:]
    # A program that calls this function may hold what its forks can't use, and torch that was
    # imported before has not read what is set here.
    forks = not arguments and "torch" not in sys.modules
    options.go_on = (lambda: _perform(options)) if forks else None
    return _perform(options)


def _perform(options: argparse.Namespace) -> int:
    """Run the command of a checked command line and return the exit status."""
    try:
        return options.run(options)
    except UserError as error:
        return user_error(error, told=isinstance(error, RefusedError))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mpsl_dist", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for group in (train, results, models, planning, ways):
        group.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
