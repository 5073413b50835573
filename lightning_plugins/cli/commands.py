"""What the commands have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_plugins.core.validation import printable

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]
else:
    Commands = object

BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help leaves the lines of its examples as they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a command that writes a state dict."""
    parser.add_argument("--output", required=True, metavar="FILE", help="what to write: .safetensors, or by torch.save")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Declare the option of a command that reads checkpoints."""
    parser.add_argument("--trust", action="store_true", help="load files that need more than tensors and plain values")


def picture(text: str) -> str:
    """Take the name of a picture: without a suffix nobody knows its format."""
    if not Path(text).suffix:
        raise argparse.ArgumentTypeError(f"must end in a picture's suffix such as .png, got {text!r}")
    return text
