"""All techniques in neuralforecast: every sampled window of every series, a schedule of its own taken away."""

import numpy as np
import pandas as pd
import pytest
import torch
from neuralforecast import NeuralForecast
from neuralforecast.models import MLP

from lightning_plugins import EMA
from tests.clients import plain_torch
from tests.clients.comparison import (
    Keep,
    assert_the_logs_are_the_clients,
    assert_the_same_steps,
)
from tests.clients.stack import Stack

LR, EPOCHS, SERIES, BATCH, STEPS = 0.1, 3, 15, 3, 2  # 5 batches of 3 series, in windows of 3 and 2


def table():
    noise, days = np.random.default_rng(0), pd.date_range("2020-01-01", periods=24, freq="D")
    parts = [
        pd.DataFrame(
            {"unique_id": f"s{number:02}", "ds": days, "y": np.sin(np.arange(24) / 3 + number) + noise.normal(size=24)}
        )
        for number in range(SERIES)
    ]
    return pd.concat(parts, ignore_index=True)


def count(batch):
    """Its batches name their columns, too: what is one of a sample cannot be told."""
    return len(batch["temporal"])


def loss_of(net, batch):
    net._trainer = None  # its step logs
    return net.training_step(batch, 0)


def join(batches):
    return {**batches[0], "temporal": torch.cat([batch["temporal"] for batch in batches])}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("neuralforecast")
    stack, watch, keep = Stack(path, warmup=2, count=count, existing="replace"), plain_torch.Watch(), Keep()
    model = MLP(
        h=3,
        input_size=6,
        num_layers=1,
        hidden_size=8,
        max_steps=EPOCHS * STEPS,
        learning_rate=LR,
        batch_size=BATCH,
        windows_batch_size=None,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"momentum": 0.9},
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(path),
        # its hyper-parameters hold the callbacks, so no file can be written while they hold the Trainer
        enable_checkpointing=False,
        callbacks=[*(callback for callback in stack.callbacks if callback is not stack.averaging), watch, keep],
    )
    forecasts = NeuralForecast([model], freq="D")
    forecasts.fit(table())
    # the client trains a copy of the model, with copies of the callbacks
    copies = {type(callback): callback for callback in forecasts.models[0].trainer_kwargs["callbacks"]}
    stack.ema = copies[EMA]
    return stack, copies[plain_torch.Watch], copies[Keep].module, forecasts


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, module, _ = run
    assert len(watch.batches) == EPOCHS * SERIES / BATCH
    assert_the_same_steps(stack, watch, module, loss_of=loss_of, join=join, lr=LR, epochs=EPOCHS)


def test_the_logs_hold_the_losses_that_the_client_computed(run):
    assert_the_logs_are_the_clients(*run[:2], lr=LR, epochs=EPOCHS)


def test_the_client_predicts_with_the_average_also_when_it_is_saved_and_loaded(run, tmp_path):
    stack, _, _, forecasts = run
    (model,) = forecasts.models
    average = stack.ema.average_state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in average.items())
    predicted = forecasts.predict()["MLP"].to_numpy()
    model.load_state_dict(stack.ema.raw_state_dict(), strict=False)
    assert not np.allclose(forecasts.predict()["MLP"].to_numpy(), predicted, rtol=1e-4)
    model.load_state_dict(average, strict=False)
    forecasts.save(str(tmp_path / "saved"), overwrite=True)
    loaded = NeuralForecast.load(str(tmp_path / "saved"))
    assert np.array_equal(loaded.predict()["MLP"].to_numpy(), predicted)
