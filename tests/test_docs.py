"""README and cards are true: their snippets run, their commands exist, their links lead somewhere."""

import re
import shlex

import pytest

from lightning_plugins.cli import main
from tests.support import fork_server
from tests.support.snippets import DOCUMENTS, ROOT, blocks, examples, links

BLOCK_ENDS = "\x1e\n"


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks(document, "python")])
def test_snippets_run(document, tmp_path):
    """A document's blocks run in order in one process, as a reader would type them, and print what it says."""
    script = tmp_path / "snippets.py"
    script.write_text("".join(f"{code}\nprint({BLOCK_ENDS!r}, end='')\n" for code, _ in examples(document)))
    done = fork_server.program(script, folder=tmp_path, timeout=300, warn=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (code, output), printed in zip(examples(document), done.stdout.split(BLOCK_ENDS)[:-1], strict=True):
        if output is not None:
            assert _without_trailing_space(printed) == _without_trailing_space(output), code


def _without_trailing_space(text):
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_run(document, tmp_path, monkeypatch, capsys):
    commands = [line for block in blocks(document, "console") for line in block.splitlines() if line.startswith("$ ")]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = shlex.split(command[2:])
        if words[:2] == ["lightning-plugins", "schedule"]:
            assert main(words[1:]) == 0, command
            capsys.readouterr()
        elif words[0] == "make":
            assert words[1] in re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE), command


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for link in links(document):
        assert ((ROOT / document).parent / link).exists(), link
