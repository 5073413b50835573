"""Mutants that change nothing: what ``mutants.py`` cannot see killed, and why.

A key is the module, the text of the line, and the change.
"""

_EITHER_ORDER = "the larger or smaller of two numbers is the same in either order"

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "lightning_plugins/schedules/families.py",
        "return float(min(ramp, replicas))",
        "min(ramp, replicas) -> (min(replicas, ramp))",
    ): _EITHER_ORDER,
    (
        "lightning_plugins/statistics/rows.py",
        "per_row = (time.monotonic() - self._last_flush) / max(1, len(self._waiting))",
        "max(1, len(self._waiting)) -> (max(len(self._waiting), 1))",
    ): _EITHER_ORDER,
}
