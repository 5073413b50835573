"""States of a checkpoint are checked like arguments, value by value."""

import copy
import math

import pytest
import torch
import torchmetrics

from lightning_plugins import CSVStatisticsLogger, StatisticsRecorder, TensorBoardStatisticsLogger
from lightning_plugins.core.lightning import MisconfigurationException
from tests.support.statistics_runs import fit, read

REFUSED = (ValueError, TypeError, MisconfigurationException)
EVIL_TEXTS = ["1\n2,2,train", "1\r2", "1,2", "a\x00b", "\x1b[2J", "=cmd()", "x" * 10**6, '"', "1 2"]
EVIL = [None, True, -1, 1.5, math.nan, math.inf, 10**400, "1", b"1", [], {}, [[]], object(), torch.ones(3)]


def states():
    """Return name -> (a callback, its state in the middle of a run)."""
    made = {}
    metric = torchmetrics.classification.MulticlassAccuracy(8)
    makers = {
        "recorder": lambda: StatisticsRecorder(["accuracy", "matthews_correlation_coefficient", metric]),
        "csv": lambda: CSVStatisticsLogger("log.csv"),
        "epochs": lambda: CSVStatisticsLogger("epochs.csv", every="epoch"),
        "tensorboard": lambda: TensorBoardStatisticsLogger("tb"),
    }
    callbacks = {name: make() for name, make in makers.items()}
    fit(list(callbacks.values()), max_epochs=1)
    for name, callback in callbacks.items():
        made[name] = makers[name], copy.deepcopy(callback.state_dict())
    alone = CSVStatisticsLogger("alone.csv")
    fit([alone], max_epochs=1)
    made["alone"] = lambda: CSVStatisticsLogger("alone.csv"), copy.deepcopy(alone.state_dict())
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return states()


def places(state, path=()):
    """Yield the path of every value in a nest."""
    if isinstance(state, dict):
        for name in state:
            yield (*path, name)
            yield from places(state[name], (*path, name))
    elif isinstance(state, (list, tuple)):
        for index in range(len(state)):
            yield (*path, index)
            yield from places(state[index], (*path, index))


def with_value(state, path, value):
    changed = copy.deepcopy(state)
    inner = changed
    for step in path[:-1]:
        if isinstance(inner[step], tuple):
            inner[step] = list(inner[step])
        inner = inner[step]
    inner[path[-1]] = value
    return changed


def test_counts_leave_room_for_the_rest_of_a_run(saved):
    make, state = saved["recorder"]
    for path in (("samples",), ("train", "batches")):
        make().load_state_dict(with_value(state, path, 2**62))
        with pytest.raises(ValueError, match=f"`{path[-1]}` must be at most 4611686018427387904, got"):
            make().load_state_dict(with_value(state, path, 2**62 + 1))


@pytest.mark.parametrize("name", ["recorder", "csv", "epochs", "tensorboard", "alone"])
def test_a_state_with_one_wrong_value_is_refused_or_does_no_harm(saved, name):
    make, state = saved[name]
    make().load_state_dict(copy.deepcopy(state))  # as it is, it loads
    messages = []
    for path in places(state):
        for value in (*EVIL, *EVIL_TEXTS):
            changed = with_value(state, path, value)
            callback = make()
            try:
                callback.load_state_dict(changed)
                if name == "recorder":
                    callback.recording.restore(callback.state_dict(), torch.device("cpu"), chief=True)
            except REFUSED as error:
                messages.append(str(error))
    assert len(messages) > 20
    assert [message for message in messages if not message.isprintable() or len(message) > 2000] == []


@pytest.mark.parametrize("text", EVIL_TEXTS)
def test_no_text_of_a_state_forges_a_row(saved, text):
    make, state = saved["epochs"]
    pending = {"epoch": "1", "batch": "3", "train_loss": "0.5"}
    make().load_state_dict({**state, "pending": pending})
    for forged in ({**pending, "train_loss": text}, {**pending, f"x{text}": "1"} if "\n" in text else {"epoch": text}):
        with pytest.raises(REFUSED):
            make().load_state_dict({**state, "pending": forged})
    with pytest.raises(REFUSED):
        make().load_state_dict({**state, "last": ["1", text, "train"], "rows": 3})


def test_parts_that_do_not_fit_each_other_are_refused(saved):
    make, state = saved["recorder"]
    train = state["train"]
    for wrong in (
        {**train, "sums": train["sums"][:-1]},
        {**train, "layout": [["labels", 10**12]]},
        {**train, "layout": [["a b", 1]] * 2},
        {**train, "reading": "x\ny"},
    ):
        with pytest.raises(REFUSED):
            make().load_state_dict({**state, "train": wrong})
    metrics = copy.deepcopy(train["metrics"])
    (name,) = metrics
    for states in ({"update": torch.ones(1)}, {**metrics[name]["states"], "tp": torch.ones(3)}, {"tp": "x"}, None):
        wrong = {**train, "metrics": {name: {"updates": 1, "states": states}}}
        recorder = make()
        recorder.load_state_dict({**state, "train": wrong})
        with pytest.raises(REFUSED, match="The saved state of the metric 'multiclass_accuracy' must"):
            recorder.recording.restore(recorder.state_dict(), torch.device("cpu"), chief=True)
        assert callable(recorder.recording._sums["train"]._metrics[name].update)


def test_a_run_cannot_be_moved_by_a_state(saved):
    make, state = saved["tensorboard"]
    moment = state["stamp"]
    assert make().load_state_dict({**state, "stamp": f"{moment}-1"}) is None
    for stamp in (
        "../up",
        "/root",
        "a/../../b",
        "x\ny",
        ".",
        "a" * 500,
        "a/b",
        f"{moment}/a",
        f"a/{moment}",
        f"{moment}\n",
    ):
        with pytest.raises(MisconfigurationException, match="`stamp` of TensorBoardStatisticsLogger must be the name"):
            make().load_state_dict({**state, "stamp": stamp})


def test_counts_of_a_torchmetrics_object_go_on_after_a_resume(tmp_path):
    metric = torchmetrics.classification.MulticlassAccuracy(8, average="micro")
    recorder = StatisticsRecorder([metric])
    fit([recorder], max_epochs=1)
    state = recorder.state_dict()
    assert state["train"]["metrics"]["multiclass_accuracy"]["updates"] == 3
    again = StatisticsRecorder([metric])
    again.recording.restore(state, torch.device("cpu"), chief=True)
    assert again.state_dict()["train"]["metrics"]["multiclass_accuracy"]["updates"] == 3


def test_a_resumed_log_with_chosen_columns_continues_in_its_file(tmp_path):
    columns = ["loss", "time"]
    trainer, _ = fit([CSVStatisticsLogger("log.csv", columns=columns)], max_epochs=1)
    trainer.save_checkpoint("end.ckpt")
    fit([CSVStatisticsLogger("log.csv", columns=columns)], ckpt_path="end.ckpt", max_epochs=2)
    assert [path.name for path in sorted(tmp_path.glob("*.csv"))] == ["log.csv"]
    assert [row["epoch"] for row in read("log.csv")] == ["1"] * 5 + ["2"] * 5
