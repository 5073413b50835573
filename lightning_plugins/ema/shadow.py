"""The averaged copy of a module's weights.

The *shadow* of a weight is its average, in float32 at least. A :class:`Shadow` knows a module's tensors and their
shadows, each tied weight once; it blends the weights in, puts the average into the module and takes it out again. It
copies no module, allocates nothing of the module's size after its construction when weights and shadows have one type,
and never waits for a device in an update. Under FSDP2 a shadow is this rank's share.

Tensors are followed by identity, which is checked wherever they are used: a parameter that was replaced goes on from
its own value, one that was moved within the module under its new name.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lightning_plugins.core.module_state import NamedTensor, shadow_dtype, shorten
from lightning_plugins.core.sharding import agreed, collected, local, reshard, scatter
from lightning_plugins.ema.digest import digest
from lightning_plugins.ema.following import Changes, FollowedTensors, joined_line
from lightning_plugins.ema.tensor_groups import Group, Motion, Operation, grouped, plain_tensors

Which = Literal["average", "raw"]

# id of a module -> the shadow whose average it holds, if any; a shadow holds on to its module, so no id is used twice
_showing: WeakValueDictionary[int, Shadow] = WeakValueDictionary()


def showing(module: nn.Module) -> Shadow | None:
    """Return the shadow whose average ``module`` holds at the moment, ``None`` when its weights are raw."""
    return _showing.get(id(module))


def disown(module: nn.Module) -> None:
    """Take what ``module`` holds for its raw weights from now on."""
    _showing.pop(id(module), None)


class Shadow:
    """The averages of a module's trainable parameters.

    Args:
        module: The module.
        buffers: Whether floating-point buffers are averaged too; integer ones never are.
        device: Where the shadows lie, ``None`` for beside their weights. Off a GPU they are pinned, and an update
            streams them through it.
        start: Name -> full tensor to begin with instead of the weights as they are; a frozen weight named here is
            followed too.

    Attributes:
        changes: What was noticed since this was last set to ``None``.
        ended: Whether the training has ended: what is replaced from then on is not followed.

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
        self.changes: Changes | None = None
        self.ended = False
        self._followed: FollowedTensors = getattr(self, "_kind", FollowedTensors)(module, buffers=buffers)
        self._device = None if device is None else torch.device(device)
        self._shadows: list[Tensor] = []
        self._groups: list[Group] = []
        self._where: list[tuple[Group, int]] = []
        self._buffer_numbers: list[int] = []
        # in one: Ctrl-C may fall between two assignments
        self._state: tuple[bool, Motion | None] = (False, None)
        self._left: Any = None
        self._writes: list[int] = []
        self._copied = False
        self.follow(start)
        self.changes = None
        without = [found.names[0] for found in self._tensors if start and start.keys().isdisjoint(found.names)]
        if without:
            self._note().news.append(joined_line(without))

    @property
    def _tensors(self) -> list[NamedTensor]:
        return self._followed.tensors

    def _note(self) -> Changes:
        """Return where to write what was noticed."""
        self.changes = self.changes or Changes()
        return self.changes

    def __len__(self) -> int:
        return len(self._tensors)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # looked at when it is used: the module, which may hold this, need not be whole yet
        self._copied = True

    @property
    def names(self) -> list[str]:
        """The names of all averaged tensors, tied ones under each of their names."""
        return list(self._followed.index)

    @property
    def tied(self) -> dict[str, str]:
        """Second and further names of tied tensors -> their first."""
        return {name: found.names[0] for found in self._tensors for name in found.names[1:]}

    @property
    def swapped(self) -> bool:
        """Whether the module holds the average; a swap that was interrupted is finished first."""
        if self._copied or self._state[1] is not None:
            self._finish()
        return self._state[0]

    @property
    def rounds(self) -> bool:
        """Whether some weights are of a smaller type than their averages."""
        return any(not group.exchanges for group in self._groups)

    @property
    def sharded(self) -> bool:
        """Whether this rank holds only a share of some tensors."""
        return self._followed.sharded

    # -- following the module

    def follow(self, start: Mapping[str, Tensor] | None = None) -> list[str]:
        """Look at the module again: take in what became trainable, and follow what was replaced or moved.

        Args:
            start: Name -> full tensor that the average of a new tensor begins as; otherwise its present value.

        Returns:
            The names that are new.

        Raises:
            RuntimeError: If an averaged tensor was taken out of the module.
        """
        self._finish()
        start = start or {}
        changes, stashes, before = self.changes or Changes(), self._stashes(), self._shadows
        origins = self._followed.look_again(changes, also=start)
        with plain_tensors():
            self._shadows = [
                self._new_shadow(found, start) if origin is None else before[origin]
                for origin, found in zip(origins, self._tensors, strict=True)
            ]
            for number in self._followed.pruned:
                self._prune(number, stashes)
        self._bind(stashes)
        self.changes = changes if changes != Changes() else None
        return self._followed.joined

    def rebind(self) -> None:
        """Find the module's tensors where they are now, after it was moved or cast."""
        self._finish()
        if self.sharded:
            reshard(self.module)
        # what was replaced meanwhile is followed when it is used
        if self._followed.is_current():
            self._bind(self._stashes())

    def _check(self) -> None:
        """Follow the module if a parameter is not where it was."""
        if not self._followed.are_there() and not (self.ended and self._followed.has_lost()):
            self.follow()

    def _prune(self, number: int, stashes: Mapping[int, Tensor]) -> None:
        """Set to zero what torch's pruning has set to zero: it has multiplied the weight by its mask for good."""
        tensor = self._tensors[number].tensor
        zeros = local(tensor) == 0
        for kept in (self._shadows[number], stashes.get(id(tensor))):
            if kept is not None:
                kept.masked_fill_(zeros.to(kept.device), 0)

    def _new_shadow(self, found: NamedTensor, start: Mapping[str, Tensor]) -> Tensor:
        weight = local(found.tensor)
        begin = next((start[name] for name in found.names if name in start), None)
        source = weight if begin is None else scatter(begin.to(weight.device), found.tensor)
        place = self._device or weight.device
        pinned = place.type == "cpu" and weight.is_cuda
        shadow = torch.empty_like(weight, dtype=shadow_dtype(weight.dtype), device=place, pin_memory=pinned)
        return shadow.detach().requires_grad_(False).copy_(source)

    def _stashes(self) -> dict[int, Tensor]:
        """Return id of a tensor -> its raw value that is kept aside."""
        pairs = ((i, stash) for group in self._groups for i, stash in zip(group.indices, group.stash, strict=False))
        return {id(self._tensors[number].tensor): stash for number, stash in pairs}

    def _bind(self, stashes: Mapping[int, Tensor]) -> None:
        """Sort the tensors into groups of one kind."""
        with plain_tensors():
            weights = self._followed.bind()
            self._shadows = [
                shadow.to(self._device or weight.device) for shadow, weight in zip(self._shadows, weights, strict=True)
            ]
            kept = [stashes.get(id(found.tensor)) for found in self._tensors]
            self._groups = grouped(weights, self._shadows, kept, swapped=self._state[0])
        where = {i: (group, position) for group in self._groups for position, i in enumerate(group.indices)}
        self._where = [where[number] for number in range(len(self._tensors))]
        self._buffer_numbers = [number for number, found in enumerate(self._tensors) if found.is_buffer]

    def _refresh(self) -> None:
        """Read the averaged buffers again."""
        for number in self._buffer_numbers:
            group, position = self._where[number]
            group.weights[position] = self._followed.read_buffer(number)

    # -- the average

    def update(self, decay: float) -> None:
        """Blend the weights in: s <- s - (1 - decay) (s - w).

        Raises:
            RuntimeError: If the module holds the average: there are no trained weights to blend in.
        """
        if self.swapped:
            raise RuntimeError("The average cannot be updated while the module holds it: swap it out first.")
        # what `is_current` asks: a step has no call to spare
        tables, keys, tensors = self._followed.places
        try:
            current = all(map(operator.is_, map(operator.getitem, tables, keys), tensors))
        except KeyError:
            current = False
        if not current:
            self._check()
        # a step has no context to spare either
        with plain_tensors() if torch.is_inference_mode_enabled() else torch.no_grad():
            if self._buffer_numbers:
                self._refresh()
            for group in self._groups:
                group.blend(1 - decay)

    def swap_in(self, *, keep_shadows: bool = False) -> None:
        """Put the average into the module; nothing happens when it is there.

        Args:
            keep_shadows: Whether the average also stays in the shadows, out of the reach of what writes into the
                module; the raw weights are then kept on the host.
        """
        self._swap(to=True, keep_shadows=keep_shadows)

    def swap_out(self) -> None:
        """Put the trained weights back; nothing happens when they are there."""
        self._swap(to=False)

    def collect(
        self, which: Which, *, keep: bool = True, copies: bool = False, shares: bool = False
    ) -> dict[str, Tensor]:
        """Return every tensor in full, by name, tied names sharing one; a collective when the module is sharded.

        Args:
            which: The averages or the trained values.
            keep: Whether this rank wants them; if not, it only takes part in the collective.
            copies: Whether to return copies.
            shares: Whether sharded tensors stay so, as in a distributed checkpoint; then there is no collective.
        """
        self._wait()
        self._check()
        if not self.ended:
            self._refresh()
        if which == "average":
            self._begin_lost_anew()
        full: dict[int, Tensor] = {}
        with plain_tensors():
            for index, found in enumerate(self._tensors):
                part = self._read(index, which) if which == "average" else self._raw(index)
                part = part.clone() if copies and keep else part
                if (whole := collected(part, found.tensor, keep=keep, shares=shares)) is not None:
                    full[index] = whole
        return {name: full[index] for name, index in self._followed.index.items() if index in full}

    def count_writes(self) -> None:
        """Note how often each parameter was written to, as the tensors themselves count it; no device is asked."""
        self._writes = self._versions()

    def written_into(self) -> bool:
        """Return whether anything was written into the parameters since :meth:`count_writes` or the last swap."""
        return self._writes != self._versions()

    def _versions(self) -> list[int]:
        # shards are written anew whenever they are gathered
        return [] if self.sharded else [found.tensor._version for found in self._tensors if not found.is_buffer]

    # -- whether something else has been written into the module

    def remember(self) -> None:
        """Take the module's parameters as they are for ours."""
        self._left = self._contents()

    def untouched(self) -> bool:
        """Return whether the module's parameters are still those that :meth:`remember` saw; reads them all."""
        other = showing(self.module)
        if other is not None and other is not self:
            return other.untouched()
        same = self._left is not None and self._left == self._contents()
        return agreed(same, self._tensors[0].tensor) if self.sharded else same

    def _contents(self) -> Any:
        swapped = self.swapped
        if self.sharded:
            reshard(self.module)
        if not self._followed.is_current():
            return None
        with plain_tensors():
            parameters = [(number, found) for number, found in enumerate(self._tensors) if not found.is_buffer]
            return digest([local(found.tensor) if swapped else self._raw(number) for number, found in parameters])

    def _raw(self, number: int) -> Tensor:
        """Return a trained value, also while another average is in the module."""
        other = showing(self.module)
        if other is not None and other is not self:
            known = other._followed.index
            theirs = next((known[name] for name in self._tensors[number].names if name in known), None)
            if theirs is not None:
                return other._read(theirs, "raw")
        return self._read(number, "raw")

    # -- swaps

    def _swap(self, *, to: bool, keep_shadows: bool = False) -> None:
        if self.swapped == to:
            return
        if self.sharded:
            reshard(self.module)
        self._check()
        if to:
            self._begin_lost_anew()
            _showing[id(self.module)] = self
        with plain_tensors():
            self._refresh()
            operations: list[Operation] = []
            for group in self._groups if to else reversed(self._groups):
                operations += group.swap_in(keep_shadows=keep_shadows) if to else group.swap_out()
            self._state = (not to, Motion(operations))
            self._finish()
        if not to and showing(self.module) is self:
            disown(self.module)
        self.count_writes()

    def _finish(self) -> None:
        """Carry on with a swap that was interrupted, and find a copy's own tensors: pickle makes several of one."""
        if self._copied:
            self._copied = False
            if self._state[0]:
                _showing[id(self.module)] = self
            self._bind(self._stashes())
        if (motion := self._state[1]) is not None:
            with plain_tensors():
                motion.run()
            self._state = (not self._state[0], None)

    def _read(self, index: int, which: Which) -> Tensor:
        swapped = self.swapped
        group, position = self._where[index]
        pick = group.average if which == "average" else group.raw
        return pick(position, swapped=swapped).detach()

    def _begin_lost_anew(self) -> list[int]:
        """Let averages that became infinite or NaN begin at their weights, if those are finite; waits for the device.

        No step can bring such an average back: its share of what is not finite is never nothing.
        """
        if self.swapped:
            return []
        with plain_tensors():
            lost = [number for group in self._groups for number in group.begin_lost_anew()]
        if lost:
            self._note().losses.append(
                f"The average of {shorten([self._tensors[number].names[0] for number in lost])} was infinite or not a "
                "number and begins anew at the weights, which are finite."
            )
        return lost

    def _wait(self) -> None:
        for group in self._groups:
            group.wait()
