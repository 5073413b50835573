"""Checkpoint averaging: one file that loads, from the last or the best checkpoints of a run.

The functions need torch only; the callback is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.checkpoints.average import average_checkpoints
    from lightning_plugins.checkpoints.callback import CheckpointAveraging
    from lightning_plugins.checkpoints.formats.base import CheckpointError
    from lightning_plugins.checkpoints.plan import Plan, plan_average
    from lightning_plugins.checkpoints.selection import read_manifest, select_checkpoints
    from lightning_plugins.checkpoints.soup import greedy_soup
    from lightning_plugins.checkpoints.streaming_mean import weights_digest

__all__ = [
    "CheckpointAveraging",
    "CheckpointError",
    "Plan",
    "average_checkpoints",
    "greedy_soup",
    "plan_average",
    "read_manifest",
    "select_checkpoints",
    "weights_digest",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CheckpointAveraging": f"{__name__}.callback",
        "CheckpointError": f"{__name__}.formats.base",
        "Plan": f"{__name__}.plan",
        "average_checkpoints": f"{__name__}.average",
        "greedy_soup": f"{__name__}.soup",
        "plan_average": f"{__name__}.plan",
        "read_manifest": f"{__name__}.selection",
        "select_checkpoints": f"{__name__}.selection",
        "weights_digest": f"{__name__}.streaming_mean",
    },
)
