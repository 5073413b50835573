"""The Python and console blocks of a Markdown file."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("lightning_plugins/*/README.md"), *ROOT.glob("examples/README.md")]
)


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def links(document):
    found = re.findall(r"!?\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / document).read_text())
    return [link for link in found if "://" not in link]
