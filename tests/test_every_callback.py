"""What every callback promises, tested from its row in ``tests/support/cases.py``."""

import copy
import inspect
import pickle

import lightning.pytorch
import pytest
import pytorch_lightning

from tests.support.cases import CALLBACKS, callback_names, make

NAMES = sorted(CALLBACKS)


def test_every_callback_has_its_row():
    assert callback_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_callback_of_both_names_of_lightning(name):
    assert isinstance(make(name), lightning.pytorch.Callback)
    assert isinstance(make(name), pytorch_lightning.Callback)


@pytest.mark.parametrize("name", NAMES)
def test_its_arguments_are_annotated(name):
    for parameter in inspect.signature(type(make(name))).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("name", NAMES)
def test_two_have_different_keys_and_copies_the_same(name):
    first, second = make(name, 0), make(name, 1)
    assert first.state_key != second.state_key
    assert make(name).state_key == first.state_key
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert type(twin) is type(first)
        assert twin.state_key == first.state_key
        assert twin.state_dict() == first.state_dict()
