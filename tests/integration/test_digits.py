"""The demo as its users run it: a process of its own, real files, readable refusals."""

import csv
import importlib.util
import itertools
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support import fork_server
from tests.support.snippets import ROOT

PROGRAM = ROOT / "examples" / "digits.py"
TRIAL = ["--accelerator", "cpu", "--epochs", "2", "--limit-batches", "10"]


WEIGHTS = ["raw, last step", "EMA, last step", "best single (EMA)", "averaged (EMA)"]


def run(folder, *arguments):
    return fork_server.program(PROGRAM, *arguments, folder=folder, timeout=300)


def accuracies(console):
    """What the table says: test accuracy by weights."""
    rows = re.findall(rf"^({'|'.join(map(re.escape, WEIGHTS))}) +([01]\.\d{{4}})$", console, re.MULTILINE)
    return {weights: float(value) for weights, value in rows}


def logged(folder):
    """The rows of the run's log, without the clock."""
    with (folder / "log.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "time"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A short run with its default output, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("trial")
    done = run(folder, *TRIAL)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (folder / "runs").iterdir()
    return done, written


@pytest.fixture
def program(monkeypatch, tmp_path):
    """The program as a module, in an empty folder; its ``main`` takes the arguments."""
    spec = importlib.util.spec_from_file_location("digits_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main = module.main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["digits.py", *arguments])
        main()

    module.main = call
    monkeypatch.chdir(tmp_path)
    yield module
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_it_learns_to_read(tmp_path):
    """With the defaults. Guessing gives 0.1, scikit-learn's logistic regression on the same split 0.964."""
    done = run(tmp_path, "--accelerator", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    found = accuracies(done.stdout)
    assert list(found) == WEIGHTS
    assert min(found.values()) >= 0.97


def test_it_ends_with_a_table_and_the_paths_of_its_files(trial):
    done, written = trial
    assert list(accuracies(done.stdout)) == WEIGHTS
    assert re.search(r"precision +recall +f1-score +support", done.stdout)
    assert re.search(r"^20 steps in \d+\.\d seconds\. Written:$", done.stdout, re.MULTILINE)
    names = [
        "averaged.ckpt",
        "averaged_pool",
        "best.ckpt",
        "confusion-test.png",
        "curves.png",
        "last.ckpt",
        "learning-rate.png",
        "log.csv",
        "report-test.txt",
        "tensorboard",
    ]
    assert sorted(path.name for path in written.iterdir()) == names
    assert done.stdout.split("Written:")[1].split() == [f"runs/{written.name}/{name}" for name in names]
    assert (written / "report-test.txt").read_text().strip() in done.stdout
    for picture in ("learning-rate", "curves", "confusion-test"):
        assert (written / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert "Open curves.png" in done.stdout


def test_the_console_shows_progress_and_the_schedule_but_no_warnings(trial):
    done, _ = trial
    assert "Epoch 1: 100%" in done.stdout
    assert "val_accuracy=" in done.stdout
    assert "Learning-rate schedule: WarmupCosine(warmup=1, hold=1, total=20" in done.stderr
    assert not re.search(r"warn|deprecated|Tip:|Traceback", done.stdout + done.stderr, re.IGNORECASE)


def test_the_rates_in_the_log_are_the_formula(trial):
    """20 steps: 5 % are one step of warm-up and one of hold, then half a wave over the other 18."""
    expected = [0.0, 0.1] + [0.05 * (1 + math.cos(math.pi * (step - 2) / 18)) for step in range(2, 20)]
    rows = [row for row in logged(trial[1]) if row["phase"] == "train"]
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert [float(row["lr"]) for row in rows] == pytest.approx(expected)


def test_last_is_the_end_of_the_run_and_best_the_lowest_validation_loss(trial):
    files = {name: torch.load(trial[1] / f"{name}.ckpt", weights_only=True) for name in ("last", "best")}
    ends = {row["step"]: float(row["loss"]) for row in logged(trial[1]) if row["phase"] == "validation"}
    assert {name: file["global_step"] for name, file in files.items()} == {
        "last": 20,
        "best": int(min(ends, key=ends.get)),
    }


def test_tensorboard_has_training_and_validation_side_by_side(trial):
    (stamp,) = (trial[1] / "tensorboard").iterdir()
    assert {"train", "validation"} <= {path.name for path in stamp.iterdir()}


def test_a_seed_gives_the_same_run_again(trial, program, capsys):
    program.main(*TRIAL, "--output", "elsewhere")
    assert accuracies(capsys.readouterr().out) == accuracies(trial[0].stdout)
    (written,) = Path("elsewhere").iterdir()
    assert logged(written) == logged(trial[1])


@pytest.mark.filterwarnings("ignore:MicroBatching splits batches, and batch normalization")
def test_accumulates_to_an_effective_batch_and_runs_it_in_pieces(program, capsys):
    program.main(*TRIAL, "--effective-batch-size", "64", "--micro-batch-size", "16", "--output", "elsewhere")
    out = capsys.readouterr().out
    assert re.search(r"^10 steps in", out, re.MULTILINE)  # 2 epochs of 10 batches, two to a step
    assert list(accuracies(out)) == WEIGHTS


def test_an_effective_batch_that_no_number_of_batches_makes_is_refused(program, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(*TRIAL, "--effective-batch-size", "50")
    assert "32 or 64" in capsys.readouterr().err


def test_no_image_is_in_two_splits_and_every_class_is_in_each(program):
    splits = program.digits()
    assert [len(split) for split in splits] == [1167, 270, 360]
    assert len({image.numpy().tobytes() for split in splits for image in split.tensors[0]}) == 1797
    for split in splits:
        images, target = split.tensors
        assert (images.min(), images.max()) == (0, 1)
        assert target.bincount().min() >= 0.9 * len(split) / 10


def test_random_shift_moves_whole_images_in_every_direction_and_fills_with_zero(program):
    images = torch.rand(200, 2, 8, 8)
    moved = program.random_shift(images, by=1)
    canvas = torch.zeros(200, 2, 10, 10)
    canvas[:, :, 1:9, 1:9] = images
    found = set()
    for shift in itertools.product((-1, 0, 1), repeat=2):
        expected = canvas.roll(shift, dims=(2, 3))[:, :, 1:9, 1:9]
        found.update((image, shift) for image in range(200) if torch.equal(moved[image], expected[image]))
    assert sorted(image for image, _ in found) == list(range(200))
    assert len({shift for _, shift in found}) == 9


class CIFAR10:
    """A stand-in with the interface of torchvision's."""

    def __init__(self, root, train, download):
        assert not download
        if not root.exists():
            raise RuntimeError("Dataset not found or corrupted.")
        self.data = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3)).astype("uint8")
        self.targets = list(range(10)) * 10


@pytest.fixture
def torchvision(monkeypatch):
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(CIFAR10=CIFAR10))


@pytest.mark.usefixtures("torchvision")
def test_cifar10_trains_where_torchvision_and_the_data_are(program, capsys):
    Path("data").mkdir()
    program.main("--data", "cifar10", *TRIAL, "--epochs", "1", "--limit-batches", "1", "--batch-size", "4")
    assert list(accuracies(capsys.readouterr().out)) == WEIGHTS[:3]  # one epoch is nothing to average


@pytest.mark.usefixtures("torchvision")
def test_cifar10_without_its_data_is_refused(program, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main("--data", "cifar10")
    reason = "--data cifar10 needs torchvision, with its data in data: Dataset not found or corrupted.\n"
    assert capsys.readouterr().err.endswith(reason)


def test_cifar10_without_torchvision_is_refused(program, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="2"):
        program.main("--data", "cifar10")
    assert "error: --data cifar10 needs torchvision, with its data in data: " in capsys.readouterr().err


def test_a_refusal_is_one_line_and_status_2_and_leaves_nothing_behind(tmp_path):
    done = run(tmp_path, "--accelerator", "abacus")
    assert done.returncode == 2
    assert done.stderr.startswith("digits.py: error: You selected an invalid accelerator name: `accelerator='abacus'`.")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be a finite number above 0, got 0"),
        (["--batch-size", "-1"], "--batch-size must be a finite number above 0, got -1"),
        (["--limit-batches", "0"], "--limit-batches must be a finite number above 0, got 0"),
        (["--lr", "nan"], "--lr must be a finite number above 0, got nan"),
        (["--lr", "inf"], "--lr must be a finite number above 0, got inf"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--seed", "-1"], "--seed must be a whole number from 0 to 4294967295, got -1"),
        (["--data", "mnist"], "argument --data: invalid choice: 'mnist'"),
        (["--precision", "7-bit"], "Precision '7-bit' is invalid."),
        (["--accelerator", "cpu", "--devices", "0"], "`Trainer(devices='0')` value is not a valid input"),
        (["--accelerator", "cpu", "--output", "taken"], "Not a directory: 'taken/"),
        (["--warmup"], "unrecognized arguments: --warmup"),
    ],
)
def test_bad_arguments_are_named(program, arguments, message, capsys):
    Path("taken").touch()
    with pytest.raises(SystemExit, match="2"):
        program.main(*arguments)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"\S+: error: ", line)
    assert message in line
