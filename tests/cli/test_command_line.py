"""What every command has in common: help that fits a screen, errors of one line, a quiet end, a bar on a terminal."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

from lightning_plugins import EMA, PostHocEMA, synthesize_ema
from lightning_plugins.cli import main
from tests.support.snippets import python_path
from tests.support.training import loader, make_module, make_trainer

COMMANDS = ["average", "extract", "synthesize", "schedule", "plot", "inspect"]
# what each command cannot do without
NEEDED = {
    "average": "DIR|FILE",
    "extract": "CKPT, --weights, --output",
    "synthesize": "DIR, --sigma-rel, --output",
    "schedule": "SCHEDULE, --total",
    "plot": "LOG.csv|DIR",
    "inspect": "CKPT|DIR",
}


def start(folder, code, *arguments, **streams):
    """A process that runs ``code``, then the command line."""
    code = f"import sys; {code}; from lightning_plugins.cli import main; sys.exit(main(sys.argv[1:]))"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    environment = {**os.environ, "PYTHONPATH": python_path(), "COLUMNS": "80", "LINES": "24"}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=folder, env=environment, **streams)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with an average and snapshots; returns its folder."""
    folder = tmp_path_factory.mktemp("run")
    callbacks = [EMA(0.9), PostHocEMA(every_n_steps=2, dirpath=str(folder / "snapshots"))]
    trainer = make_trainer(folder, callbacks=callbacks)
    trainer.fit(make_module(), loader(6))
    for name in ("a", "b"):
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder


# --- help -------------------------------------------------------------------------------------------------------------


def help_of(capsys, *words):
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    return capsys.readouterr().out.splitlines()


def test_help_is_one_screen_and_names_every_command(tmp_path):
    process = start(tmp_path, "pass", "--help")
    out, errors = (stream.decode() for stream in process.communicate(timeout=60))
    assert (process.returncode, errors) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if re.match(r" {4}\w+ {2,}\w", line)] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_fits_and_shows_how_it_is_used(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(capsys, command)
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: lightning-plugins {command} ")
    if command != "inspect":  # which has nothing to choose
        assert any(line.startswith(f"  lightning-plugins {command} ") for line in lines)
    assert "\n".join(lines).split("\n\n")[1].endswith(".")  # the description is a sentence
    options = re.findall(r"^  (-\S.*?)(?: {2,}|\n {10,})(\S.*)$", "\n".join(lines), re.MULTILINE)
    assert len(options) == sum(line.startswith("  -") for line in lines)  # each says what it does


def test_no_arguments_print_the_help(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines() == help_of(capsys)


def test_the_package_is_a_program(tmp_path):
    environment = {**os.environ, "PYTHONPATH": python_path()}
    command = [sys.executable, "-m", "lightning_plugins", "schedule", "Constant()", "--total", "9"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("Constant()\n")


def test_a_base_rate_scales_what_is_a_rate_and_nothing_else(capsys):
    words = ["Constant()", "lr/head=Constant()", "weight_decay=Constant()", "--total", "9", "--base-lr", "0.25"]
    assert main(["schedule", *words]) == 0
    assert re.findall(r"step 8  (\S+)", capsys.readouterr().out) == ["0.25", "0.25", "1"]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "lightning-plugins: error: argument COMMAND: invalid choice: 'frobnicate'"),
        *(([command], f"lightning-plugins {command}: error: the following arguments") for command in COMMANDS),
        *(([command], f" are required: {needed} (see") for command, needed in NEEDED.items()),
        (["average", "a.ckpt", "--last", "two"], "argument --last: invalid int value: 'two'"),
        (["average", "a.ckpt", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["extract", "a.ckpt", "--weights", "both", "--output", "x.pt"], "argument --weights: invalid choice: 'both'"),
        (["synthesize", "d", "--sigma-rel", "wide", "--output", "x.pt"], "--sigma-rel: invalid float value: 'wide'"),
        (["schedule", "Linear(4, 1, 0)", "--total", "ten"], "argument --total: invalid int value: 'ten'"),
        (
            ["schedule", "Linear(4, 1, 0)", "--total", "9", "--output", "lr"],
            "a picture's suffix (.png, .pdf, .svg, .jpg, .jpeg or .webp), got 'lr'",
        ),
        (["schedule", "Linear(4, 1, 0)", "--total", "9", "--output", "lr.odd"], ".jpeg or .webp), got 'lr.odd'"),
        (["plot", "log.csv", "--output", "curves"], ".jpeg or .webp), got 'curves'"),
        (["average", "a.ckpt", "--output", "x.pt"], "a checkpoint's suffix (.ckpt or .safetensors), got 'x.pt'"),
        (["extract", "a.ckpt", "--weights", "raw", "--output", "x"], ".safetensors, .pt, .pth or .bin), got 'x'"),
        (["synthesize", "d", "--sigma-rel", "0.1", "--output", "x.png"], ".pth or .bin), got 'x.png'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "none.csv"], "none.csv: No such file or directory"),
        (["plot", "."], "no log of CSVStatisticsLogger in the folder"),
        (["schedule", "Linear(4, 1)", "--total", "9"], "missing 1 required positional argument: 'end'"),
        (["schedule", "Linea(4, 1, 0)", "--total", "9"], "did you mean Linear?"),
        (["schedule", "WarmupCosine", "--total", "9"], "WarmupCosine needs arguments; write WarmupCosine(warmup=...)"),
        (["schedule", "Linear", "--total", "9"], "write Linear(steps=..., start=..., end=...)"),
        (["schedule", "WarmupCosine(5%)", "--total", "9"], "without quotes; write WarmupCosine('5%')"),
        (
            ["schedule", "WarmupCosine(warmup=2ep, hold=0.5%)", "--total", "9"],
            "(warmup='2ep', hold='0.5%')",
        ),
        (["inspect", "."], ". holds no checkpoints"),
        (["average", ".", "--output", "x.ckpt"], "At least two checkpoints are needed, found 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lightning-plugins: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["average", "a.ckpt", "b.ckpt", "--output"],
        ["extract", "a.ckpt", "--weights", "raw", "--output"],
        ["synthesize", "snapshots", "--sigma-rel", "0.07", "--output"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_output_that_cannot_be_written_is_named(run, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(run)
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o555)
    folder = shut if os.geteuid() else Path("/proc")  # nothing is shut to root, but here no file can be made
    before = sorted(run.iterdir())
    assert main([*arguments, str(folder / "x.ckpt")]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"lightning-plugins: error: {folder}/x\.ckpt: [A-Z][a-z ]+\n", error)
    assert main([*arguments, "missing/x.ckpt"]) == 2
    assert "The directory of `output`, missing, does not exist." in capsys.readouterr().err
    assert sorted(run.iterdir()) == before


# --- the end ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_one_line_and_status_130(run, tmp_path):
    # the work waits for the signal
    wait = "print('ready', flush=True), time.sleep(60)"
    code = f"import time, lightning_plugins.ema as ema; ema.synthesize_ema = lambda *arguments: ({wait})"
    command = ["synthesize", str(run / "snapshots"), "--sigma-rel", "0.07", "--output", "x.pt"]
    process = start(tmp_path, code, *command)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"lightning-plugins: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_an_output_that_nobody_reads_to_its_end_is_no_error(tmp_path):
    schedules = [f"Linear({steps}, 1, 0)" for steps in range(300)]  # 160 kB of text, more than a pipe holds
    with start(tmp_path, "pass", "schedule", *schedules, "--total", "9") as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


# --- progress ---------------------------------------------------------------------------------------------------------


def read(terminal):
    try:
        return terminal.read(1000)
    except OSError:  # what Linux says when the other end is closed
        return b""


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["average", "a.ckpt", "b.ckpt", "--output"], "averaging"),
        (["synthesize", "snapshots", "--sigma-rel", "0.07", "--output"], "synthesizing"),
    ],
    ids=["average", "synthesize"],
)
def test_long_work_shows_a_bar_on_a_terminal_and_nowhere_else(run, tmp_path, arguments, what):
    code = "import lightning_plugins.core.progress as progress; progress._LONG = 0"  # as if the files were large
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # a new one has no width, for no bar
    process = start(run, code, *arguments, str(tmp_path / "seen.ckpt"), stderr=theirs)
    os.close(theirs)
    process.communicate(timeout=60)
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        shown = b"".join(iter(lambda: read(terminal), b"")).decode()
    assert process.returncode == 0
    assert re.search(rf"{what}: +100%", shown), shown
    process = start(run, code, *arguments, str(tmp_path / "unseen.ckpt"))
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    left, right = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("seen", "unseen"))
    left, right = (file.get("state_dict", file) for file in (left, right))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_synthesis_shows_its_progress_when_asked_to(run, capsys):
    shown = synthesize_ema(run / "snapshots", 0.07, progress=True)
    assert "synthesizing: 100%" in capsys.readouterr().err
    silent = synthesize_ema(run / "snapshots", 0.07)
    assert capsys.readouterr().err == ""
    assert all(torch.equal(shown[name], silent[name]) for name in silent)


def test_an_output_that_lacks_letters_or_is_not_there_costs_no_work(run):
    code = (
        "from lightning_plugins.cli import main; sys.stdout.reconfigure(encoding='ascii'); "
        "sys.argv[1:] = ['extract', 'a.ckpt', '--weights', 'raw', '--output', '\u03bb.pt']; first = main(); "
        "sys.stdout = None; sys.argv[1:] = ['inspect', 'a.ckpt']; sys.exit(10 * first + main())"
    )
    with start(run, code) as process:
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output.decode(), errors.decode()) == (0, "\\u03bb.pt\n", "")
    assert (run / "\u03bb.pt").exists()
