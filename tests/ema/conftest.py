import os
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "ema"


@pytest.fixture(autouse=True)
def _isolated():
    """Every test starts from one seed, one thread and float32, and leaves the environment as it was."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
