"""Weights & Biases without a network: what its offline file records of a run, and its watching of gradients."""

import json
import time

import pytest
import torch
import wandb
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import WandbLogger
from wandb.proto.wandb_internal_pb2 import Record

from tests.clients import plain_torch
from tests.clients.comparison import by_plain_torch, rates, windows_of
from tests.clients.fitting import fit
from tests.clients.stack import Stack
from tests.clients.tools import small


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("wandb")
    logger = WandbLogger(project="small", save_dir=path, offline=True)
    stack, watch, module = Stack(path, warmup=2), plain_torch.Watch(), small.Network()
    logger.watch(module, log="all", log_freq=1)
    callbacks = [*stack.callbacks, LearningRateMonitor(logging_interval="step"), watch]
    data = small.loader(), small.validation()
    fit(module, path, callbacks, *data, small.EPOCHS, logger=logger, log_every_n_steps=1)
    wandb.finish()
    return stack, watch, history(path)


def records(content, header=7, block=32768):
    """What a file of LevelDB's log format holds, in which wandb writes: chunks of blocks, each with its kind."""
    place, parts = header, []
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            yield b"".join(parts)
            parts = []


def history(path):
    """The rows that the offline file holds, which another process writes."""
    (file,) = path.rglob("*.wandb")
    for _ in range(100):
        found = [Record.FromString(content) for content in records(file.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            break
        time.sleep(0.1)
    rows = [record.history.item for record in found if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, _ = run
    small.assert_the_same_steps(stack, watch, small.Network())


def test_its_record_has_the_rate_of_each_step_and_the_losses_of_the_average(run):
    stack, _, rows = run
    recorded = {row["trainer/global_step"]: row["lr-SGD"] for row in rows if "lr-SGD" in row}
    small.assert_a_tracker_has(stack, recorded, [row["val_loss"] for row in rows if "val_loss" in row])


def test_the_weights_that_it_watches_are_trained_ones_in_training_and_the_average_in_validation(run):
    """It looks at them in every forward pass, here at the one bias of the last layer."""
    _, watch, rows = run
    name, windows = "net.2.bias", windows_of(watch.batches, small.EPOCHS)
    after = [
        by_plain_torch(
            small.Network(),
            watch.initial,
            map(small.join, windows[:steps]),
            loss_of=small.loss_of,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=small.LR, momentum=0.9),
            lrs=rates(small.LR, len(windows))[:steps],
        )
        for steps in range(len(windows) + 1)
    ]
    for phase, kind, expected in (("train_loss", "raw", range(6)), ("val_loss", "ema", (3, 6))):
        seen = [row[f"parameters/{name}/bins"] for row in rows if phase in row]
        wanted = [float(after[steps][kind][name]) for steps in expected]
        assert [(bins[0] + bins[-1]) / 2 for bins in seen] == pytest.approx(wanted, rel=1e-5), phase
