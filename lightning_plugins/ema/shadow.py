"""The averaged copy of a module's weights.

The *shadow* of a weight is its average, in float32 at least. A :class:`Shadow` knows a module's tensors and their
shadows, by name, each tied weight once; it blends the weights in, puts the average into the module and takes it out
again. It copies no module, allocates nothing of the module's size after its construction when weights and shadows
have one type, and never waits for a device. Under FSDP2 a shadow is this rank's share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lightning_plugins.core.module_state import Slot, averaged_slots, shadow_dtype
from lightning_plugins.core.sharding import gather, is_sharded, local, reshard, scatter
from lightning_plugins.ema.tensor_groups import Group, Motion, Operation

Which = Literal["average", "raw"]

# id of a module -> the shadow whose average it holds, if any; a shadow holds on to its module, so no id is used twice
_showing: WeakValueDictionary[int, Shadow] = WeakValueDictionary()


def showing(module: nn.Module) -> Shadow | None:
    """Return the shadow whose average ``module`` holds at the moment, ``None`` when its weights are raw."""
    return _showing.get(id(module))


def disown(module: nn.Module) -> None:
    """Take what ``module`` holds for its raw weights from now on."""
    _showing.pop(id(module), None)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Neither gradients nor inference tensors: what is allocated here must be writable in training, too."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Shadow:
    """The averages of a module's trainable parameters.

    Args:
        module: The module.
        buffers: Whether floating-point buffers are averaged too; integer ones never are.
        device: Where the shadows lie, ``None`` for beside their weights. Off a GPU they are pinned, and an update
            streams them through it.
        start: Name -> full tensor to begin with instead of the weights as they are; a frozen weight named here is
            followed too.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 1.0)
        >>> shadow = Shadow(layer)
        >>> _ = nn.init.constant_(layer.weight, 2.0)
        >>> shadow.update(decay=0.75)
        >>> shadow.swap_in(); layer.weight.item()
        1.25
        >>> shadow.swap_out(); layer.weight.item()
        2.0
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        buffers: bool = False,
        device: torch.device | str | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.module = module
        self._buffers = buffers
        self._device = None if device is None else torch.device(device)
        self._slots: list[Slot] = []
        self._index: dict[str, int] = {}  # every name, tied ones too, -> number of its tensor
        self._whole: list[Tensor] = []  # the module's own tensors, DTensors when it is sharded
        self._shadows: list[Tensor] = []
        self._groups: list[Group] = []
        self._where: list[tuple[Group, int]] = []
        self._buffer_indices: list[int] = []
        self._state: tuple[bool, Motion | None] = (False, None)
        self._copied = False
        self.adopt(start or {})

    def __len__(self) -> int:
        return len(self._slots)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._copied = True  # looked at when it is used: the module, which may hold this, need not be whole yet

    @property
    def names(self) -> list[str]:
        """The names of all averaged tensors, tied ones under each of their names."""
        return list(self._index)

    @property
    def tied(self) -> dict[str, str]:
        """Second and further names of tied tensors -> their first."""
        first: dict[int, str] = {}
        return {name: first[index] for name, index in self._index.items() if first.setdefault(index, name) != name}

    @property
    def swapped(self) -> bool:
        """Whether the module holds the average; a swap that was interrupted is finished first."""
        self._settle()
        return self._state[0]

    @property
    def rounds(self) -> bool:
        """Whether some weights are of a smaller type than their averages."""
        return any(not group.exchanges for group in self._groups)

    @property
    def sharded(self) -> bool:
        """Whether this rank holds only a share of some tensors."""
        return any(map(is_sharded, self._whole))

    def adopt(self, start: Mapping[str, Tensor] | None = None) -> list[str]:
        """Take in the tensors that became trainable; their average begins at ``start`` or at their present value.

        Returns:
            The names that are new; those already followed stay as they are.
        """
        slots = averaged_slots(self.module, buffers=self._buffers, also=start or ())
        new = [name for name in slots if name not in self._index]
        known = {id(slot.tensor): index for index, slot in enumerate(self._slots)}
        with plain_tensors():
            for name in new:
                tensor = slots[name].tensor
                if id(tensor) not in known:
                    known[id(tensor)] = len(self._slots)
                    self._slots.append(slots[name])
                    self._shadows.append(self._new_shadow(tensor, (start or {}).get(name)))
                self._index[name] = known[id(tensor)]
        if new:
            self.rebind()
        return new

    def rebind(self) -> None:
        """Look the module's tensors up again: after it moved or was cast, or when they may have been replaced."""
        self._settle()
        stashes = {i: stash for group in self._groups for i, stash in zip(group.indices, group.stash, strict=False)}
        if self.sharded:
            reshard(self.module)
        with plain_tensors():
            self._whole = [slot.tensor for slot in self._slots]
            weights = [local(tensor) for tensor in self._whole]
            self._shadows = [
                shadow.to(self._device or weight.device) for shadow, weight in zip(self._shadows, weights, strict=True)
            ]
            self._group(weights, stashes)

    def update(self, decay: float) -> None:
        """Blend the weights in: s <- s - (1 - decay) (s - w).

        Raises:
            RuntimeError: If the module holds the average: there are no trained weights to blend in.
        """
        if self.swapped:
            raise RuntimeError("The average cannot be updated while the module holds it: swap it out first.")
        with torch.inference_mode(False), torch.no_grad():  # as `plain_tensors`, whose generator would be felt here
            if self._buffer_indices:
                self._refresh()
            for group in self._groups:
                group.blend(1 - decay)

    def swap_in(self) -> None:
        """Put the average into the module; nothing happens when it is there."""
        self._swap(to=True)

    def swap_out(self) -> None:
        """Put the trained weights back; nothing happens when they are there."""
        self._swap(to=False)

    def collect(self, which: Which, *, keep: bool = True, copies: bool = False) -> dict[str, Tensor]:
        """Return every tensor in full, by name, tied names sharing one; a collective when the module is sharded.

        Args:
            which: The averages or the trained values.
            keep: Whether this rank wants them; if not, it only takes part in the collective.
            copies: Whether to return copies rather than references.
        """
        self._wait()
        self._refresh()
        full: dict[int, Tensor] = {}
        with plain_tensors():
            for index, whole in enumerate(self._whole):
                tensor = gather(self._read(index, which), whole)
                if keep and is_sharded(whole):
                    full[index] = tensor.cpu()  # a device that holds shards has no room for the whole
                elif keep:
                    full[index] = tensor.clone() if copies else tensor
        return {name: full[index] for name, index in self._index.items() if index in full}

    def load(self, which: Which, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite averages or trained values by full tensors, by name; those not named stay."""
        self._refresh()
        with plain_tensors():
            for name, index in self._index.items():
                if name in tensors:
                    target = self._read(index, which)
                    target.copy_(scatter(tensors[name].to(target.device), self._whole[index]))

    def fingerprint(self) -> tuple[Any, ...]:
        """Return what differs once anybody has written into a parameter, cast or replaced it; moves do not count.

        Writes are counted by the tensor itself. FSDP2 makes a shard anew whenever its module is told to move, so shards
        are read instead.
        """
        self._settle()
        if self.sharded:
            reshard(self.module)
        tensors = [slot.tensor for slot in self._slots if not slot.is_buffer]
        return tuple((id(tensor), _mark(tensor), tensor.dtype) for tensor in tensors)

    def _swap(self, *, to: bool) -> None:
        if self.swapped == to:
            return
        if self.sharded:
            reshard(self.module)
        if to:
            _showing[id(self.module)] = self
        with plain_tensors():
            self._refresh()
            operations: list[Operation] = []
            for group in self._groups if to else reversed(self._groups):
                operations += group.swap_in() if to else group.swap_out()
            self._state = (not to, Motion(operations))
            self._settle()
        if not to and showing(self.module) is self:
            disown(self.module)

    def _settle(self) -> None:
        if self._copied:  # of tensors that share memory, pickle makes several
            self._copied = False
            if self._state[0]:
                _showing[id(self.module)] = self
            self.rebind()
        swapped, motion = self._state
        if motion is not None:
            with plain_tensors():
                motion.run()
            self._state = (not swapped, None)

    def _read(self, index: int, which: Which) -> Tensor:
        swapped = self.swapped
        group, position = self._where[index]
        pick = group.average if which == "average" else group.raw
        return pick(position, swapped=swapped).detach()

    def _refresh(self) -> None:
        """Read the buffers again: modules assign them anew as often as they write into them."""
        for index in self._buffer_indices:
            group, position = self._where[index]
            self._whole[index] = group.weights[position] = self._slots[index].tensor

    def _group(self, weights: list[Tensor], stashes: Mapping[int, Tensor]) -> None:
        kinds: dict[Any, list[int]] = {}
        for index, (weight, shadow) in enumerate(zip(weights, self._shadows, strict=True)):
            kinds.setdefault((weight.dtype, weight.device, shadow.dtype, shadow.device), []).append(index)
        where: dict[int, tuple[Group, int]] = {}
        self._groups = []
        for (dtype, device, wide, place), indices in kinds.items():
            group = Group(
                indices,
                [weights[index] for index in indices],
                [self._shadows[index] for index in indices],
                exchanges=dtype == wide,
                same_device=device == place,
            )
            if self._state[0] and not group.exchanges:
                group.stash = [stashes[index].to(device) for index in indices]
            self._groups.append(group)
            where.update({index: (group, position) for position, index in enumerate(indices)})
        self._where = [where[index] for index in range(len(self._slots))]
        self._buffer_indices = [index for index, slot in enumerate(self._slots) if slot.is_buffer]

    def _new_shadow(self, tensor: Tensor, start: Tensor | None) -> Tensor:
        weight = local(tensor)
        source = weight if start is None else scatter(start.to(weight.device), tensor)
        place = self._device or weight.device
        pinned = place.type == "cpu" and weight.is_cuda
        shadow = torch.empty_like(weight, dtype=shadow_dtype(weight.dtype), device=place, pin_memory=pinned)
        return shadow.detach().requires_grad_(False).copy_(source)

    def _wait(self) -> None:
        """Wait for shadows that are streamed off a GPU: the host is about to read them."""
        for group in self._groups:
            if group.weights[0].is_cuda and not group.shadows[0].is_cuda:
                torch.cuda.current_stream(group.weights[0].device).synchronize()


def _mark(tensor: Tensor) -> int | bytes:
    if not is_sharded(tensor):
        return tensor._version
    with plain_tensors():
        return hashlib.sha256(local(tensor).reshape(-1).view(torch.uint8).cpu().numpy().data).digest()
