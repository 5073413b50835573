"""Comparing and refreshing leave no trace: no callback, no logger, no state hears of them."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from lightning_plugins import CheckpointAveraging
from lightning_plugins.checkpoints.isolated_validation import SilentLogger, isolated
from tests.support.checkpoints_models import NAMESPACES, loader, module_class, trainer


def listening_classes(namespace):
    class Listener(namespace.Callback):
        """Writes down every hook that it hears."""

        def __init__(self):
            self.heard = []

        def __getattribute__(self, name):
            if name.startswith("on_") or name in ("setup", "teardown"):
                object.__getattribute__(self, "heard").append(name)
            return object.__getattribute__(self, name)

    class Book(namespace.loggers.logger.Logger):
        def __init__(self):
            super().__init__()
            self.rows = []

        name, version = "book", 0

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, dict(metrics)))

        def log_hyperparams(self, *args, **kwargs):
            pass

    return Listener, Book


def metered(namespace):
    class Metered(module_class(namespace)):
        """Has what a run can disturb: metrics, batch normalization, dropout, a logger that is used directly."""

        def __init__(self, **more):
            super().__init__(batch_norm=True, **more)
            self.dropout = nn.Dropout(0.5)
            self.gathered = torchmetrics.MeanMetric()
            self.held = torchmetrics.MeanMetric()

        def forward(self, inputs):
            return self.net(self.dropout(inputs))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.held.update(loss.detach())
            self.log_dict({"twice": 2 * loss})
            return loss

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.gathered.update(self._loss(batch))
            self.log("val_mean", self.gathered)
            self.logger.experiment.add_text("anything")

    return Metered


class Snapshot:
    """What the last callback of a run sees when training has ended."""

    def __init__(self, trainer, module):
        self.weights = {name: value.clone() for name, value in module.state_dict().items()}
        self.modes = [part.training for part in module.modules()]
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        self.bar = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
        self.stage = (trainer.state.fn, trainer.state.stage, trainer.training, trainer.validating)
        self.progress = copy.deepcopy(trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict())
        self.held = (float(module.held.mean_value), int(module.held._update_count), float(module.gathered.weight))
        self.random = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
        self.step = (trainer.global_step, trainer.current_epoch)
        self.extras = {name for name in vars(module) if not name.startswith("_")}

    def differences(self, other):
        found = [key for key in vars(self) if key != "weights" and vars(self)[key] != vars(other)[key]]
        return found + [name for name, value in self.weights.items() if not torch.equal(value, other.weights[name])]


@pytest.mark.parametrize("name", NAMESPACES)
def test_comparing_and_refreshing_are_invisible(tmp_path, name):
    namespace = NAMESPACES[name]
    listener_class, book_class = listening_classes(namespace)

    def run(folder, averaging):
        class Last(namespace.Callback):
            def on_train_end(self, trainer, pl_module):
                self.seen = Snapshot(trainer, pl_module)

        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002  # the state that the run must not touch
        listener, book, last = listener_class(), book_class(), Last()
        module = metered(namespace)()
        book.experiment = SilentLogger()
        fit = trainer(tmp_path / folder, namespace, callbacks=[*averaging, listener, last], logger=book)
        fit.fit(module, loader(shuffle=True), loader(seed=1))
        return listener.heard, book.rows, last.seen, averaging, Snapshot(fit, module)

    with_hooks, with_rows, with_state, (averaging,), with_after = run("with", [CheckpointAveraging(last=2)])
    without_hooks, without_rows, without_state, _, without_after = run("without", [])
    assert averaging.scores is not None
    assert with_hooks == without_hooks
    assert with_rows == without_rows
    assert with_state.differences(without_state) == []
    assert with_after.differences(without_after) == []


def test_an_error_in_the_comparison_leaves_everything_as_it_was(tmp_path):
    class Broken(module_class()):
        broken = False

        def validation_step(self, batch, batch_idx):
            if self.broken:
                self.net[0].weight.data.zero_()
                raise RuntimeError("no validation today")
            super().validation_step(batch, batch_idx)

        def on_train_end(self):
            self.broken = True

        def on_fit_end(self):
            pytest.fail("not reached")

    namespace = NAMESPACES["lightning.pytorch"]

    class Breaker(namespace.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.broken = True
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

    averaging, breaker = CheckpointAveraging(last=2), Breaker()
    module = Broken(batch_norm=True)
    run = trainer(tmp_path, callbacks=[breaker, averaging])
    with pytest.raises(RuntimeError, match="no validation today"):
        run.fit(module, loader(), loader(seed=1))
    assert all(torch.equal(value, breaker.weights[name]) for name, value in module.state_dict().items())
    assert averaging in run.callbacks
    assert "log" not in vars(module)
    assert (tmp_path / "checkpoints" / "averaged.ckpt").exists()
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_isolated_restores_after_an_exception(tmp_path):
    class Peek(NAMESPACES["lightning.pytorch"].Callback):
        def on_train_end(self, trainer, pl_module):
            before = {name: value.clone() for name, value in pl_module.state_dict().items()}
            callbacks = trainer.callbacks
            with pytest.raises(KeyboardInterrupt):
                self.interrupted(trainer, pl_module)
            assert trainer.callbacks is callbacks
            assert trainer.training
            assert all(torch.equal(value, before[name]) for name, value in pl_module.state_dict().items())
            self.done = True

        def interrupted(self, trainer, pl_module):
            with isolated(trainer, pl_module):
                assert trainer.callbacks == []
                trainer.validating = True
                pl_module.eval()
                pl_module.net[0].weight.data.zero_()
                raise KeyboardInterrupt

    peek = Peek()
    trainer(tmp_path, callbacks=[peek], max_epochs=1).fit(module_class()(), loader(), loader(seed=1))
    assert peek.done


def test_no_comparison_without_validation_or_without_a_loss(tmp_path):
    class Silent(module_class()):
        def validation_step(self, batch, batch_idx):
            self.log("val_accuracy", 0.5)

    averaging = CheckpointAveraging(last=2)
    trainer(tmp_path / "a", callbacks=[averaging]).fit(Silent(), loader(), loader(seed=1))
    assert (averaging.scores, averaging.metric) == (None, None)
    averaging = CheckpointAveraging(last=2)
    run = trainer(tmp_path / "b", callbacks=[averaging], limit_val_batches=0)
    run.fit(module_class()(), loader(), loader(seed=1))
    assert averaging.scores is None
    assert averaging.path.exists()
