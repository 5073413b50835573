"""When rows that wait are handed out."""

from types import SimpleNamespace

import pytest
import torch

from lightning_plugins.statistics import rows
from lightning_plugins.statistics.metric_names import statistic_set
from lightning_plugins.statistics.rows import RowBuffer, StatisticsRow
from lightning_plugins.statistics.running import PhaseSums
from tests.support.statistics_runs import Recording


@pytest.mark.parametrize("patience", [0, 10])
def test_rows_are_handed_out_when_the_patience_of_the_most_hasty_reader_is_over_to_the_second(monkeypatch, patience):
    now = [100.0]
    monkeypatch.setattr(rows, "time", SimpleNamespace(monotonic=lambda: now[0]))
    ledger, hasty = RowBuffer(statistic_set([])), Recording(flush_seconds=patience)
    ledger.readers += [Recording(flush_seconds=10_000), hasty]
    sums, seen = PhaseSums(ledger.statistics), []
    for number in range(1, 7):
        sums.update(torch.tensor(float(number)), None, None)
        ledger.add(StatisticsRow("train", 1, 1, number, 6, number, 0, 0.1, 0.0, 0.0, sums.state_now()))
        seen.append(len(hasty.rows))
        # a row at seconds 0, 5, 9.5, 10, 15 and 20; the newest stays, as its phase may end with it
        now[0] += (5, 4.5, 0.5, 5, 5, 0)[number - 1]
    assert seen == ([0, 1, 2, 3, 4, 5] if patience == 0 else [0, 0, 0, 3, 3, 5])
    ledger.flush()
    assert [row.batch for row in hasty.rows] == [1, 2, 3, 4, 5, 6]


class TwoRanks:
    """Adds up as if another rank had seen the same."""

    def __init__(self):
        self.calls = 0

    def __call__(self, tensor):
        self.calls += 1
        return tensor * 2


def test_a_ledger_of_several_ranks_hands_out_by_number_and_doubles_up_to_what_the_patience_allows():
    ledger, add_up = RowBuffer(statistic_set(["accuracy"])), TwoRanks()
    ledger.reduce = add_up
    ledger.readers.append(reader := Recording(flush_seconds=1000))
    sums = PhaseSums(ledger.statistics)
    for number in range(1, 61):
        sums.update(torch.tensor(float(number)), torch.tensor([1, 0]), torch.tensor([1, 1]))
        ledger.add(StatisticsRow("train", 1, 1, number, 60, number, 2 * number, 0.1, 0.0, 0.0, sums.state_now()))
    ledger.flush()
    # twice the proposal of rank 0, for the stand-in adds everything up twice: 1, 4, 16 rows, then the rest
    assert (reader.writes, add_up.calls) == (4, 4)
    assert [row.values["loss"] for row in reader.rows] == [(number + 1) / 2 for number in range(1, 61)]
    assert {row.values["accuracy"] for row in reader.rows} == {0.5}
    assert [row.samples for row in reader.rows] == [4 * number for number in range(1, 61)]


def test_a_ledger_alone_after_an_exception_asks_nobody():
    ledger, add_up = RowBuffer(statistic_set([])), TwoRanks()
    ledger.reduce = add_up
    ledger.readers.append(reader := Recording())
    sums = PhaseSums(ledger.statistics)
    sums.update(torch.tensor(3.0), None, None)
    ledger.add(StatisticsRow("train", 1, 1, 1, 1, 1, 1, torch.tensor(0.5), 0.0, 0.0, sums.state_now()))
    ledger.flush(together=False)
    assert add_up.calls == 0
    assert (reader.rows[0].values, reader.rows[0].lr) == ({"loss": 3.0}, 0.5)
