"""``lightning-plugins schedule``: a picture or a text sketch of schedules."""

from __future__ import annotations

import argparse
import re
from typing import Any, NamedTuple

from lightning_plugins.cli.commands import Commands, picture, say
from lightning_plugins.core.validation import printable, shown
from lightning_plugins.schedules import Schedule, parse_schedule, plot_schedules, sketch

# `weight_decay=` or `lr/backbone=` before an expression, in which a parenthesis opens before the first `=`
_LABEL = re.compile(r"\s*(?P<parameter>[A-Za-z_]\w*)(/(?P<group>[^=/(]+))?\s*=(?P<expression>.*)", re.DOTALL)
_EPILOG = """\
examples:
  lightning-plugins schedule "WarmupCosine(warmup='5%', hold='5%')" --total 9000
  lightning-plugins schedule "Noam(768, 4000)" "Noam(768, 8000).delay(100)" \\
      --total 20000 --output noam.png
  lightning-plugins schedule "lr/body=Linear('9%', 0, 1)" "lr/head=OneCycle()" \\
      "weight_decay=Cosine(None, 0.04, 0.4)" --total 10000 --output run.png
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "schedule",
        help="draw learning-rate schedules",
        description="Draw schedules as text, or with --output as a picture with a panel a parameter.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "expressions",
        nargs="+",
        metavar="SCHEDULE",
        help="a schedule as written in Python, with literal arguments, after PARAMETER= or PARAMETER/GROUP= if wanted",
    )
    parser.add_argument("--total", type=int, required=True, metavar="STEPS", help="optimizer steps to draw")
    parser.add_argument("--steps-per-epoch", type=float, metavar="STEPS", help="for durations such as '2ep'")
    parser.add_argument(
        "--base-lr", type=float, metavar="RATE", help="show rates instead of factors: of lr, and where nothing is named"
    )
    parser.add_argument(
        "--output", type=picture, metavar="FILE", help="write a picture (needs matplotlib); the suffix is the format"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Draw what was asked for."""
    total, options = arguments.total, {"base_lr": arguments.base_lr, "steps_per_epoch": arguments.steps_per_epoch}
    curves = [_read(text) for text in arguments.expressions]
    panels = _panels(curves)
    if arguments.output is not None:
        say(plot_schedules(panels, total, arguments.output, **options))
        return
    for curve in curves:
        scaled = options if curve.parameter in (None, "lr") else {**options, "base_lr": None}
        print(f"{printable(curve.text)}\n\n{sketch(curve.schedule, total, **scaled)}\n")  # noqa: T201


class _Curve(NamedTuple):
    text: str
    parameter: str | None
    label: str
    schedule: Schedule


def _read(text: str) -> _Curve:
    found = _LABEL.fullmatch(text)
    if found is None:
        return _Curve(text, None, text, parse_schedule(text))
    label = found["group"] or found["expression"]
    return _Curve(text, found["parameter"], label.strip(), parse_schedule(found["expression"]))


def _panels(curves: list[_Curve]) -> dict[str, Any]:
    """Return the schedules by label, those of a named parameter in a mapping of their own.

    Raises:
        ValueError: If a group of a parameter is named twice.
    """
    panels: dict[str, Any] = {}
    for curve in curves:
        panel = panels if curve.parameter is None else panels.setdefault(curve.parameter, {})
        if curve.parameter is not None and curve.label in panel:
            raise ValueError(f"`{curve.parameter}` must have one schedule for {shown(curve.label)}, got another.")
        panel[curve.label] = curve.schedule
    return panels
