"""The mean of the latest snapshots of a module's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.core.sharding import collected, local, scatter
from lightning_plugins.ema.shadow import Shadow
from lightning_plugins.ema.tensor_groups import plain_tensors

_PIECE = 2**20
"""Elements of a tensor that are added up at a time."""


class LatestShadow(Shadow):
    """The mean of a module's weights as they were at the last updates, and the snapshots that it is made of.

    Snapshots have the type of the weights, so they are exact. Every update replaces the oldest and computes the mean
    anew, in float64 and rounded once: nothing adds up, however many there were. A parameter that was replaced or joined
    has the mean of its own snapshots since.

    Args:
        module: The module.
        last: How many snapshots are kept, at least 1; until there are as many, the mean is of those there are.
        snapshots: Name -> full tensor for each snapshot to begin with, the oldest first.
        **options: Those of :class:`Shadow`.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> latest = LatestShadow(layer, last=2)
        >>> for value in (1.0, 2.0, 4.0):
        ...     _ = nn.init.constant_(layer.weight, value)
        ...     latest.update()
        >>> latest.collect("average")["weight"].item()
        3.0
    """

    def __init__(
        self, module: nn.Module, *, last: int, snapshots: Sequence[Mapping[str, Tensor]] = (), **options: Any
    ) -> None:
        self._last = last
        # of each tensor, the oldest first
        self._histories: list[list[Tensor]] = []
        super().__init__(module, **options)
        with plain_tensors():
            for snapshot in snapshots[-last:]:
                for found, history in zip(self._tensors, self._histories, strict=True):
                    value = next((snapshot[name] for name in found.names if name in snapshot), None)
                    if value is not None:
                        weight = local(found.tensor)
                        self._add(history, scatter(value.to(weight.device), found.tensor), weight.device)
            self._average()

    # -- following the module

    def follow(self, start: Mapping[str, Tensor] | None = None) -> list[str]:
        """Look at the module again; the snapshots of what is new or replaced are dropped."""
        before = self._histories
        joined = super().follow(start)
        self._histories = [[] if origin is None else before[origin] for origin in self._followed.origins]
        with plain_tensors():
            for number in self._followed.pruned:
                zeros = local(self._tensors[number].tensor) == 0
                for snapshot in self._histories[number]:
                    snapshot.masked_fill_(zeros.to(snapshot.device), 0)
        return joined

    def rebind(self) -> None:
        """Find the module's tensors where they are now; the snapshots go with them."""
        super().rebind()
        if len(self._histories) == len(self._shadows):
            for history, shadow in zip(self._histories, self._shadows, strict=True):
                history[:] = [snapshot.to(shadow.device) for snapshot in history]

    def _begin_lost_anew(self) -> list[int]:
        lost = super()._begin_lost_anew()
        with plain_tensors():
            for number in lost:
                group, position = self._where[number]
                # as many as there were: all ranks must have equally many
                for snapshot in self._histories[number]:
                    snapshot.copy_(group.weights[position])
        return lost

    # -- the average

    def update(self, decay: float = 0.0) -> None:
        """Take a snapshot of the weights in place of the oldest, and compute the mean.

        Args:
            decay: Of no effect: the snapshot is the weights as they are.

        Raises:
            RuntimeError: If the module holds the average: there are no trained weights to keep.
        """
        if self.swapped:
            raise RuntimeError("A snapshot cannot be taken while the module holds the average: swap it out first.")
        self._check()
        with plain_tensors():
            self._refresh()
            for number, history in enumerate(self._histories):
                group, position = self._where[number]
                self._add(history, group.weights[position], self._shadows[number].device)
            self._average()

    def collect_snapshots(self, *, keep: bool = True, shares: bool = False) -> list[dict[str, Tensor]]:
        """Return the snapshots, name -> full tensor, the oldest first; a collective when the module is sharded.

        They are references: the next snapshot is written over the oldest.

        Args:
            keep: Whether this rank wants them; if not, it only takes part in the collective.
            shares: Whether sharded tensors stay so, as in a distributed checkpoint; then there is no collective.
        """
        self._wait()
        self._check()
        sets: list[dict[str, Tensor]] = []
        for age in range(max(map(len, self._histories), default=0), 0, -1):
            snapshot: dict[str, Tensor] = {}
            for found, history in zip(self._tensors, self._histories, strict=True):
                if len(history) < age:
                    continue
                if (whole := collected(history[-age], found.tensor, keep=keep, shares=shares)) is not None:
                    snapshot.update(dict.fromkeys(found.names, whole))
            sets.append(snapshot)
        return sets if keep else []

    def _add(self, history: list[Tensor], weight: Tensor, device: torch.device) -> None:
        """Put a copy of ``weight`` behind a history, in place of the oldest one if that is complete."""
        oldest = history.pop(0) if len(history) == self._last else None
        if oldest is None or (oldest.dtype, oldest.shape) != (weight.dtype, weight.shape):
            pinned = device.type == "cpu" and weight.is_cuda
            oldest = torch.empty_like(weight, device=device, pin_memory=pinned, requires_grad=False)
        history.append(oldest.copy_(weight, non_blocking=True))

    def _average(self) -> None:
        for number, history in enumerate(self._histories):
            if history:
                group, position = self._where[number]
                mean_into(self._shadows[number], history, group.weights[position].device)


def mean_into(target: Tensor, snapshots: Sequence[Tensor], device: torch.device) -> None:
    """Write the mean of ``snapshots`` into ``target``, added in float64 and rounded once.

    Nothing waits for ``device``, where the sum is made piece by piece, wherever the tensors lie. Apple's GPUs, which
    have no float64, add in float32.
    """
    dtype = torch.promote_types(target.dtype, torch.float32 if device.type == "mps" else torch.float64)
    flat = all(tensor.is_contiguous() for tensor in (target, *snapshots))
    rows = [torch.split(tensor.view(-1), _PIECE) if flat else (tensor,) for tensor in (target, *snapshots)]
    for piece, *parts in zip(*rows, strict=True):
        total = parts[0].to(device, dtype, copy=True, non_blocking=True)
        for part in parts[1:]:
            total += part.to(device, non_blocking=True)
        piece.copy_(total.div_(len(parts)), non_blocking=True)
