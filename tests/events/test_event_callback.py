"""The callback as a citizen: arguments, pickling, place in the list, what it leaves behind, resuming after a cancel."""

import copy
import functools
import pickle

import pytest
import torch
from lightning.pytorch import callbacks as unified_callbacks

from lightning_plugins import (
    EMA,
    CancelBatch,
    CancelEpoch,
    CancelTraining,
    CancelValidation,
    CheckpointAveraging,
    Event,
    EventCallback,
    GradientAccumulation,
    LearningRateScheduler,
    StatisticsRecorder,
    WarmupLinear,
    on_events,
)
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.events import CancelAction
from tests.support.events_runs import EPOCH, Diary, batches, fit, make_regression, weights
from tests.support.training import loader, make_module, make_trainer


def a_function(loop, event):
    """Be somewhere on a module's top level."""


@on_events(Event.BATCH_END)
def decorated(loop, event):
    """Be there in a callback's place."""


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"`function` must be a function of \(loop, event\), got 3"):
        EventCallback(3)
    with pytest.raises(ValueError, match=r"`events` must be among FIT_START, .*, got 'batch'"):
        EventCallback(a_function, events=["batch"])
    with pytest.raises(ValueError, match="`events` must name at least one event, got none"):
        EventCallback(a_function, events=[])
    with pytest.raises(ValueError, match="`events` must name at least one event, got none"):
        on_events()(a_function)
    with pytest.raises(ValueError, match="got 'never'"):
        on_events("never")


def test_one_callback_cannot_be_in_a_trainer_twice(tmp_path):
    callback = EventCallback(a_function)
    with pytest.raises(MisconfigurationException, match="must be in a Trainer once, got the same EventCallback twice"):
        make_trainer(tmp_path, callbacks=[callback, callback]).fit(make_module(), loader(2))
    make_trainer(tmp_path, callbacks=[callback, EventCallback(a_function)]).fit(make_module(), loader(2))


def test_events_are_given_by_member_value_or_name():
    callback = EventCallback(a_function, events=["batchEnd", "EPOCH_END", Event.BATCH_END])
    assert callback.events == (Event.BATCH_END, Event.EPOCH_END)
    assert EventCallback(a_function, events="fitEnd").events == (Event.FIT_END,)
    assert EventCallback(a_function).events == tuple(Event)
    assert [event.value for event in Event] == sorted({*EPOCH, "fitStart", "fitEnd"}, key=list(Event).index)


def test_two_of_one_function_may_stand_side_by_side(namespace, tmp_path):
    calls = []
    twice = [EventCallback(lambda loop, event: calls.append(event), events=["fitEnd"]) for _ in range(2)]
    make_trainer(tmp_path, namespace, callbacks=twice).fit(make_module(namespace), loader(1))
    assert calls == [Event.FIT_END] * 2


def test_state_keys_tell_functions_and_events_apart():
    functions = [a_function, functools.partial(a_function), Diary(), decorated.function]
    callbacks = [EventCallback(function) for function in functions] + [EventCallback(a_function, events=["fitEnd"])]
    assert len({callback.state_key for callback in callbacks}) == 4  # a partial is named by its function
    assert callbacks[0].state_key == (
        "EventCallback(function='tests.events.test_event_callback.a_function', events='all')"
    )


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))], ids=["copy", "pickle"]
)
def test_copies_are_callbacks_of_their_own(duplicate):
    for callback in (EventCallback(a_function, events=["batchEnd"]), decorated):
        found = duplicate(callback)
        assert found is not callback
        assert found.function is callback.function
        assert found.events == callback.events


class Scored(CancelAction):
    """An action that the loop does not know."""


def test_a_foreign_action_is_refused(tmp_path):
    def act(loop, event):
        raise Scored

    with pytest.raises(TypeError, match="Scored is none of CancelBatch, CancelTraining"):
        fit(tmp_path, act)


def test_the_place_in_the_list_does_not_matter(tmp_path):
    seen = []

    def run(*order):
        shown = []

        def act(loop, event):
            if event is Event.BATCH_END:
                shown.append(loop.last_statistics["loss"])
            if event is Event.BATCH_START and loop.batch_index == 1:
                raise CancelBatch

        parts = {
            "events": EventCallback(act),
            "statistics": StatisticsRecorder(),
            "average": EMA(0.5),
            "file": unified_callbacks.ModelCheckpoint(
                tmp_path, "file", monitor="val_loss", save_on_train_epoch_end=False
            ),
        }
        options = {"num_sanity_val_steps": 0, "enable_checkpointing": True, "max_epochs": 2}
        trainer = make_trainer(tmp_path, callbacks=[parts[name] for name in order], **options)
        trainer.fit(module := make_regression(), batches(4), batches(3, seed=2))
        seen.append((shown, weights(module)))
        return [type(found).__name__ for found in trainer.callbacks]

    assert run("events", "statistics", "average", "file")[-2:] == ["EventCallback", "ModelCheckpoint"]
    assert run("file", "average", "statistics", "events")[-2:] == ["EventCallback", "ModelCheckpoint"]
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(seen[0][1][name], seen[1][1][name]) for name in seen[0][1])


def test_validation_steps_outside_of_a_validation_are_those_of_a_run_without_the_callback(tmp_path):
    """In the sanity check, and where a callback calls them by hand."""

    class Look(unified_callbacks.Callback):
        def __init__(self):
            self.seen = []

        def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
            self.seen.append((trainer.sanity_checking, outputs))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append((None, trainer.strategy.validation_step(batch, batch_idx)))

    def run(*callbacks):
        look = Look()
        trainer = make_trainer(tmp_path, callbacks=[*callbacks, look], num_sanity_val_steps=2)
        trainer.fit(make_regression(), batches(2), batches(3, seed=2))
        return look.seen

    told = []
    with_events, without = run(EventCallback(lambda loop, event: told.append(loop.trainer.sanity_checking))), run()
    assert with_events == without
    assert [checking for checking, _ in without] == [True] * 2 + [None] * 2 + [False] * 3
    assert None not in [outputs for _, outputs in without]
    assert not any(told)


class Boom(Exception):
    """An ordinary error in a function."""


@pytest.mark.parametrize("end", ["fit", "error", "cancelled", "interrupt"])
def test_nothing_is_left_behind(tmp_path, end):
    def act(loop, event):
        if event is Event.BATCH_START and loop.batch_index == 1:
            if end == "error":
                raise Boom
            if end == "interrupt":
                raise KeyboardInterrupt
            if end == "cancelled":
                raise CancelEpoch

    module = make_regression()
    trainer = make_trainer(tmp_path, callbacks=[EventCallback(act)], num_sanity_val_steps=0)
    trainer.fit(module, batches(0 + 1), batches(1))  # what any fit leaves
    owners = [
        module,
        trainer,
        trainer.fit_loop,
        trainer.fit_loop.epoch_loop,
        trainer.fit_loop.epoch_loop.automatic_optimization,
        trainer.fit_loop.epoch_loop.manual_optimization,
    ]
    before = [set(vars(owner)) for owner in owners]
    trainer.fit_loop.max_epochs = 3
    try:
        trainer.fit(module, batches(3), batches(2))
    except (Boom, KeyboardInterrupt, SystemExit):
        assert end in {"error", "interrupt"}
    assert [set(vars(owner)) for owner in owners] == before
    assert not module._forward_hooks
    assert not {"training_step", "validation_step"} & set(vars(trainer.strategy))
    assert trainer.callbacks[0]._dispatcher is None


def test_what_another_callback_has_taken_back_stays_so(tmp_path):
    """GradientAccumulation(carry=True) decides about steps too, and lets go before the events do."""

    def act(loop, event):
        if event is Event.BATCH_START and loop.batch_index == 1:
            raise CancelEpoch
        if event is Event.EPOCH_END:
            owners.append(loop.trainer.fit_loop.epoch_loop)
            raise Boom

    owners = []
    with pytest.raises(Boom):
        fit(tmp_path, act, callbacks=[GradientAccumulation(2, carry=True)])
    assert not {"_should_accumulate", "_should_check_val_fx"} & set(vars(owners[0]))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first epoch has no step
def test_schedulers_of_an_epoch_step_and_those_of_a_metric_hold(tmp_path):
    """In an epoch that was cancelled before its validation, nothing was measured for a plateau."""

    def run(place, action, **options):
        module = make_regression(lr=0.1)

        def configure_optimizers():
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            module.exponential = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            module.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return [optimizer], [module.exponential, {"scheduler": module.plateau, "monitor": "val_loss"}]

        module.configure_optimizers = configure_optimizers

        def act(loop, event):
            if event is place and not loop.trainer.validating and loop.batch_index in {None, 1}:
                raise action

        fit(tmp_path, act, module=module, epochs=3, **options)
        return module.exponential.last_epoch, module.plateau.last_epoch

    for place in (Event.TRAINING_START, Event.BATCH_START, Event.UPDATE_START, Event.BATCH_END):
        assert run(place, CancelTraining) == (3, 3), place
        assert run(place, CancelEpoch) == (3, 0), place
    assert run(Event.VALIDATION_START, CancelEpoch) == (3, 3)  # `validating`: nothing is cancelled


def test_training_that_is_cancelled_is_validated_only_in_epochs_that_have_a_validation(tmp_path):
    act = lambda loop, event: raise_(CancelTraining) if event is Event.TRAINING_START else None  # noqa: E731
    events, _, _ = fit(tmp_path, act, epochs=4, check_val_every_n_epoch=2)
    assert events.count("trainingEnd") == 4
    assert events.count("validationStart") == 2


def raise_(action):
    raise action


def test_a_validation_that_was_cancelled_reports_what_it_has_seen(tmp_path):
    def act(loop, event):
        if event is Event.BATCH_END and loop.trainer.validating and loop.batch_index == 1:
            raise CancelValidation

    _, module, trainer = fit(tmp_path, act, epochs=1, validation=4)
    loop = trainer.fit_loop.epoch_loop.val_loop
    counts = vars(loop.batch_progress.current)
    assert set(counts.values()) == {2}  # as after any validation, or a resume would go back to it
    assert loop.batch_progress.is_last_batch
    assert loop._has_run
    losses = [module.training_step(batch, 0) for batch in list(batches(4, seed=2))[:2]]
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(torch.stack(losses).mean().item())


CUTS = {
    "training": (CancelTraining, Event.BATCH_START, False),
    "epoch": (CancelEpoch, Event.BATCH_START, False),
    "training-after-batch": (CancelTraining, Event.BATCH_END, False),
    "epoch-after-batch": (CancelEpoch, Event.BATCH_END, False),
    "validation": (CancelValidation, Event.BATCH_START, True),
    "validation-within-a-step": (CancelValidation, Event.INFERENCE_PREDICTION_END, True),
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("saved", ["epoch end", "validation end", "within the epoch"])
def test_a_run_resumed_after_a_cancel_is_the_uninterrupted_one(tmp_path, cut, saved):
    action, place, validating = CUTS[cut]

    def act(loop, event):
        at = loop.batch_index == 1 and loop.trainer.validating is validating
        if event is place and at and loop.epoch_index in {0, 1}:
            raise action

    def run(**options):
        events = Diary(act)
        keep = unified_callbacks.ModelCheckpoint(
            tmp_path,
            "{epoch}-{step}",
            save_top_k=-1,
            save_on_train_epoch_end=saved == "epoch end",
            every_n_train_steps=2 if saved == "within the epoch" else None,
        )
        parts = [
            EventCallback(events),
            LearningRateScheduler(WarmupLinear(2, total=16)),
            EMA(0.5),
            StatisticsRecorder(),
            keep,
        ]
        module = make_regression()
        trainer = make_trainer(
            tmp_path, callbacks=parts, max_epochs=4, enable_checkpointing=True, num_sanity_val_steps=0
        )
        trainer.fit(module, batches(4), batches(3, seed=2), **options)
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        return events.events, weights(module), trainer, metrics

    events, trained, trainer, metrics = run()
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    if validating and saved == "validation end":
        assert len(files) == 4
    path = files[0]
    later, again, resumed, same_metrics = run(ckpt_path=path)
    at_the_cut = "after-batch" in cut  # and not in the middle of an epoch, which a plain loader does not go on with
    if saved != "within the epoch":
        assert later[1:] == events[-len(later) + 1 :]
    if saved != "within the epoch" or at_the_cut:
        assert same_metrics == metrics
        assert all(torch.equal(trained[name], again[name]) for name in trained)
    assert (resumed.global_step, resumed.current_epoch) == (trainer.global_step, trainer.current_epoch)


def test_a_strategy_that_was_not_tested_is_refused_when_something_is_cancelled(tmp_path):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Foreign(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    heard = []
    act = lambda loop, event: heard.append(event) if event is not Event.BATCH_START else raise_(CancelBatch)  # noqa: E731
    with pytest.raises(
        MisconfigurationException,
        match="Cancelling does not work under Foreign, which accumulates gradients by itself; it works under",
    ):
        fit(tmp_path, act, strategy=Foreign("cpu"))
    assert heard == [Event.FIT_START, Event.EPOCH_START, Event.TRAINING_START]


def test_validations_of_other_callbacks_are_not_cancelled(tmp_path):
    """CheckpointAveraging compares at the end of the fit; what was cancelled in the fit's own validation is over."""

    def scores(folder, act):
        parts = [averaging := CheckpointAveraging(last=2), unified_callbacks.ModelCheckpoint(folder, save_top_k=-1)]
        fit(folder, act, callbacks=parts, enable_checkpointing=True)
        return averaging.scores

    def act(loop, event):
        if loop.trainer.validating and event is Event.BATCH_START and loop.batch_index == 1:
            raise CancelBatch

    assert scores(tmp_path / "cancelled", act) == scores(tmp_path / "whole", None)


def test_two_that_call_the_same_function_stand_side_by_side(namespace, tmp_path):
    """They have one key, which callbacks without a state may have."""
    seen = []
    first, second = (EventCallback(lambda loop, event: seen.append(event), events=["fitStart"]) for _ in range(2))
    assert first.state_key == second.state_key
    make_trainer(tmp_path, namespace, callbacks=[first, second]).fit(make_module(namespace), loader(1))
    assert len(seen) == 2
