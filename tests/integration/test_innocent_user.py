"""What a run with any technique leaves behind when it ends, fails or is interrupted: nothing.

Each run is compared with one of a bare Trainer that ends the same way, and each process with itself before the run.
"""

import copy
import functools
import gc
import json
import os
import signal
import time
import weakref
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch

from tests.support import fork_server
from tests.support.callback_runs import loader, make_classifier
from tests.support.cases import CALLBACKS, make
from tests.support.leftovers import of_module, of_optimizer, of_process, of_trainer
from tests.support.training import make_trainer

NAMESPACES = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
STACK = "all of them"
ENDS = {  # the hook of the user's module that raises, what, and at which of its calls
    "fit": None,
    "in setup": ("setup", RuntimeError, 1),
    "in configure_optimizers": ("configure_optimizers", RuntimeError, 1),
    "in on_fit_start": ("on_fit_start", RuntimeError, 1),
    "in the sanity check": ("validation_step", RuntimeError, 1),
    "in on_train_start": ("on_train_start", RuntimeError, 1),
    "in a batch": ("training_step", RuntimeError, 2),
    "in backward": ("on_after_backward", RuntimeError, 2),
    "in a step": ("on_before_optimizer_step", RuntimeError, 1),
    "in validation": ("validation_step", RuntimeError, 4),
    "at the end of validation": ("on_validation_epoch_end", RuntimeError, 2),
    "at the end of an epoch": ("on_train_epoch_end", RuntimeError, 1),
    "at the end": ("on_train_end", RuntimeError, 1),
    "Ctrl-C in a batch": ("training_step", KeyboardInterrupt, 2),
    "Ctrl-C in validation": ("validation_step", KeyboardInterrupt, 4),
    "SystemExit in a batch": ("training_step", SystemExit, 2),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt"),
    pytest.mark.filterwarnings("ignore:.*shutdown"),
    pytest.mark.filterwarnings("ignore::lightning_plugins.core.validation.LightningPluginsWarning"),
]


def break_at(module, name, error, number):
    """Make the module's hook ``name`` raise ``error`` at its call of that number."""
    kind, calls = type(module), []
    whole = getattr(kind, name)

    def hook(self, *args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise error("the user's")
        return whole(self, *args, **kwargs)

    setattr(kind, name, hook)


def interrupted(message):
    """Press Ctrl-C: the signal comes, and Python makes the exception of it, somewhere in the batch."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
    return RuntimeError(f"{message}: no signal came")


def run(namespace, end, callbacks, *, scheduled=False):
    """Fit until the end; return the module and the Trainer."""
    module = make_classifier(namespace, scheduled=scheduled)
    if end is not None:
        break_at(module, *end)
    data = loader()
    saving = namespace.callbacks.ModelCheckpoint(Path("checkpoints"), save_top_k=-1)
    trainer = make_trainer(
        Path.cwd(), namespace, callbacks=[*callbacks, saving], max_epochs=2, enable_checkpointing=True
    )
    if end is None:
        trainer.fit(module, data, data)
    else:
        with pytest.raises((RuntimeError, SystemExit), match=r"^the user's$|^1$"):
            trainer.fit(module, data, data)
    return module, trainer


def left(module, trainer):
    optimizer = getattr(module, "optimizer", None)
    return {*of_module(module), *(of_optimizer(optimizer) if optimizer else ()), *of_trainer(trainer)}


def made(name):
    return [make(each) for each in (sorted(CALLBACKS) if name == STACK else [name])]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@functools.cache
def bare(namespace, end, scheduled):
    """What a Trainer without any technique leaves, and torch's own scheduler where one is compared with it."""
    return left(*run(NAMESPACES[namespace], ENDS[end], [], scheduled=scheduled))


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", [*sorted(CALLBACKS), STACK])
def test_nothing_is_left(name, namespace):
    everything = name == STACK or namespace == "lightning.pytorch"
    scheduled = name in (STACK, "LearningRateScheduler")  # torch's own schedulers wrap `optimizer.step` for good
    for end in ENDS if everything else ("fit", "in a batch"):
        without = bare(namespace, end, scheduled)
        before = set(of_process())
        callbacks = made(name)
        listed = {*callbacks}
        module, trainer = run(NAMESPACES[namespace], ENDS[end], callbacks)
        found = {line for line in left(module, trainer) if not line.startswith("callback ")}
        assert sorted(found - without) == [], end
        assert sorted(set(of_process()) - before) == [], end
        assert {*trainer.callbacks} - {trainer.checkpoint_callback} == listed, end  # events stand late in the list
        assert len(trainer.callbacks) == len(listed) + 1, end


@pytest.mark.slow
def test_nothing_is_left_after_a_real_signal(tmp_path):
    """In a process of its own: Lightning ignores a second Ctrl-C for good."""
    output, errors = tmp_path / "output", tmp_path / "errors"
    process = [[str(tmp_path)], {**os.environ}, str(output), str(errors)]
    assert fork_server.run(interrupt_in_this_process, [process], 300) == [0], errors.read_text()[-2000:]
    assert json.loads(output.read_text().splitlines()[-1]) == {"of the run": [], "of the process": [], "rows": 2}
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2  # the header and the batch before the signal


def interrupt_in_this_process(folder):
    """Interrupt a bare Trainer, then one with everything; print what the second leaves and the first does not."""
    os.chdir(folder)
    end = ("training_step", interrupted, 2)
    without = left(*run(lightning.pytorch, end, [], scheduled=True))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    callbacks, handler = made(STACK), signal.getsignal(signal.SIGINT)
    before = set(of_process())
    module, trainer = run(lightning.pytorch, end, callbacks)
    signal.signal(signal.SIGINT, handler)
    found = {line for line in left(module, trainer) if not line.startswith("callback ")}
    rows = len(Path("a.csv").read_text().splitlines())
    extra = sorted(set(of_process()) - before)
    print(json.dumps({"of the run": sorted(found - without), "of the process": extra, "rows": rows}))  # noqa: T201


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_another_modules_evaluation_is_left_alone(call):
    """After a fit with everything, another module is evaluated by the same Trainer."""
    found = []
    for callbacks in ([], made(STACK)):
        trainer = run(lightning.pytorch, None, callbacks)[1]
        other = make_classifier(lightning.pytorch, scheduled=False)
        weights, process = copy.deepcopy(other.state_dict()), set(of_process())
        getattr(trainer, call)(other, loader())
        found.append({*of_module(other), *sorted(set(of_process()) - process)})
        assert all(torch.equal(weights[name], tensor) for name, tensor in other.state_dict().items())
    assert sorted(found[1] - found[0]) == []


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("name", [*sorted(CALLBACKS), STACK])
def test_the_module_is_not_kept_alive(name):
    callbacks = made(name)
    module, trainer = run(lightning.pytorch, None, callbacks)
    alive = weakref.ref(module)
    for callback in [*callbacks, *(getattr(callback, "_own", None) for callback in callbacks)]:
        for attribute in ("log", "log_dict"):  # the module's own, which Lightning hangs on every callback
            getattr(callback, "__dict__", {}).pop(attribute, None)
    del module, trainer
    gc.collect()
    assert (alive() is not None) == (name in KEEPERS)


KEEPERS = {"EMA", "LatestWeightAveraging", "PostHocEMA", STACK}  # they go on averaging in a second fit of the module
