"""Rates that others write: finetuning callbacks, searches, late groups; optimizers set up anew."""

import logging

import lightning.pytorch as unified
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, LearningRateFinder

from lightning_plugins import (
    Constant,
    Cosine,
    LearningRateScheduler,
    Linear,
    ScheduleLR,
    WarmupLinear,
)
from tests.support import conditions
from tests.support.training import RecordingSGD, loader, make_module, make_trainer, rates


def weights():
    return [torch.nn.Parameter(torch.ones(3))]


def train(optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.step()
        scheduler.step()


def two_layers(scheduler=None):
    """A module with a backbone, and an optimizer of what can be trained at first."""
    module = make_module(scheduler=scheduler)
    module.backbone, module.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    module.training_step = lambda batch, batch_idx: module.head(module.backbone(batch)).pow(2).mean()

    def configure_optimizers():
        module.optimizer = RecordingSGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        return module.optimizer if scheduler is None else ([module.optimizer], [scheduler(module.optimizer)])

    module.configure_optimizers = configure_optimizers
    return module


def fit(path, callback, *, callbacks=(), module=None, batches=4, ckpt_path=None, **options):
    module = module or make_module()
    trainer = make_trainer(path, callbacks=[*callbacks, *([] if callback is None else [callback])], **options)
    trainer.fit(module, loader(batches), ckpt_path=ckpt_path)
    return module


class Write(unified.Callback):
    """Writes a rate at the beginning of a batch."""

    def __init__(self, step, rate, group=0):
        self.step, self.rate, self.group = step, rate, group

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.optimizers[0].param_groups[self.group]["lr"] = self.rate


# -- a rate that was written is taken at its word


@pytest.mark.parametrize("step", [1, 2, 5, 9])
@pytest.mark.parametrize("schedule", [Linear(10, 1, 0), WarmupLinear(3, total=10), Constant(), Cosine(10, 1, 0.1)])
def test_a_written_rate_is_the_rate_of_its_step_and_scales_what_follows(tmp_path, step, schedule):
    callback = LearningRateScheduler(schedule, record=True)
    module = fit(tmp_path, callback, callbacks=[Write(step, 0.03)], batches=10)
    assert rates(module)[:step] == pytest.approx([0.1 * schedule(t) for t in range(step)])
    assert rates(module)[step] == 0.03
    base = 0.03 / schedule(step)
    assert rates(module)[step:] == pytest.approx([base * schedule(t) for t in range(step, 10)])
    assert callback.lrs == rates(module)


def test_a_rate_written_where_the_factor_is_0_becomes_the_base():
    optimizer = RecordingSGD(weights(), lr=0.1)
    scheduler = ScheduleLR(optimizer, WarmupLinear(2, total=6))
    optimizer.param_groups[0]["lr"] = 0.04
    train(optimizer, scheduler, 3)
    assert [used[0] for used in optimizer.used] == pytest.approx([0.04, 0.02, 0.04])


def test_a_rate_that_is_a_tensor_may_be_written_in_place_or_exchanged():
    for write in (lambda group: group["lr"].fill_(0.25), lambda group: group.update(lr=torch.tensor(0.25))):
        optimizer = torch.optim.SGD(weights(), lr=torch.tensor(1.0), foreach=False)
        scheduler = ScheduleLR(optimizer, Linear(4, 1, 0))
        train(optimizer, scheduler, 2)
        write(optimizer.param_groups[0])
        train(optimizer, scheduler, 1)
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.125)
        assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.5)


def test_other_hyperparameters_may_be_written_too():
    optimizer = RecordingSGD(weights(), lr=0.1, weight_decay=0.2)
    scheduler = ScheduleLR(optimizer, Linear(4, 1, 0), parameter="weight_decay")
    train(optimizer, scheduler, 2)
    optimizer.param_groups[0]["weight_decay"] = 0.4
    train(optimizer, scheduler, 1)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.2)


@pytest.mark.parametrize("ours", [None, Constant(), Cosine(20, 1, 0)])
def test_beside_backbone_finetuning_rates_are_those_of_torch(tmp_path, ours):
    """With Constant they are those of no scheduler at all, bit for bit; with Cosine those beside torch's own."""

    def cosine(optimizer):
        return {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20), "interval": "step"}

    def run(callback, scheduler=None):
        finetuning = BackboneFinetuning(2, lambda_func=lambda epoch: 1.5)
        module = two_layers(scheduler)
        return fit(tmp_path, callback, callbacks=[finetuning], module=module, max_epochs=5).optimizer.used

    expected = run(None, cosine if isinstance(ours, Cosine) else None)
    found = run(None if ours is None else LearningRateScheduler(ours))
    if isinstance(ours, Cosine):
        for theirs, used in zip(expected, found, strict=True):
            assert used == pytest.approx(theirs, rel=1e-9)
    else:
        assert found == expected
    assert len(found[-1]) == 2


# -- groups that come later


class Unfreeze(BaseFinetuning):
    """Unfreezes the backbone at an epoch, with a tenth of the rate."""

    def __init__(self, epoch=2):
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, initial_denom_lr=10)


@pytest.mark.parametrize("base_lr", [None, 0.1, [0.1]])
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_group_that_comes_later_keeps_its_share_and_resumes_exactly(tmp_path, base_lr, ours_first):
    def run(ckpt_path=None, epochs=3, save=None):
        callback = LearningRateScheduler(Cosine(12, 1, 0.2), base_lr=base_lr, record=True)
        callbacks = [callback, Unfreeze()] if ours_first else [Unfreeze(), callback]
        module = two_layers()
        trainer = make_trainer(tmp_path, callbacks=callbacks, max_epochs=epochs)
        trainer.fit(module, loader(4), ckpt_path=ckpt_path)
        if save is not None:
            trainer.save_checkpoint(save)
        return module.optimizer.used, callback.lrs

    whole, recorded = run()
    shares = [used[1] / used[0] for used in whole if len(used) > 1]
    assert shares == pytest.approx([0.1] * 4)
    assert recorded == [used[0] if len(used) == 1 else tuple(used) for used in whole]
    run(save=tmp_path / "end.ckpt")
    longer, _ = run(ckpt_path=tmp_path / "end.ckpt", epochs=4)
    assert longer == [pytest.approx([0.1 * 0.2, 0.01 * 0.2])] * 4


def test_a_group_with_a_rate_of_its_own_keeps_it_when_a_state_is_loaded():
    optimizer = RecordingSGD(weights(), lr=0.5)
    scheduler = ScheduleLR(optimizer, Constant(), base_lr=0.1)
    optimizer.add_param_group({"params": weights(), "lr": 0.003})
    train(optimizer, scheduler, 2)
    assert scheduler.get_last_lr() == [0.1, 0.003]
    saved = optimizer.state_dict(), scheduler.state_dict()
    assert saved[1]["own_base"] == [1]
    scheduler.load_state_dict(saved[1])
    assert scheduler.get_last_lr() == [0.1, 0.003]
    for given in (0.1, [0.1, None], [0.1, 0.7], None):
        other = RecordingSGD([{"params": weights()}, {"params": weights()}], lr=0.9)
        resumed = ScheduleLR(other, Constant(), base_lr=given)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        assert resumed.get_last_lr() == [0.1, 0.003]


def test_a_group_that_was_added_right_before_the_checkpoint_keeps_its_rate():
    optimizer = RecordingSGD(weights(), lr=0.1)
    scheduler = ScheduleLR(optimizer, Linear(10, 1, 0), base_lr=[0.1])
    train(optimizer, scheduler, 5)
    optimizer.add_param_group({"params": weights(), "lr": 0.01})
    saved = optimizer.state_dict(), scheduler.state_dict()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    train(optimizer, scheduler, 2)
    assert [used[1] for used in optimizer.used[5:]] == pytest.approx([0.01, 0.01 * 0.4 / 0.5])


def test_an_optimizers_state_that_is_loaded_is_no_rate_that_was_written():
    optimizer = RecordingSGD(weights(), lr=0.1)
    scheduler = ScheduleLR(optimizer, Linear(10, 1, 0))
    train(optimizer, scheduler, 2)
    best = optimizer.state_dict()
    train(optimizer, scheduler, 3)
    optimizer.load_state_dict(best)
    train(optimizer, scheduler, 2)
    assert scheduler.get_last_lr() == pytest.approx([0.1 * 0.3])


class RestoreAt(unified.Callback):
    """Restores the last epoch's checkpoint in mid-fit: weights, optimizers and schedulers, not the loops."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            connector = trainer._checkpoint_connector
            connector.resume_start(str(self.path))
            connector.restore_model()
            connector.restore_optimizers_and_schedulers()
            connector.resume_end()


@pytest.mark.parametrize("base_lr", [None, 0.1])
def test_a_checkpoint_that_is_restored_in_mid_fit_leaves_the_schedule_where_the_run_stands(tmp_path, base_lr):
    callback = LearningRateScheduler(Linear(12, 1, 0), base_lr=base_lr, record=True)
    module = fit(tmp_path, callback, callbacks=[RestoreAt(tmp_path / "best.ckpt")], max_epochs=3)
    assert rates(module) == callback.lrs == pytest.approx([0.1 * (1 - step / 12) for step in range(12)])


# -- in mid-fit


class Exchange(unified.Callback):
    """Sets the optimizers up anew at an epoch, as a finetuning callback may."""

    def __init__(self, epoch, batch=0):
        self.epoch, self.batch = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            self.old = pl_module.optimizer
            trainer.strategy.setup_optimizers(trainer)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("clock", ["attempted", "applied"])
def test_an_optimizer_that_is_set_up_anew_is_followed(tmp_path, caplog, batch, clock):
    schedule, exchange = Linear(12, 1, 0), Exchange(1, batch)
    callback = LearningRateScheduler(schedule, clock=clock, record=True)
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, callback, callbacks=[exchange], max_epochs=3)
    used = [rate for [rate] in exchange.old.used + module.optimizer.used]
    assert used == callback.lrs == pytest.approx([0.1 * schedule(step) for step in range(12)])
    assert f"follows an optimizer that was set up anew, from step {4 + batch} on" in caplog.text
    for optimizer in (exchange.old, module.optimizer):  # nothing of ours stays on either
        assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_that_is_put_in_the_old_ones_place_is_followed(tmp_path):
    """As finetuning-scheduler does: the list of optimizers is another one, that of schedulers stays."""

    class Put(unified.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.strategy.optimizers = [RecordingSGD(pl_module.layer.parameters(), lr=0.4)]

    module, callback = make_module(), LearningRateScheduler(Linear(12, 1, 0), record=True)
    fit(tmp_path, callback, callbacks=[Put()], module=module, max_epochs=3)
    line = [1 - step / 12 for step in range(12)]
    assert callback.lrs == pytest.approx([0.1 * value for value in line[:4]] + [0.4 * value for value in line[4:]])
    assert len(module.trainer.lr_scheduler_configs) == 1


def test_a_new_optimizer_whose_module_brings_a_scheduler_has_it_replaced_again(tmp_path):
    module = make_module(scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1))
    exchange = Exchange(1)
    fit(
        tmp_path,
        LearningRateScheduler(Linear(12, 1, 0), existing="replace"),
        callbacks=[exchange],
        module=module,
        max_epochs=3,
    )
    used = [rate for [rate] in exchange.old.used + module.optimizer.used]
    assert used == pytest.approx([0.1 * (1 - step / 12) for step in range(12)])
    assert len(module.trainer.lr_scheduler_configs) == 1


@pytest.mark.parametrize("existing", ["refuse", "replace"])
def test_a_new_optimizer_that_comes_with_a_scheduler_is_left_to_it_unless_that_is_to_be_replaced(
    tmp_path, caplog, existing
):
    class Bring(Exchange):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    exchange, line = Bring(1), [0.1 * (1 - step / 12) for step in range(12)]
    callback = LearningRateScheduler(Linear(12, 1, 0), existing=existing)
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, callback, callbacks=[exchange], max_epochs=3)
    used = [rate for [rate] in exchange.old.used + module.optimizer.used]
    assert used == pytest.approx(line if existing == "replace" else [*line[:4], *[0.1] * 4, *[0.05] * 4])
    assert ("leaves an optimizer to the scheduler that has replaced its own" in caplog.text) == (existing == "refuse")
    assert len(module.trainer.lr_scheduler_configs) == 1


class SearchAt(LearningRateFinder):
    """Lightning's pattern for a search at milestones."""

    def __init__(self, *milestones):
        super().__init__(num_training_steps=30, early_stop_threshold=None)
        self.milestones = milestones

    def on_fit_start(self, *args):
        if "start" in self.milestones:
            super().on_fit_start(*args)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in self.milestones:
            self.lr_find(trainer, pl_module)


@conditions.rate_of_a_search_in_mid_fit
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_search_for_a_rate_in_mid_fit_leaves_no_steps_and_its_rate_is_taken(tmp_path, ours_first):
    schedule = Linear(120, 1, 0)
    callback, search = LearningRateScheduler(schedule, record=True), SearchAt(1)
    module = make_module()
    callbacks = [callback, search] if ours_first else [search, callback]
    make_trainer(tmp_path, callbacks=callbacks, max_epochs=3).fit(module, loader(40))
    assert len(callback.lrs) == 120
    assert callback.lrs[:40] == pytest.approx([0.1 * schedule(step) for step in range(40)])
    found = search.optimal_lr.suggestion()
    assert found is not None
    assert callback.lrs[40:] == pytest.approx([found / schedule(40) * schedule(step) for step in range(40, 120)])


@conditions.whole_run_after_a_search
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_search_before_the_first_step_gives_the_base_rate_in_any_order(tmp_path, ours_first):
    schedule = WarmupLinear(4, total=120, start=0.1)
    callback, search = LearningRateScheduler(schedule, record=True), SearchAt("start")
    module = make_module()
    callbacks = [callback, search] if ours_first else [search, callback]
    make_trainer(tmp_path, callbacks=callbacks, max_epochs=3).fit(module, loader(40))
    found = search.optimal_lr.suggestion()
    assert found is not None
    assert callback.lrs == pytest.approx([found * schedule(step) for step in range(120)])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, RecordingSGD])
@pytest.mark.parametrize("clock", ["attempted", "applied"])
def test_the_first_step_of_a_new_optimizer_counts_once_for_any_class(tmp_path, kind, clock):
    module, callback = make_module(), LearningRateScheduler(Linear(12, 1, 0), clock=clock, record=True)

    def configure_optimizers():
        module.optimizer = kind(module.layer.parameters(), lr=0.1)
        return module.optimizer

    module.configure_optimizers = configure_optimizers
    fit(tmp_path, callback, callbacks=[Exchange(1, 1)], module=module, max_epochs=3)
    assert callback.lrs == pytest.approx([0.1 * (1 - step / 12) for step in range(12)])
