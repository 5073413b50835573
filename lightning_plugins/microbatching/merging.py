r"""A batch in pieces that leaves the gradient, the outputs and the logs of the whole batch: the arithmetic.

The loss of a batch is a mean over its items. With :math:`n_i` items in piece :math:`i` it is
:math:`\sum_i (n_i/n)\,\ell_i`, so every backward is weighted by the piece's share :math:`n_i/n`, and so is every
mean that is returned or logged. All counts are known before the first piece runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core.counting import Count, wide


def shares(pieces: Sequence[Any], sizes: Sequence[int], count: Callable[[Any], Count] | None) -> list[Count]:
    """Return the weight of every piece in the mean over the batch; they add up to 1.

    Args:
        pieces: The batch in pieces.
        sizes: Samples of each.
        count: What the loss is a mean over; ``None`` for samples. If it counts nothing in the whole batch, the
            samples' shares are taken: the loss is then no number, as it is for the whole batch.
    """
    samples = sum(sizes)
    by_samples = [size / samples for size in sizes]
    if count is None:
        return list(by_samples)
    counts = [count(piece) for piece in pieces]
    on_device = next((number for number in counts if isinstance(number, Tensor)), None)
    if on_device is None:
        total = sum(float(number) for number in counts)
        return [float(number) / total for number in counts] if total else list(by_samples)
    stacked = torch.stack([wide(number, on_device.device) for number in counts])
    total_on_device = stacked.sum()
    fallback = torch.stack([wide(share, on_device.device) for share in by_samples])
    return list(torch.where(total_on_device > 0, stacked / total_on_device, fallback).unbind())


def weighted(value: Any, share: Count) -> Any:
    """Return ``share * value``, and 0 for a share of 0: the mean of no items is no number, and must not spread."""
    if not isinstance(share, Tensor):
        return value * share if share else value * 0 if not isinstance(value, Tensor) else torch.zeros_like(value)
    share = share.to(device=value.device, dtype=value.dtype)
    return torch.where(share > 0, value * share, torch.zeros_like(value))


def weighted_sum(values: Sequence[Any], weights: Sequence[Count]) -> Any:
    """Return the mean over the batch, out of the means over its pieces."""
    parts = [weighted(value, weight) for value, weight in zip(values, weights, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def merge(values: Sequence[Any], weights: Sequence[Count], sizes: Sequence[int], path: str = "outputs") -> Any:
    """Return what ``training_step`` would have returned for the whole batch, out of what it returned for the pieces.

    Values with a row per sample are put one after another, fractional numbers are averaged by the pieces' shares,
    whole numbers are taken for counts and added, containers are merged item by item, and what is the same in every
    piece stays. Tensors are detached, so that no piece keeps the memory of its backward.

    Raises:
        TypeError: If it cannot be told what the whole batch would have given.

    Example:
        >>> merge([{"hits": 2, "score": 1.0}, {"hits": 1, "score": 4.0}], [2 / 3, 1 / 3], [4, 2])
        {'hits': 3, 'score': 2.0}
    """
    first = values[0]
    if all(isinstance(value, Tensor) for value in values):
        return _merge_tensors([value.detach() for value in values], weights, sizes, path)
    if isinstance(first, Mapping):
        return {key: merge([value[key] for value in values], weights, sizes, f"{path}[{key!r}]") for key in first}
    if isinstance(first, (list, tuple)):
        if _per_sample(values, sizes):
            return type(first)(item for value in values for item in value)
        columns = enumerate(zip(*values, strict=True))
        return type(first)(merge(column, weights, sizes, f"{path}[{index}]") for index, column in columns)
    return _merge_plain(values, weights, path)


def _per_sample(values: Sequence[Any], sizes: Sequence[int]) -> bool:
    return all(len(value) == size for value, size in zip(values, sizes, strict=True))


def _merge_plain(values: Sequence[Any], weights: Sequence[Count], path: str) -> Any:
    first = values[0]
    if isinstance(first, float):
        return weighted_sum(values, weights)
    if isinstance(first, int) and not isinstance(first, bool):
        return sum(values)
    if all(value is first or value == first for value in values):
        return first
    raise TypeError(f"`{path}` must be the same for every piece of a batch or something to average, got {values!r}.")


def _merge_tensors(values: list[Tensor], weights: Sequence[Count], sizes: Sequence[int], path: str) -> Tensor:
    if all(value.ndim for value in values) and _per_sample(values, sizes):
        return torch.cat(values)
    if len({value.shape for value in values}) > 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise TypeError(f"`{path}` must have a row per sample or one shape, got the shapes {shapes}.")
    if values[0].is_floating_point():
        total: Tensor = weighted_sum(values, weights)
        return total
    if values[0].dtype is torch.bool:
        raise TypeError(f"`{path}` must be numbers or have a row per sample, got one bool for every piece.")
    return torch.stack(values).sum(0)


def combine_logged(reduction: str, values: Sequence[Tensor], weights: Sequence[Count]) -> Tensor:
    """Return the value that the whole batch would have logged, by the way in which the value is reduced.

    Args:
        reduction: ``"mean"``, ``"sum"``, ``"max"`` or ``"min"``.
        values: One per piece that logged.
        weights: The shares of those pieces; for a mean they are scaled to add up to 1.
    """
    if reduction == "mean":
        total: Any = sum(weights)
        if not isinstance(total, Tensor) and total == 0:
            total, weights = len(weights), [1.0] * len(weights)
        mean: Tensor = weighted_sum(values, [weight / total for weight in weights])
        return mean
    stacked = torch.stack(list(values))
    return {"sum": stacked.sum(0), "max": stacked.amax(0), "min": stacked.amin(0)}[reduction]
