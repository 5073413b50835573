#!/usr/bin/env python
"""Draws the pictures of docs/gallery.md from the lines beside them: `.venv/bin/python docs/pictures/gallery.py`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import matplotlib as mpl

from lightning_plugins.schedules import parse_schedule, plot_schedules

PAGE = Path(__file__).parents[1] / "gallery.md"
_ROW = re.compile(r"^\| !\[[^\]]*\]\(([^)]+)\) \| `([^`]+)`", re.MULTILINE)


def rows() -> list[tuple[str, str]]:
    """Return (path of the picture, schedule) for each row of the page."""
    return _ROW.findall(PAGE.read_text())


def draw(expression: str, path: Path) -> None:
    """Draw one schedule for 1,000 steps, to the same bytes each time."""
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # the date that Matplotlib writes into the file
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gallery", "font.size": 8}):
        plot_schedules({expression: parse_schedule(expression)}, 1000, path, size=(4.2, 2.4))


if __name__ == "__main__":
    for picture, schedule in rows():
        draw(schedule, PAGE.parent / picture)
