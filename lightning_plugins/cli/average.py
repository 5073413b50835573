"""``lightning-plugins average``: one checkpoint from several."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_plugins import checkpoints
from lightning_plugins.cli.commands import Commands, add_trust, checkpoint_file, say
from lightning_plugins.core.files import check_output
from lightning_plugins.core.validation import printable, shown

_DESCRIPTION = """\
Average checkpoints into one that loads: Lightning's, plain state dicts,
safetensors, sharded directories. Shows what goes in first. A file in a
directory that cannot be read is refused if it could be one of those asked for.
"""
_EPILOG = """\
examples:
  lightning-plugins average checkpoints/ --last 5 --output averaged.ckpt
  lightning-plugins average checkpoints/ --best 5 --dry-run
  lightning-plugins average a.ckpt b.ckpt --weights 2,1 --output ab.safetensors
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "average",
        help="average checkpoints into one that loads",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("inputs", nargs="+", metavar="DIR|FILE", help="checkpoints, or directories that hold some")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", type=int, metavar="N", help="only the N with the highest steps")
    which.add_argument("--best", type=int, metavar="N", help="only the N with the best monitored metric")
    parser.add_argument("--steps", metavar="A:B", help="only from step A to step B, either may be left out")
    parser.add_argument(
        "--weights", metavar="W,W,...", help="one number for each, in the table's order; default: equal"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would be averaged")
    add_trust(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--output", type=checkpoint_file, metavar="FILE", help="what to write: .ckpt or .safetensors")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Show what goes in, then average."""
    if arguments.output is None and not arguments.dry_run:
        raise ValueError("--output must name the file to write; or pass --dry-run.")
    if arguments.output is not None:
        check_output(Path(arguments.output), overwrite=arguments.overwrite)
    plan = checkpoints.plan_average(
        arguments.inputs,
        last=arguments.last,
        best=arguments.best,
        steps=arguments.steps,
        weights=None if arguments.weights is None else _numbers(arguments.weights),
    )
    print(plan.table(), *map(printable, plan.notes), sep="\n", flush=True)  # noqa: T201
    if not arguments.dry_run:
        say(plan.run(arguments.output, trust=arguments.trust, overwrite=arguments.overwrite))


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights must be numbers with commas between them, got {shown(text)}.") from None
