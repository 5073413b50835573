"""The base of every callback: key and version of the state, place in the order, the end of a run."""

import copy
import pickle

import lightning.pytorch as unified
import pytest

from lightning_plugins.core.callback import Callback, Stage, in_order
from tests.support.training import loader, make_module, make_trainer


class Counting(Callback):
    """Counts batches; notes what it is asked for."""

    stage = Stage.WEIGHTS
    state_version = 2

    def __init__(self, name="a"):
        super().__init__(name=name)
        self.batches, self.called = 0, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        self.called.append("batch")

    def get_state(self):
        return {"batches": self.batches}

    def set_state(self, state):
        self.batches = state["batches"]

    def release(self, trainer, pl_module):
        self.called.append("release")


class Finishing(Callback):
    """Has something to do at the end of a run."""

    stage = Stage.CHECKPOINTS

    def __init__(self, name="a"):
        super().__init__(name=name)
        self.finished = []

    def on_fit_start(self, trainer, pl_module):
        self.when_nothing_is_left(trainer, lambda: self.finished.append("nothing left"))

    def on_train_start(self, trainer, pl_module):
        self.training_starts()

    def on_train_end(self, trainer, pl_module):
        self.finished.append("trained")


def of_stage(stage, label):
    """Return a callback of that place; its label tells those of one place apart."""
    callback = type("Placed", (Callback,), {"stage": stage})()
    callback.label = label
    return callback


def labels(callbacks):
    return [getattr(callback, "label", callback) for callback in callbacks]


# --- state ---


def test_the_key_is_the_class_and_what_tells_two_apart():
    assert Counting("a").state_key == "Counting(name='a')"
    assert Finishing().state_key == "Finishing(name='a')"
    assert type("Renamed", (Counting,), {})("b").state_key == "Renamed(name='b')"


def test_a_state_has_the_version_of_its_class_and_comes_back():
    callback, other = Counting(), Counting()
    callback.batches = 3
    assert callback.state_dict() == {"version": 2, "batches": 3}
    other.load_state_dict(callback.state_dict())
    assert other.batches == 3
    assert Finishing().state_dict() == {}  # nothing to keep


def test_a_state_of_another_version_is_refused_with_both_numbers_and_the_remedy():
    with pytest.raises(ValueError, match=r"Counting must be of version 2, got version 3 .* a later release .* install"):
        Counting().load_state_dict({"version": 3, "batches": 1})
    with pytest.raises(ValueError, match=r"must be of version 2, got version 1 .* Resume without this callback"):
        Counting().load_state_dict({"version": 1, "batches": 1})
    with pytest.raises(TypeError, match="state of Counting must be a mapping, got 3"):
        Counting().load_state_dict(3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
def test_a_copy_has_the_state_and_has_replaced_nothing(tmp_path, duplicate):
    callback = Counting()
    callback.batches = 3
    callback.patches.replace(make_trainer(tmp_path).fit_loop, "min_epochs", 7)
    twin = duplicate(callback)
    assert (twin.batches, twin.state_key) == (3, callback.state_key)
    assert callback.patches
    assert not twin.patches


# --- the place in the order ---


def test_ours_stand_in_the_order_of_their_stages_and_others_stay():
    ours = {stage: of_stage(stage, stage.name) for stage in Stage}
    found = in_order(["theirs 1", *reversed(ours.values()), "theirs 2"], [])
    assert labels(found) == ["theirs 1", *[s.name for s in Stage if s is not Stage.EVENTS], "theirs 2", "EVENTS"]


def test_equal_stages_keep_the_order_of_the_user():
    first, second, rates = (of_stage(*each) for each in [(Stage.OUTPUT, 1), (Stage.OUTPUT, 2), (Stage.RATES, 0)])
    assert labels(in_order([first, second, rates], [])) == [0, 1, 2]
    assert labels(in_order([second, first, rates], [])) == [0, 2, 1]


def test_events_come_before_what_writes_checkpoints():
    events, average = of_stage(Stage.EVENTS, "events"), of_stage(Stage.WEIGHTS, "average")
    assert labels(in_order([events, "saving", average, "theirs"], ["saving"])) == [
        "events",
        "saving",
        "average",
        "theirs",
    ]
    assert labels(in_order([events, average, "theirs", "saving"], ["saving"])) == [
        "average",
        "theirs",
        "events",
        "saving",
    ]


def test_a_trainer_calls_them_in_their_order(namespace, tmp_path):
    calls = []

    class Noting(Callback):
        def on_train_start(self, trainer, pl_module):
            calls.append(self.stage.name)

    stages = (Stage.EVENTS, Stage.RATES, Stage.ACCUMULATION)
    placed = [type(stage.name, (Noting,), {"stage": stage})() for stage in stages]
    trainer = make_trainer(tmp_path, namespace, callbacks=placed)
    trainer.fit(make_module(namespace), loader(1))
    assert calls == ["ACCUMULATION", "RATES", "EVENTS"]
    assert set(trainer.callbacks) == set(placed)


# --- the end ---


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_every_end_comes_to_release_and_undoes_the_patches(namespace, tmp_path, error):
    class Patching(Counting):
        def on_train_start(self, trainer, pl_module):
            self.patches.replace(trainer.fit_loop, "min_epochs", 7)
            self.patches.wrap(trainer.strategy, "training_step", lambda step, *args: step(*args))
            if error is not None:
                raise error

    callback = Patching()
    trainer = make_trainer(tmp_path, namespace, callbacks=[callback])
    try:
        trainer.fit(make_module(namespace), loader(2))
    except (RuntimeError, SystemExit):
        assert error is not None
    assert callback.called[-1] == "release"
    assert not callback.patches
    assert trainer.fit_loop.min_epochs != 7
    assert "training_step" not in vars(trainer.strategy)
    assert "profile" not in vars(trainer.profiler)


def test_patches_are_undone_even_if_the_release_fails(tmp_path):
    class Failing(Callback):
        stage = Stage.WEIGHTS

        def release(self, trainer, pl_module):
            raise RuntimeError("cannot")

    callback, trainer = Failing(), make_trainer(tmp_path)
    callback.patches.replace(trainer.fit_loop, "min_epochs", 7)
    with pytest.raises(RuntimeError, match="cannot"):
        callback.teardown(trainer, make_module(), "fit")
    assert trainer.fit_loop.min_epochs != 7


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fit_with_nothing_left_still_finishes(namespace, tmp_path):
    def fit(callbacks, **options):
        trainer = make_trainer(tmp_path, namespace, callbacks=callbacks)
        trainer.fit(make_module(namespace), loader(2), **options)
        return trainer

    first, second, third = (Finishing(name) for name in "abc")
    trainer = fit([first])
    assert first.finished == ["trained"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer = fit([second, third], ckpt_path=tmp_path / "last.ckpt")  # two that wait for the same
    assert (second.finished, third.finished) == (["nothing left"], ["nothing left"])
    assert "run" not in vars(trainer.fit_loop)


def test_a_fit_that_never_trains_does_not_finish_anything(tmp_path):
    callback = Finishing()
    make_trainer(tmp_path, callbacks=[callback], max_epochs=0).fit(make_module(), loader(2))
    assert callback.finished == []


def test_hooks_are_ordinary_methods():
    called = []

    class Forwarding(unified.Callback):
        """A user's callback that hands its hooks on."""

        def on_train_batch_end(self, *args):
            callback.on_train_batch_end(*args)
            callback.on_after_backward(*args[:2])
            called.append(callback.batches)

    callback = Counting()
    Forwarding().on_train_batch_end(None, None, None, None, 0)
    assert called == [1]


@pytest.mark.parametrize("profiler", [None, "simple"])
def test_the_profiler_of_the_user_is_left_alone(tmp_path, profiler):
    """One that measures nothing is passed by, since its context costs more than a small hook."""
    seen = []

    class Looking(Callback):
        stage = Stage.OUTPUT

        def on_train_start(self, trainer, pl_module):
            seen.append("profile" in vars(trainer.profiler))

    make_trainer(tmp_path, callbacks=[Looking()], profiler=profiler).fit(make_module(), loader(1))
    assert seen == [profiler is None]


def test_every_hook_can_be_called_by_hand_in_mid_fit(tmp_path):
    """A callback of the user's may forward hooks to those in the list."""
    seen = []

    class Calling(unified.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for callback in trainer.callbacks[:1]:
                callback.on_before_zero_grad(trainer, pl_module, trainer.optimizers[0])
                callback.on_before_backward(trainer, pl_module, outputs["loss"])
                callback.on_after_backward(trainer, pl_module)
                callback.on_train_batch_start(trainer, pl_module, batch, batch_idx)
                callback.on_validation_batch_start(trainer, pl_module, batch, batch_idx)
                seen.append(batch_idx)

    class Quiet(Callback):
        stage = Stage.OUTPUT

    make_trainer(tmp_path, callbacks=[Quiet(), Calling()]).fit(make_module(), loader(2))
    assert seen == [0, 1]
