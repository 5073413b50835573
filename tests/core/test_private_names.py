"""The table of foreign names is whole and true, and a name that a release has renamed is one clear error at setup."""

import importlib
import inspect
import re
from collections import defaultdict
from importlib.util import find_spec

import pytest

from lightning_plugins.core.patching import MissingNameError
from lightning_plugins.core.private_names import FOREIGN_NAMES
from tests.support import conditions
from tests.support.cases import CALLBACKS, PACKAGE, PUBLIC, make
from tests.support.foreign_names import foreign_attributes, own_attributes
from tests.support.training import make_module, make_trainer

LIBRARIES = (
    "lightning.",
    "pytorch_lightning.",
    "torch.distributed",
    "torch.nn",
    "torch.optim",
    "torchmetrics",
    "deepspeed",
)
FILES = sorted(PACKAGE.rglob("*.py"))
OF_TRAINER = sorted({(entry.owner, entry.name) for entry in FOREIGN_NAMES if entry.owner.startswith("trainer")})
OF_LIBRARIES = sorted({(entry.owner, entry.name) for entry in FOREIGN_NAMES} - set(OF_TRAINER))


def folder(path):
    return path.relative_to(PACKAGE).parts[0]


def owner_of(trainer, path):
    for part in path.split(".")[1:]:
        trainer = getattr(trainer, part)
    return trainer


def imported(path):
    """Return what an import path names; ``()`` at its end: an object of that class."""
    module, _, name = path.removesuffix("()").rpartition(".")
    try:
        found = importlib.import_module(path.removesuffix("()"))
    except ModuleNotFoundError:
        found = getattr(importlib.import_module(module), name)
    return (found(1) if "Norm" in name else found()) if path.endswith("()") else found


def has(owner, name):
    """Whether a module, a class or an object has an attribute; what only appears in a run stands in the source."""
    kinds = [owner] if inspect.ismodule(owner) else (owner if inspect.isclass(owner) else type(owner)).__mro__
    ours = (kind for kind in kinds if getattr(kind, "__module__", kind.__name__).startswith(LIBRARIES))
    return hasattr(owner, name) or any(re.search(rf"\.{name}\b", source) for source in map(inspect.getsource, ours))


# --- the table ---


def test_the_table_has_every_foreign_name_of_the_source():
    own, listed, missing = defaultdict(set), {entry.name for entry in FOREIGN_NAMES}, []
    for path in FILES:
        own[folder(path)] |= own_attributes(path.read_text())
    for path in FILES:
        ours = own[folder(path)] | own["core"]
        found = sorted(set(foreign_attributes(path.read_text(), ours)))
        missing += [f"{path.relative_to(PACKAGE)}:{line} {name}" for line, name in found if name not in listed]
    assert not missing


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("trainer._results", {"_results"}),
        ("self.trainer.fit_loop._skip()", {"_skip"}),
        ("getattr(loop, '_has_run', None)", {"_has_run"}),
        ("vars(loop).get('_has_run')", {"_has_run"}),
        ("vars(loop)['_has_run']", {"_has_run"}),
        ("trainer.should_stop = True", {"should_stop"}),
        ("a, trainer.state.stage = 1, 2", {"stage"}),
        ("setattr(trainer, 'callbacks', [])", {"callbacks"}),
        ("self.patches.wrap(trainer.fit_loop, 'run', f)", {"run"}),
        ("self.patches.replace(trainer, 'min_epochs', 0)", {"min_epochs"}),
        ("read(trainer, '_results')", {"_results"}),
        ("trainer._mine", {"_mine"}),
        ("self.trainer", set()),
        ("self._mine = other._mine", set()),
        ("super()._mine", set()),
        ("row._replace(a=1)", set()),
        ("'a_b'.replace('_', ' ')", set()),
        ("trainer.callbacks", set()),
    ],
)
def test_the_search_finds_what_is_foreign(source, found):
    assert {name for _, name in foreign_attributes(source, {"_mine"})} == found


@pytest.mark.parametrize("entry", FOREIGN_NAMES, ids=lambda entry: f"{entry.used_by[0]}-{entry.owner}-{entry.name}")
def test_a_listed_name_is_used_where_the_table_says(entry):
    [user] = entry.used_by
    sources = [path.read_text() for path in FILES if folder(path) == user and path.name != "private_names.py"]
    assert any(re.search(rf"\b{entry.name}\b", source) for source in sources)
    assert entry.reason


@pytest.mark.parametrize(("path", "name"), OF_TRAINER)
def test_a_listed_name_of_the_trainer_is_installed(path, name, namespace, tmp_path):
    assert has(owner_of(make_trainer(tmp_path, namespace), path), name)


@pytest.mark.parametrize(("path", "name"), OF_LIBRARIES)
def test_a_listed_name_of_a_library_is_installed(path, name):
    if path.startswith("deepspeed.") and find_spec("deepspeed") is None:
        pytest.skip(f"{conditions.NEEDS}DeepSpeed: make test-deepspeed")
    if not conditions.OF_SOME_VERSIONS.get(name, True):
        pytest.skip(f"{conditions.NEEDS}a version that has {name}")
    for other in {path, path.replace("lightning.pytorch.", "pytorch_lightning.")}:
        assert has(imported(other), name)


def test_the_lookup_does_not_find_everything(namespace, tmp_path):
    assert not has(make_trainer(tmp_path, namespace).fit_loop, "_renamed")
    assert not has(imported("torch.Tensor"), "_renamed")


# --- a release that has renamed one ---


def rename(monkeypatch, owner, name):
    """Take an attribute from an object and its classes."""
    vars(owner).pop(name, None)
    for kind in type(owner).__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)


def techniques_of(name):
    """Return the folder of the technique that a callback belongs to."""
    return PUBLIC[name].split(".")[1]


@pytest.mark.parametrize(("path", "name"), OF_TRAINER)
def test_a_renamed_name_is_one_clear_error_at_setup(path, name, namespace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    users = {user for entry in FOREIGN_NAMES if (entry.owner, entry.name) == (path, name) for user in entry.used_by}
    asked = [found for found in sorted(CALLBACKS) if "core" in users or techniques_of(found) in users]
    trainer, module = make_trainer(tmp_path, namespace), make_module(namespace)
    trainer.strategy.connect(module)
    owner = owner_of(trainer, path)
    kind = type(owner).__name__
    rename(monkeypatch, owner, name)
    for found in asked:
        callback = make(found)
        with pytest.raises(MissingNameError, match=rf"`{kind}` of \S+ \d\S* has no attribute `{name}`, which"):
            callback.setup(trainer, module, "fit")
        assert not callback.patches
    assert asked or users == {"cli"}
