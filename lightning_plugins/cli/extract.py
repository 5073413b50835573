"""``lightning-plugins extract``: one set of weights out of a checkpoint of a run with EMA."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_plugins import ema
from lightning_plugins.cli.commands import Commands, add_output, add_trust, say
from lightning_plugins.core.files import check_output, write_state_dict

_DESCRIPTION = """\
Write one set of weights of a checkpoint as a plain state dict: the trained
weights, or an average that EMA kept.
"""
_EPILOG = """\
examples:
  lightning-plugins extract last.ckpt --weights raw --output raw.pt
  lightning-plugins extract last.ckpt --weights average --output ema.safetensors
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "extract",
        help="take the raw or the averaged weights out of a checkpoint",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a Lightning checkpoint, file or directory")
    parser.add_argument("--weights", required=True, choices=("raw", "average"), help="which set")
    parser.add_argument("--name", default="ema", help="the EMA's name, for its average (%(default)s)")
    add_trust(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read, choose, write."""
    check_output(Path(arguments.output), overwrite=arguments.overwrite)
    weights = ema.extract_weights(arguments.checkpoint, arguments.weights, arguments.name, trust=arguments.trust)
    say(write_state_dict(weights, arguments.output, overwrite=arguments.overwrite))
