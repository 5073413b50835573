"""Curves read from every layout, and pictures that can be opened."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.metrics import confusion_matrix

from lightning_plugins import ClassificationReport, CSVStatisticsLogger, StatisticsRecorder
from lightning_plugins.statistics import plot
from lightning_plugins.statistics.plot import plot_confusion_matrix, plot_log, read_curves
from tests.support.statistics_runs import fit, read


def logged(**options):
    fit([StatisticsRecorder(["accuracy"]), CSVStatisticsLogger("log.csv", **options)], max_epochs=3)
    return read_curves("log.csv")


def test_rows_of_batches_become_a_line_and_validations_points():
    curves = logged()
    rows = read("log.csv")
    assert curves.axis == "optimizer step"
    assert list(curves.lines) == ["loss", "accuracy"]
    assert curves.lines["loss"]["each batch"][1] == [float(row["loss_step"]) for row in rows if row["phase"] == "train"]
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


def test_two_columns_never_are_one_line():
    """A module that logs `train_loss` beside the running mean, and several loaders."""
    Path("log.csv").write_text(
        "epoch,batch,phase,step,lr,loss,loss_step,train_loss,val_loss,loss/dataloader_idx_0\n"
        "1,1,train,1,0.1,4.0,4.0,4.5,,\n"
        "1,2,train,2,0.1,3.0,2.0,2.5,,\n"
        "1,1,validation,2,,3.5,3.5,,3.25,3.75\n"
    )
    curves = read_curves("log.csv")
    assert curves.lines == {
        "loss": {
            "train": ([1.0, 2.0], [4.0, 3.0]),
            "each batch": ([1.0, 2.0], [4.0, 2.0]),
            "train_loss": ([1.0, 2.0], [4.5, 2.5]),
            "validation": ([2.0], [3.5]),
            "val_loss": ([2.0], [3.25]),
            "validation, loader 0": ([2.0], [3.75]),
        }
    }


def small(path, loss=2.0, name="loss"):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"epoch,batch,phase,step,lr,{name}\n1,1,train,1,0.1,{loss}\n1,2,train,2,0.1,{loss / 2}\n")
    return path


def drawn(monkeypatch):
    """Return a list of the figures that are drawn."""
    figures = []
    original = plot._drawn
    monkeypatch.setattr(
        plot, "_drawn", lambda *args, **options: figures.append(original(*args, **options)) or figures[-1]
    )
    return figures


def test_several_runs_are_on_one_picture_with_a_legend(monkeypatch):
    figures = drawn(monkeypatch)
    first, second = small("runs/small/log.csv"), small("runs/large/log.csv", 4.0)
    small("runs/large/log.1.csv")
    small("runs/large/log.replaced.1.csv")
    Path("runs/large/report.csv").write_text("class,precision\n")
    for given in ([first, second], ["runs"], ["runs/small", "runs/large"]):
        path = plot_log(given, "curves.png")
        axis = figures[-1].axes[0]
        assert sorted(text.get_text() for text in axis.get_legend().get_texts()) == ["large: train", "small: train"]
        assert sorted(line.get_ydata()[0] for line in axis.get_lines()) == [2.0, 4.0]
        assert "large" in figures[-1].get_suptitle()
        assert 0.01 < np.mean(imread(path)[..., :3].min(axis=2) < 0.9) < 0.5
    plot_log(first, "curves.png")
    assert figures[-1].get_suptitle() == "small"
    # of more than three the title has the number
    three = [first, second, small("runs/wide/log.csv")]
    for given, title in ((three, "small, large, wide"), ([*three, small("runs/deep/log.csv")], "4 runs")):
        plot_log(given, "curves.png")
        assert figures[-1].get_suptitle() == title
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="no log of CSVStatisticsLogger in the folder 'empty'"):
        plot_log("empty")


def test_axes_are_logarithmic_on_request_where_they_can_be(monkeypatch):
    figures = drawn(monkeypatch)
    plot_log(small("log.csv"), log=True)
    assert [axis.get_yscale() for axis in figures[-1].axes] == ["log", "linear"]
    plot_log(small("log.csv", 0.0), log=True)
    plot_log(small("log.csv"))
    assert [figure.axes[0].get_yscale() for figure in figures[1:]] == ["linear", "linear"]


def test_the_loss_of_each_batch_is_drawn_thinner_and_paler_than_the_running_mean(monkeypatch):
    figures = drawn(monkeypatch)
    Path("log.csv").write_text("epoch,batch,phase,loss,loss_step\n1,1,train,4.0,4.0\n1,2,train,3.0,2.0\n")
    plot_log("log.csv")
    lines = {line.get_label(): line for line in figures[0].axes[0].get_lines()}
    assert 0 < lines["each batch"].get_linewidth() < lines["train"].get_linewidth()
    assert 0 < lines["each batch"].get_alpha() < lines["train"].get_alpha() == 1


def test_a_confusion_matrix_is_colored_by_the_shares_of_each_label(monkeypatch):
    figures, original = [], plot._figure
    monkeypatch.setattr(plot, "_figure", lambda *size: figures.append(original(*size)) or figures[-1])
    # no label is class 3, and a prediction is
    truth, predicted = np.array([0, 1, 1, 1, 2, 2, 2]), np.array([0, 1, 2, 2, 2, 2, 3])
    report = ClassificationReport(4, target_names=["cat", "dog", "cow", "hen"], path="r.png")
    report.update(torch.tensor(predicted), torch.tensor(truth))
    plot_confusion_matrix(report._report(report._counts.vector), Path("r.png"))
    axis = figures[0].axes[0]
    (image,) = axis.get_images()
    assert image.get_clim() == (0, 1)
    assert np.allclose(image.get_array(), confusion_matrix(truth, predicted, normalize="true"))
    assert [(text.get_position(), text.get_text(), text.get_color()) for text in axis.texts] == [
        ((column, row), str(count), "white" if share > 0.5 else "black")
        for row, (counts, shares) in enumerate(
            zip(
                confusion_matrix(truth, predicted),
                confusion_matrix(truth, predicted, normalize="true"),
                strict=True,
            )
        )
        for column, (count, share) in enumerate(zip(counts, shares, strict=True))
    ]
    for axes in (axis.xaxis, axis.yaxis):
        assert [label.get_text() for label in axes.get_ticklabels()] == ["cat", "dog", "cow", "hen"]
        assert list(axes.get_ticklocs()) == [0, 1, 2, 3]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("prediction", "label")


def test_a_picture_without_a_suffix_is_a_png():
    assert plot_log(small("log.csv"), "curves").read_bytes().startswith(b"\x89PNG")


def test_the_default_picture_takes_no_file_and_no_picture_takes_the_log():
    log = small("log.csv")
    assert [plot_log(log).name for _ in range(3)] == ["log.png", "log.1.png", "log.2.png"]
    before = log.read_text()
    for output in ("log.csv", "../" + Path.cwd().name + "/log.csv"):
        with pytest.raises(ValueError, match="`output` must be another file than the log"):
            plot_log(log, output)
    assert log.read_text() == before
    with pytest.raises(ValueError, match=r"(?i)format"):
        plot_log(log, "curves.nothing")
    assert not Path("curves.nothing").exists()


@pytest.mark.parametrize("name", [r"$\\frac{1}{", "a$b$c$", "$" * 999, "\x1b[2J"])
def test_a_name_is_shown_as_it_is_and_never_drawn_as_a_formula(name):
    assert plot_log(small("log.csv", name=name)).exists()


def test_more_than_a_picture_can_show_is_one_readable_line():
    rows = "".join(f"1,{n},phase {n},{n},0.1,1.0\n" for n in range(1, 20_001))
    Path("log.csv").write_text(f"epoch,batch,phase,step,lr,loss\n{rows}")
    with pytest.raises(ValueError, match=r"'log\.csv' has more than 40 statistics or lines of one, which do not fit"):
        plot_log("log.csv")


def test_a_pipe_is_not_waited_for():
    os.mkfifo("log.csv")
    with pytest.raises(OSError, match=r"log\.csv is a device or a pipe"):
        plot_log("log.csv")
    with pytest.raises(ValueError, match="no log of CSVStatisticsLogger"):
        plot_log(".")


def test_a_log_that_a_spreadsheet_has_saved_is_read_alike():
    curves, path = logged(), Path("log.csv")
    path.write_text(path.read_text().replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    assert read_curves(path).lines == curves.lines
    assert plot_log(".", "curves.png").exists()
