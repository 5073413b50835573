"""What Lightning remarks on in runs as small as these."""

from pathlib import Path

import pytest

REMARKS = (
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:`.*` has no `.*_step` but has",
    "ignore:Be aware that when using `ckpt_path`, callbacks used",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    r"ignore:`.fit\(ckpt_path=None\)` was called without a model",
    r"ignore:.fit\(ckpt_path=\"last\"\) is set, but there is no last checkpoint",
    "ignore:The dirpath has changed from",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for remark in REMARKS:
                item.add_marker(pytest.mark.filterwarnings(remark), append=False)
