"""Statistics of batch normalization: those of the averaged weights, from the training data."""

from __future__ import annotations

import pytest
import torch

from lightning_plugins import CheckpointAveraging
from lightning_plugins.checkpoints import read_manifest
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.checkpoints_models import (
    VALIDATION,
    Regressor,
    assert_is_mean,
    float64_mean,
    load_state,
    loader,
    model_checkpoint,
    sources,
    trainer,
)


def test_batch_norm_statistics_are_those_of_the_averaged_weights(tmp_path):
    """Against torch's own update_bn, which runs the same data through the same weights."""
    averaging = CheckpointAveraging(last=3)
    trainer(tmp_path, callbacks=[averaging]).fit(Regressor(batch_norm=True), loader(), **VALIDATION)
    state = load_state(averaging.path)
    reference = Regressor.load_from_checkpoint(averaging.path)
    torch.optim.swa_utils.update_bn(loader(), reference)
    for name in ("net.1.running_mean", "net.1.running_var"):
        assert torch.allclose(state[name], reference.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(state[name].double(), torch.from_numpy(float64_mean(sources(averaging.path))[name]))
    rest = {name: value for name, value in float64_mean(sources(averaging.path)).items() if "running" not in name}
    assert_is_mean(state, rest)
    assert state["net.1.num_batches_tracked"] == load_state(sources(averaging.path)[-1])["net.1.num_batches_tracked"]


@pytest.mark.parametrize("refresh", [False, "auto"])
def test_statistics_are_averaged_without_refresh_or_when_frozen(tmp_path, refresh):
    class Frozen(Regressor):
        def on_train_epoch_start(self):
            if refresh == "auto":
                self.net[1].eval()

    averaging = CheckpointAveraging(last=2, refresh_batch_norm=refresh)
    trainer(tmp_path, callbacks=[averaging]).fit(Frozen(batch_norm=True), loader(), **VALIDATION)
    assert read_manifest(averaging.path)["replaced"] == []
    assert_is_mean(load_state(averaging.path), float64_mean(sources(averaging.path)))


class Manual(Regressor):
    def __init__(self, **more):
        super().__init__(**more)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self._loss(batch))
        optimizer.step()


def test_manual_optimization_averages_the_statistics_and_warns_or_is_refused(tmp_path):
    averaging = CheckpointAveraging(last=2)
    with pytest.warns(LightningPluginsWarning, match="cannot estimate them anew in manual optimization"):
        trainer(tmp_path, callbacks=[averaging]).fit(Manual(batch_norm=True), loader(), **VALIDATION)
    assert read_manifest(averaging.path)["replaced"] == []
    insisting = CheckpointAveraging(last=2, refresh_batch_norm=True)
    with pytest.raises(MisconfigurationException, match="manual optimization and `dataloader_iter` do not allow"):
        trainer(tmp_path, callbacks=[insisting]).fit(Manual(batch_norm=True), loader(), **VALIDATION)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(3, generator=generator), torch.randn(1, generator=generator)


def test_data_without_a_length_give_statistics_from_a_bounded_number_of_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_plugins.checkpoints.isolated_validation.UNSIZED_BATCHES", 3)
    steps = []

    class Counting(Regressor):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    averaging = CheckpointAveraging(last=2)
    checkpoint = model_checkpoint(tmp_path, save_top_k=-1, every_n_train_steps=2)
    data = torch.utils.data.DataLoader(Endless(), batch_size=4)
    run = trainer(tmp_path, callbacks=[averaging, checkpoint], max_epochs=-1, max_steps=6)
    run.fit(Counting(batch_norm=True), data, **VALIDATION)
    assert len(sources(averaging.path)) == 2
    assert steps == [0, 1, 2, 3, 4, 5, 0, 1, 2]
