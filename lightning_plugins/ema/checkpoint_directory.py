"""Reads a distributed checkpoint of a run with averages in one process, as if it were a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.second_sets import GRADIENTS, Label, belonging
from lightning_plugins.core.sharded_directory import ShardedTensors, read_index

STATE_DICT: Label = ("state_dict",)
RAW: Label = ("raw",)
"""What the trained weights are listed as, beside their average."""


def average_label(name: str) -> Label:
    """Return what the average of the EMA called ``name`` is listed as."""
    return ("average", name)


def posthoc_label(state_key: str, number: int) -> Label:
    """Return what one of the averages of a callback that keeps several is listed as."""
    return ("posthoc", state_key, str(number))


def read_directory(path: Path, rest: Mapping[str, Any], wanted: Callable[[Label], bool]) -> dict[str, Any]:
    """Return a distributed checkpoint as a single file would have it.

    Args:
        path: The directory.
        rest: What its ``meta.pt`` holds.
        wanted: Whether a set is read, given its label; tensors of others have no elements (device ``meta``). Those of
            optimizers are never read.

    Raises:
        CheckpointError: If it is damaged or was not written completely.
    """
    listing = belonging(path, rest)
    first = ShardedTensors(path, checkpoint_keys.STATE_DICT_KEYS)
    roots = {str(key).partition(".")[0] for key in read_index(path)["state_dict_metadata"]}
    optimizers = sum(root.startswith("optimizer_") for root in roots)
    checkpoint = {**rest, "state_dict": {**_tensors(first, read=wanted(STATE_DICT)), **first.extras}}
    if optimizers:
        checkpoint["optimizer_states"] = [{} for _ in range(optimizers)]
    record = checkpoint.get(checkpoint_keys.EMA)
    if isinstance(record, dict):
        record = checkpoint[checkpoint_keys.EMA] = {**record, "averages": dict(record.get("averages") or {})}
    posthoc: dict[str, list[dict[str, Tensor]]] = {}
    for number, label in enumerate(listing.labels if listing else ()):
        found = ShardedTensors(path / checkpoint_keys.SECOND_SETS_FOLDER, (str(number),))
        tensors = _tensors(found, read=wanted(label))
        if label[0] == "posthoc":
            posthoc.setdefault(label[1], []).append(tensors)
        elif label == GRADIENTS:
            checkpoint["callbacks"] = _with_gradients(checkpoint.get("callbacks"), tensors)
        elif record is not None and label == RAW:
            record["raw"] = tensors
        elif record is not None and label[0] == "average":
            record["averages"][label[1]] = tensors
    return {**checkpoint, checkpoint_keys.POSTHOC_EMA: posthoc} if posthoc else checkpoint


def _with_gradients(states: Any, gradients: dict[str, Tensor]) -> Any:
    """Return the states of callbacks with the gradients of an open window in the one that counts its batches."""
    if not isinstance(states, dict):
        return states
    windows = {key: open_window(state) for key, state in states.items()}
    waiting = {key: window for key, window in windows.items() if window is not None and window.get("gradients") is None}
    added = {key: {**states[key], "carried": {**window, "gradients": gradients}} for key, window in waiting.items()}
    return {**states, **added}


def open_window(state: Any) -> dict[str, Any] | None:
    """Return what a callback's state says of an open window, ``None`` if it says nothing."""
    window = state.get("carried") if isinstance(state, dict) else None
    return window if isinstance(window, dict) else None


def _tensors(found: ShardedTensors, *, read: bool) -> dict[str, Tensor]:
    return {
        name: found.tensor(name) if read else torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for name, spec in found.specs.items()
    }
