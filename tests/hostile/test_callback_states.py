"""Other values inside an otherwise whole state of a callback: taken, or refused in one line before a file is touched.

``TORTURE=1`` in the environment tries every value in every place, about ten thousand; the gate some of them.
"""

import logging
import random
import tempfile
import traceback
import warnings

import pytest

from lightning_plugins.core.lightning import MisconfigurationException
from tests.support import counts
from tests.support.audit_events import listening, outside
from tests.support.damage import bounded
from tests.support.other_values import replaced
from tests.support.state_cases import STACKS, Stopped

FEW, MANY = 20, 10_000
# what a state says of batches that do not go on from it
OF_BATCHES = "The batches of a phase must be alike"


@pytest.fixture
def stopped(request, tmp_path, monkeypatch):
    """A run of a technique that ended in its middle, whose temporary files lie below the test's folder."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield Stopped.run(tmp_path / "stopped", request.param)
    finally:
        logging.disable(logging.NOTSET)


def resumed(stopped, place, value):
    """Go on with another value in one place; return why it was refused, if it was."""
    stopped.restore()
    with listening() as events, bounded(60, 1):
        try:
            stopped.resume(replaced(stopped.content, place, value))
            refusal = None
        except (ValueError, TypeError, MisconfigurationException) as error:
            refusal = error
    assert outside(events, stopped.folder.parent) == [], place
    return refusal


def is_clear(error):
    """Return whether an error is a line that the package raised, and says which part of the state is at fault."""
    text, where = str(error), traceback.extract_tb(error.__traceback__)[-1]
    one_line = text.isprintable() and len(text) < 1500
    return (
        "lightning_plugins" in where.filename and one_line and ("`" in text or "state of" in text or OF_BATCHES in text)
    )


@pytest.mark.parametrize("stopped", STACKS, indirect=True)
def test_any_value_in_any_place_of_a_state_is_taken_or_refused(stopped, record_property):
    cases = stopped.cases()
    random.Random(counts.seed()).shuffle(cases)
    tried = cases[: counts.wanted(FEW, MANY)]
    found = {"taken": 0, "refused": 0}
    for place, value in tried:
        refusal = resumed(stopped, place, value)
        found["taken" if refusal is None else "refused"] += 1
        if refusal is not None:
            assert is_clear(refusal), (place, repr(value)[:200], refusal)
            assert stopped.changed() == [], (place, refusal)
    counts.record(
        record_property, "hostile inputs", {"values in a callback's state": len(tried)}, f"SEED={counts.seed()}"
    )
    assert found["refused"] > len(tried) // 4


@pytest.mark.parametrize("stopped", STACKS, indirect=True)
def test_the_state_as_it_is_goes_on(stopped):
    assert resumed(stopped, (), stopped.content) is None
