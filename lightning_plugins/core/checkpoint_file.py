"""What is known of a tensor in a checkpoint before it is read, and the error of a checkpoint that cannot be used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_plugins.core.torch_file import reason
from lightning_plugins.core.validation import printable


class CheckpointError(ValueError):
    """Checkpoints that cannot be read or averaged; the message is one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def refuse_remote(path: str | Path) -> None:
    """Raise if a path is that of another machine, as ``s3://bucket/last.ckpt`` is.

    Raises:
        CheckpointError: If so.
    """
    # a Path keeps one slash of the two, and a letter before a colon is a drive
    if "://" in str(path) or ":/" in str(path)[2:]:
        raise CheckpointError(f"{path} is not on this machine; copy it to a local file first.")


def unreadable(path: Path, error: Exception | str) -> str:
    """Return one line that says why ``path`` cannot be read."""
    return f"{path} cannot be read as a checkpoint: {reason(error)}"


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before its bytes are read.

    Args:
        dtype: The element type.
        shape: Sizes.
        alias: Equal for two names of one file that are the same elements of the same storage (tied weights).
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    alias: Any = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def averaged(self) -> bool:
        """Whether a mean makes sense: of floating-point and complex numbers, never of integers and booleans."""
        return self.dtype.is_floating_point or self.dtype.is_complex
