"""All techniques in one Trainer: any order of the callbacks gives the same run, under either name of Lightning."""

import csv

import lightning.pytorch as unified
import pytest
import torch

from lightning_plugins import (
    EMA,
    CancelBatch,
    Cosine,
    CSVStatisticsLogger,
    Event,
    GradientAccumulation,
    LatestWeightAveraging,
    LearningRateScheduler,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    WarmupCosine,
    on_events,
)
from tests.support.training import loader, make_module, make_trainer, rates

ORDERS = [
    (0, 1, 2, 3, 4, 5, 6, 7, 8),
    (8, 7, 6, 5, 4, 3, 2, 1, 0),
    (3, 0, 8, 5, 1, 7, 6, 4, 2),
    (2, 4, 0, 6, 7, 3, 8, 5, 1),
]
CANCELLED = 5  # the batch of every epoch that a function of events cancels


@on_events(Event.BATCH_START)
def cancel_one(loop, event):
    if loop.batch_index == CANCELLED:
        raise CancelBatch


def stack(path):
    return [
        GradientAccumulation(4),
        LearningRateScheduler({0: WarmupCosine("20%")}),
        EMA(Cosine(None, 0.8, 1.0)),
        StatisticsRecorder(),
        CSVStatisticsLogger(str(path / "log.csv")),
        TensorBoardStatisticsLogger(str(path / "tensorboard")),
        cancel_one,
        LatestWeightAveraging(2, every="25%", evaluate="raw", checkpoint="raw", after_fit="raw"),
        LearningRateScheduler(Cosine(None, 1, 0.5), parameter="momentum", record=True),
    ]


def fit(path, order=ORDERS[0], namespace=unified, epochs=3, **options):
    """Run; return the module's raw and averaged weights, the rates and the rows without the clock."""
    path.mkdir(exist_ok=True)
    callbacks = stack(path)
    module = make_module(namespace, momentum=0.9)
    module.load_state_dict({"layer.weight": torch.ones(2, 4), "layer.bias": torch.zeros(2)})
    module.validation_step = lambda batch, batch_idx: module.layer(batch).pow(2).mean()
    trainer = make_trainer(path, namespace, callbacks=[callbacks[index] for index in order], max_epochs=epochs)
    trainer.fit(module, loader(10), loader(4), **options)
    with (path / "log.csv").open() as file:
        rows = [{name: value for name, value in row.items() if name != "time"} for row in csv.DictReader(file)]
    average = callbacks[2]
    latest = {f"latest {name}": value for name, value in callbacks[7].average_state_dict().items()}
    return average.raw_state_dict(), {**average.average_state_dict(), **latest}, rates(module), rows, trainer


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left) and left.keys() == right.keys()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("order", ORDERS[1:], ids=str)
def test_any_order_gives_the_same_run(tmp_path, reference, order):
    raw, average, used, rows, _ = fit(tmp_path, order)
    assert same(raw, reference[0])
    assert same(average, reference[1])
    assert used == reference[2]
    assert rows == reference[3]


def test_the_other_name_of_lightning_gives_the_same_run(tmp_path, reference):
    import pytorch_lightning

    raw, average, used, rows, _ = fit(tmp_path, namespace=pytorch_lightning)
    assert same(raw, reference[0])
    assert same(average, reference[1])
    assert (used, rows) == (reference[2], reference[3])


def test_the_run_is_the_one_that_was_asked_for(reference):
    raw, average, used, rows, trainer = reference
    # 10 batches in windows of 4 are 3 steps an epoch, the last of 2 batches
    assert trainer.global_step == 9
    schedule = WarmupCosine(2, total=9)
    assert used == pytest.approx([0.1 * schedule(step) for step in range(9)])
    assert [row["phase"] for row in rows] == (["train"] * 9 + ["validation"] * 4) * 3
    assert str(CANCELLED + 1) not in {row["batch"] for row in rows if row["phase"] == "train"}
    assert not any(torch.equal(value, raw[name.removeprefix("latest ")]) for name, value in average.items())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the one that saved is not there
@pytest.mark.parametrize("order", [ORDERS[1], ORDERS[3]], ids=str)
def test_a_run_that_died_and_is_resumed_in_another_order_is_the_uninterrupted_one(tmp_path, reference, order):
    class Die(unified.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("killed")

    path = tmp_path / "run"
    path.mkdir()
    module = make_module(momentum=0.9)
    module.load_state_dict({"layer.weight": torch.ones(2, 4), "layer.bias": torch.zeros(2)})
    module.validation_step = lambda batch, batch_idx: module.layer(batch).pow(2).mean()
    saving = unified.callbacks.ModelCheckpoint(path, "epoch-{epoch}", save_top_k=-1)
    trainer = make_trainer(path, callbacks=[*stack(path), saving, Die()], max_epochs=3, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(module, loader(10), loader(4))
    raw, average, used, rows, _ = fit(path, order, ckpt_path=path / "epoch-epoch=1.ckpt")
    assert same(raw, reference[0])
    assert same(average, reference[1])
    assert used == reference[2][6:]
    assert rows == reference[3]
