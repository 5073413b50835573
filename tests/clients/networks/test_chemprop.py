"""All techniques in chemprop: message passing over molecules, its own schedule taken away, targets that are missing."""

import copy

import numpy as np
import pytest
import torch
from chemprop import data, models, nn

from lightning_plugins.core.lightning import MisconfigurationException
from tests.clients import plain_torch
from tests.clients.comparison import (
    assert_the_file_holds_both,
    assert_the_logs_are_the_clients,
    assert_the_same_steps,
)
from tests.clients.fitting import fit
from tests.clients.stack import WINDOW, Stack

LR, EPOCHS, BATCH = 0.01, 2, 4
SMILES = [
    *("C", "CC", "CCC", "CCO", "CO", "CN", "CCN", "C=C", "C#N", "CC=O", "CC(=O)O", "c1ccccc1", "Cc1ccccc1", "CCCl"),
    *("OCCO", "CSC", "C1CC1", "C1CCCCC1", "c1ccncc1", "CC(C)C", "CF", "CBr", "NCCN", "CCCCO", "O=C=O", "CC#N"),
]


def datapoints():
    """Two targets, the number of heavy atoms and of rings, one of which is not known for some molecules."""
    for number, smiles in enumerate(SMILES):
        atoms = sum(letter in "CNOSFcn" for letter in smiles) - smiles.count("Cl")
        rings = float("nan") if number % 3 == 0 else float("1" in smiles)
        yield data.MoleculeDatapoint.from_smi(smiles, np.array([atoms / 4, rings]))


def loader(batch_size=BATCH):
    return data.build_dataloader(data.MoleculeDataset(list(datapoints())), batch_size=batch_size, shuffle=False)


def count(batch):
    """What chemprop's loss is a mean over: the targets that are known."""
    return batch.Y.isfinite().sum()


def network():
    torch.manual_seed(0)
    return models.MPNN(
        nn.BondMessagePassing(d_h=8, depth=2),
        nn.MeanAggregation(),
        nn.RegressionFFN(n_tasks=2, input_dim=8, hidden_dim=8),
        warmup_epochs=1,
        init_lr=LR,
    )


def loss_of(net, batch):
    graphs, v, x, targets = batch[:4]
    predicted = net.predictor.train_step(net.fingerprint(graphs, v, x))
    known = targets.isfinite()
    return ((predicted - targets.nan_to_num()) ** 2)[known].mean()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("chemprop")
    stack = Stack(path, warmup=2, count=count, existing="replace", base_lr=LR)
    watch, net = plain_torch.Watch(), network()
    trainer = fit(net, path, [*stack.callbacks, watch], loader(), loader(13), EPOCHS)
    return stack, watch, net, trainer


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, net, _ = run
    assert len(watch.batches) == EPOCHS * 7
    windows = iter(list(loader(BATCH * WINDOW)) * EPOCHS)  # in order, so the same molecules at once
    assert_the_same_steps(
        stack,
        watch,
        net,
        loss_of=loss_of,
        join=lambda batches: next(windows),
        lr=LR,
        epochs=EPOCHS,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=LR),
    )


def test_the_logs_hold_the_losses_that_the_client_computed(run):
    assert_the_logs_are_the_clients(*run[:2], lr=LR, epochs=EPOCHS)


def test_the_loss_that_the_client_logs_without_returning_it_is_that_of_the_average(run):
    stack, _, net, _ = run
    averaged = copy.deepcopy(net).eval()
    averaged.load_state_dict(stack.ema.average_state_dict(), strict=False)
    with torch.no_grad():
        losses = [(loss_of(averaged, batch), count(batch)) for batch in loader(13)]
    mean = sum(loss * number for loss, number in losses) / sum(number for _, number in losses)
    assert float(stack.rows("validation")[-1]["val_loss"]) == pytest.approx(float(mean), rel=1e-5)


def test_the_client_opens_the_files_and_predicts_with_the_average(run):
    stack, _, net, trainer = run
    path = trainer.checkpoint_callback.best_model_path
    assert_the_file_holds_both(path, stack, trust=True)  # its hyper-parameters are objects
    loaded = models.MPNN.load_from_checkpoint(path).eval()
    averaged = models.MPNN.load_from_checkpoint(stack.averaging.path).eval()
    with torch.no_grad():
        batch = next(iter(loader(13)))
        expected = net.eval()(*batch[:3])
        assert torch.equal(loaded(*batch[:3]), expected)
        assert not torch.allclose(averaged(*batch[:3]), expected, rtol=1e-4)


def test_its_schedule_is_not_replaced_in_silence(tmp_path):
    stack = Stack(tmp_path, warmup=2)
    with pytest.raises(MisconfigurationException, match=r"by a LambdaLR.*existing='replace'"):
        fit(network(), tmp_path, [stack.scheduler], loader())
