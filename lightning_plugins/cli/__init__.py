"""The command ``lightning-plugins``: argument parsing only, the work is the techniques'."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_plugins._version import __version__
from lightning_plugins.cli import average, extract, inspect, plot, schedule, synthesize

_COMMANDS = (average, extract, synthesize, schedule, plot, inspect)
_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; ``None``: the process's own.

    Returns:
        Exit status: 0, or 2 after one line about bad input on standard error.
    """
    parser = argparse.ArgumentParser(prog="lightning-plugins", description="Training techniques for Lightning.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ImportError, OSError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        print(f"lightning-plugins: error: {message}", file=sys.stderr)  # noqa: T201  # this is a program
        return _BAD_INPUT
    return 0
