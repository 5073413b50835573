"""The rules of the house: public names, lazy imports, one callback for both namespaces."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from enum import Enum

import pytest

import lightning_plugins
from lightning_plugins.core.lightning import MisconfigurationException
from tests.support.cases import PACKAGE, PUBLIC, TECHNIQUES


def in_a_fresh_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


def test_every_public_name_loads_and_is_listed():
    for name in lightning_plugins.__all__:
        assert getattr(lightning_plugins, name) is not None
        assert name in dir(lightning_plugins)
    with pytest.raises(AttributeError, match="module 'lightning_plugins' has no attribute 'Nothing'"):
        lightning_plugins.Nothing  # noqa: B018


def test_every_folder_is_core_the_command_line_or_a_technique_of_the_list():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders - {"core", "cli"} == set(TECHNIQUES)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_technique_lists_and_loads_its_names(technique):
    package = importlib.import_module(f"lightning_plugins.{technique}")
    public = {name for name, module in PUBLIC.items() if module == package.__name__}
    assert public <= set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)


def test_importing_costs_only_what_is_used():
    loaded = "[name for name in ('torch', 'lightning', 'pytorch_lightning', 'tensorboard') if name in sys.modules]"
    for code, expected in [
        ("import lightning_plugins", []),
        ("from lightning_plugins import WarmupCosine", []),
        ("import lightning_plugins.schedules", []),
        ("from lightning_plugins import HalfLife", []),
        ("from lightning_plugins import ScheduleLR", ["torch"]),
    ]:
        assert in_a_fresh_process(f"import json, sys; {code}; print(json.dumps({loaded}))") == expected, code


def test_public_classes_and_functions_are_documented():
    for name in lightning_plugins.__all__:
        thing = getattr(lightning_plugins, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            documentation = inspect.getdoc(thing) or ""
            assert len(documentation) > 60, name
            if inspect.isclass(thing) and issubclass(thing, (Exception, Enum)):
                continue  # they take no arguments of their own
            parameters = [p for p in inspect.signature(thing).parameters if p not in {"args", "kwargs"}]
            if parameters:
                assert "Args:" in documentation or not inspect.isclass(thing), name


def test_our_misconfiguration_is_caught_under_either_name():
    from lightning.fabric.utilities.exceptions import MisconfigurationException as Unified
    from lightning_fabric.utilities.exceptions import MisconfigurationException as Classic

    for kind in (Unified, Classic):
        with pytest.raises(kind, match="no"):
            raise MisconfigurationException("no")


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_technique_has_a_card(technique):
    card = (PACKAGE / technique / "README.md").read_text().lower()
    for heading in (
        "## use",
        "## what it does",
        "## arguments",
        "## cost",
        "## checkpoint",
        "## distributed",
        "## source",
    ):
        assert heading in card, heading


@pytest.mark.parametrize("folder", ["lightning_plugins", "tests", "benchmarks", "examples", "docs"])
def test_files_have_one_subject(folder):
    counts = {path: len(path.read_text().splitlines()) for path in (PACKAGE.parent / folder).rglob("*.py")}
    assert not {str(path): count for path, count in counts.items() if count > 400}


def test_nothing_outside_the_repository_is_referred_to():
    """Numbers of defects or requests that a reader cannot look up."""
    number = re.compile(r"\((?:defect|user-needs|mutant|case|issue) \w?\d+\)|\bissue #?\d+\b", re.IGNORECASE)
    for path in (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.md"), *(PACKAGE.parent / "tests").rglob("*.py")):
        assert not number.findall(path.read_text()), path
