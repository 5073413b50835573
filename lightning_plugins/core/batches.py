"""What one sample of a batch is: count the samples, split the batch along them, look a field up.

A batch is a nest of mappings, dataclasses, named tuples and sequences. Tensors, arrays, packed sequences and nested
tensors have a row per sample. An object may say its number itself, as ``num_graphs`` or ``batch_size``. Evidence
decides whether a sequence holds fields or samples; what remains in doubt is an error and never a guess.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lightning_plugins.core.batch_structure import (
    SHARED,
    AmbiguousList,
    Parts,
    alike,
    fields_of,
    is_dataclass,
    is_list,
    is_named_tuple,
    own_length,
    rows,
)

Reading: TypeAlias = Literal["fields", "samples"] | None
"""What the sequences of a batch hold; ``None``: not known."""


class UnclearBatchError(ValueError):
    """The samples of a batch cannot be told, or in two ways.

    Args:
        found: What was found, as a sentence.
    """

    def __init__(self, found: str) -> None:
        super().__init__(f'`count` must not be "samples" here: {found} Count with a function of the batch.')


class SampleCounter:
    """Counts the samples of the batches of a run.

    A number is what the batch says itself, else the rows of its tensors and arrays, else the length of its lists.
    Tensors without a dimension and single values belong to every sample and do not count. Where a batch can be read in
    two ways, the loader's batch size decides, and the reading is kept for the run's other batches.

    Args:
        full: Samples of a full batch, ``None`` if that is not known.

    Attributes:
        reading: What the sequences of this run's batches hold, as far as it is known.
    """

    def __init__(self, full: int | None = None) -> None:
        self._full = full
        self.reading: Reading = None

    def __call__(self, batch: Any) -> int:
        """Return the number of samples in ``batch``, 0 for ``None``; no device is waited for.

        Raises:
            UnclearBatchError: If there is nothing to count, if the fields disagree, or if there are two readings.
        """
        # nearly every batch is a tensor or a plain container of tensors that agree, and this runs at every step
        kind = type(batch)
        listed = kind is tuple or kind is list
        values = batch.values() if kind is dict else batch if listed else (batch,)
        length = None
        for value in values:
            if type(value) is not Tensor or value.is_nested:
                return self._any(batch)
            shape = value.shape
            if shape:
                if length is None:
                    length = shape[0]
                elif length != shape[0]:
                    return self._any(batch)
        if length is None or (listed and (self.reading == "samples" or (len(values) > 2 and alike(batch)))):
            return self._any(batch)
        return length

    def _any(self, batch: Any) -> int:
        if batch is None:
            return 0
        parts = Parts().add(batch, "batch")
        known = set(parts.rows.values())
        # a list whose items have unequal lengths holds samples; at the top it may be several batches
        if not known:
            known = {found.items for found in parts.lists if not found.as_fields() and found.path != "batch"}
        if len(known) == 1 and parts.fits(*known):
            return self._decided(parts, known.pop())
        plain = set(parts.plain.values())
        if not known and len(plain) == 1 and parts.fits(*plain):
            return self._decided(parts, plain.pop())
        if known or not parts.lists:
            raise UnclearBatchError(_disagreement(batch, parts))
        return self._by_reading(batch, parts)

    def _decided(self, parts: Parts, length: int) -> int:
        """Keep the reading if the sequences leave no other."""
        if any(found.items == length and length not in found.as_fields() for found in parts.lists):
            self.reading = "samples"
        elif any(found.items != length for found in parts.lists):
            self.reading = "fields"
        return length

    def _by_reading(self, batch: Any, parts: Parts) -> int:
        """Choose between fields and samples where nothing in the batch decides."""
        as_fields = _only(set.intersection(*(found.as_fields_only() for found in parts.lists)))
        as_samples = _only({found.items for found in parts.lists})
        if self.reading is None and self._full is not None and as_fields != as_samples:
            self.reading = {as_fields: "fields", as_samples: "samples"}.get(self._full)  # type: ignore[assignment]
        chosen = {"fields": as_fields, "samples": as_samples, None: None}[self.reading]
        if chosen is not None:
            return chosen
        if as_fields is not None and (as_samples in {None, as_fields} or all(found.is_pair() for found in parts.lists)):
            return as_fields
        if as_samples is None:
            raise UnclearBatchError(_disagreement(batch, parts))
        if as_fields is None and any(not found.holds_rows() and found.path != "batch" for found in parts.lists):
            # a list of dictionaries in a field, whose sizes differ from those of another one
            return as_samples
        if as_fields is None:
            what = f"{_disagreement(batch, parts)[:-1]}, unless they are {as_samples} samples."
            raise UnclearBatchError(what)
        lists = ", ".join(f"`{found.path}`" for found in parts.lists[:8])
        raise UnclearBatchError(
            f"the batch, a {type(batch).__name__}, can be read in two ways: as {as_samples} samples, the items of "
            f"{lists}, or as fields of {as_fields} samples each."
        )


def batch_length(batch: Any) -> int:
    """Return the number of samples in a single ``batch``, 0 for ``None``; :class:`SampleCounter` has the rules.

    Raises:
        UnclearBatchError: A ``ValueError``: there is nothing to count, the fields disagree, or there are two readings.

    Example:
        >>> batch_length({"image": torch.zeros(4, 3, 8, 8), "label": torch.zeros(4), "weight": 0.5})
        4
    """
    return SampleCounter()(batch)


def _only(lengths: set[int]) -> int | None:
    return next(iter(lengths)) if len(lengths) == 1 else None


def _disagreement(batch: Any, parts: Parts) -> str:
    found = parts.all_rows() or parts.plain
    if not found:
        return f"the batch, a {type(batch).__name__}, holds no tensor, array or list with a row per sample."
    shown = [f"`{path}` has {length}" for path, length in found.items()]
    shown += [f"`{one.path}` is a list of {one.items}" for one in parts.lists]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return f"the fields of the batch disagree on the number of samples: {', '.join(shown[:8])}{more}."


def split_batch(batch: Any, sizes: Sequence[int], reading: Reading = None) -> list[Any]:
    """Return ``batch`` as ``len(sizes)`` batches of the same kind, the samples in their order.

    Tensors and arrays are cut into views; values that belong to every sample are shared. Packed sequences, jagged
    nested tensors and the batches of torch_geometric are taken apart and put together again by their own functions.

    Args:
        batch: What :class:`SampleCounter` counts.
        sizes: Samples of each piece; they add up to the batch's.
        reading: What the counter found its sequences to hold.

    Raises:
        TypeError: If the batch holds something that cannot be cut along its samples.
        ValueError: If it can be cut in two ways.

    Example:
        >>> split_batch({"x": torch.arange(5), "names": list("abcde"), "scale": 2.0}, [3, 2])[1]
        {'x': tensor([3, 4]), 'names': ['d', 'e'], 'scale': 2.0}
    """
    ends = list(itertools.accumulate(sizes))
    return [
        _Cut(slice(end - size, end), ends[-1], reading)(batch, "batch") for size, end in zip(sizes, ends, strict=True)
    ]


def even_sizes(length: int, at_most: int) -> list[int]:
    """Return the sizes of the fewest pieces of at most ``at_most`` samples; they differ by one at most.

    Even pieces leave no remainder of a single sample, which layers such as batch normalization cannot process.

    Example:
        >>> even_sizes(10, 4), even_sizes(4, 4), even_sizes(9, 8)
        ([4, 3, 3], [4], [5, 4])
    """
    return sizes_of(length, max(1, -(-length // at_most)))


def sizes_of(length: int, pieces: int) -> list[int]:
    """Return the sizes of so many pieces; they differ by one at most.

    Example:
        >>> sizes_of(10, 3), sizes_of(2, 3)
        ([4, 3, 3], [1, 1, 0])
    """
    small, larger = divmod(length, pieces)
    return [small + (index < larger) for index in range(pieces)]


def look_up(batch: Any, key: str | int) -> Any:
    """Return the field ``key`` of ``batch``: a mapping's key, a sequence's index, or an attribute.

    Raises:
        ValueError: If there is no such field; the message lists those that there are.
    """
    present: list[Any]
    if isinstance(batch, Mapping):
        present = list(batch.keys())
        if key in present:
            return batch[key]
    elif isinstance(key, int) and is_list(batch):
        present = list(range(len(batch)))
        if -len(batch) <= key < len(batch):
            return batch[key]
    else:
        present = _names(batch)
        if key in present:
            return getattr(batch, str(key))
    what = ", ".join(map(repr, present)) or "none that has a name"
    if isinstance(key, str) and is_list(batch):
        what = f"only places, 0 to {len(batch) - 1}: give the number"
    raise ValueError(f"`key` must be a field of the batch, got {key!r}. This {type(batch).__name__} has: {what}.")


def _names(batch: Any) -> list[str]:
    """Return the names of an object's fields, also of one with slots, and of torch_geometric's."""
    names = [name for name in getattr(batch, "__dict__", ()) if not name.startswith("_")]
    names += getattr(batch, "_fields", ())
    if is_dataclass(batch):
        names += [part.name for part in dataclasses.fields(batch)]
    keys = getattr(batch, "keys", ())
    names += [name for name in (keys() if callable(keys) else keys) if isinstance(name, str)]
    return list(dict.fromkeys(names))


class _Cut:
    """Cuts one piece out of a batch.

    Args:
        part: The samples of the piece.
        length: The samples of the batch.
        reading: What its sequences hold.
    """

    def __init__(self, part: slice, length: int, reading: Reading) -> None:
        self._part, self._length, self._reading = part, length, reading
        self._offsets: dict[int, Tensor] = {}

    def __call__(self, value: Any, path: str) -> Any:
        number = rows(value)
        if number is None:
            if is_list(value):
                return self._list(value, path)
            fields = fields_of(value)
            if fields is not None:
                return record_like(value, [self(item, path + name) for name, item in fields])
            if isinstance(value, SHARED) or getattr(value, "ndim", None) == 0:
                return value
        elif number == self._length:
            piece = self._rows(value, path)
            if piece is not None:
                return piece
        what = "no rows that could be cut" if number is None else f"{number} rows"
        raise self._refused(value, path, what)

    def _rows(self, value: Any, path: str) -> Any:
        """Cut what has its own number of samples, by its own functions; ``None`` if it has none."""
        if isinstance(value, Tensor):
            return self._nested(value) if value.is_nested else None if value.is_sparse else value[self._part]
        if isinstance(value, PackedSequence):
            parts = unpack_sequence(value)[self._part]
            return pack_sequence(parts, enforce_sorted=value.sorted_indices is None)
        if isinstance(getattr(value, "batch_size", None), torch.Size) or own_length(value) is None:
            return value[self._part]
        if hasattr(value, "to_data_list") and hasattr(type(value), "from_data_list"):
            return _maker(type(value)).from_data_list(value.to_data_list()[self._part])
        fields = fields_of(value)
        if fields is None:
            return None
        says = ("num_graphs", "batch_size")
        items = [
            self._size() if name.strip(".[']") in says and item == self._length else self(item, path + name)
            for name, item in fields
        ]
        return record_like(value, items)

    def _size(self) -> int:
        return int(self._part.stop - self._part.start)

    def _nested(self, value: Any) -> Any:
        if value.layout is not torch.jagged:
            return value.narrow(0, self._part.start, self._size())
        # with holes, or ragged further inside
        if value.lengths() is not None or isinstance(value.shape[1], int):
            return torch.nested.as_nested_tensor(list(value.unbind()[self._part]), layout=torch.jagged)
        # one tensor of offsets for all that shared one, or torch takes their lengths for different ones
        whole = value.offsets()
        if id(whole) not in self._offsets:
            cut = whole[self._part.start : self._part.stop + 1]
            self._offsets[id(whole)] = cut - cut[0]
        begin, end = int(whole[self._part.start]), int(whole[self._part.stop])
        return torch.nested.nested_tensor_from_jagged(value.values()[begin:end], self._offsets[id(whole)])

    def _list(self, values: Sequence[Any], path: str) -> Any:
        """Cut a sequence: every item of it if they are fields, the sequence itself if they are samples."""
        if not values:
            return values
        found = Parts().add(values, path)
        listed = next((one for one in found.lists if one.path == path), None)
        certain = path in found.rows or path in found.plain
        samples = len(values) == self._length and (certain or listed is not None)
        fields = not certain and (listed is None or self._length in listed.as_fields())
        if samples and fields and listed is not None:
            samples = self._are_samples(listed)
        if samples:
            return sequence_like(values, list(values)[self._part])
        if fields:
            return sequence_like(values, [self(item, f"{path}[{index}]") for index, item in enumerate(values)])
        raise self._refused(values, path, f"{len(values)} rows")

    def _are_samples(self, listed: AmbiguousList) -> bool:
        """Return whether a sequence as long as its items have rows holds samples."""
        if self._reading is None and not listed.is_pair() and listed.path == "batch":
            raise ValueError(
                f"a batch of {self._length} samples must be cut in one way, but its items can be samples, or fields of "
                f"{self._length} rows. Give `split`, a function (batch, sizes) -> pieces."
            )
        return self._reading == "samples" or (self._reading is None and not listed.is_pair())

    def _refused(self, value: Any, path: str, what: str) -> TypeError:
        return TypeError(
            f"a batch of {self._length} samples must have {self._length} rows in every field to run in pieces, but "
            f"`{path}`, a {type(value).__name__}, has {what}. Give `split`, a function (batch, sizes) -> pieces."
        )


def _maker(kind: Any) -> Any:
    """Return the class whose ``from_data_list`` is to be called; torch_geometric makes one for every kind of batch."""
    if type(kind) is type:
        return kind
    return next(base for base in kind.__mro__ if "from_data_list" in vars(base))


def sequence_like(value: Any, items: list[Any]) -> Any:
    """Return a sequence like ``value`` with other items."""
    return items if isinstance(value, range) else type(value)(items)


def record_like(value: Any, items: list[Any]) -> Any:
    """Return a mapping, named tuple or dataclass like ``value`` with other items."""
    if is_named_tuple(value):
        return type(value)._make(items)
    if isinstance(value, Mapping):
        content = dict(zip(value.keys(), items, strict=True))
        if type(value) is dict:
            return content
        if not isinstance(value, MutableMapping):
            return type(value)(content)  # type: ignore[call-arg]  # a read-only mapping is built from another
        clone: Any = copy.copy(value)
        # some have no `update`
        for key, item in content.items():
            clone[key] = item
        return clone
    clone = copy.copy(value)
    for part, item in zip(dataclasses.fields(value), items, strict=True):
        # a frozen one too
        object.__setattr__(clone, part.name, item)
    return clone
