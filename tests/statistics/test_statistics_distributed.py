"""Two processes: what is written is what one process that saw everything would have written."""

import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from sklearn.metrics import classification_report
from torch.distributed.fsdp import fully_shard

from lightning_plugins import (
    ClassificationReport,
    CSVStatisticsLogger,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
)
from lightning_plugins.statistics import rows
from tests.support.statistics_ranks import run_ranks
from tests.support.statistics_runs import Classifier, fit, loaders, read, without_time

pytestmark = pytest.mark.slow


class Sharded(Classifier):
    def configure_model(self):
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        # Lightning cannot load an optimizer without any state under this strategy
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Local(LightningEnvironment):
    """Both processes are there already."""

    @property
    def creates_processes_externally(self):
        return True


def strategies(kind):
    if kind == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            process_group_backend="gloo",
            save_distributed_checkpoint=False,
        ), [Local()]
    return DDPStrategy(process_group_backend="gloo", cluster_environment=Local()), []


def train(rank, kind="ddp", *, callbacks, model=None, **options):
    torch.set_num_threads(1)
    strategy, plugins = strategies(kind)
    settings = {"strategy": strategy, "plugins": plugins, "devices": 2, "data": loaders(batch_size=8), **options}
    return fit(callbacks, model or (Sharded if kind == "fsdp2" else Classifier), **settings)


def seen_by_all(folder):
    """Return [(phase, [(loss, logits, targets) of each rank])] for every batch."""
    both = [torch.load(folder / f"seen{rank}.pt", weights_only=False) for rank in (0, 1)]
    return [(one[0], [one[1:], other[1:]]) for one, other in zip(*both, strict=True)]


def expected_values(folder):
    """Return phase and values for every batch, by NumPy, over both ranks."""
    rows, running, begun = [], [], None
    for phase, parts in seen_by_all(folder):
        if phase != begun:
            begun, running = phase, []
        running += parts
        scores = np.concatenate([part[1] for part in running])
        labels = np.concatenate([part[2] for part in running])
        loss = np.mean([part[0] for part in running], dtype=np.float64)
        rows.append((phase, {"loss": loss, "accuracy": (scores.argmax(1) == labels).mean()}))
    return rows


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_every_row_is_the_sum_over_the_ranks(tmp_path, kind):
    def work(rank):
        metric = torchmetrics.classification.MulticlassAccuracy(8, average="micro")
        recorder = StatisticsRecorder(["accuracy", metric])
        logger = TensorBoardStatisticsLogger(tmp_path / "tb")
        report = ClassificationReport(8, path=tmp_path / "report.txt")
        # loggers before and after the recorder: every rank must still add up at the same moments
        callbacks = [CSVStatisticsLogger(tmp_path / "log.csv", flush_seconds=0.0005), recorder, logger, report]
        trainer, model = train(rank, kind, callbacks=callbacks)
        torch.save(model.seen, tmp_path / f"seen{rank}.pt")
        torch.save(
            {name: float(value) for name, value in trainer.callback_metrics.items()}, tmp_path / f"published{rank}.pt"
        )
        (tmp_path / f"stamp{rank}").write_text(str(logger.run_directory))

    run_ranks(work)
    written, expected = read(tmp_path / "log.csv"), expected_values(tmp_path)
    assert len(written) == len(expected) == 2 * (3 + 2)
    for row, (phase, values) in zip(written, expected, strict=True):
        assert row["phase"] == phase
        assert {name: float(row[name]) for name in values} == pytest.approx(values, rel=1e-6)
        assert float(row["multiclass_accuracy"]) == pytest.approx(values["accuracy"])
    published = [torch.load(tmp_path / f"published{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert published[0] == published[1]
    assert published[0]["val_loss"] == pytest.approx(expected[-1][1]["loss"])
    assert published[0]["train_accuracy"] == pytest.approx(expected[-3][1]["accuracy"])
    assert (tmp_path / "stamp0").read_text() == (tmp_path / "stamp1").read_text()
    assert len(list((tmp_path / "tb").iterdir())) == 1
    _check_report(tmp_path)


def _check_report(folder):
    last = [parts for phase, parts in seen_by_all(folder) if phase == "validation"][-2:]
    scores = np.concatenate([part[1] for parts in last for part in parts])
    labels = np.concatenate([part[2] for parts in last for part in parts])
    assert (folder / "report.txt").read_text() == classification_report(labels, scores.argmax(1), zero_division=0)


def test_samples_are_those_of_all_ranks_also_in_a_second_fit(tmp_path):
    """One rank takes up what all have seen, the others nothing: also after a fit that stopped in mid-epoch."""

    def work(rank):
        logger = TensorBoardStatisticsLogger(tmp_path / "tb", axis="samples")
        recorder = StatisticsRecorder(["accuracy"])
        train(rank, callbacks=[recorder, logger], max_epochs=1)
        places = [logger.state_dict()["last"]["validation"]]
        train(rank, callbacks=[recorder, logger], max_epochs=1, max_steps=2)
        places.append(recorder.state_dict()["samples"])
        labels = recorder.state_dict()["train"]["sums"][1]
        train(rank, callbacks=[recorder, logger], max_epochs=1)
        places.append(logger.state_dict()["last"]["validation"])
        (tmp_path / f"last{rank}").write_text(f"{places} {labels}")

    run_ranks(work)
    # 40 samples an epoch, 2 x 8 in two steps of each rank
    assert (tmp_path / "last0").read_text() == "[40, 72, 112] 32.0"


def test_ranks_with_different_clocks_still_add_up_at_the_same_moments(tmp_path):
    def work(rank):
        clock = SimpleNamespace(monotonic=lambda: (1 + 10 * rank) * time.monotonic())
        rows.time = clock  # the ranks disagree about when rows are due
        callbacks = [CSVStatisticsLogger(tmp_path / "log.csv", flush_seconds=0.05), StatisticsRecorder(["accuracy"])]
        _, model = train(rank, callbacks=callbacks, data=loaders(320, batch_size=4), max_epochs=1)
        torch.save(model.seen, tmp_path / f"seen{rank}.pt")

    run_ranks(work, seconds=60)
    written, expected = read(tmp_path / "log.csv"), expected_values(tmp_path)
    losses = [values["loss"] for _, values in expected]
    assert [float(row["loss"]) for row in written] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_run_resumed_in_mid_epoch_leaves_what_an_uninterrupted_one_leaves(tmp_path, kind):
    metric = torchmetrics.classification.MulticlassF1Score(8)

    def callbacks(folder):
        return [
            StatisticsRecorder(["accuracy", metric]),
            CSVStatisticsLogger(folder / "log.csv"),
            ModelCheckpoint(folder / "c", every_n_train_steps=2, save_top_k=-1, filename="{step}"),
        ]

    def whole(rank):
        train(rank, kind, callbacks=callbacks(tmp_path / "whole"), enable_checkpointing=True, data=_resumable(rank))

    def first(rank):
        train(
            rank,
            kind,
            callbacks=callbacks(tmp_path / "broken"),
            enable_checkpointing=True,
            max_steps=3,
            data=_resumable(rank),
        )

    def second(rank):
        train(
            rank,
            kind,
            callbacks=callbacks(tmp_path / "broken"),
            enable_checkpointing=True,
            data=_resumable(rank),
            ckpt_path=tmp_path / "broken" / "c" / "step=2.ckpt",
        )

    for part in (whole, first, second):
        run_ranks(part)
    assert without_time(tmp_path / "broken" / "log.csv") == without_time(tmp_path / "whole" / "log.csv")
    assert len(read(tmp_path / "whole" / "log.csv")) == 10
    assert len(list((tmp_path / "broken").glob("log.replaced.*"))) == 1


def _resumable(rank):
    from tests.support.statistics_runs import ResumableLoader

    train_loader, validation = loaders(batch_size=8)
    batches = list(train_loader)[:4]
    mine = ResumableLoader([])
    mine.batches = [*batches[rank::2], [part[rank::2] for part in list(train_loader)[4]]]
    return mine, validation


def test_an_exception_on_one_rank_hangs_nobody(tmp_path):
    class Dying(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise KeyError("out of luck")
            return super().training_step(batch, batch_idx)

    def work(rank):
        callbacks = [CSVStatisticsLogger(tmp_path / "log.csv", flush_seconds=1000), StatisticsRecorder(["accuracy"])]
        with pytest.raises(KeyError, match="out of luck"):
            train(rank, callbacks=callbacks, model=Dying, num_sanity_val_steps=0)

    run_ranks(work)
    rows = read(tmp_path / "log.csv")
    assert [row["batch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(row["loss"])) for row in rows)


def test_a_second_fit_after_a_distributed_one_goes_on(tmp_path):
    def work(rank):
        callbacks = [CSVStatisticsLogger(tmp_path / "log.csv"), StatisticsRecorder(["accuracy"])]
        for _ in range(2):
            train(rank, callbacks=callbacks, max_epochs=1)

    run_ranks(work)
    rows = read(tmp_path / "log.csv")
    assert len(rows) == 10
    assert without_time(tmp_path / "log.csv")[1:6] == without_time(tmp_path / "log.csv")[6:]


def test_only_rank_0_writes(tmp_path):
    def work(rank):
        folder = tmp_path / str(rank)
        train(
            rank,
            callbacks=[
                CSVStatisticsLogger(folder / "log.csv"),
                TensorBoardStatisticsLogger(folder / "tb"),
                ClassificationReport(8, path=folder / "report.txt"),
            ],
            max_epochs=1,
        )

    run_ranks(work)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["0"]
