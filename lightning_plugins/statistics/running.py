"""Running statistics of a phase: sums on the device, values when they are read.

A *phase* is one pass over the training or the validation data. Every statistic is a formula over a few sums over the
phase's batches, which stay on the device in float64; all counts lie in one vector, so that a batch adds to them in one
operation. Adding never changes such a vector in place, so the sums of every batch can be kept for the price of a
reference and turned into numbers together, in one transfer. Nothing here knows a Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plugins.core.metric_state import load_plain_state, plain_state
from lightning_plugins.core.module_state import can_be_copied
from lightning_plugins.core.validation import first_line, shown, whole_number
from lightning_plugins.statistics.label_counter import LabelCounter
from lightning_plugins.statistics.label_evidence import decided
from lightning_plugins.statistics.labels import Columns, widest

Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor up over all ranks; every rank must call it at the same moment."""


NOTHING = torch.zeros((), dtype=torch.float64)
"""The sum of no losses."""

COUNTED_ONCE = ("scores of classes", "class numbers")
"""The readings of labels that have one meaning."""


@dataclass(frozen=True)
class Statistic:
    """A number computed from sums.

    Args:
        name: The column's name.
        counts: What of :class:`LabelCounter` the formula needs; nothing for those of the loss.
        formula: Which sum is divided by which; or sums -> values, where the same code serves one row on the device and
            many rows on the host.
        s4tf_name: What Swift for TensorFlow called it.
        aliases: Other names under which users look for it.
    """

    name: str
    counts: tuple[str, ...]
    formula: tuple[str, str] | Callable[[Columns], Tensor]
    s4tf_name: str
    aliases: tuple[str, ...] = ()


def _matthews(sums: Columns) -> Tensor:
    count, true, predicted = sums["labels"], sums["by_label"], sums["by_prediction"]
    covariance = sums["right"] * count - (true * predicted).sum(-1)
    spread = [(part * (count.unsqueeze(-1) - part)).sum(-1) for part in (true, predicted)]
    # a product of roots, not the root of a product: 1e16 squared would not be told from its neighbors
    denominator = spread[0].sqrt() * spread[1].sqrt()
    return torch.where(denominator == 0, torch.zeros_like(denominator), covariance / denominator)


def _perplexity(sums: Columns) -> Tensor:
    return (sums["loss"] / sums["batches"]).exp()


LOSS = Statistic("loss", (), ("loss", "batches"), "loss")
BY_NAME = {
    statistic.name: statistic
    for statistic in (
        Statistic("accuracy", ("labels", "right"), ("right", "labels"), "accuracy", ("acc", "top1", "top1_accuracy")),
        Statistic(
            "top5_accuracy",
            ("labels", "right_of_5"),
            ("right_of_5", "labels"),
            "top5Accuracy",
            ("top5", "acc5", "top5_acc"),
        ),
        Statistic(
            "matthews_correlation_coefficient",
            ("labels", "right", "by_label", "by_prediction"),
            _matthews,
            "mcc",
            ("mcc", "matthews", "matthews_corrcoef", "matthews_correlation", "phi"),
        ),
        Statistic("perplexity", (), _perplexity, "perplexity", ("ppl",)),
    )
}
S4TF_NAMES = {statistic.name: statistic.s4tf_name for statistic in (LOSS, *BY_NAME.values())}


@dataclass(frozen=True)
class StatisticSet:
    """What a recorder computes: the loss, the statistics by name and torchmetrics objects, in the user's order.

    Args:
        names: Every column, ``loss`` first.
        statistics: Those that are formulas over sums.
        metrics: Name -> torchmetrics object, a template that is cloned for each phase.
    """

    names: tuple[str, ...]
    statistics: tuple[Statistic, ...]
    metrics: Mapping[str, Metric]

    @cached_property
    def counts(self) -> frozenset[str]:
        """The counts of labels that all statistics together need."""
        return frozenset(name for statistic in self.statistics for name in statistic.counts)

    @cached_property
    def of_labels(self) -> frozenset[str]:
        """The names of those that are there without a loss."""
        return frozenset(statistic.name for statistic in self.statistics if statistic.counts)

    @cached_property
    def needs_predictions(self) -> bool:
        """Whether anything but the loss is needed."""
        return bool(self.counts or self.metrics)


@dataclass(slots=True)
class PhaseState:
    """The sums of a phase after one batch; nothing here changes any more.

    Args:
        batches: Batches with a loss so far.
        loss: The sum of their losses, without a dimension.
        newest: The last batch's loss, likewise; ``None`` if it had none.
        weight: What ``loss`` is the sum over instead of ``batches``, where it is one that the module logged.
        counts: The counts of labels, one vector; ``None`` without any.
        reading: How the batches were read; see :class:`LabelCounter`.
        layout: Name and number of elements of each count.
        others: Name -> number that is no formula over the sums: a torchmetrics object's value, what the module logged.
    """

    batches: int
    loss: Tensor
    newest: Tensor | None
    weight: Tensor | None
    counts: Tensor | None
    reading: str
    layout: tuple[tuple[str, int], ...]
    others: dict[str, Tensor]


class PhaseSums:
    """The sums of one phase.

    Args:
        statistics: What is computed from them.
        task: What the targets are.
        ignore_index: The target that does not count.
        tell_once: Says a line to the user, if it has not been said.
    """

    def __init__(
        self,
        statistics: StatisticSet,
        task: str = "auto",
        ignore_index: int | None = -100,
        tell_once: Callable[[str], object] = str,
    ) -> None:
        self.statistics = statistics
        self.labels = LabelCounter(statistics.counts, task, ignore_index)
        self._tell_once = tell_once
        self._metrics: dict[str, Metric] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin a phase."""
        self.batches = 0
        self._loss: Tensor | None = None
        self._newest: Tensor | None = None
        self._weight: Tensor | None = None
        self._counts: Tensor | None = None
        self.labels.begin()
        for metric in (self._metrics or {}).values():
            metric.reset()

    def update(self, loss: Tensor | None, predictions: Tensor | None, targets: Tensor | None) -> None:
        """Add a batch.

        Args:
            loss: The batch's mean loss, or ``None`` when the step returns none.
            predictions: Only looked at when a statistic needs them; see :func:`~.labels.read_batch`.
            targets: Likewise.
        """
        if predictions is not None and targets is not None:
            if self.statistics.counts:
                self._counts = self.labels.add(self._counts, predictions, targets)
            if self.statistics.metrics:
                for name, metric in self._metric_objects(predictions.device).items():
                    self._update_metric(name, metric, predictions, targets)
        if loss is None:
            self._newest = None
            return
        self.batches += 1
        newest = self._newest = _wide_copy(loss)
        self._loss = newest if self._loss is None else self._loss + newest

    def take_logged_loss(self, total: Tensor, weight: Tensor) -> None:
        """Take the sums of a loss that the module has logged in this phase, in place of losses that it returned."""
        self._loss, self._weight = (part.detach().to(widest(part.device), copy=True) for part in (total, weight))

    def state_now(self, *, with_metrics: bool = True) -> PhaseState:
        """Return the sums as they are now, with the torchmetrics objects' values if wanted."""
        others = {}
        if self._metrics and with_metrics:
            for name, metric in self._metrics.items():
                value = self._computed(name, metric)
                if value is not None:
                    others[name] = value
        loss = NOTHING if self._loss is None else self._loss
        labels = self.labels
        return PhaseState(
            self.batches, loss, self._newest, self._weight, self._counts, labels.reading, labels.layout, others
        )

    def values_now(self) -> dict[str, Tensor]:
        """Return name -> value so far as tensors on the device, without the torchmetrics objects."""
        sums: dict[str, Any] = {}
        if self.labels.is_plain and self._counts is not None:
            sums = dict(zip(self.labels.names, self._counts.unbind(), strict=True))
        elif self._counts is not None:
            sums = named(self._counts, self.labels.layout)
            if self.labels.reading not in COUNTED_ONCE:
                sums = decided(sums, self.labels.reading, self.labels.task)
        if self.batches:
            # a division by a whole number would convert it first
            sums["loss"], sums["batches"] = self._loss, float(self.batches)
        values = {}
        for statistic in self.statistics.statistics:
            if self.batches or statistic.counts:
                formula = statistic.formula
                values[statistic.name] = (
                    sums[formula[0]] / sums[formula[1]] if isinstance(formula, tuple) else formula(sums)
                )
        return values

    def state(self, reduce: Reduce | None = None) -> dict[str, Any]:
        """Return plain numbers and tensors; see :meth:`load`.

        Args:
            reduce: Adds a tensor up over all ranks; one of them then loads the state of all.
        """
        metrics = {name: plain_state(metric) for name, metric in (self._metrics or {}).items()}
        if self._loss is None and self._counts is None:
            return {"batches": 0, "sums": [], "metrics": metrics}
        counts = NOTHING.new_empty(0) if self._counts is None else self._counts
        loss = NOTHING if self._loss is None else self._loss
        counts = counts.to(loss) if self._counts is None else counts
        joined = torch.cat([torch.stack([loss.to(counts), counts.new_tensor(self.batches)]), counts])
        total, batches, *rest = (joined if reduce is None else reduce(joined)).tolist()
        return {
            "batches": int(batches),
            "sums": [total, *rest],
            "reading": self.labels.reading,
            "layout": [[name, size] for name, size in self.labels.layout],
            "metrics": metrics,
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state`."""
        self.reset()
        self.batches = state["batches"]
        if state["sums"]:
            sums = torch.tensor(state["sums"], dtype=torch.float64).to(device, widest(device))
            self._loss = sums[0] if self.batches else None
            self._counts = sums[1:] if len(sums) > 1 else None
            self.labels.reading = state["reading"]
            self.labels.layout = tuple(tuple(entry) for entry in state["layout"])
        for name, metric in self._metric_objects(device).items():
            if name in state["metrics"]:
                _check_metric_state(name, metric, state["metrics"][name])
                load_plain_state(metric, state["metrics"][name], device)

    def _metric_objects(self, device: torch.device) -> dict[str, Metric]:
        if self._metrics is None:
            self._metrics = {name: metric.clone().to(device) for name, metric in self.statistics.metrics.items()}
            for metric in self._metrics.values():
                metric.reset()
        return self._metrics

    @staticmethod
    def _update_metric(name: str, metric: Metric, predictions: Tensor, targets: Tensor) -> None:
        try:
            metric.update(predictions, targets)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"The torchmetrics object {name!r} in `metrics` refused a batch: {error}") from error

    def _computed(self, name: str, metric: Metric) -> Tensor | None:
        """Return the metric's number, or ``None`` where it needs more batches than there were."""
        try:
            value = metric.compute()
        except (ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
            if metric._is_synced:
                metric.unsync()
            self._tell_once(
                f"StatisticsRecorder: {name!r} cannot be computed yet and stays blank until it can: {first_line(error)}"
            )
            return None
        if not isinstance(value, Tensor) or value.numel() != 1:
            kind = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`metrics` must compute one number each, got a {kind} from {name!r}.")
        return value.detach().reshape(())


def named(counts: Tensor, layout: Iterable[tuple[str, int]]) -> dict[str, Tensor]:
    """Return name -> counts, of one vector or of a table with a row for each."""
    found, place = {}, 0
    for name, size in layout:
        found[name] = counts[..., place] if size == 1 else counts[..., place : place + size]
        place += size
    return found


def _wide_copy(loss: Tensor) -> Tensor:
    """Return a number of a loss's own: an optimizer or the user may go on writing into the loss."""
    if loss.requires_grad:
        loss = loss.detach()
    if loss.dim():
        loss = loss.reshape(())
    wide = widest(loss.device)
    if loss.dtype is wide:
        return loss.clone()
    # quicker than `to`
    return loss.double() if wide is torch.float64 else loss.float()


def _goes_on(value: Tensor, default: Tensor) -> bool:
    """Return whether a metric that begins with ``default`` can have come to ``value``: sums may have become wider."""
    return value.shape == default.shape and bool(torch.can_cast(default.dtype, value.dtype))


def _are_stored(parts: list[Any]) -> bool:
    """Return whether all are tensors of real numbers, and each has elements of its own: few bytes can pose as many."""
    if not all(isinstance(tensor, Tensor) and can_be_copied(tensor, into=NOTHING) for tensor in parts):
        return False
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in parts)}
    posed: int = sum(tensor.numel() * tensor.itemsize for tensor in parts)
    return bool(posed <= sum(storages.values()))


def _check_metric_state(name: str, metric: Metric, state: Any) -> None:
    """Raise unless a saved state has the names, kinds and shapes that a metric's own states have."""
    found = state.get("states") if isinstance(state, Mapping) else None
    defaults = metric.metric_state
    if not isinstance(found, Mapping) or found.keys() != defaults.keys():
        raise ValueError(f"The saved state of the metric {name!r} must have its states, got {shown(state)}.")
    whole_number("updates", state.get("updates"))
    for part, value in found.items():
        default = defaults[part]
        parts = value if isinstance(value, list) else [value]
        if not _are_stored(parts) or (
            isinstance(default, Tensor) and (isinstance(value, list) or not _goes_on(value, default))
        ):
            raise ValueError(f"The saved state of the metric {name!r} must fit its state {part!r}, got {shown(value)}.")
