"""Reads the sharded directories that Lightning's FSDP and ModelParallel strategies write, as one checkpoint each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_plugins.checkpoints.formats.base import Checkpoint
from lightning_plugins.checkpoints.formats.torch_reader import load_pickled
from lightning_plugins.core.checkpoint_file import CheckpointError
from lightning_plugins.core.checkpoint_keys import STATE_DICT_KEYS
from lightning_plugins.core.second_sets import belonging
from lightning_plugins.core.sharded_directory import ShardedTensors


class ShardedDirectory(Checkpoint):
    """A sharded checkpoint of Lightning's FSDP or ModelParallel strategy.

    Args:
        path: The directory.
        trust: Load whatever ``meta.pt`` names, which runs code that the file chooses.
    """

    def __init__(self, path: Path, *, trust: bool) -> None:
        super().__init__(path)
        if os.path.lexists(path / "meta.pt"):
            header = load_pickled(path / "meta.pt", trust=trust)
            if not isinstance(header, Mapping):
                raise CheckpointError(f"{path / 'meta.pt'} holds a {type(header).__name__}, not a checkpoint's rest.")
            self.header = dict(header)
        # one that was cut off while it was written is refused
        belonging(path, self.header)
        self._tensors = ShardedTensors(path, STATE_DICT_KEYS)
        self.specs, self.extras = self._tensors.specs, self._tensors.extras
        if not self.specs:
            raise CheckpointError(
                f"{path} holds no weights: nothing under {' or '.join(STATE_DICT_KEYS)} in its index."
            )

    def parts(self, name: str) -> list[tuple[int, int]]:
        """Return the flat ranges that its ranks wrote, in order; one range if its parts are not runs of rows."""
        return self._tensors.parts(name)

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return a range of the flattened tensor: mapped if it lies in one part of whole rows, else put together."""
        return self._tensors.flat(name, start, stop)
