"""The names of DeepSpeed that the package relies on are in what is installed."""

import pytest

from lightning_plugins.core.private_names import FOREIGN_NAMES
from tests.core.test_private_names import has, imported

NAMES = sorted({(entry.owner, entry.name) for entry in FOREIGN_NAMES if entry.owner.startswith("deepspeed.")})


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_a_listed_name_is_installed(path, name):
    assert has(imported(path), name)


def test_there_are_some():
    assert len(NAMES) > 20
