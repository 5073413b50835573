"""What a module's tensors are called, and what may be written into them."""

import warnings

import pytest
import torch
from torch import nn

from lightning_plugins.core.module_state import can_be_copied, device_name, named_tensors, uncompiled

REAL, COMPLEX = torch.zeros(2), torch.zeros(2, dtype=torch.complex64)
with warnings.catch_warnings():  # torch will remove them
    warnings.simplefilter("ignore")
    QUANTIZED = torch.quantize_per_tensor(REAL, 1.0, 0, torch.qint8)


@pytest.mark.parametrize(
    ("tensor", "into", "fits"),
    [
        (REAL, REAL, True),
        (REAL.bfloat16(), REAL, True),
        (REAL, COMPLEX, True),
        (COMPLEX, COMPLEX, True),
        (COMPLEX, REAL, False),
        (REAL.to("meta"), REAL, False),
        (REAL.to_sparse(), REAL, False),
        (QUANTIZED, REAL, False),
    ],
    ids=["real", "narrow", "real into complex", "complex", "complex into real", "meta", "sparse", "quantized"],
)
def test_what_may_be_copied_keeps_its_numbers(tensor, into, fits):
    assert can_be_copied(tensor, into=into) is fits


class Secretive(nn.Module):
    """Leaves one of its parameters out of its state dict."""

    def __init__(self):
        super().__init__()
        self.shown, self.hidden = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.tied = self.shown
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}hidden"]


def test_a_tensor_is_called_as_its_state_dict_does_or_by_where_it_lies():
    found = {one.described: (one.names, one.is_buffer) for one in named_tensors(nn.Sequential(Secretive()))}
    assert found == {
        "0.shown": (("0.shown", "0.tied"), False),
        "Secretive.hidden": ((), False),
        "0.count": (("0.count",), True),
    }


class Detached(nn.Module):
    """Has a state dict of its own, of other objects over the same memory, as old ones do."""

    def __init__(self, entry):
        super().__init__()
        self.weight, self.empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))
        self.entry = entry

    def state_dict(self):
        return {"renamed": self.entry(self.weight), "nothing": torch.ones(0), "mode": "x"}


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        (lambda weight: weight, ("renamed",)),
        (lambda weight: weight.detach(), ("renamed",)),
        (lambda weight: weight.data, ("renamed",)),
        (lambda weight: weight.detach().clone(), ()),
        (lambda weight: weight.detach()[:2], ()),
        (lambda weight: weight.detach().view(torch.int32), ()),
    ],
    ids=["itself", "detached", "data", "copy", "part", "other type"],
)
def test_a_tensor_is_known_by_its_memory_where_a_state_dict_has_other_objects(entry, names):
    module = Detached(entry)
    assert [one.names for one in named_tensors(module)] == [names, ()]


def test_where_a_tensor_lies_is_where_it_can_be_replaced():
    found = named_tensors(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False)))
    names = ["0.weight", "0.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight"]
    assert [one.described for one in found] == names
    for one in found:
        (place,) = one.places
        assert place.table[place.key] is one.tensor


def test_a_compiled_module_is_the_one_inside():
    module = nn.Linear(2, 2)
    compiled = torch.compile(module, backend="eager")
    assert uncompiled(compiled) is module
    assert uncompiled(module) is module
    module._orig_mod = "a user's own"
    assert uncompiled(module) is module


def test_devices_are_named():
    assert [device_name(device) for device in (None, "cpu", torch.device("cuda", 1))] == [None, "cpu", "cuda:1"]
    for wrong in ("gpu", 1.5, object()):
        with pytest.raises(ValueError, match="`device` must be the name of a device such as 'cpu', got"):
            device_name(wrong)
