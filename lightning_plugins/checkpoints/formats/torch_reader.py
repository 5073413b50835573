"""Reads what ``torch.save`` wrote: Lightning's ``.ckpt``, or any other file with a state dict."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.checkpoints.formats.base import (
    STATE_DICT_KEYS,
    Checkpoint,
    CheckpointError,
    TensorSpec,
    unreadable,
)
from lightning_plugins.core.module_state import is_opaque


class TorchFile(Checkpoint):
    """A file of ``torch.save``: a Lightning checkpoint, or a plain state dict.

    Args:
        path: The file.
        trust: Load whatever the pickle names, which runs code that the file chooses.
    """

    def __init__(self, path: Path, *, trust: bool = False) -> None:
        super().__init__(path)
        state, self.header = split_state_dict(load_pickled(path, trust=trust), path)
        self.layout = getattr(state, "_metadata", None)
        self._tensors = {n: value for n, value in state.items() if isinstance(value, Tensor) and not is_opaque(value)}
        self.extras = {name: value for name, value in state.items() if name not in self._tensors}
        self._flat: tuple[str, Tensor] = ("", torch.empty(0))
        for name, tensor in self._tensors.items():
            if tensor.is_quantized:
                raise CheckpointError(f"`{name}` in {path} is quantized; only dense tensors can be averaged.")
            alias = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else None
            self.specs[name] = TensorSpec(tensor.dtype, tuple(tensor.shape), alias)

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return a range of the flattened tensor; no copy if it is contiguous."""
        if self._flat[0] != name:
            self._flat = (name, self._tensors[name].detach().reshape(-1))
        return self._flat[1][start:stop]


def load_pickled(path: Path, *, trust: bool) -> Any:
    """Return what ``torch.save`` wrote to ``path``, its tensors mapped into memory.

    Raises:
        CheckpointError: If the file is damaged, or needs more than tensors and plain values and is not trusted.
    """
    with path.open("rb") as file:
        start = file.read(300)
    is_archive = start.startswith(b"PK\x03\x04")  # files of torch < 1.6 are not, and cannot be mapped
    if start[257:262] == b"ustar":
        raise CheckpointError(f"{path} is a tar archive of a torch before 0.2; load and save it with torch first.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on how the file was written
            return torch.load(path, map_location="cpu", mmap=is_archive, weights_only=not trust)
    except pickle.UnpicklingError as error:
        names = _named_classes(path, error)
        if names:
            raise CheckpointError(
                f"{path} needs more than tensors and plain values to load: it names {', '.join(names)}. If you trust "
                f"whoever wrote it, pass trust=True (--trust on the command line), which runs that code."
            ) from error
        raise CheckpointError(unreadable(path, _reason(error))) from error
    except Exception as error:  # damaged bytes, or, when trusted, whatever the file's own code raises
        raise CheckpointError(unreadable(path, error)) from error


def _named_classes(path: Path, error: Exception) -> list[str]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  # only archives of torch >= 1.6 can be asked; the error's own text names one
        names = []
    return sorted(names) or re.findall(r"GLOBAL (\S+)", str(error))[:1]


def _reason(error: Exception) -> str:
    """Return what the loader itself says, without the advice around it."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1] if found else str(error)


def split_state_dict(content: Any, path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return a loaded checkpoint's state dict and the rest.

    Raises:
        CheckpointError: If there is no state dict.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint or a state dict.")
    for key in STATE_DICT_KEYS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return inner, {name: value for name, value in content.items() if name != key}
    if any(isinstance(value, Tensor) for value in content.values()):
        return content, {}
    keys = ", ".join(f"`{key}`" for key in list(content)[:10])
    raise CheckpointError(
        f"{path} holds no weights: expected `state_dict` or tensors by name, found {keys or 'nothing'}."
    )
