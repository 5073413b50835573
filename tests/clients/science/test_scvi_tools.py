"""All techniques in scvi-tools: a variational autoencoder of cells, whose step returns its loss and logs the rest."""

import anndata
import numpy as np
import pytest
import scvi
import torch

from tests.clients import plain_torch
from tests.clients.comparison import (
    Keep,
    assert_the_logs_are_the_clients,
    assert_the_same_steps,
)
from tests.clients.stack import Stack

LR, EPOCHS, CELLS, GENES = 0.01, 2, 36, 10  # 27 cells to train with, in windows of 3, 3 and 1 batches


def cells():
    draw = np.random.default_rng(0)
    return anndata.AnnData(draw.poisson(draw.gamma(2.0, 2.0, size=(CELLS, GENES))).astype(np.float32))


def loss_of(plan, batch):
    return plan.module(batch, loss_kwargs={"kl_weight": 1.0})[2].loss


def join(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("scvi")
    scvi.settings.seed = 0
    adata = cells()
    scvi.model.SCVI.setup_anndata(adata)
    stack, watch, keep = Stack(path, warmup=2), plain_torch.Watch(), Keep()
    model = scvi.model.SCVI(adata, n_hidden=8, n_latent=2, dropout_rate=0.0, use_batch_norm="none")

    def mean(self, sample_shape=()):
        return self.loc.expand(*sample_shape, *self.loc.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scvi.settings, "logging_dir", path)  # it makes a folder there for every run, asked or not
        # a cell is put at its mean, not drawn around it: drawn numbers depend on what is drawn at once
        patch.setattr(torch.distributions.Normal, "rsample", mean)
        # its checkpoint callback writes into `scvi_log` in the working directory
        patch.chdir(path)
        model.train(
            max_epochs=EPOCHS,
            accelerator="cpu",
            train_size=0.75,
            check_val_every_n_epoch=1,
            batch_size=4,
            plan_kwargs={"lr": LR, "n_epochs_kl_warmup": None},
            enable_progress_bar=False,
            logger=False,
            enable_checkpointing=True,
            default_root_dir=str(path),
            callbacks=[*stack.callbacks, watch, keep],
        )
        yield stack, watch, keep.module, model


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, plan, _ = run
    assert len(watch.batches) == EPOCHS * 7

    def optimizer(parameters):
        return torch.optim.Adam(parameters, lr=LR, eps=0.01, weight_decay=1e-6)  # the client's defaults

    kind = {"loss_of": loss_of, "join": join, "optimizer": optimizer}
    assert_the_same_steps(stack, watch, plan, **kind, lr=LR, epochs=EPOCHS)


def test_the_logs_hold_the_losses_that_the_client_computed(run):
    assert_the_logs_are_the_clients(*run[:2], lr=LR, epochs=EPOCHS)


def test_the_client_places_cells_with_the_average_also_when_it_is_saved_and_loaded(run, tmp_path):
    stack, _, _, model = run
    average = stack.ema.average_state_dict()
    held = model.module.state_dict()
    assert all(torch.equal(held[name.removeprefix("module.")], tensor) for name, tensor in average.items())
    placed = model.get_latent_representation()
    model.save(str(tmp_path / "model"))
    loaded = scvi.model.SCVI.load(str(tmp_path / "model"), adata=cells(), accelerator="cpu")
    assert np.allclose(loaded.get_latent_representation(), placed, rtol=1e-5, atol=1e-6)
