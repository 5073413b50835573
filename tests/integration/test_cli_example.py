"""The LightningCLI example as its users run it: a process of its own, its YAML file, its printed configuration."""

import csv
import re

import pytest
import torch
import yaml

from tests.support import fork_server
from tests.support.snippets import ROOT

PROGRAM, CONFIG = ROOT / "examples" / "lightning_cli.py", ROOT / "examples" / "lightning_cli.yaml"
TRIAL = ["--trainer.max_epochs", "6", "--trainer.accelerator", "cpu"]

pytestmark = pytest.mark.slow


def run(folder, command, *arguments, config=CONFIG):
    return fork_server.program(PROGRAM, command, "--config", config, *arguments, folder=folder, timeout=300)


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A short run, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("trial")
    done = run(folder, "fit", *TRIAL)
    assert done.returncode == 0, done.stderr[-3000:]
    return done, folder


def accuracy(done):
    return float(re.search(r"test_accuracy\W+([\d.]+)", done.stdout)[1])


def test_trains_with_everything_that_the_file_names_and_tests(trial):
    done, folder = trial
    assert 0.5 < accuracy(done) <= 1  # a tenth is chance
    written = folder / "runs" / "lightning_cli"
    names = {"averaged.ckpt", "averaged_pool", "best.ckpt", "config.yaml", "log.csv", "snapshots", "tensorboard"}
    assert {path.name for path in written.iterdir()} == names
    with (written / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    # 1,167 images are 37 batches of 32, in windows of two 19 steps an epoch; 270 images are 9 batches
    assert [row["phase"] for row in rows] == (["train"] * 37 + ["validation"] * 9) * 6
    assert rows[-1]["step"] == "114"
    assert {"loss", "accuracy", "multiclass_f1_score"} < set(rows[0])
    assert torch.load(written / "averaged.ckpt", weights_only=True)["hyper_parameters"]["width"] == 128
    assert "Tip" not in done.stderr
    assert "eprecat" not in done.stderr


def test_the_printed_configuration_is_the_one_that_ran_and_runs_again(trial, tmp_path):
    _, folder = trial
    shown = run(tmp_path, "fit", *TRIAL, "--print_config")
    assert (shown.returncode, shown.stderr) == (0, "")
    ran = yaml.safe_load((folder / "runs" / "lightning_cli" / "config.yaml").read_text())
    assert yaml.safe_load(shown.stdout) == ran
    (tmp_path / "printed.yaml").write_text(shown.stdout)
    again = run(tmp_path, "fit", config=tmp_path / "printed.yaml")
    assert accuracy(again) == accuracy(trial[0])


def test_the_averaged_file_is_tested_with_a_callback_from_the_command_line(trial):
    _, folder = trial
    words = ["--ckpt_path", "runs/lightning_cli/averaged.ckpt", "--trainer.accelerator", "cpu"]
    words += ["--trainer.callbacks+=lightning_plugins.ClassificationReport", "--trainer.callbacks.num_classes=10"]
    done = run(folder, "test", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0.5 < accuracy(done) <= 1
    [reported] = re.findall(r"^ +accuracy +([\d.]+) +360$", done.stdout, re.MULTILINE)
    assert float(reported) == pytest.approx(accuracy(done), abs=0.005)
