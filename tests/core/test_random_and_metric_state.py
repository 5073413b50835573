"""Copies of random generators and of metrics, and what is put back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from lightning_plugins.core.metric_state import MetricState, load_plain_state, metrics_in, plain_state
from lightning_plugins.core.random_state import RandomState


def draws():
    return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002  # the global state is meant


def test_restored_generators_draw_the_same_numbers_every_time():
    kept = RandomState()
    first = draws()
    for _ in range(2):
        kept.restore()
        assert draws() == first
    assert draws() != first


def test_a_cpu_among_the_devices_adds_nothing():
    kept = RandomState([torch.device("cpu")])
    first = draws()
    kept.restore()
    assert draws() == first


METRICS = {
    "sums": (torchmetrics.MeanMetric, lambda: (torch.rand(4),)),
    "lists": (torchmetrics.CatMetric, lambda: (torch.rand(4),)),
    "two tensors": (torchmetrics.MeanSquaredError, lambda: (torch.rand(4), torch.rand(4))),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_a_metric_goes_on_from_its_copy_as_if_the_rest_had_not_been(name):
    kind, batch = METRICS[name]
    metric, twin = kind(), kind()
    first, last = batch(), batch()
    for each in (metric, twin):
        each.update(*first)
    kept = MetricState(metric)
    for _ in range(2):  # a second attempt finds the copy whole
        metric.update(*batch())
        metric.compute()
        kept.restore(metric)
    assert (kept.updates, metric.update_count) == (1, 1)
    assert torch.equal(metric.compute(), twin.compute())
    for each in (metric, twin):
        each.update(*last)
    assert torch.equal(metric.compute(), twin.compute())


@pytest.mark.parametrize("name", METRICS)
def test_a_plain_state_is_loaded_weights_only_and_counts_on(tmp_path, name):
    kind, batch = METRICS[name]
    metric, fresh = kind(), kind()
    for _ in range(3):
        metric.update(*batch())
    torch.save(plain_state(metric), tmp_path / "state.pt")
    fresh.update(*batch())
    fresh.compute()
    load_plain_state(fresh, torch.load(tmp_path / "state.pt", weights_only=True), torch.device("cpu"))
    assert fresh.update_count == 3
    assert torch.equal(fresh.compute(), metric.compute())


def test_metrics_in_a_module_are_found_wherever_they_are():
    class Counted(nn.Linear):
        """Has half of a metric's names."""

        update_count = 3

    inner = torchmetrics.MinMaxMetric(torchmetrics.MeanMetric())
    module = nn.ModuleDict({"layer": Counted(1, 1), "inner": nn.ModuleList([inner])})
    assert metrics_in(module) == [inner, inner._base_metric]
