"""A new technique costs its folder and three lines: one is written into a copy of the tree, as CONTRIBUTING says.

The tests of what every callback promises then run on it there, from its row; and each place that is left out fails one.
"""

import re
import shutil

import pytest

from tests.support import conditions, fork_server
from tests.support.snippets import ROOT, python_path
from tests.test_import_rules import lint

FOLDER = {
    "__init__.py": '''
"""Gradient clipping at a percentile of the norms seen so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.clipping.callback import PercentileClipping as PercentileClipping
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
''',
    "percentile.py": '''
"""The limit of a norm: a percentile of those before."""

from __future__ import annotations

from torch import Tensor, stack


def limit(norms: list[Tensor], percentile: float) -> Tensor:
    """Return the percentile of norms, the last one included."""
    return stack(norms).quantile(percentile / 100)
''',
    "callback.py": '''
"""The callback that clips gradients."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_plugins.clipping.percentile import limit
from lightning_plugins.core.callback import Callback, Stage
from lightning_plugins.core.lightning import LightningModule, Trainer
from lightning_plugins.core.validation import real_number


class PercentileClipping(Callback):
    """Clips the gradient of a step to a percentile of the norms of all steps so far.

    When:
        Before every optimizer step, behind accumulation.

    Checkpoint:
        The norms so far.

    Distributed:
        Every rank has the same gradients, and so the same norms.

    Cost:
        One norm and one number a step.

    Does not compose with:
        ``gradient_clip_val`` clips once more.

    Args:
        percentile: Of the norms, from 0 to 100.

    References:
        Seetharaman et al. 2020, arXiv:2007.14469.
    """

    stage: ClassVar[Stage] = Stage.GRADIENTS

    def __init__(self, percentile: float = 10.0) -> None:
        self.percentile = real_number("percentile", percentile, at_least=0, at_most=100)
        super().__init__(percentile=self.percentile)
        self.norms: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip."""
        parameters = [parameter for parameter in pl_module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        self.norms.append(norm)
        torch.nn.utils.clip_grads_with_norm_(parameters, float(limit(self.norms, self.percentile)), norm)

    def get_state(self) -> dict[str, Any]:
        """Return the norms."""
        return {"norms": torch.stack(self.norms)} if self.norms else {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self.norms = list(state["norms"])
''',
    "README.md": """
# Percentile clipping

Clips outliers of the gradient.

## When to use it

Where single batches have gradients that are far too long.

## Which number

`percentile=10`, which the authors use.

## Use

`Trainer(callbacks=[PercentileClipping(10)])`

## What it does

It scales a gradient that is longer than the percentile of the norms so far down to that length.

## Arguments

`percentile`: 10, as in the paper.

## Cost

One norm a step.

## Checkpoint

The norms.

## Distributed

The same on every rank.

## Does not compose with

`gradient_clip_val`.

## Source

[Seetharaman et al. 2020](https://arxiv.org/abs/2007.14469).
""",
}
NAME = "PercentileClipping"
# file -> (a line that is there, the line that is added in front of it): the three places besides the folder
LINES = {
    "lightning_plugins/__init__.py": (
        "    from lightning_plugins.ema import (",
        f"    from lightning_plugins.clipping import {NAME} as {NAME}",
    ),
    "tests/support/cases.py": (
        '    "PostHocEMA": case(',
        f'    "{NAME}": case(("{{percentile: 50}}", {{"percentile": 50.0}}), pair=({{}}, {{"percentile": 50.0}})),',
    ),
    "README.md": (
        re.compile(r"^\| .*`MicroBatching\(.*$", re.MULTILINE),
        f"| Clipping | `{NAME}()` | clips outliers | [card](lightning_plugins/clipping/README.md) |",
    ),
    "CHANGELOG.md": ("## [Unreleased]", f"- `{NAME}`: clips at a percentile of the norms so far."),
}
OF_ALL = [
    "tests/test_every_callback.py",
    "tests/test_places.py",
    "tests/test_architecture.py",
    "tests/test_site.py",
    "tests/hostile/test_constructors.py",
    "tests/integration/test_innocent_user.py",
    "tests/integration/test_lightning_cli.py",
]
pytestmark = pytest.mark.slow


def copy_of_the_tree(path):
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.png", "site", "dist", "runs")
    shutil.copytree(ROOT, path, ignore=ignored)
    return path


def write(tree, leave_out=()):
    """Write the technique into a tree."""
    folder = tree / "lightning_plugins" / "clipping"
    folder.mkdir()
    for name, text in FOLDER.items():
        (folder / name).write_text(text.lstrip())
    for name, (mark, line) in LINES.items():
        if name not in leave_out:
            text = (tree / name).read_text()
            found = mark.search(text)[0] if isinstance(mark, re.Pattern) else mark
            assert text.count(found) == 1, name
            pair = (found, line) if name == "CHANGELOG.md" else (line, found)
            (tree / name).write_text(text.replace(found, "\n".join(pair)))


def run_tests(tree, *arguments):
    """Run pytest in a tree; return what it printed and the names of the tests that failed."""
    path = python_path(tree, tree / "examples")
    done = fork_server.pytest_in(
        tree, "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *arguments, path=path, timeout=600
    )
    printed = done.stdout + done.stderr
    return printed, {
        name.partition("[")[0] for name in re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+)", printed, re.MULTILINE)
    }


@conditions.import_linter
def test_it_is_written_as_contributing_says_and_keeps_every_promise(tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    write(tree)
    assert lint(tree)[0] == 0
    chosen = f"{NAME} or clipping or any_order or lightning_gives or died or row or place or page"
    printed, failed = run_tests(tree, *OF_ALL, "-k", chosen)
    assert not failed, printed[-5000:]
    passed = int(re.search(r"(\d+) passed", printed)[1])
    assert passed > 40, printed[-2000:]
    assert printed.count("skipped") <= 1, printed[-2000:]


def test_each_place_that_is_left_out_fails_its_test(tmp_path):
    """And so does a section of the card with nothing in it."""
    chosen = [*OF_ALL[:2], "tests/test_architecture.py", "-k", "has_its_row or test_places or every_folder"]
    registry, *others = LINES
    tree = copy_of_the_tree(tmp_path / "unregistered")
    write(tree, leave_out=[registry])
    printed, failed = run_tests(tree, *chosen)
    unknown = "test_every_folder_is_core_the_command_line_or_a_technique_of_the_list"
    assert failed == {unknown, "test_every_callback_has_its_row"}, printed[-3000:]

    tree = copy_of_the_tree(tmp_path / "alone")
    write(tree, leave_out=others)
    card = tree / "lightning_plugins" / "clipping" / "README.md"
    card.write_text(card.read_text().replace("One norm a step.\n", ""))
    printed, failed = run_tests(tree, *chosen)
    assert failed == {
        "test_every_callback_has_its_row",
        "test_every_callback_has_a_row_in_the_readme",
        "test_every_card_is_linked_from_the_readme",
        "test_every_public_name_has_a_line_in_the_changelog",
        "test_every_section_of_a_card_says_something",
    }, printed[-3000:]


def test_contributing_names_exactly_these_places():
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a technique")[2]
    named = set(re.findall(r"^\d\. (?:Its tests, )?.*?`(\S+?)`", text, re.MULTILINE))
    assert named == {*LINES, "lightning_plugins/<technique>/", "tests/<technique>/"}
