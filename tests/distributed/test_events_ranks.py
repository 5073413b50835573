"""What one rank cancels is cancelled on all, under DDP and FSDP2 on two processes."""

import pytest
import torch

from tests.support.events_ranks import all_cases, without_a_meaning
from tests.support.events_runs import CANCELLED_BATCH, TRAINING_BATCH, VALIDATION, batches, make_regression
from tests.support.ranks import run_ranks

EPOCH = ["epochStart", "trainingStart", *TRAINING_BATCH * 6, "trainingEnd", *VALIDATION, "epochEnd"]
CASES = {
    "a batch": (
        ("CancelBatch", "batchStart", "training", 1),
        ["epochStart", "trainingStart", *TRAINING_BATCH, *CANCELLED_BATCH, *TRAINING_BATCH * 4, *EPOCH[20:]],
        [[0], [2], [3], [4], [5]],
    ),
    "an update": (("CancelBatch", "updateStart", "training", 1), EPOCH, [[0], [2], [3], [4], [5]]),
    "a training": (
        ("CancelTraining", "batchEnd", "training", 2),
        ["epochStart", "trainingStart", *TRAINING_BATCH * 3, "trainingEnd", *VALIDATION, "epochEnd"],
        [[0], [1], [2]],
    ),
    "a validation": (
        ("CancelValidation", "inferencePredictionEnd", "validation", 0),
        [*EPOCH[:21], *VALIDATION[:3], "validationEnd", "epochEnd"],
        [[0], [1], [2], [3], [4], [5]],
    ),
    "an epoch": (
        ("CancelEpoch", "batchStart", "training", 2),
        ["epochStart", "trainingStart", *TRAINING_BATCH * 2, "batchStart", "epochEnd"],
        [[0], [1]],
    ),
    "a fit": (
        ("CancelFit", "updateStart", "training", 2),
        ["epochStart", "trainingStart", *TRAINING_BATCH * 2, *TRAINING_BATCH[:2]],
        [[0], [1]],
    ),
}


def in_plain_torch(windows, rate):
    """Return the weights and their average after a plain loop over windows of both ranks' batches."""
    data = [list(batches(6, seed=10 + rank)) for rank in range(2)]
    module = make_regression()
    average = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for step, window in windows:
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        parts = [(rank, index) for index in window for rank in range(2)]
        for rank, index in parts:
            x, y = data[rank][index]
            (torch.nn.functional.mse_loss(module.layer(x), y) / len(parts)).backward()
        optimizer.step()
        for name, value in module.state_dict().items():
            average[name].lerp_(value, 0.5)
    return module.state_dict(), average


def close(lists, tensors):
    return all(torch.allclose(torch.tensor(lists[name]), value, atol=1e-6) for name, value in tensors.items())


def rate(step, attempted):
    """The rate of a step where 12 were planned: from the second epoch on the line ends with the shorter run."""
    if step < min(2, attempted):
        return 0.1 * step / 2
    left = 0.1 * (12 - min(step, attempted)) / 10
    return left if step < attempted else left * (attempted + 6 - step) / 6


# name -> the cancel, in windows of 3 batches; then the windows that take steps, at their positions
HELD_BACK = {
    "a window's last batch": (
        ("CancelBatch", "batchStart", "training", 2, 3),
        [(1, [3, 4, 5]), (2, [0, 1, 2]), (3, [3, 4, 5])],
    ),
    "an epoch before a batch": (
        ("CancelEpoch", "batchStart", "training", 1, 3),
        [(0, [0, 1, 2]), (1, [3, 4, 5])],
    ),
    "an epoch after a batch": (
        ("CancelEpoch", "batchEnd", "training", 1, 3),
        [(0, [0, 1, 2]), (1, [3, 4, 5])],
    ),
}


@pytest.fixture(scope="module", params=["ddp", "fsdp1", "fsdp2"])
def results(request):
    """Both ranks' results of every case, under one strategy."""
    cases = {name: case[0] for name, case in {**CASES, **HELD_BACK}.items()}
    return run_ranks(all_cases, request.param, cases)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_cancel_on_one_rank_is_one_on_all(results, case):
    _, first_epoch, windows = CASES[case]
    first, second = (found[case] for found in results)
    assert first == second  # events, weights, average, steps and the mean loss, to the last bit
    later = [] if case == "a fit" else EPOCH
    assert first["events"] == ["fitStart", *first_epoch, *later, "fitEnd"]
    assert first["outputs"] == [[2, 2]]  # predictions, also where the step itself runs as the module's forward
    assert first["training"]
    # the schedule follows attempted steps: a cancelled batch has its place, a part that was left has none
    attempted = {"a training": 3, "an epoch": 2, "a fit": 3}.get(case, 6)
    steps = [(window[0], window) for window in windows]
    if later:
        steps += [(attempted + index, [index]) for index in range(6)]
    weights, average = in_plain_torch(steps, lambda step: rate(step, attempted))
    assert close(first["weights"], weights)
    assert close(first["average"], average)
    assert first["step"] == attempted + (6 if later else 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", HELD_BACK)
def test_gradients_that_were_held_back_do_not_reach_the_next_window(results, case):
    """The batch that would have added them up over the ranks never comes."""
    first, second = (found[case] for found in results)
    assert first == second
    windows = HELD_BACK[case][1]
    weights, average = in_plain_torch(windows, lambda step: 0.1 * (step / 2 if step < 2 else (4 - step) / 2))
    assert close(first["weights"], weights)
    assert close(first["average"], average)


@pytest.mark.slow
def test_an_action_without_a_meaning_on_one_rank_is_an_error_on_all():
    for error in run_ranks(without_a_meaning):
        assert error.startswith("CancelValidation has no meaning at training batchStart.")
