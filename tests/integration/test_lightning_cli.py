"""Schedules and callbacks written in a LightningCLI's YAML, under both names of Lightning."""

import sys

import pytest
import yaml

from lightning_plugins import LearningRateScheduler
from tests.support.training import loader, make_module, rates

CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_plugins.LearningRateScheduler
      init_args:
        schedule:
          class_path: lightning_plugins.Join
          init_args:
            parts:
              - class_path: lightning_plugins.Linear
                init_args: {steps: 4, start: 0, end: 1}
              - class_path: lightning_plugins.Segments
                init_args:
                  segments:
                    - {shape: cosine, start: 1.0, end: 0.5, steps: "20%"}
                    - {end: 0.1}
                  endpoint: true
            boundaries: [4]
        plateau:
          class_path: lightning_plugins.Plateau
          init_args: {monitor: val_loss}
        base_lr: 0.5
"""


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's CLI uses what it deprecates


def run_cli(namespace, path, *arguments):
    cli = __import__(f"{namespace.__name__}.cli", fromlist=["LightningCLI"])
    (path / "config.yaml").write_text(CONFIG)
    module = make_module(namespace)
    result = cli.LightningCLI(
        type(module),
        save_config_callback=None,
        run=False,
        args=["--config", str(path / "config.yaml"), *arguments],
        seed_everything_default=0,
    )
    result.trainer.fit(result.model, loader(10))
    return result


def test_a_yaml_configures_the_schedule(tmp_path, namespace):
    cli = run_cli(namespace, tmp_path)
    [callback] = [one for one in cli.trainer.callbacks if isinstance(one, LearningRateScheduler)]
    assert rates(cli.model) == pytest.approx([0.5 * callback.resolved(step) for step in range(20)])
    assert rates(cli.model)[:5] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert rates(cli.model)[-1] == pytest.approx(0.05)


def test_print_config_round_trip(tmp_path, namespace, capsys):
    with pytest.raises(SystemExit):
        run_cli(namespace, tmp_path, "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    [callback] = printed["trainer"]["callbacks"]
    assert callback["init_args"]["schedule"]["class_path"] == "lightning_plugins.Join"
    assert callback["init_args"]["base_lr"] == 0.5
