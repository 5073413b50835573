"""``lightning-plugins schedule``: a picture or a text sketch of schedules."""

from __future__ import annotations

import argparse

from lightning_plugins.cli.commands import Commands, picture, say
from lightning_plugins.core.validation import printable
from lightning_plugins.schedules import parse_schedule, plot_schedules, sketch

_EPILOG = """\
examples:
  lightning-plugins schedule "WarmupCosine(warmup='5%', hold='5%')" --total 9000
  lightning-plugins schedule "Noam(768, 4000)" "Noam(768, 8000).delay(100)" \\
      --total 20000 --output noam.png
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "schedule",
        help="draw learning-rate schedules",
        description="Draw learning-rate schedules: as text, or into a picture with --output.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "expressions",
        nargs="+",
        metavar="SCHEDULE",
        help="a schedule as written in Python, with literal arguments; parsed, never evaluated",
    )
    parser.add_argument("--total", type=int, required=True, metavar="STEPS", help="optimizer steps to draw")
    parser.add_argument("--steps-per-epoch", type=float, metavar="STEPS", help="for durations such as '2ep'")
    parser.add_argument("--base-lr", type=float, metavar="RATE", help="show rates instead of factors")
    parser.add_argument(
        "--output", type=picture, metavar="FILE", help="write a picture (needs matplotlib); the suffix is the format"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Draw what was asked for."""
    schedules = {text: parse_schedule(text) for text in arguments.expressions}
    total, options = arguments.total, {"base_lr": arguments.base_lr, "steps_per_epoch": arguments.steps_per_epoch}
    if arguments.output is not None:
        say(plot_schedules(schedules, total, arguments.output, **options))
        return
    for text, schedule in schedules.items():
        print(f"{printable(text)}\n\n{sketch(schedule, total, **options)}\n")  # noqa: T201
