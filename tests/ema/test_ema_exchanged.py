"""The optimizer, the weights and other averages may come and go while a fit runs."""

import lightning.pytorch as unified
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint

from lightning_plugins import EMA, ConstantDecay, PostHocEMA, extract_weights
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.ema.snapshots import list_snapshots
from tests.support import conditions
from tests.support.ema_changes import At, Weights, Wide, averaged
from tests.support.ema_runs import THETA, Script, Scripted, follow, numbers, regression, same, trainer

# -- the optimizer


class NoHooks:
    """A wrapper around an optimizer that is none of torch's and fires no hook, as schedule-free ones are."""

    def __init__(self, base):
        self.base, self.param_groups, self.state, self.defaults = base, base.param_groups, base.state, base.defaults

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])
        return loss

    def zero_grad(self, set_to_none=True):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)


class NoInit(NoHooks, torch.optim.Optimizer):
    """One of torch's without its ``__init__``, as timm's Lookahead is."""


@pytest.mark.parametrize("kind", [NoHooks, NoInit])
def test_optimizers_without_hooks_are_followed(kind):
    class Wrapped(Wide):
        def configure_optimizers(self):
            return kind(torch.optim.SGD(self.parameters(), lr=self.lr))

    module, ema, look = Wrapped(), EMA(ConstantDecay(0.9)), Weights()
    start = module.head.weight.detach().clone()
    fit = trainer(ema, look, max_epochs=2)
    fit.fit(module, regression(), regression(8))
    assert ema.state_dict()["last_update"] == 16
    expected = averaged(start, look.seen, "head.weight")
    torch.testing.assert_close(ema.average_state_dict()["head.weight"], expected, rtol=1e-5, atol=1e-6)
    assert "step" not in vars(fit.optimizers[0])


def test_steps_by_hand_that_the_trainer_counts_are_followed(caplog):
    class ByHand(Wide):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            closure()
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.sub_(parameter.grad, alpha=self.lr)

    module, ema = ByHand(), EMA(0.9)
    with caplog.at_level("INFO"):
        trainer(ema, max_epochs=2).fit(module, regression())
    assert ema.state_dict()["last_update"] == 16
    assert caplog.text.count("SGD does not announce its steps") == 1


def test_steps_that_a_module_leaves_out_do_not_tick():
    class LeavesOut(Wide):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            if batch_idx % 2:
                optimizer.step(closure)
            else:
                closure()

    module, ema = LeavesOut(), EMA(0.9)
    fit = trainer(ema, max_epochs=2)
    fit.fit(module, regression())
    assert fit.global_step == 16
    assert ema.state_dict()["last_update"] == 8


@pytest.mark.parametrize("batch", [False, True], ids=["at an epoch's beginning", "in mid-epoch"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_exchanged_optimizer_is_followed(tmp_path, caplog, batch, first):
    def exchange(trainer, module):
        trainer.strategy.setup_optimizers(trainer)

    module, ema, look = Wide(), EMA(ConstantDecay(0.9)), Weights()
    post = PostHocEMA(every_n_steps=8, dirpath=tmp_path)
    start = module.head.weight.detach().clone()
    change = At(11 if batch else 8, exchange, batch=batch)
    with caplog.at_level("INFO"):
        trainer(*([change, ema, post] if first else [ema, post, change]), look, max_epochs=3).fit(module, regression())
    assert ema.state_dict()["last_update"] == 24
    expected = averaged(start, look.seen, "head.weight")
    torch.testing.assert_close(ema.average_state_dict()["head.weight"], expected, rtol=1e-5, atol=1e-6)
    assert [snapshot.step for snapshot in list_snapshots(tmp_path)] == [8, 16, 24]
    assert caplog.text.count("EMA(name='ema'): another optimizer was set up") == 1


def test_an_optimizer_exchanged_inside_a_batch_loses_no_step():
    class Exchanges(Wide):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 5:
                self.trainer.strategy.setup_optimizers(self.trainer)
            return super().training_step(batch, batch_idx)

    ema = EMA(0.9)
    fit = trainer(ema, max_epochs=2)
    fit.fit(Exchanges(), regression())
    assert ema.state_dict()["last_update"] == fit.global_step


# -- weights that are restored in mid-fit


@pytest.mark.parametrize("checkpoint", ["average", "raw"])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_checkpoint_restored_in_mid_fit_restores_both_sets(tmp_path, checkpoint, where):
    """As finetuning-scheduler does: the strategy loads the weights, no callback is asked."""

    def restore(trainer, module):
        trainer.strategy.load_model_state_dict(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True))

    class InValidation(unified.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            if trainer.current_epoch == 1:
                restore(trainer, pl_module)

    module, ema, look = Wide(), EMA(ConstantDecay(0.9), checkpoint=checkpoint), Weights()
    files = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    restoring = At(16, restore) if where == "training" else InValidation()
    trainer(ema, restoring, look, files, max_epochs=3).fit(module, regression(), regression(8))
    average = extract_weights(tmp_path / "epoch=0.ckpt")["head.weight"]
    expected = averaged(average, look.seen[16:], "head.weight")
    torch.testing.assert_close(ema.average_state_dict()["head.weight"], expected, rtol=1e-5, atol=1e-6)
    raw = extract_weights(tmp_path / "epoch=0.ckpt", "raw")

    twin, again = Wide(), Weights()
    twin.load_state_dict(raw)
    trainer(again).fit(twin, regression())
    assert torch.equal(look.seen[-1]["head.weight"], again.seen[-1]["head.weight"])
    assert ema.state_dict()["last_update"] == 16  # 8 of the file and 8 since


def test_plain_weights_loaded_in_mid_fit_begin_a_new_average(caplog):
    def load(trainer, module):
        ones = {name: torch.ones_like(value) for name, value in module.state_dict().items()}
        trainer.strategy.load_model_state_dict({"state_dict": ones})

    module, ema, look = Wide(lr=1e-5), EMA(ConstantDecay(0.9)), Weights()
    with caplog.at_level("INFO"):
        trainer(ema, At(8, load), look, max_epochs=2).fit(module, regression(), regression(8))
    expected = averaged(torch.ones(1, 4), look.seen[8:], "head.weight")
    torch.testing.assert_close(ema.average_state_dict()["head.weight"], expected)
    assert caplog.text.count("weights without an average were loaded; the average begins anew") == 1


def test_post_hoc_averages_are_restored_in_mid_fit(tmp_path):
    def restore(trainer, module):
        trainer.strategy.load_model_state_dict(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True))

    post = PostHocEMA(every_n_steps=4, dirpath=tmp_path / "snapshots")
    files = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(post, At(16, restore), files, max_epochs=3).fit(Wide(), regression())
    assert [snapshot.step for snapshot in list_snapshots(tmp_path / "snapshots")] == [4, 8, 12, 16]
    assert (tmp_path / "snapshots" / "superseded-1").is_dir()
    assert post.state_dict()["last_update"] == 16


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_learning_rate_search_in_mid_fit_leaves_no_trace(tmp_path, first):
    class AtMilestone(LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    def run(*callbacks):
        module, ema = Wide(), EMA(ConstantDecay(0.9))
        post = PostHocEMA(every_n_steps=8, dirpath=tmp_path / str(len(callbacks)))
        order = [*callbacks, ema, post] if first else [ema, post, *callbacks]
        trainer(*order, max_epochs=3, default_root_dir=tmp_path, enable_checkpointing=True).fit(module, regression())
        return ema, post

    (plain, plain_post), (searched, post) = (
        run(),
        run(AtMilestone(num_training_steps=5, update_attr=False, early_stop_threshold=None)),
    )
    assert searched.state_dict() == plain.state_dict()
    assert same(searched.average_state_dict(), plain.average_state_dict())
    assert same(searched.raw_state_dict(), plain.raw_state_dict())
    steps = [[snapshot.step for snapshot in list_snapshots(found.dirpath)] for found in (plain_post, post)]
    assert steps == [[8, 16, 24]] * 2


# -- writers


AVERAGING = {"StochasticWeightAveraging": {"swa_lrs": 0.01}, "EMAWeightAveraging": {}}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "name", ["StochasticWeightAveraging", pytest.param("EMAWeightAveraging", marks=conditions.ema_weight_averaging)]
)
def test_lightnings_own_averaging_beside_it_is_refused(name, first):
    other = getattr(unified.callbacks, name)(**AVERAGING[name])
    callbacks = [other, EMA(0.9)] if first else [EMA(0.9), other]
    with pytest.raises(MisconfigurationException, match=f"must be the only callback .* got {name}"):
        trainer(*callbacks).fit(Wide(), regression())


def test_an_optimizer_that_writes_into_the_average_in_evaluation_is_warned_about():
    class ScheduleFree(Wide):
        def on_validation_epoch_start(self):
            with torch.no_grad():
                self.head.weight.add_(1.0)

        def on_validation_epoch_end(self):
            with torch.no_grad():
                self.head.weight.sub_(1.0)

    with pytest.warns(LightningPluginsWarning, match="the average was written into while it was evaluated"):
        trainer(EMA(0.9)).fit(ScheduleFree(), regression(), regression(8))
    trainer(EMA(0.9, evaluate="raw")).fit(ScheduleFree(), regression(), regression(8))


def test_another_average_shown_in_an_evaluation_is_no_write():
    class Look(unified.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            with other.averaged(pl_module):
                pass

    other = EMA(0.5, name="b", evaluate="raw", checkpoint="raw", after_fit="raw")
    trainer(EMA(0.9), other, Look()).fit(Wide(), regression(), regression(8))


def test_scripted_runs_are_what_they_were():
    """A run in which nothing changes: the formula, bit for bit as in float64 rounded at each step."""

    class Double(Scripted):
        def configure_optimizers(self):
            return Script(self.parameters(), THETA)

    module, ema = Double().double(), EMA(ConstantDecay(0.5))
    trainer(ema, precision="64-true").fit(module, numbers(10))
    assert ema.average_state_dict()["weight"].item() == follow(THETA, [0.5] * 10)[-1]
