"""The arguments of statistics: names, what others are meant, torchmetrics objects, and the target that is ignored."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torchmetrics import Metric, MetricCollection

from lightning_plugins.core.validation import a_list, shown, whole_number
from lightning_plugins.statistics.running import BY_NAME, LOSS, Statistic, StatisticSet

_ALIASES = {alias.replace("_", ""): name for name, statistic in BY_NAME.items() for alias in statistic.aliases}
_TORCHMETRICS = {
    "f1": "F1Score",
    "f1_score": "F1Score",
    "precision": "Precision",
    "recall": "Recall",
    "auc": "AUROC",
    "auroc": "AUROC",
    "roc_auc": "AUROC",
    "ap": "AveragePrecision",
    "map": "AveragePrecision",
    "average_precision": "AveragePrecision",
    "specificity": "Specificity",
    "kappa": "CohenKappa",
    "iou": "JaccardIndex",
    "jaccard": "JaccardIndex",
    "mse": "MeanSquaredError",
    "mae": "MeanAbsoluteError",
    "r2": "R2Score",
}
"""Names that users try -> the class of torchmetrics that computes it."""


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
    lowered = name.lower().replace("-", "_").replace(" ", "_")
    known = _ALIASES.get(lowered.replace("_", "")) or next(iter(difflib.get_close_matches(lowered, BY_NAME, n=1)), None)
    kind = _TORCHMETRICS.get(lowered)
    hint = f"; did you mean {known!r}?" if known else "."
    if kind:
        hint = f"; give torchmetrics' object for it, torchmetrics.{kind}(...)."
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


def checked_ignore_index(value: int | None) -> int | None:
    """Return the argument ``ignore_index``, or raise when it is neither a whole number nor ``None``."""
    return None if value is None else whole_number("ignore_index", value, at_least=-sys.maxsize)
