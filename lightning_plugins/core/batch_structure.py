"""What a batch is made of, and how many samples its parts could have.

A sequence is either *fields*, each with a row for every sample (``[inputs, labels]``), or *samples* (strings, images of
several sizes, dictionaries). Its items decide where they can: unlike items are fields, items without rows are samples.
"""

from __future__ import annotations

import dataclasses
import enum
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

SHARED = (str, bytes, numbers.Number, enum.Enum, type(None))
"""Kinds of values that belong to every sample."""


def rows(value: Any) -> int | None:
    """Return the number of samples that a value has by itself; ``None`` for a container, and for one without any."""
    if isinstance(value, Tensor):
        # a nested tensor has no `shape`
        return int(value.size(0)) if value.dim() else None
    if type(value) in (dict, list, tuple, set, frozenset) or isinstance(value, SHARED):
        return None
    if isinstance(value, PackedSequence):
        # lies on the CPU always
        return int(value.batch_sizes[0]) if len(value.batch_sizes) else 0
    own = own_length(value)
    if own is not None:
        return own
    dimensions: Any = getattr(value, "ndim", None)
    return int(value.shape[0]) if hasattr(value, "__array__") and dimensions else None


def own_length(value: Any) -> int | None:
    """Return the number of samples that an object says to have: ``num_graphs``, or ``batch_size``."""
    for name in ("num_graphs", "batch_size"):
        try:
            number: Any = getattr(value, name, None)
        except (ValueError, RuntimeError):
            # a batch of torch_geometric that does not know
            continue
        if isinstance(number, torch.Size) and number:
            return int(number[0])
        if hasattr(number, "__index__") and not isinstance(number, (bool, Tensor)):
            return max(0, operator.index(number))
    return None


def fields_of(value: Any) -> list[tuple[str, Any]] | None:
    """Return what a mapping, dataclass or named tuple holds, with the names of an error message, else ``None``."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if is_dataclass(value):
        return [(f".{part.name}", getattr(value, part.name)) for part in dataclasses.fields(value)]
    if is_named_tuple(value):
        return [(f".{name}", item) for name, item in zip(value._fields, value, strict=True)]
    return None


def is_dataclass(value: Any) -> bool:
    """Return whether ``value`` is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def is_named_tuple(value: Any) -> bool:
    """Return whether ``value`` is a named tuple; a packed sequence is one of tensors that belong together."""
    return isinstance(value, tuple) and hasattr(value, "_fields") and not isinstance(value, PackedSequence)


def is_list(value: Any) -> bool:
    """Return whether ``value`` is a sequence that holds either fields or samples."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and not hasattr(value, "_fields")


def alike(values: list[Any] | tuple[Any, ...]) -> bool:
    """Return whether the items of a sequence have one structure, as samples have."""
    structures = map(_structure, values)
    first = next(structures)
    return all(_same(structure, first) for structure in structures)


def _structure(value: Any) -> tuple[Any, ...]:
    """Return what samples have in common: types, keys, numbers of dimensions, and data types, but no sizes."""
    if isinstance(value, Tensor):
        return Tensor, value.dim(), value.dtype
    if isinstance(value, SHARED) or rows(value) is not None:
        return type(value), getattr(value, "ndim", None), getattr(value, "dtype", None)
    fields = fields_of(value)
    if fields is not None:
        return type(value), {name: None if item is None else _structure(item) for name, item in fields}
    if is_list(value):
        return type(value), frozenset(map(repr, map(_structure, value)))
    return (type(value),)


def _same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Return whether two structures agree; a field that is ``None`` in one of them agrees with any."""
    if left[0] is not right[0]:
        return False
    if len(left) == 2 and isinstance(left[1], dict):
        pairs = [(left[1][name], right[1].get(name)) for name in left[1]] if left[1].keys() == right[1].keys() else None
        return pairs is not None and all(one is None or other is None or _same(one, other) for one, other in pairs)
    return left == right


@dataclass
class Parts:
    """What was found in a batch, or in a part of it.

    Args:
        rows: Path -> samples of what certainly has samples, and how many.
        lists: Sequences that may be samples or fields.
        plain: Path -> length of sequences of strings and numbers, which may also be settings.
        opaque: Whether there are objects that cannot be taken apart, so that what holds them is no field.
    """

    rows: dict[str, int] = field(default_factory=dict)
    lists: list[AmbiguousList] = field(default_factory=list)
    plain: dict[str, int] = field(default_factory=dict)
    opaque: bool = False

    def add(self, value: Any, path: str) -> Parts:
        """Add a value, with all that it holds, and return these parts."""
        length = rows(value)
        fields = fields_of(value) if length is None else None
        if length is not None:
            self.rows[path] = length
        elif fields is not None:
            for name, item in fields:
                self.add(item, path + name)
        elif is_list(value):
            self._add_list(list(value), path)
        else:
            self.opaque |= not (isinstance(value, (*SHARED, Tensor)) or hasattr(value, "__array__"))
        return self

    def _add_list(self, values: list[Any], path: str) -> None:
        if all(value is None for value in values):
            return
        inner = Parts()
        for index, item in enumerate(values):
            inner.add(item, f"{path}[{index}]")
        if all(isinstance(value, SHARED) for value in values):
            self.plain[path] = len(values)
        elif not alike(values):
            self.rows |= inner.rows
            self.lists += inner.lists
            self.plain |= inner.plain
            self.opaque |= inner.opaque
        elif inner.opaque or not (inner.rows or inner.lists or inner.plain):
            self.rows[path] = len(values)
        elif inner.rows or inner.lists:
            self.lists.append(AmbiguousList(path, len(values), inner))
        else:
            self._add_plain(path, len(values), inner)

    def _add_plain(self, path: str, length: int, inner: Parts) -> None:
        """Add a sequence without tensors: texts, or the columns of texts that PyTorch's default collation makes."""
        columns = set(inner.plain.values())
        self.plain |= inner.plain if len(columns) == 1 and length not in columns else {path: length}

    def fits(self, length: int) -> bool:
        """Return whether all sequences could have so many samples, one way or the other."""
        return all(length == found.items or length in found.as_fields() for found in self.lists)

    def lengths(self) -> set[int]:
        """Return the numbers of samples that all parts could have."""
        known = set(self.rows.values())
        if known:
            return known if len(known) == 1 and self.fits(*known) else set()
        return set.intersection(*({found.items} | found.as_fields() for found in self.lists)) if self.lists else set()

    def all_rows(self) -> dict[str, int]:
        """Return path -> samples of everything that has samples by itself, also inside sequences."""
        found = dict(self.rows)
        for listed in self.lists:
            found |= listed.inner.all_rows()
        return found


@dataclass
class AmbiguousList:
    """A sequence of items that are alike and have rows.

    Args:
        path: Where it stands in the batch.
        items: Its length: the number of samples if its items are samples.
        inner: What the items hold.
    """

    path: str
    items: int
    inner: Parts

    def as_fields(self) -> set[int]:
        """Return the numbers of samples that it could have if its items are fields; none if they disagree."""
        return self.inner.lengths()

    def as_fields_only(self) -> set[int]:
        """Return the numbers of samples that it could have if all sequences in it are fields, too."""
        inside = self.inner.lists
        if self.inner.rows or not inside:
            return self.inner.lengths()
        return set.intersection(*(found.as_fields_only() for found in inside))

    def holds_rows(self) -> bool:
        """Return whether its items are tensors and the like, not containers."""
        return self.inner.rows.keys() == {f"{self.path}[{index}]" for index in range(self.items)}

    def is_pair(self) -> bool:
        """Return whether it is one or two tensors, as of two inputs: they would make a strange batch of samples."""
        inside = self.inner.lists
        return self.items <= 2 and (self.holds_rows() or (bool(inside) and all(found.is_pair() for found in inside)))
