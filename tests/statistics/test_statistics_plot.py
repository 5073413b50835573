"""Curves read from every layout, and pictures that can be opened."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lightning_plugins import CSVStatisticsLogger, StatisticsRecorder
from lightning_plugins.statistics.plot import plot_log, read_curves
from tests.support.statistics_runs import fit, read


def logged(**options):
    fit([StatisticsRecorder(["accuracy"]), CSVStatisticsLogger("log.csv", **options)], max_epochs=3)
    return read_curves("log.csv")


def test_rows_of_batches_become_a_line_and_validations_points():
    curves = logged()
    rows = read("log.csv")
    assert curves.axis == "optimizer step"
    assert list(curves.lines) == ["loss", "accuracy"]
    training = [row for row in rows if row["phase"] == "train"]
    assert curves.lines["loss"]["train"] == (
        [float(row["step"]) for row in training],
        [float(row["loss"]) for row in training],
    )
    ends = [row for row in rows if (row["phase"], row["batch"]) == ("validation", "2")]
    assert curves.lines["accuracy"]["validation"] == ([3.0, 6.0, 9.0], [float(row["accuracy"]) for row in ends])
    assert curves.rates == ([float(n) for n in range(1, 10)], [0.1] * 9)


def test_s4tfs_layout_tells_phases_by_their_batches():
    numbers = logged()
    s4tf = logged(layout="s4tf")
    assert s4tf.axis == "training batch"
    assert s4tf.rates == ([], [])
    for phase in ("train", "validation"):
        xs, ys = s4tf.lines["loss"][phase]
        assert xs == numbers.lines["loss"][phase][0]
        assert ys == pytest.approx(numbers.lines["loss"][phase][1], rel=1e-6)


def test_rows_of_epochs():
    curves = logged(every="epoch")
    assert curves.axis == "epoch"
    assert curves.lines["loss"]["validation"][0] == [1.0, 2.0, 3.0]
    assert curves.lines["accuracy"]["train"][1] == [float(row["train_accuracy"]) for row in read("log.csv")]
    assert curves.rates[1] == [0.1] * 3


@pytest.mark.parametrize("options", [{}, {"layout": "s4tf"}, {"every": "epoch"}], ids=["batches", "s4tf", "epochs"])
def test_the_picture_has_ink(options):
    logged(**options)
    path = plot_log("log.csv")
    assert path == Path("log.png")
    assert 0.01 < np.mean(imread(path)[..., :3].min(axis=2) < 0.9) < 0.5
    assert plot_log("log.csv", "deep/curves.svg").read_text().startswith("<?xml")


def test_blank_cells_and_infinite_ones_are_no_obstacle():
    Path("log.csv").write_text(
        "epoch,batch,phase,step,lr,loss\n1,1,train,1,0.1,inf\n1,2,train,2,,\n1,3,train,3,0.1,nan\n"
    )
    assert plot_log("log.csv").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows to plot"),
        ("epoch,batch,loss\n", "has no rows to plot"),
        ("a,b\n1,2\n", "must have the columns 'epoch' and 'batch'"),
        ("epoch,batch,time\n1,2,3\n", "has no statistics to plot"),
        ("epoch,batch,loss\n1,2,high\n", "'log.csv' has a cell that is no number: .*'high'"),
        ("epoch,batch,loss\none,2,3\none,3,3\n", "'log.csv' has a cell that is no number: .*'one'"),
    ],
)
def test_what_cannot_be_plotted_is_one_readable_line(content, message):
    Path("log.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        plot_log("log.csv")


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        plot_log("nowhere.csv")
