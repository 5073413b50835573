"""The time that a run may take: of all Timers, the one that ends first."""

import types

from lightning_plugins.core.time_limit import TimeLimit, time_limit


def limit_of(*callbacks):
    return time_limit(types.SimpleNamespace(callbacks=[types.SimpleNamespace(**each) for each in callbacks]))


def timer(elapsed, remaining):
    return {"time_elapsed": lambda: elapsed, "time_remaining": lambda: remaining}


def test_the_timer_that_ends_first_is_the_limit():
    assert limit_of(timer(30.0, 90.0), timer(50.0, 20.0), timer(1.0, None)) == TimeLimit(50.0, 20.0)


def test_no_timer_with_an_end_is_no_limit():
    assert limit_of() is None
    assert limit_of(timer(1.0, None)) is None


def test_a_callback_with_half_of_the_functions_is_no_timer():
    assert limit_of({"time_elapsed": lambda: 1.0}, {"time_remaining": lambda: 1.0}) is None
