"""Every step's gradient is that of the mean over its whole window."""

import dataclasses

import pytest
import torch

from tests.support.accumulation_cases import BOUND, CASES
from tests.support.accumulation_runs import errors_of, run_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_whole_window(name, dtype):
    case = dataclasses.replace(CASES[name], dtype=dtype)
    steps, global_step = run_case(case)
    assert global_step == len(case.windows)
    assert max(errors_of(case, steps, ranks=1)) <= BOUND[dtype]
    assert max(errors_of(case, steps, ranks=1, what="applied")) <= BOUND[dtype]
