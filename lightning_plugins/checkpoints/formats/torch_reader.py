"""Reads what ``torch.save`` wrote: Lightning's ``.ckpt``, or any other file with a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.checkpoints.formats.base import Checkpoint
from lightning_plugins.core import torch_file
from lightning_plugins.core.checkpoint_file import CheckpointError, TensorSpec, unreadable
from lightning_plugins.core.checkpoint_keys import STATE_DICT_KEYS
from lightning_plugins.core.module_state import is_opaque
from lightning_plugins.core.stand_ins import UnreadableError
from lightning_plugins.core.validation import shortened, shown


class TorchFile(Checkpoint):
    """A file of ``torch.save``: a Lightning checkpoint, or a plain state dict.

    Args:
        path: The file.
        trust: Load whatever the pickle names, which runs code that the file chooses.
    """

    def __init__(self, path: Path, *, trust: bool) -> None:
        super().__init__(path)
        state, self.header = split_state_dict(load_pickled(path, trust=trust), path)
        self.layout = getattr(state, "_metadata", None)
        self._tensors = {n: value for n, value in state.items() if isinstance(value, Tensor) and not is_opaque(value)}
        self.extras = {name: value for name, value in state.items() if name not in self._tensors}
        self._flat: tuple[str | None, Tensor] = (None, torch.empty(0))
        for name, tensor in self._tensors.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{path} holds a tensor whose name is {shown(name)}, not a text.")
            if kind := _unusual_kind(tensor):
                raise CheckpointError(f"`{shortened(name)}` in {path} is {kind}; only dense tensors can be averaged.")
            alias = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else None
            self.specs[name] = TensorSpec(tensor.dtype, tuple(tensor.shape), alias)

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return a range of the flattened tensor; no copy if it is contiguous."""
        if self._flat[0] != name:
            self._flat = (name, self._tensors[name].detach().reshape(-1))
        return self._flat[1][start:stop]


def _unusual_kind(tensor: Tensor) -> str | None:
    """Return what a tensor is that has no elements to average, ``None`` for an ordinary one."""
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_nested:
        return "nested"
    return None if tensor.device.type == "cpu" else f"on the device {tensor.device}, without its elements"


def load_pickled(path: Path, *, trust: bool) -> Any:
    """Return what ``torch.save`` wrote to ``path``, its tensors mapped into memory.

    Raises:
        CheckpointError: If the file is damaged, or needs more than tensors and plain values and is not trusted.
    """
    try:
        return torch_file.load(path, trust=trust)
    except torch_file.NeedsTrustError as error:
        raise CheckpointError(
            f"{path} needs more than tensors and plain values to load: {error}. If you trust its author, pass "
            "trust=True (--trust on the command line), which runs that code."
        ) from error
    except UnreadableError as error:
        raise CheckpointError(unreadable(path, error)) from error


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
    keys = ", ".join(f"`{shortened(str(key))}`" for key in list(content)[:10])
    raise CheckpointError(
        f"{path} holds no weights: expected `state_dict` or tensors by name, found {keys or 'nothing'}."
    )
