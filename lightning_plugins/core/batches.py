"""What a batch holds: its samples, its fields, and how to take it apart along the samples.

A batch is a nest of *fields*: mappings, dataclasses, named tuples, and sequences. A tensor or array holds one sample
per row. A sequence below the top level may also be a list *of samples* (strings, images of several sizes).
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import itertools
import numbers
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

_SHARED = (str, bytes, numbers.Number, enum.Enum, type(None))


def batch_length(batch: Any) -> int:
    """Return the number of samples in ``batch``.

    It is the number of rows of the tensors and arrays that are fields of the batch, or the length of its lists when
    it has none of those. Tensors without a dimension and single values belong to every sample and do not count.

    Raises:
        ValueError: If there is nothing to count, or the fields disagree; the message names them.

    Example:
        >>> batch_length({"image": torch.zeros(4, 3, 8, 8), "label": torch.zeros(4), "weight": 0.5})
        4
    """
    length = _length_of_tensors(batch)
    if length is not None:
        return length
    fields = list(_walk(batch, "batch", depth=0))
    plain = {path: len(value) for path, value, listed in fields if _has_rows(value) and not listed}
    nested = {path: len(value) for path, value, listed in fields if _has_rows(value) and listed}
    lists = {path: len(value) for path, value, _ in fields if _is_list(value)}
    lengths = plain or (nested if len(set(nested.values())) == 1 else {}) or lists
    if not lengths:
        raise ValueError(f"the batch, a {type(batch).__name__}, holds no tensor, array or list with a row per sample.")
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"`{path}` has {rows}" for path, rows in lengths.items())
        raise ValueError(f"the fields of the batch disagree on the number of samples: {found}.")
    return next(iter(lengths.values()))


def _length_of_tensors(batch: Any) -> int | None:
    """Return the rows of a batch that is a tensor, or a plain container of tensors that agree; ``None`` for others.

    Nearly every batch is one of these, and is asked at every step.
    """
    values = batch.values() if type(batch) is dict else batch if type(batch) in (tuple, list) else (batch,)
    length = None
    for value in values:
        if type(value) is not torch.Tensor:
            return None
        shape = value.shape
        if shape:
            if length is None:
                length = shape[0]
            elif length != shape[0]:
                return None
    return length


def split_batch(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Return ``batch`` as ``len(sizes)`` batches of the same kind, the samples in their order.

    Tensors and arrays are cut into views; values that belong to every sample are shared. Nothing is copied.

    Args:
        batch: Tensors, arrays, mappings, sequences, named tuples and dataclasses, nested as one likes.
        sizes: Samples of each piece; they add up to ``batch_length(batch)``.

    Raises:
        TypeError: If the batch holds something that cannot be cut along its samples.

    Example:
        >>> split_batch({"x": torch.arange(5), "names": list("abcde"), "scale": 2.0}, [3, 2])[1]
        {'x': tensor([3, 4]), 'names': ['d', 'e'], 'scale': 2.0}
    """
    ends = list(itertools.accumulate(sizes))
    return [_cut(batch, slice(end - size, end), ends[-1], "batch") for size, end in zip(sizes, ends, strict=True)]


def even_sizes(length: int, at_most: int) -> list[int]:
    """Return the sizes of the fewest pieces of at most ``at_most`` samples; they differ by one at most.

    Even pieces leave no remainder of a single sample, which layers such as batch normalisation cannot process.

    Example:
        >>> even_sizes(10, 4), even_sizes(4, 4), even_sizes(9, 8)
        ([4, 3, 3], [4], [5, 4])
    """
    pieces = max(1, -(-length // at_most))
    small, larger = divmod(length, pieces)
    return [small + (index < larger) for index in range(pieces)]


def look_up(batch: Any, key: str | int) -> Any:
    """Return the field ``key`` of ``batch``: a mapping's key, a sequence's index, or an attribute.

    Raises:
        ValueError: If there is no such field; the message lists those that there are.
    """
    present: list[Any]
    if isinstance(batch, Mapping):
        present = list(batch)
        if key in present:
            return batch[key]
    elif isinstance(key, int) and _is_list(batch):
        present = list(range(len(batch)))
        if -len(batch) <= key < len(batch):
            return batch[key]
    else:
        present = [name for name in vars(batch) if not name.startswith("_")] if hasattr(batch, "__dict__") else []
        present += getattr(batch, "_fields", ())
        if _is_dataclass(batch):  # one with slots has no `__dict__`
            present += [field.name for field in dataclasses.fields(batch) if field.name not in present]
        if isinstance(key, str) and key in present:
            return getattr(batch, key)
    what = ", ".join(map(repr, present)) or "none that has a name"
    raise ValueError(f"`key` must be a field of the batch, got {key!r}. This {type(batch).__name__} has: {what}.")


def _walk(value: Any, path: str, depth: int, *, listed: bool = False) -> Iterator[tuple[str, Any, bool]]:
    """Yield the path and value of every leaf, and of every list below the top, and whether it lies in such a list."""
    if depth and _is_list(value):
        yield path, value, listed
        listed = True
    fields = _fields(value)
    if fields is None:
        yield path, value, listed
        return
    for name, item in fields:
        yield from _walk(item, path + name, depth + 1, listed=listed)


def _fields(value: Any) -> list[tuple[str, Any]] | None:
    """Return what a container holds, under the names an error message uses, or ``None`` for a leaf."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if _is_dataclass(value):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    if _is_named_tuple(value):
        return [(f".{name}", item) for name, item in zip(value._fields, value, strict=True)]
    return [(f"[{index}]", item) for index, item in enumerate(value)] if _is_list(value) else None


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields") and not isinstance(value, PackedSequence)


def _is_list(value: Any) -> bool:
    """Return whether ``value`` is a plain list or tuple: below the top it holds either fields or samples."""
    return isinstance(value, (list, tuple)) and not hasattr(value, "_fields")


def _has_rows(value: Any) -> bool:
    """Return whether ``value`` is a tensor or array with a row per sample."""
    return (isinstance(value, torch.Tensor) or hasattr(value, "__array__")) and getattr(value, "ndim", 0) > 0


def _cut(value: Any, part: slice, length: int, path: str) -> Any:
    if _has_rows(value):
        if len(value) == length and not getattr(value, "is_sparse", False) and not getattr(value, "is_nested", False):
            return value[part]
    elif path != "batch" and _is_list(value) and not _holds_fields(value, length):
        if len(value) == length:
            return value[part]
    elif (fields := _fields(value)) is not None:
        return _rebuild(value, [_cut(item, part, length, path + name) for name, item in fields])
    elif isinstance(value, _SHARED) or getattr(value, "ndim", None) == 0:
        return value
    what = f"{len(value)} rows" if _has_rows(value) or _is_list(value) else "no rows that could be cut"
    raise TypeError(
        f"a batch of {length} samples must have {length} rows in every field to run in pieces, but `{path}`, "
        f"a {type(value).__name__}, has {what}."
    )


def _holds_fields(values: Sequence[Any], length: int) -> bool:
    """Return whether a list below the top holds fields (tensors with a row per sample), not samples."""
    rows = [len(value) for _, value, _ in _walk(values, "", depth=0) if _has_rows(value)]
    return bool(rows) and all(number == length for number in rows)


def _rebuild(value: Any, items: list[Any]) -> Any:
    """Return a container like ``value`` with other items."""
    if _is_list(value):
        return type(value)(items)
    if _is_named_tuple(value):
        return type(value)._make(items)
    if isinstance(value, Mapping):
        content = dict(zip(value, items, strict=True))
        if not isinstance(value, MutableMapping):
            return type(value)(content)  # type: ignore[call-arg]  # a read-only mapping is built from another
        clone: Any = copy.copy(value)
        clone.update(content)
        return clone
    clone = copy.copy(value)
    for field, item in zip(dataclasses.fields(value), items, strict=True):
        object.__setattr__(clone, field.name, item)  # a frozen one too
    return clone
