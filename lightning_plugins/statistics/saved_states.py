"""Checks what a checkpoint hands over like an argument: kinds, ranges, lengths, and texts that could forge rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lightning_plugins.core.validation import one_of, real_number, shown, whole_number
from lightning_plugins.statistics.labels import Reading

_CELL = re.compile(r"[0-9A-Za-z.+/?_-]{0,100}")
LARGEST_COUNT = 2**62
"""Of what a run has seen when it is resumed: an integer of 64 bits has room for the rest of the run."""
_MOST_COLUMNS = 10_000
_MOST_COUNTS = 10_000_000


def checked_recording(owner: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sums of a run, or raise when they cannot be such.

    Args:
        owner: Whose state it is, for the message.
        state: ``train``, ``samples`` and ``seconds``.

    Raises:
        TypeError: If a part is of another kind.
        ValueError: If a part is missing, out of range or does not fit another.
    """
    train = _mapping(owner, "train", state.get("train"))
    sums = _list(owner, "sums", train.get("sums"), _MOST_COUNTS)
    if not all(isinstance(number, float) for number in sums):
        raise TypeError(f"The state of {owner} must have numbers as `sums`, got {shown(sums)}.")
    layout = [tuple(_list(owner, "layout", entry, 2)) for entry in _list(owner, "layout", train.get("layout", []), 100)]
    for entry in layout:
        if len(entry) != 2 or not isinstance(entry[0], str) or not entry[0].isidentifier():
            raise ValueError(f"The state of {owner} must have names and sizes as `layout`, got {shown(entry)}.")
        whole_number("layout", entry[1], at_least=1)
    if sums and len(sums) != 1 + sum(size for _, size in layout):
        raise ValueError(f"The state of {owner} must have as many `sums` as its `layout` says, got {len(sums)}.")
    reading = one_of("reading", train.get("reading", ""), ("", *get_args(Reading)))
    return {
        "train": {
            "batches": whole_number("batches", train.get("batches"), at_most=LARGEST_COUNT),
            "sums": sums,
            "reading": reading,
            "layout": layout,
            "metrics": dict(_mapping(owner, "metrics", train.get("metrics", {}))),
        },
        "samples": whole_number("samples", state.get("samples"), at_most=LARGEST_COUNT),
        "seconds": real_number("seconds", state.get("seconds"), at_least=0),
    }


def without_counts_of_0_1(state: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Return a recorder's state without the counts of labels that release 0.1.0 wrote, and whether there were any.

    They had no layout, so what they counted cannot be told.
    """
    train = state.get("train")
    sums = train.get("sums") if isinstance(train, Mapping) else None
    if not isinstance(train, Mapping) or "layout" in train or not isinstance(sums, list) or len(sums) < 2:
        return state, False
    return {**state, "train": {**train, "sums": sums[:1]}}, True


def checked_place_in_csv(owner: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a place in a CSV file and the row that is under way, or raise when they cannot be such.

    Raises:
        TypeError: If a part is of another kind.
        ValueError: If a part is out of range, or a text could end a cell or a row.
    """
    last = _list(owner, "last", state.get("last"), 3)
    pending = _mapping(owner, "pending", state.get("pending"))
    for cell in (*last, *pending.values()):
        if not isinstance(cell, str) or _CELL.fullmatch(cell) is None:
            raise ValueError(f"The state of {owner} must have cells of numbers and plain words, got {shown(cell)}.")
    for name in pending:
        if not isinstance(name, str) or not _plain(name, 500):
            raise ValueError(f"The state of {owner} must have names of columns on one line, got {shown(name)}.")
    rows = whole_number("rows", state.get("rows"))
    if len(last) != (3 if rows else 0):
        raise ValueError(f"The state of {owner} must name the last of its {rows} `rows`, got {shown(last)}.")
    return {"rows": rows, "last": last, "pending": dict(pending)}


def _plain(text: str, longest: int) -> bool:
    return len(text) <= longest and text.isprintable()


def _mapping(owner: str, name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or len(value) > _MOST_COLUMNS:
        raise TypeError(f"The state of {owner} must have a mapping as `{name}`, got {shown(value)}.")
    return value


def _list(owner: str, name: str, value: Any, longest: int) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) > longest:
        raise TypeError(f"The state of {owner} must have a list as `{name}`, got {shown(value)}.")
    return list(value)
