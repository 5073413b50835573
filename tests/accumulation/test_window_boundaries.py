"""A window holds what is in the gradients: it begins where they are zeroed, whether or not a step was taken."""

import copy
import sys
from collections import UserDict
from types import MappingProxyType, SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from lightning_plugins import CancelTraining, Event, EventCallback, GradientAccumulation, MicroBatching
from tests.support.accumulation_runs import (
    Dictionaries,
    Probe,
    Recorder,
    SaveAfterFirstEpoch,
    ScalerOnly,
    batches,
    fit,
    full_gradient,
    relative_error,
)

EQUAL = (5, 5, 5, 5, 5, 5)
UNEQUAL = (4, 7, 2, 5, 3, 6)
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class StepsOnSome(Probe):
    """Calls the closure alone on some batches, as Lightning's documentation shows it."""

    def __init__(self, without_step):
        super().__init__()
        self.without_step = without_step

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if batch_idx in self.without_step:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


class TwiceAStep(Probe):
    """Runs the closure twice in a step, as sharpness-aware minimization does, and leaves the second gradient."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        optimizer.step(closure=optimizer_closure)


class Ends(Probe):
    """Ends an epoch from ``on_train_batch_start``."""

    def __init__(self, ends):
        super().__init__()
        self.ends = ends

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if (self.trainer.current_epoch, batch_idx) in self.ends else None


class Overflows(Probe):
    """Has a gradient that is not finite in one batch, so that a gradient scaler skips the step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 1 and self.trainer.current_epoch == 0 else loss


def data_of(sizes):
    return batches(sizes, dtype=torch.float32, tokens=False)


def steps_of(module, callbacks, sizes, **arguments):
    recorder = Recorder()
    fit(module, [*callbacks, recorder], data_of(sizes), **arguments)
    return recorder.steps


def same(step, expected):
    kinds = ("weights", "gradient")
    return all(torch.equal(step[what][name], expected[what][name]) for what in kinds for name in step[what])


STOCK = {
    "a closure without a step": lambda: StepsOnSome({0, 3}),
    "no step at a window's end": lambda: StepsOnSome({1, 5}),
    "the closure twice": TwiceAStep,
    "an epoch that ends within a window": lambda: Ends({(0, 3)}),
    "an epoch that ends before a window": lambda: Ends({(0, 2)}),
}


@pytest.mark.parametrize("batches_a_step", [1, 2, 3])
@pytest.mark.parametrize("name", STOCK)
def test_bit_identical_to_stock_where_batches_are_equal(name, batches_a_step):
    stock = steps_of(STOCK[name](), [], EQUAL, accumulate_grad_batches=batches_a_step, epochs=2)
    ours = steps_of(STOCK[name](), [GradientAccumulation(batches_a_step)], EQUAL, epochs=2)
    assert len(ours) == len(stock)
    assert all(map(same, ours, stock))


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize(
    ("module", "windows"),
    [
        # one batch a step: each zeroes the gradients
        (lambda: StepsOnSome({0, 3}), {1: [[1], [2], [4], [5]]}),
        (TwiceAStep, {1: [[0], [0], [1], [1], [2], [2], [3], [3], [4], [4], [5], [5]]}),
        # two: a window without a step is gone with the next window's first batch
        (lambda: StepsOnSome({1}), {2: [[2, 3], [4, 5]]}),
    ],
    ids=["closure alone", "closure twice", "window without a step"],
)
def test_the_mean_is_over_what_is_in_the_gradients(module, windows, pieces):
    """Batches of unequal size, each step against the gradient of its window in one pass."""
    (number, expected), *_ = windows.items()
    callbacks = [GradientAccumulation(number), *([MicroBatching(2)] if pieces else [])]
    steps, data = steps_of(module(), callbacks, UNEQUAL), data_of(UNEQUAL)
    if isinstance(module(), TwiceAStep):  # the hook fires once a step
        expected = expected[::2]
    for step, window in zip(steps, expected, strict=True):
        assert relative_error(step["gradient"], full_gradient(step["weights"], [data[i] for i in window])) <= 5e-7


CARRIED = {
    # the epoch ends before the window's first batch: it begins anew in the next epoch
    "-1 on a window's first batch": (lambda: Ends({(0, 2)}), [[0, 1], [0, 1], [2, 3], [4, 5]]),
    "-1 within a window": (lambda: Ends({(0, 3)}), [[0, 1], [2, 0], [1, 2], [3, 4], [5]]),
    "a full window without a step": (lambda: StepsOnSome({1}), [[2, 3], [4, 5], [2, 3], [4, 5]]),
    "neither": (lambda: Ends(set()), [[0, 1], [2, 3], [4, 5]] * 2),
}


@pytest.mark.parametrize("name", CARRIED)
def test_a_carried_window_holds_the_batches_that_ran(name):
    module, windows = CARRIED[name]
    steps = steps_of(module(), [GradientAccumulation(2, carry=True)], UNEQUAL, epochs=2)
    data = data_of(UNEQUAL)
    for step, window in zip(steps, windows, strict=True):
        assert relative_error(step["gradient"], full_gradient(step["weights"], [data[i] for i in window])) <= 5e-7


def test_a_step_that_the_scaler_skipped_ends_its_window():
    steps = steps_of(Overflows(), [GradientAccumulation(2)], UNEQUAL, plugins=[ScalerOnly()])
    data = data_of(UNEQUAL)
    for step, window in zip(steps[1:], [[2, 3], [4, 5]], strict=True):
        assert relative_error(step["gradient"], full_gradient(step["weights"], [data[i] for i in window])) <= 5e-7
    assert all(torch.equal(steps[0]["weights"][name], value) for name, value in steps[1]["weights"].items())


def test_a_carried_window_that_was_cut_off_resumes_where_it_stood(tmp_path):
    """The first epoch ends by -1 after three batches, so that one waits for the second."""
    path, whole, resumed = tmp_path / "cut.ckpt", Recorder(), Recorder()
    callbacks = lambda: [GradientAccumulation(2, carry=True)]  # noqa: E731
    fit(Ends({(0, 3)}), [*callbacks(), SaveAfterFirstEpoch(path), whole], data_of(UNEQUAL), epochs=2)
    state = torch.load(path, weights_only=True)["callbacks"][callbacks()[0].state_key]
    assert state["carried"]["position"] == 1
    fit(Ends({(0, 3)}), [*callbacks(), resumed], data_of(UNEQUAL), epochs=2, fit_arguments={"ckpt_path": path})
    assert all(map(same, resumed.steps, whole.steps[1:]))


def test_a_cancelled_first_batch_leaves_the_zeroing_to_the_next(tmp_path):
    """Windows of 3; the training of the first epoch is cancelled at its fourth batch, which keeps its place."""

    def act(loop, event):
        if (loop.epoch_index, loop.batch_index) == (0, 3):
            raise CancelTraining

    path, whole, resumed = tmp_path / "cut.ckpt", Recorder(), Recorder()
    cancels = lambda: EventCallback(act, events=[Event.BATCH_START])  # noqa: E731
    accumulation = GradientAccumulation(3, carry=True)
    fit(Probe(), [accumulation, cancels(), SaveAfterFirstEpoch(path), whole], data_of(UNEQUAL), epochs=2)
    data = data_of(UNEQUAL)
    for step, window in zip(whole.steps[:2], [[0, 1, 2], [0, 1]], strict=True):
        assert relative_error(step["gradient"], full_gradient(step["weights"], [data[i] for i in window])) <= 5e-7
    carried = torch.load(path, weights_only=True)["callbacks"][accumulation.state_key]["carried"]
    assert (carried["position"], carried["gradients"]) == (1, {})
    callbacks = [GradientAccumulation(3, carry=True), cancels(), resumed]
    fit(Probe(), callbacks, data, epochs=2, fit_arguments={"ckpt_path": path})
    assert all(map(same, resumed.steps, whole.steps[1:]))


BAD_STATES = {
    "reference of 0": {"reference": 0.0},
    "reference that is no number": {"reference": float("nan")},
    "reference that is a text": {"reference": "4"},
    "reference that is a truth value": {"reference": True},
    "carried that is no mapping": {"reference": 4.0, "carried": 3},
    "carried without gradients": {"reference": 4.0, "carried": {"position": 1, "total": 4.0}},
    "position of 0": {"carried": {"position": 0, "total": 4.0, "gradients": {}}},
    "position that is a fraction": {"carried": {"position": 1.5, "total": 4.0, "gradients": {}}},
    "negative total": {"carried": {"position": 1, "total": -4.0, "gradients": {}}},
    "infinite total": {"carried": {"position": 1, "total": float("inf"), "gradients": {}}},
    "gradients that are numbers": {"carried": {"position": 1, "total": 4.0, "gradients": {"net.0.weight": 3.0}}},
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_is_checked_like_arguments(name):
    accumulation = GradientAccumulation(2, carry=True)
    before = copy.deepcopy(accumulation.state_dict())
    with pytest.raises((TypeError, ValueError), match=r"`state\['(reference|carried)'\]"):
        accumulation.load_state_dict({"version": 1, **BAD_STATES[name]})
    assert accumulation.state_dict() == before


@pytest.mark.parametrize("gradient", [torch.zeros(3), torch.zeros(8, 6, dtype=torch.int64)], ids=["shape", "dtype"])
def test_a_carried_gradient_that_does_not_fit_is_named(gradient, tmp_path):
    accumulation, path = GradientAccumulation(2, carry=True), tmp_path / "open.ckpt"
    fit(Probe(), [accumulation, SaveAfterFirstEpoch(path)], data_of((4, 4, 4)), epochs=2)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"][accumulation.state_key]["carried"]["gradients"]["net.0.weight"] = gradient
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"The gradient of `net.0.weight` in a carried window must be torch.float32"):
        fit(
            Probe(),
            [GradientAccumulation(2, carry=True)],
            data_of((4, 4, 4)),
            epochs=2,
            fit_arguments={"ckpt_path": path},
        )


@pytest.mark.parametrize("carry", [False, True])
def test_micro_batching_may_stand_before_or_behind(carry):
    runs = []
    for first in (True, False):
        callbacks = [GradientAccumulation(2, carry=carry), MicroBatching(2)]
        runs.append(steps_of(Probe(), callbacks if first else callbacks[::-1], UNEQUAL[:5], epochs=2))
    assert len(runs[0]) == len(runs[1]) == (5 if carry else 6)
    assert all(map(same, *runs))


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
def test_a_schedule_is_any_mapping(kind):
    """A configuration hands over its own kind of mapping."""
    accumulation = GradientAccumulation(schedule=kind({0: 1, 2: 3}))
    assert accumulation.schedule == {0: 1, 2: 3}
    assert len(steps_of(Probe(), [accumulation], EQUAL)) == 4


def test_a_batch_takes_few_calls():
    """A window of one batch, which has the most to do: a hook for each of its four moments, and the arithmetic."""
    calls = []

    class Watches(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            sys.setprofile(count if batch_idx == 2 else None)

    def count(frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and ("lightning_plugins/accumulation" in path or "core/batch" in path or "counting" in path):
            calls.append(frame.f_code.co_name)

    fit(Probe(), [GradientAccumulation(1), Watches()], data_of(EQUAL))
    assert len(calls) <= 8, calls


def test_another_loader_has_another_number_of_batches(caplog):
    """12 samples a step: 3 batches of 4 in the first epoch, 2 of 6 in the second."""

    class Reloads(Probe):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(Dictionaries(24), batch_size=4 if self.trainer.current_epoch == 0 else 6)

    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((len(batch["labels"]), trainer.accumulate_grad_batches, trainer.global_step))

    with caplog.at_level("INFO"):
        trainer = pl.Trainer(
            callbacks=[GradientAccumulation(effective_batch_size=12), Watch()],
            max_epochs=2,
            reload_dataloaders_every_n_epochs=1,
            **QUIET,
        )
        trainer.fit(Reloads())
    assert seen == [(4, 3, step) for step in (0, 0, 1, 1, 1, 2)] + [(6, 2, step) for step in (2, 3, 3, 4)]
    assert "GradientAccumulation: the loader has changed; 2 batches of 6 samples per optimizer step" in caplog.text


@pytest.mark.parametrize("ranks", [1, 2])
def test_says_how_many_samples_all_processes_take(ranks):
    accumulation = GradientAccumulation(3)
    trainer = SimpleNamespace(
        world_size=ranks,
        distributed_sampler_kwargs=None,
        train_dataloader=SimpleNamespace(batch_size=4, batch_sampler=None),
        callbacks=[],
    )
    each = " on each of 2 processes" if ranks == 2 else ""
    line = f"3 batches of 4 samples{each} per optimizer step (effective batch size {12 * ranks})"
    assert accumulation._describe(trainer) == line
