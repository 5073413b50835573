"""Whether checkpoints are of one model: their names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_plugins.checkpoints.formats.base import Checkpoint, TensorSpec

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

    def __bool__(self) -> bool:
        return bool(self.lines)

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
    """Return what differs, each file compared with the first that has the name; nothing is read."""
    found = Differences()
    reference: dict[str, tuple[Checkpoint, TensorSpec]] = {}
    for source in sources:
        for name, spec in source.specs.items():
            reference.setdefault(name, (source, spec))
    for name, (origin, spec) in reference.items():
        for source in sources:
            other = source.specs.get(name)
            if other is None:
                found.add(name, f"`{name}` is missing from {source.path.name}")
            elif other.shape != spec.shape:
                here, there = f"{spec.shape} in {origin.path.name}", f"{other.shape} in {source.path.name}"
                found.add(name, f"`{name}` has the shape {here} and {there}")
            elif other.dtype != spec.dtype:
                here, there = (
                    f"{_short(spec.dtype)} in {origin.path.name}",
                    f"{_short(other.dtype)} in {source.path.name}",
                )
                found.add(name, f"`{name}` is {here} and {there}", shared=other.averaged == spec.averaged)
    return found


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
