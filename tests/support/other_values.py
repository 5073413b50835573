"""Values that a checkpoint can hold in place of those that a run wrote: of any kind, or near to what stands there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

NASTY = "\x1b]0;owned\x07\x1b[31m\r\nFAKE: all is well\u202e"
MISSING = object()
"""In place of a value: it is taken away."""

Place = tuple[Any, ...]
"""The keys and indexes that lead to a value in nested dictionaries and lists."""


def nested() -> list[Any]:
    """Return a list of 2**40 ones, in few objects."""
    made: list[Any] = [1]
    for _ in range(40):
        made = [made, made]
    return made


ODD = [
    *(None, True, -1, 2**70, 0.5, float("nan"), float("inf"), "", "x", NASTY, b"x", "x" * 100_000, 10**400),
    *([], {}, (), set(), [1], {"a": 1}, {5: torch.ones(1)}, {None: {}}, nested(), {"files": 5}, {"files": [5]}),
    *(torch.ones(2), torch.tensor(float("nan")), torch.ones(2, 0), torch.tensor([True]), {NASTY: torch.ones(2)}),
]
"""Values of any kind."""


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """Yield the place of everything in nested dictionaries, lists and tuples."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def at(content: Any, path: Place) -> Any:
    """Return what stands in a place."""
    for key in path:
        content = content[key]
    return content


def replaced(content: Any, path: Place, value: Any) -> Any:
    """Return a copy with another value in one place, or without it for :data:`MISSING`."""
    if not path:
        return value
    found = dict(content) if isinstance(content, dict) else list(content)
    if len(path) == 1 and value is MISSING:
        del found[path[0]]
    else:
        found[path[0]] = replaced(found[path[0]], path[1:], value)
    return tuple(found) if isinstance(content, tuple) else found


def near(value: Any) -> list[Any]:
    """Return other values of the kind that stands there, none among them: damage, other settings, odd numbers."""
    return [MISSING, *next((others(value) for kind, others in _NEAR.items() if isinstance(value, kind)), [1])]


def _whole_numbers(value: int) -> list[Any]:
    return [value + 1, value - 1, -value, 0, 1, value * 1000, 2**31, 2**62, 2**63 - 1, value + 0.0, str(value)]


def _real_numbers(value: float) -> list[Any]:
    return [-value, 0.0, value / 2, value * 1e6, 5e-324, 1e308, -float("inf"), int(value), str(value)]


def _texts(value: str) -> list[Any]:
    changed = (f"{value}x", value[:-1], value.upper(), f"../{value}", f"{value}\n1,1,train", f"{value}\0")
    return [*changed, "/evil", "9" * 5000]


def _mappings(value: dict[Any, Any]) -> list[Any]:
    return [{**value, "x": 1}, {**value, 5: 1}, dict(reversed(value.items())), {str(key): 1 for key in value}]


def _lists(value: list[Any] | tuple[Any, ...]) -> list[Any]:
    found = list(value)
    return [found[::-1], found * 2, found[:-1], [*found, None], tuple(found), found * 200_000]


def _tensors(value: Tensor) -> list[Tensor]:
    flat = value.reshape(-1)
    return [
        flat[:-1],
        value[None],
        value.double(),
        value.half(),
        value.bool(),
        value.to(torch.complex64),
        value.to_sparse(),
        torch.full_like(value, float("inf")) if value.is_floating_point() else -value,
        torch.empty_like(value, device="meta"),
        torch.nn.Parameter(value.float()),
        # a few bytes in the file
        torch.zeros(()).expand(2**40),
        torch.zeros((), dtype=value.dtype).expand(value.shape),
    ]


# the first kind that fits
_NEAR: dict[Any, Callable[[Any], list[Any]]] = {
    bool: lambda value: [not value, 1],
    int: _whole_numbers,
    float: _real_numbers,
    str: _texts,
    dict: _mappings,
    (list, tuple): _lists,
    Tensor: _tensors,
}
