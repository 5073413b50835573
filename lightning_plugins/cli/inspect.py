"""``lightning-plugins inspect``: what a checkpoint, or each in a directory, holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lightning_plugins import checkpoints, ema
from lightning_plugins.cli.commands import BAD_INPUT, Commands, add_trust, complain, say
from lightning_plugins.core.validation import a_path, shortened, shown

_DESCRIPTION = """\
Say what a checkpoint holds, without running what it names: Lightning's, plain
state dicts, safetensors, sharded directories, and all in a directory. Of those
in it that cannot be read it says why on the error output, and the exit status
is 2.
"""
_EPILOG = """\
examples:
  lightning-plugins inspect last.ckpt
  lightning-plugins inspect averaged.safetensors --json
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "inspect", help="say what a checkpoint holds", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument("path", metavar="CKPT|DIR", help="a file of weights, or a directory")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_trust(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each thing that is there, or for each checkpoint of a directory; return the exit status."""
    from lightning_plugins.core.checkpoint_file import refuse_remote  # noqa: PLC0415  # imports torch
    from lightning_plugins.core.sharded_directory import is_sharded_checkpoint  # noqa: PLC0415  # likewise
    from lightning_plugins.core.zero_directory import is_deepspeed_directory  # noqa: PLC0415  # likewise

    refuse_remote(a_path("path", arguments.path))
    path = Path(arguments.path)
    if is_deepspeed_directory(path):
        _print(ema.describe_zero_directory(path), as_json=arguments.json)
    elif path.is_dir() and not is_sharded_checkpoint(path):
        found, faults = checkpoints.describe_directory(path)
        if not found and not faults:
            raise ValueError(f"{path} holds no checkpoints.")
        _print(found, as_json=arguments.json)
        for fault in faults:
            complain(fault)
        return BAD_INPUT if faults else 0
    else:
        _print(_described(path, trust=arguments.trust), as_json=arguments.json)
    return 0


def _described(path: Path, *, trust: bool) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        try:
            return ema.describe_checkpoint(path, trust=trust)
        except ema.NoStateDictError:
            pass
    return checkpoints.describe_weights(path, trust=trust)


def _print(found: dict[str, Any] | list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        # what is no plain value, as a version that a foreign program wrote, is shown as a text
        print(json.dumps(found, indent=2, default=str))  # noqa: T201
    elif isinstance(found, list):
        for one in found:
            say(_text(one))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            say(f"{name.replace('_', ' '):<{width}}  {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{str(name).replace('_', ' ')} {_text(part)}" for name, part in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "-"
    if isinstance(value, int) and value.bit_length() < 1024:
        return f"{value:,}"
    return "-" if value is None else shortened(value) if isinstance(value, str) else shown(value)
