"""Whether checkpoints are of one model: their names, shapes and dtypes, and tensors that no mean can be taken of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.checkpoints.formats.base import Checkpoint
from lightning_plugins.core.checkpoint_file import TensorSpec
from lightning_plugins.core.validation import shortened

_NAMED = 10  # differences that a message names


@dataclass
class Differences:
    """What differs between checkpoints.

    Attributes:
        lines: One phrase for each difference.
        unshared: Names that have no mean: missing somewhere, of several shapes, or numbers in one file only.
    """

    lines: list[str] = field(default_factory=list)
    unshared: set[str] = field(default_factory=set)

    def add(self, name: str, line: str, *, shared: bool = False) -> None:
        """Note one difference."""
        self.lines.append(line)
        if not shared:
            self.unshared.add(name)

    def text(self) -> str:
        """Return the first ten in one line."""
        more = len(self.lines) - _NAMED
        return "; ".join(self.lines[:_NAMED]) + (f"; and {more} more." if more > 0 else ".")


def differences(sources: Sequence[Checkpoint]) -> Differences:
    """Return what differs, each file compared with the first that has the name; no dense tensor is read."""
    found = Differences()
    reference: dict[str, tuple[Checkpoint, TensorSpec]] = {}
    for source in sources:
        for name, spec in source.specs.items():
            reference.setdefault(name, (source, spec))
        for name, value in source.extras.items():
            if isinstance(value, Tensor) and name not in found.unshared:
                _compare_opaque(found, name, source, sources)
    for name, (origin, spec) in reference.items():
        for source in sources:
            other = source.specs.get(name)
            if other is None or (other.shape, other.dtype) != (spec.shape, spec.dtype):
                _compare(found, name, origin, source)
    return found


def _compare(found: Differences, name: str, origin: Checkpoint, source: Checkpoint) -> None:
    """Note what differs between a tensor in the first file that has it and in another."""
    spec, other = origin.specs[name], source.specs.get(name)
    if other is None:
        found.add(name, f"`{shortened(name)}` is missing from {source.path.name}")
    elif other.shape != spec.shape:
        here, there = f"{spec.shape} in {origin.path.name}", f"{other.shape} in {source.path.name}"
        found.add(name, f"`{shortened(name)}` has the shape {here} and {there}")
    elif other.dtype != spec.dtype:
        here, there = f"{_short(spec.dtype)} in {origin.path.name}", f"{_short(other.dtype)} in {source.path.name}"
        found.add(name, f"`{shortened(name)}` is {here} and {there}", shared=other.averaged == spec.averaged)


def _compare_opaque(found: Differences, name: str, origin: Checkpoint, sources: Sequence[Checkpoint]) -> None:
    """Note a difference unless a tensor that is no plain block of numbers is the same in every source.

    Such tensors (quantized by torchao, sparse) do not change when they are frozen. One that was trained has no mean
    that could be taken number by number.
    """
    value = origin.extras[name]
    first = _digest(value)
    for source in sources:
        other = source.extras.get(name)
        if source is not origin and not (isinstance(other, Tensor) and _digest(other) == first):
            kind = f"`{shortened(name)}` in {origin.path.name} is {kind_of(value)}, which has no mean"
            found.add(name, f"{kind}, and it is another one in {source.path.name}")
            return


def kind_of(tensor: Tensor) -> str:
    """Return in words what a tensor is that is no plain block of numbers.

    Example:
        >>> kind_of(torch.eye(2).to_sparse())
        'stored as sparse_coo'
    """
    if tensor.layout != torch.strided:
        return f"stored as {_short(tensor.layout)}"
    return f"of the kind {type(tensor).__name__}"


class _Hash:
    """A file that keeps nothing but the digest of what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return len(content)

    def flush(self) -> None:
        """Do nothing: there is nothing to wait for."""


def _digest(tensor: Tensor) -> bytes:
    # what torch writes is the one view of a tensor that every kind of it offers
    file = _Hash()
    torch.save(tensor, file)  # type: ignore[arg-type]  # it writes and does not seek
    return file.digest.digest()


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
