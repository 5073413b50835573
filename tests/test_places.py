"""Every technique and callback has its places: a card that says something, a README row, a line in the CHANGELOG."""

import re

import pytest

from tests.support.cases import PACKAGE, PUBLIC, TECHNIQUES, callback_names
from tests.support.snippets import ROOT

SECTIONS = (
    "When to use it",
    "Which",
    "Use",
    "What it does",
    "Arguments",
    "Cost",
    "Checkpoint",
    "Distributed",
    "Does not compose with",
    "Source",
)


def sections(text):
    """Return heading -> text of the sections of a card, up to the next of the same level."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_section_of_a_card_says_something(technique):
    found = sections((PACKAGE / technique / "README.md").read_text())
    for section in SECTIONS:
        texts = [text for heading, text in found.items() if heading.startswith(section)]
        assert texts, section
        assert any(line.strip() and not line.startswith("#") for line in texts[0].splitlines()), section


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_card_advises_before_it_explains(technique):
    headings = list(sections((PACKAGE / technique / "README.md").read_text()))
    firsts = [heading.split()[0].rstrip(",") for heading in headings]
    assert firsts[:4] == ["When", "Which", "Use", "What"], headings


@pytest.mark.parametrize("name", callback_names())
def test_every_callback_has_a_row_in_the_readme(name):
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    spellings = {"EventCallback": "`@on_events("}  # which makes one
    assert any(f"`{name}(" in row or f"`{name}`" in row or spellings.get(name, "`-`") in row for row in rows)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_card_is_linked_from_the_readme(technique):
    assert f"(lightning_plugins/{technique}/README.md)" in (ROOT / "README.md").read_text()


def test_every_public_name_has_a_line_in_the_changelog():
    """A schedule stands for all of them: they came together."""
    text = (ROOT / "CHANGELOG.md").read_text()
    named = [name for name, module in PUBLIC.items() if not module.endswith((".schedules", ".events"))]
    assert [name for name in named if f"`{name}`" not in text and name != "DecayRule"] == []


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_where_a_resume_cannot_be_exact_stands_on_one_page(technique):
    card = (PACKAGE / technique / "README.md").read_text()
    assert "(../../docs/resuming.md)" in card or "resum" not in card
    assert "shuffle=True" not in card.partition("## Checkpoint")[2]
