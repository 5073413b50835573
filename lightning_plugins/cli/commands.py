"""What the commands have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_plugins.core.validation import printable, shown

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]
else:
    Commands = object

BAD_INPUT = 2
CHECKPOINTS = (".ckpt", ".safetensors")
WEIGHTS = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help leaves the lines of its examples as they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a command that writes a state dict."""
    help_text = "what to write: .safetensors, or .ckpt, .pt, .pth, .bin by torch.save"
    parser.add_argument("--output", type=weights_file, required=True, metavar="FILE", help=help_text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def say(value: object) -> None:
    """Print one line on the output, with nothing in it that a terminal would act upon."""
    print(printable(str(value)))  # noqa: T201  # this is a program


def complain(text: str) -> None:
    """Print one line on the error output, as :func:`say` does on the output."""
    print(f"lightning-plugins: error: {printable(text)}", file=sys.stderr)  # noqa: T201  # this is a program


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Declare the option of a command that reads checkpoints."""
    parser.add_argument("--trust", action="store_true", help="load files that need more than tensors and plain values")


def picture(text: str) -> str:
    """Take the name of a picture, whose suffix is its format."""
    return _with_suffix(text, "a picture's suffix", PICTURES)


def weights_file(text: str) -> str:
    """Take the name of a file of weights to write."""
    return _with_suffix(text, "a suffix of weights", WEIGHTS)


def checkpoint_file(text: str) -> str:
    """Take the name of a checkpoint to write: one that Lightning loads, or weights alone."""
    return _with_suffix(text, "a checkpoint's suffix", CHECKPOINTS)


def _with_suffix(text: str, what: str, suffixes: Sequence[str]) -> str:
    if Path(text).suffix not in suffixes:
        listed = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise argparse.ArgumentTypeError(f"must end in {what} ({listed}), got {shown(text)}")
    return text
