"""``lightning-plugins plot``: the curves in CSV files of statistics."""

from __future__ import annotations

import argparse

from lightning_plugins import statistics
from lightning_plugins.cli.commands import Commands, picture, say

_EPILOG = """\
examples:
  lightning-plugins plot run/log.csv --output curves.png
  lightning-plugins plot runs/small runs/large --log
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "plot",
        help="draw the curves of CSV logs",
        description="Draw the curves of CSVStatisticsLogger's files (needs matplotlib).",
        epilog=_EPILOG,
    )
    parser.add_argument("logs", metavar="LOG.csv|DIR", nargs="+", help="a file, or a folder with such files in it")
    parser.add_argument("--output", type=picture, metavar="FILE", help="the picture; default: beside the first log")
    parser.add_argument("--log", action="store_true", help="logarithmic y axes, where all values are above zero")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Draw."""
    say(statistics.plot_log(arguments.logs, arguments.output, log=arguments.log))
