"""What MicroBatching warns of and refuses, and that it leaves evaluation alone."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch

from lightning_plugins import GradientAccumulation, MicroBatching, Tokens
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.accumulation_runs import (
    Probe,
    batches,
    fit,
    loader,
)
from tests.support.microbatch_cases import MICRO

PIECES = [name for name in MICRO if name not in ("whole", "auto on rank 1")]


def test_warns_of_batch_normalization():
    class Normed(Probe):
        def __init__(self):
            super().__init__()
            self.norms = torch.nn.ModuleList([torch.nn.BatchNorm1d(6), torch.nn.BatchNorm1d(6)])

        def training_step(self, batch, batch_idx):
            return super().training_step({**batch, "inputs": self.norms[0](batch["inputs"].mT).mT}, batch_idx)

    with pytest.warns(LightningPluginsWarning, match=r"batch normalization \(norms.0 and 1 more\) then takes its stat"):
        fit(Normed(), [MicroBatching(2)], batches((4,), dtype=torch.float32, tokens=False))


class Manual(Probe):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Synchronized(Probe):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.SyncBatchNorm(6)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, "MicroBatching needs automatic optimization, but `Manual.automatic_optimization` is False"),
        (Synchronized, "MicroBatching does not work with synchronized batch normalization, whose ranks would have to"),
    ],
)
def test_refuses_a_module_that_it_cannot_serve(module, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(module(), [MicroBatching(2)], batches((4,), dtype=torch.float32, tokens=False))


def test_refuses_what_the_strategy_shows():
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    trainer._accelerator_connector.strategy = pl.strategies.ModelParallelStrategy()
    with pytest.raises(MisconfigurationException, match=r"nearest to ModelParallelStrategy is MicroBatching\(size\)"):
        MicroBatching("auto").setup(trainer, Probe(), "fit")
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    trainer.strategy.optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])] * 2
    with pytest.raises(MisconfigurationException, match="MicroBatching works with one optimizer, and the module has"):
        MicroBatching(2).on_fit_start(trainer, Probe())
    trainer.strategy.optimizers = []
    trainer.strategy._model = torch.nn.Linear(1, 1)
    trainer.strategy._model.static_graph = True
    with pytest.raises(
        MisconfigurationException, match=r"does not work with DDPStrategy\(static_graph=True\), which e"
    ):
        MicroBatching(2).on_fit_start(trainer, Probe())


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"inputs": torch.zeros(4, 3, 6), "labels": object()}, TypeError, "must have 4 rows in every field to run in"),
        ({"inputs": torch.zeros(4, 6), "labels": torch.zeros(3)}, ValueError, "MicroBatching cannot tell the size of"),
    ],
)
def test_a_batch_that_cannot_be_split(batch, error, message):
    with pytest.raises(error, match=message):
        fit(Probe(), [MicroBatching(2)], [batch])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, r"`size` must be at least 1 sample, got 0\."),
        ({"size": -3}, ValueError, r"`size` must be at least 1 sample, got -3\."),
        ({"size": 2.0}, TypeError, r"`size` must be a whole number of samples, got 2\.0\."),
        ({"size": "automatic"}, ValueError, r'`size` must be a number of samples or "auto", got \'automatic\'\.'),
        (
            {"count": "tokens"},
            ValueError,
            r"`count` must be 'samples', Tokens\(key\) or a function of the batch, got 'tokens'\.",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        MicroBatching(**arguments)


def test_survives_pickling_and_copying_before_fit():
    callback = MicroBatching(3, count=Tokens("labels"))
    for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert twin.state_key == callback.state_key
    assert callback.state_key != MicroBatching().state_key


def test_evaluation_is_not_touched():
    class Evaluates(Probe):
        def validation_step(self, batch, batch_idx):
            self.log("loss", self.training_step(batch, batch_idx))

    arguments = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(callbacks=[MicroBatching(2), GradientAccumulation(2)], **arguments)
    data = loader(batches((5, 4), dtype=torch.float32, tokens=False))
    found = trainer.validate(Evaluates(), data, verbose=False)
    expected = pl.Trainer(**arguments).validate(Evaluates(), data, verbose=False)
    assert found == expected
    assert trainer.accumulate_grad_batches == 1
