"""Tests inside other people's libraries: collected only where those are installed (``make test-clients``).

Where one of them is, all must be: a client that is missing then is an error, not a test that silently does not run.
"""

import warnings
from importlib.util import find_spec

import pytest
import torch

CLIENTS = ("darts", "pytorch_forecasting")

collect_ignore_glob = [] if any(find_spec(client) for client in CLIENTS) else ["test_*.py"]

torch.set_num_threads(1)  # for fixtures of a module too: they begin before the first test's

if not collect_ignore_glob:
    with warnings.catch_warnings():  # what they warn of while they are imported is theirs
        warnings.simplefilter("ignore")
        import pytorch_forecasting  # noqa: F401


def pytest_collection_modifyitems(items):
    """Let clients warn; a warning of our own stays an error."""
    for item in items:
        if "clients" in item.path.parts:
            ours = "error::lightning_plugins.core.validation.LightningPluginsWarning"
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings(ours))
