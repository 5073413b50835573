"""All techniques in pytorch_tabular: the other name of Lightning, named columns, losses that are only logged."""

import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig

from tests.clients import plain_torch
from tests.clients.comparison import assert_the_logs_are_the_clients, assert_the_same_steps
from tests.clients.stack import Stack

LR, EPOCHS = 0.1, 2
COLUMNS = ["a", "b", "c"]


def table(number, seed):
    draw = np.random.default_rng(seed)
    made = pd.DataFrame(draw.normal(size=(number, 3)), columns=COLUMNS)
    made["kind"] = draw.choice(["x", "y"], size=number)
    made["target"] = made[COLUMNS].sum(axis=1) + (made["kind"] == "x")
    return made


def loss_of(net, batch):
    return torch.nn.functional.mse_loss(net(batch)["logits"][:, 0], batch["target"][:, 0])


def join(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("tabular")
    stack, watch = Stack(path, warmup=2), plain_torch.Watch()
    model = TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=COLUMNS, categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(
            task="regression",
            layers="8",
            activation="Tanh",
            dropout=0.0,
            embedding_dropout=0.0,
            use_batch_norm=False,
            batch_norm_continuous_input=False,
            learning_rate=LR,
        ),
        optimizer_config=OptimizerConfig(optimizer="SGD", optimizer_params={"momentum": 0.9}),
        trainer_config=TrainerConfig(
            batch_size=4,
            max_epochs=EPOCHS,
            accelerator="cpu",
            early_stopping=None,
            checkpoints=None,
            load_best=False,
            progress_bar="none",
            trainer_kwargs={"default_root_dir": str(path), "enable_model_summary": False},
        ),
        verbose=False,
    )
    model.fit(table(27, 0), table(9, 1), callbacks=[*stack.callbacks, watch])
    return stack, watch, model


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, model = run
    assert_the_same_steps(stack, watch, model.model, loss_of=loss_of, join=join, lr=LR, epochs=EPOCHS)


def test_the_logs_hold_the_losses_that_the_client_computed(run):
    assert_the_logs_are_the_clients(*run[:2], lr=LR, epochs=EPOCHS)


def test_the_loss_that_the_client_only_logs_and_its_predictions_are_of_the_average(run):
    stack, watch, model = run
    average = stack.ema.average_state_dict()
    assert all(torch.equal(model.model.state_dict()[name], tensor) for name, tensor in average.items())
    net = model.model.eval()
    batches = watch.validation_batches[len(watch.validation_batches) // EPOCHS :]
    with torch.no_grad():
        whole = join(batches)
        assert float(stack.rows("validation")[-1]["loss"]) == pytest.approx(float(loss_of(net, whole)), rel=1e-5)
        predicted = model.predict(table(9, 1)).iloc[:, -1].to_numpy()
        assert predicted == pytest.approx(net(whole)["logits"][:, 0].numpy(), rel=1e-5)
