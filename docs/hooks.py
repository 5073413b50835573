"""What MkDocs is given: the repository's documents where they stand, and an API reference made from the docstrings.

The pages keep their paths, so that a link which is right in the repository is right in the site.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import lightning_plugins
from lightning_plugins.core.imports import declared_names
from lightning_plugins.core.lightning import CallbackOfBoth

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

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
    "docs/pictures/gallery/*.svg",
    "docs/pictures/*.py",
    "benchmarks/*.py",
    "examples/*.py",
    "examples/*.yaml",
)
# What a reader calls and reads of a class; the rest is for the Trainer and for the package itself.
_MEMBERS = {
    "CheckpointAveraging": "path scores",
    "ClassificationReport": "update compute reset",
    "EMA": "average_state_dict raw_state_dict averaged",
    "GradientAccumulation": "accumulation_plan",
    "MicroBatching": "size_found",
    "Plan": "paths table run",
    "Schedule": "is_open resolve preview plot to_dict from_dict delay shift hold_every floor scale cycle",
    "ScheduleLR": "position step",
    "Shadow": "names update swap_in swap_out collect",
    "StatisticsRecorder": "names last_statistics flush",
    "TensorBoardStatisticsLogger": "run_directory",
    "TrainingLoop": "model optimizers epoch_index epoch_count last_statistics",
}


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
    module = f"lightning_plugins.{technique}"
    package = importlib.import_module(module)
    public = set(lightning_plugins.__all__)
    names = sorted(package.__all__, key=lambda name: (name not in public, not _is_callback(getattr(package, name))))
    lines = [
        f"# `{module}`",
        "",
        f"Version {lightning_plugins.__version__}. When to use what stands here, and with which numbers:",
        f"[the card](../lightning_plugins/{technique}/README.md).",
        "",
        "| name | |",
        "|---|---|",
        *(f"| [`{name}`](#{module}.{name}) | {_first_line(package, name)} |" for name in names),
    ]
    if not public.issuperset(names):
        only = ", ".join(f"`{name}`" for name in names if name not in public)
        lines += ["", f"Import them from `lightning_plugins`, and from `{module}` alone: {only}."]
    for name in names:
        shown = _MEMBERS.get(name, "").split()
        lines += ["", f"::: {module}.{name}", "    options:", f"      members: [{', '.join(shown)}]"]
    return "\n".join(lines) + "\n"


def _is_callback(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, CallbackOfBoth)


def _first_line(package: ModuleType, name: str) -> str:
    """Return what a name is: the first line of its docstring, which for a value stands below it in the source."""
    value = getattr(package, name)
    text = inspect.getdoc(value) if isinstance(value, (type, FunctionType)) else None
    if text is None:
        source = importlib.import_module(declared_names(package.__name__)[name])
        body = ast.parse(inspect.getsource(source)).body
        place = next(
            index
            for index, node in enumerate(body)
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in ast.unparse(node)
        )
        following = body[place + 1].value if isinstance(body[place + 1], ast.Expr) else None
        text = following.value if isinstance(following, ast.Constant) else ""
    line = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", str(text).split("\n\n")[0].replace("\n", " "))
    return line.replace("|", "\\|")


def _matching(patterns: tuple[str, ...]) -> list[str]:
    def found() -> Iterator[str]:
        for pattern in patterns:
            yield from (path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))

    return sorted(set(found()))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show the version of the package that the pages are of, and every technique."""
    config.nav = navigation(config.nav or [])
    config.copyright = f"lightning_plugins {lightning_plugins.__version__}, Apache-2.0"
    if "MIKE_DOCS_VERSION" not in os.environ:  # which mike sets: without it there is no list of versions to ask for
        del config.extra["version"]
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
