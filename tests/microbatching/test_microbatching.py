"""Batches that run in pieces leave what whole batches leave."""

import math
import random
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
import torchmetrics
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

from lightning_plugins import GradientAccumulation, MicroBatching
from lightning_plugins.core.lightning import MisconfigurationException
from tests.support import conditions
from tests.support.accumulation_runs import (
    Probe,
    Recorder,
    batches,
    failed,
    fit,
    loader,
    make_batch,
    module_class,
    relative_error,
)
from tests.support.microbatch_cases import MICRO, SIZES, Fitting, close, run_micro

PIECES = [name for name in MICRO if name not in ("whole", "auto on rank 1")]


@pytest.mark.parametrize("precision", [None, "scaler"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", PIECES)
def test_gradients_outputs_logs_and_counters_are_the_whole_batchs(name, accumulate, precision):
    whole = run_micro(accumulate=accumulate, precision=precision)
    pieces = run_micro(**MICRO[name], accumulate=accumulate, precision=precision)
    assert pieces["global_step"] == whole["global_step"]
    assert pieces["zeroed"] == whole["zeroed"]
    for step, expected in zip(pieces["steps"], whole["steps"], strict=True):
        assert relative_error(step["gradient"], expected["gradient"]) <= 1e-14
    for batch, expected in zip(pieces["batches"], whole["batches"], strict=True):
        assert close(batch["outputs"], expected["outputs"])
        assert close(batch["logged"], expected["logged"])
        assert batch["seen"] == expected["seen"]


def test_single_precision_too():
    data = [make_batch(size, 4, seed, torch.float32) for seed, size in enumerate(SIZES[0])]
    whole, pieces = Recorder(), Recorder()
    fit(Probe(), [whole], data)
    fit(Probe(), [MicroBatching(3), pieces], data)
    for step, expected in zip(pieces.steps, whole.steps, strict=True):
        assert relative_error(step["gradient"], expected["gradient"]) <= 5e-7


def test_composes_with_lightnings_own_accumulation_and_half_precision():
    data = batches(SIZES[0], dtype=torch.float32, tokens=False)
    for settings, bound in [({"accumulate_grad_batches": 3}, 5e-7), ({"precision": "bf16-mixed"}, 0.02)]:
        whole, pieces = Recorder(), Recorder()
        fit(Probe(lr=0.0), [whole], data, **settings)
        fit(Probe(lr=0.0), [MicroBatching(3), pieces], data, **settings)
        for step, expected in zip(pieces.steps, whole.steps, strict=True):
            assert relative_error(step["gradient"], expected["gradient"]) <= bound


def test_a_batch_that_fits_runs_as_without_the_callback():
    data = batches((4, 6), dtype=torch.float32, tokens=False)
    whole, pieces = Recorder(), Recorder()
    fit(Probe(), [whole], data)
    fit(Probe(), [MicroBatching(6), pieces], data)
    for step, expected in zip(pieces.steps, whole.steps, strict=True):
        assert all(torch.equal(step["gradient"][name], tensor) for name, tensor in expected["gradient"].items())


@pytest.mark.parametrize("on_device", [False, True])
def test_counts_may_stay_on_the_device(on_device, monkeypatch):
    from lightning_plugins.core import counting

    if on_device:
        monkeypatch.setattr(counting, "as_count", lambda value: torch.as_tensor(value).reshape(()))
    pieces, whole = run_micro(size=2), run_micro()
    for step, expected in zip(pieces["steps"], whole["steps"], strict=True):
        assert relative_error(step["gradient"], expected["gradient"]) <= 1e-14


class Measured(Probe):
    """Logs torchmetrics objects in every way that users do."""

    def __init__(self, fits=None):
        super().__init__(torch.float64)
        self.fits = fits
        self.accuracy = MulticlassAccuracy(5, average="micro")
        self.loss = torchmetrics.MeanMetric()
        self.worst = torchmetrics.MaxMetric()
        self.rows = torchmetrics.CatMetric()
        self.both = torchmetrics.MetricCollection([MulticlassPrecision(5), MulticlassAccuracy(5)])
        self.validation = MulticlassAccuracy(5)

    def training_step(self, batch, batch_idx):
        samples = len(batch["inputs"])
        loss = super().training_step(batch, batch_idx)
        preds, target = self.net(batch["inputs"]).argmax(-1).flatten(), batch["labels"].flatten()
        self.accuracy(preds, target)
        self.loss(loss.detach(), samples)
        self.worst.update(loss.detach())
        self.rows.update(target)
        self.both(preds, target)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("mean", self.loss, on_step=True, on_epoch=True)
        self.log_dict(self.both, on_step=True, on_epoch=True)
        self.log("plain", loss, on_step=True, on_epoch=True)
        if self.fits and samples > self.fits:
            raise _oom()
        return loss


class Reads(pl.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_epoch_end(self, trainer, pl_module):
        self.counts = pl_module.rows.compute().numel()
        self.total = float(pl_module.accuracy.compute())
        self.updates = pl_module.accuracy.update_count
        self.synchronizes = pl_module.accuracy._to_sync  # over the ranks, when the epoch's value is asked for
        self.untouched = pl_module.validation.update_count


@pytest.mark.parametrize(("size", "fits"), [(3, None), (1, None), ("auto", 2)])
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_metrics_are_those_of_the_whole_batch(size, fits):
    data = [make_batch(size, 4, seed, torch.float64) for seed, size in enumerate((8, 7, 2, 5))]
    whole, pieces = Reads(), Reads()
    expected = fit(Measured(), [whole], data, epochs=2).callback_metrics
    found = fit(Measured(fits), [MicroBatching(size), pieces], data, epochs=2).callback_metrics
    for row, expected_row in zip(pieces.rows, whole.rows, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-6)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-6
    )
    assert pieces.counts == whole.counts
    assert pieces.updates == whole.updates
    assert pieces.total == pytest.approx(whole.total)
    assert pieces.untouched == 0
    assert pieces.synchronizes


class Random(Fitting):
    """Draws from every generator, before the memory runs out."""

    def training_step(self, batch, batch_idx):
        noise = torch.rand(()).item() + random.random() + np.random.rand()  # noqa: NPY002  # the global one
        return {"loss": super().training_step(batch, batch_idx)["loss"] * (1 + noise)}


def test_a_batch_that_runs_again_draws_the_same_random_numbers():
    """From the same seed, searching for the size 2 leaves the very gradients of always having had it."""
    runs = []
    for size, fits in (("auto", 2), (2, None)):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002  # the global one
        recorder = Recorder()
        module = Random(fits=fits)
        fit(
            module,
            [MicroBatching(size), recorder],
            batches((8, 7, 6), dtype=torch.float64, tokens=False),
        )
        runs.append(recorder.steps)
    for step, expected in zip(*runs, strict=True):
        assert all(torch.equal(step["gradient"][name], tensor) for name, tensor in expected["gradient"].items())


def test_dropout_has_the_same_distribution():
    """The mean gradient over 400 draws, in pieces and whole, agrees within its standard error."""

    class Drops(Probe):
        def __init__(self):
            super().__init__(torch.float64, lr=0.0)
            self.drop = torch.nn.Dropout(0.5)

        def training_step(self, batch, batch_idx):
            return super().training_step({**batch, "inputs": self.drop(batch["inputs"])}, batch_idx)

    data = [make_batch(6, 4, 0, torch.float64)] * 400
    means, errors = [], []
    for callbacks in ([], [MicroBatching(2)]):
        recorder = Recorder()
        fit(Drops(), [*callbacks, recorder], data)
        seen = torch.stack([step["gradient"]["2.bias"] for step in recorder.steps])
        means.append(seen.mean(0))
        errors.append(seen.std(0) / math.sqrt(len(seen)))
    assert ((means[0] - means[1]).abs() <= 4 * (errors[0] ** 2 + errors[1] ** 2).sqrt()).all()


@conditions.ema_weight_averaging
def test_an_average_of_the_weights_ticks_once_a_step():
    averages = []
    for callbacks in ([], [MicroBatching(2)]):
        module = Probe(torch.float64)
        fit(
            module,
            [*callbacks, pl.callbacks.EMAWeightAveraging(decay=0.5)],
            batches(SIZES[0], dtype=torch.float64, tokens=False),
        )
        averages.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.allclose(*averages, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("package", [pl, pytorch_lightning], ids=["lightning.pytorch", "pytorch_lightning"])
def test_works_in_both_namespaces(package):
    data = batches((5, 7), dtype=torch.float32, tokens=False)
    whole, pieces = Recorder(), Recorder()
    fit(module_class(package)(), [whole], data, package=package)
    fit(module_class(package)(), [pieces, MicroBatching()], data, package=package)
    fit(module_class(package)(), [pieces, MicroBatching(2), GradientAccumulation(2)], data, package=package)
    assert relative_error(pieces.steps[0]["gradient"], whole.steps[0]["gradient"]) <= 5e-7


def test_an_optimizer_that_runs_the_batch_several_times_gets_the_same_each_time():
    class Curvature(Probe):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    data = batches((6, 5), dtype=torch.float64, tokens=False)
    weights = []
    for callbacks in ([], [MicroBatching(2)]):
        module = Curvature(torch.float64)
        fit(module, callbacks, data)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.allclose(*weights, rtol=1e-10)


class Kept:
    """What autograd keeps for a backward, and how many bytes of it are alive at once."""

    alive = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Kept.alive += tensor.nbytes
        Kept.peak = max(Kept.peak, Kept.alive)

    def __del__(self):
        Kept.alive -= self.tensor.nbytes


class Wide(Probe):
    """Returns its logits too, which must not keep a piece's graph alive."""

    def training_step(self, batch, batch_idx):
        hidden = batch["inputs"].repeat(1, 1, 500).tanh().exp()
        loss = super().training_step(batch, batch_idx) + (hidden * self.net[0].bias.sum()).mean()
        return {"loss": loss, "logits": hidden.mean(-1) * self.net[0].bias.sum()}


def test_only_one_piece_is_in_memory_at_once():
    peaks = []
    for callbacks in ([], [MicroBatching(2)]):
        Kept.alive = Kept.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            fit(Wide(), callbacks, [make_batch(16, 4, 0, torch.float32)] * 2)
        peaks.append(Kept.peak)
    assert peaks[1] < peaks[0] / 7  # 8 pieces, and a little that does not depend on the samples


def test_the_size_found_is_remembered_logged_and_saved(caplog, tmp_path):
    callback = MicroBatching()
    data = batches(SIZES[0], dtype=torch.float64, tokens=False)
    with caplog.at_level("INFO"):
        module = Fitting(fits=2)
        trainer = fit(module, [callback], data)
    lines = [record.getMessage() for record in caplog.records if "MicroBatching" in record.getMessage()]
    assert lines == [
        "MicroBatching: batches run whole, and in smaller pieces if memory runs out.",
        "MicroBatching: out of memory with 8 samples at once; going on with 4.",
        "MicroBatching: out of memory with 4 samples at once; going on with 2.",
    ]
    assert callback.size_found == 2
    trainer.save_checkpoint(tmp_path / "found.ckpt")
    state = torch.load(tmp_path / "found.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state == {"version": 1, "size_found": 2}
    resumed, again = MicroBatching(), Fitting(fits=2)
    fit(again, [resumed], data, epochs=2, fit_arguments={"ckpt_path": tmp_path / "found.ckpt"})
    assert again.calls == sum(-(-size // 2) for size in SIZES[0])  # no attempt failed


def test_fixed_sizes_are_said_once(caplog):
    with caplog.at_level("INFO"):
        fit(Probe(), [MicroBatching(3)], batches((4,), dtype=torch.float32, tokens=False))
    assert "MicroBatching: batches run in pieces of at most 3 samples." in caplog.messages


@pytest.mark.parametrize(
    ("size", "fits", "hint"),
    [
        ("auto", 0, "MicroBatching found no size that fits. Shorten the samples, or free memory in another way."),
        (4, 3, 'MicroBatching ran pieces of at most 4 samples. Take a smaller `size`, or "auto".'),
        (100, 3, 'MicroBatching ran pieces of at most 100 samples. Take a smaller `size`, or "auto".'),
    ],
)
def test_memory_that_runs_out_for_good_is_the_original_error_with_a_hint(size, fits, hint):
    with pytest.raises(torch.OutOfMemoryError) as found:
        fit(Fitting(fits=fits), [MicroBatching(size)], batches((8,), dtype=torch.float64, tokens=False))
    assert str(found.value) == f"CUDA out of memory (simulated).\n{hint}"


def test_memory_that_runs_out_after_ddp_has_settled_names_a_number():
    callback = MicroBatching()
    callback._search = SimpleNamespace(settled=True, largest=lambda: 8)
    trainer, error = SimpleNamespace(training=True, **vars(pl.Trainer(accelerator="cpu", logger=False))), _oom()
    callback.on_exception(trainer, Probe(), error)
    assert str(error).endswith("ask the others to go back. Give a number of samples below 8 as `size`.")


def test_memory_that_runs_out_in_validation_is_not_ours():
    class Validates(Probe):
        def validation_step(self, batch, batch_idx):
            raise _oom()

        def val_dataloader(self):
            return loader(batches((2,), dtype=torch.float32, tokens=False))

    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory \(simulated\)\.$"):
        fit(Validates(), [MicroBatching()], batches((2,), dtype=torch.float32, tokens=False))


def _oom():
    return torch.OutOfMemoryError("CUDA out of memory (simulated).")


def test_memory_that_runs_out_in_the_backward_undoes_what_it_left():
    """The second piece's backward fails, in the second batch of a window: both earlier gradients are there."""

    class Heavy(Probe):
        backwards = 0

        def backward(self, loss):
            super().backward(loss)
            self.backwards += 1
            if self.backwards == 3:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated).")

    data = batches((4, 6, 5), dtype=torch.float64, tokens=False)
    whole, pieces = Recorder(), Recorder()
    fit(Probe(torch.float64), [GradientAccumulation(2), whole], data)
    found = MicroBatching()
    fit(Heavy(torch.float64), [found, GradientAccumulation(2), pieces], data)
    assert found.size_found == 3
    for step, expected in zip(pieces.steps, whole.steps, strict=True):
        assert relative_error(step["gradient"], expected["gradient"]) <= 1e-14


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), torch.OutOfMemoryError("out of memory")])
@pytest.mark.parametrize("size", [2, "auto"])
def test_nothing_of_ours_remains_on_the_trainer(error, size):
    data = batches((5, 5, 5), dtype=torch.float32, tokens=False)
    for trainer in (failed(error, MicroBatching(size), data, batch=1), fit(Probe(), [MicroBatching(size)], data)):
        loop = trainer.fit_loop.epoch_loop
        assert "_make_closure" not in vars(loop.automatic_optimization)
        assert "update_metrics" not in vars(loop._results)


def test_a_step_may_return_nothing_for_a_batch_but_not_for_a_piece():
    class Skips(Probe):
        def training_step(self, batch, batch_idx):
            self.calls = getattr(self, "calls", 0) + 1
            return None if batch_idx == 0 or self.calls == 5 else super().training_step(batch, batch_idx)

    data = batches((4, 2, 4), dtype=torch.float32, tokens=False)
    message = "`training_step` must return a loss for every piece of a batch or for none, but returned None for 1 of 2"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Skips(), [MicroBatching(2)], data)
