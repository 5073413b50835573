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
    CLOSE,
    assert_the_file_holds_both,
    assert_the_logs_are_the_clients,
    rates,
    windows_of,
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
    small.assert_the_same_steps(stack, watch, module)


def test_the_logs_hold_the_losses_and_events_that_the_program_asked_for(run):
    stack, watch = run[:2]
    assert_the_logs_are_the_clients(stack, watch, lr=small.LR, epochs=small.EPOCHS)
    assert set(stack.diary.heard) == {"batchEnd"}
    assert stack.diary.losses == pytest.approx(watch.losses, rel=1e-6)


def test_its_checkpoint_holds_both_weights(run):
    assert_the_file_holds_both(run[3].checkpoint_callback.best_model_path, run[0])


def test_a_sweep_gives_each_job_a_run_of_its_own(tmp_path):
    """As a user starts it; the program's jobs share a process."""
    decays = 0.2, DECAY  # the warm-up of the decay reaches the first of them in a run's six steps
    chosen = "callbacks.ema.decay.value=" + ",".join(map(str, decays))
    done = subprocess.run(
        [sys.executable, APP / "train.py", "--multirun", f"hydra.sweep.dir={tmp_path}", chosen, "~callbacks.post_hoc"],
        env={**os.environ, "PYTHONPATH": python_path()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    net, windows = small.Network(), windows_of(list(small.loader()) * small.EPOCHS, small.EPOCHS)
    initial = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    averages = plain_torch.Averages(
        net, {decay: lambda n, decay=decay: plain_torch.ema_decay(n, decay) for decay in decays}
    )
    optimizer, lrs = net.configure_optimizers(), rates(small.LR, len(windows))
    plain_torch.train(net, map(small.join, windows), small.loss_of, optimizer, lrs, averages)
    assert plain_torch.distance(averages.kept[decays[0]], averages.kept[decays[1]], initial) > 1e-2
    for job, decay in enumerate(decays):
        (file,) = (tmp_path / str(job) / "checkpoints").glob("epoch=*.ckpt")  # beside the mean of the last two
        average = extract_weights(file)
        assert plain_torch.distance(extract_weights(file, "raw"), net.state_dict(), initial) < CLOSE
        assert plain_torch.distance(average, averages.kept[decay], initial) < CLOSE
        result = torch.load(tmp_path / str(job) / "result.pt")["val_loss"]
        assert result == pytest.approx(small.loss_on_validation(average), rel=1e-5)
