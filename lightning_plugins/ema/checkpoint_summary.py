"""What a checkpoint holds, as plain numbers and words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.validation import plain_value, shown
from lightning_plugins.ema.checkpoint_directory import open_window
from lightning_plugins.ema.checkpoint_format import load_checkpoint, read_contents, technique_of, tensors_by_name


def describe_checkpoint(checkpoint_path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Return what a checkpoint holds.

    Args:
        checkpoint_path: A Lightning checkpoint: a file, or the directory of a distributed one.
        trust: Load a file that needs more than tensors and plain values, which runs code that the file chooses.

    Returns:
        ``path``, ``file_bytes``, ``kind`` (``"full"``, ``"weights only"`` or ``"sharded"``), ``epoch``,
        ``global_step``, ``lightning`` (the version that wrote it), ``state_dict`` (``weights``: which set it is;
        ``tensors``, ``elements``, ``bytes``, ``types``), ``sources`` (the checkpoints that it is the mean of),
        ``beside`` (other sets of weights, and the gradients of an open window -> bytes), ``callbacks`` (the keys of
        their states), ``optimizers`` (how many), and ``other`` (further keys).

    Raises:
        ValueError: If it is no checkpoint, or needs trust that it is not given.
    """
    checkpoint, path = load_checkpoint(checkpoint_path, trust=trust, wanted=lambda _: False), Path(checkpoint_path)
    state = _tensors(checkpoint["state_dict"].values())
    kind = "full" if "optimizer_states" in checkpoint or "callbacks" in checkpoint else "weights only"
    files = [inner for inner in path.rglob("*") if inner.is_file()] if path.is_dir() else [path]
    return {
        "path": str(checkpoint_path),
        "file_bytes": sum(file.stat().st_size for file in files),
        "kind": "sharded" if path.is_dir() else kind,
        "epoch": plain_value(checkpoint.get("epoch")),
        "global_step": plain_value(checkpoint.get("global_step")),
        "lightning": plain_value(checkpoint.get("pytorch-lightning_version")),
        "state_dict": {
            "weights": _which(checkpoint),
            "tensors": len(state),
            "elements": sum(tensor.numel() for tensor in state),
            "bytes": _bytes(state),
            "types": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state}),
        },
        "sources": _sources(checkpoint),
        "beside": _beside(checkpoint),
        "callbacks": sorted(map(str, _part(checkpoint, "callbacks", {}))),
        "optimizers": len(_part(checkpoint, "optimizer_states", [])),
        "other": sorted(str(key) for key in checkpoint if key not in _KNOWN),
    }


_KNOWN = {
    checkpoint_keys.EMA,
    checkpoint_keys.MEAN,
    checkpoint_keys.POSTHOC_EMA,
    checkpoint_keys.RUN,
    checkpoint_keys.SAVE,
    checkpoint_keys.SECOND_SETS,
    "callbacks",
    "current_model_state",
    "epoch",
    "global_step",
    "loops",
    "lr_schedulers",
    "optimizer_states",
    "pytorch-lightning_version",
    "state_dict",
}


def _sources(checkpoint: Mapping[str, Any]) -> list[str]:
    manifest = checkpoint_keys.mean_manifest(checkpoint)
    return [str(plain_value(file.get("path", "?"))) for file in manifest["files"]] if manifest else []


def _which(checkpoint: Mapping[str, Any]) -> str:
    manifest = checkpoint_keys.mean_manifest(checkpoint)
    if manifest is not None:
        return checkpoint_keys.mean_described(manifest)
    contents = read_contents(checkpoint)
    if contents is None or contents.state_dict == "raw":
        return "trained weights"
    return _named(checkpoint, contents.name) if contents.name else "average of Lightning's own callback"


def _named(checkpoint: Mapping[str, Any], name: str) -> str:
    return f"average of {technique_of(checkpoint, name)} {shown(name)}"


def _beside(checkpoint: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    contents = read_contents(checkpoint)
    if contents is not None and contents.raw is not None:
        found["raw weights"] = _bytes(_tensors(contents.raw.values()))
    for name, average in (contents.averages if contents else {}).items():
        found[_named(checkpoint, name)] = _bytes(_tensors(average.values()))
    for key, averages in _part(checkpoint, checkpoint_keys.POSTHOC_EMA, {}).items():
        if not isinstance(averages, list) or not all(map(tensors_by_name, averages)):
            raise ValueError(f"`{checkpoint_keys.POSTHOC_EMA}` must hold lists of averages, got {shown(averages)}.")
        found[str(key)] = sum(_bytes(_tensors(average.values())) for average in averages)
    for state in _part(checkpoint, "callbacks", {}).values():
        gradients = (open_window(state) or {}).get("gradients")
        if isinstance(gradients, dict):
            found["gradients of an open window"] = _bytes(_tensors(gradients.values()))
    return found


def _part(checkpoint: Mapping[str, Any], key: str, empty: Any) -> Any:
    """Return an entry of a checkpoint, ``empty`` if it has none.

    Raises:
        ValueError: If it is of another kind than ``empty``.
    """
    found = checkpoint.get(key, empty)
    if not isinstance(found, type(empty)):
        what = f"`{key}` in a checkpoint must be a {type(empty).__name__}, got {shown(found)}."
        raise ValueError(what)  # noqa: TRY004  # the file's fault, not an argument's
    return found


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    """Return the size of ``tensors``, tied ones once; sparse ones as if all their elements were there."""
    return sum({_place(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _place(tensor: Tensor) -> int:
    """Return where a tensor lies in memory; its identity where it is in none, as those of directories, or sparse."""
    return (tensor.data_ptr() if tensor.layout == torch.strided else 0) or id(tensor)
