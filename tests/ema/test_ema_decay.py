"""Decay rules against the peers' tables and closed forms."""

import json
import math
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest

from lightning_plugins import (
    ConstantDecay,
    DebiasedDecay,
    DecayRule,
    HalfLife,
    InverseGammaDecay,
    PowerDecay,
    WarmupDecay,
)
from lightning_plugins.ema.decay import UpdateCounter
from lightning_plugins.ema.function_decay import as_decay_rule
from lightning_plugins.ema.power_exponent import power_exponent
from tests.support.ema_runs import THETA, follow

GOLDEN = {
    "constant_0.9": ConstantDecay(0.9),
    "debiased_0.9": DebiasedDecay(0.9),
    "half_life_4": HalfLife(steps=4),
    "inverse_gamma_power2_3": InverseGammaDecay(max_value=0.9999, inv_gamma=1.0, power=2 / 3, min_value=0.0),
    "power_sigma_0.10": PowerDecay(0.10),
    "warmup_0.9": WarmupDecay(0.9),
}
RULES = [*GOLDEN.values(), InverseGammaDecay(0.7, 1.0, 0.75, 0.3), ConstantDecay(0), ConstantDecay(1), DebiasedDecay(0)]


@pytest.mark.parametrize("name", GOLDEN)
def test_rule_agrees_with_the_golden_table(name):
    table = json.loads((Path(__file__).parents[1] / "golden" / "ema" / f"{name}.json").read_text())
    decays = [GOLDEN[name](n) for n in range(1, 11)]
    assert decays == pytest.approx(table["decay"], rel=1e-12)
    assert follow(THETA, decays) == pytest.approx(table["shadow"], rel=1e-12)


def test_every_golden_table_is_used():
    assert {path.stem for path in (Path(__file__).parents[1] / "golden" / "ema").glob("*.json")} == set(GOLDEN)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_an_update_over_several_steps_decays_as_much_as_the_single_steps_do(rule):
    for n, steps in [(1, 1), (2, 2), (7, 3), (100, 10), (100, 100)]:
        single = math.prod(rule(i) for i in range(n - steps + 1, n + 1))
        assert rule(n, steps) == pytest.approx(single, rel=1e-9, abs=1e-15)


@dataclass(frozen=True)
class AtLeastHalf(DecayRule):
    """A rule of one's own that is made of another."""

    inner: DecayRule

    def _single(self, n):
        return max(self.inner._single(n), 0.5)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_of_ones_own_may_be_made_of_any_other(rule):
    assert [AtLeastHalf(rule)(n) for n in range(1, 20)] == [max(rule(n), 0.5) for n in range(1, 20)]


@pytest.mark.parametrize("parent", [ConstantDecay, DebiasedDecay, HalfLife, WarmupDecay])
def test_a_rule_of_ones_own_may_change_a_step_of_any_other(parent):
    class Later(parent):
        def _single(self, n):
            return 0.5 if n < 10 else 0.75

    rule = Later(4) if parent is HalfLife else Later(0.9)
    assert [rule(9), rule(10), rule(11, steps=3)] == [0.5, 0.75, 0.5 * 0.75**2]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_decay_stays_between_0_and_1(rule):
    assert all(0 <= rule(n) <= 1 for n in [*range(1, 50), 10**6, 10**9])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (ConstantDecay(0.9), 0.9**4),
        (HalfLife(steps=4), 0.5),
        (PowerDecay(0.1), (1 - 4 / 20) ** (6.937203937601809 + 1)),
        (DebiasedDecay(0.9), 0.9**4 * (1 - 0.9**16) / (1 - 0.9**20)),
    ],
    ids=repr,
)
def test_interval_correction_in_closed_form(rule, expected):
    assert rule(20, steps=4) == pytest.approx(expected, rel=1e-12)


def test_power_average_follows_a_ramp_whatever_the_interval():
    """EMA of theta_t = t: ema-pytorch gives 729.8 at interval 100 where 8881 is right; ours may not."""
    exact = 8881.1
    for every in (1, 10, 100):
        rule, shadow = PowerDecay(0.10), 0.0
        for n in range(every, 10_001, every):
            decay = rule(n, every)
            shadow = decay * shadow + (1 - decay) * n
        assert shadow == pytest.approx(exact, rel=0.006)


def test_inverse_gamma_of_power_1_is_the_plain_mean():
    rule = InverseGammaDecay(max_value=1.0, power=1)
    means = [sum(THETA[: n + 1]) / (n + 1) for n in range(10)]
    assert follow(THETA, [rule(n) for n in range(1, 11)]) == pytest.approx(means, rel=1e-12)


def test_inverse_gamma_is_clipped_but_copies_first():
    rule = InverseGammaDecay(0.7, 1.0, 0.75, 0.3)
    assert [round(rule(n), 6) for n in (1, 2, 3, 10)] == [0.0, 0.405396, 0.561309, 0.7]
    assert InverseGammaDecay(0.9, 100.0, 0.75, 0.3)(2) == 0.3


def test_inverse_gamma_defaults_to_the_power_for_long_runs():
    assert InverseGammaDecay()(1000) == pytest.approx(1 - 1000 ** (-2 / 3))
    assert InverseGammaDecay()(10**9) == 0.9999


def test_debiased_average_equals_the_corrected_zero_start():
    decay, moment, rule = 0.999, 0.0, DebiasedDecay(0.999)
    shadow = 0.0
    for n in range(1, 2000):
        theta = math.sin(n)
        moment = decay * moment + (1 - decay) * theta
        shadow = rule(n) * shadow + (1 - rule(n)) * theta
    assert shadow == pytest.approx(moment / (1 - decay**1999), rel=1e-9)


def test_debiased_decay_keeps_its_digits_near_1():
    assert DebiasedDecay(1 - 1e-12)(2) == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("sigma", "gamma"),
    [(0.01, 96.994898), (0.05, 16.972199), (0.10, 6.937204), (0.15, 3.557869), (0.20, 1.826214), (0.25, 0.719824)],
)
def test_power_exponents_of_the_reference(sigma, gamma):
    assert power_exponent(sigma) == pytest.approx(gamma, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.001, 0.5, 6.94, 16.97, 1e4])
def test_power_exponent_inverts_the_relative_deviation(gamma):
    sigma = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
    assert power_exponent(sigma) == pytest.approx(gamma, rel=1e-7)


def test_half_life_in_samples_is_independent_of_the_batch_size():
    rule = HalfLife(samples=1024)
    assert rule.needs_samples_per_step
    assert not HalfLife(steps=1).needs_samples_per_step
    for batch in (16, 64, 256):
        steps = 1024 // batch
        assert rule.for_samples_per_step(batch)(steps, steps=steps) == pytest.approx(0.5)
    assert HalfLife(steps=3).for_samples_per_step(7) == HalfLife(steps=3)
    assert ConstantDecay(0.5).for_samples_per_step(7) == ConstantDecay(0.5)
    assert not ConstantDecay(0.5).needs_samples_per_step
    with pytest.raises(ValueError, match="samples per step: call `for_samples_per_step`"):
        rule(1)


def test_a_number_means_the_warm_up():
    assert as_decay_rule(0.99) == WarmupDecay(0.99)
    assert as_decay_rule(1) == WarmupDecay(1)
    rule = HalfLife(steps=3)
    assert as_decay_rule(rule) is rule


def test_rules_are_values():
    assert len({ConstantDecay(0.9), ConstantDecay(0.9), ConstantDecay(0.8)}) == 2
    assert isinstance(ConstantDecay(0.9), DecayRule)
    with pytest.raises(FrozenInstanceError):
        ConstantDecay(0.9).value = 0.8


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: as_decay_rule(1.5), ValueError, r"`decay` must be at least 0 and at most 1, got 1.5"),
        (lambda: as_decay_rule(-0.1), ValueError, r"`decay` must be at least 0 and at most 1, got -0.1"),
        (lambda: as_decay_rule(True), TypeError, r"`decay` must be a number or a decay rule"),
        (lambda: as_decay_rule("fast"), TypeError, r"`decay` must be a number or a decay rule .*got 'fast'"),
        (lambda: ConstantDecay(2), ValueError, r"`value` must be at least 0 and at most 1, got 2"),
        (lambda: WarmupDecay(float("nan")), ValueError, r"`value` must be finite"),
        (lambda: DebiasedDecay(1), ValueError, r"`value` must be at least 0 and below 1, got 1"),
        (lambda: PowerDecay(0), ValueError, r"`sigma_rel` must be above 0 and below 0.288675, got 0"),
        (lambda: PowerDecay(0.3), ValueError, r"`sigma_rel` must be above 0 and below 0.288675, got 0.3"),
        (lambda: InverseGammaDecay(power=0), ValueError, r"`power` must be above 0"),
        (lambda: InverseGammaDecay(inv_gamma=-1), ValueError, r"`inv_gamma` must be above 0"),
        (lambda: InverseGammaDecay(0.5, min_value=0.6), ValueError, r"`min_value` must be at least 0 and at most 0.5"),
        (HalfLife, ValueError, r"exactly one of `steps` and `samples`, got None and None"),
        (lambda: HalfLife(1, 2), ValueError, r"exactly one of `steps` and `samples`, got 1 and 2"),
        (lambda: HalfLife(steps=0), ValueError, r"`steps` must be above 0, got 0"),
        (lambda: HalfLife(samples=-1), ValueError, r"`samples` must be above 0, got -1"),
        (lambda: HalfLife(samples=1).for_samples_per_step(0), ValueError, r"`samples` must be above 0"),
        (lambda: ConstantDecay(0.5)(0), ValueError, r"`n` must be at least 1 step, got 0"),
        (lambda: ConstantDecay(0.5)(3, 0), ValueError, r"`steps` must be at least 1 step, got 0"),
        (lambda: ConstantDecay(0.5)(3, 4), ValueError, r"`steps` must be at most `n`, got 4 of 3 steps"),
    ],
)
def test_wrong_numbers_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


# -- the counter of a checkpoint


@pytest.mark.parametrize(
    ("every", "applied", "origin", "last"),
    [
        (1, 0, -1, 0),
        (1, 10**12, -1, 0),
        (1, 5, 0, 5),
        (1, 10**12, 0, 10**12),
        (10, 10**12 + 9, 10**9, 10**12 - 10**9),
        (1, 3_000_000, 1_000_000, 1_000_000),
        (2_000_000, 9_000_000, 1_000_000, 6_000_000),
    ],
)
def test_the_counter_of_a_run_of_any_length_is_taken_over(every, applied, origin, last):
    counter = UpdateCounter(every=every)
    counter.load({"applied_steps": applied, "origin": origin, "last_update": last})
    assert (counter.applied, counter.last) == (applied, last)
    assert counter.origin == (None if origin == -1 else origin)
    # one step more is late, and one update more than there were steps is none
    late = {"applied_steps": applied + max(1_000_000, every) - (applied - origin - last) + 1}
    for change in ([late] if origin >= 0 else []) + [{"last_update": (applied - origin if origin >= 0 else 0) + 1}]:
        with pytest.raises(ValueError, match="the checkpoint's state was damaged"):
            counter.load({"applied_steps": applied, "origin": origin, "last_update": last, **change})
