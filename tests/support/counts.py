"""Counts of what a test has tried, shown at the end of the test run: how many kills, how many damaged files.

They travel with the test's report, so that a worker process of pytest-xdist's can give them too. ``make torture`` asks
for the large ones.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

PROPERTY = "counts"
TORTURE = bool(os.environ.get("TORTURE"))


def wanted(few: int, many: int) -> int:
    """Return how many to try: ``few`` in the suite, ``many`` in ``make torture``."""
    return many if TORTURE else few


def seed() -> int:
    """Return where chance begins: the same in every run of the suite, a new one in ``make torture``, or ``$SEED``."""
    if os.environ.get("SEED"):
        return int(os.environ["SEED"])
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(time.time()))  # all worker processes of a run agree on it
    return zlib.crc32(run.encode()) % 10**6 if TORTURE else 1


def record(record_property: Callable[[str, Any], None], what: str, counts: Mapping[str, int], note: str = "") -> None:
    """Add counts to the summary of the test run.

    Args:
        record_property: pytest's fixture of that name.
        what: What is counted, as ``"kills"``; counts of one name are added up over all tests.
        counts: Sort -> how many.
        note: What else the line should say, as a seed.
    """
    record_property(PROPERTY, {"what": what, "counts": dict(counts), "note": note})


def summary(reports: Iterable[Any]) -> list[str]:
    """Return a line for each name that the reports of tests have counts of."""
    totals: dict[str, Counter[str]] = {}
    notes: dict[str, dict[str, None]] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == PROPERTY and report.when == "teardown":  # has those of the test and of its fixtures
                totals.setdefault(value["what"], Counter()).update(value["counts"])
                notes.setdefault(value["what"], {}).update({value["note"]: None} if value["note"] else {})
    lines = []
    for what, counts in sorted(totals.items()):
        each = ", ".join(f"{number} {sort}" for sort, number in sorted(counts.items()))
        said = "".join(f"; {note}" for note in notes[what])
        lines.append(f"{sum(counts.values())} {what}: {each}{said}")
    return lines
