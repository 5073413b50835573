"""A callback that is taken out of ``trainer.callbacks`` in mid-run acts no more, and leaves nothing behind."""

import lightning.pytorch as unified
import pytest
import torch

from lightning_plugins import EMA, Event, EventCallback
from tests.support.callback_runs import loader, make_classifier, same, working_in
from tests.support.cases import CALLBACKS, make
from tests.support.leftovers import of_module, of_optimizer, of_trainer
from tests.support.training import make_trainer

NAMES = sorted(CALLBACKS)
# what every scheduler of torch's leaves on an optimizer
GROUP = ["dampening", "differentiable", "foreach", "fused", "lr", "maximize", "momentum", "nesterov", "params"]
BY_TORCH = {"optimizer has step", "optimizer has _opt_called"}
BY_TORCH |= {f"group {sorted([*GROUP, 'weight_decay', *more])}" for more in ([], ["initial_lr"])}
HOOKS = ["on_train_batch_start", "on_train_batch_end", "on_validation_batch_start", "on_train_epoch_end"]


def in_place(trainer, callback):
    trainer.callbacks.remove(callback)


def by_another_list(trainer, callback):
    trainer.callbacks = [found for found in trainer.callbacks if found is not callback]


WAYS = [in_place, by_another_list]


class At(unified.Callback):
    """Does something once, in a hook of the second epoch."""

    def __init__(self, hook, act):
        self._hook, self._act = hook, act

        def once(trainer, *_):
            if self._act is not None and trainer.current_epoch == 1 and not trainer.sanity_checking:
                act, self._act = self._act, None
                act(trainer)

        setattr(self, hook, once)


class Saves(unified.Callback):
    """Saves at the end, before and after the callbacks of this package end theirs."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 2:
            self.found = [*of_optimizer(trainer.optimizers[0]), *of_trainer(trainer)]
            trainer.save_checkpoint(self.path)


def run(folder, *callbacks, epochs=3):
    with working_in(folder):
        torch.manual_seed(0)
        module, saves = make_classifier(), Saves(folder / "last.ckpt")
        trainer = make_trainer(folder, callbacks=[saves, *callbacks], max_epochs=epochs)
        trainer.fit(module, loader(12), loader(4))
        # a callback of the package is heard no more, so the files are those of a run that never had it
        file = torch.load(folder / "last.ckpt", weights_only=False)
    left = [*of_module(module), *of_optimizer(module.optimizer), *of_trainer(trainer)]
    return file, left, saves.found


def plain_keys(file):
    return sorted(file), sorted(file["callbacks"]), len(file["lr_schedulers"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run in which the same hook removes a callback of the user's own."""
    own = unified.Callback()
    return run(tmp_path_factory.mktemp("plain"), own, At("on_train_batch_end", lambda trainer: in_place(trainer, own)))


@pytest.mark.filterwarnings("ignore:MicroBatching splits batches, and batch normalization")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_taken_out_acts_no_more_and_leaves_nothing(tmp_path, plain, name, hook):
    callback, way = make(name), WAYS[HOOKS.index(hook) % 2]
    file, left, found = run(tmp_path, callback, At(hook, lambda trainer: way(trainer, callback)))
    assert set(left) ^ set(plain[1]) <= (BY_TORCH if name == "LearningRateScheduler" else set())
    # already in the next epoch
    assert set(found) ^ set(plain[2]) <= (BY_TORCH if name == "LearningRateScheduler" else set())
    assert plain_keys(file) == plain_keys(plain[0])
    assert callback._presence is None
    assert not callback.patches


@pytest.mark.filterwarnings("ignore:MicroBatching splits batches, and batch normalization")
@pytest.mark.parametrize("name", NAMES)
def test_what_is_put_in_without_a_beginning_does_nothing(tmp_path, plain, name):
    """Lightning sets nothing up in mid-run."""
    late = make(name)
    file, left, _ = run(tmp_path, At("on_train_batch_end", lambda trainer: trainer.callbacks.append(late)))
    assert same(file["state_dict"], plain[0]["state_dict"])
    assert same(file["optimizer_states"], plain[0]["optimizer_states"])
    assert {line for line in left if not line.startswith("callback ")} <= set(plain[1])


@pytest.mark.filterwarnings("ignore:MicroBatching splits batches, and batch normalization")
@pytest.mark.parametrize("name", NAMES)
def test_what_was_taken_out_and_is_put_back_does_nothing(tmp_path, plain, name):
    callback = make(name)
    out = At("on_train_batch_start", lambda trainer: in_place(trainer, callback))
    back = At("on_train_epoch_end", lambda trainer: trainer.callbacks.append(callback))
    left = run(tmp_path, callback, out, back)[1]
    assert {line for line in left if not line.startswith("callback ")} <= set(plain[1]) | BY_TORCH


@pytest.mark.parametrize("way", WAYS)
def test_weights_after_the_removal_are_those_of_a_run_without_the_average(tmp_path, plain, way):
    ema = EMA(0.9)
    file = run(tmp_path, ema, At("on_validation_batch_start", lambda trainer: way(trainer, ema)))[0]
    assert same(file["state_dict"], plain[0]["state_dict"])
    assert same(file["optimizer_states"], plain[0]["optimizer_states"])


def heard_by_three(folder, act):
    """What each of three functions hears in a run; ``act`` is called by the second with (trainer, event, the first)."""
    heard = {"a": [], "b": [], "c": []}

    def a(loop, event):
        heard["a"].append(event)

    def b(loop, event):
        heard["b"].append(event)
        act(loop.trainer, event, callbacks[0])

    def c(loop, event):
        heard["c"].append(event)

    callbacks = [EventCallback(function) for function in (a, b, c)]
    make_trainer(folder, callbacks=callbacks, max_epochs=3).fit(make_classifier(), loader(6), loader(4))
    return heard


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return heard_by_three(tmp_path_factory.mktemp("whole"), lambda *_: None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("event", list(Event))
def test_of_several_functions_the_first_is_taken_out_in_the_middle_of_an_event(tmp_path, whole, event, way):
    """The others hear of all events, each once, though the first one was the first to be told of every hook."""
    assert whole["a"] == whole["b"] == whole["c"]

    def act(trainer, now, first):
        due = trainer.current_epoch == 1 or event is Event.FIT_START
        if now is event and due and first in trainer.callbacks:
            way(trainer, first)

    heard = heard_by_three(tmp_path, act)
    assert heard["b"] == heard["c"] == whole["b"]
    if event is not Event.FIT_END:
        last = len(heard["a"]) - 1
        assert heard["a"] == whole["a"][: last + 1] != whole["a"]
        assert heard["a"][last] is event
