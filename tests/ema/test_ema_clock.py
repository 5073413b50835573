"""When the average ticks: on applied steps, whatever makes or skips them."""

import lightning.pytorch as unified
import pytest
import torch
from torch import nn

from lightning_plugins import EMA, ConstantDecay, HalfLife, WarmupDecay
from lightning_plugins.core.lightning import MisconfigurationException
from tests.support.ema_runs import (
    THETA,
    WARMUP,
    Net,
    Script,
    Scripted,
    follow,
    numbers,
    regression,
    same,
    trainer,
)


def test_accumulation_updates_once_per_step():
    module, ema = Scripted(), EMA(0.9)
    trainer(ema, accumulate_grad_batches=3).fit(module, numbers(8))  # steps after batches 3, 6 and 8
    assert module.weight.item() == pytest.approx(WARMUP[2], rel=1e-6)
    assert ema.state_dict()["last_update"] == 3


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning says so once in a process
def test_batches_without_a_loss_do_not_tick():
    class Nothing(Scripted):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module, ema = Nothing(), EMA(0.9)
    fit = trainer(ema)
    fit.fit(module, numbers(10))
    assert fit.global_step == 10
    assert module.weight.item() == pytest.approx(WARMUP[4], rel=1e-6)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_update_interval_keeps_the_memory_of_the_average(every):
    rule = ConstantDecay(0.9)
    module, ema = Scripted(), EMA(rule, update_every_n_steps=every)
    trainer(ema).fit(module, numbers(10))
    expected, shadow = None, 0.0
    for n in range(every, 11, every):
        shadow = 0.9**every * shadow + (1 - 0.9**every) * THETA[n - 1]
        expected = shadow
    assert ema.average_state_dict()["weight"].item() == pytest.approx(expected, rel=1e-6)


class TwoOptimizers(unified.LightningModule):
    """Manual optimization of two weights, the second every other batch."""

    def __init__(self, first_steps=1):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.first_steps = first_steps
        self.between = lambda: None

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for _ in range(self.first_steps):
            first.zero_grad()
            self.manual_backward(self.a * 1.0)
            first.step()
        self.between()
        if batch_idx % 2:
            second.zero_grad()
            self.manual_backward(self.b * 1.0)
            second.step()

    def configure_optimizers(self):
        return Script([self.a]), Script([self.b])


def test_manual_optimization_with_two_optimizers_ticks_on_the_first():
    """Lightning's clock is global_step: with update_every_n_steps=2 it never updates here."""
    module, ema = TwoOptimizers(), EMA(ConstantDecay(0.5), update_every_n_steps=2)
    trainer(ema).fit(module, numbers(8))
    assert ema.state_dict()["last_update"] == 8
    a = follow([THETA[i] for i in (1, 3, 5, 7)], [0.25] * 4)[-1]
    b = follow(THETA[:4], [0.25] * 4)[-1]  # the second optimizer's weights are current at the end of the batch
    average = ema.average_state_dict()
    assert average["a"].item() == pytest.approx(a, rel=1e-6)
    assert average["b"].item() == pytest.approx(b, rel=1e-6)


def test_a_file_saved_between_two_optimizers_does_not_update_early(tmp_path):
    plain, saving = TwoOptimizers(), TwoOptimizers()
    saving.between = lambda: saving.trainer.save_checkpoint(tmp_path / "between.ckpt")
    averages = []
    for module in (plain, saving):
        ema = EMA(ConstantDecay(0.5))
        trainer(ema).fit(module, numbers(8))
        averages.append(ema.average_state_dict())
    assert same(*averages)


def test_several_steps_in_one_batch_decay_for_each():
    module, ema = TwoOptimizers(first_steps=3), EMA(ConstantDecay(0.5))
    trainer(ema).fit(module, numbers(2))
    assert ema.state_dict()["last_update"] == 6
    assert ema.average_state_dict()["a"].item() == pytest.approx(follow([THETA[2], THETA[5]], [0.125] * 2)[-1])


@pytest.mark.parametrize("way", ["by hand", "twice", "torch's", "toggled"])
def test_each_of_several_steps_in_one_batch_of_one_optimizer_is_an_update(way):
    class Steps(Scripted):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = way != "by hand"

        def training_step(self, batch, batch_idx):
            if self.automatic_optimization:
                return super().training_step(batch, batch_idx)
            for _ in range(2):
                self.manual_backward(super().training_step(batch, batch_idx))
                self.optimizers().step()
            return None

        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            step = optimizer.optimizer.step if way == "torch's" else optimizer.step
            if way == "toggled":
                with optimizer.toggle_model():
                    step(closure)
            else:
                step(closure)
            step()

    module, ema = Steps(), EMA(0.9)
    trainer(ema).fit(module, numbers(5))
    assert ema.state_dict()["last_update"] == 10
    assert module.weight.item() == pytest.approx(WARMUP[-1], rel=1e-6)


class Overflowing(Net):
    """Some batches overflow in float16."""

    bad = (2, 3, 6)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx in self.bad else loss


def amp(namespace):
    plugins = namespace.pytorch.plugins if hasattr(namespace, "pytorch") else namespace.plugins
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    return plugins.MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_scaler_skips_do_not_tick(fused):
    class Fused(Overflowing):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=fused)

    class Count(unified.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.weights.append(pl_module.net[0].weight.detach().clone())

    torch.manual_seed(0)
    module, ema, count = Fused(), EMA(0.9), Count()
    count.weights = [module.net[0].weight.detach().clone()]
    fit = trainer(ema, count, plugins=amp(unified))
    fit.fit(module, regression())
    assert fit.global_step == 8
    assert ema.state_dict()["last_update"] == 5
    changed = [b for a, b in zip(count.weights, count.weights[1:], strict=False) if not torch.equal(a, b)]
    assert len(changed) == 5
    shadow = count.weights[0].double()
    for n, weight in enumerate(changed, start=1):
        decay = WarmupDecay(0.9)(n)
        shadow = decay * shadow + (1 - decay) * weight
    average = ema.average_state_dict()["net.0.weight"]
    torch.testing.assert_close(average.double(), shadow, rtol=1e-5, atol=1e-6)


def test_no_sync_is_made_by_an_update(monkeypatch):
    """No number is read back from a tensor between two batches: on a GPU that would wait for the device."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _o=original, _n=name, **k: (reads.append(_n), _o(self, *a, **k))[1]
        )
    module, ema = Net(), EMA(0.9)

    class Watch(unified.Callback):
        def on_train_batch_end(self, *args):
            del reads[:]
            ema.on_train_batch_end(*args)
            ema.on_train_batch_start(args[0], args[1], None, 0)
            assert not reads

    trainer(Watch(), ema).fit(module, regression())
    assert ema.state_dict()["last_update"] == 8


@pytest.mark.parametrize("window", [1, 2])
def test_half_life_in_samples_counts_batch_window_and_ranks(window):
    module, ema = Scripted(), EMA(HalfLife(samples=24))
    trainer(ema, accumulate_grad_batches=window).fit(module, numbers(4, batch_size=6))
    decay = 2 ** (-6 * window / 24)
    assert ema.average_state_dict()["weight"].item() == pytest.approx(follow(THETA[: 4 // window], [decay] * 4)[-1])


def test_half_life_in_samples_needs_a_batch_size():
    loader = torch.utils.data.DataLoader([torch.ones(1, 1)] * 3, batch_size=None)
    with pytest.raises(MisconfigurationException, match="must find the batch size of the training loader"):
        trainer(EMA(HalfLife(samples=24))).fit(Scripted(), loader)
