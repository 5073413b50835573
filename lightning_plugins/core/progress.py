"""A progress bar for work that takes long: on a terminal, and nowhere else unless asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Advance = Callable[[int], object]
"""Called with the number of bytes that were done since the last call."""

_LONG = 1 << 30  # bytes read from which on a progress bar is worth its line


@contextmanager
def progress_bar(total: int, what: str, *, show: bool | None) -> Iterator[Advance | None]:
    """Show a bar of ``total`` bytes while the block runs; ``None``: if it is long and standard error a terminal."""
    if show is False or (show is None and total < _LONG):
        yield None
        return
    from tqdm.auto import tqdm  # noqa: PLC0415  # Lightning brings it; a state dict alone needs none

    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None if show is None else False) as bar:
        yield bar.update


def with_progress(items: Iterable[tuple[Item, int]], what: str, *, show: bool | None) -> Iterator[Item]:
    """Yield each item, and show on a bar how much is done.

    Args:
        items: What to yield, and its size in bytes.
        what: What is done to them.
        show: See :func:`progress_bar`.

    Example:
        >>> list(with_progress([("a", 10), ("b", 20)], "reading", show=False))
        ['a', 'b']
    """
    sized = list(items)
    with progress_bar(sum(size for _, size in sized), what, show=show) as advance:
        for item, size in sized:
            yield item
            if advance is not None:
                advance(size)
