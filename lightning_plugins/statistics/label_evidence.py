"""Which of two readings of predictions and labels a phase's values speak for.

Both readings were counted, and so was the evidence: see :class:`~.label_counter.LabelCounter`. The choice is made when
the counts are read, and needs no look at the device in between.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_plugins.statistics.labels import NO_TOP_5, Columns


def decided(columns: Columns, reading: str, task: str) -> dict[str, Tensor]:
    """Return the counts of the reading that a phase's values speak for; on the device or on the host.

    Args:
        columns: Both readings' counts: of labels or rows ``labels, right, ...``; of entries, read as logits and as
            probabilities, ``entries, right_by_logits, right_by_probabilities, ...``; and the evidence.
        reading: How the batches were read.
        task: What the user said that the targets are.
    """
    found = dict(columns)
    if reading == "rows of numbers":
        return found | _of_numbers(columns)
    if reading not in ("score per label", "rows"):
        return found
    logits = columns["outside"] > 0
    entries = {
        "labels": columns["entries"],
        "right": torch.where(logits, columns["right_by_logits"], columns["right_by_probabilities"]),
    }
    if "positive" in columns:
        predicted = torch.where(logits, columns["predicted_by_logits"], columns["predicted_by_probabilities"])
        for name, ones in (("by_label", columns["positive"]), ("by_prediction", predicted)):
            entries[name] = torch.stack([columns["entries"] - ones, ones], -1)
    if reading == "score per label" or task == "multilabel":
        return found | entries
    multi_hot = columns["multi_hot"] > 0
    for name, value in entries.items():
        of_rows = columns[name]
        wide = value if value.dim() == multi_hot.dim() else _padded(value, of_rows.shape[-1])
        choose = multi_hot if value.dim() == multi_hot.dim() else multi_hot.unsqueeze(-1)
        found[name] = torch.where(choose, wide, of_rows)
    return found


def _of_numbers(columns: Columns) -> dict[str, Tensor]:
    """Return the counts of rows where all were one-hot, else those of their entries."""
    one_hot = columns["one_hot"] == columns["rows"]
    found = {
        "labels": torch.where(one_hot, columns["rows"], columns["labels"]),
        "right": torch.where(one_hot, columns["rows_right"], columns["right"]),
    }
    for name in ("by_label", "by_prediction"):
        if name in columns:
            wide = _padded(columns[f"rows_{name}"], columns[name].shape[-1])
            found[name] = torch.where(one_hot.unsqueeze(-1), wide, columns[name])
    return found


EVIDENCE = ("outside", "not_binary", "soft", "multi_hot", "other")
"""What is counted beside the readings, to choose between them."""


def contradiction(evidence: Mapping[str, float], reading: str, task: str) -> str | None:
    """Return why a phase's values do not say how they are to be read, if they do not.

    Args:
        evidence: The evidence's names and counts, of one row of statistics.
        reading: How the batches were read.
        task: What the user said.
    """
    if reading == "score per label" and evidence["not_binary"]:
        return (
            "Targets of one score per label must be 0 or 1, or between them, but some are not. Give a score for each "
            "class, or leave out the metrics of classes; task='binary' is for two classes."
        )
    if reading == "rows" and task == "multilabel" and evidence["not_binary"]:
        return "Targets of `task` 'multilabel' must be 0 or 1, but some are not."
    if reading == "rows" and task == "auto" and (evidence["other"] or (evidence["soft"] and evidence["multi_hot"])):
        return (
            "The targets have a row for every row of scores, and it is not clear whether they are classes or "
            "several labels at once: some rows are neither one-hot nor of sum 1 nor of 0 and 1. Give task='multiclass' "
            "or task='multilabel'."
        )
    if "right_of_5" in evidence and is_multilabel(evidence, reading, task):
        return NO_TOP_5
    return None


def is_multilabel(evidence: Mapping[str, float], reading: str, task: str) -> bool:
    """Return whether a phase's targets are several labels at once."""
    return reading == "rows" and (task == "multilabel" or evidence["multi_hot"] > 0)


def _padded(value: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(value, (0, size - value.shape[-1]))
