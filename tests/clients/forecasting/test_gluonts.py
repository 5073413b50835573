"""All techniques in gluonts: an estimator that makes module and Trainer itself, and loads its best checkpoint."""

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.dataset.common import ListDataset
from gluonts.itertools import select
from gluonts.torch import SimpleFeedForwardEstimator

from lightning_plugins import extract_weights
from tests.clients import plain_torch
from tests.clients.comparison import (
    CLOSE,
    Keep,
    assert_the_logs_are_the_clients,
    assert_the_same_steps,
    by_plain_torch,
    rates,
    windows_of,
)
from tests.clients.stack import Stack

# its loader does not say how long it is, so the schedule is told: windows of 3, 3 and 1 batches
LR, EPOCHS, BATCHES, STEPS = 0.01, 2, 7, 3
DECAY_OF_WEIGHTS = 1e-3


def series():
    noise = np.random.default_rng(0)
    values = [np.sin(np.arange(40) / 5 + place) + 0.1 * noise.normal(size=40) for place in range(5)]
    return ListDataset([{"start": pd.Period("2020-01-01", "D"), "target": part} for part in values], freq="D")


def loss_of(module, batch):
    given = {name: batch[name] for name in ("future_target", "future_observed_values")}
    return module.model.loss(**select(module.inputs, batch), **given).mean()


def optimizer(parameters):
    return torch.optim.Adam(parameters, lr=LR, weight_decay=DECAY_OF_WEIGHTS)


def join(batches):
    names = [name for name, value in batches[0].items() if isinstance(value, torch.Tensor)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("gluonts")
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 -- the client draws from it
    stack, watch, keep = Stack(path, warmup=2, total=EPOCHS * STEPS), plain_torch.Watch(), Keep()
    estimator = SimpleFeedForwardEstimator(
        prediction_length=3,
        context_length=6,
        hidden_dimensions=[8],
        lr=LR,
        weight_decay=DECAY_OF_WEIGHTS,
        batch_size=4,
        num_batches_per_epoch=BATCHES,
        trainer_kwargs={
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(path),
            "callbacks": [*stack.callbacks, watch, keep],
        },
    )
    predictor = estimator.train(series())
    return stack, watch, keep.module, predictor


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, module, _ = run
    assert len(watch.batches) == EPOCHS * BATCHES
    kind = {"loss_of": loss_of, "join": join, "optimizer": optimizer}
    assert_the_same_steps(stack, watch, module, **kind, lr=LR, epochs=EPOCHS)


def test_the_logs_hold_the_losses_that_the_client_computed(run):
    assert_the_logs_are_the_clients(*run[:2], lr=LR, epochs=EPOCHS)


def test_the_predictor_that_the_client_makes_of_its_best_checkpoint_has_its_average(run):
    _, watch, module, predictor = run
    best = torch.load(module.trainer.checkpoint_callback.best_model_path, weights_only=True)
    for name, tensor in predictor.prediction_net.state_dict().items():
        assert torch.equal(tensor, best["state_dict"][name]), name
    windows = windows_of(watch.batches, EPOCHS)[: best["global_step"]]
    truth = by_plain_torch(
        module,
        watch.initial,
        map(join, windows),
        loss_of=loss_of,
        optimizer=optimizer,
        lrs=rates(LR, EPOCHS * STEPS)[: len(windows)],
    )
    extracted = extract_weights(module.trainer.checkpoint_callback.best_model_path)  # it keeps nothing but weights
    assert plain_torch.distance(extracted, truth["ema"], watch.initial) < CLOSE
    assert plain_torch.distance(truth["ema"], truth["raw"], watch.initial) > 1e-2
    assert len(list(predictor.predict(series()))) == 5
