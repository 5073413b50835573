"""The names of DeepSpeed that the package relies on are in what is installed."""

import re

import pytest

from lightning_plugins.core.private_names import FOREIGN_NAMES
from tests.core.test_private_names import has, imported
from tests.support.snippets import ROOT

NAMES = sorted({(entry.owner, entry.name) for entry in FOREIGN_NAMES if entry.owner.startswith("deepspeed.")})


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_a_listed_name_is_installed(path, name):
    assert has(imported(path), name)


def test_the_stand_ins_have_them_and_no_others():
    """So that what the ordinary suite tests with them is true here."""
    source = (ROOT / "tests" / "support" / "zero_stand_ins.py").read_text()
    assert all(re.search(rf"\b{name}\b", source) for _, name in NAMES)
    assert set(re.findall(r"\bparameter\.(\w+) = ", source)) <= {name for _, name in NAMES} | {"data", "partition"}
