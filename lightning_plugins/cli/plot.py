"""``lightning-plugins plot``: the curves in a CSV file of statistics."""

from __future__ import annotations

import argparse

from lightning_plugins import statistics
from lightning_plugins.cli.commands import Commands, picture

_EPILOG = """\
example:
  lightning-plugins plot run/log.csv --output curves.png
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "plot",
        help="draw the curves of a CSV log",
        description="Draw the curves in a file of CSVStatisticsLogger (needs matplotlib).",
        epilog=_EPILOG,
    )
    parser.add_argument("log", metavar="LOG.csv", help="the file")
    parser.add_argument("--output", type=picture, metavar="FILE", help="the picture; default: beside the log")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Draw."""
    print(statistics.plot_log(arguments.log, arguments.output))  # noqa: T201
