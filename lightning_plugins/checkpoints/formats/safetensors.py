"""Reads ``.safetensors`` files as checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.checkpoints.formats.base import Checkpoint
from lightning_plugins.core.checkpoint_file import CheckpointError, TensorSpec, unreadable
from lightning_plugins.core.mapped_files import MappedFiles
from lightning_plugins.core.safetensors_file import SafetensorsHeader, read_header
from lightning_plugins.core.stand_ins import UnreadableError


class SafetensorsFile(Checkpoint):
    """A ``.safetensors`` file; its metadata are the header, with ``global_step`` and ``epoch`` as numbers."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._found = checked_header(path)
        self.header = parse_metadata(self._found.metadata)
        self.specs = {name: TensorSpec(found.dtype, found.shape) for name, found in self._found.tensors.items()}
        self._mapped = MappedFiles()
        self._flat: tuple[str | None, Tensor] = (None, torch.empty(0))

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return a mapped range of the flattened tensor."""
        if self._flat[0] != name:
            try:
                tensor = self._mapped.tensor(self.path, self._found.starts[name], self._found.tensors[name])
            except UnreadableError as error:
                raise CheckpointError(unreadable(self.path, error)) from error
            self._flat = (name, tensor.reshape(-1))
        return self._flat[1][start:stop]


def checked_header(path: Path) -> SafetensorsHeader:
    """Return the header of a file.

    Raises:
        CheckpointError: If it is no such file.
    """
    try:
        return read_header(path)
    except UnreadableError as error:
        raise CheckpointError(unreadable(path, error)) from error


def parse_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return safetensors metadata, which are texts, with those that are JSON parsed."""
    return {key: _parsed(text) for key, text in metadata.items()}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text
