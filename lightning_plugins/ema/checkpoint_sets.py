"""The sets of weights that averages have beside the ``state_dict`` of a distributed checkpoint."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.distributed_sets import DistributedSets, is_distributed, put_beside
from lightning_plugins.core.second_sets import Label
from lightning_plugins.ema.checkpoint_directory import RAW, average_label, posthoc_label
from lightning_plugins.ema.checkpoint_format import RECORD_VERSION_BESIDE, Contents


def move_sets(strategy: Any, checkpoint: dict[str, Any]) -> None:
    """Take the sets out of a checkpoint that will be a directory, to be written beside.

    Those of a file stay, and of the directories of FSDP1, whose sets are whole.

    Args:
        strategy: The Trainer's, which is about to save it.
        checkpoint: What is saved.
    """
    if not is_distributed(checkpoint):
        put_beside(strategy, checkpoint, {})
        return
    sets: dict[Label, dict[str, Tensor]] = {}
    record = checkpoint.get(checkpoint_keys.EMA)
    if record is not None:
        if record["raw"] is not None:
            sets[RAW] = record["raw"]
        sets.update({average_label(name): average for name, average in record["averages"].items()})
        if sets:
            record.update(version=RECORD_VERSION_BESIDE, raw=None, averages={})
    for key, averages in checkpoint.pop(checkpoint_keys.POSTHOC_EMA, {}).items():
        sets.update({posthoc_label(key, number): average for number, average in enumerate(averages)})
    put_beside(strategy, checkpoint, sets)


def add_sets(contents: Contents, sets: DistributedSets, name: str, *, raw: bool) -> None:
    """Read into ``contents`` what a directory has beside its ``state_dict``; every rank must call it.

    Args:
        contents: What the checkpoint's record says.
        sets: The directory's.
        name: The EMA whose average is read: from the ``state_dict`` if it owns it, whose precision the module's own
            tensors, which have been loaded from it, may not have.
        raw: Whether the trained weights are read, too.
    """
    if contents.owns_state_dict(name) and RAW in sets:
        contents.averages[name] = sets.read_state_dict(sets.names(RAW))
    elif (average := sets.read(average_label(name))) is not None:
        contents.averages[name] = average
    if raw:
        contents.raw = sets.read(RAW)
