"""What files of weights hold that are no Lightning checkpoints, and what lies in a directory, in plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_plugins.checkpoints.average_plan import size_on_disk
from lightning_plugins.checkpoints.formats import open_checkpoint
from lightning_plugins.checkpoints.record import read_records
from lightning_plugins.checkpoints.selection import found_in
from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.validation import plain_value


def describe_weights(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Return what a file or a sharded directory holds, whatever its format.

    Args:
        path: ``.safetensors``, a plain state dict, or a directory of ``torch.distributed.checkpoint``.
        trust: Load a file that needs more than tensors and plain values, which runs code that the file chooses.

    Returns:
        ``path``, ``file_bytes``, ``kind``, ``epoch``, ``global_step``, ``state_dict`` (``weights``: which set it is;
        ``tensors``, ``elements``, ``bytes``, ``types``), ``sources`` (the checkpoints that it is the mean of), and
        ``other`` (what is no tensor).

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it cannot be read.
    """
    found = open_checkpoint(path, trust=trust)
    manifest = checkpoint_keys.mean_manifest(found.header)
    sizes = {(name if spec.alias is None else spec.alias): spec.nbytes for name, spec in found.specs.items()}
    kinds = {".safetensors": "safetensors"}
    return {
        "path": str(path),
        "file_bytes": size_on_disk(found.path),
        "kind": "sharded" if found.path.is_dir() else kinds.get(found.path.suffix, "state dict"),
        "epoch": found.epoch,
        "global_step": found.step,
        "state_dict": {
            "weights": "weights" if manifest is None else checkpoint_keys.mean_described(manifest),
            "tensors": len(found.specs),
            "elements": sum(spec.numel for spec in found.specs.values()),
            "bytes": sum(sizes.values()),
            "types": sorted({str(spec.dtype).removeprefix("torch.") for spec in found.specs.values()}),
        },
        "sources": [str(plain_value(file.get("path", "?"))) for file in manifest["files"]] if manifest else [],
        "other": sorted(map(str, (*found.extras, *found.header))),
    }


def describe_directory(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what each checkpoint in a directory says of itself, in the order of steps; no weights are read.

    Returns:
        For each ``path``, ``file_bytes``, ``epoch``, ``global_step``, ``score``, and ``mean``: whether it is one. Then
        a line for each that cannot be read.

    Raises:
        OSError: If the directory cannot be opened.
    """
    records, faults = read_records(found_in(Path(path)))
    found = [
        {
            "path": str(record.path),
            "file_bytes": size_on_disk(record.path),
            "epoch": record.epoch,
            "global_step": record.step,
            "score": record.score,
            "mean": record.manifest is not None,
        }
        for record in sorted(records, key=lambda one: (one.step is None, one.step or 0))
    ]
    return found, list(faults.values())
