"""Tests inside other people's libraries: each folder is a group of them that can live in one environment.

They are collected only where a folder is named (``make test-clients``); a library that is missing there is an error.
"""

from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent

torch.set_num_threads(1)  # for fixtures of a module too: they begin before the first test's


def _is_named(config):
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    return any(path == FOLDER or FOLDER in path.parents for path in named)


def pytest_configure(config):
    """Let clients warn, also while they are imported; a warning of our own stays an error."""
    if _is_named(config):
        config.addinivalue_line("filterwarnings", "ignore")
        config.addinivalue_line("filterwarnings", "error::lightning_plugins.core.validation.LightningPluginsWarning")


def pytest_ignore_collect(collection_path, config):
    """Leave a client's tests out of the suite."""
    return None if _is_named(config) else True


@pytest.fixture(scope="module", autouse=True)
def _in_a_folder_of_its_own(tmp_path_factory):
    """Some clients write beside the program, whatever they are told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        yield
