"""Checkpoint averaging: one file that loads, from the last or the best checkpoints of a run.

The functions need torch only; the callback is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.checkpoints.average import average_checkpoints as average_checkpoints
    from lightning_plugins.checkpoints.average_plan import Plan as Plan, plan_average as plan_average
    from lightning_plugins.checkpoints.averaged_file import weights_digest as weights_digest
    from lightning_plugins.checkpoints.callback import CheckpointAveraging as CheckpointAveraging
    from lightning_plugins.checkpoints.inspect import (
        describe_directory as describe_directory,
        describe_weights as describe_weights,
    )
    from lightning_plugins.checkpoints.record import read_manifest as read_manifest
    from lightning_plugins.checkpoints.selection import select_checkpoints as select_checkpoints
    from lightning_plugins.checkpoints.soup import greedy_soup as greedy_soup
    from lightning_plugins.core.checkpoint_file import CheckpointError as CheckpointError
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
