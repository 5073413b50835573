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
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lightning_plugins.core.batch_structure import SHARED, fields_of, is_list, rows
from lightning_plugins.core.batches import record_like, sequence_like
from lightning_plugins.core.counting import Count, wide
from lightning_plugins.core.validation import one_of, shown

WAYS = ("mean", "sample_mean", "sum", "max", "min", "last")
"""What a logged value can be of a batch: a mean over what the loss is a mean over, or over samples, a sum, a bound, or
what is so when its last piece has run."""


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
    """Return ``share * value``; for a share of 0 a 0 with the graph of ``value``.

    The mean of no items is no number and must not spread, but a backward must be able to start from it.
    """
    if not isinstance(value, Tensor):
        return value * share if share else value * 0
    if not isinstance(share, Tensor):
        if share:
            return value * share
        return torch.where(torch.zeros_like(value, dtype=torch.bool), value, torch.zeros_like(value))
    share = share.to(device=value.device, dtype=value.dtype)
    return torch.where(share > 0, value * share, torch.zeros_like(value))


def weighted_sum(values: Sequence[Any], weights: Sequence[Count]) -> Any:
    """Return the sum of ``values``, each times its weight."""
    return sum(map(weighted, values[1:], weights[1:]), start=weighted(values[0], weights[0]))


def merge(
    values: Sequence[Any],
    weights: Sequence[Count],
    sizes: Sequence[int],
    path: str = "outputs",
    *,
    dropped: dict[str, str] | None = None,
) -> Any:
    """Return what ``training_step`` would have returned for the whole batch, out of what it returned for the pieces.

    Values with an entry per sample are put one after another, fractional numbers are averaged by the pieces' shares,
    whole numbers are taken for counts and added, containers are merged item by item, and what is the same in every
    piece stays. Tensors are detached, so that no piece keeps the memory of its backward.

    Args:
        values: One for every piece.
        weights: The pieces' shares of the batch.
        sizes: The pieces' samples.
        path: What they are called in a message.
        dropped: Where to write what cannot be merged, path -> reason; mappings are then merged without it.

    Raises:
        TypeError: If it cannot be told what the whole batch would have given, and ``dropped`` is not given.

    Example:
        >>> merge([{"hits": 2, "score": 1.0}, {"hits": 1, "score": 4.0}], [2 / 3, 1 / 3], [4, 2])
        {'hits': 3, 'score': 2.0}
    """
    first = values[0]
    if all(isinstance(value, Tensor) for value in values):
        return _merge_tensors([value.detach() for value in values], weights, sizes, path)
    if not all(isinstance(value, type(first)) for value in values):
        raise TypeError(f"`{path}` must have one type, got {', '.join(type(value).__name__ for value in values)}.")
    if isinstance(getattr(first, "batch_size", None), torch.Size):
        # a TensorDict
        return torch.cat(list(values))
    if isinstance(first, Mapping):
        return _merge_mappings(values, weights, sizes, path, dropped)
    if fields_of(first) is not None or is_list(first):
        return _merge_containers(values, weights, sizes, path)
    return _merge_plain(values, weights, sizes, path)


def _merge_mappings(
    values: Sequence[Any], weights: Sequence[Count], sizes: Sequence[int], path: str, dropped: dict[str, str] | None
) -> Any:
    merged = {}
    for key in dict.fromkeys(key for value in values for key in value):
        where = f"{path}[{key!r}]"
        try:
            merged[key] = merge(_column(values, key, where), weights, sizes, where, dropped=dropped)
        except TypeError as error:
            if dropped is None:
                raise
            dropped[where] = str(error)
    complete = merged.keys() == values[0].keys()
    return record_like(values[0], list(merged.values())) if complete else merged


def _column(values: Sequence[Any], key: Any, path: str) -> list[Any]:
    if not all(key in value for value in values):
        raise TypeError(f"`{path}` must be returned for every piece of a batch or for none.")
    return [value[key] for value in values]


def _merge_containers(values: Sequence[Any], weights: Sequence[Count], sizes: Sequence[int], path: str) -> Any:
    first = values[0]
    named = fields_of(first)
    if named is None and _per_sample(values, sizes):
        return sequence_like(first, [item for value in values for item in value])
    columns = [[item for _, item in fields_of(value) or ()] if named else list(value) for value in values]
    if len(set(map(len, columns))) > 1:
        lengths = ", ".join(str(len(column)) for column in columns)
        raise TypeError(f"`{path}` must have an entry per sample or one length, got the lengths {lengths}.")
    names = [name for name, _ in named] if named else [f"[{index}]" for index in range(len(first))]
    transposed = zip(names, zip(*columns, strict=True), strict=True)
    items = [merge(column, weights, sizes, path + name) for name, column in transposed]
    return record_like(first, items) if named else sequence_like(first, items)


def _per_sample(values: Sequence[Any], sizes: Sequence[int]) -> bool:
    """Return whether sequences hold an entry per sample and not fields.

    A tuple of tensors, such as an LSTM's states, holds fields; so does a list of tensors that have a row per sample.
    """
    if any(len(value) != size for value, size in zip(values, sizes, strict=True)):
        return False
    tensors = [item for value in values for item in value if isinstance(item, Tensor)]
    if tensors and isinstance(values[0], tuple):
        return False
    rows_too = all(rows(item) == size for value, size in zip(values, sizes, strict=True) for item in value)
    return not (tensors and rows_too)


def _merge_plain(values: Sequence[Any], weights: Sequence[Count], sizes: Sequence[int], path: str) -> Any:
    first = values[0]
    if isinstance(first, float):
        return weighted_sum(values, weights)
    if isinstance(first, int) and not isinstance(first, bool):
        return sum(values)
    if rows(first) is not None:
        return _merge_rows(values, weights, sizes, path)
    if all(value is first for value in values) or (
        isinstance(first, SHARED) and all(value == first for value in values)
    ):
        return first
    raise TypeError(
        f"`{path}` must be the same for every piece of a batch or something to average, got {shown(list(values))}."
    )


def _merge_rows(values: Sequence[Any], weights: Sequence[Count], sizes: Sequence[int], path: str) -> Any:
    """Merge what has a number of samples and is no tensor: arrays and packed sequences."""
    if isinstance(values[0], PackedSequence):
        return pack_sequence([part for value in values for part in unpack_sequence(value)], enforce_sorted=False)
    if hasattr(values[0], "__array__"):
        merged = _merge_tensors([torch.as_tensor(value) for value in values], weights, sizes, path)
        return merged.numpy()
    raise TypeError(f"`{path}` must be something that can be put together, got {type(values[0]).__name__}.")


def _merge_tensors(values: list[Tensor], weights: Sequence[Count], sizes: Sequence[int], path: str) -> Tensor:
    if all(rows(value) == size for value, size in zip(values, sizes, strict=True)):
        layouts = [value.layout for value in values if value.is_nested]
        if not layouts:
            return torch.cat(values)
        parts = [part for value in values for part in value.unbind()]
        return torch.nested.as_nested_tensor(parts, layout=layouts.pop())
    if any(value.is_nested for value in values) or len({value.shape for value in values}) > 1:
        shapes = ", ".join("nested" if value.is_nested else str(tuple(value.shape)) for value in values)
        raise TypeError(f"`{path}` must have a row per sample or one shape, got the shapes {shapes}.")
    fractions = [value.is_floating_point() or value.is_complex() for value in values]
    if any(fractions) != all(fractions):
        kinds = ", ".join(str(value.dtype).removeprefix("torch.") for value in values)
        raise TypeError(f"`{path}` must have one type, got {kinds}.")
    if all(fractions):
        total: Tensor = weighted_sum(values, weights)
        return total
    if any(value.dtype is torch.bool for value in values):
        raise TypeError(f"`{path}` must be numbers or have a row per sample, got one bool for every piece.")
    return torch.stack(values).sum(0)


def checked_ways(given: Any) -> dict[str, str]:
    """Return the argument ``logged`` as a dict.

    Raises:
        TypeError: If it is no mapping of names.
        ValueError: If a name is mapped to another word than :data:`WAYS`.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"`logged` must map names that are logged to words, got {shown(given)}.")
    return {name: one_of(f"logged[{shown(name)}]", way, WAYS) for name, way in given.items()}


def way_of(name: str, told: str | None, reduction: str, values: Sequence[Tensor], hook: str = "training_step") -> str:
    """Return how the values that pieces log under a name make the value of the whole batch.

    A fraction that is averaged over batches is a mean. A value whose sum or bound over batches is logged is taken for a
    sum or bound within one; a module that follows the largest *mean* of a batch must say so. Gradients are the batch's
    when the last backward is done.

    Args:
        name: The name that is logged.
        told: What the user says, one of :data:`WAYS`.
        reduction: ``reduce_fx``: ``"mean"``, ``"sum"``, ``"max"`` or ``"min"``.
        values: What the pieces have logged.
        hook: The method that it is logged in.

    Raises:
        ValueError: If the user must say.
    """
    if told is not None:
        return told
    if hook == "on_after_backward":
        return "last"
    if hook == "on_before_backward" and len(values) > 1:
        kind = f"in {hook}, which is given each piece's share of the loss"
    elif reduction != "mean" or all(value.is_floating_point() for value in values):
        return reduction
    else:
        kind = "as a whole number, which is no mean, for every piece"
    raise ValueError(
        f"`logged` must tell what {name!r} is of a batch, got nothing: it is logged {kind}. Write "
        f"MicroBatching(logged={{{name!r}: ...}}) with 'mean' if it is a mean over what `count` counts, 'sample_mean' "
        "if over samples, 'sum', 'max' or 'min' if it is that of the batch, 'last' if it is the last piece's."
    )


def combine_logged(way: str, values: Sequence[Tensor], weights: Sequence[Count]) -> Tensor:
    """Return the value that the whole batch would have logged.

    Args:
        way: One of :data:`WAYS`.
        values: One per piece that logged.
        weights: The shares of those pieces; for a mean they are scaled to add up to 1.
    """
    if way.endswith("mean"):
        total: Any = sum(weights)
        if not isinstance(total, Tensor) and total == 0:
            total, weights = len(weights), [1.0] * len(weights)
        mean: Tensor = weighted_sum(values, [weight / total for weight in weights])
        return mean
    if way == "last":
        return values[-1]
    stacked = torch.stack(list(values))
    return {"sum": stacked.sum(0), "max": stacked.amax(0), "min": stacked.amin(0)}[way]
