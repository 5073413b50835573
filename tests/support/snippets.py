"""The Python and console blocks of a Markdown file, and what it says that they print."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python_path(*folders):
    """Return PYTHONPATH for another process: ``folders``, or the checkout, before what is on it already."""
    return os.pathsep.join([*map(str, folders or [ROOT]), *filter(None, [os.environ.get("PYTHONPATH")])])


DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "lightning_plugins/*/README.md", "examples/README.md")
    for path in ROOT.glob(pattern)
)


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def examples(document):
    """Return every Python block with the ``text`` block right after it, which is what it prints, or None."""
    found = re.findall(
        r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE
    )
    return [(code, output or None) for code, output in found]


def links(document):
    """Return (path from the document, or empty; anchor, or empty) of the links to files of the repository."""
    found = re.findall(r"!?\[[^\]]*\]\(([^)#\s]*)(?:#([^)]*))?\)", without_code(document))
    return [(path, anchor) for path, anchor in found if "://" not in path]


def without_code(document):
    """Return a document's text without its blocks of code and its code in lines."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`", "", text)


def anchors(document):
    """Return the anchors of a document's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
