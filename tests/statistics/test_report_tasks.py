"""Reports of several labels at once, of one-hot rows and of single scores; and reports of very many classes."""

import itertools
import json
import math
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import classification_report
from torch.utils.data import DataLoader

from lightning_plugins import ClassificationReport
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.statistics.test_classification_report import same
from tests.support.statistics_runs import Classifier, fit, loaders


def report_of(predictions, targets, classes, pieces=3, **options):
    report = ClassificationReport(classes, **options)
    for part in np.array_split(np.arange(len(targets)), pieces):
        report.update(predictions[part], targets[part])
    return report


def check(report, truth, predicted, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = classification_report(truth, predicted, **options)
        values = classification_report(truth, predicted, output_dict=True, **options)
    assert report.compute() == text
    found = report.compute(output_dict=True)
    assert list(found) == list(values)
    for name, expected in values.items():  # sums over samples are added in another order
        if isinstance(expected, dict):
            assert list(found[name].values()) == pytest.approx(list(expected.values()), rel=1e-12, nan_ok=True), name
        else:
            assert found[name] == expected


def several(seed, count, classes, share=0.4):
    made = torch.Generator().manual_seed(seed)
    truth = torch.rand(count, classes, generator=made) < share
    logits = torch.randn(count, classes, generator=made) + truth.float() - 0.5
    return logits, truth


@pytest.mark.parametrize("task", ["auto", "multilabel"])
@pytest.mark.parametrize(("seed", "zero_division"), list(itertools.product(range(4), (0, 1, math.nan))))
def test_multi_hot_rows_are_scikit_learns_report_of_several_labels(task, seed, zero_division):
    logits, truth = several(seed, 40 + seed, 4 + seed, share=0.15 * (seed + 1))
    truth[:2] = False  # samples without a label
    truth[2] = True
    expected = truth.int().numpy(), (logits >= 0).int().numpy()
    for predictions in (logits, logits.sigmoid(), (logits >= 0).long()):
        report = report_of(predictions, truth.long(), truth.shape[1], task=task, zero_division=zero_division)
        check(report, *expected, zero_division=zero_division)


def test_a_choice_of_several_labels_with_names():
    logits, truth = several(5, 60, 6)
    names = ["sky", "sea", "sand"]
    report = report_of(logits, truth.float(), 6, labels=[4, 0, 2], target_names=names, digits=4)
    check(report, truth.int().numpy(), (logits >= 0).int().numpy(), labels=[4, 0, 2], target_names=names, digits=4,
          zero_division=0)  # fmt: skip


@pytest.mark.parametrize("of", [torch.float32, torch.int64, torch.uint8, torch.bool])
def test_one_hot_rows_have_a_row_for_every_class(of):
    logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (60,), generator=torch.Generator().manual_seed(1))
    rows = torch.nn.functional.one_hot(labels, 5).to(of)
    for predictions in (logits, torch.nn.functional.one_hot(logits.argmax(1), 5)):
        if predictions.is_floating_point() or not rows.is_floating_point():
            check(report_of(predictions, rows, 5), labels.numpy(), logits.argmax(1).numpy(), zero_division=0)
    check(report_of(logits, rows.float() * 0.9 + 0.02, 5), labels.numpy(), logits.argmax(1).numpy(), zero_division=0)


@pytest.mark.parametrize("shape", [(50,), (50, 1)])
def test_single_scores_are_a_report_of_two_classes(shape):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    labels = torch.rand(50, generator=torch.Generator().manual_seed(1)) < logits.sigmoid()
    for predictions in (logits, logits.sigmoid()):
        report = report_of(predictions.reshape(shape), labels.reshape(shape).float(), 2)
        check(report, labels.numpy().astype(int), (logits >= 0).numpy().astype(int), zero_division=0)
    with pytest.raises(ValueError, match="`num_classes` 3 needs a score for every class"):
        report_of(logits, labels.float(), 3).compute()


def test_what_does_not_count_is_left_out():
    logits = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(1))
    gaps = torch.rand(60, generator=torch.Generator().manual_seed(2)) < 0.3
    kept = labels[~gaps].numpy(), logits[~gaps].argmax(1).numpy()
    check(report_of(logits, labels.float().masked_fill(gaps, torch.nan), 3), *kept, zero_division=0)
    void = labels.masked_fill(gaps, 255).to(torch.uint8)
    check(report_of(logits, void, 3, ignore_index=255), *kept, zero_division=0)
    with pytest.raises(ValueError, match=f"All targets must be from 0 to 2 .* got {gaps.sum()} others"):
        report_of(logits, void, 3).compute()


def test_two_readings_that_remain_are_refused_naming_the_task():
    columns = torch.tensor([[0, 1], [1, 1]])
    with pytest.raises(ValueError, match="give task='multiclass' or task='multilabel'"):
        report_of(columns, columns, 2, pieces=1).compute()
    assert "samples avg" in report_of(columns, columns, 2, pieces=1, task="multilabel").compute()
    assert "samples avg" not in report_of(columns, columns, 2, pieces=1, task="multiclass").compute()
    odd = torch.full((4, 3), 0.6)
    with pytest.raises(ValueError, match="Give task='multiclass' or task='multilabel'"):
        report_of(torch.randn(4, 3), odd, 3, pieces=1).compute()
    with pytest.raises(ValueError, match="`num_classes` 3 must be the number of scores in a row, got 4"):
        report_of(torch.randn(4, 4), torch.ones(4, 4), 3, pieces=1)
    masks, truth = torch.randn(4, 5, 6), torch.rand(4, 5, 6) > 0.5
    with pytest.raises(ValueError, match="got 6; masks of one score for each label need task='binary'"):
        report_of(masks, truth, 2, pieces=1)
    wanted = truth.flatten().long().numpy(), (masks >= 0).flatten().long().numpy()
    check(report_of(masks, truth, 2, pieces=1, task="binary"), *wanted, zero_division=0)


def test_batches_must_be_alike():
    report = ClassificationReport(2)
    report.update(torch.randn(4), torch.ones(4))
    report.update(torch.randn(4, 2), torch.ones(4).long())
    with pytest.raises(ValueError, match="must be alike, but were read as scores of classes and as score per label"):
        report.compute()


def test_a_hundred_thousand_classes_take_a_few_megabytes():
    classes = 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = ClassificationReport(classes, path=["r.txt", "r.json", "r.csv"])
    labels = torch.randint(classes, (5000,), generator=torch.Generator().manual_seed(0))
    predicted = torch.where(torch.arange(5000) % 3 == 0, labels.roll(1), labels)
    for part in range(0, 5000, 1000):
        report.update(predicted[part : part + 1000], labels[part : part + 1000])
    text = report.compute()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200
    assert text == classification_report(labels.numpy(), predicted.numpy(), zero_division=0)
    with pytest.raises(ValueError, match=r"`path` must not end in '.png' with more than 1000 classes, .* got 100000"):
        ClassificationReport(classes, path="matrix.png")


def test_a_picture_counts_every_pair_and_nothing_else_does():
    truth, predicted = np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])
    pictured, plain = (ClassificationReport(3, path=path) for path in ("r.png", "r.txt"))
    for report in (pictured, plain):
        report.update(torch.tensor(predicted), torch.tensor(truth))
    assert pictured._counts.totals().matrix.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    assert plain._counts.totals().matrix is None
    assert len(plain._counts.vector) < 60


# in a Trainer


class Labels(Classifier):
    """Several labels at once."""

    def _step(self, phase, batch):
        logits = self(batch[0])
        rows = (batch[0][:, :1] + torch.arange(8) / 8 > 0).float()
        if not self.trainer.sanity_checking:
            self.seen.append((phase, 0.0, logits.detach().numpy(), rows.numpy()))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, rows)
        return {"loss": loss, "logits": logits, "target": rows}


def test_a_module_of_several_labels_has_their_report():
    _, model = fit([ClassificationReport(8, path=["r.txt", "r.json"])], Labels, max_epochs=1)
    seen = [part for part in model.seen if part[0] == "validation"]
    truth, logits = (np.concatenate([part[place] for part in seen]) for place in (3, 2))
    assert Path("r.txt").read_text() == classification_report(truth, logits >= 0, zero_division=0)
    values = classification_report(truth, logits >= 0, zero_division=0, output_dict=True)
    assert same(json.loads(Path("r.json").read_text())["micro avg"], values["micro avg"])


@pytest.mark.parametrize("path", ["file/r.txt", "folder.txt"])
def test_a_place_that_cannot_be_written_is_refused_at_setup(path):
    Path("file").write_text("")
    Path("folder.txt").mkdir()
    with pytest.raises(MisconfigurationException, match="`path` must be a file that can be written, got '"):
        fit([ClassificationReport(8, path=path)])


def test_a_place_that_is_lost_later_costs_one_warning():
    def lose(trainer, module):
        Path("out").write_text("no directory any more")

    class Losing(Classifier):
        def on_train_start(self):
            lose(self.trainer, self)

    report = ClassificationReport(8, path="out/{epoch}.txt")
    with pytest.warns(
        LightningPluginsWarning, match=r"out/1.txt could not be written .* That report is lost"
    ) as caught:
        trainer, _ = fit([report], Losing, max_epochs=1)
    assert trainer.global_step == 3
    assert len([w for w in caught if "is lost" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore:.*`None`")
def test_a_batch_of_none_counts_nowhere():
    class Gaps(Classifier):
        def validation_step(self, batch, batch_idx):
            if batch is not None:
                super().validation_step(batch, batch_idx)

    whole, gaps = (ClassificationReport(8, path=path) for path in ("whole.txt", "gaps.txt"))
    train, validation = loaders()
    fit([whole], Gaps, max_epochs=1, num_sanity_val_steps=0)
    batches = DataLoader([None, *validation, None], batch_size=None, collate_fn=lambda batch: batch)
    fit([gaps], Gaps, max_epochs=1, data=(train, batches), num_sanity_val_steps=0)
    assert Path("whole.txt").read_text() == Path("gaps.txt").read_text()


@pytest.mark.parametrize("task", ["auto", "multiclass"])
@pytest.mark.parametrize("width", [3, 6])
def test_whole_numbers_in_a_grid_of_another_width_are_class_numbers(task, width):
    predicted, truth = torch.randint(4, (2, 30, width), generator=torch.Generator().manual_seed(0))
    check(report_of(predicted, truth, 4, task=task), truth.flatten(), predicted.flatten())
