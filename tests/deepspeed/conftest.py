"""Tests under DeepSpeed's ZeRO on two CPU processes: collected only where it is installed (``make test-deepspeed``)."""

from importlib.util import find_spec

import pytest
import torch

collect_ignore_glob = [] if find_spec("deepspeed") else ["*.py"]

torch.set_num_threads(1)  # for fixtures of a module too: they begin before the first test's


def pytest_collection_modifyitems(items):
    """Let DeepSpeed warn; a warning of our own stays an error."""
    for item in items:
        if "deepspeed" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(
                pytest.mark.filterwarnings("error::lightning_plugins.core.validation.LightningPluginsWarning")
            )
