"""MLflow: what its logger and its automatic logging record of a run, in a local database."""

from pathlib import Path

import mlflow
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger

from tests.clients import fitting, plain_torch
from tests.clients.comparison import assert_the_file_holds_both
from tests.clients.stack import Stack
from tests.clients.tools import small


def fit(path, stack, logger, *more):
    watch, module = plain_torch.Watch(), small.Network()
    callbacks = [*stack.callbacks, *more, watch]
    data = small.loader(), small.validation()
    fitting.fit(module, path, callbacks, *data, small.EPOCHS, logger=logger, log_every_n_steps=1)
    return module, watch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{path}/mlflow.db"
    logger = MLFlowLogger("small", tracking_uri=uri, artifact_location=str(path / "artifacts"), log_model=True)
    stack = Stack(path, warmup=2)
    monitors = LearningRateMonitor(logging_interval="step"), ModelCheckpoint(monitor="val_loss", save_top_k=-1)
    module, watch = fit(path, stack, logger, *monitors)
    return stack, watch, module, mlflow.MlflowClient(uri), logger.run_id


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, module = run[:3]
    small.assert_the_same_steps(stack, watch, module)


def test_its_record_has_the_rate_of_each_step_and_the_losses_of_the_average(run):
    stack, _, _, client, run_id = run
    recorded = {metric.step: metric.value for metric in client.get_metric_history(run_id, "lr-SGD")}
    losses = [metric.value for metric in client.get_metric_history(run_id, "val_loss")]
    small.assert_a_tracker_has(stack, recorded, losses)


def test_the_checkpoint_among_its_artifacts_holds_both_weights(run, tmp_path):
    stack, _, _, client, run_id = run
    (last,) = (found.path for found in client.list_artifacts(run_id) if "epoch=1" in found.path)
    downloaded = client.download_artifacts(run_id, last, str(tmp_path))
    (checkpoint,) = Path(downloaded).glob("*.ckpt")
    assert_the_file_holds_both(checkpoint, stack)


def test_the_model_that_its_automatic_logging_keeps_is_the_average(tmp_path):
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.pytorch.autolog(log_every_n_epoch=1, checkpoint=False)
    try:
        stack = Stack(tmp_path, warmup=2)
        with mlflow.start_run() as record:
            module, watch = fit(tmp_path, stack, False)
        loaded = mlflow.pytorch.load_model(f"runs:/{record.info.run_id}/model").state_dict()
    finally:
        mlflow.pytorch.autolog(disable=True)
        mlflow.set_tracking_uri(before)
    small.assert_the_same_steps(stack, watch, module)
    average = stack.ema.average_state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in average.items())
