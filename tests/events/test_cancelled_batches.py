"""A cancelled batch changes nothing; what stays is checked against a run that never saw it."""

import copy

import pytest
import torch
from lightning.pytorch import plugins

from lightning_plugins import (
    EMA,
    CancelBatch,
    CancelEpoch,
    CancelTraining,
    ClassificationReport,
    ConstantDecay,
    CSVStatisticsLogger,
    Event,
    EventCallback,
    GradientAccumulation,
    LearningRateScheduler,
    MicroBatching,
    StatisticsRecorder,
    Tokens,
    WarmupLinear,
)
from tests.support.events_runs import batches, fit, make_regression, weights
from tests.support.training import make_trainer


def cancelling(event, *indices, action=CancelBatch):
    """Return a function that raises ``action`` at ``event`` of the training batches ``indices`` of every epoch."""

    def act(loop, found):
        if found is event and not loop.trainer.validating and loop.batch_index in indices:
            raise action

    return act


def plain_training(windows, lr=0.1, momentum=0.9, epochs=1):
    """Return the weights of a plain torch loop over windows of batch indices, each a mean over its samples."""
    module, data = make_regression(), list(batches(6))
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum)
    for window in windows * epochs:
        optimizer.zero_grad()
        for index in window:
            (torch.nn.functional.mse_loss(module.layer(data[index][0]), data[index][1]) / len(window)).backward()
        optimizer.step()
    return weights(module)


def same(left, right):
    return left.keys() == right.keys() and all(torch.allclose(left[name], right[name], atol=1e-7) for name in left)


@pytest.mark.parametrize("event", [Event.BATCH_START, Event.UPDATE_START], ids=lambda event: event.value)
def test_neither_weights_nor_momentum_nor_the_average_nor_statistics_move(tmp_path, namespace, event):
    states = []

    def watch(loop, found):
        if loop.trainer.validating or found not in {Event.BATCH_START, Event.BATCH_END}:
            return
        momentum = [state.get("momentum_buffer") for state in loop.optimizers[0].state.values()]
        states.append(copy.deepcopy((weights(loop.model), momentum, average.average_state_dict(), average_count())))

    def average_count():
        return {name: value for name, value in average.state_dict().items() if isinstance(value, int)}

    average = EMA(ConstantDecay(0.5), evaluate="raw", checkpoint="raw", after_fit="raw")
    recorder = StatisticsRecorder()
    csv = CSVStatisticsLogger(str(tmp_path / "log.csv"))
    cancel = cancelling(event, 1, 4)

    def act(loop, found):
        watch(loop, found)
        cancel(loop, found)

    _, module, trainer = fit(
        tmp_path, act, namespace=namespace, callbacks=[average, recorder, csv], epochs=1, training=6
    )
    before, after = states[2], states[3]  # around batch 1
    assert same(before[0], after[0])
    assert all(torch.equal(left, right) for left, right in zip(before[1], after[1], strict=True))
    assert same(before[2], after[2])
    assert before[3] == after[3]
    assert same(weights(module), plain_training([[0], [2], [3], [5]]))
    assert trainer.global_step == 6  # positions are attempted steps
    rows = [line.split(",")[1:3] for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    assert [batch for batch, phase in rows if phase == "train"] == ["1", "3", "4", "6"]


@pytest.mark.parametrize("event", [Event.BATCH_START, Event.UPDATE_START], ids=lambda event: event.value)
def test_schedules_go_on_with_the_position(tmp_path, event):
    """The run ends where its length was planned to end, as ``global_step`` does."""
    used = []

    def act(loop, found):
        if found is Event.UPDATE_START:
            used.append(loop.optimizers[0].param_groups[0]["lr"])
        cancelling(event, 2)(loop, found)

    fit(tmp_path, act, callbacks=[LearningRateScheduler(WarmupLinear(0, end=0.0))], epochs=1, training=6)
    expected = [0.1 * (1 - step / 6) for step in range(6)]
    if event is Event.BATCH_START:
        del expected[2]
    assert used == pytest.approx(expected)


ACCUMULATIONS = {
    "the Trainer's": lambda: ([], {"accumulate_grad_batches": 3}),
    "GradientAccumulation": lambda: ([GradientAccumulation(3)], {}),
}


@pytest.mark.parametrize("kind", ACCUMULATIONS)
def test_a_window_without_its_last_batch_makes_no_step(tmp_path, kind):
    for event in (Event.BATCH_START, Event.UPDATE_START):
        callbacks, options = ACCUMULATIONS[kind]()
        act = cancelling(event, 2)
        _, module, trainer = fit(tmp_path, act, callbacks=callbacks, epochs=1, training=6, **options)
        assert same(weights(module), plain_training([[3, 4, 5]]))
        assert trainer.global_step == 2


@pytest.mark.parametrize("kind", ACCUMULATIONS)
def test_a_module_that_steps_torchs_optimizer_makes_none_either(tmp_path, kind, caplog):
    """The hook before a step, which it leaves out, is where `updateStart` comes from; one line says so."""
    callbacks, options = ACCUMULATIONS[kind]()
    module = make_regression()
    module.optimizer_step = lambda epoch, batch_idx, optimizer, closure: optimizer.optimizer.step(closure)
    with caplog.at_level("INFO"):
        act = cancelling(Event.BATCH_START, 2)
        events, *_ = fit(tmp_path, act, module=module, callbacks=callbacks, epochs=1, training=6, **options)
    assert same(weights(module), plain_training([[3, 4, 5]]))
    assert "updateStart" not in events
    assert caplog.text.count("EventCallback: the Trainer has counted a step without `updateStart`") == 1


@pytest.mark.parametrize("index", [0, 1, 3, 4])
def test_a_window_without_another_batch_is_the_mean_of_the_rest(tmp_path, index):
    act = cancelling(Event.BATCH_START, index)
    _, module, _ = fit(tmp_path, act, callbacks=[GradientAccumulation(3)], epochs=1, training=6)
    rest = [[other for other in window if other != index] for window in ([0, 1, 2], [3, 4, 5])]
    assert same(weights(module), plain_training(rest))


@pytest.mark.parametrize("event", [Event.BATCH_START, Event.BATCH_END], ids=lambda event: event.value)
def test_an_incomplete_window_is_dropped_with_the_epoch_or_carried_into_the_next(tmp_path, event):
    for action in (CancelEpoch, CancelTraining):
        act = cancelling(event, 4, action=action)
        _, module, trainer = fit(tmp_path, act, callbacks=[GradientAccumulation(3)], epochs=2, training=6)
        assert same(weights(module), plain_training([[0, 1, 2]], epochs=2))
        assert trainer.global_step == 2
        carried = GradientAccumulation(3, carry=True)
        _, module, trainer = fit(tmp_path, act, callbacks=[carried], epochs=2, training=6)
        if event is Event.BATCH_START:  # the cancelled batch has its place in the window, and nothing in it
            expected = plain_training([[0, 1, 2], [3, 0], [1, 2, 3]])
        else:
            expected = plain_training([[0, 1, 2], [3, 4, 0], [1, 2, 3]])
        assert same(weights(module), expected)
        assert trainer.global_step == 3


def test_batches_in_pieces_can_be_cancelled_and_the_pieces_go_on(tmp_path):
    act = cancelling(Event.BATCH_START, 1, 4)
    callback = MicroBatching(1)
    _, module, trainer = fit(tmp_path, act, callbacks=[callback], epochs=1, training=6)
    assert same(weights(module), plain_training([[0], [2], [3], [5]]))
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)


def test_counts_of_a_cancelled_batch_are_not_in_the_mean(tmp_path):
    """Batches of unequal weights, by the number of tokens that each counts."""
    data = [{"x": torch.full((2, 4), float(i + 1)), "labels": torch.tensor([0] * (i + 1) + [-100])} for i in range(3)]

    def run(chosen, act):
        module = make_regression(training_step=lambda batch, batch_idx: module(batch["x"]).pow(2).mean())
        callbacks = [GradientAccumulation(3, count=Tokens("labels")), EventCallback(act)]
        loader = torch.utils.data.DataLoader([data[index] for index in chosen], batch_size=None)
        make_trainer(tmp_path, callbacks=callbacks, limit_val_batches=0).fit(module, loader, loader)
        return weights(module)

    assert same(run([0, 1, 2], cancelling(Event.BATCH_START, 1)), run([0, 2], cancelling(Event.FIT_END)))


def test_manual_optimization(tmp_path):
    def make():
        module = make_regression(automatic_optimization=False)
        loss_of = module.training_step

        def training_step(batch, batch_idx):
            optimizer = module.optimizers()
            optimizer.zero_grad()
            module.manual_backward(loss_of(batch, batch_idx))
            optimizer.step()

        module.training_step = training_step
        module.validation_step = loss_of
        return module

    for event in (Event.BATCH_START, Event.UPDATE_START):
        _, module, _ = fit(tmp_path, cancelling(event, 1, 4), module=make(), epochs=1, training=6)
        assert same(weights(module), plain_training([[0], [2], [3], [5]]))
    events, module, _ = fit(tmp_path, cancelling(Event.BATCH_START, 2, action=CancelEpoch), module=make(), training=6)
    assert same(weights(module), plain_training([[0], [1]], epochs=2))
    assert events.count("updateStart") == 4


def test_a_report_leaves_cancelled_batches_out(tmp_path):
    report = ClassificationReport(2, targets=lambda outputs, batch: (batch[1][:, 0] > 0).long())
    counted = []
    for places in ({}, {Event.BATCH_START}, {Event.INFERENCE_PREDICTION_END}):

        def act(loop, event, places=places):
            if loop.trainer.validating and loop.batch_index == 1 and event in places:
                raise CancelBatch

        fit(tmp_path, act, callbacks=[report], epochs=1, validation=3)
        report_of = report.compute(output_dict=True)
        counted.append(report_of["macro avg"]["support"])
    assert counted == [6, 4, 4]


def test_half_precision_steps_are_cancelled_too(tmp_path):
    act = cancelling(Event.UPDATE_START, 1)
    _, module, _ = fit(tmp_path, act, epochs=1, training=3, precision="bf16-mixed")
    _, other, _ = fit(tmp_path, cancelling(Event.BATCH_START, 1), epochs=1, training=3, precision="bf16-mixed")
    assert same(weights(module), weights(other))
    _, trained, _ = fit(tmp_path, epochs=1, training=3, precision="bf16-mixed")
    assert not same(weights(module), weights(trained))


@pytest.mark.parametrize("event", [Event.BATCH_START, Event.UPDATE_START], ids=lambda event: event.value)
def test_a_gradient_scaler_takes_a_cancelled_batch_for_none(tmp_path, event):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    losses = []

    def act(loop, found):
        if found is Event.UPDATE_START:
            losses.append((loop.last_loss.item(), loop.model.layer.bias.grad.norm().item()))
        cancelling(event, 1, 4)(loop, found)

    precision = plugins.MixedPrecision("16-mixed", "cpu", scaler)
    _, module, _ = fit(tmp_path, act, epochs=1, training=6, plugins=[precision])
    data = list(batches(6))
    expected = torch.nn.functional.mse_loss(make_regression().layer(data[0][0]), data[0][1]).item()
    assert losses[0][0] == pytest.approx(expected, rel=1e-2)  # half precision; neither the loss nor ...
    assert losses[0][1] < 2 * expected**0.5  # ... the gradient is scaled by 4
    assert scaler.get_scale() == 4.0
    kept, everything = plain_training([[0], [2], [3], [5]]), plain_training([[index] for index in range(6)])
    assert all(torch.allclose(weights(module)[name], kept[name], atol=1e-2) for name in kept)
    assert not any(torch.allclose(everything[name], kept[name], atol=1e-2) for name in kept)
