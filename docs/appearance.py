"""Formulas as MathML, which browsers draw without a script, and tables that fit a telephone."""

from __future__ import annotations

import re
from html import escape, unescape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_FENCES = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(`[^`\n]+`)")
_BLOCK = re.compile(r"^\$\$(.+?)\$\$$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"\$(?! )([^$\n]+?)(?<! )\$")

_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_ROW = re.compile(r"<tr>(.*?)</tr>", re.DOTALL)
_HEAD = re.compile(r"<th[^>]*>(.*?)</th>", re.DOTALL)
_CELL = re.compile(r"<td([^>]*)>(.*?)</td>", re.DOTALL)
_CODE_IN_CELL = re.compile(r"(?<=<code>)(.*?)(?=</code>)", re.DOTALL)
_TAGS = re.compile(r"<[^>]+>")
_BREAKABLE = re.compile(r"([(,=/._|\[])(?=\w)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Turn ``$...$`` and ``$$...$$`` into MathML, outside code."""
    parts = _FENCES.split(markdown)
    parts[::2] = [_without_code(_BLOCK.sub(lambda found: _mathml(found[1], "block"), part)) for part in parts[::2]]
    return "".join(parts)


def _without_code(text: str) -> str:
    parts = _CODE.split(text)
    parts[::2] = [_INLINE.sub(lambda found: _mathml(found[1], "inline"), part) for part in parts[::2]]
    return "".join(parts)


def _mathml(formula: str, display: str) -> str:
    from latex2mathml.converter import convert  # the tests read the functions below without it

    return convert(" ".join(formula.split()), display=display)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Give every cell the name of its column, and every long name in one places where it may be broken."""
    return _TABLE.sub(lambda found: fitted(found[0]), html)


def fitted(table: str) -> str:
    """Return a table whose cells know their column (``data-label``) and whose code may be broken after ``( , = / . _``.

    Example:
        >>> fitted("<table><tr><th>a</th></tr><tr><td><code>x.y</code></td></tr></table>")
        '<table><tr><th>a</th></tr><tr><td data-label="a"><code>x.<wbr>y</code></td></tr></table>'
    """
    labels = [escape(unescape(_TAGS.sub("", head)).strip()) for head in _HEAD.findall(table)]

    def row(found: re.Match[str]) -> str:
        cells = iter(labels)
        return _CELL.sub(lambda cell: f'<td{cell[1]} data-label="{next(cells, "")}">{_broken(cell[2])}</td>', found[0])

    return _ROW.sub(row, table)


def _broken(cell: str) -> str:
    def breaks(code: re.Match[str]) -> str:
        parts: list[Any] = re.split(r"(<[^>]+>|&\w+;)", code[0])
        parts[::2] = [_BREAKABLE.sub(r"\1<wbr>", part) for part in parts[::2]]
        return "".join(parts)

    return _CODE_IN_CELL.sub(breaks, cell)
