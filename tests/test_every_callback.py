"""What every callback promises, tested from its row in ``tests/support/cases.py``."""

import copy
import csv
import inspect
import pickle
import random
import re
import shutil
from itertools import chain

import lightning.pytorch
import pytest
import pytorch_lightning
import torch

from lightning_plugins import GradientAccumulation
from lightning_plugins.core.callback import Callback
from lightning_plugins.core.lightning import MisconfigurationException
from tests.support.callback_runs import fit, loader as classified, make_classifier, same, working_in
from tests.support.cases import CALLBACKS, callback_names, kind_of, make
from tests.support.training import loader, make_module, make_trainer
from tests.support.value_cases import VALUES

NAMES = sorted(CALLBACKS)
HOOKS = sorted(
    name for name in vars(lightning.pytorch.Callback) if name.startswith("on_") or name in {"setup", "teardown"}
)
SECTIONS = ("When", "Checkpoint", "Distributed", "Cost", "Does not compose with")
MIDDLE = 2  # the epoch in which a run is killed, and goes on when it is resumed
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_plugins.core.validation.LightningPluginsWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # callbacks of the tests' own
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # a checkpoint is opened from another folder
]


def test_every_callback_has_its_row():
    assert callback_names() == NAMES


# --- the object ---


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_callback_of_both_names_of_lightning(name):
    assert isinstance(make(name), lightning.pytorch.Callback)
    assert isinstance(make(name), pytorch_lightning.Callback)
    assert isinstance(make(name), Callback)
    assert "stage" in {attribute for kind in type(make(name)).__mro__ for attribute in vars(kind)}


@pytest.mark.parametrize("name", NAMES)
def test_its_arguments_are_annotated(name):
    for parameter in inspect.signature(kind_of(name)).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_has_the_sections_of_all(name):
    """Each is a section of its own with something in it, in one order, before the arguments."""
    text = inspect.getdoc(kind_of(name))
    places = [re.search(rf"^{section}:\n    \S", text, re.MULTILINE) for section in (*SECTIONS, "Args")]
    missing = [section for section, found in zip(SECTIONS, places, strict=False) if found is None]
    assert not missing
    assert [found.start() for found in places] == sorted(found.start() for found in places)


@pytest.mark.parametrize("name", NAMES)
def test_two_have_different_keys_and_copies_the_same(name):
    first, second = make(name, 0), make(name, 1)
    assert first.state_key != second.state_key
    assert make(name).state_key == first.state_key
    for callback in (first, second):
        assert re.fullmatch(rf"{name}\((\w+=.+)?\)", callback.state_key)
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert type(twin) is type(first)
        assert twin.state_key == first.state_key
        assert twin.state_dict() == first.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_two_of_one_key_are_refused_in_both_namespaces_in_words(name, namespace, tmp_path):
    """Not by Lightning when the Trainer is made, which cannot name an argument."""
    run = make_trainer(tmp_path, namespace, callbacks=[make(name), make(name)])
    if name in {"ClassificationReport", "EventCallback"}:
        # they have no state
        return
    key = re.escape(make(name).state_key)
    with pytest.raises(MisconfigurationException, match=rf"callbacks, got {key} twice\. (Give|Remove) .*it\.$"):
        run.fit(make_module(namespace), loader(1))


@pytest.mark.parametrize("name", NAMES)
def test_every_hook_can_be_called_by_hand(name):
    """A callback of the user's may hand its hooks on to one of ours."""
    kind = kind_of(name)
    for hook in HOOKS:
        assert callable(getattr(make(name), hook)), hook
        if getattr(kind, hook) in {
            getattr(base, hook) for base in (lightning.pytorch.Callback, pytorch_lightning.Callback)
        }:
            arguments = list(inspect.signature(getattr(make(name), hook)).parameters)
            assert getattr(make(name), hook)(*arguments) is None, hook


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_a_later_version_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must be of version \d+, got version 99 .* a later release"):
        make(name).load_state_dict({"version": 99})


def test_so_is_one_of_the_scheduler():
    [(_, arguments)] = VALUES["ScheduleLR"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = kind_of("ScheduleLR")(**{**arguments, "optimizer": optimizer})
    with pytest.raises(
        ValueError, match=r"state of ScheduleLR must be of version \d+, got version 99 .* a later release"
    ):
        scheduler.load_state_dict({**scheduler.state_dict(), "version": 99})


# --- runs of all of them together ---


def stack(order=None):
    names = random.Random(order).sample(NAMES, len(NAMES)) if order is not None else NAMES
    return [make(name) for name in names]


def rows(folder):
    """Return what the run wrote to its log, without the clock."""
    with (folder / "a.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "time"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run of the whole stack: its folder and what came out."""
    folder = tmp_path_factory.mktemp("reference")
    return folder, fit(folder, stack())


def differing(left, right):
    return sorted(name for name in left if not same(left[name], right[name]))


@pytest.mark.parametrize("order", range(3))
def test_any_order_gives_the_same_run(tmp_path, reference, order):
    folder, outcome = reference
    assert differing(outcome, fit(tmp_path, stack(order))) == []
    assert rows(tmp_path) == rows(folder)


def test_the_other_name_of_lightning_gives_the_same_run(tmp_path, reference):
    folder, outcome = reference
    assert differing(outcome, fit(tmp_path, stack(), namespace=pytorch_lightning)) == []
    assert rows(tmp_path) == rows(folder)


def test_a_run_that_died_in_the_middle_and_is_resumed_is_the_uninterrupted_one(tmp_path, reference):
    folder, outcome = reference
    assert fit(tmp_path, stack(1), die_in_epoch=MIDDLE) is None
    saved = tmp_path / "checkpoints" / f"epoch={MIDDLE - 1}.ckpt"
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert not same({name: state[name] for name in outcome["weights"]}, outcome["weights"])
    assert differing(outcome, fit(tmp_path, stack(2), ckpt_path=saved)) == []
    assert rows(tmp_path) == rows(folder)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"GradientAccumulation"}))  # two of them are refused
def test_accumulation_before_or_behind_it_gives_the_same_weights(tmp_path, name):
    pairs = [[GradientAccumulation(4), make(name)], [make(name), GradientAccumulation(4)]]
    first, second = (fit(tmp_path / str(index), pair, epochs=1) for index, pair in enumerate(pairs))
    assert differing(first, second) == []


def test_saved_states_are_plain_and_versioned(reference):
    saved = torch.load(reference[0] / "checkpoints" / "epoch=1.ckpt", weights_only=True)
    states = {key: state for key, state in saved["callbacks"].items() if key.partition("(")[0] in CALLBACKS}
    assert {key.partition("(")[0] for key in states} >= {name for name in NAMES if reference[1][name]}
    assert all(state["version"] >= 1 for state in states.values())


def test_a_checkpoint_of_a_later_release_is_refused(tmp_path, reference):
    """Also where a callback keeps more than its state in it."""
    saved = torch.load(reference[0] / "checkpoints" / "epoch=1.ckpt", weights_only=True)
    own = [state for key, state in saved["callbacks"].items() if key.partition("(")[0] in CALLBACKS]
    # `lightning_plugins_run` only says where a file came from: unknown, if it cannot be read
    beside = [saved[key] for key in saved if key.startswith("lightning_plugins") and key != "lightning_plugins_run"]
    versions = [[part for part in _dictionaries(place) if "version" in part] for place in (*own, *beside)]
    assert all(versions[: len(own)])
    assert any(versions[len(own) :])
    for part in chain(*versions):
        before, part["version"] = part["version"], 99
        torch.save(saved, tmp_path / "later.ckpt")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        with pytest.raises((ValueError, MisconfigurationException), match=r"version \d+, got (version )?99"):
            fit(tmp_path / "run", stack(), ckpt_path=tmp_path / "later.ckpt")
        part["version"] = before


# What the first of each pair leaves behind in a run beside checkpoints, and that it does not in a trial.
FILES = {
    "CSVStatisticsLogger": ["a.csv"],
    "CheckpointAveraging": ["averaged.ckpt"],
    "ClassificationReport": ["r.txt", "4.png"],
    "PostHocEMA": ["posthoc_ema/*"],
    "TensorBoardStatisticsLogger": ["a/*/train/events.*"],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_trial_leaves_no_file_and_moves_none(tmp_path, name):
    """Lightning's own loggers and checkpoint callbacks write nothing with ``fast_dev_run``."""
    earlier = tmp_path / "a.csv"
    earlier.write_text("epoch,batch\n")
    with working_in(tmp_path):
        module = make_classifier()
        trainer = make_trainer(tmp_path, callbacks=[make(name)], enable_checkpointing=True, fast_dev_run=True)
        trainer.fit(module, classified(), classified())
        trainer.validate(module, classified(), verbose=False)
        trainer.test(module, classified(), verbose=False)
        trainer.predict(module, classified())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [earlier]


@pytest.mark.parametrize("name", NAMES)
def test_what_it_writes_and_that_a_trial_does_not_is_documented(name, reference):
    assert all(list(reference[0].rglob(pattern)) for pattern in FILES.get(name, ()))
    assert ("fast_dev_run" in kind_of(name).__doc__) == (name in FILES)


def _dictionaries(value):
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dictionaries(part)
