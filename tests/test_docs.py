"""README and cards are true: their snippets run, their commands exist, their links lead somewhere."""

import importlib.util
import re
import shlex

import pytest

from lightning_plugins.cli import main
from tests.support import fork_server
from tests.support.snippets import DOCUMENTS, ROOT, anchors, blocks, examples, links, without_code

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
    for path, anchor in links(document):
        target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.relative_to(ROOT)), f"{path}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_of_code_folds_and_formulas_are_closed(document):
    text = (ROOT / document).read_text()
    fences = re.findall(r"^ *```.*$", text, re.MULTILINE)
    assert all(fence.strip() != "```" for fence in fences[::2]), "a block says its language"
    assert all(fence.strip() == "```" for fence in fences[1::2])
    assert len(fences) % 2 == 0
    for tag in ("details", "summary"):
        assert text.count(f"<{tag}") == text.count(f"</{tag}>")
    assert "<details>" not in text, 'the site reads what is folded only with markdown="1"'
    plain = without_code(document)
    assert plain.count("$$") % 2 == 0
    assert all(line.replace("$$", "").count("$") % 2 == 0 for line in plain.splitlines())
    assert all(line.count("`") % 2 == 0 for paragraph in plain.split("\n\n") for line in [paragraph])


# what the design rules out: a reader is "you", and a thing has a name
RULED_OUT = re.compile(
    r"\b(nobody|somebody|whoever|anybody|everybody|whatever it is that|must be out of)\b", re.IGNORECASE
)
OUTSIDE = re.compile(r"/(?:home|mnt|root)/\w|\bissue \d+\b|\bcase d\d+\b|\bdefect \d+\b", re.IGNORECASE)


@pytest.mark.parametrize(
    "path",
    [*DOCUMENTS, *sorted(str(found.relative_to(ROOT)) for found in (ROOT / "lightning_plugins").rglob("*.py"))],
)
def test_words_that_say_nothing_and_places_outside_the_repository_are_not_used(path):
    """In documents, docstrings, comments and messages."""
    text = (ROOT / path).read_text()
    assert RULED_OUT.findall(text) == []
    assert OUTSIDE.findall(text) == []
