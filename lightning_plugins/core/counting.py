"""How many items a batch holds: samples, tokens, or whatever a function says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_plugins.core.batches import SampleCounter, look_up
from lightning_plugins.core.validation import one_of, shown, takes, whole_number

Count = int | float | Tensor
"""A number of items; a tensor stays on its device until its value is needed."""

CountedBy: TypeAlias = Literal["samples"] | Callable[[Any], Any]
"""How to count; not just any text, so that a configuration's import path is known for a function."""

# of an index or a label
_LEAST = -(2**63)


class Tokens:
    """Counts the tokens of a batch that the loss does not ignore.

    A model that shifts the labels by itself (most causal language models) predicts no first token: count
    ``batch["labels"][:, 1:]`` with a function of your own then.

    Args:
        key: Where the labels are: a key of the batch, an index into it, or the name of an attribute.
        ignore_index: The label that the loss ignores; -100 is what ``torch.nn.functional.cross_entropy`` ignores.

    Example:
        >>> int(Tokens("labels")({"labels": torch.tensor([[5, 7, -100], [3, -100, -100]])}))
        3
    """

    def __init__(self, key: str | int, ignore_index: int = -100) -> None:
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise TypeError(f"`key` must be a field's name or index, got {shown(key)}.")
        self.key = key if isinstance(key, str) else whole_number("key", key, at_least=_LEAST)
        self.ignore_index = whole_number("ignore_index", ignore_index, at_least=_LEAST)

    def __call__(self, batch: Any) -> Tensor:
        """Return the number of tokens, on the batch's device."""
        labels = look_up(batch, self.key)
        if not isinstance(labels, Tensor):
            raise TypeError(f"`key` must name a tensor of labels, but {self.key!r} is a {type(labels).__name__}.")
        # it knows no comparison
        if labels.is_nested and labels.layout is torch.strided:
            return torch.stack([(part != self.ignore_index).sum() for part in labels.unbind()]).sum()
        return (labels != self.ignore_index).sum()

    def __repr__(self) -> str:
        return f"Tokens({self.key!r}, ignore_index={self.ignore_index})"


@dataclass(frozen=True)
class _CountOf:
    """What a function of the batch counts. Clients pickle callbacks in a fit, so it is one that can be pickled."""

    function: Callable[[Any], Any]

    def __call__(self, batch: Any) -> Count:
        return as_count(self.function(batch))


def counter(
    count: str | Callable[[Any], Any], *, module: Any = None, full: int | None = None
) -> Callable[[Any], Count]:
    """Return the function behind the argument ``count``: ``"samples"`` or a function of the batch.

    Args:
        count: The argument.
        module: The module in training; its own ``get_batch_size(batch)`` counts its samples, if it has one.
        full: Samples of a full batch, if the loader tells.

    Raises:
        TypeError: If ``count`` is neither.
        ValueError: If it is another string.
    """
    if isinstance(count, str):
        one_of("count", count, ("samples",), or_else=", Tokens(key) or a function of the batch")
        own: Any = getattr(module, "get_batch_size", None)
        if not _takes_a_batch(own):
            return SampleCounter(full)
        count = own
    return _CountOf(takes("count", count, "batch", what='"samples", Tokens(key) or a function'))


def _takes_a_batch(function: Any) -> bool:
    """Return whether ``function`` can be called with a batch alone; one without arguments tells the loader's size."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def as_count(value: Any) -> Count:
    """Return what a count function returned, as a number or a tensor without dimensions.

    Raises:
        TypeError: If it is not one number.
        ValueError: If it is negative or not finite and that is known without asking a device.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"`count` must return one number, got a tensor of shape {tuple(value.shape)}.")
        value = value.detach().reshape(())
        return value if value.device.type != "cpu" else as_count(value.item())
    # a NumPy number
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`count` must return one number, got {shown(value)}.")
    if not 0 <= value < float("inf"):
        raise ValueError(f"`count` must return a finite number of at least 0, got {shown(value)}.")
    return value


def wide(count: Count, device: torch.device | str) -> Tensor:
    """Return ``count`` on ``device`` in the widest floating-point type there is, without waiting for the device."""
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    if isinstance(count, Tensor):
        return count.to(device=device, dtype=dtype)
    return torch.full((), float(count), dtype=dtype, device=device)


class CountCheck:
    """Detects invalid counts without a device sync per batch.

    Attributes:
        counted: Whether any item is known to have been counted; :meth:`add_window` is not needed any more then.
    """

    # so many windows without a single item are a mistake, also in an epoch that takes a week
    _WINDOWS = 100

    def __init__(self) -> None:
        self._lowest: Tensor | None = None
        self._total: Count = 0
        self._windows = 0
        self.counted = False

    def add_batch(self, count: Tensor) -> None:
        """Remember the smallest count that is on a device."""
        self._lowest = count if self._lowest is None else torch.minimum(self._lowest, count)

    def add_window(self, total: Count) -> None:
        """Remember whether anything was counted."""
        self._total = self._total + total
        self._windows += 1
        self.counted = not isinstance(self._total, Tensor) and self._total > 0
        if self._windows == self._WINDOWS:
            self.verify()

    def verify(self) -> None:
        """Look at what was remembered; waits for the device.

        Raises:
            ValueError: If a count was negative, or all were zero.
        """
        if self._lowest is not None and not float(self._lowest) >= 0:
            raise ValueError(f"`count` must return a finite number of at least 0, got {float(self._lowest):g}.")
        self._lowest = None
        if not self.counted and self._windows:
            self.counted = float(self._total) > 0
            if not self.counted:
                raise ValueError(
                    f"`count` must not be 0 for every batch, got only zeros in {self._windows} optimizer steps: "
                    f"nothing would be learned. Does it look at the right field and the right `ignore_index`?"
                )
