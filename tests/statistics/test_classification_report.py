"""The classification report, against scikit-learn: to the last character and to the last bit."""

import copy
import csv
import io
import itertools
import json
import math
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import classification_report, precision_recall_fscore_support

from lightning_plugins import ClassificationReport
from tests.support.statistics_runs import CLASSIFIERS, Classifier, dataset, fit, loaders, trainer_of


def same(ours, theirs):
    """Whether two dicts are equal to the last bit, NaN included."""
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    return ours == theirs or (math.isnan(ours) and math.isnan(theirs))


def compare(truth, predicted, classes, *, pieces=3, labels=None, names=None, **options):
    report = ClassificationReport(classes, labels=labels, target_names=names, **options)
    for part in np.array_split(np.arange(len(truth)), pieces):
        report.update(torch.tensor(predicted[part]), torch.tensor(truth[part]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"labels": labels, "target_names": names, **options}
        text = classification_report(truth, predicted, **settings)
        values = classification_report(truth, predicted, output_dict=True, **settings)
    assert report.compute() == text
    assert same(report.compute(output_dict=True), values)


def sample(seed, classes, count, skill=0.6):
    random = np.random.default_rng(seed)
    truth = random.integers(0, classes, count)
    return truth, np.where(random.random(count) < skill, truth, random.integers(0, classes, count))


CASES = list(itertools.product((2, 3, 7, 12), (1, 5, 40, 300), (0.0, 1.0, math.nan), (2, 4), (0.0, 0.5, 0.95)))


@pytest.mark.parametrize("group", range(12))
def test_288_reports_are_scikit_learns(group):
    assert len(CASES) == 288
    for index, (classes, count, zero_division, digits, skill) in enumerate(CASES):
        if index % 12 == group:
            compare(*sample(index, classes, count, skill), classes, zero_division=zero_division, digits=digits)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("zero_division", [0, 1, math.nan])
def test_a_choice_of_labels_in_any_order(seed, zero_division):
    truth, predicted = sample(seed, 6, 50)
    labels = np.random.default_rng(seed).permutation(8)[: 1 + seed % 8].tolist()  # 6 and 7 never occur
    compare(truth, predicted, 8, labels=labels, zero_division=zero_division)


def test_all_labels_given_show_accuracy_and_some_show_the_micro_average():
    truth, predicted = sample(1, 3, 50)
    compare(truth, predicted, 4, labels=[3, 2, 1, 0])
    compare(truth, predicted, 4, labels=[0, 1])


@pytest.mark.parametrize("classes", [9, 130, 300])
def test_many_classes_are_added_in_numpys_order(classes):
    compare(*sample(classes, classes, 5000), classes)


@pytest.mark.parametrize("zero_division", [0, 1, math.nan])
def test_degenerate_cases(zero_division):
    for truth, predicted in (([0, 0], [1, 1]), ([0, 1], [1, 0]), ([1, 1, 1], [1, 1, 1]), ([0], [0]), ([2, 2], [2, 0])):
        compare(np.array(truth), np.array(predicted), 3, pieces=1, zero_division=zero_division)


def test_names():
    truth, predicted = sample(3, 3, 40)
    compare(truth, predicted, 3, names=["a", "a much longer name than any heading", "c"])
    compare(truth, predicted, 3, labels=[2, 0], names=["two", "zero"])
    compare(truth, predicted, 3, digits=15)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40), st.integers(0, 6))
def test_any_counts(pairs, digits):
    truth, predicted = (np.array(column) for column in zip(*pairs, strict=True))
    compare(truth, predicted, 5, digits=digits, pieces=1 + len(pairs) % 3)


def test_a_full_list_of_names_leaves_absent_classes_out():
    # where scikit-learn refuses
    report = ClassificationReport(3, target_names=["a", "b", "c"])
    report.update(torch.tensor([0, 2, 2]), torch.tensor([0, 2, 0]))
    expected = classification_report([0, 2, 0], [0, 2, 2], labels=[0, 2], target_names=["a", "c"])
    assert report.compute() == expected


def test_scores_of_any_shape_and_ignored_labels():
    truth, _ = sample(5, 4, 24)
    scores = torch.randn(6, 4, 4)  # classes last
    targets = torch.tensor(truth).reshape(6, 4)
    targets[0, 0] = -100
    report = ClassificationReport(4)
    report.update(scores, targets)
    kept = targets.flatten() != -100
    assert report.compute() == classification_report(
        targets.flatten()[kept].numpy(), scores.argmax(-1).flatten()[kept].numpy(), zero_division=0
    )


def test_what_is_no_class_is_an_error_when_the_report_is_made():
    report = ClassificationReport(3)
    report.update(torch.tensor([0, 1, 2]), torch.tensor([0, 3, -1]))
    with pytest.raises(ValueError, match="All targets must be from 0 to 2 with `num_classes` 3, got 2 others"):
        report.compute()
    report.reset()
    report.update(torch.tensor([0, 9, 2]), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"All predictions must be from 0 to 2 .* got 1 others"):
        report.compute()


def test_nothing_counted_is_nothing_to_report():
    with pytest.raises(ValueError, match="There is nothing to report"):
        ClassificationReport(3).compute()


def test_wrong_arguments_are_refused_at_construction():
    with pytest.raises(ValueError, match="`num_classes` must be at least 2, got 1"):
        ClassificationReport(1)
    with pytest.raises(TypeError, match="`num_classes` must be a whole number"):
        ClassificationReport(2.5)
    for labels in ([], [0, 0], [3]):
        with pytest.raises(ValueError, match="`labels` must be distinct classes from 0 to 2, got"):
            ClassificationReport(3, labels=labels)
    with pytest.raises(ValueError, match="`target_names` must have one name for each of the 3 classes, got 2"):
        ClassificationReport(3, target_names=["a", "b"])
    with pytest.raises(ValueError, match="`target_names` must have one name for each of the 1 `labels`, got 2"):
        ClassificationReport(3, labels=[1], target_names=["a", "b"])
    with pytest.raises(TypeError, match="`target_names` must be a list of names"):
        ClassificationReport(3, target_names="abc")
    with pytest.raises(ValueError, match=r"`zero_division` must be 0, 1 or NaN, got 0\.5"):
        ClassificationReport(3, zero_division=0.5)
    with pytest.raises(ValueError, match=r"`path` must end in one of '.txt', '.json', '.csv', '.png', got 'r.html'"):
        ClassificationReport(3, path="r.html")
    with pytest.raises(TypeError, match=r"`path` must be a path, got 3\."):
        ClassificationReport(3, path=[3])


def expected_text(model, phase, epochs=1):
    seen = [part for part in model.seen if part[0] == phase]
    seen = seen[-len(seen) // epochs :]
    truth = np.concatenate([part[3] for part in seen])
    predicted = np.concatenate([part[2] for part in seen]).argmax(1)
    return classification_report(truth, predicted, zero_division=0), classification_report(
        truth, predicted, zero_division=0, output_dict=True
    )


def test_a_report_is_printed_and_saved_after_every_validation(package, capsys):
    report = ClassificationReport(8, path=["out/{epoch}/{phase}.json", "out/r.txt", "out/r.csv", "out/r.png"])
    _, model = fit([report], CLASSIFIERS[package]("dict"), package=package)
    text, values = expected_text(model, "validation", epochs=2)
    assert Path("out/r.txt").read_text() == text
    assert same(json.loads(Path("out/2/validation.json").read_text()), values)
    assert Path("out/1/validation.json").exists()
    printed = capsys.readouterr().out
    assert printed.count("weighted avg") == 2  # not after the sanity check
    assert text in printed
    with Path("out/r.csv").open(newline="") as handle:
        rows = {row["class"]: row for row in csv.DictReader(handle)}
    assert float(rows["macro avg"]["f1-score"]) == values["macro avg"]["f1-score"]
    assert rows["accuracy"]["precision"] == ""
    assert float(rows["accuracy"]["f1-score"]) == values["accuracy"]
    assert Path("out/r.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_changes_the_working_directory_keeps_its_files(tmp_path, monkeypatch):
    class Moves(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            monkeypatch.chdir(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    fit([ClassificationReport(8, path="report.txt"), Moves()], max_epochs=1)
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["report.txt"]
    assert (tmp_path / "report.txt").exists()


def test_a_test_has_a_file_of_its_own():
    report = ClassificationReport(8, path=["r.txt", "{phase}.json"])
    trainer = trainer_of(pl, [report])
    model = Classifier()
    trainer.test(model, loaders()[1], verbose=False)
    text, values = expected_text(model, "test")
    assert Path("r-test.txt").read_text() == text
    assert same(json.loads(Path("test.json").read_text()), values)
    assert not Path("r.txt").exists()
    assert not model._forward_hooks


class Keeps(pl.Callback):
    """Saves a file in the middle of the first epoch, weights alone at its end, and a whole one then."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (0, 1):
            trainer.save_checkpoint("middle.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint("weights.ckpt", weights_only=True)
            trainer.save_checkpoint("end.ckpt")


def test_the_epoch_is_that_of_the_weights():
    """After a fit of 2 epochs: the second, or that of a file; another Trainer has trained none."""
    train, validation = loaders()
    trainer, model = fit([ClassificationReport(8, path="{phase}/{epoch}.txt"), Keeps()])
    trainer.save_checkpoint("after.ckpt")
    bare = torch.load("weights.ckpt", weights_only=True)
    torch.save({name: value for name, value in bare.items() if name != "loops"}, "without_loops.ckpt")

    def epochs(run, module, **arguments):
        for phase, evaluate in (("validation", run.validate), ("test", run.test)):
            shutil.rmtree(phase, ignore_errors=True)
            evaluate(module, validation, verbose=False, **arguments)
        found = {path.stem for phase in ("validation", "test") for path in Path(phase).glob("*.txt")}
        return found.pop() if len(found) == 1 else found

    assert epochs(trainer, model) == "2"
    assert epochs(trainer, Classifier()) == "0"
    fresh = trainer_of(pl, [ClassificationReport(8, path="{phase}/{epoch}.txt")])
    assert epochs(fresh, Classifier()) == "0"
    for run in (trainer, fresh):
        for path in ("middle.ckpt", "weights.ckpt", "end.ckpt", "without_loops.ckpt"):
            assert epochs(run, Classifier(), ckpt_path=path) == "1"
        assert epochs(run, model, ckpt_path="after.ckpt") == "2"
    # what a file said of one evaluation is not said of the next
    assert epochs(trainer, model) == "2"
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, train, validation)
    assert Path("validation/3.txt").exists()
    assert epochs(trainer, model) == "3"


def test_a_report_can_be_copied_after_a_run():
    report = ClassificationReport(8)
    fit([report], max_epochs=1)
    assert copy.deepcopy(report).num_classes == pickle.loads(pickle.dumps(report)).num_classes == 8


def test_predictions_and_targets_can_be_named():
    class Named(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            return {"guess": self.layer(batch[0]).argmax(1), "truth": batch[1]}

    report = ClassificationReport(8, predictions="guess", targets="truth", path="r.txt")
    _, model = fit([report], Named, max_epochs=1)
    assert Path("r.txt").read_text() == expected_text(model, "validation")[0]


def test_the_hook_is_gone_after_an_exception():
    class Dying(Classifier):
        def training_step(self, batch, batch_idx):
            raise KeyError("out of luck")

    model = Dying()
    with pytest.raises(KeyError, match="out of luck"):
        fit([ClassificationReport(8)], model)
    assert not model._forward_hooks


def test_an_update_does_not_wait_for_the_device(monkeypatch):
    report = ClassificationReport(8)
    logits, targets = torch.randn(16, 8), dataset(16).tensors[1]
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *args, **kwargs: pytest.fail("read from the device"))
    report.update(logits, targets)
    monkeypatch.undo()
    assert int(report._counts.totals().true.sum()) == 16


def test_classes_of_one_name_have_a_row_each_in_the_csv():
    names = ["a, b", "a, b", "c"]
    report = ClassificationReport(3, target_names=names)
    report.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
    made = report._report(report._counts.vector).csv()
    rows = list(csv.reader(made.splitlines()))[1:]
    assert [row[0] for row in rows] == [*names, "accuracy", "macro avg", "weighted avg"]
    wanted = np.stack(precision_recall_fscore_support([0, 1, 1, 2], [0, 1, 2, 2], zero_division=0), 1)
    assert [[float(cell) for cell in row[1:]] for row in rows[:3]] == wanted.tolist()
    assert rows[3][1:] == ["", "", "0.75", "4"]


def test_an_output_without_the_letters_of_a_name_costs_no_run(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    report = ClassificationReport(8, target_names=[f"\u03bb{n}" for n in range(8)])
    fit([report], max_epochs=1)
    output.seek(0)
    assert "\\u03bb" in output.read()
