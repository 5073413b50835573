"""Scores of an average: every sample alike, by a name that was monitored or a validation loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torchmetrics
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_plugins import CheckpointAveraging
from lightning_plugins.checkpoints.validation_scores import Part, joined, loss_name, mean_of
from tests.support.checkpoints_models import Regressor, load_state, loader, model_checkpoint, trainer

UNEVEN = loader(count=10, batch=4, seed=1)


@pytest.mark.parametrize("form", ["tensor", "mapping", "logged", "metric"])
def test_the_last_smaller_batch_counts_by_its_samples(tmp_path, form):
    class Scored(Regressor):
        def __init__(self):
            super().__init__()
            self.metric = torchmetrics.MeanSquaredError()

        def validation_step(self, batch, batch_idx):
            loss = self._loss(batch)
            if form == "metric":
                self.metric(self(batch[0]), batch[1])
                self.log("val_loss", self.metric)
            if form == "logged":
                self.log("val_loss", loss)
            return {"tensor": loss, "mapping": {"loss": loss}}.get(form)

    averaging = CheckpointAveraging(last=3)
    run = trainer(tmp_path, callbacks=[averaging, model_checkpoint(tmp_path, save_top_k=-1)])
    run.fit(Scored(), loader(), UNEVEN)
    module = Scored()
    module.load_state_dict(load_state(averaging.path))
    inputs, targets = UNEVEN.dataset.tensors
    with torch.no_grad():
        expected = torch.nn.functional.mse_loss(module(inputs), targets).item()
    assert averaging.metric == ("val_loss" if form in ("logged", "metric") else "returned loss")
    assert averaging.scores["average"] == pytest.approx(expected, rel=1e-5)


def test_a_batch_that_does_not_say_its_samples_counts_as_one(tmp_path):
    class Odd(Regressor):
        def validation_step(self, batch, batch_idx):
            return torch.tensor(float(batch_idx))

    class Texts(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return index

    data = torch.utils.data.DataLoader(Texts(), batch_size=None)
    averaging = CheckpointAveraging(last=2)
    run = trainer(tmp_path, callbacks=[averaging, model_checkpoint(tmp_path, save_top_k=-1)])
    run.fit(Odd(), loader(), data)
    assert averaging.scores == {"average": 1.0, "best_single": 1.0}


def test_parts_of_ranks_are_joined_by_their_kind():
    parts = [(Part(kind, 6.0, 3.0), Part(kind, 1.0, 1.0)) for kind in ("mean", "sum", "max", "min", "whole")]
    assert [joined(list(pair)) for pair in parts] == [7 / 4, 7.0, 6.0, 1.0, 6.0]
    assert math.isnan(mean_of([]))
    assert math.isnan(mean_of([Part("mean", 0.0, 0.0)]))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train_loss", "val_loss"], "val_loss"),
        (["train_loss", "loss"], "loss"),
        (["loss_train", "loss_val"], "loss_val"),
        (["loss", "val_other_loss"], "val_other_loss"),
        (["val_other_loss", "val_loss"], "val_loss"),
        (["train_loss", "validation/LOSS"], "validation/LOSS"),
        (["train_loss"], "train_loss"),
        (["val_acc", "accuracy"], None),
        ([], None),
    ],
)
def test_the_name_of_a_score_is_that_of_a_validation_loss(names, expected):
    for order in itertools.permutations(names):
        assert loss_name(order) == expected


@pytest.mark.parametrize("hidden", [True, False])
def test_nothing_is_compared_where_fsdp1_hides_the_parameters(tmp_path, said, hidden):
    """No checkpoint can be loaded into them; the average is written all the same."""

    strategy, averaging = SingleDeviceStrategy("cpu"), CheckpointAveraging(last=2)
    # as FSDPStrategy keeps what it was given
    strategy.kwargs = {"use_orig_params": not hidden}
    run = trainer(tmp_path, strategy=strategy, callbacks=[averaging, model_checkpoint(tmp_path, save_top_k=-1)])
    run.fit(Regressor(), loader(), UNEVEN)
    assert averaging.path.exists()
    assert (averaging.scores is None) is hidden
    reasons = [line for line in said if "CheckpointAveraging does not compare: `use_orig_params` must be True" in line]
    assert bool(reasons) is hidden
