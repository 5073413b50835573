"""What is asked of DeepSpeed's engine and optimizer, of stand-ins that have what is read."""

from types import SimpleNamespace

import pytest

from lightning_plugins.core.zero import Zero


class Optimizer:
    """The optimizer of stage 3, as far as weights are made anew from the masters; writes down what is called."""

    fp16_groups = ("first", "second")

    def __init__(self, persistent):
        self.called = []
        self.persistent_parameters = [
            SimpleNamespace(
                all_gather=lambda all_, number=number: self.called.append((f"gather from {number}", len(all_)))
            )
            for number in range(persistent)
        ]

    def _partition_all_parameters(self):
        self.called.append("partition")

    def _reassign_or_swap_out_partitioned_parameters(self, number):
        self.called.append(("reassign", number))

    def invalidate_secondary_tensor(self):
        self.called.append("invalidate")


@pytest.mark.parametrize("persistent", [0, 1, 3])
def test_weights_are_made_anew_as_after_a_step_of_stage_three(persistent):
    optimizer = Optimizer(persistent)
    Zero(SimpleNamespace(optimizer=optimizer)).publish()
    gathered = [("gather from 0", persistent)] if persistent else []
    assert optimizer.called == ["partition", ("reassign", 0), ("reassign", 1), *gathered, "invalidate"]


def test_stages_one_and_two_do_it_by_themselves():
    called = []
    Zero(SimpleNamespace(optimizer=SimpleNamespace(update_lp_params=lambda: called.append("update")))).publish()
    assert called == ["update"]


@pytest.mark.parametrize(
    ("attributes", "offloads"),
    [
        ({}, False),
        ({"cpu_offload": True}, True),
        ({"offload_optimizer": True}, True),
        ({"cpu_offload": False, "offload_optimizer": False}, False),
    ],
)
def test_what_is_kept_on_the_host_is_known(attributes, offloads):
    assert Zero(SimpleNamespace(optimizer=SimpleNamespace(**attributes))).offloads is offloads


def test_steps_that_overflowed_did_not_change_the_weights():
    zero = Zero(SimpleNamespace(optimizer=None, global_steps=7, skipped_steps=2))
    assert (zero.attempted, zero.applied) == (7, 5)
