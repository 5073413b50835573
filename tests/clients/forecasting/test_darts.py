"""All techniques in darts: dataclass batches, a Trainer for every fit, models that are copied, pickled and resumed."""

import copy
import pickle

import numpy as np
import pytest
import torch
from darts import TimeSeries
from darts.models import NBEATSModel, TFTModel
from darts.utils.serialization.base import UnpicklingError

from lightning_plugins import (
    EMA,
    CancelBatch,
    Event,
    EventCallback,
    MicroBatching,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    Tokens,
    extract_weights,
)
from tests.clients import comparison, plain_torch
from tests.clients.stack import DECAY, Stack, chart

BATCH, LR, EPOCHS, TOTAL = 16, 0.05, 3, 6  # 90 samples: 6 batches, the last of 10, and so 2 steps an epoch, 3 epochs
SGD = {"optimizer_cls": torch.optim.SGD, "optimizer_kwargs": {"lr": LR, "momentum": 0.9}}
CHUNKS = {"input_chunk_length": 12, "output_chunk_length": 3}
MODELS = {
    "NBEATS": (NBEATSModel, {"num_stacks": 2, "num_blocks": 1, "num_layers": 2, "layer_widths": 8, "dropout": 0.0}),
    "TFT": (
        TFTModel,
        {
            "hidden_size": 4,
            "lstm_layers": 1,
            "num_attention_heads": 2,
            "dropout": 0.0,
            "add_relative_index": True,
            "likelihood": None,
            "loss_fn": torch.nn.MSELoss(),
        },
    ),
}


def series(length):
    noise = np.random.default_rng(0).normal(size=length)
    return TimeSeries.from_values((np.sin(np.arange(length) / 5) + 0.1 * noise).astype(np.float32))


TRAIN, VALIDATION = series(90 + 14), series(150)[-40:]  # 26 samples of validation: 2 batches


def make(kind, path, callbacks, *, epochs=EPOCHS, **options):
    model, arguments = MODELS[kind]
    return model(
        **CHUNKS,
        **arguments,
        **SGD,
        batch_size=BATCH,
        n_epochs=epochs,
        random_state=1,
        model_name="model",
        work_dir=str(path),
        save_checkpoints=True,
        force_reset=True,
        pl_trainer_kwargs={"accelerator": "cpu", "enable_progress_bar": False, "callbacks": callbacks},
        **options,
    )


def whole(batches):
    """One batch of the samples of several, of the client's own kind."""
    fields = {name: [getattr(batch, name) for batch in batches] for name in type(batches[0]).__slots__}
    joined = {name: None if parts[0] is None else torch.cat(parts) for name, parts in fields.items()}
    return type(batches[0])(**joined)


def loss_of(net, batch):
    predicted = net(batch.to_module_input()).prediction.squeeze(-1)
    return (predicted - batch.future_target).square().mean()


def by_plain_torch(net, watch, windows, lrs):
    """The weights and both averages after ``windows`` of the run's own batches."""
    batches = map(whole, windows)
    return comparison.by_plain_torch(net, watch.initial, batches, loss_of=loss_of, optimizer=sgd, lrs=lrs)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9)


def loss_in_plain_torch(net, state, batches):
    net = copy.deepcopy(net).eval()
    net.load_state_dict(state)
    with torch.no_grad():
        return float(np.mean([float(loss_of(net, batch)) for batch in batches]))


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    stack, watch = Stack(path, warmup=2, total=TOTAL), plain_torch.Watch()
    model = make(request.param, path, [*stack.callbacks, watch])
    model.fit(TRAIN, val_series=VALIDATION)
    return model, stack, watch, request.param


def fit_in_order(model, **options):
    model.fit(TRAIN, val_series=VALIDATION, dataloader_kwargs={"shuffle": False}, **options)  # darts empties the dict


def values(model, n=5):
    return model.predict(n, series=TRAIN).values().ravel()


def test_every_step_is_the_one_that_plain_torch_takes(run):
    model, stack, watch, _ = run
    assert len(watch.batches) == EPOCHS * 6
    comparison.assert_the_same_steps(stack, watch, model.model, loss_of=loss_of, join=whole, lr=LR, epochs=EPOCHS)


def test_the_logs_hold_the_losses_that_the_client_computed(run):
    _, stack, watch, _ = run
    assert len(watch.validations) == EPOCHS * 2
    comparison.assert_the_logs_are_the_clients(stack, watch, lr=LR, epochs=EPOCHS)
    comparison.assert_the_validation_is_logged(stack, watch, epochs=EPOCHS)


def test_events_come_as_often_as_they_should(run):
    comparison.assert_the_events_came(*run[1:3], epochs=EPOCHS)


def test_validation_and_predictions_are_of_the_average(run):
    model, stack, watch, _ = run
    average, raw = stack.ema.average_state_dict(), stack.ema.raw_state_dict()
    assert all(torch.equal(tensor, average[name]) for name, tensor in model.model.state_dict().items())
    last = float(stack.rows("validation")[-1]["loss"])
    batches = watch.validation_batches[-2:]
    assert last == pytest.approx(loss_in_plain_torch(model.model, average, batches), rel=1e-5)
    assert last != pytest.approx(loss_in_plain_torch(model.model, raw, batches), rel=1e-3)


def test_the_trainer_that_darts_makes_to_predict_takes_the_average_whatever_the_model_holds(tmp_path):
    models, emas = [], [EMA(DECAY), EMA(DECAY, after_fit="raw")]
    for ema in emas:
        models.append(make("NBEATS", tmp_path, [ema], epochs=1))
        models[-1].fit(TRAIN)
    averaged, raw = (model.model.state_dict() for model in models)
    assert all(torch.equal(raw[name], tensor) for name, tensor in emas[0].raw_state_dict().items())
    assert not all(torch.equal(raw[name], averaged[name]) for name in raw)
    assert np.array_equal(values(models[1]), values(models[0]))
    assert all(torch.equal(tensor, raw[name]) for name, tensor in models[1].model.state_dict().items())


def test_a_saved_model_predicts_the_same_when_it_is_loaded(run, tmp_path):
    model, _, _, kind = run
    cls, expected = MODELS[kind][0], values(model)
    model.save(str(tmp_path / "model.pt"))
    assert np.array_equal(values(cls.load(str(tmp_path / "model.pt"), trusted=True)), expected)
    # darts pickles the arguments that the model was made with, and opens nobody's classes unasked
    with pytest.raises(UnpicklingError, match=r"(?s)lightning_plugins.*trusted=True"):
        cls.load(str(tmp_path / "model.pt"))
    model.save(str(tmp_path / "clean.pt"), clean=True)
    assert np.array_equal(values(cls.load(str(tmp_path / "clean.pt"))), expected)


def test_the_runs_checkpoints_open_in_the_client(run):
    model, stack, _, kind = run
    cls, place = MODELS[kind][0], {"model_name": "model", "work_dir": str(stack.path), "trusted": True}
    folder = stack.path / "model" / "checkpoints"
    (last,) = folder.glob("last-*.ckpt")
    average, raw = stack.ema.average_state_dict(), stack.ema.raw_state_dict()
    loaded = cls.load_from_checkpoint(best=False, **place)
    assert all(torch.equal(tensor, average[name]) for name, tensor in loaded.model.state_dict().items())
    assert np.array_equal(values(loaded), values(model))
    extracted = extract_weights(last, "raw", trust=True)
    assert all(torch.equal(extracted[name], tensor) for name, tensor in raw.items())
    parts = [torch.load(path, weights_only=False)["state_dict"] for path in folder.glob("averaged_pool/*.ckpt")]
    assert len(parts) == 2
    averaged = cls.load_from_checkpoint(file_name=stack.averaging.path.name, **place)
    for name, tensor in averaged.model.state_dict().items():
        mean = sum(part[name].double() for part in parts) / 2
        assert torch.allclose(tensor.double(), mean, rtol=1e-6, atol=1e-7), name
    assert not np.allclose(values(averaged), values(model), rtol=1e-3)


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path):
    stacks, models = {}, {}
    for name, epochs in (("whole", 3), ("parts", 1)):
        (tmp_path / name).mkdir()
        stacks[name] = Stack(tmp_path / name, warmup=2, total=TOTAL)
        models[name] = make("NBEATS", tmp_path / name, stacks[name].callbacks, epochs=epochs)
        fit_in_order(models[name])
    again = NBEATSModel.load_from_checkpoint("model", work_dir=str(tmp_path / "parts"), best=False, trusted=True)
    callbacks = again.trainer_params["callbacks"]  # darts makes them anew from those that the model was made with
    assert not set(map(id, callbacks)) & set(map(id, stacks["parts"].callbacks))
    fit_in_order(again, epochs=3)
    (ema,) = [callback for callback in callbacks if type(callback).__name__ == "EMA"]
    for ours, theirs in (
        (ema.raw_state_dict(), stacks["whole"].ema.raw_state_dict()),
        (ema.average_state_dict(), stacks["whole"].ema.average_state_dict()),
    ):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for phase in ("train", "validation"):
        whole_run, resumed = stacks["whole"].rows(phase), stacks["parts"].rows(phase)
        assert [(row["step"], row["lr"], row["loss"]) for row in resumed] == [
            (row["step"], row["lr"], row["loss"]) for row in whole_run
        ]


def test_a_second_fit_goes_on_averaging_and_schedules_its_own_steps(tmp_path):
    stack, watch = Stack(tmp_path, warmup=2, total=TOTAL), plain_torch.Watch()
    model = make("NBEATS", tmp_path, [*stack.callbacks, watch])
    model.fit(TRAIN, val_series=VALIDATION)
    raw = stack.ema.raw_state_dict()
    average = {name: tensor.double() for name, tensor in stack.ema.average_state_dict().items()}
    second, taken = plain_torch.Watch(), len(watch.rates)
    model.trainer_params["callbacks"].append(second)
    model.fit(TRAIN, val_series=VALIDATION, epochs=1)
    assert watch.rates[taken:] == second.rates == pytest.approx(comparison.rates(LR, TOTAL)[:2], abs=1e-12)
    assert all(torch.equal(second.initial[name], tensor) for name, tensor in raw.items())
    # the first step has rate 0, the second moves the weights: two updates of the average, its 7th and 8th
    now = stack.ema.raw_state_dict()
    for n, weights in ((7, raw), (8, now)):
        share = plain_torch.ema_decay(n, DECAY)
        average = {name: share * old + (1 - share) * weights[name].double() for name, old in average.items()}
    assert plain_torch.distance(stack.ema.average_state_dict(), average, watch.initial) < 1e-5


def test_each_retraining_of_a_backtest_has_callbacks_of_its_own(tmp_path):
    stack = Stack(tmp_path, warmup=2, total=TOTAL)
    options = {"start": len(TRAIN) - 3, "start_format": "position", "forecast_horizon": 3, "last_points_only": False}
    model = make("NBEATS", tmp_path, [stack.scheduler, stack.ema])
    forecasts = model.historical_forecasts(TRAIN, retrain=True, **options)
    single = make("NBEATS", tmp_path, [Stack(tmp_path, warmup=2, total=TOTAL).scheduler, Stack(tmp_path, warmup=2).ema])
    single.fit(TRAIN[: len(TRAIN) - 3])
    assert np.array_equal(forecasts[0].values(), single.predict(3).values())


def test_fitted_callbacks_can_be_copied_and_pickled(run):
    _, stack, _, _ = run
    copies = copy.deepcopy(stack.callbacks), pickle.loads(pickle.dumps(stack.callbacks))
    for copied in copies:
        ema = copied[stack.callbacks.index(stack.ema)]
        for name, tensor in stack.ema.average_state_dict().items():
            assert torch.equal(ema.average_state_dict()[name], tensor)


def test_pieces_of_a_batch_make_the_same_steps(tmp_path):
    stacks = [Stack(tmp_path, warmup=2, total=TOTAL) for _ in range(2)]
    watches = [plain_torch.Watch() for _ in stacks]
    for stack, watch, extra in zip(stacks, watches, ([], [MicroBatching(5)]), strict=True):
        make("NBEATS", tmp_path, [stack.accumulation, stack.scheduler, stack.ema, *extra, watch]).fit(TRAIN)
    assert watches[0].losses == pytest.approx(watches[1].losses, rel=1e-5)
    whole_batches, pieces = (stack.ema.raw_state_dict() for stack in stacks)
    assert plain_torch.distance(pieces, whole_batches, watches[0].initial) < 1e-5


def test_samples_are_counted_in_the_clients_batches(tmp_path):
    logger = TensorBoardStatisticsLogger(tmp_path / "tensorboard", axis="samples")
    make("NBEATS", tmp_path, [StatisticsRecorder(), logger]).fit(TRAIN)
    assert [step for step, _ in chart(tmp_path / "tensorboard", "train")] == [90, 180, 270]


def test_its_batches_are_counted_by_the_name_of_a_field(tmp_path):
    stack, watch = Stack(tmp_path, warmup=2, total=TOTAL, count=Tokens("future_target")), plain_torch.Watch()
    model = make("NBEATS", tmp_path, [stack.accumulation, stack.scheduler, stack.ema, watch], epochs=2)
    model.fit(TRAIN)
    # every sample has the 3 values of the output chunk, so values weigh as samples do
    truth = by_plain_torch(model.model, watch, comparison.windows_of(watch.batches, 2), comparison.rates(LR, TOTAL)[:4])
    assert plain_torch.distance(stack.ema.raw_state_dict(), truth["raw"], watch.initial) < 1e-5


class SkipFifthBatch:
    def __call__(self, loop, event):
        if loop.batch_index == 4:
            raise CancelBatch


def test_a_cancelled_batch_is_left_out_of_its_window(tmp_path):
    stack, watch = Stack(tmp_path, warmup=2, total=TOTAL), plain_torch.Watch()
    cancel = EventCallback(SkipFifthBatch(), events=[Event.BATCH_START])
    model = make("NBEATS", tmp_path, [stack.accumulation, stack.scheduler, stack.ema, cancel, watch])
    model.fit(TRAIN)
    windows = [window for epoch in range(3) for window in ([0, 1, 2], [3, 5])]
    batches = [[watch.batches[6 * (index // 2) + batch] for batch in window] for index, window in enumerate(windows)]
    truth = by_plain_torch(model.model, watch, batches, comparison.rates(LR, TOTAL))
    assert plain_torch.distance(stack.ema.raw_state_dict(), truth["raw"], watch.initial) < 1e-5
    assert plain_torch.distance(stack.ema.average_state_dict(), truth["ema"], watch.initial) < 1e-5
