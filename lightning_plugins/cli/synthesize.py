"""``lightning-plugins synthesize``: an average of any length from the snapshots of a run with post-hoc EMA."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_plugins import ema
from lightning_plugins.cli.commands import Commands, add_output, say
from lightning_plugins.core.files import check_output, write_state_dict

_DESCRIPTION = """\
Reconstruct an exponential moving average of any length from the snapshots that
PostHocEMA wrote.
"""
_EPILOG = """\
example:
  lightning-plugins synthesize posthoc_ema/ --sigma-rel 0.12 --output ema.pt
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "synthesize",
        help="reconstruct an average of any length after training",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("directory", metavar="DIR", help="the folder of the snapshots")
    parser.add_argument("--sigma-rel", type=float, required=True, metavar="S", help="relative width, such as 0.12")
    parser.add_argument("--step", type=int, metavar="N", help="snapshot that the average ends at (the last)")
    add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Solve, sum, write."""
    check_output(Path(arguments.output), overwrite=arguments.overwrite)
    weights = ema.synthesize_ema(arguments.directory, arguments.sigma_rel, arguments.step)
    say(write_state_dict(weights, arguments.output, overwrite=arguments.overwrite))
