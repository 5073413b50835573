"""Averages whose decay follows a curve, and lengths that are shares of the run: against DINO's and BYOL's formulas."""

import math
from dataclasses import dataclass

import lightning.pytorch as unified
import numpy as np
import pytest
import torch

from lightning_plugins import (
    EMA,
    ConstantDecay,
    Cosine,
    DecayRule,
    HalfLife,
    Linear,
    WarmupCosine,
    WarmupDecay,
)
from lightning_plugins.core.durations import RunLengthUnknownError
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.ema.function_decay import as_decay_rule
from tests.support.ema_runs import THETA, Scripted, follow, numbers, same, trainer


def dino(base, final, epochs, steps_per_epoch):
    """The momentum curve of DINO's `utils.cosine_scheduler`, without a warm-up; entry i is used by iteration i."""
    total = epochs * steps_per_epoch
    return final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(total) / total))


def byol(tau, total):
    """1 - (1 - tau) (cos(pi k / K) + 1) / 2, as in the paper, for k = 0 to K - 1."""
    return [1 - (1 - tau) * (math.cos(math.pi * k / total) + 1) / 2 for k in range(total)]


def tau_of(n):
    """A function of a module, as a configuration names it."""
    return 1 - 1 / (n + 1)


@dataclass(frozen=True)
class Halving(DecayRule):
    """A rule of a user's own: 1 - 2^-n."""

    def _single(self, n):
        return 1 - 0.5**n


def averaged(decay, steps=10, *, every=1, **options):
    """The average of the scripted weights after so many steps."""
    ema = EMA(decay, update_every_n_steps=every, **options)
    trainer(ema).fit(Scripted(), numbers(steps))
    return ema.average_state_dict()["weight"].item()


def recursion(decays, every=1, start=0.0, theta=THETA):
    """The average in float64, updated every so many steps with the product of their decays."""
    products = [math.prod(decays[end - every : end]) for end in range(every, len(decays) + 1, every)]
    return follow([theta[(end - 1) % len(theta)] for end in range(every, len(decays) + 1, every)], products, start)[-1]


# -- curves


@pytest.mark.parametrize("base", [0.996, 0.9])
def test_a_cosine_is_dinos_and_byols_momentum(base):
    rule = as_decay_rule(Cosine(None, base, 1.0)).resolve(60, 20)
    assert [rule(n) for n in range(1, 61)] == pytest.approx(list(dino(base, 1.0, 3, 20)), rel=1e-14)
    assert [rule(n) for n in range(1, 61)] == pytest.approx(byol(base, 60), rel=1e-14)
    assert rule(61) == rule(1000) == 1.0


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_run_follows_dinos_momentum_at_any_interval(every):
    decays = [float(decay) for decay in dino(0.5, 1.0, 1, 10)]
    assert averaged(Cosine(None, 0.5, 1.0), every=every) == pytest.approx(recursion(decays, every), rel=1e-6)


def test_a_function_of_n_counts_from_1_and_is_taken_at_each_step():
    decays = [tau_of(n) for n in range(1, 11)]
    for decay in (tau_of, f"{__name__}.tau_of"):
        assert averaged(decay) == pytest.approx(recursion(decays), rel=1e-6)
        assert averaged(decay, every=5) == pytest.approx(recursion(decays, 5), rel=1e-6)
    assert as_decay_rule(tau_of) == as_decay_rule(f"{__name__}.tau_of")
    assert as_decay_rule(lambda n: min(0.9, (1 + n) / (10 + n)))(7, 3) == pytest.approx(WarmupDecay(0.9)(7, 3))


def test_a_rule_of_ones_own_needs_a_single_step_only():
    decays = [1 - 0.5**n for n in range(1, 11)]
    assert averaged(Halving(), every=2) == pytest.approx(recursion(decays, 2), rel=1e-6)
    assert Halving()(3, steps=3) == pytest.approx(0.5 * 0.75 * 0.875)


def test_any_schedule_with_resolve_will_do():
    class Foreign:
        def __init__(self, total=None):
            self.total = total

        def __call__(self, step):
            return step / self.total

        def resolve(self, total_steps, steps_per_epoch=None):
            assert steps_per_epoch == 5
            return Foreign(total_steps)

    ema = EMA(Foreign())
    trainer(ema, max_epochs=2).fit(Scripted(), numbers(5))
    expected = recursion([step / 10 for step in range(10)])
    assert ema.average_state_dict()["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_a_curve_that_fills_the_rest_begins_with_the_average():
    """Shares are of the whole run: of 20 steps, 20 % are 4."""
    rest = [float(decay) for decay in dino(0.5, 1.0, 1, 10)]
    after_10 = EMA(Cosine(None, 0.5, 1.0), start_step="50%")
    share = EMA(Linear("20%", 0.5, 1.0), start_step="50%", name="share", evaluate="raw", checkpoint="raw")
    trainer(after_10, share).fit(Scripted(), numbers(20))
    assert after_10.average_state_dict()["weight"].item() == pytest.approx(recursion(rest, start=10.0), rel=1e-6)
    ramp = [0.5 + 0.125 * min(step, 4) for step in range(10)]
    assert share.average_state_dict()["weight"].item() == pytest.approx(recursion(ramp, start=10.0), rel=1e-6)


# -- lengths


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (HalfLife("20%"), 4),
        (HalfLife(0.2), 4),
        (HalfLife(steps="1ep"), 10),
        (HalfLife("0.5 ep"), 5),
        (HalfLife("7%"), 1),
        (HalfLife(7.5), 7.5),
    ],
    ids=repr,
)
def test_a_half_life_is_a_duration(rule, steps):
    assert rule.resolve(20, 10) == HalfLife(steps=steps)
    assert rule.resolve(20, 10)(3) == 2 ** (-1 / steps)
    ema = EMA(rule)
    trainer(ema, max_epochs=2).fit(Scripted(), numbers(10))
    expected = recursion([2 ** (-1 / steps)] * 20)
    assert ema.average_state_dict()["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_a_half_life_in_steps_is_the_same_in_every_run():
    assert HalfLife(steps=3).resolve(10) == HalfLife(steps=3)


def test_a_half_life_of_no_step_copies():
    assert HalfLife("1%").resolve(10)(1) == 0.0
    assert HalfLife(samples=1).for_samples_per_step(2)(1) == 0.25


@pytest.mark.parametrize("start", ["50%", 0.5, "1ep", 10])
def test_an_average_starts_at_a_share_of_the_run(start):
    ema = EMA(ConstantDecay(0.5), start_step=start)
    trainer(ema, max_epochs=2).fit(Scripted(), numbers(10))
    assert ema.state_dict() == {"version": 1, "applied_steps": 20, "origin": 10, "last_update": 10}
    assert ema.average_state_dict()["weight"].item() == pytest.approx(recursion([0.5] * 10, start=10.0), rel=1e-6)


def test_an_interval_is_a_duration():
    assert averaged(ConstantDecay(0.9), every="20%") == averaged(ConstantDecay(0.9), every=2)
    assert averaged(ConstantDecay(0.9), every="1%") == averaged(ConstantDecay(0.9), every=1)


# -- the length of the run


class Save(unified.Callback):
    """Writes a checkpoint after a certain step, in the middle of an epoch."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(decay, *callbacks, epochs=4, ckpt_path=None, start=0, every=1, **settings):
    """Fit scripted weights, in epochs of six steps; batches are alike, so a resume may begin in their middle."""
    ema = EMA(decay, start_step=start, update_every_n_steps=every)
    trainer(ema, *callbacks, max_epochs=epochs, **settings).fit(Scripted(), numbers(6), ckpt_path=ckpt_path)
    return ema


@pytest.mark.parametrize(
    ("decay", "start", "every"),
    [(Cosine(None, 0.5, 1.0), 0, 1), (tau_of, "25%", "10%"), (HalfLife("20%"), "1ep", 3), (Halving(), "75%", 2)],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, decay, start, every):
    whole = run(decay, Save(tmp_path / "cut.ckpt", 14), start=start, every=every)
    resumed = run(decay, start=start, every=every, ckpt_path=tmp_path / "cut.ckpt")
    assert same(resumed.average_state_dict(), whole.average_state_dict())
    assert resumed.state_dict() == whole.state_dict()
    assert not same(whole.average_state_dict(), whole.raw_state_dict())


def test_a_longer_horizon_is_followed_from_the_first_step_after_a_resume(tmp_path):
    run(Cosine(None, 0.5, 1.0), Save(tmp_path / "cut.ckpt", 12))
    longer = run(Cosine(None, 0.5, 1.0), epochs=8, ckpt_path=tmp_path / "cut.ckpt")
    decays = [*dino(0.5, 1.0, 4, 6)[:12], *dino(0.5, 1.0, 8, 6)[12:]]
    assert longer.average_state_dict()["weight"].item() == pytest.approx(recursion(list(map(float, decays))), rel=1e-6)


def test_an_average_that_waits_for_its_share_waits_longer_in_a_longer_run(tmp_path):
    run(ConstantDecay(0.5), Save(tmp_path / "cut.ckpt", 8), start="50%")
    longer = run(ConstantDecay(0.5), epochs=8, start="50%", ckpt_path=tmp_path / "cut.ckpt")
    assert longer.state_dict()["origin"] == 24


def test_the_length_is_asked_again_when_the_loader_has_changed():
    """Epochs of 2, 6 and 6 batches: known to be 6 steps at first, and 14 from step 2 on."""

    class Growing(Scripted):
        def train_dataloader(self):
            return numbers(2 if self.current_epoch == 0 else 6)

    ema = EMA(Linear(None, 0.0, 1.0))
    trainer(ema, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(Growing())
    decays = [step / (6 if step < 2 else 14) for step in range(14)]
    assert ema.average_state_dict()["weight"].item() == pytest.approx(recursion(decays), rel=1e-6)


def test_accumulation_is_part_of_the_length():
    ema = EMA(Linear(None, 0.0, 1.0))
    trainer(ema, accumulate_grad_batches=4).fit(Scripted(), numbers(18))  # windows of 4, 4, 4, 4 and 2 batches
    assert ema.average_state_dict()["weight"].item() == pytest.approx(recursion([0.0, 0.2, 0.4, 0.6, 0.8]), rel=1e-6)


def test_the_fit_of_another_trainer_goes_on_along_a_longer_curve():
    module, ema = Scripted(), EMA(Linear(None, 0.0, 1.0))
    for _ in range(2):
        trainer(ema).fit(module, numbers(10))
    decays = [*(step / 10 for step in range(10)), *(step / 20 for step in range(10, 20))]
    assert ema.average_state_dict()["weight"].item() == pytest.approx(recursion(decays), rel=1e-6)
    assert ema.state_dict()["earlier_steps"] == 10


def test_a_callback_that_joins_a_resumed_run_follows_what_is_left(tmp_path):
    trainer(Save(tmp_path / "cut.ckpt", 10)).fit(Scripted(), numbers(20))
    ema = EMA(Linear(None, 0.0, 1.0))
    trainer(ema).fit(Scripted(), numbers(20), ckpt_path=tmp_path / "cut.ckpt")
    expected = recursion([step / 10 for step in range(10)], start=10.0)
    assert ema.average_state_dict()["weight"].item() == pytest.approx(expected, rel=1e-6)


class ByHand(Scripted):
    """Manual optimization: only the module knows how many steps it takes."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.weight * 1.0)
        self.optimizers().step()


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.ones(100, 1, 1))


OPEN = [
    {"decay": Cosine(None, 0.5, 1.0)},
    {"decay": HalfLife("2%")},
    {"start_step": "95%"},
    {"update_every_n_steps": 0.1},
]


@pytest.mark.parametrize("arguments", OPEN, ids=str)
def test_a_share_of_an_unknown_length_is_refused_with_the_remedy(arguments):
    with pytest.raises(MisconfigurationException, match=r"not known; state it in steps.*unknown; or set .*max_steps"):
        trainer(EMA(**arguments)).fit(Scripted(), Endless())
    with pytest.raises(MisconfigurationException, match=r"state it in steps.* manual optimization"):
        trainer(EMA(**arguments)).fit(ByHand(), numbers(4))


def test_max_steps_is_a_length():
    ema = EMA(Linear(None, 0.0, 1.0))
    trainer(ema, max_steps=5, max_epochs=-1).fit(Scripted(), Endless())
    assert ema.average_state_dict()["weight"].item() == pytest.approx(recursion([0.0, 0.2, 0.4, 0.6, 0.8]), rel=1e-6)


def test_a_run_that_ends_inside_the_schedule_is_a_warning():
    with pytest.warns(LightningPluginsWarning, match="the run of 4 steps ends inside the schedule of the decay"):
        trainer(EMA(WarmupCosine(8))).fit(Scripted(), numbers(4))


# -- refusals


@pytest.mark.parametrize(
    ("decay", "message"),
    [
        (
            lambda n: 1.5 - 0.5 * (n < 3),
            r"`decay` must be at least 0 and at most 1, got 1.5 at step 3 from Fun",
        ),
        (lambda n: float("nan") if n == 3 else 0.5, r"`decay` must be finite, got nan at step 3"),
        (Linear(10, 0.8, 1.8), r"`decay` must be at least 0 and at most 1, got 1.1.* at step 4 from ScheduleDecay"),
        (Linear(2, 0.8, 1.2), r"got 1.2 at step 3 from"),
    ],
)
@pytest.mark.parametrize("every", [1, 5])
def test_a_decay_outside_0_and_1_is_refused_with_its_step(decay, message, every):
    with pytest.raises(ValueError, match=message):
        averaged(decay, every=every)


def test_so_is_one_of_a_rule_with_a_closed_form_of_its_own():
    class Growing(Halving):
        def _over(self, n, steps):
            return 0.5 * n

    with pytest.raises(ValueError, match=r"`decay` must be at least 0 and at most 1, got 1\.5 at step 3 from"):
        averaged(Growing())


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: EMA(lambda n: "much").decay(2),
            TypeError,
            r"`decay` must be a number, got 'much' at step 2 from",
        ),
        (lambda: EMA(HalfLife), TypeError, r"`decay` must be a number or a decay rule .* got <class"),
        (lambda: EMA("no.such"), ValueError, r"`decay` as a text must be an import path, got 'no.such': No module"),
        (lambda: EMA("math.__name__"), TypeError, r"`decay` must be a number or a decay rule .* got 'math.__name__'"),
        (lambda: EMA(Cosine(None, 0.9, 1)).decay(1), ValueError, r"call `resolve\(total_steps\)` first"),
        (lambda: HalfLife("2%")(1), ValueError, r"`HalfLife\(steps='2%'.* must know the length of the run: call `res"),
        (lambda: HalfLife("2"), ValueError, r"`steps` must be a duration, got '2'"),
        (
            lambda: HalfLife("2ep").resolve(10),
            RunLengthUnknownError,
            r"`steps` is '2ep' of an epoch.* state it in",
        ),
        (lambda: EMA(start_step="half"), ValueError, r"`start_step` must be a duration, got 'half'"),
        (lambda: EMA(start_step=None), TypeError, r"`start_step` must be a duration, got None"),
        (lambda: EMA(update_every_n_steps="101%"), ValueError, r"`update_every_n_steps` must be at most 100%"),
    ],
)
def test_what_is_no_decay_or_no_duration_is_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


# -- configurations


def test_hydra_makes_them_all():
    instantiate = pytest.importorskip("hydra.utils").instantiate

    def made(name, **arguments):
        return {"_target_": f"lightning_plugins.{name}", **arguments}

    ema = instantiate(made("EMA", decay=made("Cosine", steps=None, start=0.996, end=1.0), start_step="95%"))
    assert ema.decay == as_decay_rule(Cosine(None, 0.996, 1.0))
    assert ema.start_step == "95%"
    assert instantiate(made("EMA", decay=f"{__name__}.tau_of")).decay == as_decay_rule(tau_of)
    assert instantiate(made("EMA", decay=made("HalfLife", steps="2%"))).decay == HalfLife("2%")
    latest = instantiate(made("LatestWeightAveraging", last=3, every="1ep"))
    assert (latest.last, latest.every, latest.state_key) == (3, "1ep", "LatestWeightAveraging(name='lawa')")
