"""What the commands have in common."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = object


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a command that writes a state dict."""
    parser.add_argument("--output", required=True, metavar="FILE", help="what to write: .safetensors, or by torch.save")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Declare the option of a command that reads checkpoints."""
    parser.add_argument("--trust", action="store_true", help="load files that need more than tensors and plain values")
