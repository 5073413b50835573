"""Schedules as values: closed forms, both ends of every piece, durations, combinators, configuration."""

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lightning_plugins import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    InverseSqrt,
    Join,
    Linear,
    Noam,
    OneCycle,
    OneMinusSqrt,
    PiecewiseConstant,
    Polynomial,
    ReciprocalSqrt,
    RNMTPlus,
    Schedule,
    Segment,
    Segments,
    Shape,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)
from lightning_plugins.schedules import SCHEDULES, RunLengthUnknownError, ScheduleTooLongError


def parabola(x):
    return 3 * x * x - 1


# One of every class; every test that runs over them fails when a class is missing.
EXAMPLES = {
    "Constant": Constant(0.3),
    "Cosine": Cosine(40, 1, 0.1),
    "CosineRestarts": CosineRestarts(10, multiplier=1.5, decay=0.8, end=0.1),
    "Cycled": Linear(5, 1, 0).cycle(5, count=4, multiplier=2, decay=0.5),
    "Delayed": Cosine(40, 1, 0).delay(7),
    "Exponential": Exponential(40, 1, 0.01),
    "Floored": Cosine(40, 1, 0).floor(0.2),
    "HeldEvery": Linear(10, 1, 0).hold_every(4),
    "InverseSqrt": InverseSqrt(10, timescale=20, start=0.1),
    "Join": Join([Linear(10, 0, 1), Cosine(30, 1, 0)], [10]),
    "Linear": Linear(40, 0, 1),
    "Noam": Noam(64, 20),
    "OneCycle": OneCycle(50),
    "OneMinusSqrt": OneMinusSqrt(40, 1, 0.1),
    "PiecewiseConstant": PiecewiseConstant([10, 20], [1, 0.5, 0.1]),
    "Polynomial": Polynomial(40, 1, 0.1, power=2.5),
    "Product": Linear(10, 0, 1) * Cosine(50, 1, 0),
    "RNMTPlus": RNMTPlus(4, 10, 60, 120),
    "ReciprocalSqrt": ReciprocalSqrt(16),
    "Scaled": Noam(64, 20) * 2,
    "Segments": Segments([Segment(start=0.1, end=1, steps=10), Segment("cosine", end=0, steps=30)]),
    "Shape": Shape(parabola, 40, 0.2, 1),
    "Shifted": Linear(40, 0, 1).shift(1),
    "WarmupCosine": WarmupCosine(10, 5, 50, 0.1, 0.05),
    "WarmupLinear": WarmupLinear(10, 50, 0.1, 0.05),
    "WarmupStableDecay": WarmupStableDecay(10, 20, 50),
}
every_schedule = pytest.mark.parametrize("schedule", EXAMPLES.values(), ids=EXAMPLES.keys())


def test_every_class_has_an_example():
    assert sorted(EXAMPLES) == sorted(set(SCHEDULES) - {"Segment"})
    assert all(type(schedule).__name__ == name for name, schedule in EXAMPLES.items())


# -- what all of them promise


@every_schedule
def test_any_step_has_a_finite_value(schedule):
    values = [schedule(step) for step in (*range(200), 10**6, 10**9)]
    assert all(isinstance(value, float) and math.isfinite(value) and value >= 0 for value in values)
    with pytest.raises(ValueError, match=r"`step` must be at least 0, got -1\."):
        schedule(-1)


@every_schedule
def test_is_a_value(schedule):
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    assert copy.preview(100) == schedule.preview(100)
    assert schedule != schedule.floor(0.5)
    assert repr(schedule) == repr(copy)
    with pytest.raises(AttributeError):
        schedule.anything = 1


@every_schedule
def test_survives_a_trip_through_json(schedule):
    text = json.dumps(schedule.to_dict())
    copy = Schedule.from_dict(json.loads(text), trust=True)
    assert copy.preview(100) == schedule.preview(100)
    if not isinstance(schedule, Shape):  # its curve is a function here and an import path there
        assert copy == schedule


@every_schedule
def test_resolving_what_is_known_changes_nothing(schedule):
    assert not schedule.is_open
    assert schedule.resolve(1000) == schedule
    assert schedule.resolve(None) == schedule


@every_schedule
def test_preview_is_the_schedule_step_by_step(schedule):
    assert schedule.preview(70) == [schedule(step) for step in range(70)]
    assert schedule.preview(0) == []


# -- closed forms, by NumPy

T = np.arange(60.0)
X = np.minimum(T / 40, 1)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Linear(40, 0.2, 0.8), 0.2 + 0.6 * X),
        (Cosine(40, 1, 0.1), 0.1 + 0.45 * (1 + np.cos(np.pi * X))),
        (OneMinusSqrt(40, 1, 0.1), 0.1 + 0.9 * (1 - np.sqrt(X))),
        (Polynomial(40, 1, 0.1, power=2.5), 0.1 + 0.9 * (1 - X) ** 2.5),
        (Exponential(40, 1, 0.01), 0.01**X),
        (Shape(parabola, 40, 0.2, 1), 0.2 + 0.8 * X**2),
        (InverseSqrt(0), 1 / np.sqrt((T + 10_000) / 10_000)),
        (InverseSqrt(10, timescale=20), np.where(T < 10, T / 10, 1 / np.sqrt((np.maximum(T, 10) + 10) / 20))),
        (ReciprocalSqrt(16), 1 / np.sqrt(np.maximum(T, 16))),
        (ReciprocalSqrt(0), 1 / np.sqrt(np.maximum(T, 1))),
        (Noam(64, 20), 64**-0.5 * np.minimum((T + 1) ** -0.5, (T + 1) * 20**-1.5)),
        (Noam(64, 0), 64**-0.5 * (T + 1) ** -0.5),
        (
            WarmupCosine(10, 5, 50, 0.1, 0.05),
            np.where(T < 10, 0.1 + 0.09 * T, 0.05 + 0.475 * (1 + np.cos(np.pi * np.clip((T - 15) / 35, 0, 1)))),
        ),
        (OneCycle(50, shape="linear", start=0.1, end=0.0), np.interp(T, [0, 14, 49], [0.1, 1, 0])),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Schedule) else "",
)
def test_closed_form(schedule, values):
    assert schedule.preview(60) == pytest.approx(values.tolist(), rel=1e-12, abs=1e-15)


def test_warm_up_restarts_and_peaks():
    assert WarmupStableDecay(2, 4, 10, shape="cosine").preview(11) == pytest.approx(
        [0, 0.5, 1, 1, 1, 1, 1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2, 0]
    )
    restarts = CosineRestarts(4, multiplier=2, decay=0.5, end=0.25)
    assert [restarts(step) for step in (0, 4, 12, 28)] == [1, 0.5, 0.25, 0.125]
    assert restarts(2) == pytest.approx(0.625)  # half way from 1 to 0.25
    assert restarts(8) == pytest.approx(0.375)  # half way from 0.5 to 0.25: the end does not shrink


def test_rnmt_plus_does_not_overflow():
    steep = RNMTPlus(replicas=512, warmup=10, start_step=10**6, end_step=10**6 + 1)
    assert steep(0) == 1
    assert steep(10**6) == 0
    assert RNMTPlus(4, 0, 60, 60).preview(17) == [4.0] * 16 + [0.0] + []  # 4 * 15 = 60 is still the plateau


# -- zero-length parts


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Linear(0, 0, 1), [1, 1]),
        (Cosine(0, 1, 0.5), [0.5, 0.5]),
        (Exponential(0, 1, 0.5), [0.5, 0.5]),
        (Polynomial(0, 1, 0.5), [0.5, 0.5]),
        (WarmupCosine(0, 0, 0, end=0.5), [0.5, 0.5]),
        (WarmupCosine(2, 0, 2, end=0.5), [0, 0.5, 0.5, 0.5]),  # a warm-up that fills the run is followed by the end
        (WarmupCosine(0, 2, 2), [1, 1, 0]),
        (WarmupStableDecay(0, 0, 2), [1, 1, 0]),
        (OneCycle(0), [1e-4 / 25] * 2),
        (OneCycle(1, end=0.5), [0.5, 0.5]),
        (OneCycle(3, peak_at=1, start=0.5, end=0, shape="linear"), [0.5, 0.75, 0]),
        (PiecewiseConstant([0, 0], [1, 2, 3]), [3, 3]),
        (PiecewiseConstant([], [1]), [1, 1]),
        (Join([Constant(1), Constant(2), Constant(3)], [1, 1]), [1, 3]),
        (Segments([Segment(end=1, steps=0), Segment(end=0, steps=2)]), [1, 0.5, 0, 0]),
        (Linear(2, 1, 0).delay(0).shift(0), [1, 0.5, 0]),
    ],
)
def test_zero_length_parts(schedule, values):
    assert schedule.preview(len(values)) == values


# -- segments


def test_half_open_segments_reach_their_end_with_the_next_segments_first_step():
    segments = Segments([Segment(end=1, steps=2), Segment(end=1, steps=2), Segment("cosine", end=0)])
    assert segments.preview(8) == pytest.approx([0, 0.5, 1, 1, 1, 0.8535533905932737, 0.5, 0.14644660940672627])


def test_closed_segments_are_numpys_linspace_with_shared_joints():
    three = Segments([Segment(end=1, steps=5), Segment(end=0.5, steps=5), Segment(end=0, steps=5)], endpoint=True)
    values = np.concatenate([np.linspace(0, 1, 5), np.linspace(1, 0.5, 5)[1:], np.linspace(0.5, 0, 5)[1:]])
    assert len(values) == 3 * (5 - 1) + 1
    assert three.preview(15) == pytest.approx([*values, 0, 0])


def test_a_closed_segment_fills_the_run_to_its_last_step():
    schedule = Segments([Segment(start=0, end=1, steps=10), Segment(end=0)], endpoint=True)
    rates = schedule.preview(500)
    assert (rates[0], rates[9], rates[499]) == (0, 1, 0)
    assert rates[9:] == pytest.approx(np.linspace(1, 0, 491).tolist())


def test_a_start_that_differs_is_a_jump_at_the_next_step():
    schedule = Segments([Segment(end=1, steps=5), Segment(start=0.5, end=0, steps=5)], endpoint=True)
    assert schedule.preview(12) == pytest.approx([*np.linspace(0, 1, 5), *np.linspace(0.5, 0, 5), 0, 0])
    half_open = Segments([Segment(end=1, steps=4), Segment(start=0.5, end=0, steps=2)])
    assert half_open.preview(7) == [0, 0.25, 0.5, 0.75, 0.5, 0.25, 0]


def test_a_segment_of_one_step_sets_where_the_next_begins():
    # In S4TF such a segment, meant for discontinuities, is never selected and its end is lost.
    schedule = Segments([Segment(end=1, steps=3), Segment(end=0.5, steps=1), Segment(end=0, steps=3)], endpoint=True)
    assert schedule.preview(7) == [0, 0.5, 1, 0.5, 0.25, 0, 0]


def test_the_open_segment_may_stand_anywhere():
    for endpoint in (False, True):
        schedule = Segments([Segment(end=1), Segment(end=0, steps=4)], endpoint=endpoint).resolve(12)
        assert schedule(12) == 0
        assert max(schedule.preview(12)) == 1


# -- durations


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        (7, 7),
        (0.05, 50),
        ("5%", 50),
        ("2.5 %", 25),
        ("2ep", 20),
        ("0.5ep", 5),
        ("0%", 0),
        ("100%", 1000),
        (None, 1000),
        ("rest", 1000),
    ],
)
def test_durations(length, steps):
    assert Linear(length, 0, 1).resolve(1000, steps_per_epoch=10) == Linear(steps, 0, 1)


def test_numpy_numbers_are_fine():
    assert Linear(np.int64(5), np.float32(0.5), np.float64(1)) == Linear(5, 0.5, 1)
    assert Linear(np.float64(0.5), 0, 1).resolve(np.int64(10)) == Linear(5, 0, 1)


@pytest.mark.parametrize(("share", "total", "steps"), [(0.5, 5, 3), (0.5, 7, 4), ("7%", 100, 7), (0.29, 100, 29)])
def test_shares_round_to_the_nearest_step(share, total, steps):
    assert WarmupCosine(share).resolve(total).warmup == steps


@given(share=st.floats(0, 1, exclude_min=True, exclude_max=True), total=st.integers(0, 10**6))
def test_a_share_is_within_half_a_step(share, total):
    assert abs(Linear(share, 0, 1).resolve(total).steps - share * total) <= 0.5


def test_an_explicit_total_may_be_longer_or_shorter_than_the_run():
    assert WarmupCosine(10, total=5000).resolve(1000).total == 5000
    assert WarmupCosine(10, total=500).resolve(1000).total == 500


@pytest.mark.parametrize(
    ("schedule", "total", "message"),
    [
        (WarmupCosine(800, 300), 1000, r"`warmup` \+ `hold` must be at most `total`, got 800 \+ 300 > 1000 steps"),
        (WarmupStableDecay("60%", "50%"), 1000, r"got 600 \+ 500 > 1000 steps; shorten them or lengthen the run"),
        (WarmupCosine("50%", total=100), 1000, r"got 500 \+ 0 > 100 steps"),
        (Linear(2000, 0, 1), 1000, r"`total_steps` must be at least 2000, .*got 1000; shorten the schedule"),
        (Noam(64, 4000), 1000, "at least 4000"),
        (Join([Constant(), Linear(500, 1, 0)], [600]), 1000, "at least 1100"),
        (Linear(600, 0, 1).delay(500), 1000, "at least 1100"),
        (Linear(600, 0, 1).hold_every(2), 1000, "at least 1200"),
        (PiecewiseConstant([10, 2000], [1, 2, 3]), 1000, "at least 2000"),
        (Segments([Segment(end=1, steps=2000), Segment(end=0)]), 1000, "got 2000 stated steps > 1000"),
        (Segments([Segment(end=1, steps=2000)]), 1000, "at least 2000"),
        (Linear(600, 0, 1) * Linear(1200, 1, 0), 1000, "at least 1200"),
        (CosineRestarts(2000), 1000, "at least 2000"),
    ],
)
def test_parts_that_do_not_fit_the_run_are_an_error_unless_it_may_end_inside(schedule, total, message):
    with pytest.raises(ScheduleTooLongError, match=message):
        schedule.resolve(total)
    if message != r"got 500 \+ 0 > 100 steps":  # which no run can mend
        ends_inside = schedule.resolve(total, strict=False)
        assert all(math.isfinite(value) for value in ends_inside.preview(total))


def test_the_quick_trial_sees_the_beginning_of_the_real_run():
    trial = WarmupCosine(100).resolve(3, strict=False)
    assert trial.preview(3) == WarmupCosine(100).resolve(1000).preview(3)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (WarmupCosine("5%"), "`warmup` is '5%' of the run, and the length of the run is not known"),
        (WarmupCosine(5), "`total` is the rest of the run"),
        (Linear(0.5, 0, 1), "`steps` is 0.5 of the run"),
        (Linear("2ep", 0, 1), "`steps` is '2ep' of an epoch, and the length of an epoch is not known"),
    ],
)
def test_an_unknown_length_is_an_error_that_names_it(schedule, message):
    with pytest.raises(RunLengthUnknownError, match=message):
        schedule.resolve(None)
    with pytest.raises(ValueError, match=r"call `resolve\(total_steps\)` first"):
        schedule(0)


@pytest.mark.parametrize("kind", [Linear, Cosine, OneMinusSqrt, Polynomial, Exponential])
def test_a_ramp_without_a_length_fills_the_run(kind):
    assert kind(None, 1, 0.5).resolve(10) == kind(10, 1, 0.5)


def test_a_polynomial_of_no_given_power_is_a_line():
    assert Polynomial(4, 1, 0).preview(6) == [1, 0.75, 0.5, 0.25, 0, 0]


def test_open_parts_fill_their_stretch():
    join = Join([Linear(None, 0, 1), Cosine(None, 1, 0)], ["25%"]).resolve(100)
    assert join.parts == (Linear(25, 0, 1), Cosine(75, 1, 0))
    assert Cosine(None, 1, 0).delay("10%").resolve(100).schedule == Cosine(90, 1, 0)
    assert Cosine(None, 1, 0).shift(10).resolve(100).schedule == Cosine(110, 1, 0)
    assert Cosine(None, 1, 0).hold_every("1ep").resolve(100, 10).schedule == Cosine(10, 1, 0)
    assert WarmupCosine("10%").cycle("50%").resolve(200).schedule == WarmupCosine(10, total=100)


# -- combinators

steps = st.integers(0, 300)


@given(t=steps, k=st.integers(0, 50))
def test_combinators_are_what_they_say(t, k):
    f, g = EXAMPLES["WarmupCosine"], EXAMPLES["Exponential"]
    assert f.delay(k)(t) == f(max(t - k, 0))
    assert f.shift(k)(t) == f(t + k)
    assert f.hold_every(k + 1)(t) == f(t // (k + 1))
    assert f.floor(0.3)(t) == max(f(t), 0.3)
    assert f.scale(0.3)(t) == (0.3 * f)(t) == (f * 0.3)(t) == 0.3 * f(t)
    assert (f * g)(t) == f(t) * g(t)


@given(t=steps, period=st.integers(1, 40), count=st.integers(1, 5))
def test_cycles(t, period, count):
    f = EXAMPLES["Cosine"]
    assert f.cycle(period)(t) == f(t % period)
    inside = t < period * count
    assert f.cycle(period, count=count)(t) == (f(t % period) if inside else f(period))
    assert f.cycle(period, decay=0.5)(t) == 0.5 ** (t // period) * f(t % period)


def test_growing_cycles_stretch_the_schedule():
    doubled = Linear(4, 1, 0).cycle(4, multiplier=2).preview(12)
    assert doubled == [1, 0.75, 0.5, 0.25, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]


def test_a_multiplier_too_small_to_grow_a_cycle_by_a_step_costs_nothing():
    restarts = CosineRestarts(10, multiplier=1.05)  # 10 * 1.05 is 10 whole steps again
    assert restarts(10**12 + 5) == pytest.approx(0.5)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 20)), min_size=1, max_size=5))
def test_half_open_segments_are_continuous_at_joints(pieces):
    schedule = Segments([Segment(end=end, steps=length) for end, length in pieces])
    begins = np.cumsum([length for _, length in pieces])
    for (end, _), begin, length in zip(pieces, begins, [*(n for _, n in pieces[1:]), 1], strict=True):
        if length:  # a segment of no steps only sets where the next one begins
            assert schedule(int(begin)) == end
