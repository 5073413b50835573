"""What GradientAccumulation refuses, and how it says so."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_plugins import GradientAccumulation, Tokens
from lightning_plugins.core import counting
from lightning_plugins.core.lightning import MisconfigurationException
from tests.support.accumulation_cases import CASES
from tests.support.accumulation_runs import (
    Dictionaries,
    Probe,
    fit,
    relative_error,
)

FIRST = CASES["uneven batches, short last window"]


BAD_RUNS = {
    "the Trainer sets it too": (
        {},
        {"accumulate_grad_batches": 2},
        [],
        r"GradientAccumulation sets the accumulation, and so does Trainer\(accumulate_grad_batches=2\)\. Remove it",
    ),
    "another callback sets it too": (
        {},
        {},
        [GradientAccumulationScheduler({0: 2})],
        r"GradientAccumulation sets the accumulation, and so does GradientAccumulationScheduler\. Keep one\.",
    ),
    "two of them": (
        {},
        {},
        [GradientAccumulation(5)],
        r"GradientAccumulation sets the accumulation, and so does GradientAccumulation\. Keep one\.",
    ),
    "not divisible": (
        {"batches": None, "effective_batch_size": 10},
        {},
        [],
        r"`effective_batch_size` must be a multiple of 4, for batches of 4 samples, got 10\. Take 8 or 12, or another",
    ),
    "below one batch": (
        {"batches": None, "effective_batch_size": 3},
        {},
        [],
        r"`effective_batch_size` must be a multiple of 4, for batches of 4 samples, got 3\. Take 4, or another batch",
    ),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_refuses_at_setup(name):
    arguments, settings, others, message = BAD_RUNS[name]
    data = torch.utils.data.DataLoader(Dictionaries(12), batch_size=4)
    accumulation = GradientAccumulation(**{"batches": 2, **arguments})
    with pytest.raises(MisconfigurationException, match=message):
        fit(Probe(), [accumulation, *copy.deepcopy(others)], data, **settings)


def test_refuses_a_loader_that_does_not_tell_its_batch_size():
    message = "`effective_batch_size` needs a training loader with a `batch_size`, and DataLoader has none. Give `ba"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Probe(), [GradientAccumulation(effective_batch_size=8)], FIRST.data(0))


class Manual(Probe):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Draws(Probe):
    def training_step(self, dataloader_iter):
        return super().training_step(*next(dataloader_iter)[:2])


class Curvature(Probe):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, "needs automatic optimization, but `Manual.automatic_optimization` is False"),
        (Draws, "must see the batches, but `Draws.training_step` draws them from `dataloader_iter`"),
        (Curvature, "does not work with LBFGS, which runs the last batch of a window several times in one step"),
    ],
)
def test_refuses_a_module_that_it_cannot_serve(module, message):
    with pytest.raises(MisconfigurationException, match=f"GradientAccumulation {message}"):
        fit(module(), [GradientAccumulation(2)], FIRST.data(0))


def test_refuses_strategies_by_name():
    class DeepSpeedLike(pl.strategies.SingleDeviceStrategy):
        handles_gradient_accumulation = True

    class Novel(pl.strategies.Strategy):
        for name in pl.strategies.Strategy.__abstractmethods__:
            locals()[name] = None

    trainer = pl.Trainer(accelerator="cpu", strategy=DeepSpeedLike(torch.device("cpu")), logger=False)
    accumulation = GradientAccumulation(2)
    with pytest.raises(MisconfigurationException, match="under DeepSpeedLike, which accumulates gradients by itself"):
        accumulation.setup(trainer, Probe(), "fit")
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    trainer._accelerator_connector.strategy = Novel.__new__(Novel)
    with pytest.raises(MisconfigurationException, match="was not tested under Novel; it works under DDPStrategy, D"):
        accumulation.setup(trainer, Probe(), "fit")


BAD_COUNTS = {
    "negative": (lambda batch: -1, ValueError, r"`count` must return a finite number of at least 0, got -1"),
    "no number": (
        lambda batch: float("nan"),
        ValueError,
        r"`count` must return a finite number of at least 0, got nan",
    ),
    "text": (lambda batch: "3", TypeError, r"`count` must return one number, got '3'\."),
    "several": (
        lambda batch: torch.ones(2),
        TypeError,
        r"`count` must return one number, got a tensor of shape \(2,\)",
    ),
    "all zero": (
        lambda batch: 0,
        ValueError,
        r"`count` must not be 0 for every batch, got only zeros in 3 optimizer steps: nothing would be learned\.",
    ),
    "missing key": (
        Tokens("label"),
        ValueError,
        r"`key` must be a field of the batch, got 'label'\. This dict has: 'inputs', 'labels'\.",
    ),
}


@pytest.mark.parametrize("name", BAD_COUNTS)
def test_refuses_counts_that_cannot_be_right(name, tmp_path):
    count, error, message = BAD_COUNTS[name]
    kept = tmp_path / "kept.txt"
    kept.write_text("what the run wrote before")
    with pytest.raises(error, match=message):
        fit(Probe(), [GradientAccumulation(2, count=count)], FIRST.data(0), default_root_dir=tmp_path)
    assert kept.read_text() == "what the run wrote before"


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_bad_count_on_the_device_is_found_at_the_end_of_the_epoch(value, monkeypatch):
    """Looking at every count would wait for the device at every batch; the first one is looked at."""
    monkeypatch.setattr(counting, "as_count", lambda value: torch.as_tensor(value, dtype=torch.float64))
    counts = iter([4.0, 7.0, value, 5.0, 3.0])
    with pytest.raises(ValueError, match=f"`count` must return a finite number of at least 0, got {value:g}"):
        fit(Probe(), [GradientAccumulation(2, count=lambda batch: next(counts))], FIRST.data(0))


def test_a_batch_whose_samples_cannot_be_told_needs_a_count():
    batch = {"inputs": torch.zeros(4, 3), "weights": torch.zeros(3)}
    message = r"`count` must not be \"samples\" here: the fields of the batch disagree .*`batch\['weights'\]` has 3\. C"
    with pytest.raises(ValueError, match=message):
        fit(Probe(), [GradientAccumulation(2)], [batch])


def test_the_measure_of_error_notices():
    assert relative_error({"a": torch.ones(3)}, {"a": torch.full((3,), 2.0)}) == pytest.approx(0.5)
