"""What the tests of checkpoint averaging share."""

import pytest


@pytest.fixture
def said(monkeypatch):
    """What rank zero says."""
    lines: list[str] = []
    monkeypatch.setattr("lightning_plugins.checkpoints.callback.rank_zero_info", lines.append)
    return lines
