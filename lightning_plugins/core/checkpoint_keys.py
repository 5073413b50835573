"""What this package writes into a checkpoint beside Lightning's own entries: the keys, and who reads them.

A technique writes its own entries only; others read them here, so that two techniques need not know each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")
"""Where a state dict lies inside a checkpoint: Lightning's name, then those of Fabric and of plain training loops."""

EMA = "lightning_plugins_ema"
"""EMA's record: which set of weights ``state_dict`` is, and the other sets."""

POSTHOC_EMA = "lightning_plugins_posthoc_ema"
"""Sets of weights that a callback goes on with, by its key: post-hoc EMA's averages, the latest snapshots."""

SECOND_SETS = "lightning_plugins_second_sets"
"""In ``meta.pt`` of a distributed checkpoint: which sets of tensors lie in the folder beside it."""

SECOND_SETS_FOLDER = "lightning_plugins_ema"
"""That folder's name, in the checkpoint's directory."""

SAVE = "lightning_plugins_save"
"""In a distributed checkpoint: which save it is of, in ``meta.pt`` and beside the shares of every rank."""

MEAN = "checkpoint_averaging"
"""The manifest of a file that is the mean of checkpoints (a JSON text in a ``.safetensors`` file's metadata)."""

RUN = "lightning_plugins_run"
"""Which fits have led to a file, written by checkpoint averaging."""


def mean_manifest(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a loaded checkpoint that is the mean of others, ``None`` for any other.

    Raises:
        ValueError: If what lies there is no manifest.
    """
    found = checkpoint.get(MEAN)
    if found is None:
        return None
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise ValueError(f"`{MEAN}` must be the manifest of a mean of checkpoints, and this is none.")
    return dict(found)


def mean_described(manifest: Mapping[str, Any]) -> str:
    """Return what a mean is of, in words.

    Example:
        >>> mean_described({"files": [{}, {}, {}], "weights": "average"})
        'mean of 3 checkpoints, of EMA averages'
    """
    weights = manifest.get("weights")
    known = {"average": ", of EMA averages", "raw": ", of trained weights"}
    of = known.get(weights, "") if isinstance(weights, str) else ""
    return f"mean of {len(manifest['files'])} checkpoints{of}"
