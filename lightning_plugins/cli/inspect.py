"""``lightning-plugins inspect``: what a checkpoint holds."""

from __future__ import annotations

import argparse
from typing import Any

from lightning_plugins import ema
from lightning_plugins.cli.commands import Commands, add_trust
from lightning_plugins.core.validation import printable


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "inspect",
        help="say what a checkpoint holds",
        description="Say what a Lightning checkpoint holds, without running what it names.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a Lightning checkpoint")
    add_trust(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each thing that is there."""
    found = ema.describe_checkpoint(arguments.checkpoint, trust=arguments.trust)
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {printable(_text(value))}")  # noqa: T201


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_text(part)}" for name, part in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
