"""The averaged tensors of a module, followed by identity: what was replaced, moved or unfrozen is noticed."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_plugins.core.module_state import NamedTensor, averaged_tensors, shorten
from lightning_plugins.core.sharding import is_sharded, local, reshard

# where torch.nn.utils.parametrize moves a tensor to
_PARAMETRIZED = "parametrizations."


@dataclass
class Changes:
    """What was noticed since the last report.

    Attributes:
        news: What changed in the module, a line each.
        losses: What became infinite or NaN and was begun anew, a line each.
        replaced: Names of parameters that were replaced.
        moved: New names of parameters that were moved -> the first of those before.
    """

    news: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)


class FollowedTensors:
    """The tensors of a module that an average follows.

    Args:
        module: The module.
        buffers: Whether floating-point buffers are among them.

    Attributes:
        tensors: The tensors, each once.
        index: Every name, tied ones too, -> number of its tensor.
        origins: Of every tensor the number that it had before the last :meth:`look_again`, ``None`` when it is new.
        joined: Names that :meth:`look_again` found to be new.
        pruned: Numbers of tensors whose pruning it found to be made permanent.
        places: Of every parameter, and of every module on the way to one, the table that it lies in, its key there,
            and itself.
    """

    def __init__(self, module: nn.Module, *, buffers: bool) -> None:
        self.module = module
        self.tensors: list[NamedTensor] = []
        self.index: dict[str, int] = {}
        self.origins: list[int | None] = []
        self.joined: list[str] = []
        self.pruned: list[int] = []
        self._buffers = buffers
        self._shapes: list[Any] = []
        self._pointers: list[int] = []
        self.places: tuple[list[Any], list[str], list[Any]] = ([], [], [])

    @property
    def sharded(self) -> bool:
        """Whether this rank holds only a share of some tensors."""
        return any(is_sharded(found.tensor) for found in self.tensors)

    def is_current(self) -> bool:
        """Return whether every parameter lies where it did."""
        tables, keys, tensors = self.places
        try:
            return all(map(operator.is_, map(operator.getitem, tables, keys), tensors))
        except KeyError:
            return False

    def are_there(self) -> bool:
        """Return the same, after FSDP2 was told to put its gathered parameters away, which are other objects."""
        if not self.is_current():
            reshard(self.module)
        return self.is_current()

    def has_lost(self) -> bool:
        """Return whether a parameter is in the module no more, under no name."""
        here = set(map(id, self.module.parameters()))
        return any(id(found.tensor) not in here for found in self.tensors if not found.is_buffer)

    def look_again(self, changes: Changes, also: Collection[str] = ()) -> list[int | None]:
        """Look the module's tensors up and compare them with those of before.

        Args:
            changes: What changed is added to it.
            also: Names of frozen parameters that are followed too.

        Returns:
            For every tensor now the number of the same one before, ``None`` when its average begins anew.

        Raises:
            RuntimeError: If an averaged tensor was taken out of the module.
        """
        before, names_before = self.tensors, self.index
        known = {_identity(found): number for number, found in enumerate(before)}
        tensors = averaged_tensors(
            self.module,
            buffers=self._buffers,
            also=lambda found: (
                _identity(found) in known or any(name in names_before or name in also for name in found.names)
            ),
        )
        _refuse_removal(tensors, before, names_before)
        self.tensors = tensors
        self.index = {name: number for number, found in enumerate(self.tensors) for name in found.names}
        origins: list[int | None] = []
        moves: list[str] = []
        self.pruned = []
        for number, found in enumerate(self.tensors):
            origin = known.get(_identity(found))
            if origin is not None and self._is_another(found, origin, before):
                origin = None
            origins.append(origin)
            if origin is not None and found.names != before[origin].names:
                old = before[origin].names
                moves.append(f"{old[0]} is now {found.names[0]}" if old[0] != found.names[0] else found.names[0])
                changes.moved[found.names[0]] = old[0]
                if _pruning_ended(old, found.names):
                    self.pruned.append(number)
        self.origins = origins
        new = [
            name for origin, found in zip(origins, self.tensors, strict=True) if origin is None for name in found.names
        ]
        again = [name for name in new if name in names_before]
        self.joined = [name for name in new if name not in names_before]
        changes.replaced += again
        if moves:
            changes.news.append(f"names changed, and the averages go on: {shorten(moves)}.")
        if again:
            changes.news.append(f"{shorten(again)} was replaced: its average begins anew, at its present value.")
        if self.joined and before:
            changes.news.append(joined_line(self.joined))
        return origins

    def bind(self) -> list[Tensor]:
        """Note where everything lies now, and return this rank's parts."""
        parts = [local(found.tensor) for found in self.tensors]
        self._shapes = [part.shape for part in parts]
        self._pointers = [part.data_ptr() for part in parts]
        places: list[tuple[Any, str, Any]] = [
            (place.table, place.key, found.tensor)
            for found in self.tensors
            if not found.is_buffer
            for place in found.places
        ]
        places += _links(self.module, {id(place.owner) for found in self.tensors for place in found.places})
        self.places = ([table for table, _, _ in places], [key for _, key, _ in places], [held for *_, held in places])
        return parts

    def read_buffer(self, number: int) -> Tensor:
        """Return a buffer as it is now: modules assign theirs anew as often as they write into them.

        Raises:
            RuntimeError: If it was taken out of the module.
        """
        found = self.tensors[number]
        place = found.places[0]
        tensor = place.table.get(place.key)
        if tensor is None:
            raise RuntimeError(f"The module's tensor {place.key!r} was removed while it was averaged.")
        if tensor is not found.tensor:
            self.tensors[number] = NamedTensor(tensor, found.names, found.places)
        return tensor

    def _is_another(self, found: NamedTensor, origin: int, before: list[NamedTensor]) -> bool:
        """Return whether a known tensor has another shape, or was given other contents by a parametrization."""
        part = local(found.tensor)
        if self._shapes[origin] != part.shape:
            return True
        names = before[origin].names
        parametrized = found.names != names and any(_PARAMETRIZED in name for name in (*names, *found.names))
        return parametrized and part.data_ptr() != self._pointers[origin]


def _refuse_removal(now: list[NamedTensor], before: list[NamedTensor], names_before: dict[str, int]) -> None:
    names = {name for found in now for name in found.names}
    here = {_identity(found) for found in now}
    removed = [name for name in names_before if name not in names]
    removed = [name for name in removed if _identity(before[names_before[name]]) not in here]
    if removed:
        raise RuntimeError(
            f"The module's tensor {shorten([repr(name) for name in removed])} was removed while it was averaged, or "
            "made one that cannot be averaged. Change the module before the fit, or freeze what is not needed."
        )


def joined_line(names: list[str]) -> str:
    """Return the line that says that tensors joined."""
    return f"{shorten(names)} joined: the average begins at the present value."


def _links(module: nn.Module, owners: set[int]) -> list[tuple[Any, str, nn.Module]]:
    """Return (table, key, module) of every module on the way to one of ``owners``."""
    links: list[tuple[Any, str, nn.Module]] = []
    leads: dict[int, bool] = {}

    def look(part: nn.Module) -> bool:
        if id(part) not in leads:
            leads[id(part)] = id(part) in owners
            for key, child in part._modules.items():
                if child is not None and look(child):
                    links.append((part._modules, key, child))
                    leads[id(part)] = True
        return leads[id(part)]

    look(module)
    return links


def _identity(found: NamedTensor) -> Any:
    """Return what a tensor is recognized by: itself, and a buffer by its place, as it is assigned anew."""
    place = found.places[0]
    return (id(place.owner), place.key) if found.is_buffer else id(found.tensor)


def _pruning_ended(before: tuple[str, ...], now: tuple[str, ...]) -> bool:
    """Return whether a tensor got the name back that torch's pruning had taken from it."""
    return any(f"{name}_orig" in before for name in now)
