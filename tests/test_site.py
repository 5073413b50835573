"""The site shows every document and every public name once; the table of other libraries' names is true."""

import ast
import importlib
import importlib.util
import inspect
import re
from collections import Counter
from pathlib import Path

import lightning.pytorch
import pytest
import torch
import yaml

import lightning_plugins
from lightning_plugins import schedules
from lightning_plugins.cli import main
from tests.support import conditions
from tests.support.cases import TECHNIQUES, callback_names
from tests.support.snippets import ROOT


def module_of_docs(name):
    spec = importlib.util.spec_from_file_location(f"docs_{Path(name).name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return module_of_docs("hooks")


def leaves(entry):
    """Return the paths of a navigation."""
    if isinstance(entry, str):
        return [entry]
    return [path for part in (entry.values() if isinstance(entry, dict) else entry) for path in leaves(part)]


def test_every_page_stands_in_the_navigation_once(hooks):
    navigation = leaves(hooks.navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert Counter(navigation) == Counter([*hooks.documents(), *hooks.api_pages()])


def test_every_public_name_has_one_place_in_the_reference(hooks):
    shown = [name for page in hooks.api_pages().values() for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    for technique in hooks.techniques():
        package = importlib.import_module(f"lightning_plugins.{technique}")
        listed = [name for name in shown if name.startswith(f"lightning_plugins.{technique}.")]
        assert sorted(listed) == sorted(f"lightning_plugins.{technique}.{name}" for name in package.__all__)
    places = Counter(name.rpartition(".")[2] for name in shown)
    assert {places[name] for name in lightning_plugins.__all__ if name != "__version__"} == {1}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_page_of_the_reference_begins_with_a_table_of_its_names_callbacks_first(hooks, technique):
    page = hooks.api_pages()[f"api/{technique}.md"]
    rows = re.findall(r"^\| \[`(\w+)`\]\(#(\S+)\) \| (.+) \|$", page, re.MULTILINE)
    shown = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert [anchor for _, anchor, _ in rows] == shown
    assert all(len(said) > 10 for _, _, said in rows)
    names = [name for name, _, _ in rows]
    callbacks = [name for name in names if name in callback_names()]
    assert names[: len(callbacks)] == callbacks


def test_the_reference_shows_no_internals(hooks):
    """Of a class what is listed, which exists; nothing of what the Trainer calls."""
    for name, members in hooks._MEMBERS.items():
        module = next(m for m in map(importlib.import_module, packages(hooks)) if name in m.__all__)
        documented = inspect.getdoc(getattr(module, name))
        for member in members.split():
            assert hasattr(getattr(module, name), member) or f"{member}:" in documented, (name, member)
        assert not {"release", "get_state", "set_state", "setup"} & set(members.split())


def packages(hooks):
    return [f"lightning_plugins.{technique}" for technique in hooks.techniques()]


def test_cells_of_tables_name_their_columns_and_break_in_the_right_places():
    table = (
        "<table><thead><tr><th>you <em>add</em></th><th></th></tr></thead>"
        '<tr><td style="x"><code>a.b(c, d_e)</code> f.g</td><td>&lt;_x</td></tr></table>'
    )
    assert module_of_docs("appearance").fitted(table) == (
        "<table><thead><tr><th>you <em>add</em></th><th></th></tr></thead>"
        '<tr><td style="x" data-label="you add"><code>a.<wbr>b(<wbr>c, d_<wbr>e)</code> f.g</td>'
        '<td data-label="">&lt;_x</td></tr></table>'
    )


def test_the_hooks_hand_over_what_exists(hooks):
    assert {"README.md", "docs/tour.md", "lightning_plugins/ema/README.md", "benchmarks/results/ema.md"} <= set(
        hooks.documents()
    )
    assert "docs/pictures/schedules.png" in hooks._matching(hooks._FILES)


def test_every_schedule_has_a_picture_and_every_picture_is_what_its_line_draws(tmp_path):
    gallery = module_of_docs("pictures/gallery")
    rows = gallery.rows()
    shown = {Path(picture).name for picture, _ in rows}
    assert shown == {path.name for path in (ROOT / "docs/pictures/gallery").iterdir()}
    assert sum(path.stat().st_size for path in (ROOT / "docs/pictures/gallery").iterdir()) < 400_000
    drawn = " ".join(schedule for _, schedule in rows)
    named = [*schedules.SCHEDULES, ".delay", ".shift", ".hold_every", ".floor", ".cycle", " * "]
    left_out = {"Cycled", "Delayed", "Floored", "HeldEvery", "Product", "Scaled", "Shifted"}  # what the methods make
    assert [name for name in named if name not in drawn and name not in left_out] == []
    picture, schedule = rows[0]
    gallery.draw(schedule, tmp_path / "again.svg")
    kept, again = (path.read_text() for path in (ROOT / "docs" / picture, tmp_path / "again.svg"))
    version = re.search(r"Matplotlib v[\d.]+", kept)[0]
    assert again == kept or version not in again  # other versions draw other frames around the same curve


def migration():
    """Return (library, there, here) for each row of the table for people who come from another library."""
    section = (ROOT / "docs" / "migration.md").read_text()
    rows, library = [], ""
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| **"):
            library = line.split("**")[1]
        elif line.startswith("| ") and not line.startswith("| there"):
            rows.append((library, cells[0], cells[1]))
    return rows


def code(cell):
    return re.findall(r"`([^`]+)`", cell)


def calls(expression):
    """Return every call of a public name in an expression, with its function."""
    tree = ast.parse(expression, mode="eval")
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]


def test_the_table_of_names_covers_the_libraries():
    rows = migration()
    assert {row[0] for row in rows} == {
        "Lightning", "torch", "transformers", "timm", "Composer", "Keras", "OpenNMT-tf", "others"
    }  # fmt: skip
    assert all(code(here) for _, _, here in rows)


@pytest.mark.parametrize("expression", sorted({text for _, _, here in migration() for text in code(here)}))
def test_what_the_table_says_to_write_exists(expression, capsys):
    if expression.startswith("lightning-plugins"):
        with pytest.raises(SystemExit, match="0"):
            main([expression.split()[1], "--help"])
        return
    found = calls(expression)
    assert found
    for call in found:
        kind = getattr(lightning_plugins, call.func.id)
        inspect.signature(kind).bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
    for node in ast.walk(ast.parse(expression)):
        if isinstance(node, ast.Attribute):  # of a public name, or of the schedule that a call makes
            owner = node.value.id if isinstance(node.value, ast.Name) else "Schedule"
            assert hasattr(getattr(lightning_plugins, owner), node.attr), node.attr


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, marks=conditions.ema_weight_averaging if "EMAWeightAveraging" in text else ())
        for text in sorted({text for row in migration() for text in code(row[1]) if row[0] == "Lightning"})
    ],
)
def test_lightning_has_what_the_table_says(text):
    assert_bound([lightning.pytorch, lightning.pytorch.callbacks, lightning.pytorch.loggers], text)


@pytest.mark.parametrize("text", sorted({text for row in migration() for text in code(row[1]) if row[0] == "torch"}))
def test_torch_has_what_the_table_says(text):
    assert_bound([torch.optim.lr_scheduler, torch.optim.swa_utils], text)


def assert_bound(modules, text):
    name = text.partition("(")[0]
    kind = next(getattr(module, name) for module in modules if hasattr(module, name))
    for call in calls(text):
        inspect.signature(kind).bind_partial(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
