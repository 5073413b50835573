"""All techniques in transformers: BERT and GPT-2 from a configuration, its tokenizer's batches, its outputs."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from lightning_plugins import MicroBatching, StatisticsRecorder
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.clients import plain_torch
from tests.clients.comparison import (
    assert_the_file_holds_both,
    assert_the_logs_are_the_clients,
    assert_the_same_steps,
)
from tests.clients.fitting import fit
from tests.clients.networks.transformers_models import (
    Wrapped,
    bert,
    gpt2,
    join,
    loader,
    loss_of,
    predicted_tokens,
)
from tests.clients.stack import Stack

LR, EPOCHS = 0.1, 2
KINDS = {"bert": (bert, "classes", "samples"), "gpt2": (gpt2, "tokens", predicted_tokens)}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    make, labels, count = KINDS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    stack, watch = Stack(path, warmup=2, count=count), plain_torch.Watch()
    if request.param == "bert":
        place = next(i for i, callback in enumerate(stack.callbacks) if isinstance(callback, StatisticsRecorder))
        stack.callbacks[place] = StatisticsRecorder(["accuracy"])
    module = Wrapped(make(), LR)
    # 27 texts are 7 batches, in windows of 3, 3 and 1, whose only batch has 3 texts
    trainer = fit(module, path, [*stack.callbacks, watch], loader(27, 4, labels), loader(9, 4, labels, seed=1))
    return stack, watch, module, trainer, request.param


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, module, _, _ = run
    assert len(watch.batches) == EPOCHS * 7
    assert_the_same_steps(stack, watch, module, loss_of=loss_of, join=join, lr=LR, epochs=EPOCHS)


def test_the_logs_hold_the_losses_that_the_client_computed(run):
    stack, watch = run[:2]
    assert_the_logs_are_the_clients(stack, watch, lr=LR, epochs=EPOCHS)


def test_validation_sees_the_average(run):
    stack, _, module, _, kind = run
    averaged = copy.deepcopy(module).eval()
    averaged.load_state_dict(stack.ema.average_state_dict())
    with torch.no_grad():
        outputs = [(averaged.net(**batch), batch) for batch in loader(9, 4, KINDS[kind][1], seed=1)]
    row = stack.rows("validation")[-1]
    assert float(row["loss"]) == pytest.approx(np.mean([float(output.loss) for output, _ in outputs]), rel=1e-5)
    if kind == "bert":
        right = torch.cat([output.logits.argmax(1) == batch["labels"] for output, batch in outputs])
        assert float(row["accuracy"]) == pytest.approx(float(right.double().mean()))


def test_the_checkpoint_holds_both_weights(run):
    stack, _, _, trainer, _ = run
    assert_the_file_holds_both(trainer.checkpoint_callback.best_model_path, stack)


def test_what_the_client_saves_and_loads_is_the_average(run, tmp_path):
    stack, _, module, _, _ = run
    module.net.save_pretrained(tmp_path)
    loaded = type(module.net).from_pretrained(tmp_path).state_dict()
    average = stack.ema.average_state_dict()
    assert all(torch.equal(loaded[name.removeprefix("net.")], tensor) for name, tensor in average.items())


def test_pieces_of_a_batch_make_the_same_steps(run, tmp_path):
    stack, watch, _, _, kind = run
    make, labels, count = KINDS[kind]
    pieces, seen = Stack(tmp_path, warmup=2, count=count), plain_torch.Watch()
    callbacks = [pieces.accumulation, pieces.scheduler, pieces.ema, MicroBatching(1, count=count), seen]
    # GPT-2 returns the keys and values of its attention, too: nothing that a batch has a row of for each sample
    warns = pytest.warns(LightningPluginsWarning, match="got DynamicCache") if kind == "gpt2" else nullcontext()
    with warns:
        fit(Wrapped(make(), LR), tmp_path, callbacks, loader(27, 4, labels))
    assert seen.losses == pytest.approx(watch.losses, rel=1e-5)
    assert plain_torch.distance(pieces.ema.raw_state_dict(), stack.ema.raw_state_dict(), watch.initial) < 1e-5
