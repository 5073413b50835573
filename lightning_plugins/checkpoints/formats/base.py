"""What an open checkpoint offers, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.checkpoint_file import TensorSpec


class Checkpoint(ABC):
    """One open checkpoint.

    Attributes:
        path: The file or directory.
        specs: Tensor name -> what it is, in the file's order.
        extras: Entries of the state dict that are no tensors.
        header: What the checkpoint holds beside the state dict (``global_step``, ``hyper_parameters``, ...).
        layout: The attributes of the state dict itself (``_metadata``, the modules' versions).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, TensorSpec] = {}
        self.extras: dict[str, Any] = {}
        self.header: dict[str, Any] = {}
        self.layout: Any = None

    @abstractmethod
    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements ``start`` to ``stop`` of the flattened tensor, mapped where the file allows it."""

    @property
    def step(self) -> int | None:
        """The optimizer step at which it was saved, ``None`` when it does not say."""
        return as_count(self.header.get("global_step"))

    @property
    def epoch(self) -> int | None:
        """The epoch in which it was saved, from 0, ``None`` when it does not say."""
        return as_count(self.header.get("epoch"))


def as_count(value: Any) -> int | None:
    """Return ``value`` if it is a number of steps or epochs that a run can have, else ``None``."""
    return value if type(value) is int and 0 <= value < 2**63 else None


def ema_note(header: Mapping[str, Any], names: Container[str]) -> str | None:
    """Return what is known of the weights in ``state_dict`` if the file is of a run with an EMA, else ``None``.

    The record of this package's EMA says which weights they are. Other callbacks, Lightning's own among them, are told
    by a second set of the same weights somewhere in the file.

    Args:
        header: A checkpoint without its state dict.
        names: The state dict's names.
    """
    record = header.get(checkpoint_keys.EMA)
    if isinstance(record, Mapping) and record.get("state_dict") in ("average", "raw"):
        kind = "EMA's averaged weights" if record["state_dict"] == "average" else "the raw weights, not EMA's average"
        return f"`state_dict`, which is averaged, holds {kind}"
    places = ", ".join(second_sets(header, names))
    return f"a second set of weights (`{places}`) lies beside `state_dict`, which is averaged" if places else None


def second_sets(header: Mapping[str, Any], names: Container[str]) -> list[str]:
    """Return where ``header`` holds another set of the same weights, as ``"current_model_state"`` or ``"ema/raw"``."""
    found = []
    for place, mapping in _mappings(header):
        tensors = [str(key) for key, value in mapping.items() if hasattr(value, "dtype")]
        known = sum(key in names or key.partition(".")[2] in names for key in tensors)
        if tensors and 2 * known > len(tensors):
            found.append(place)
    return found


def _mappings(value: Mapping[str, Any], place: str = "", depth: int = 4) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and depth and key not in ("optimizer_states", "hyper_parameters"):
            yield f"{place}{key}", inner
            yield from _mappings(inner, f"{place}{key}/", depth - 1)
