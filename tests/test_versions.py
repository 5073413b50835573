"""The versions that are declared, pinned, documented and run are the same, and beside them pip replaces nothing."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from importlib.machinery import SourceFileLoader

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support import conditions, expected_warnings, fork_server, record
from tests.support.snippets import ROOT, python_path


def _client(path):
    """Return the library that a file of tests is named for."""
    return path.stem.removeprefix("test_").replace("_", "-")


PROJECT = (ROOT / "pyproject.toml").read_text()
GROUPS = sorted({path.parent for path in (ROOT / "tests" / "clients").glob("*/test_*.py")})
CLIENTS = {group.name: {_client(path) for path in group.glob("test_*.py")} for group in GROUPS}
SETS = ("tested", "lowest", "deepspeed", *(f"clients-{group}" for group in CLIENTS))
FLOOR = {"torch": "2.6", "lightning": "2.5.0", "torchmetrics": "1.4", "tensorboard": "2.18"}


def listed(key):
    """Return the strings of one list of pyproject.toml (Python 3.10 has no reader of TOML)."""
    return re.findall(r'^ *["\'](.+)["\'],', re.search(rf"^{key} = \[\n(.*?)^\]", PROJECT, re.M | re.S)[1], re.M)


REQUIREMENTS = {requirement.name: requirement for requirement in map(Requirement, listed("dependencies"))}
PYTHONS = re.findall(r"Python :: (3\.\d+)", PROJECT)


def pins(name):
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    found = {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}
    return {name.replace("_", "-"): version for name, version in found.items()}


def lower(requirement):
    return next(spec.version for spec in requirement.specifier if spec.operator == ">=")


@pytest.fixture(scope="module")
def compatibility():
    path = ROOT / "docs" / "compatibility" / "make"
    loader = SourceFileLoader("compatibility_make", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def records():
    return {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs" / "compatibility").glob("*.json")}


def test_the_bounds_are_those_of_the_documents():
    for name, version in FLOOR.items():
        assert lower(REQUIREMENTS[name]) == version
    assert REQUIREMENTS["lightning"].specifier == REQUIREMENTS["pytorch-lightning"].specifier
    assert f'requires-python = ">={PYTHONS[0]}"' in PROJECT
    assert f'target-version = "py{PYTHONS[0].replace(".", "")}"' in PROJECT
    assert f'python_version = "{PYTHONS[0]}"' in PROJECT
    install = (ROOT / "README.md").read_text().split("\n## Install\n")[1].split("\n## ")[0]
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}" in install
    assert f"| Python | {PYTHONS[0]} to {PYTHONS[-1]} |" in page
    for name, version in FLOOR.items():
        assert f"{name} {version}" in install, name
        assert re.search(rf"^\| {name}(, pytorch-lightning)? \| {re.escape(version)} ", page, re.M), name


@pytest.mark.parametrize("name", SETS)
def test_a_pinned_set_is_within_the_bounds(name):
    for requirement in REQUIREMENTS.values():
        assert requirement.specifier.contains(pins(name)[requirement.name]), requirement


def test_the_lowest_set_has_the_lowest_versions():
    for name, requirement in REQUIREMENTS.items():
        declared, pinned = Version(lower(requirement)).release, Version(pins("lowest")[name]).release
        assert pinned[: len(declared)] == declared, name
    assert pins("lowest")["torch"] == "2.6.0"


def test_every_set_that_is_installed_from_exists():
    used = set(re.findall(r"constraints/([\w.%-]+)", (ROOT / "Makefile").read_text())) - {"clients-"}
    patterns = [name.replace("%", "*") for name in used]
    names = [path.name for path in (ROOT / "constraints").iterdir() if path.suffix in {".txt", ".py"}]
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in names)
    assert all(any(fnmatch(name, pattern) for name in names) for pattern in patterns)
    for document in ("README.md", "CONTRIBUTING.md"):
        for path in re.findall(r"constraints/[\w.-]+", (ROOT / document).read_text()):
            assert (ROOT / path).exists(), (document, path)


def test_the_rows_are_made_from_the_records(compatibility):
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert compatibility.page(page) == page


def test_a_record_is_of_the_versions_that_it_stands_for():
    found = records()
    for name in set(SETS) & set(found):
        for requirement in REQUIREMENTS:
            assert found[name]["versions"][requirement].split("+")[0] == pins(name)[requirement], (name, requirement)
    for name, run in found.items():
        assert run["counts"]["failed"] == run["counts"]["error"] == 0, name
        # the second is of a test that stood in some runs where it does not apply
        assert all(reason.startswith(conditions.NEEDS) or reason == "its own test" for reason in run["skipped"]), name
        assert ".".join(run["python"].split(".")[:2]) in PYTHONS, name
        for requirement in REQUIREMENTS.values():
            assert requirement.specifier.contains(run["versions"][requirement.name], prereleases=True), (
                name,
                requirement,
            )


@pytest.mark.parametrize("group", [group for group in CLIENTS if f"clients-{group}" in records()])
def test_a_row_for_each_client_is_of_the_pinned_version(group):
    """Its tests stand in a file of its name, in the folder of the group whose set has it."""
    pinned, ran = pins(f"clients-{group}"), records()[f"clients-{group}"]["inside"]
    assert set(ran) == CLIENTS[group]
    for client, found in ran.items():
        assert found["version"] == pinned[client], client
        assert found["passed"] > 0 == found["failed"] == found["error"] == found["skipped"], client


@pytest.mark.slow
def test_a_record_holds_what_was_run(tmp_path):
    """In a process of its own, in which one test passes, one fails, one breaks and one is skipped."""
    tests = tmp_path / "test_four.py"
    tests.write_text(
        "import pytest\n"
        "def test_one(): pass\n"
        "def test_two(): assert False\n"
        "def test_three(absent): pass\n"
        "@pytest.mark.skipif(True, reason='needs a device')\n"
        "def test_four(): pass\n"
    )
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    arguments = ["-q", "-p", "no:cacheprovider", "--record", "record.json", "test_four.py"]
    done = fork_server.pytest_in(tmp_path, *arguments, path=python_path(), timeout=300)
    assert done.returncode == 1, done.stderr
    written = json.loads((tmp_path / "record.json").read_text())
    assert written["counts"] == {"passed": 1, "failed": 1, "error": 1, "skipped": 1, "xfailed": 0}
    assert written["skipped"] == {"needs a device": 1}
    assert written["versions"]["torch"] == record._version("torch")


def test_each_expected_warning_says_why():
    for expected in expected_warnings.EXPECTED:
        action, message = expected.filter.split(":")[:2]
        assert (action, len(message) > 20, len(expected.reason) > 20) == ("ignore", True, True), expected


def stand_in(folder, name, version):
    """Make ``name`` look installed to pip."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "INSTALLER").write_text("pip\n")
    (metadata / "RECORD").write_text("")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build", reason="needs the package build")
    pytest.importorskip("hatchling", reason="needs the package hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.mark.parametrize("name", ["lowest", "tested", "clients-science"])
def test_pip_changes_no_pinned_package_for_the_wheel(name, wheel, tmp_path):
    for package, version in pins(name).items():
        stand_in(tmp_path / "site", package, version)
    found = dry_run(wheel, tmp_path / "site")
    assert [package["metadata"]["name"] for package in found] == ["lightning-plugins"]


def test_pip_does_change_one_below_the_bounds(wheel, tmp_path):
    for package, version in {**pins("lowest"), "torch": "2.5.1"}.items():
        stand_in(tmp_path / "site", package, version)
    with pytest.raises(AssertionError, match=r"torch>=2\.6"):
        dry_run(wheel, tmp_path / "site")


def dry_run(wheel, site):
    """Return what ``pip install`` would install beside what ``site`` holds; there is no index that it could ask."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-index", "--report", "-", wheel],
        env={**os.environ, "PYTHONPATH": python_path(site), "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["install"]


def test_what_runs_the_sets_is_documented():
    for target in ("test-lowest", "test-newest", "release-check"):
        assert f"`make {target}`" in (ROOT / "CONTRIBUTING.md").read_text(), target
        assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.M), target


def test_the_version_has_its_section_among_the_changes():
    version = re.search(r'__version__ = "(.+)"', (ROOT / "lightning_plugins" / "_version.py").read_text())[1]
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", headings[1])
