"""Runs whose length changes: the schedule goes on where it stands, and ends with the run.

What is expected comes from a batch-by-batch simulation of Lightning's rule and from straight lines by hand.
"""

import logging
import math

import lightning.pytorch as unified
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.utils.data import DataLoader

from lightning_plugins import (
    GradientAccumulation,
    LearningRateScheduler,
    Linear,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)
from lightning_plugins.core.run_length import AccumulationPlan, RunAhead, RunEnd
from lightning_plugins.schedules.continuation import Course
from tests.support.training import loader, make_module, make_trainer, rates

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:Be aware that when using `ckpt_path`",
)


class StopAt(unified.Callback):
    """Saves a checkpoint after so many batches, an epoch's last ones at its end, and leaves as a killed run does."""

    def __init__(self, path, batches):
        self.path, self.left = path, batches

    def on_train_batch_end(self, trainer, *_):
        self.left -= 1
        if self.left == 0 and not trainer.is_last_batch:
            self.stop(trainer)

    def on_train_epoch_end(self, trainer, *_):
        if self.left == 0:
            self.stop(trainer)

    def stop(self, trainer):
        trainer.save_checkpoint(self.path)
        raise RuntimeError("killed")


def fit(path, schedule, batches, *, stop=None, ckpt_path=None, callbacks=(), **options):
    """Return the rates that were used and the callback; ``stop`` leaves the run after so many batches."""
    module, callback = make_module(lr=1.0), LearningRateScheduler(schedule, record=True)
    saving = [] if stop is None else [StopAt(path / "stopped.ckpt", stop)]
    trainer = make_trainer(path, callbacks=[callback, *callbacks, *saving], **options)
    if stop is None:
        trainer.fit(module, loader(batches), ckpt_path=ckpt_path)
    else:
        with pytest.raises(RuntimeError, match="killed"):
            trainer.fit(module, loader(batches), ckpt_path=ckpt_path)
    assert callback.lrs == rates(module)
    return rates(module), callback


def resumed(path, schedule, batches, **options):
    return fit(path, schedule, batches, ckpt_path=path / "stopped.ckpt", **options)


def simulate(batches, accumulate, epochs, epoch=0, batch=0, step=0):
    """Return the steps taken when the run ends, batch by batch."""
    for _ in range(epoch, epochs):
        while batch < batches:
            batch += 1
            step += batch % accumulate == 0 or batch == batches
        batch = 0
    return step


# -- against a simulation


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.integers(8, 40),
    batch_sizes=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    ranks=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    limits=st.tuples(st.sampled_from([None, 2, 3]), st.sampled_from([None, 2, 3])),
    accumulate=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    epochs=st.integers(2, 4),
    data=st.data(),
)
def test_any_change_on_resume_leaves_a_straight_line_to_the_end(
    tmp_path_factory, samples, batch_sizes, ranks, limits, accumulate, epochs, data
):
    before, after = (
        min(math.ceil(samples / (size * number)), limit or samples)
        for size, number, limit in zip(batch_sizes, ranks, limits, strict=True)
    )
    planned = simulate(before, accumulate[0], epochs)
    stop = data.draw(st.integers(1, before * epochs - 1), label="batches before the resume")
    epoch, batch = divmod(stop, before)
    taken = simulate(before, accumulate[0], epoch)
    taken += sum((index + 1) % accumulate[0] == 0 or index + 1 == before for index in range(batch))
    batch = batch if batch < after else 0  # Lightning begins an epoch anew that has fewer batches than are over
    total = simulate(after, accumulate[1], epochs, epoch, batch, taken)

    path = tmp_path_factory.mktemp("run")
    options = {"max_epochs": epochs}
    used, _ = fit(path, Linear(None, 1, 0), before, stop=stop, accumulate_grad_batches=accumulate[0], **options)
    assert used == pytest.approx([1 - step / planned for step in range(taken)])
    used, callback = resumed(path, Linear(None, 1, 0), after, accumulate_grad_batches=accumulate[1], **options)
    assert len(used) == total - taken
    assert callback.resolved == Linear(total, 1, 0)
    value = 1 - taken / planned  # where the line stood
    assert used == pytest.approx([value * (1 - step / (total - taken)) for step in range(total - taken)])
    if (before, accumulate[0]) == (after, accumulate[1]):  # nothing has changed: bit for bit
        assert used == [1.0 * Linear(planned, 1, 0)(step) for step in range(taken, planned)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.integers(1, 8), min_size=2, max_size=5), accumulate=st.integers(1, 3))
def test_a_loader_of_any_length_in_every_epoch_leaves_no_jump_and_ends_with_the_run(
    tmp_path_factory, batches, accumulate
):
    class Data(unified.LightningDataModule):
        def train_dataloader(self):
            return loader(batches[self.trainer.current_epoch])

    module, callback = make_module(lr=1.0), LearningRateScheduler(Linear(None, 1, 0))
    trainer = make_trainer(
        tmp_path_factory.mktemp("run"),
        callbacks=[callback],
        max_epochs=len(batches),
        reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, datamodule=Data())
    used, value, expected = rates(module), 1.0, []
    for epoch, number in enumerate(batches):
        steps = -(-number // accumulate)
        left = steps * (len(batches) - epoch)  # every later epoch is expected to be like this one
        expected += [value * (1 - step / left) for step in range(steps)]
        value *= 1 - steps / left
    assert used == pytest.approx(expected)
    assert callback.resolved.steps == len(used) == trainer.global_step


# -- one by one


def test_a_warm_up_in_epochs_that_is_over_stays_over(tmp_path):
    fit(tmp_path, WarmupCosine("2ep"), 8, stop=16, max_epochs=4)
    used, callback = resumed(tmp_path, WarmupCosine("2ep"), 16, max_epochs=4)
    assert callback.resolved == WarmupCosine(16, total=48)  # two epochs as they were, two as they are now
    assert used == pytest.approx([WarmupCosine(16, total=48)(step) for step in range(16, 48)])


def test_a_warm_up_in_epochs_that_is_under_way_ends_with_its_epoch(tmp_path):
    fit(tmp_path, WarmupLinear("2ep"), 8, stop=8, max_epochs=4)
    used, _ = resumed(tmp_path, WarmupLinear("2ep"), 4, max_epochs=4)
    assert used[:5] == pytest.approx([0.5, 0.625, 0.75, 0.875, 1.0])
    assert used[4:] == pytest.approx([1 - step / 8 for step in range(8)])


@pytest.mark.parametrize("warmup", ["25%", "1ep", 8])
def test_a_warm_up_that_is_over_stays_over_when_the_run_grows(tmp_path, warmup):
    fit(tmp_path, WarmupLinear(warmup), 8, stop=12, max_epochs=4)
    used, _ = resumed(tmp_path, WarmupLinear(warmup), 24, max_epochs=4)
    assert used == sorted(used, reverse=True)
    assert used[0] == pytest.approx(1 - 4 / 24)  # 12 of 8 + 24
    assert 0 < used[-1] < 0.02


def test_parts_in_steps_keep_their_length(tmp_path):
    fit(tmp_path, WarmupStableDecay(4, 6, shape="linear"), 8, stop=12, max_epochs=3)
    used, callback = resumed(tmp_path, WarmupStableDecay(4, 6, shape="linear"), 16, max_epochs=3)
    whole = WarmupStableDecay(4, 6, 12 + 12 + 16, shape="linear")  # 4 of 16 batches are over: 12 are left
    assert callback.resolved == whole
    assert used == [whole(step) for step in range(12, 40)]


def test_an_explicit_length_is_followed_in_any_run(tmp_path):
    fit(tmp_path, WarmupLinear(4, total=30), 8, stop=12, max_epochs=3)
    used, _ = resumed(tmp_path, WarmupLinear(4, total=30), 16, max_epochs=3)
    assert used == [WarmupLinear(4, total=30)(step) for step in range(12, 12 + 28)]


def test_more_epochs_and_another_loader_at_once(tmp_path):
    fit(tmp_path, Linear(None, 1, 0), 8, stop=16, max_epochs=2)  # at the end of the run: the rate is nearly 0
    used, callback = resumed(tmp_path, Linear(None, 1, 0), 16, max_epochs=4)
    assert callback.resolved == Linear(16 + 2 * 16, 1, 0)
    assert used == pytest.approx([0.5 * (1 - step / 32) for step in range(32)])  # half of the epochs are left


def test_a_run_that_changed_twice_resumes_exactly(tmp_path):
    options = {"max_epochs": 4}
    fit(tmp_path, Linear(None, 1, 0), 8, stop=8, **options)
    (tmp_path / "stopped.ckpt").rename(tmp_path / "first.ckpt")
    whole, _ = fit(tmp_path, Linear(None, 1, 0), 4, ckpt_path=tmp_path / "first.ckpt", **options)
    fit(tmp_path, Linear(None, 1, 0), 4, ckpt_path=tmp_path / "first.ckpt", stop=6, **options)
    used, _ = resumed(tmp_path, Linear(None, 1, 0), 4, **options)
    assert used == whole[6:]
    used, _ = resumed(tmp_path, Linear(None, 1, 0), 10, **options)  # 6 of 12 steps are over, 2 of 10 batches
    assert used == pytest.approx([0.75 * 0.5 * (1 - step / 18) for step in range(18)])


@pytest.mark.parametrize("batches", [3, 4, 6, 9, 16])
def test_a_checkpoint_of_an_epochs_last_batch_is_planned_as_lightning_goes_on_from_it(tmp_path, batches):
    class Save(unified.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    fit(tmp_path, Linear(None, 1, 0), 4, callbacks=[Save()], max_epochs=4)
    planned = []

    class Look(unified.Callback):
        def on_train_batch_start(self, trainer, *_):
            planned.append(trainer.callbacks[0].resolved.steps)

    used, _ = resumed(tmp_path, Linear(None, 1, 0), batches, callbacks=[Look()], max_epochs=4)
    assert set(planned) == {8 + len(used)}
    assert used == pytest.approx([0.5 * (1 - step / len(used)) for step in range(len(used))])


def test_a_second_fit_with_another_loader_goes_on(tmp_path):
    module, callback = make_module(lr=1.0), LearningRateScheduler(Linear(None, 1, 0))
    trainer = make_trainer(tmp_path, callbacks=[callback], max_epochs=1)
    trainer.fit(module, loader(10))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(5))
    assert rates(module) == pytest.approx([0.5 * (1 - step / 5) for step in range(5)])


def test_an_epoch_that_was_left_early_counts_as_it_was(tmp_path):
    class LeaveFirst(unified.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 0 and batch_idx == 2:
                raise StopIteration

    used, callback = fit(tmp_path, Linear(None, 1, 0), 10, callbacks=[LeaveFirst()], max_epochs=2)
    assert callback.resolved == Linear(13, 1, 0)
    assert used[:3] == [1 - step / 20 for step in range(3)]
    assert used[3:] == pytest.approx([0.85 * (1 - step / 10) for step in range(10)])


def test_a_loader_that_becomes_shorter_by_itself_is_asked_again(tmp_path):
    class Batches:
        """A batch sampler whose batches of so many tokens are fewer from the second epoch on."""

        epoch = 0

        def __len__(self):
            return 8 if self.epoch < 1 else 5

        def __iter__(self):
            return iter([[index] for index in range(len(self))])

        def set_epoch(self, epoch):
            self.epoch = epoch

    module, callback = make_module(lr=1.0), LearningRateScheduler(Linear(None, 1, 0))
    data = loader(8).dataset
    batches = Batches()
    batches.sampler = batches
    trainer = make_trainer(tmp_path, callbacks=[callback], max_epochs=3)
    trainer.fit(module, DataLoader(data, batch_sampler=batches))
    used = rates(module)
    assert len(used) == 8 + 5 + 5
    assert used[8:] == pytest.approx(falling_line(used[8], len(used) - 8))


def falling_line(value, steps):
    return [value * (1 - step / steps) for step in range(steps)]


def test_a_number_of_epochs_that_is_raised_in_mid_fit_is_followed(tmp_path):
    class Raise(unified.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.fit_loop.max_epochs = 4

    used, callback = fit(tmp_path, Linear(None, 1, 0), 5, callbacks=[Raise()], max_epochs=2)
    assert used[5:] == pytest.approx([Linear(20, 1, 0)(step) for step in range(5, 20)])
    assert callback.resolved == Linear(20, 1, 0)


def test_a_limit_of_steps_stays_the_length_with_any_loader(tmp_path):
    fit(tmp_path, WarmupLinear("2ep"), 4, stop=6, max_steps=20, max_epochs=-1)
    used, _ = resumed(tmp_path, WarmupLinear("2ep"), 16, max_steps=20, max_epochs=-1)
    assert used == pytest.approx([WarmupLinear(8, total=20)(step) for step in range(6, 20)])


def test_a_loader_whose_length_is_not_known_any_more_leaves_the_plan(tmp_path):
    class Data(unified.LightningDataModule):
        def train_dataloader(self):
            return loader(4, stream=self.trainer.current_epoch > 0)

    module, callback = make_module(lr=1.0), LearningRateScheduler(Linear(None, 1, 0))
    trainer = make_trainer(tmp_path, callbacks=[callback], max_epochs=3, reload_dataloaders_every_n_epochs=1)
    trainer.fit(module, datamodule=Data())
    assert rates(module) == [1 - step / 12 for step in range(12)]


def test_accumulation_that_is_announced_is_no_change(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        used, _ = fit(
            tmp_path, Linear(None, 1, 0), 8, callbacks=[GradientAccumulation(schedule={0: 1, 8: 4})], max_epochs=3
        )
    assert used == [1 - step / 12 for step in range(12)]
    assert caplog.text.count("Learning-rate schedule:") == 1


def test_a_change_is_told_in_one_line(tmp_path, caplog):
    class Grow(unified.LightningDataModule):
        def train_dataloader(self):
            return loader(4 if self.trainer.current_epoch == 0 else 6)

    callback = LearningRateScheduler(Linear(None, 1, 0))
    trainer = make_trainer(tmp_path, callbacks=[callback], max_epochs=4, reload_dataloaders_every_n_epochs=1)
    with caplog.at_level(logging.INFO):
        trainer.fit(make_module(), datamodule=Grow())
    lines = [line for line in caplog.messages if "Learning-rate schedule" in line]
    assert len(lines) == 2
    assert "Steps of the run: 22, before: 16; it goes on from where it stands (max_epochs=4 of 6 batches" in lines[1]


# -- a course by itself


def ahead(batches, accumulation=1, *, epoch=0, batch=0, step=0):
    return RunAhead(batches, AccumulationPlan(((0, accumulation),)), epoch, batch, step)


EPOCHS = RunEnd(2, None)


def test_a_run_whose_length_never_changed_follows_its_schedule_itself():
    schedule = WarmupLinear("20%")
    assert Course(ahead(10), ahead(10)).follow(schedule, EPOCHS) == schedule.resolve(20)


@pytest.mark.parametrize(
    ("course", "now", "end"),
    [
        # the share of a step that is rounded to none begins at another value
        (Course(ahead(10), ahead(10)), ahead(100), EPOCHS),
        (Course(ahead(None), ahead(None)), ahead(10, epoch=1, step=4), EPOCHS),
        (Course(ahead(4), ahead(4)), ahead(10, epoch=1, step=8), EPOCHS),
        (Course(ahead(10), ahead(10)), ahead(4, epoch=1, step=8), RunEnd(1, None)),
    ],
    ids=["before the first step", "its length was not known", "its schedule was over", "it is over now"],
)
def test_a_length_that_changes_where_nothing_is_left_to_stretch_counts_as_known_from_the_beginning(course, now, end):
    assert course.goes_on(now, end, [Linear("2%", 0, 1)]) == Course(now, now)


def test_a_schedule_that_no_longer_fits_is_followed_as_far_as_the_run_goes():
    schedule, now = WarmupCosine(10, hold=100), ahead(100, 4, step=50, batch=50)
    assert now.total_steps(EPOCHS) < 110
    course = Course(ahead(100), ahead(100)).goes_on(now, EPOCHS, [schedule])
    assert [course.follow(schedule, EPOCHS)(step) for step in (5, 50, 80)] == [0.5, 1, 1]


def test_other_accumulation_is_noted_also_where_the_length_stays():
    now, end = ahead(10, 2, step=3), RunEnd(None, 5)
    assert Course(ahead(10), ahead(10)).goes_on(now, end, [Linear(None, 1, 0)]) == Course(ahead(10), now, 3, 3.0)
    assert Course(ahead(10), now).goes_on(now, end, [Linear(None, 1, 0)]) == Course(ahead(10), now)
