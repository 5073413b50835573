"""All techniques in pytorch-forecasting: its TemporalFusionTransformer, padded batches, its own plateau scheduler."""

import copy

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import QuantileLoss

from lightning_plugins import extract_weights
from lightning_plugins.core.lightning import MisconfigurationException
from tests.clients import comparison, plain_torch
from tests.clients.fitting import quiet
from tests.clients.stack import WINDOW, Stack

BATCH, LR, EPOCHS = 8, 0.05, 2
STEPS = 4  # of an epoch: 80 samples are 10 batches, in windows of 3, 3, 3 and 1


def count(batch):
    """What the client's loss is a mean over: the time steps to predict, fewer than a batch has places."""
    return batch[0]["decoder_lengths"].sum()


@pytest.fixture(scope="module")
def series():
    noise = np.random.default_rng(0)
    time = np.arange(14)
    parts = [
        {"time": time, "group": str(group), "value": np.sin(time / 2 + group) + 0.1 * noise.normal(size=14)}
        for group in range(5)
    ]
    return TimeSeriesDataSet(
        pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True),
        time_idx="time",
        target="value",
        group_ids=["group"],
        min_encoder_length=3,
        max_encoder_length=6,
        min_prediction_length=1,
        max_prediction_length=3,
        static_categoricals=["group"],
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
    )


def network(series):
    torch.manual_seed(0)
    return TemporalFusionTransformer.from_dataset(
        series,
        hidden_size=4,
        attention_head_size=1,
        hidden_continuous_size=4,
        dropout=0.0,
        learning_rate=LR,
        optimizer="sgd",
        optimizer_params={"momentum": 0.9},
        loss=QuantileLoss(),
        log_interval=-1,
    )


def loader(series, batch_size):
    return series.to_dataloader(train=False, batch_size=batch_size, num_workers=0)  # in order, the last one short


def fit(series, path, *, callbacks, ckpt_path=None, **options):
    net, watch = network(series), plain_torch.Watch()
    trainer = quiet(path, [*callbacks, watch], **options)
    # the client's own hyper-parameters are objects, so its checkpoints need this whoever else is in the Trainer
    trainer.fit(net, loader(series, BATCH), loader(series, 20), ckpt_path=ckpt_path, weights_only=False)
    return net, trainer, watch


def loss_of(net, batch):
    """The client's loss of a batch, as its own step computes it."""
    inputs, (target, weight) = batch
    if (inputs["decoder_lengths"] < inputs["decoder_lengths"].max()).any():
        lengths = inputs["decoder_lengths"]
        target = torch.nn.utils.rnn.pack_padded_sequence(target, lengths, batch_first=True, enforce_sorted=False)
    return net.loss(net(inputs)["prediction"], (target, weight))


@pytest.fixture(scope="module")
def by_plain_torch(series):
    """Two epochs by hand: every window in one pass, as the client collates its 24 samples at once."""
    net = network(series)
    initial = copy.deepcopy(net.state_dict())
    windows, lrs = list(loader(series, BATCH * WINDOW)) * EPOCHS, comparison.rates(LR, EPOCHS * STEPS)
    trained = comparison.by_plain_torch(net, initial, windows, loss_of=loss_of, optimizer=sgd, lrs=lrs)
    return {"initial": initial, **trained}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9)


@pytest.fixture(scope="module")
def run(series, tmp_path_factory):
    path = tmp_path_factory.mktemp("forecasting")
    stack = Stack(path, warmup="25%", count=count, existing="replace")
    net, trainer, watch = fit(series, path, callbacks=stack.callbacks)
    return stack, net, trainer, watch


def test_every_step_is_the_one_that_plain_torch_takes(run, series):
    stack, net, trainer, watch = run
    assert trainer.global_step == EPOCHS * STEPS
    windows = iter(list(loader(series, BATCH * WINDOW)) * EPOCHS)
    comparison.assert_the_same_steps(
        stack, watch, net, loss_of=loss_of, join=lambda batches: next(windows), lr=LR, epochs=EPOCHS
    )


def test_the_bound_would_notice_what_lightning_makes_of_such_batches(series, by_plain_torch, tmp_path):
    stack = Stack(tmp_path, warmup="25%", existing="replace")
    net, _, _ = fit(series, tmp_path, callbacks=[stack.scheduler], accumulate_grad_batches=WINDOW)
    assert plain_torch.distance(net.state_dict(), by_plain_torch["raw"], by_plain_torch["initial"]) > 1e-2


def test_the_logs_hold_the_losses_that_the_client_computed(run):
    stack, _, _, watch = run
    assert (len(watch.losses), len(watch.validations)) == (EPOCHS * 10, EPOCHS * 4)
    comparison.assert_the_logs_are_the_clients(stack, watch, lr=LR, epochs=EPOCHS)
    comparison.assert_the_validation_is_logged(stack, watch, epochs=EPOCHS)


def test_events_come_as_often_as_they_should(run):
    comparison.assert_the_events_came(run[0], run[3], epochs=EPOCHS)


def test_validation_sees_the_average(run, series):
    stack = run[0]
    copied = network(series).eval()
    copied.load_state_dict(stack.ema.average_state_dict())
    with torch.no_grad():
        losses = [float(loss_of(copied, batch)) for batch in loader(series, 20)]
    assert float(stack.rows("validation")[-1]["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_client_opens_the_averaged_file_and_predicts_with_it(run, series, tmp_path):
    stack = run[0]
    pool = sorted((stack.averaging.path.parent / "averaged_pool").glob("*.ckpt"))
    parts = [torch.load(path, weights_only=False)["state_dict"] for path in pool]
    assert len(parts) == 2
    loaded = TemporalFusionTransformer.load_from_checkpoint(stack.averaging.path)
    for name, tensor in loaded.state_dict().items():
        expected = sum(part[name].double() for part in parts) / 2 if tensor.is_floating_point() else parts[-1][name]
        assert torch.allclose(tensor.double(), expected.double(), rtol=1e-6, atol=1e-7), name
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    predicted = loaded.predict(loader(series, 20), mode="quantiles", trainer_kwargs=quiet)
    with torch.no_grad():
        expected = torch.cat([loaded.eval()(inputs)["prediction"] for inputs, _ in loader(series, 20)])
    past_the_end = predicted.isnan()  # where a sample has fewer time steps to predict than the batch has places
    assert 0 < past_the_end.float().mean() < 0.5
    assert torch.equal(predicted[~past_the_end], expected[~past_the_end])


def test_a_checkpoint_of_the_run_gives_the_client_the_average_and_us_the_raw_weights(run, series):
    stack, _, trainer, _ = run
    path = trainer.checkpoint_callback.best_model_path
    loaded = TemporalFusionTransformer.load_from_checkpoint(path).state_dict()
    average, raw = stack.ema.average_state_dict(), stack.ema.raw_state_dict()
    assert all(torch.equal(loaded[name], average[name]) for name in average)
    extracted = extract_weights(path, "raw", trust=True)  # its hyper-parameters are objects
    assert all(torch.equal(extracted[name], raw[name]) for name in raw)


def test_its_plateau_scheduler_is_not_replaced_in_silence(series, tmp_path):
    stack = Stack(tmp_path, warmup="25%")
    with pytest.raises(MisconfigurationException, match=r"by a ReduceLROnPlateau.*existing='replace'"):
        fit(series, tmp_path, callbacks=[stack.scheduler])


def test_a_resumed_run_is_the_uninterrupted_one(run, series, tmp_path):
    class Die(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise RuntimeError("killed")

    first = Stack(tmp_path, warmup="25%", count=count, existing="replace")
    with pytest.raises(RuntimeError, match="killed"):
        fit(series, tmp_path, callbacks=[*first.callbacks, Die()])
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    again = Stack(tmp_path, warmup="25%", count=count, existing="replace")
    _, _, watch = fit(series, tmp_path, callbacks=again.callbacks, ckpt_path=checkpoint)
    whole = run[0]
    for ours, theirs in (
        (again.ema.raw_state_dict(), whole.ema.raw_state_dict()),
        (again.ema.average_state_dict(), whole.ema.average_state_dict()),
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert watch.rates == run[3].rates[STEPS:]
    for phase in ("train", "validation"):
        assert [row["loss"] for row in again.rows(phase)] == [row["loss"] for row in whole.rows(phase)]
