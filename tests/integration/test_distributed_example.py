"""The distributed example as its users start it: real processes that find each other, and print that they agree."""

import csv
import importlib.util
import math
import re
import subprocess
import sys

import pytest
import torch

from lightning_plugins import extract_weights
from tests.support import fork_server
from tests.support.meeting_place import MeetingPlace
from tests.support.snippets import ROOT

PROGRAM = ROOT / "examples" / "distributed.py"
TRIAL = ["--accelerator", "cpu", "--epochs", "3"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WEIGHTS = ["raw, last step", "EMA, last step", "best single (EMA)", "averaged (EMA)"]


def run(folder, start, *arguments):
    """Start the program; by itself it starts the second process, a fresh interpreter."""
    if start == "by itself":
        with MeetingPlace() as place:
            return fork_server.program(
                PROGRAM, *TRIAL, *arguments, folder=folder, timeout=300, environment=place.environment
            )
    # torchrun finds a port of its own, and holds it
    command = [sys.executable, *TORCHRUN, PROGRAM, *TRIAL, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "start"),
    [("ddp", "by itself"), ("fsdp2", "by itself"), ("fsdp2", "by torchrun")],
    ids=["ddp", "fsdp2", "fsdp2-torchrun"],
)
def test_both_processes_have_the_same_and_rank_zero_writes_it_once(tmp_path, strategy, start):
    done = run(tmp_path, start, "--strategy", strategy)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [line.split() for line in re.findall(r"^(?:rank|0|1)  .*$", done.stdout, re.MULTILINE)]
    assert [row[0] for row in ranks] == ["rank", "0", "1"]
    assert ranks[0][1:] == ["weights", "average", "rates", "loss", "accuracy"]
    assert ranks[1][1:] == ranks[2][1:]
    assert len(set(ranks[1][1:4])) == 3

    accuracy = dict(re.findall(r"^(\w.*\S) +([01]\.\d{4})$", done.stdout, re.MULTILINE))
    assert list(accuracy) == WEIGHTS
    assert all(0.5 < float(value) <= 1 for value in accuracy.values())  # a tenth is chance

    folder = tmp_path / "runs" / "distributed" / strategy
    names = {"averaged.ckpt", "averaged_pool", "best.ckpt", "curves.png", "last.ckpt", "log.csv", "tensorboard"}
    assert {path.name for path in folder.iterdir()} == names
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    # a process sees 584 images in 37 batches of 16, two to a step, and 135 to validate in 9
    assert [row["phase"] for row in rows] == (["train"] * 37 + ["validation"] * 9) * 3
    assert int(rows[-1]["step"]) == 3 * math.ceil(37 / 2)
    assert float(rows[-1]["loss"]) == pytest.approx(float(ranks[1][4]), abs=1e-6)
    assert torch.load(folder / "averaged.ckpt", weights_only=True)["state_dict"]["network.1.weight"].shape == (128, 64)
    if (strategy, start) == ("fsdp2", "by itself"):
        goes_on_alone(tmp_path, folder)


def goes_on_alone(place, folder):
    """One process goes on from the directory that two have written, in their log and from their weights."""
    last = folder / "last.ckpt"
    assert {path.name for path in last.iterdir()} >= {"__0_0.distcp", "__1_0.distcp", "lightning_plugins_ema"}
    raw = extract_weights(last, "raw")
    done = run(place, "by itself", "--strategy", "fsdp2", "--devices", "1", "--resume", "--epochs", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^(?:0|1)  .*$", done.stdout, re.MULTILINE)[0].startswith("0 ")
    accuracy = dict(re.findall(r"^(\w.*\S) +([01]\.\d{4})$", done.stdout, re.MULTILINE))
    assert list(accuracy) == WEIGHTS
    assert float(accuracy["EMA, last step"]) > 0.5
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    # alone it sees 1,167 images in 73 batches of 16, four to a step, and 270 to validate in 17
    assert [row["phase"] for row in rows[3 * 46 :]] == ["train"] * 73 + ["validation"] * 17
    assert int(rows[-1]["step"]) == 3 * 19 + 19
    assert {path.name for path in last.iterdir()} >= {"__0_0.distcp", "lightning_plugins_ema"}
    assert any(not torch.equal(value, raw[name]) for name, value in extract_weights(last, "raw").items())


@pytest.fixture
def program(monkeypatch, tmp_path):
    """The program's ``main``, in an empty folder; it takes the arguments."""
    spec = importlib.util.spec_from_file_location("distributed_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["distributed.py", *arguments])
        module.main()

    monkeypatch.chdir(tmp_path)
    return main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "zero"], "argument --strategy: invalid choice: 'zero'"),
        (["--accelerator", "cpu", "--devices", "0"], "value is not a valid input"),
        (["--lr", "nan"], "--lr must be a finite number above 0, got nan"),
        (["--accelerator", "abacus"], "You selected an invalid accelerator name"),
        (["--devices", "many"], "invalid literal for int() with base 10: 'many'"),
        (["--resume"], "--resume needs a run to go on with, but runs/distributed/ddp/last.ckpt does not exist"),
        (["--seed", "-1"], "--seed must be a whole number from 0 to 4294967295, got -1"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(program, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        program(*arguments)
    error = capsys.readouterr().err
    assert error.startswith("distributed.py: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())
