"""What counts statistics never makes the host wait for the device."""

import pytest
import torch

from lightning_plugins import ClassificationReport
from lightning_plugins.statistics.metric_names import statistic_set
from lightning_plugins.statistics.rows import StatisticsRow, evaluate
from lightning_plugins.statistics.running import PhaseSums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("classes", [2, 10])
def test_a_batch_is_counted_without_a_synchronisation(classes):
    names = ["accuracy", "top5_accuracy", "perplexity"]
    names += ["matthews_correlation_coefficient"] if classes == 2 else []
    sums, report = PhaseSums(statistic_set(names)), ClassificationReport(classes)
    logits = torch.randn(64, classes, device="cuda")
    targets = torch.randint(classes, (64,), device="cuda")
    loss = torch.nn.functional.cross_entropy(logits, targets)
    report.update(logits, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            sums.update(loss, logits, targets)
            sums.state_now()
            sums.values_now()
            report.update(logits, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.state()["batches"] == 3
    assert int(report._counts.totals().true.sum()) == 4 * 64


def test_a_phase_without_a_loss_and_one_with_are_read_together():
    statistics = statistic_set(["accuracy"])
    train, validation = PhaseSums(statistics), PhaseSums(statistics)
    logits, targets = torch.randn(8, 3, device="cuda"), torch.zeros(8, dtype=torch.long, device="cuda")
    train.update(torch.tensor(1.0, device="cuda"), logits, targets)
    validation.update(None, logits, targets)
    rows = [
        StatisticsRow(p, 1, 1, 1, 1, 1, 1, None, 0.0, 0.0, s.state_now())
        for p, s in (("train", train), ("v", validation))
    ]
    evaluate(statistics, rows)
    assert list(rows[0].values) == ["loss", "accuracy"]
    assert list(rows[1].values) == ["accuracy"]
