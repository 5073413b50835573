"""The average of the float32 master weights that a rank trains under DeepSpeed's ZeRO.

The masters are averaged and not the 16-bit weights that compute, which have lost what most steps change. A rank blends
its own parts, without communication; only an exchange makes the computing weights anew, which every rank takes part in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.core.module_state import NamedTensor, clean_name, named_tensors, state_of
from lightning_plugins.core.sharding import agreed, gather, local
from lightning_plugins.core.zero import Fragment, Zero, fragment, gathered, held_part
from lightning_plugins.ema.digest import digest
from lightning_plugins.ema.following import Changes, FollowedTensors
from lightning_plugins.ema.latest_shadow import LatestShadow
from lightning_plugins.ema.shadow import Shadow, Which


class MasterTensors(FollowedTensors):
    """This rank's parts of the master weights. DeepSpeed holds on to them, so none is replaced, moved or unfrozen.

    Args:
        zero: The run's.
        module: The module.
        buffers: Not averaged: they have no masters.

    Attributes:
        parts: The parts, in the order of ``tensors``.
    """

    def __init__(self, zero: Zero, module: nn.Module, *, buffers: bool) -> None:
        super().__init__(module, buffers=buffers)
        self.parts = zero.masters(module)

    def look_again(self, changes: Changes, also: Collection[str] = ()) -> list[int | None]:
        """Take the parts over once; after that they are the same."""
        known = len(self.tensors)
        self.tensors = [NamedTensor(part.values, part.found.names, part.found.places) for part in self.parts]
        self.index = {name: number for number, found in enumerate(self.tensors) for name in found.names}
        self.origins = [number if known else None for number in range(len(self.tensors))]
        return self.origins

    def bind(self) -> list[Tensor]:
        """Return the parts."""
        return [part.values for part in self.parts]

    def is_current(self) -> bool:
        """Return that they are where they were."""
        return True

    def has_lost(self) -> bool:
        """Return that none was taken away."""
        return False


class MasterShadow(Shadow):
    """The averages of this rank's parts of the master weights.

    Args:
        zero: The run's.
        module: The module.
        device: Where the averages lie, ``None`` for beside the masters.
        start: Name -> this rank's part of the average to begin with.
        **options: Of a kind of average that has more.

    Attributes:
        alone: Whether other ranks cannot be counted on, as after an exception: then an exchange stops at the masters.
    """

    def __init__(
        self,
        zero: Zero,
        module: nn.Module,
        *,
        device: torch.device | str | None = None,
        start: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        self.alone = False
        self.zero = zero
        self._kind = partial(MasterTensors, zero)
        super().__init__(module, device=device, start=start, **options)

    @property
    def parts(self) -> list[Fragment]:
        """This rank's parts of the masters."""
        followed: Any = self._followed
        found: list[Fragment] = followed.parts
        return found

    def rebind_to(self, zero: Zero) -> None:
        """Go on with the masters of another fit of the same module.

        Raises:
            ValueError: If they are cut otherwise.
        """
        self.alone = False
        if zero.optimizer is self.zero.optimizer:
            return
        followed = MasterTensors(zero, self.module, buffers=False)
        followed.look_again(Changes())
        if _cuts(followed.parts) != _cuts(self.parts):
            raise ValueError("An average under ZeRO must go on with the stage and optimizer that it was begun with.")
        self.zero, self._followed = zero, followed
        self._bind({})

    def averages(self) -> list[Fragment]:
        """Return this rank's parts of the average."""
        return [replace(part, values=self._read(number, "average")) for number, part in enumerate(self.parts)]

    def snapshots(self) -> list[list[Tensor]]:
        """Return this rank's parts of the snapshots that the average is made of, the oldest first; none of a blend."""
        return []

    def others(self) -> list[Fragment]:
        """Return what this rank holds of the tensors that are not averaged: frozen parameters and buffers."""
        known = set(self.names)
        return [
            fragment(found, held_part(found.tensor))
            for found in named_tensors(self.module)
            if found.names and found.names[0] not in known
        ]

    def whole_state(self, which: Which) -> dict[str, Tensor]:
        """Return the average, or the masters, in full as a state dict of the module; a collective."""
        found: dict[str, Tensor] = {}
        for number, part in enumerate(self.parts):
            values = self._read(number, which) if which == "average" else self._raw(number)
            whole = gathered(replace(part, values=values))
            found.update(dict.fromkeys(part.found.names, whole))
        for part in self.others():
            cut = hasattr(part.found.tensor, "ds_id")
            whole = gathered(part) if cut else part.found.tensor.detach().clone()
            found.update(dict.fromkeys(part.found.names, whole))
        keys = {clean_name(key): key for key in self.module.state_dict()}
        return {key: found[name] for name, key in keys.items() if name in found}

    def untouched(self) -> bool:
        """Return whether the weights that compute are still those that :meth:`remember` saw, on every rank."""
        return agreed(super().untouched(), self._tensors[0].tensor)

    def _contents(self) -> Any:
        return digest([held_part(part.found.tensor)[1] for part in self.parts])

    def _swap(self, *, to: bool, keep_shadows: bool = False) -> None:
        if self.swapped != to:
            super()._swap(to=to, keep_shadows=keep_shadows)
            if not self.alone:
                self.zero.publish()


class LatestMasterShadow(MasterShadow, LatestShadow):
    """The means of the latest snapshots of this rank's parts; see :class:`MasterShadow` for the arguments.

    ``snapshots`` are of this rank's parts, too, and ``last`` is how many are kept.
    """

    def snapshots(self) -> list[list[Tensor]]:
        """Return this rank's parts of the snapshots, in the order of ``parts``, the oldest first."""
        return [list(parts) for parts in zip(*self._histories, strict=True)]


def _cuts(parts: list[Fragment]) -> list[Any]:
    return [(part.found.names, part.start, part.values.numel()) for part in parts]


def whole_averages(
    shadows: Sequence[Shadow], averaged: set[str], *, keep: bool
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return averages in full, and what of the module is not averaged; a collective when the module is sharded."""
    if isinstance(shadows[0], MasterShadow):
        whole = [
            {clean_name(key): value for key, value in shadow.whole_state("average").items()}
            for shadow in shadows
            if isinstance(shadow, MasterShadow)
        ]
        others = {name: value for name, value in whole[0].items() if name not in averaged}
        return [{name: value for name, value in one.items() if name in averaged} for one in whole], others
    averages = [shadow.collect("average", keep=keep) for shadow in shadows]
    state = {clean_name(key): value for key, value in state_of(shadows[0].module).items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in state.items() if name not in averaged}
    return averages, {name: gather(local(value), value).detach() for name, value in rest.items()}
