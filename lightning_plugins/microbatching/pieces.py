"""How a batch is counted and split: by what it shows, or by functions of the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_plugins.core.batches import SampleCounter, split_batch
from lightning_plugins.core.counting import Count, CountedBy, counter
from lightning_plugins.core.validation import shown

Split = Callable[[Any, Sequence[int]], Sequence[Any]]
"""``split(batch, sizes) -> pieces``."""


class Pieces:
    """Counts and splits the batches of a run.

    Args:
        count: What the loss is a mean over.
        split: The user's function, ``None`` to cut what can be cut along its samples.
        module: The module in training, which may count samples itself.
        full: Samples of a full batch, if the loader tells.

    Attributes:
        count: The function that counts what the loss is a mean over, ``None`` for samples.
    """

    def __init__(self, count: CountedBy, split: Split | None, *, module: Any = None, full: int | None = None) -> None:
        self.count: Callable[[Any], Count] | None = None if count == "samples" else counter(count)
        self._samples = counter("samples", module=module, full=full)
        self._split = split

    def length(self, batch: Any) -> int:
        """Return the samples of a batch; where they cannot be told, what ``count`` counts.

        Raises:
            ValueError: If ``count`` is ``"samples"`` and they cannot be told.
        """
        try:
            return int(self._samples(batch))
        except ValueError as error:
            if self.count is not None:
                number = self.count(batch)
                return int(number.item() if isinstance(number, Tensor) else number)
            raise ValueError(
                f"MicroBatching cannot tell the size of the batch: {error} If it cannot be cut along its samples "
                f"either, give `split`, a function (batch, sizes) -> pieces, too."
            ) from None

    def split(self, batch: Any, sizes: Sequence[int]) -> list[Any]:
        """Return the batch in pieces of the given sizes.

        Raises:
            TypeError: If it cannot be cut.
            ValueError: If it can be cut in two ways, or the user's function returns another number of pieces.
        """
        if self._split is None:
            reading = self._samples.reading if isinstance(self._samples, SampleCounter) else None
            return split_batch(batch, sizes, reading)
        pieces = self._split(batch, list(sizes))
        try:
            pieces = list(pieces)
        except TypeError:
            raise TypeError(f"`split` must return a list of pieces, got {shown(pieces)}.") from None
        if len(pieces) != len(sizes):
            raise ValueError(f"`split` must return a piece for each of the {len(sizes)} sizes, got {len(pieces)}.")
        return pieces
