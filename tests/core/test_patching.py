"""Replaced attributes: what they do, that only ours are taken back, and that a missing name is one clear error."""

import copy
import inspect
import itertools
import pickle

import lightning
import pytest
import torch

from lightning_plugins.core.patching import MissingNameError, Patches, check_exists, read


class Loop:
    limit = 3

    def __init__(self):
        self.count = 0
        self._rate = 0.5

    def run(self, by=1):
        """Count."""
        self.count += by
        return self.count

    @property
    def rate(self):
        return self._rate

    @rate.setter
    def rate(self, value):
        self._rate = value


class Slotted:
    __slots__ = ("limit",)


def shout(original, *args, **kwargs):
    return f"{original(*args, **kwargs)}!"


def ask(original, *args, **kwargs):
    return f"{original(*args, **kwargs)}?"


def test_a_wrapper_gets_the_method_and_its_arguments():
    loop, patches = Loop(), Patches()
    assert not patches
    patches.wrap(loop, "run", shout)
    assert patches
    assert loop.run(by=2) == "2!"
    assert loop.run(3) == "5!"
    assert Loop().run() == 1  # the class is not touched
    patches.undo()
    assert not patches
    assert loop.run() == 6
    assert vars(loop) == {"count": 6, "_rate": 0.5}
    patches.undo()
    assert loop.run() == 7


def test_a_wrapper_looks_like_the_method():
    loop, patches = Loop(), Patches()
    patches.wrap(loop, "run", shout)
    assert inspect.signature(loop.run) == inspect.signature(Loop().run)
    assert (loop.run.__name__, loop.run.__doc__) == ("run", "Count.")


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [(Loop(), "limit", 7), (Loop(), "count", 7), (Loop(), "rate", 7.0), (torch.nn.Linear(1, 1), "training", False)],
    ids=["of the class", "of the instance", "a property", "of a module"],
)
def test_a_value_is_put_back_where_it_was(owner, name, value):
    before, stored = getattr(owner, name), dict(vars(owner))
    patches = Patches()
    patches.replace(owner, name, value)
    assert getattr(owner, name) == value
    patches.undo()
    assert getattr(owner, name) == before
    assert vars(owner) == stored


def test_an_object_without_a_dict():
    slotted, patches = Slotted(), Patches()
    slotted.limit = 1
    patches.replace(slotted, "limit", 2)
    assert slotted.limit == 2
    patches.undo()
    assert slotted.limit == 1


def test_several_are_undone_in_reverse_order():
    loop, patches = Loop(), Patches()
    patches.wrap(loop, "run", shout)
    patches.wrap(loop, "run", ask)
    assert loop.run() == "1!?"
    patches.undo()
    assert loop.run() == 2
    assert "run" not in vars(loop)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("foreign", [False, True], ids=["ours only", "with an instance's own"])
def test_owners_undo_in_any_order(order, foreign):
    loop = Loop()
    if foreign:
        loop.run = lambda by=1: "theirs"
    stored = dict(vars(loop))
    owners, expected = [Patches() for _ in range(3)], ["a", "b", "c"]
    for patches, word in zip(owners, expected, strict=True):
        patches.wrap(loop, "run", lambda original, *args, word=word: f"{original(*args)}{word}")
        patches.replace(loop, "limit", word)
    plain = "theirs" if foreign else 1
    assert loop.run() == f"{plain}abc"
    loop.count = 0
    for index in order:
        owners[index].undo()
        expected[index] = ""
        assert loop.run() == (f"{plain}{''.join(expected)}" if any(expected) else plain)
        assert loop.limit == next((word for word in reversed(expected) if word), 3)
        loop.count = 0
    assert vars(loop) == stored


def test_a_foreign_wrapper_over_ours_survives_and_calls_the_original():
    loop, patches = Loop(), Patches()
    patches.wrap(loop, "run", shout)
    ours = loop.run
    loop.run = lambda *args: f"<{ours(*args)}>"
    assert loop.run() == "<1!>"
    theirs = loop.run
    patches.undo()
    assert loop.run is theirs
    assert loop.run() == "<2>"
    patches.wrap(loop, "run", ask)  # and once more over theirs
    assert loop.run() == "<3>?"
    patches.undo()
    assert loop.run is theirs


def test_a_foreign_value_over_ours_survives():
    loop, patches = Loop(), Patches()
    patches.replace(loop, "count", 5)
    patches.replace(loop, "rate", 5.0)
    loop.count, loop.rate = 6, 6.0
    patches.undo()
    assert (loop.count, loop.rate) == (6, 6.0)


def test_what_others_have_deleted_stays_deleted():
    loop, patches = Loop(), Patches()
    patches.wrap(loop, "run", shout)
    del loop.run
    patches.undo()
    assert loop.run() == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda patches: pickle.loads(pickle.dumps(patches))])
def test_a_copy_has_replaced_nothing(duplicate):
    loop, patches = Loop(), Patches()
    patches.wrap(loop, "run", shout)
    twin = duplicate(patches)
    assert not twin
    twin.undo()
    assert loop.run() == "1!"


def test_nothing_is_kept_alive_after_the_undo():
    import gc
    import weakref

    loop, patches = Loop(), Patches()
    patches.wrap(loop, "run", shout)
    patches.undo()
    alive = weakref.ref(loop)
    del loop
    gc.collect()
    assert alive() is None


class Mine(lightning.pytorch.Trainer):
    """A user's subclass: the library is still Lightning."""


@pytest.mark.parametrize("method", ["read", "wrap", "replace"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Loop, r"`Loop` of tests\S* has no attribute `gone`, which lightning_plugins relies on. Install a release"),
        (lambda: torch.nn.Linear(1, 1), rf"`Linear` of torch {torch.__version__.partition('+')[0]}\S* has no attr"),
        (lambda: Mine(logger=False, accelerator="cpu"), rf"`Mine` of lightning {lightning.__version__} has no attr"),
    ],
    ids=["of a user", "of torch", "of Lightning"],
)
def test_a_missing_name_is_an_error_with_the_class_and_the_release(make, message, method):
    owner, patches = make(), Patches()
    stored = dict(vars(owner))
    act = {
        "read": lambda: read(owner, "gone"),
        "wrap": lambda: patches.wrap(owner, "gone", shout),
        "replace": lambda: patches.replace(owner, "gone", 1),
    }[method]
    with pytest.raises(MissingNameError, match=message):
        act()
    assert not patches
    assert vars(owner) == stored


def test_a_class_is_named_as_itself():
    with pytest.raises(MissingNameError, match=r"`Linear` of torch .* has no attribute `gone`"):
        read(torch.nn.Linear, "gone")


def test_a_property_that_asks_for_a_missing_name_names_that_one():
    loop = Loop()
    del loop._rate
    with pytest.raises(MissingNameError, match=r"`Loop` of .* has no attribute `_rate`"):
        read(loop, "rate")


def test_a_property_is_found_without_running_it():
    class Never:
        @property
        def now(self):
            raise RuntimeError("was run")

    check_exists(Never(), "now")
    check_exists(torch.nn.Linear(1, 1), "weight")  # found by `__getattr__`
    with pytest.raises(MissingNameError, match=r"`Never` of .* has no attribute `then`"):
        check_exists(Never(), "then")
