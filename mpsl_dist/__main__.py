"""The command line: ``python -m mpsl_dist COMMAND CONFIG.yaml [key.path=value ...]``.

Exit status 0 success, 2 the user's to mend (a message, no traceback), 1 anything else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mpsl_dist.commands import models, planning, results, train, ways
from mpsl_dist.commands.ending import user_error
from mpsl_dist.errors import RefusedError, UserError


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
