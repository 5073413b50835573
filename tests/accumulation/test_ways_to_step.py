"""Windows in modules that step, or zero, in a way of their own."""

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from lightning_plugins import GradientAccumulation, MicroBatching
from lightning_plugins.core.lightning import MisconfigurationException
from tests.accumulation.test_window_boundaries import UNEQUAL, TwiceAStep, data_of, steps_of
from tests.support.accumulation_runs import (
    Dictionaries,
    Probe,
    Recorder,
    SaveAfterFirstEpoch,
    fit,
    full_gradient,
    relative_error,
)


class WaysToStep(Probe):
    """Steps in a way of its own; ``step`` is called as ``optimizer_step`` of Lightning is."""

    def __init__(self, step):
        super().__init__()
        self.step, self.seen = step, []

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.step(optimizer, optimizer_closure)

    def on_train_start(self):
        def look(optimizer, args, kwargs):
            tensors = dict(self.net.named_parameters())
            weights = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self.seen.append((weights, {name: tensor.grad.clone() for name, tensor in tensors.items()}))

        self.optimizers(use_pl_optimizer=False).register_step_post_hook(look)


def closure_first(optimizer, closure):
    closure()
    optimizer.optimizer.step()


def two_steps(optimizer, closure):
    optimizer.step(closure)
    optimizer.step()


def two_raw_steps(optimizer, closure):
    optimizer.optimizer.step(closure)
    optimizer.optimizer.step()


def toggled(optimizer, closure):
    with optimizer.toggle_model():
        optimizer.step(closure)


WAYS = {
    "the optimizer itself": lambda optimizer, closure: optimizer.optimizer.step(closure),
    "the closure first, then the optimizer itself": closure_first,
    "two steps with one gradient": two_steps,
    "two of the optimizer itself": two_raw_steps,
    "a toggled model": toggled,
}


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_of_stepping_sees_the_gradient_of_its_window(name, in_pieces):
    """Weights of every step against a loop in plain torch; windows of two, the last one short."""
    module, twice = WaysToStep(WAYS[name]), "two" in name
    callbacks = [GradientAccumulation(2), *([MicroBatching(2)] if in_pieces else [])]
    fit(module, callbacks, data_of(UNEQUAL[:5]))
    weights = {name: tensor.detach().clone() for name, tensor in Probe().net.named_parameters()}
    data, windows, steps = data_of(UNEQUAL), [[0, 1], [2, 3], [4]], iter(module.seen)
    for window in windows:
        gradient = full_gradient(weights, [data[index] for index in window])
        for _ in range(2 if twice else 1):
            after, seen = next(steps)
            assert relative_error(seen, gradient) <= 1e-6
            weights = {name: tensor - 0.5 * gradient[name] for name, tensor in weights.items()}
            assert relative_error(after, weights) <= 1e-6
    assert next(steps, None) is None


def test_a_closure_that_runs_again_adds_what_it_adds_without_us():
    """The last batch of a window counts twice where the optimizer runs it twice, in the units of its window."""
    steps, data = steps_of(TwiceAStep(), [GradientAccumulation(2)], UNEQUAL[:5]), data_of(UNEQUAL)
    for step, window in zip(steps, [[0, 1], [2, 3], [4]], strict=True):
        parts = [full_gradient(step["weights"], [data[index]]) for index in window]
        shares = [UNEQUAL[index] / sum(UNEQUAL[index] for index in window) for index in window]
        shares[-1] *= 1 if window == [4] else 2  # the window of one batch zeroes each time
        summed = {name: sum(s * part[name] for s, part in zip(shares, parts, strict=True)) for name in parts[0]}
        assert relative_error(step["gradient"], summed) <= 1e-6


class Accumulates(Probe):
    """Zeroes gradients in every second window only."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 4 == 0:
            optimizer.zero_grad()


class ZeroesInPlace(Probe):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("arguments", [{"batches": 2}, {"schedule": {0: 2, 1: 3}}], ids=["batches", "schedule"])
def test_gradients_that_the_module_keeps_from_zeroing_are_refused(arguments):
    with pytest.raises(MisconfigurationException, match="`optimizer_zero_grad` of Accumulates has left the gradients"):
        fit(Accumulates(), [GradientAccumulation(**arguments)], data_of(UNEQUAL))


def test_a_module_may_zero_in_its_own_way():
    steps, data = steps_of(ZeroesInPlace(), [GradientAccumulation(2)], UNEQUAL), data_of(UNEQUAL)
    for step, window in zip(steps, [[0, 1], [2, 3], [4, 5]], strict=True):
        assert relative_error(step["gradient"], full_gradient(step["weights"], [data[i] for i in window])) <= 5e-7


class Sets(pl.Callback):
    """Sets the accumulation in the middle of a window, as a callback of the user's may."""

    def __init__(self, changes):
        self.changes = changes

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.accumulate_grad_batches = self.changes.get(batch_idx, trainer.accumulate_grad_batches)


@pytest.mark.parametrize("samples", [2, 4, 8])
def test_an_open_window_goes_on_with_another_batch_size(tmp_path, samples):
    """Steps of 8 samples: 4 batches of 2, of which one is left over; then batches of another size."""
    arguments = {"effective_batch_size": 8, "carry": True}
    path, data = tmp_path / "cut.ckpt", Dictionaries(10)
    fit(
        Probe(),
        [GradientAccumulation(**arguments), SaveAfterFirstEpoch(path)],
        DataLoader(data, batch_size=2),
        epochs=2,
    )
    recorder, probe = Recorder(), Probe()
    again = DataLoader(data, batch_size=samples)
    callbacks = [GradientAccumulation(**arguments), recorder]
    fit(probe, callbacks, again, epochs=2, fit_arguments={"ckpt_path": path})
    rows = [*range(8, 10), *range({2: 6, 4: 4, 8: 8}[samples])]
    joined = {name: tensor[rows] for name, tensor in data.batch.items()}
    step = recorder.steps[0]
    assert relative_error(step["gradient"], full_gradient(step["weights"], [joined])) <= 1e-6


@pytest.mark.parametrize("order", [1, -1], ids=["before", "behind"])
def test_an_accumulation_that_changes_within_a_window_is_followed(order):
    """Lightning divides the losses of one window by several numbers: 2 and 3 here, 3 and 1 later."""
    callbacks = [Sets({1: 3, 4: 1}), GradientAccumulation(2)][::order]
    steps, data = steps_of(Probe(), callbacks, UNEQUAL), data_of(UNEQUAL)
    for step, window in zip(steps, [[0, 1, 2], [4], [5]], strict=True):
        assert relative_error(step["gradient"], full_gradient(step["weights"], [data[i] for i in window])) <= 5e-7
