"""What is asked of DeepSpeed's engine and optimizer, of stand-ins that have what is read."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_plugins.core.zero import Zero
from lightning_plugins.core.zero_directory import full_weights, is_deepspeed_directory, step_of


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


def saved(folder, *steps, latest="8"):
    (folder / "8").mkdir()
    (folder / "latest").write_text(latest)
    for rank, step in enumerate(steps):
        torch.save({"global_steps": step}, folder / "8" / f"mp_rank_{rank:02}_model_states.pt")
    return folder


@pytest.mark.parametrize(("steps", "step"), [((8,), 8), ((8, 8), 8), (("8",), None), ((None, None), None)])
def test_a_directory_says_its_step(tmp_path, steps, step):
    assert is_deepspeed_directory(saved(tmp_path, *steps))
    assert step_of(tmp_path) == step


def test_ranks_of_several_steps_make_no_directory(tmp_path):
    with pytest.raises(ValueError, match="is incomplete: the files of its ranks are of several steps"):
        step_of(saved(tmp_path, 8, 16))


@pytest.mark.parametrize("latest", ["16", "", "../8", "\0"])
def test_what_names_no_folder_inside_is_no_directory_of_deepspeed(tmp_path, latest):
    """Whatever lies beside the directory, or in it."""
    (tmp_path / "run").mkdir()
    for folder in (saved(tmp_path, 8) / "8", saved(tmp_path / "run", 8, latest=latest)):
        torch.save({"global_steps": 8}, folder / "mp_rank_00_model_states.pt")
    assert is_deepspeed_directory(tmp_path)
    assert not is_deepspeed_directory(tmp_path / "run")
    (tmp_path / "run" / "latest").unlink()
    assert not is_deepspeed_directory(tmp_path / "run")


def test_full_weights_are_put_together_by_deepspeed_if_the_files_are_trusted(tmp_path, monkeypatch):
    whole = {"w": torch.ones(2)}
    conversion = SimpleNamespace(get_fp32_state_dict_from_zero_checkpoint=lambda path: {"path": path, **whole})
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.utils", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.utils.zero_to_fp32", conversion)
    assert full_weights(tmp_path, trust=True) == {"path": str(tmp_path), **whole}
    with pytest.raises(ValueError, match=r"holds objects of DeepSpeed.*trust=True"):
        full_weights(tmp_path, trust=False)

    def fail(path):
        raise KeyError("optimizer_state_dict")

    conversion.get_fp32_state_dict_from_zero_checkpoint = fail
    with pytest.raises(ValueError, match="is incomplete, DeepSpeed cannot put it together: 'optimizer_state_dict'"):
        full_weights(tmp_path, trust=True)
