"""A run inside a client, beside the same run in plain torch."""

import copy
from itertools import chain

import lightning.pytorch as unified
import numpy as np
import pytest
import pytorch_lightning as classic
import torch

from lightning_plugins import extract_weights, synthesize_ema
from tests.clients import plain_torch
from tests.clients.stack import DECAY, SIGMA_REL, WINDOW

CLOSE = 1e-5


def windows_of(batches, epochs, window=WINDOW):
    """The batches of each optimizer step; the last step of an epoch has what is left of it."""
    size = len(batches) // epochs
    by_epoch = [batches[first : first + size] for first in range(0, len(batches), size)]
    return list(chain.from_iterable([epoch[i : i + window] for i in range(0, size, window)] for epoch in by_epoch))


def rates(lr, total, warmup=2):
    return [lr * plain_torch.warmup_cosine(step, warmup=warmup, total=total) for step in range(total)]


def by_plain_torch(net, initial, windows, *, loss_of, optimizer, lrs):
    """Train a copy of ``net`` from ``initial``, every window in one pass: the raw weights and both averages."""
    net = copy.deepcopy(net)
    net.load_state_dict(initial)
    rules = {
        "ema": lambda n: plain_torch.ema_decay(n, DECAY),
        "power": lambda n: plain_torch.power_decay(n, SIGMA_REL),
    }
    averages = plain_torch.Averages(net, rules)
    plain_torch.train(net, windows, loss_of, optimizer(_trainable(net)), lrs, averages)
    return {"raw": {name: parameter.detach() for name, parameter in net.named_parameters()}, **averages.kept}


def assert_the_same_steps(stack, watch, net, *, loss_of, join, lr, epochs, optimizer=None, close=CLOSE):
    """The rates, the weights and both averages are those of a plain loop over the run's own batches.

    Args:
        stack: The callbacks of the run, with a warm-up of 2 steps to the run's end.
        watch: What the run was given and did.
        net: The client's network, in any state.
        loss_of: The client's loss of a batch, ``f(net, batch)``.
        join: Batches -> one batch of all their samples.
        lr: The peak of the rate.
        epochs: Epochs of the run.
        optimizer: Parameters -> optimizer; by default SGD with momentum 0.9.
        close: Bound of the distance, as a share of how far training went.
    """
    windows = windows_of(watch.batches, epochs)
    lrs = rates(lr, len(windows))
    assert watch.rates == pytest.approx(lrs, abs=1e-12)
    if optimizer is None:

        def optimizer(parameters):
            return torch.optim.SGD(parameters, lr=lr, momentum=0.9)

    truth = by_plain_torch(net, watch.initial, map(join, windows), loss_of=loss_of, optimizer=optimizer, lrs=lrs)
    found = {
        "raw": stack.ema.raw_state_dict(),
        "ema": stack.ema.average_state_dict(),
        "power": synthesize_ema(stack.path / "posthoc", SIGMA_REL),
    }
    trained = {name for name, _ in _trainable(net, named=True)}
    for kind, weights in found.items():
        expected = {name: tensor for name, tensor in truth[kind].items() if name in trained}
        assert plain_torch.distance(weights, expected, watch.initial) < close, kind
    frozen = set(truth["raw"]) - trained
    assert all(torch.equal(found[kind][name], watch.initial[name]) for kind in ("raw", "ema") for name in frozen)
    return truth


def assert_the_logs_are_the_clients(stack, watch, *, lr, epochs):
    """The file has a row per batch: the running mean of the client's losses, and the rate of the batch's step."""
    rows, size = stack.rows("train"), len(watch.losses) // epochs
    assert len(rows) == len(watch.losses)
    for epoch in range(epochs):
        running = np.cumsum(watch.losses[size * epoch :][:size]) / np.arange(1, size + 1)
        assert [float(row["loss"]) for row in rows[size * epoch :][:size]] == pytest.approx(running, rel=1e-5)
    windows = windows_of(watch.losses, epochs)
    per_batch = [rate for rate, window in zip(rates(lr, len(windows)), windows, strict=True) for _ in window]
    assert [float(row["lr"]) for row in rows] == pytest.approx(per_batch, abs=1e-12)
    steps = len(windows) // epochs
    assert stack.chart("train") == [
        (steps * (epoch + 1), pytest.approx(float(rows[size * (epoch + 1) - 1]["loss"]), rel=1e-5))
        for epoch in range(epochs)
    ]


def assert_the_validation_is_logged(stack, watch, *, epochs):
    """The last row of each epoch's validation has the mean of the client's losses, and so has the chart."""
    rows, batches = stack.rows("validation"), len(watch.validations) // epochs
    assert len(rows) == len(watch.validations)
    ends = [float(row["loss"]) for row in rows[batches - 1 :: batches]]
    assert ends == pytest.approx(np.reshape(watch.validations, (epochs, batches)).mean(1), rel=1e-6)
    steps = len(watch.rates) // epochs
    assert stack.chart("validation") == [
        (steps * (epoch + 1), pytest.approx(end, rel=1e-6)) for epoch, end in enumerate(ends)
    ]


def assert_the_events_came(stack, watch, *, epochs):
    """Each as often as the run had something of its kind, and with the client's losses."""
    validations = len(watch.validation_batches)
    assert stack.diary.heard == {
        **dict.fromkeys(("fitStart", "fitEnd"), 1),
        **dict.fromkeys(("epochStart", "trainingStart", "trainingEnd", "validationStart"), epochs),
        **dict.fromkeys(("validationEnd", "epochEnd"), epochs),
        **dict.fromkeys(("batchStart", "batchEnd"), len(watch.batches) + validations),
        "updateStart": len(watch.rates),
        "inferencePredictionEnd": validations,
    }
    assert stack.diary.losses == pytest.approx(watch.losses, rel=1e-6)


def assert_the_file_holds_both(path, stack, **options):
    """A checkpoint of the run's end: Lightning reads the average from it, and we the raw weights."""
    for which, weights in (("average", stack.ema.average_state_dict()), ("raw", stack.ema.raw_state_dict())):
        extracted = extract_weights(path, which, **options)
        assert all(torch.equal(extracted[name], tensor) for name, tensor in weights.items()), which


def _trainable(net, named=False):
    return [(name, p) if named else p for name, p in net.named_parameters() if p.requires_grad]


class Keep(unified.Callback, classic.Callback):
    """Keeps the module of a fit, for clients that make it themselves."""

    module = None

    def on_fit_start(self, trainer, pl_module):
        self.module = pl_module
