"""Windows under DeepSpeed, which decides about steps by a count of its own and keeps the gradients in partitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_plugins.core.patching import Patches
from lightning_plugins.core.zero import Zero, zero_of


class ZeroWindows:
    """Makes the windows of DeepSpeed those of Lightning, the short one at an epoch's end included.

    DeepSpeed counts batches through the ends of epochs and Lightning from each beginning, so the two part ways where an
    epoch is no multiple of the window. Here every batch is announced as the last of its window or not, and both take
    the step.

    Args:
        zero: What ZeRO does in the run.
    """

    def __init__(self, zero: Zero) -> None:
        self._zero = zero

    @classmethod
    def take_over(cls, trainer: Any, patches: Patches) -> ZeroWindows | None:
        """Return the windows of a run that is about to train, ``None`` under another strategy.

        Raises:
            ValueError: If DeepSpeed's optimizer is not ZeRO's, or the gradients are kept on the host.
        """
        zero = zero_of(trainer)
        if zero is None:
            return None
        if zero.offloads:
            raise ValueError(
                "GradientAccumulation does not work with DeepSpeed's `offload_optimizer`, which has measured the "
                "gradients for clipping before they can be scaled. Leave it out, or take ModelParallelStrategy."
            )
        epoch_loop: Any = trainer.fit_loop.epoch_loop

        def should_accumulate(original: Callable[[], bool]) -> bool:
            return original() and not epoch_loop._num_ready_batches_reached()

        patches.wrap(epoch_loop, "_should_accumulate", should_accumulate)
        return cls(zero)

    def next_batch(self, trainer: Any) -> None:
        """Announce the coming batch to DeepSpeed."""
        epoch_loop: Any = trainer.fit_loop.epoch_loop
        self._zero.announce(ends_window=not epoch_loop._should_accumulate())

    @property
    def ends(self) -> bool:
        """Whether the batch at hand is the last of its window."""
        return self._zero.ends_window

    @property
    def divisor(self) -> int:
        """What DeepSpeed divides every loss by, after Lightning has done so."""
        return self._zero.divisor

    def gradients(self) -> list[Tensor]:
        """Return this rank's part of the window's gradients."""
        return self._zero.gradients()
