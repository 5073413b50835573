"""Running statistics of a phase: sums on the device, values when somebody reads them.

A *phase* is one pass over the training or the validation data. Every statistic is a formula over a few *terms*, each
a sum over the phase's batches that stays on the device in float64; all counts lie in one tensor, so that a batch adds
to them in one operation. Adding never changes such a tensor in place, so the sums of every batch can be kept for the
price of a reference and turned into numbers together, in one transfer. Nothing here knows a Trainer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_plugins.core.validation import a_list, shown
from lightning_plugins.statistics.labelled_batch import LabelledBatch

Columns = Mapping[str, Tensor]
"""Term -> its sums, one element per row; also ``batches``, the number of batches that had a loss."""


@dataclass(frozen=True)
class Statistic:
    """A number computed from sums.

    Args:
        name: The column's name.
        terms: The sums that the formula needs.
        formula: Sums -> values; the same code serves one row on the device and many rows on the host.
        s4tf_name: What Swift for TensorFlow called it.
    """

    name: str
    terms: tuple[str, ...]
    formula: Callable[[Columns], Tensor]
    s4tf_name: str


def _mean_loss(sums: Columns) -> Tensor:
    return sums["loss"] / sums["batches"]


def _accuracy(sums: Columns) -> Tensor:
    return sums["correct"] / sums["labels"]


def _top5_accuracy(sums: Columns) -> Tensor:
    return sums["correct_of_5"] / sums["labels"]


def _matthews(sums: Columns) -> Tensor:
    both, predicted, actual, count = (sums[term] for term in ("both", "predicted", "actual", "labels"))
    neither = count - predicted - actual + both
    numerator = both * neither - (predicted - both) * (actual - both)
    # a product of roots, not the root of a product: four counts of 1e8 would not fit in exact arithmetic otherwise
    denominator = predicted.sqrt() * actual.sqrt() * (count - predicted).sqrt() * (count - actual).sqrt()
    return torch.where(denominator == 0, torch.zeros_like(denominator), numerator / denominator)


def _perplexity(sums: Columns) -> Tensor:
    return _mean_loss(sums).exp()


LOSS = Statistic("loss", (), _mean_loss, "loss")
BY_NAME = {
    statistic.name: statistic
    for statistic in (
        Statistic("accuracy", ("correct", "labels"), _accuracy, "accuracy"),
        Statistic("top5_accuracy", ("correct_of_5", "labels"), _top5_accuracy, "top5Accuracy"),
        Statistic("matthews_correlation_coefficient", ("both", "predicted", "actual", "labels"), _matthews, "mcc"),
        Statistic("perplexity", (), _perplexity, "perplexity"),
    )
}
S4TF_NAMES = {statistic.name: statistic.s4tf_name for statistic in (LOSS, *BY_NAME.values())}

_MASKS: dict[str, Callable[[LabelledBatch], Tensor]] = {
    "labels": LabelledBatch.counted,
    "correct": LabelledBatch.right,
    "correct_of_5": lambda batch: batch.right_of(5),
    "both": lambda batch: batch.predicted() & batch.actual(),
    "predicted": LabelledBatch.predicted,
    "actual": LabelledBatch.actual,
}
"""Term -> which labels it counts."""


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
    def terms(self) -> tuple[str, ...]:
        """The sums that all statistics together need, each once, besides that of the loss."""
        return tuple(dict.fromkeys(term for statistic in self.statistics for term in statistic.terms))

    @cached_property
    def needs_predictions(self) -> bool:
        """Whether anything but the loss is needed."""
        return bool(self.terms or self.metrics)

    def values(self, sums: Columns) -> dict[str, Tensor]:
        """Return name -> value of the formulas, on the device of the sums."""
        return {statistic.name: statistic.formula(sums) for statistic in self.statistics}


def statistic_set(metrics: Any) -> StatisticSet:
    """Return the statistics that the user asked for.

    Args:
        metrics: Names, torchmetrics objects, or a mapping from names to torchmetrics objects.

    Raises:
        TypeError: If an entry is neither a name nor a torchmetrics object.
        ValueError: If a name is unknown or comes twice.

    Example:
        >>> statistic_set(["accuracy", "perplexity"]).names
        ('loss', 'accuracy', 'perplexity')
        >>> statistic_set(["acuracy"])
        Traceback (most recent call last):
        ...
        ValueError: `metrics` must name one of 'accuracy', 'top5_accuracy', 'matthews_correlation_coefficient',
        'perplexity' or be torchmetrics objects, got 'acuracy'; did you mean 'accuracy'?
    """
    if isinstance(metrics, (str, Metric, MetricCollection)):
        metrics = [metrics]
    if not isinstance(metrics, Mapping):
        metrics = a_list("metrics", metrics, "a list of names or torchmetrics objects, or a mapping from names to them")
    entries = metrics.items() if isinstance(metrics, Mapping) else _named(metrics)
    names, statistics, objects = ["loss"], [LOSS], {}
    for name, entry in entries:
        if name in names:
            raise ValueError(f"`metrics` must have distinct names, got {shown(name)} twice.")
        names.append(name)
        if isinstance(entry, Statistic):
            statistics.append(entry)
        elif isinstance(entry, Metric):
            objects[name] = entry
        else:
            raise TypeError(f"`metrics` must hold names or torchmetrics objects, got {shown(entry)}.")
    return StatisticSet(tuple(names), tuple(statistics), objects)


def _named(entries: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry, _by_name(entry)
        elif isinstance(entry, MetricCollection):
            yield from ((snake_case(name), metric) for name, metric in entry.items())
        else:
            yield snake_case(type(entry).__name__), entry


def _by_name(name: str) -> Statistic:
    if name in BY_NAME:
        return BY_NAME[name]
    if name == "loss":
        raise ValueError("`metrics` must not name 'loss': it always comes first.")
    nearest = difflib.get_close_matches(name, BY_NAME, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise ValueError(
        f"`metrics` must name one of {', '.join(map(repr, BY_NAME))} or be torchmetrics objects, "
        f"got {shown(name)}{hint}"
    )


def snake_case(name: str) -> str:
    """Return a class name as a column name.

    Example:
        >>> snake_case("BinaryF1Score"), snake_case("MulticlassAUROC")
        ('binary_f1_score', 'multiclass_auroc')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@dataclass(slots=True)
class Snapshot:
    """The sums of a phase after one batch.

    Args:
        batches: Batches with a loss so far.
        loss: The loss's sum, a 0-dimensional tensor that nobody changes any more.
        counts: One element per term, likewise; ``None`` without terms.
        extras: Name -> number that is not a formula over the sums: a torchmetrics object's value, what a module logged.
    """

    batches: int
    loss: Tensor
    counts: Tensor | None
    extras: dict[str, Tensor]


class PhaseSums:
    """The sums of one phase.

    Args:
        statistics: What is computed from them.
    """

    def __init__(self, statistics: StatisticSet) -> None:
        self.statistics = statistics
        self._terms = statistics.terms
        self._masks = [_MASKS[term] for term in self._terms]
        self._metrics: dict[str, Metric] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin a phase."""
        self.batches = 0
        self._loss: Tensor | None = None
        self._counts: Tensor | None = None
        if self._metrics is not None:
            for metric in self._metrics.values():
                metric.reset()

    def update(self, loss: Tensor | None, predictions: Tensor | None, targets: Tensor | None) -> None:
        """Add a batch.

        Args:
            loss: The batch's mean loss, or ``None`` when the step returns none.
            predictions: Logits or class numbers; only looked at when a statistic needs them.
            targets: Class numbers.
        """
        if self._masks and predictions is not None and targets is not None:
            batch = LabelledBatch(predictions, targets)
            masks = torch.stack([mask(batch) for mask in self._masks])
            counts = masks.sum(1, dtype=_widest(masks.device))
            self._counts = counts if self._counts is None else self._counts + counts
        self.batches += loss is not None
        term = torch.zeros(()) if loss is None else loss.detach()
        # a copy: an optimizer or the user may go on writing into the loss
        self._loss = _wide(term).reshape(()).clone() if self._loss is None else self._loss + term
        if self.statistics.metrics:
            for name, metric in self._metric_objects(predictions).items():
                self._update_metric(name, metric, predictions, targets)

    def snapshot(self, *, with_metrics: bool = True) -> Snapshot:
        """Return the sums as they are now, with the torchmetrics objects' values if wanted."""
        objects = self._metrics if self._metrics and with_metrics else {}
        loss = torch.zeros(()) if self._loss is None else self._loss
        return Snapshot(self.batches, loss, self._counts, {name: _scalar(name, m) for name, m in objects.items()})

    def running_values(self) -> dict[str, Tensor]:
        """Return name -> value so far as tensors on the device, without the torchmetrics objects."""
        counts = () if self._counts is None else self._counts.unbind()
        sums: dict[str, Any] = dict(zip(self._terms, counts, strict=True))
        sums |= {"loss": self._loss, "batches": self.batches}
        if self.batches:
            return self.statistics.values(sums)
        return {s.name: s.formula(sums) for s in self.statistics.statistics if s.terms}

    def state(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """Return plain numbers and tensors; see :meth:`load`.

        Args:
            reduce: Adds a tensor up over all ranks; one of them then loads the state of all.
        """
        metrics = {name: _metric_state(metric) for name, metric in (self._metrics or {}).items()}
        if self._loss is None:
            return {"batches": 0, "sums": [], "metrics": metrics}
        counts = self._loss.new_empty(0) if self._counts is None else self._counts
        loss = self._loss.to(counts)
        joined = torch.cat([torch.stack([loss, torch.full_like(loss, self.batches)]), counts])
        total, batches, *rest = (joined if reduce is None else reduce(joined)).tolist()
        return {"batches": int(batches), "sums": [total, *rest], "metrics": metrics}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state`."""
        self.reset()
        self.batches = state["batches"]
        if state["sums"]:
            loss, *counts = (_wide(torch.tensor(total, dtype=torch.float64), device) for total in state["sums"])
            self._loss, self._counts = loss, torch.stack(counts) if counts else None
        for name, metric in self._metric_objects(torch.zeros((), device=device)).items():
            if name in state["metrics"]:
                _load_metric_state(metric, state["metrics"][name], device)

    def _metric_objects(self, like: Tensor | None) -> dict[str, Metric]:
        if self._metrics is None and like is not None:
            self._metrics = {name: metric.clone().to(like.device) for name, metric in self.statistics.metrics.items()}
            for metric in self._metrics.values():
                metric.reset()
        return self._metrics or {}

    @staticmethod
    def _update_metric(name: str, metric: Metric, predictions: Tensor | None, targets: Tensor | None) -> None:
        try:
            metric.update(predictions, targets)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"The torchmetrics object {name!r} in `metrics` refused a batch: {error}") from error


def _wide(value: Tensor, device: torch.device | None = None) -> Tensor:
    """Return ``value`` in the widest type its device adds in: float64, on Apple's GPUs float32."""
    device = value.device if device is None else device
    return value.to(device, _widest(device))


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _scalar(name: str, metric: Metric) -> Tensor:
    value = metric.compute()
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"`metrics` must compute one number each, got {shape} from {name!r}.")
    return value.detach().reshape(())


def _metric_state(metric: Metric) -> dict[str, Any]:
    """Return the metric's states, joined over all ranks when there are several."""
    with metric.sync_context():
        states = metric.metric_state
        return {
            "updates": metric.update_count,
            "states": {
                name: [part.cpu().clone() for part in value] if isinstance(value, list) else value.cpu().clone()
                for name, value in states.items()
            },
        }


def _load_metric_state(metric: Metric, state: Mapping[str, Any], device: torch.device) -> None:
    for name, value in state["states"].items():
        listed = isinstance(metric.metric_state[name], list)
        parts = value if isinstance(value, list) else [value]
        parts = [part.to(device) for part in parts]
        setattr(metric, name, parts if listed else parts[0])
    metric._update_count = state["updates"]
    metric._computed = None
