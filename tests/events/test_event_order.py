"""Which events come, and in which order; the oracle is the order that Swift for TensorFlow's loop is tested for."""

import pytest

from lightning_plugins import (
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelTraining,
    CancelValidation,
    Event,
    EventCallback,
    on_events,
)
from tests.support.events_runs import (
    CANCELLED_BATCH,
    EPOCH,
    TRAINING,
    TRAINING_BATCH,
    VALIDATION,
    batches,
    fit,
    make_regression,
)
from tests.support.training import make_trainer


def raising(action, *places):
    """Return a function that raises ``action`` at the events of ``places``: an event, or one with "train" or "val"."""

    def act(loop, event):
        phase = "val" if loop.trainer.validating else "train"
        if event in places or (event, phase) in places:
            raise action

    return act


def test_all_events_come_in_the_order_of_the_original(tmp_path, namespace):
    events, _, _ = fit(tmp_path, namespace=namespace)
    assert events == ["fitStart", *EPOCH, *EPOCH, "fitEnd"]


CANCELLED_VALIDATION = ["validationStart", *CANCELLED_BATCH * 2, "validationEnd"]
CANCELS = {
    # Those of swift-models' own test: the action at every batchStart where it has a meaning
    "CancelBatch": (
        raising(CancelBatch, Event.BATCH_START),
        ["epochStart", "trainingStart", *CANCELLED_BATCH * 3, "trainingEnd", *CANCELLED_VALIDATION, "epochEnd"],
    ),
    "CancelTraining": (
        raising(CancelTraining, (Event.BATCH_START, "train")),
        ["epochStart", "trainingStart", "batchStart", "trainingEnd", *VALIDATION, "epochEnd"],
    ),
    "CancelValidation": (
        raising(CancelValidation, (Event.BATCH_START, "val")),
        ["epochStart", *TRAINING, "validationStart", "batchStart", "validationEnd", "epochEnd"],
    ),
    "CancelEpoch": (
        raising(CancelEpoch, Event.BATCH_START),
        ["epochStart", "trainingStart", "batchStart", "epochEnd"],
    ),
    # and, from the control flow of its `fit`, everywhere else
    "CancelBatch at updateStart": (
        raising(CancelBatch, Event.UPDATE_START),
        EPOCH,
    ),
    "CancelBatch at inferencePredictionEnd": (
        raising(CancelBatch, Event.INFERENCE_PREDICTION_END),
        EPOCH,
    ),
    "CancelTraining at trainingStart": (
        raising(CancelTraining, Event.TRAINING_START),
        ["epochStart", "trainingStart", "trainingEnd", *VALIDATION, "epochEnd"],
    ),
    "CancelTraining at updateStart": (
        raising(CancelTraining, Event.UPDATE_START),
        ["epochStart", "trainingStart", "batchStart", "updateStart", "trainingEnd", *VALIDATION, "epochEnd"],
    ),
    "CancelTraining at batchEnd": (
        raising(CancelTraining, (Event.BATCH_END, "train")),
        ["epochStart", "trainingStart", *TRAINING_BATCH, "trainingEnd", *VALIDATION, "epochEnd"],
    ),
    "CancelValidation at validationStart": (
        raising(CancelValidation, Event.VALIDATION_START),
        ["epochStart", *TRAINING, "validationStart", "validationEnd", "epochEnd"],
    ),
    "CancelValidation at inferencePredictionEnd": (
        raising(CancelValidation, Event.INFERENCE_PREDICTION_END),
        ["epochStart", *TRAINING, *VALIDATION[:3], "validationEnd", "epochEnd"],
    ),
    "CancelValidation at batchEnd": (
        raising(CancelValidation, (Event.BATCH_END, "val")),
        ["epochStart", *TRAINING, *VALIDATION[:4], "validationEnd", "epochEnd"],
    ),
    "CancelEpoch at epochStart": (raising(CancelEpoch, Event.EPOCH_START), ["epochStart", "epochEnd"]),
    "CancelEpoch at trainingStart": (
        raising(CancelEpoch, Event.TRAINING_START),
        ["epochStart", "trainingStart", "epochEnd"],
    ),
    "CancelEpoch at updateStart": (
        raising(CancelEpoch, Event.UPDATE_START),
        ["epochStart", "trainingStart", "batchStart", "updateStart", "epochEnd"],
    ),
    "CancelEpoch at batchEnd": (
        raising(CancelEpoch, Event.BATCH_END),
        ["epochStart", "trainingStart", *TRAINING_BATCH, "epochEnd"],
    ),
    "CancelEpoch at trainingEnd": (raising(CancelEpoch, Event.TRAINING_END), ["epochStart", *TRAINING, "epochEnd"]),
    "CancelEpoch at validationStart": (
        raising(CancelEpoch, Event.VALIDATION_START),
        ["epochStart", *TRAINING, "validationStart", "epochEnd"],
    ),
    "CancelEpoch at a validation's batchStart": (
        raising(CancelEpoch, (Event.BATCH_START, "val")),
        ["epochStart", *TRAINING, *VALIDATION[:2], "epochEnd"],
    ),
    "CancelEpoch at inferencePredictionEnd": (
        raising(CancelEpoch, Event.INFERENCE_PREDICTION_END),
        ["epochStart", *TRAINING, *VALIDATION[:3], "epochEnd"],
    ),
    "CancelEpoch at a validation's batchEnd": (
        raising(CancelEpoch, (Event.BATCH_END, "val")),
        ["epochStart", *TRAINING, *VALIDATION[:4], "epochEnd"],
    ),
    "CancelEpoch at validationEnd": (raising(CancelEpoch, Event.VALIDATION_END), EPOCH),
}


@pytest.mark.parametrize("case", CANCELS)
def test_a_cancelled_part_is_left_and_the_next_epoch_is_whole_again(tmp_path, case):
    act, expected = CANCELS[case]
    events, module, trainer = fit(tmp_path, act)
    assert events == ["fitStart", *expected, *expected, "fitEnd"]
    assert module.training
    assert trainer.current_epoch == 2
    assert trainer.state.finished


FIT_CANCELS = {
    "fitStart": (raising(CancelFit, Event.FIT_START), []),
    "epochStart": (raising(CancelFit, Event.EPOCH_START), ["epochStart"]),
    "trainingStart": (raising(CancelFit, Event.TRAINING_START), ["epochStart", "trainingStart"]),
    "batchStart": (raising(CancelFit, Event.BATCH_START), ["epochStart", "trainingStart", "batchStart"]),
    "updateStart": (raising(CancelFit, Event.UPDATE_START), ["epochStart", "trainingStart", *TRAINING_BATCH[:2]]),
    "batchEnd": (raising(CancelFit, Event.BATCH_END), ["epochStart", "trainingStart", *TRAINING_BATCH]),
    "trainingEnd": (raising(CancelFit, Event.TRAINING_END), ["epochStart", *TRAINING]),
    "validationStart": (raising(CancelFit, Event.VALIDATION_START), ["epochStart", *TRAINING, *VALIDATION[:1]]),
    "validation batchStart": (
        raising(CancelFit, (Event.BATCH_START, "val")),
        ["epochStart", *TRAINING, *VALIDATION[:2]],
    ),
    "inferencePredictionEnd": (
        raising(CancelFit, Event.INFERENCE_PREDICTION_END),
        ["epochStart", *TRAINING, *VALIDATION[:3]],
    ),
    "validation batchEnd": (
        raising(CancelFit, (Event.BATCH_END, "val")),
        ["epochStart", *TRAINING, *VALIDATION[:4]],
    ),
    "validationEnd": (raising(CancelFit, Event.VALIDATION_END), ["epochStart", *TRAINING, *VALIDATION]),
    "epochEnd": (raising(CancelFit, Event.EPOCH_END), EPOCH),
}


@pytest.mark.parametrize("place", FIT_CANCELS)
def test_a_cancelled_fit_ends_whatever_min_epochs_asks_for(tmp_path, place):
    act, expected = FIT_CANCELS[place]
    events, module, trainer = fit(tmp_path, act, epochs=5, min_epochs=3, min_steps=9)
    assert events == ["fitStart", *expected, "fitEnd"]
    assert module.training
    assert (trainer.fit_loop.min_epochs, trainer.fit_loop.min_steps) == (3, 9)


MEANINGLESS = [
    (CancelBatch, Event.EPOCH_START, "epochStart"),
    (CancelBatch, (Event.BATCH_END, "train"), "training batchEnd"),
    (CancelBatch, (Event.BATCH_END, "val"), "validation batchEnd"),
    (CancelTraining, (Event.BATCH_START, "val"), "validation batchStart"),
    (CancelTraining, Event.TRAINING_END, "trainingEnd"),
    (CancelValidation, (Event.BATCH_START, "train"), "training batchStart"),
    (CancelValidation, Event.VALIDATION_END, "validationEnd"),
    (CancelEpoch, Event.EPOCH_END, "epochEnd"),
    (CancelEpoch, Event.FIT_START, "fitStart"),
    (CancelFit, Event.FIT_END, "fitEnd"),
]


@pytest.mark.parametrize(("action", "place", "name"), MEANINGLESS, ids=[f"{a.__name__}-{n}" for a, _, n in MEANINGLESS])
def test_an_action_without_a_meaning_names_itself_and_the_event(tmp_path, action, place, name):
    with pytest.raises(ValueError, match=f"{action.__name__} has no meaning at {name}. Raise it at "):
        fit(tmp_path, raising(action, place))


def test_validation_within_the_epoch_does_not_end_the_training(tmp_path):
    events, _, _ = fit(tmp_path, epochs=1, training=4, val_check_interval=0.5)
    half = TRAINING_BATCH * 2
    within = ["epochStart", "trainingStart", *half, *VALIDATION, *half, "trainingEnd", *VALIDATION, "epochEnd"]
    assert events == ["fitStart", *within, "fitEnd"]


def test_an_epoch_cancelled_in_a_validation_within_it_ends_there(tmp_path):
    events, _, trainer = fit(tmp_path, raising(CancelEpoch, Event.VALIDATION_END), training=4, val_check_interval=0.5)
    epoch = ["epochStart", "trainingStart", *TRAINING_BATCH * 2, *VALIDATION, "epochEnd"]
    assert events == ["fitStart", *epoch, *epoch, "fitEnd"]
    assert trainer.global_step == 4


def test_a_training_stopped_in_mid_epoch_ends_before_what_follows(tmp_path):
    # by max_steps, where no validation follows
    events, _, _ = fit(tmp_path, max_steps=2)
    assert events == [
        "fitStart",
        "epochStart",
        "trainingStart",
        *TRAINING_BATCH * 2,
        "trainingEnd",
        "epochEnd",
        "fitEnd",
    ]

    def stop(loop, event):
        if event is Event.BATCH_END and not loop.trainer.validating and loop.batch_index == 1:
            loop.trainer.should_stop = True

    # and by the Trainer's own flag, where one does
    events, _, _ = fit(tmp_path, stop)
    stopped = ["epochStart", "trainingStart", *TRAINING_BATCH * 2, "trainingEnd", *VALIDATION, "epochEnd"]
    assert events == ["fitStart", *stopped, "fitEnd"]

    # also where the flag is set after the batch's last event
    module = make_regression()
    module.on_train_batch_end = lambda outputs, batch, batch_idx: setattr(module.trainer, "should_stop", batch_idx == 1)
    events, _, _ = fit(tmp_path, module=module)
    assert events == ["fitStart", *stopped, "fitEnd"]


def test_a_window_of_batches_has_one_update(tmp_path):
    events, _, _ = fit(tmp_path, epochs=1, accumulate_grad_batches=2)
    training = [*CANCELLED_BATCH, *TRAINING_BATCH, *TRAINING_BATCH]  # 3 batches: windows of 2 and 1
    assert events == [
        "fitStart",
        "epochStart",
        "trainingStart",
        *training,
        "trainingEnd",
        *VALIDATION,
        "epochEnd",
        "fitEnd",
    ]


def test_a_step_that_predicts_without_forward_has_its_event_too(tmp_path):
    module = make_regression()
    seen = []

    def validation_step(batch, batch_idx):
        return {"loss": torch_loss(module, batch), "preds": module.layer(batch[0])}

    def torch_loss(module, batch):
        return (module.layer(batch[0]) - batch[1]).pow(2).mean()

    module.validation_step = validation_step
    act = lambda loop, event: seen.append(loop.last_output) if event is Event.INFERENCE_PREDICTION_END else None  # noqa: E731
    events, _, _ = fit(tmp_path, act, module=module, epochs=1)
    assert events == ["fitStart", *EPOCH, "fitEnd"]
    assert [output.shape for output in seen] == [(2, 2)] * 2


def test_only_a_fit_has_events(tmp_path):
    heard = []
    module = make_regression()
    module.test_step = module.training_step
    module.predict_step = lambda batch, batch_idx: module(batch[0])
    trainer = make_trainer(tmp_path, callbacks=[EventCallback(lambda loop, event: heard.append(event))])
    trainer.validate(module, batches(2), verbose=False)
    trainer.test(module, batches(2), verbose=False)
    trainer.predict(module, batches(2))
    assert heard == []


def test_functions_hear_in_order_up_to_the_one_that_cancels_and_only_what_they_asked_for(tmp_path):
    heard = []

    @on_events(Event.BATCH_START, "EPOCH_END")
    def first(loop, event):
        heard.append(("first", event.value))
        if event is Event.BATCH_START and not loop.trainer.validating:
            raise CancelTraining

    @on_events("batchStart", Event.TRAINING_END)
    def second(loop, event):
        heard.append(("second", event.value))

    trainer = make_trainer(tmp_path, callbacks=[first, second], num_sanity_val_steps=0)
    trainer.fit(make_regression(), batches(3), batches(1))
    assert heard == [
        ("first", "batchStart"),
        ("second", "trainingEnd"),
        ("first", "batchStart"),
        ("second", "batchStart"),
        ("first", "epochEnd"),
    ]
    heard.clear()
    first(trainer, Event.EPOCH_END)
    assert heard == [("first", "epochEnd")]
