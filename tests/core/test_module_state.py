"""What a module's tensors are called, and what may be written into them."""

import warnings

import pytest
import torch
from torch import nn

from lightning_plugins.core.module_state import can_be_copied, named_tensors

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
