"""Rank zero's time on every rank, without a broadcast for each batch."""

from types import SimpleNamespace

from lightning_plugins import Linear
from lightning_plugins.core.time_limit import TimeLimit
from lightning_plugins.schedules import time_budget
from lightning_plugins.schedules.run_plan import TimePlan
from lightning_plugins.schedules.time_budget import TimeBudget
from tests.support.clock import Clock


class Ranks:
    """Two budgets whose clocks differ; what rank zero shares, rank one takes."""

    def __init__(self, monkeypatch, clock, skew):
        self.clock, self.skew, self.shared, self.rank = clock, skew, [], 0
        monkeypatch.setattr(time_budget, "seconds", lambda: clock.now + self.rank * self.skew())
        self.budgets = [self.on(0, lambda: TimeBudget(0.0, 100.0, self.send)), None]
        self.budgets[1] = self.on(1, lambda: TimeBudget(3.0, 90.0, lambda _: self.shared[-1]))
        self.broadcasts = 0

    def send(self, value):
        self.shared.append(value)
        return value

    def on(self, rank, work):
        self.rank = rank
        return work()

    def __call__(self, what):
        before = len(self.shared)
        found = [self.on(rank, getattr(self.budgets[rank], what)) for rank in (0, 1)]
        self.broadcasts += len(self.shared) - before
        return found


def test_ranks_have_one_position_with_few_broadcasts(monkeypatch):
    clock, noise = Clock(), iter([0.3, -0.2, 0.7, 0.1] * 1000)
    ranks = Ranks(monkeypatch, clock, lambda: next(noise))
    assert ranks.budgets[0].total == ranks.budgets[1].total == 100_000
    seen, lengths = [], [0.009, 0.011, 0.010] * 1000
    for length in lengths:
        clock.now += length
        positions = ranks("after_batch")
        assert positions[0] == positions[1]
        seen.append((clock.now - 1000, positions[0] / 1000))
    assert all(abs(real - told) < 0.02 for real, told in seen)
    assert [told for _, told in seen] == sorted(told for _, told in seen)
    # 3000 batches of 10 ms are 30 s: about one a second, and a few at the beginning
    assert 30 <= ranks.broadcasts <= 40
    clock.now += 20  # a validation
    assert ranks("after_pause") == [round((clock.now - 1000) * 1000)] * 2
    before = ranks.broadcasts
    clock.now += 2.0  # slow batches
    ranks("after_batch")
    assert ranks.broadcasts == before + 1


def test_ranks_share_the_time_after_1_2_4_batches_at_most_128_and_after_each_pause(monkeypatch):
    ranks, when = Ranks(monkeypatch, Clock(), lambda: 0.0), []
    for number in range(1, 600):
        before = ranks.broadcasts
        ranks("after_batch")
        when += [number] * (ranks.broadcasts - before)
    assert when == [1, 3, 7, 15, 31, 63, 127, 255, 383, 511]
    before = ranks.broadcasts
    for what, broadcasts in (("after_pause", 1), ("after_batch", 2), ("after_batch", 2), ("after_batch", 3)):
        ranks(what)
        assert ranks.broadcasts == before + broadcasts


def test_batches_of_seconds_read_the_clock_each_and_quick_ones_after_them_do_not(monkeypatch):
    clock = Clock()
    ranks = Ranks(monkeypatch, clock, lambda: 0.0)
    for number in range(1, 6):
        clock.now += 2
        ranks("after_batch")
        assert ranks.broadcasts == number
    for _ in range(100):
        clock.now += 0.001
        ranks("after_batch")
    # after 1, 2, 4, ... of them
    assert ranks.broadcasts == 5 + 6


def test_a_plan_reads_the_clock_again_after_a_pause(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time_budget, "seconds", clock)
    plan, shared = TimePlan(Linear(None, 1, 0), "a test"), []
    plan._limit = TimeLimit(0.0, 100.0)
    strategy = SimpleNamespace(broadcast=lambda value: shared.append(value) or value)
    plan.begin(SimpleNamespace(world_size=2, strategy=strategy), automatic=True)
    assert len(shared) == 1
    # the first batch reads it, and the second takes as long as the first
    for position in (250, 500):
        clock.now += 0.25
        assert plan.position() == position
    assert len(shared) == 2
    clock.now += 20
    assert plan.position(pause=True) == 20_500
    assert len(shared) == 3
    for position in (20_750, 21_000):
        clock.now += 0.25
        assert plan.position() == position
    assert len(shared) == 4


def test_batches_that_become_slower_never_move_the_position_back(monkeypatch):
    clock = Clock()
    ranks, told = Ranks(monkeypatch, clock, lambda: 0.0), []
    for number in range(400):
        clock.now += 0.001 if number < 200 else 0.1 if number < 220 else 0.0001
        told.append(ranks("after_batch"))
    assert told == sorted(told)
    assert all(first == second for first, second in told)
    # ten batches at the old pace were at most a second
    assert abs(told[-1][0] / 1000 - (clock.now - 1000)) < 1
