"""The command ``lightning-plugins``: argument parsing only, the work is the techniques'."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from lightning_plugins._version import __version__
from lightning_plugins.cli import average, extract, inspect, plot, schedule, synthesize
from lightning_plugins.cli.commands import BAD_INPUT, Parser, complain
from lightning_plugins.core.validation import first_line

_COMMANDS = (average, extract, synthesize, schedule, plot, inspect)
_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_UNREAD = 141  # 128 + SIGPIPE

_DESCRIPTION = """\
What the techniques of lightning_plugins do without a Trainer: average
checkpoints, take weights out of them, draw schedules and logs.
"""
_EPILOG = """\
examples:
  lightning-plugins average checkpoints/ --last 5 --output averaged.ckpt
  lightning-plugins schedule "WarmupCosine(warmup='5%')" --total 10000
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; ``None``: the process's own.

    Returns:
        Exit status: 0, or 2 after a line about bad input on standard error, whether the rest was done or nothing.
        130 after Ctrl-C, 141 when the output is no longer read.
    """
    parser = Parser(prog="lightning-plugins", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", help="each says more with --help")
    for command in _COMMANDS:
        command.add_parser(commands)
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal that lacks a letter of a path shows its number; the work is done all the same
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = parser.parse_args(argv)
    try:
        status: int | None = arguments.run(arguments)
        # where there is no output at all, nothing
        print(end="", flush=True)  # noqa: T201  # this is a program
    except KeyboardInterrupt:
        print("lightning-plugins: interrupted", file=sys.stderr)  # noqa: T201  # this is a program
        return _INTERRUPTED
    except BrokenPipeError:  # as in `lightning-plugins inspect CKPT | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
        return _UNREAD
    except (ImportError, OSError, TypeError, ValueError, MemoryError, RuntimeError) as error:
        complain(_reason(error))
        return BAD_INPUT
    return status or 0


def _reason(error: Exception) -> str:
    """Return what an error says; the system's own begin with the file instead of a number.

    Of what torch raises the first line is told; among it is that there is not enough memory.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "there is not enough memory."
    return first_line(error) if isinstance(error, RuntimeError) else str(error)
