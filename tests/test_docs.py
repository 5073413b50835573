"""README and cards are true: their snippets run, their commands exist, their links lead somewhere."""

import importlib.util
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
    runnable = [(code, output) for code, output in examples(document) if is_installed(code)]
    script.write_text("".join(f"{code}\nprint({BLOCK_ENDS!r}, end='')\n" for code, _ in runnable))
    done = fork_server.program(script, folder=tmp_path, timeout=300, warn=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (code, output), printed in zip(runnable, done.stdout.split(BLOCK_ENDS)[:-1], strict=True):
        if output is not None:
            assert _without_trailing_space(printed) == _without_trailing_space(output), code


def is_installed(code):
    """Return whether what a block says that it needs, in its first line, is there."""
    needed = re.match(r"# needs (\w+)\n", code)
    return needed is None or importlib.util.find_spec(needed[1]) is not None


def test_what_hydra_is_given_makes_the_callbacks():
    hydra = pytest.importorskip("hydra.utils")
    omegaconf = pytest.importorskip("omegaconf")
    (text,) = [block for block in blocks("docs/loggers.md", "yaml") if block.startswith("# needs hydra")]
    made = hydra.instantiate(omegaconf.OmegaConf.create(text).callbacks)
    assert [type(callback).__name__ for callback in made] == [
        "LearningRateScheduler", "GradientAccumulation", "StatisticsRecorder"
    ]  # fmt: skip


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
