"""Every step's gradient is that of the mean over its whole window, and the run is otherwise Lightning's."""

import contextlib
import copy
import dataclasses
import io
import pickle

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.nn.functional import cross_entropy

from lightning_plugins import GradientAccumulation, LearningRateScheduler, Linear, MicroBatching, Tokens
from lightning_plugins.core import counting
from lightning_plugins.core.run_length import run_length
from tests.support.accumulation_cases import BOUND, CASES
from tests.support.accumulation_runs import (
    Dictionaries,
    Probe,
    Recorder,
    SaveAfterFirstEpoch,
    ScalerOnly,
    batches,
    errors_of,
    failed,
    fit,
    loader,
    make_batch,
    module_class,
    run_case,
)

FIRST = CASES["uneven batches, short last window"]


@pytest.fixture(params=["on the host", "on the device"])
def where_counts_are(request, monkeypatch):
    """Counts that are tensors stay tensors on an accelerator; here the CPU plays one."""
    if request.param == "on the device":
        monkeypatch.setattr(counting, "as_count", lambda value: torch.as_tensor(value).detach().reshape(()))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_whole_window(name, dtype, where_counts_are):
    case = dataclasses.replace(CASES[name], dtype=dtype)
    steps, global_step = run_case(case)
    assert global_step == len(case.windows)
    assert max(errors_of(case, steps, ranks=1)) <= BOUND[dtype]
    assert max(errors_of(case, steps, ranks=1, what="applied")) <= BOUND[dtype]


def test_stock_lightning_is_far_off_in_the_same_run():
    recorder = Recorder()
    fit(Probe(), [recorder], FIRST.data(0), accumulate_grad_batches=2)
    assert min(errors_of(FIRST, recorder.steps, ranks=1)) > 0.1


@pytest.mark.parametrize(("precision", "rounding"), [("bf16-mixed", 0.02), ("fp16", 0.002)])
def test_half_precision_is_right_up_to_its_own_rounding(precision, rounding):
    case = dataclasses.replace(FIRST, precision=precision)
    steps, _ = run_case(case)
    assert max(errors_of(case, steps, ranks=1)) < rounding


@pytest.mark.parametrize("count", ["samples", Tokens("labels")], ids=str)
def test_equal_full_windows_are_bit_identical_to_stock(count, where_counts_are):
    data = batches((5, 5, 5, 5, 5, 5), dtype=torch.float32, tokens=False)
    stock, ours = Recorder(), Recorder()
    fit(Probe(), [stock], data, accumulate_grad_batches=3)
    fit(Probe(), [GradientAccumulation(3, count=count), ours], data)
    for step, expected in zip(ours.steps, stock.steps, strict=True):
        for name, gradient in expected["applied"].items():
            assert torch.equal(step["applied"][name], gradient)


def test_later_callbacks_and_the_clipper_see_the_corrected_gradient():
    """The clipping bound is far below the stock gradient's norm and above nothing, so both norms differ."""
    steps, _ = run_case(dataclasses.replace(FIRST, clip=0.05))
    norms = [float(torch.cat([g.flatten() for g in step["applied"].values()]).norm()) for step in steps]
    assert norms == pytest.approx([0.05] * 3, rel=1e-4)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_returned_nothing_counts_nothing():
    class Skips(Probe):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    recorder = Recorder()
    fit(Skips(), [GradientAccumulation(2), recorder], FIRST.data(0))
    case = dataclasses.replace(FIRST, windows=[[0], [2, 3], [4]])
    assert max(errors_of(case, recorder.steps, ranks=1)) <= BOUND[torch.float32]


def test_a_window_of_masked_batches_leaves_the_gradient_alone():
    data = [make_batch(3, 4, seed, torch.float32, masked=1.0 if seed in (2, 3) else 0.2) for seed in range(6)]
    recorder = Recorder()
    fit(Probe(), [GradientAccumulation(2, count=Tokens("labels")), recorder], data)
    assert [float(step["gradient"]["0.weight"].norm()) > 0 for step in recorder.steps] == [True, False, True]


def test_sparse_gradients_are_scaled_too():
    class Sparse(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Embedding(7, 5, sparse=True)

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch), batch % 5)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = [torch.tensor([0, 1, 2]), torch.tensor([3]), torch.tensor([0, 6])]
    module, seen = Sparse(), []

    class See(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append((pl_module.net.weight.grad.to_dense().clone(), pl_module.net.weight.detach().clone()))

    fit(module, [GradientAccumulation(2), See()], data)
    for (gradient, weight), window in zip(seen, [torch.cat(data[:2]), data[2]], strict=True):
        truth = weight.requires_grad_()
        cross_entropy(torch.nn.functional.embedding(window, truth), window % 5).backward()
        assert torch.allclose(gradient, truth.grad, atol=1e-7)


class AsksForTheLength(pl.Callback):
    """Asks in ``on_train_start``, as a learning-rate schedule does."""

    def on_train_start(self, trainer, pl_module):
        self.length = run_length(trainer)


FORMS = {
    "batches": {"batches": 3},
    "more than an epoch": {"batches": 99},
    "effective batch size": {"effective_batch_size": 12},
    "schedule": {"schedule": {0: 1, 2: 4, 3: 3}},
    "carry": {"batches": 3, "carry": True},
    "carry more than an epoch": {"batches": 16, "carry": True},
    "carry, schedule": {"schedule": {0: 4, 1: 3, 4: 5}, "carry": True},
    "carry, effective batch size": {"effective_batch_size": 8, "carry": True},
}


@pytest.mark.parametrize("first", [True, False], ids=["asked before", "asked after"])
@pytest.mark.parametrize("limits", [{"epochs": 1}, {"epochs": 3}, {"epochs": 3, "max_steps": 4}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_run_is_as_long_as_it_was_said_to_be(form, limits, first):
    asks = AsksForTheLength()
    accumulation = GradientAccumulation(**FORMS[form])
    data = torch.utils.data.DataLoader(Dictionaries(37), batch_size=4)
    trainer = fit(Probe(), [asks, accumulation] if first else [accumulation, asks], data, **limits)
    assert asks.length.total_steps == trainer.global_step
    assert "GradientAccumulation" in asks.length.source or asks.length.source.startswith("max_steps")


@pytest.mark.parametrize("planned", [1, 3], ids=["extended", "interrupted"])
@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_is_as_long_as_it_was_said_to_be(form, planned, tmp_path):
    """The checkpoint is that of the first epoch's end, where a carried window is open unless the run was to end."""
    path, data = tmp_path / "first.ckpt", torch.utils.data.DataLoader(Dictionaries(37), batch_size=4)
    fit(Probe(), [GradientAccumulation(**FORMS[form]), SaveAfterFirstEpoch(path)], data, epochs=planned)
    asks = AsksForTheLength()
    callbacks = [asks, GradientAccumulation(**FORMS[form])]
    trainer = fit(Probe(), callbacks, data, epochs=3, fit_arguments={"ckpt_path": path})
    assert asks.length.total_steps == trainer.global_step


@pytest.mark.parametrize("first", [True, False], ids=["schedule first", "accumulation first"])
@pytest.mark.parametrize("form", FORMS)
def test_a_learning_rate_schedule_ends_with_the_run(form, first):
    """A linear decay over the whole run: step t of N has the rate 0.5 (1 - t / N)."""
    schedule = LearningRateScheduler(Linear("100%", 1.0, 0.0), record=True)
    accumulation = GradientAccumulation(**FORMS[form])
    data = torch.utils.data.DataLoader(Dictionaries(37), batch_size=4)
    trainer = fit(Probe(), [schedule, accumulation] if first else [accumulation, schedule], data, epochs=3)
    steps = trainer.global_step
    assert schedule.lrs == pytest.approx([0.5 * (1 - step / steps) for step in range(steps)])


@pytest.mark.parametrize("carry", [False, True])
def test_a_quick_trial_runs(carry):
    trainer = fit(Probe(), [GradientAccumulation(4, carry=carry), MicroBatching()], FIRST.data(0), fast_dev_run=2)
    assert trainer.global_step == 1


@pytest.mark.parametrize("arguments", [{"batches": 3}, {"effective_batch_size": 12}], ids=str)
def test_lightning_itself_knows_the_length_in_configure_optimizers(arguments):
    """There modules ask for ``estimated_stepping_batches``, before any callback can know the loader."""

    class Asks(Probe):
        def configure_optimizers(self):
            self.length = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module = Asks()
    data = torch.utils.data.DataLoader(Dictionaries(37), batch_size=4)
    trainer = fit(module, [GradientAccumulation(**arguments)], data, epochs=2)
    assert module.length == trainer.global_step == 8
    assert "setup_data" not in vars(trainer.fit_loop)


@pytest.mark.parametrize("package", [pl, pytorch_lightning], ids=["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("carry", [False, True])
def test_works_in_both_namespaces(package, carry):
    recorder = Recorder()
    case = CASES["carry" if carry else "uneven batches, short last window"]
    fit(module_class(package)(), [case.accumulation(), recorder], case.data(0), package=package, epochs=case.epochs)
    assert max(errors_of(case, recorder.steps, ranks=1)) <= BOUND[torch.float32]


def test_an_iterable_dataset_of_unknown_length_may_carry():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from FIRST.data(0)

    recorder = Recorder()
    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)
    fit(Probe(), [GradientAccumulation(2, carry=True), recorder], stream, epochs=2)
    assert max(errors_of(CASES["carry"], recorder.steps, ranks=1)) <= BOUND[torch.float32]


def test_validation_in_the_middle_of_a_carried_window_takes_nothing_from_it():
    class Validates(Probe):
        def validation_step(self, batch, batch_idx):
            self.net(batch["inputs"]).sum()

        def val_dataloader(self):
            return loader(FIRST.data(1))

    recorder = Recorder()
    fit(Validates(), [GradientAccumulation(2, carry=True), recorder], FIRST.data(0), epochs=2, val_check_interval=1)
    assert max(errors_of(CASES["carry"], recorder.steps, ranks=1)) <= BOUND[torch.float32]


@pytest.mark.parametrize("precision", [None, "scaler"])
def test_resuming_in_a_carried_window_is_bit_identical(tmp_path, precision):
    """Two epochs of five batches in windows of two: the checkpoint after the first holds one batch's gradient."""
    case = dataclasses.replace(CASES["carry, tokens"], precision=precision)
    whole, resumed = Recorder(), Recorder()
    path = tmp_path / "open.ckpt"
    arguments = {"epochs": 2, **({"plugins": [ScalerOnly()]} if precision else {})}
    fit(Probe(), [case.accumulation(), SaveAfterFirstEpoch(path), whole], case.data(0), **arguments)
    arguments = {"epochs": 2, **({"plugins": [ScalerOnly()]} if precision else {})}
    callbacks = [case.accumulation(), resumed]
    trainer = fit(Probe(), callbacks, case.data(0), fit_arguments={"ckpt_path": path}, **arguments)
    assert trainer.global_step == 5
    for step, expected in zip(resumed.steps, whole.steps[2:], strict=True):
        assert all(torch.equal(step["applied"][name], gradient) for name, gradient in expected["applied"].items())
    state = torch.load(path, weights_only=True)["callbacks"][callbacks[0].state_key]
    assert state["version"] == 1
    assert state["carried"]["position"] == 1


def test_resuming_between_windows_is_bit_identical(tmp_path):
    whole, resumed = Recorder(), Recorder()
    path = tmp_path / "closed.ckpt"
    fit(Probe(), [GradientAccumulation(2), SaveAfterFirstEpoch(path), whole], FIRST.data(0), epochs=2)
    fit(Probe(), [GradientAccumulation(2), resumed], FIRST.data(0), epochs=2, fit_arguments={"ckpt_path": path})
    for step, expected in zip(resumed.steps, whole.steps[3:], strict=True):
        assert all(torch.equal(step["applied"][name], gradient) for name, gradient in expected["applied"].items())


@pytest.mark.parametrize("order", [("ours", "stock"), ("stock", "ours")], ids=["removed", "added"])
def test_may_be_added_to_and_removed_from_a_resumed_run(tmp_path, order):
    accumulation = {"ours": [GradientAccumulation(2)], "stock": []}
    path = tmp_path / "last.ckpt"
    fit(Probe(), [*accumulation[order[0]], SaveAfterFirstEpoch(path)], FIRST.data(0))
    removed = order[0] == "ours"
    with pytest.warns(UserWarning, match="callbacks used to create") if removed else contextlib.nullcontext():
        trainer = fit(Probe(), accumulation[order[1]], FIRST.data(0), epochs=2, fit_arguments={"ckpt_path": path})
    assert trainer.global_step == 3 + 5


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("carry", [False, True])
def test_nothing_of_ours_remains_on_the_trainer(error, carry):
    _assert_untouched(failed(error, GradientAccumulation(2, carry=carry), FIRST.data(0), batch=2))
    _assert_untouched(fit(Probe(), [GradientAccumulation(2, carry=carry)], FIRST.data(0)))


def _assert_untouched(trainer):
    assert trainer.accumulate_grad_batches == 1
    assert "setup_data" not in vars(trainer.fit_loop)
    assert "_should_accumulate" not in vars(trainer.fit_loop.epoch_loop)
    assert "_make_zero_grad_fn" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)


def test_a_second_fit_starts_anew():
    accumulation, recorder = GradientAccumulation(2, carry=True), Recorder()
    for _ in range(2):
        recorder = Recorder()
        fit(Probe(), [accumulation, recorder], FIRST.data(0))
        case = dataclasses.replace(FIRST)  # the run's last window is short here too
        assert max(errors_of(case, recorder.steps, ranks=1)) <= BOUND[torch.float32]


def test_stochastic_weight_averaging_keeps_its_own_last_epoch():
    """Its last epoch runs without backward and sets the accumulation itself; no step may be taken there."""
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, device=None)

    class Normed(Probe):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(6)

        def training_step(self, batch, batch_idx):
            self.norm(batch["inputs"].flatten(0, 1))
            return super().training_step(batch, batch_idx)

    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(trainer.accumulate_grad_batches)

    trainer = fit(Normed(), [GradientAccumulation(2), averaging, Watch()], FIRST.data(0), epochs=2)
    assert seen == [2] * 10 + [6] * 5  # SWA sets one more than there are batches, so that none is stepped on
    assert trainer.accumulate_grad_batches == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"effective_batch_size": 8}, "2 batches of 4 samples per optimizer step (effective batch size 8)."),
        (
            {"schedule": {0: 1, 5: 4}},
            (
                "from step 0 on 1 batch of 4 samples per optimizer step (effective batch size 4); "
                "from step 5 on 4 batches of 4 samples per optimizer step (effective batch size 16)."
            ),
        ),
    ],
    ids=["effective batch size", "schedule"],
)
def test_says_once_what_a_step_is_made_of(arguments, line, caplog):
    with caplog.at_level("INFO"):
        data = torch.utils.data.DataLoader(Dictionaries(12), batch_size=4)
        fit(Probe(), [GradientAccumulation(**arguments)], data, epochs=2)
    assert [record.getMessage() for record in caplog.records if "GradientAccumulation" in record.getMessage()] == [
        f"GradientAccumulation: {line}"
    ]


def test_says_so_when_a_run_is_stopped_in_a_carried_window(caplog):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 2

    with caplog.at_level("INFO"):
        trainer = fit(Probe(), [GradientAccumulation(2, carry=True), Stops()], FIRST.data(0), epochs=2)
    assert trainer.global_step == 1
    assert "GradientAccumulation: the run ended 1 batches into a window, without a step." in caplog.messages


def test_survives_pickling_and_copying_before_fit():
    accumulation = GradientAccumulation(schedule={0: 1, 3: 2}, count=Tokens("labels"), carry=True)
    for twin in (pickle.loads(pickle.dumps(accumulation)), copy.deepcopy(accumulation)):
        assert twin.state_key == accumulation.state_key
        assert repr(twin.count) == "Tokens('labels', ignore_index=-100)"
    keys = {GradientAccumulation(2).state_key, GradientAccumulation(3).state_key, accumulation.state_key}
    assert len(keys) == 3


def test_the_callers_schedule_is_not_touched():
    schedule = {0: 1, 2: 3}
    fit(Probe(), [GradientAccumulation(schedule=schedule)], FIRST.data(0))
    assert schedule == {0: 1, 2: 3}


def test_state_is_small_and_plain():
    accumulation = GradientAccumulation(2)
    fit(Probe(), [accumulation], FIRST.data(0))
    buffer = io.BytesIO()
    torch.save(accumulation.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == {"version": 1, "reference": 4.0}
