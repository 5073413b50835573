"""What MkDocs is given: the repository's documents where they stand, and an API reference made from the docstrings.

The pages keep their paths, so that a link which is right in the repository is right in the site.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning_plugins
from lightning_plugins.core.imports import declared_names

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_DOCUMENTS = (
    "*.md",
    "docs/*.md",
    "lightning_plugins/*/README.md",
    "examples/README.md",
    "benchmarks/results/*.md",
    "tests/golden/README.md",
)
# What the documents show or link to, besides each other.
_FILES = (
    "LICENSE",
    "docs/site.css",
    *(f"{folder}/**/*.png" for folder in ("benchmarks", "docs", "examples", "lightning_plugins")),
    "benchmarks/*.py",
    "examples/*.py",
    "examples/*.yaml",
)
_FORMULA = re.compile(r"\$(?! )([^$\n`]+?)(?<! )\$")


def documents() -> list[str]:
    """Return the paths of all documents that are pages of the site."""
    return _matching(_DOCUMENTS)


def techniques() -> list[str]:
    """Return the folders of the techniques, as the list of the public names has them."""
    return sorted({module.split(".")[1] for module in declared_names("lightning_plugins").values()})


def navigation(given: list[Any]) -> list[Any]:
    """Return a navigation with the techniques that it does not name at the end of its two lists of them."""
    pages = {"Techniques": "lightning_plugins/{}/README.md", "API reference": "api/{}.md"}

    def whole(title: str, entries: Any) -> Any:
        if title not in pages:
            return entries
        listed = [path for entry in entries for path in entry.values()]
        found = {technique.capitalize(): pages[title].format(technique) for technique in techniques()}
        return [*entries, *({name: path} for name, path in found.items() if path not in listed)]

    return [{title: whole(title, entries) for title, entries in part.items()} for part in given]


def api_pages() -> dict[str, str]:
    """Return path -> Markdown of the reference: one page for each technique, with every name that it exports."""
    return {f"api/{technique}.md": _api_page(technique) for technique in techniques()}


def _api_page(technique: str) -> str:
    package = importlib.import_module(f"lightning_plugins.{technique}")
    public = set(lightning_plugins.__all__)
    lines = [
        f"# `lightning_plugins.{technique}`",
        "",
        f"Version {lightning_plugins.__version__}. How and when to use what stands here is on",
        f"[the card](../lightning_plugins/{technique}/README.md).",
    ]
    for title, names in (
        ("Also from `lightning_plugins`", [name for name in package.__all__ if name in public]),
        (f"Only from `lightning_plugins.{technique}`", [name for name in package.__all__ if name not in public]),
    ):
        if names:
            lines += ["", f"**{title}**", *(f"\n::: lightning_plugins.{technique}.{name}" for name in names)]
    return "\n".join(lines) + "\n"


def _matching(patterns: tuple[str, ...]) -> list[str]:
    def found() -> Iterator[str]:
        for pattern in patterns:
            yield from (path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))

    return sorted(set(found()))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show the version of the package that the pages are of, and every technique."""
    config.nav = navigation(config.nav or [])
    config.copyright = f"lightning_plugins {lightning_plugins.__version__}, Apache-2.0"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what MkDocs found in docs/ by the documents of the whole repository."""
    from mkdocs.structure.files import File  # the tests read the functions above without MkDocs

    for file in list(files):
        if file.abs_src_path and Path(file.abs_src_path).is_relative_to(config.docs_dir):
            files.remove(file)
    for path in documents() + _matching(_FILES):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path, text in api_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Turn formulas into MathML, which browsers draw without a script."""
    if not page.file.src_uri.startswith("lightning_plugins/"):
        return markdown
    from latex2mathml.converter import convert

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)  # code keeps its dollars
    parts[::2] = [_FORMULA.sub(lambda match: convert(match[1]), part) for part in parts[::2]]
    return "".join(parts)
