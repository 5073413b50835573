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
    os.environ["PYTHONPATH"] = python_path()
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    assert ray.util.get_node_ip_address() == "127.0.0.1"
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory):
    """A run to the end, and one that lost its workers: for each its folder and what its ranks did; Ray's result."""
    path = tmp_path_factory.mktemp("ray")
    trainer = TorchTrainer(
        work,
        train_loop_config={"path": str(path), "epochs": EPOCHS},
        scaling_config=ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(
            name="run",
            storage_path=str(path / "ray"),
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )
    result = trainer.fit()
    return [
        (folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORKERS)])
        for folder in (path / "whole", path / "lost")
    ], result


def test_two_workers_take_the_steps_that_plain_torch_takes_with_the_batches_of_both(runs):
    (_, ranks), (_, resumed) = runs[0]
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
    for found in (*ranks, *resumed):
        assert found["rates"] == pytest.approx(lrs[-len(found["rates"]) :], abs=1e-12)
        assert plain_torch.distance(found["raw"], truth["raw"], initial) < 1e-5
        assert plain_torch.distance(found["average"], truth["ema"], initial) < 1e-5


def test_what_it_is_reported_is_of_the_average_and_its_checkpoint_holds_both(runs):
    (_, (_, ranks)), result = runs
    assert result.metrics["val_loss"] == pytest.approx(small.loss_on_validation(ranks[0]["average"]), rel=1e-5)
    file = Path(result.checkpoint.path) / RayTrainReportCallback.CHECKPOINT_NAME
    for which in ("raw", "average"):
        extracted = extract_weights(file, which)
        assert all(torch.equal(extracted[name], tensor) for name, tensor in ranks[0][which].items())


def test_a_run_that_lost_its_workers_ends_as_the_uninterrupted_one(runs):
    whole, lost = runs[0]
    for rank, other in zip(whole[1], lost[1], strict=True):
        for which in ("raw", "average"):
            assert all(torch.equal(rank[which][name], tensor) for name, tensor in other[which].items())
        assert rank["rates"][-len(other["rates"]) :] == other["rates"]
        assert len(other["rates"]) == 2 * len(rank["rates"]) // EPOCHS
    rows = []
    for path, _ in (whole, lost):
        with (path / "log.csv").open() as file:
            rows.append([{**row, "time": ""} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
