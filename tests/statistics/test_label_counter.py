"""The short way of the plainest batches: as few operations as can be, and the counts of scikit-learn and NumPy."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_plugins.statistics.metric_names import statistic_set
from lightning_plugins.statistics.running import PhaseSums
from tests.statistics.test_statistics_running import joined, random_batches, run, value_of


class Operations(TorchDispatchMode):
    """Names every operation of torch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_batch_of_scores_beside_class_numbers_takes_eight_operations():
    sums = run(["accuracy"], random_batches(1, 9, sizes=(4, 4)))
    (_, predictions, targets), loss = random_batches(2, 9, sizes=(4,))[0], torch.tensor(0.5)
    with Operations() as operations:
        sums.update(loss, predictions, targets)
        sums.state_now()
        values = sums.values_now()
    assert operations.names == ["argmax", "eq", "addmv", "_to_copy", "add", "unbind", "div", "div"]
    assert set(values) == {"loss", "accuracy"}


@pytest.mark.parametrize("seed", range(5))
def test_batches_of_any_size_in_turn_are_counted_as_scikit_learn_counts_them(seed):
    batches = random_batches(seed, 9, sizes=(5, 5, 8, 5, 1, 4097, 3))
    generator = torch.Generator().manual_seed(seed)
    for _, _, targets in batches:
        # labels that do not count, and one that is no class and counts as wrong
        targets[torch.rand(len(targets), generator=generator) < 0.3] = -100
        targets[:1] = 9
    sums = run(["accuracy", "top5_accuracy"], batches)
    scores, labels = joined(batches)
    kept = labels != -100
    found = sums.labels.layout, sums.state()["sums"][1:]
    best = np.argsort(-scores[kept], axis=1)[:, :5]
    wanted = [kept.sum(), (scores.argmax(1) == labels)[kept].sum(), (best == labels[kept][:, None]).sum()]
    assert found == ((("labels", 1), ("right", 1), ("right_of_5", 1)), [float(number) for number in wanted])


def test_counting_goes_on_outside_of_inference_mode_and_in_a_copy():
    batches = random_batches(3, 9, sizes=(4, 4, 4, 4))
    sums = PhaseSums(statistic_set(["accuracy", "top5_accuracy"]))
    with torch.inference_mode():
        for _, predictions, targets in batches[:2]:
            sums.update(torch.tensor(1.0), predictions, targets)
    copies = sums, copy.deepcopy(sums), pickle.loads(pickle.dumps(sums))
    for each in copies:
        for _, predictions, targets in batches[2:]:
            each.update(torch.tensor(1.0), predictions, targets)
    scores, labels = joined(batches)
    wanted = accuracy_score(labels, scores.argmax(1))
    assert [value_of(each, "accuracy") for each in copies] == [wanted] * 3


def test_a_state_before_a_batch_is_not_changed_by_it():
    sums = run(["accuracy"], random_batches(1, 9, sizes=(4, 4)))
    before = sums.state_now()
    counts = before.counts.tolist()
    for _, predictions, targets in random_batches(2, 9, sizes=(4, 4)):
        sums.update(torch.tensor(0.5), predictions, targets)
    assert before.counts.tolist() == counts
    assert sums.state_now().counts.tolist() != counts
