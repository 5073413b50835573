"""What the fit's validation loop says of the weights that the module holds: over all ranks, each sample alike.

Lightning reports the numbers of one rank unless the module asks for more, and monitors them. A number that is printed
once and compares two files has to be that of all the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed

from lightning_plugins.checkpoints.isolated_validation import numbers
from lightning_plugins.core.batches import batch_length
from lightning_plugins.core.patching import Patches

RETURNED_LOSS = "returned loss"
"""The name of the mean of the losses that ``validation_step`` returns."""


@dataclass
class Part:
    """One rank's part of a logged number.

    Args:
        kind: ``"mean"``, ``"sum"``, ``"min"`` or ``"max"``; ``"whole"`` for what is that of all ranks already.
        value: Its sum, for a mean.
        weight: The samples in it, for a mean.
    """

    kind: str
    value: float
    weight: float = 1.0


def validate(trainer: Any) -> dict[str, float]:
    """Run the fit's own validation loop, in an isolated Trainer, and return the numbers that it logged.

    :data:`RETURNED_LOSS` is among them if ``validation_step`` returns a loss.
    """
    connector = trainer._logger_connector
    connector._callback_metrics = {}
    patches, parts = Patches(), _Parts()
    patches.wrap(trainer.lightning_module, "validation_step", parts.of_step)
    patches.wrap(connector, "update_eval_epoch_metrics", parts.of_loop(trainer.fit_loop.epoch_loop.val_loop))
    trainer.validating = True
    try:
        trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        patches.undo()
    several = trainer.world_size > 1
    joined = over_ranks(parts.found) if several else {RETURNED_LOSS: mean_of(parts.losses)} if parts.losses else {}
    return {**numbers(connector._callback_metrics), **joined}


class _Parts:
    """Collects this rank's part of what a validation logs and returns."""

    def __init__(self) -> None:
        self.losses: list[Part] = []
        self._logged: dict[str, Part] = {}

    @property
    def found(self) -> dict[str, Part]:
        returned = Part("mean", sum(p.value for p in self.losses), sum(p.weight for p in self.losses))
        return {**self._logged, **({RETURNED_LOSS: returned} if self.losses else {})}

    def of_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``validation_step`` and remember the loss that it returns, alone or under ``"loss"``."""
        output = step(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor) and loss.numel() == 1:
            samples = _samples(args[0] if args else next(iter(kwargs.values()), None))
            self.losses.append(Part("mean", float(loss.detach().float()) * samples, samples))
        return output

    def of_loop(self, loop: Any) -> Callable[..., Any]:
        """Return a wrapper that reads the loop's results while they are there: its end empties them."""

        def reading(update: Callable[[], Any]) -> Any:
            logged = update()
            for _, result in loop._results.valid_items():
                part = _part(result) if result.meta.on_epoch else None
                if part is not None:
                    self._logged.update(dict.fromkeys(loop._results._forked_name(result, False), part))
            return logged

        return reading


def _part(result: Any) -> Part | None:
    meta = result.meta
    if not result.is_tensor:
        # a metric of torchmetrics: it has joined its ranks itself
        value = result.compute()
        return Part("whole", float(value)) if isinstance(value, Tensor) and value.numel() == 1 else None
    if meta.is_mean_reduction:
        return Part("mean", float(result.value), float(result.cumulated_batch_size))
    kind = "sum" if meta.is_sum_reduction else "max" if meta.is_max_reduction else "min"
    return Part(kind, float(result.value))


def _samples(batch: Any) -> int:
    try:
        return batch_length(batch)
    except (TypeError, ValueError):
        # a batch that does not say how many samples it holds counts as one, as for Lightning's own means
        return 1


def over_ranks(mine: Mapping[str, Part]) -> dict[str, float]:
    """Return the numbers of all ranks together; every rank must ask, what it has logged may differ."""
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, dict(mine))
    names = dict.fromkeys(name for parts in gathered for name in parts)
    return {name: joined([parts[name] for parts in gathered if name in parts]) for name in names}


def joined(parts: list[Part]) -> float:
    """Return one number from the parts of several ranks.

    Example:
        >>> joined([Part("mean", 6.0, 3), Part("mean", 1.0, 1)]), joined([Part("max", 6.0), Part("max", 1.0)])
        (1.75, 6.0)
    """
    kind = parts[0].kind
    if kind == "mean":
        return mean_of(parts)
    values = [part.value for part in parts]
    if kind == "sum":
        return math.fsum(values)
    return max(values) if kind == "max" else min(values) if kind == "min" else values[0]


def mean_of(parts: Iterable[Part]) -> float:
    """Return the mean over all samples of ``parts``, NaN without any."""
    listed = list(parts)
    samples = math.fsum(part.weight for part in listed)
    return math.fsum(part.value for part in listed) / samples if samples else math.nan


def loss_name(metrics: Iterable[str]) -> str | None:
    """Return which metric tells the better weights when none was named: a validation loss.

    Example:
        >>> loss_name(["train_loss", "val_acc", "val_loss"])
        'val_loss'
        >>> loss_name(["val_acc"]) is None
        True
    """
    names = [name for name in metrics if "loss" in name.lower()]
    return min(names, key=lambda name: (name != "val_loss", not name.startswith("val"), "train" in name), default=None)
