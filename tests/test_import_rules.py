"""The import rules of pyproject.toml fail closed: each is broken in a copy of the tree, and lint-imports says so."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import conditions
from tests.support.snippets import ROOT

LINTER = Path(sys.executable).with_name("lint-imports")
DOOR = "from lightning_plugins.core.lightning import Trainer"
PROTECTED = "Only adapters, which know a Trainer"
LAYERS = "The command line stands above the techniques"
PLANTED = {
    # what is planted: (file, line, the rule that it breaks)
    "a module imports Lightning": ("ema/callback.py", "import lightning.pytorch", "Lightning is imported by"),
    "a module imports the other Lightning": ("ema/decay.py", "import pytorch_lightning", "Lightning is imported by"),
    "a pure module imports the door": ("ema/decay.py", DOOR, PROTECTED),
    "a pure module of core imports the door": ("core/batches.py", DOOR, PROTECTED),
    "a new module imports the door": ("ema/new.py", DOOR, PROTECTED),
    "a pure module imports the base of callbacks": (
        "statistics/running.py",
        "from lightning_plugins.core.callback import Callback",
        PROTECTED,
    ),
    "a pure module imports an adapter": (
        "ema/decay.py",
        "from lightning_plugins.ema.averaging_callback import AveragingCallback",
        PROTECTED,
    ),
    "a pure module imports an adapter by its package": (
        "ema/decay.py",
        "from lightning_plugins.ema import EMA",
        PROTECTED,
    ),
    "a pure module imports an adapter by the public name": (
        "ema/decay.py",
        "from lightning_plugins import EMA",
        PROTECTED,
    ),
    "for type checkers only": (
        "ema/decay.py",
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {DOOR}",
        PROTECTED,
    ),
    "within a function": ("ema/decay.py", f"def door():\n    {DOOR}", PROTECTED),
    "a technique imports another": ("ema/callback.py", "from lightning_plugins.events import events", LAYERS),
    "the other way round": ("events/callback.py", "from lightning_plugins.ema import decay", LAYERS),
    "by the public name": ("events/callback.py", "from lightning_plugins import EMA", LAYERS),
    "core imports a technique": ("core/files.py", "from lightning_plugins.ema import decay", LAYERS),
    "core imports the command line": ("core/files.py", "from lightning_plugins.cli import commands", LAYERS),
    "a technique imports the command line": ("ema/decay.py", "from lightning_plugins.cli import commands", LAYERS),
    "a new technique imports another": ("mixing/callback.py", "from lightning_plugins.ema import decay", LAYERS),
    "another imports a new technique": ("ema/callback.py", "import lightning_plugins.mixing.callback", LAYERS),
    "a new technique's pure module imports the door": ("mixing/ratio.py", DOOR, PROTECTED),
}


def lint(tree):
    """Run lint-imports in a tree; return its exit status and what it printed, in one line."""
    done = subprocess.run(
        [LINTER, "--no-cache"],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"COLUMNS": "200"},
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree, with a new technique that is listed nowhere and keeps the rules."""
    if not LINTER.exists():
        pytest.skip(f"{conditions.NEEDS}the package import-linter")
    path = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "pyproject.toml", path)
    ignored = shutil.ignore_patterns("__pycache__", "*.md", "*.png")
    shutil.copytree(ROOT / "lightning_plugins", path / "lightning_plugins", ignore=ignored)
    new = path / "lightning_plugins" / "mixing"
    new.mkdir()
    (new / "__init__.py").write_text("")
    (new / "ratio.py").write_text("import torch\n")
    (new / "callback.py").write_text(f"from lightning_plugins.core.callback import Callback\n{DOOR}\n")
    return path


def test_the_tree_with_a_new_technique_keeps_the_rules(tree):
    status, printed = lint(tree)
    assert status == 0, printed
    assert "3 kept, 0 broken" in printed


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_violation_breaks_its_rule(tree, planted):
    path, line, rule = PLANTED[planted]
    file = tree / "lightning_plugins" / path
    before = file.read_text() if file.exists() else None
    file.write_text(f"{before or ''}\n{line}\n")
    try:
        status, printed = lint(tree)
    finally:
        file.unlink() if before is None else file.write_text(before)
    assert status == 1, printed
    broken = printed.partition("Broken contracts")[2]
    assert rule in broken, printed


def test_every_listed_adapter_exists_and_is_one():
    """A pure module in the list would be free to import what it must not."""
    tomllib = pytest.importorskip("tomllib")
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [rule] = [rule for rule in rules if rule["type"] == "protected"]
    adapters = {name for name in rule["allowed_importers"] if "*" not in name} - {"lightning_plugins"}
    assert {*rule["allowed_importers"]} - {*rule["protected_modules"]} == {"lightning_plugins.cli.*"}
    assert {*rule["protected_modules"]} <= {*rule["allowed_importers"]}
    known = [*adapters, "lightning_plugins.core.callback"]
    for name in adapters - {"lightning_plugins.core.lightning"}:
        source = (ROOT / f"{name.replace('.', '/')}.py").read_text()
        assert any(f"{other} import" in source for other in known), name
