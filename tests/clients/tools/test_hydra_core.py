"""Hydra: a program whose callbacks come from its configuration, converted by default, and a sweep over one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from lightning_plugins import extract_weights
from tests.clients import plain_torch
from tests.clients.comparison import (
    assert_the_file_holds_both,
    assert_the_logs_are_the_clients,
    assert_the_same_steps,
)
from tests.clients.stack import DECAY, Stack
from tests.clients.tools import small
from tests.clients.tools.hydra_app.train import train
from tests.support.snippets import python_path

APP = Path(__file__).with_name("hydra_app")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("hydra")
    with initialize_config_dir(version_base="1.3", config_dir=str(APP / "configs")):
        module, trainer = train(compose("train", overrides=[f"path={path}"]))
    made = {type(callback).__name__: callback for callback in trainer.callbacks}
    rows = Stack.rows
    stack = SimpleNamespace(path=path, ema=made["EMA"], diary=made["EventCallback"].function)
    stack.rows = lambda phase: rows(stack, phase)
    stack.chart = lambda phase: Stack.chart(stack, phase)
    return stack, made["Watch"], module, trainer


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, module, trainer = run
    assert trainer.global_step == small.EPOCHS * small.STEPS
    kind = {"loss_of": small.loss_of, "join": small.join}
    assert_the_same_steps(stack, watch, module, **kind, lr=small.LR, epochs=small.EPOCHS)


def test_the_logs_hold_the_losses_and_events_that_the_program_asked_for(run):
    stack, watch = run[:2]
    assert_the_logs_are_the_clients(stack, watch, lr=small.LR, epochs=small.EPOCHS)
    assert set(stack.diary.heard) == {"batchEnd"}
    assert stack.diary.losses == pytest.approx(watch.losses, rel=1e-6)


def test_its_checkpoint_holds_both_weights(run):
    assert_the_file_holds_both(run[3].checkpoint_callback.best_model_path, run[0])


def test_a_sweep_gives_each_job_a_run_of_its_own(tmp_path):
    """As a user starts it; the program's jobs share a process."""
    overrides = [f"hydra.sweep.dir={tmp_path}", "callbacks.ema.decay.value=0.5,0.9", "~callbacks.post_hoc"]
    done = subprocess.run(
        [sys.executable, APP / "train.py", "--multirun", *overrides],
        env={**os.environ, "PYTHONPATH": python_path()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for job, decay in (("0", 0.5), ("1", DECAY)):
        (file,) = (tmp_path / job / "checkpoints").glob("*.ckpt")
        found[decay] = extract_weights(file), extract_weights(file, "raw")
        result = torch.load(tmp_path / job / "result.pt")["val_loss"]
        assert result == pytest.approx(small.loss_on_validation(found[decay][0]), rel=1e-5)
    assert all(torch.equal(found[0.5][1][name], tensor) for name, tensor in found[DECAY][1].items())
    assert not any(torch.equal(found[0.5][0][name], tensor) for name, tensor in found[DECAY][0].items())
    initial = small.Network().state_dict()
    assert plain_torch.distance(found[0.5][0], found[0.5][1], initial) < plain_torch.distance(
        found[DECAY][0], found[DECAY][1], initial
    )
