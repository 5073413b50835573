"""Benchmarks choose settings for their process; in a test it has others to run."""

import logging

import pytest
import torch

QUIETED = ("lightning.pytorch", "pytorch_lightning", "lightning_utilities", "lightning.fabric")


@pytest.fixture(autouse=True)
def undo_settings():
    """Benchmarks choose the number of threads and silence Lightning for their process."""
    threads, levels = torch.get_num_threads(), {name: logging.getLogger(name).level for name in QUIETED}
    yield
    torch.set_num_threads(threads)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
