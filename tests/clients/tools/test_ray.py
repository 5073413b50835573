"""Ray Train: two workers under its strategy, its checkpoints, and a run that goes on after it lost its workers."""

import csv
import os
from pathlib import Path

import pytest
import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayTrainReportCallback
from ray.train.torch import TorchTrainer

from lightning_plugins import extract_weights
from tests.clients import plain_torch
from tests.clients.comparison import by_plain_torch, rates, windows_of
from tests.clients.tools import small
from tests.clients.tools.ray_program import WORKERS, work
from tests.support.snippets import python_path

EPOCHS = 3


@pytest.fixture(scope="module")
def cluster():
    before = dict(os.environ)
    environment = {"env_vars": {"PYTHONPATH": python_path()}}
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


def run(path, *, die):
    trainer = TorchTrainer(
        work,
        train_loop_config={"path": str(path), "epochs": EPOCHS, "die": die},
        scaling_config=ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(
            name="run",
            storage_path=str(path / "ray"),
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )
    result = trainer.fit()
    ranks = [torch.load(path / f"rank{rank}.pt", weights_only=False) for rank in range(WORKERS)]
    return path, result, ranks


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), die=False)


@pytest.fixture(scope="module")
def lost(cluster, tmp_path_factory):
    return run(tmp_path_factory.mktemp("lost"), die=True)


def test_two_workers_take_the_steps_that_plain_torch_takes_with_the_batches_of_both(whole):
    _, _, ranks = whole
    windows = [windows_of(found["batches"], EPOCHS) for found in ranks]
    both = [small.join([*first, *second]) for first, second in zip(*windows, strict=True)]
    lrs = rates(small.LR, len(both))
    net = small.Network()
    initial = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    truth = by_plain_torch(
        net,
        initial,
        both,
        loss_of=small.loss_of,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=small.LR, momentum=0.9),
        lrs=lrs,
    )
    for found in ranks:
        assert found["rates"] == pytest.approx(lrs, abs=1e-12)
        assert plain_torch.distance(found["raw"], truth["raw"], initial) < 1e-5
        assert plain_torch.distance(found["average"], truth["ema"], initial) < 1e-5


def test_what_it_is_reported_is_of_the_average_and_its_checkpoint_holds_both(whole):
    _, result, ranks = whole
    assert result.metrics["val_loss"] == pytest.approx(small.loss_on_validation(ranks[0]["average"]), rel=1e-5)
    file = Path(result.checkpoint.path) / RayTrainReportCallback.CHECKPOINT_NAME
    for which in ("raw", "average"):
        extracted = extract_weights(file, which)
        assert all(torch.equal(extracted[name], tensor) for name, tensor in ranks[0][which].items())


def test_a_run_that_lost_its_workers_ends_as_the_uninterrupted_one(whole, lost):
    assert not any(found["resumed"] for found in whole[2])
    assert all(found["resumed"] for found in lost[2])
    for rank, other in zip(whole[2], lost[2], strict=True):
        for which in ("raw", "average"):
            assert all(torch.equal(rank[which][name], tensor) for name, tensor in other[which].items())
        assert rank["rates"][-len(other["rates"]) :] == other["rates"]
        assert len(other["rates"]) == 2 * len(rank["rates"]) // EPOCHS
    rows = []
    for path in (whole[0], lost[0]):
        with (path / "log.csv").open() as file:
            rows.append([{**row, "time": ""} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
