"""Sets of tensors beside the weights of a distributed checkpoint, written and read by one rank."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from lightning_plugins.core.checkpoint_file import CheckpointError
from lightning_plugins.core.checkpoint_keys import SAVE, SECOND_SETS, SECOND_SETS_FOLDER
from lightning_plugins.core.distributed_sets import (
    is_distributed,
    marking,
    open_sets,
    put_beside,
    refuse_cut_off,
    write_beside,
)
from lightning_plugins.core.patching import Patches
from lightning_plugins.core.save_marks import check_marks

AVERAGE = ("average", "ema")


@pytest.fixture(autouse=True)
def _alone():
    with warnings.catch_warnings():
        # torch says that it saves in a single process
        warnings.simplefilter("ignore")
        yield


class Share(torch.Tensor):
    """A tensor that is spread over ranks, of which this one has everything."""

    placements = ()

    def to_local(self):
        return self.as_subclass(torch.Tensor)


class Strategy:
    """Saves as Lightning's sharded strategies do: the weights by torch, the rest beside them."""

    is_global_zero, global_rank = True, 0

    def __init__(self):
        self.saved = []

    def broadcast(self, value):
        return value

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        self.saved.append((checkpoint, storage_options))
        weights = checkpoint.pop("state_dict")
        whole = {name: tensor.as_subclass(torch.Tensor) for name, tensor in weights.items()}
        dcp.save({"state_dict": whole}, checkpoint_id=filepath)
        torch.save(checkpoint, filepath / "meta.pt")

    def load_checkpoint(self, path, weights_only=None):
        return torch.load(path / "meta.pt", weights_only=weights_only)


class FSDPStrategy(Strategy):
    """One whose checkpoints may be directories although no tensor shows it."""


def module():
    made = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    made.requires_grad_(False)
    return made


def times(factor, names=("0.weight", "0.bias", "1.weight")):
    state = module().state_dict()
    return {name: torch.full_like(state[name], float(factor)) for name in names}


def save(path, sets, strategy=None):
    """Save a checkpoint with ``sets`` at ``path`` and return what it says beside its weights."""
    strategy = strategy or Strategy()
    weights = {name: tensor.as_subclass(Share) for name, tensor in times(1).items()}
    checkpoint = {"state_dict": weights, "global_step": 7}
    for label, tensors in sets.items():
        put_beside(strategy, checkpoint, {label: tensors})
    if not sets:
        put_beside(strategy, checkpoint, {})
    strategy.save_checkpoint(checkpoint, path)
    return strategy.load_checkpoint(path, weights_only=True)


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_sets_are_read_again_by_what_they_are(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in times(2).items()}
    said = save(tmp_path / "x", {("raw",): times(3), AVERAGE: half})
    check_marks(tmp_path / "x", said[SAVE])
    sets = open_sets(said, tmp_path / "x", module())
    assert ("raw",) in sets
    assert AVERAGE in sets
    assert ("average", "other") not in sets
    assert sets.names(("raw",)) == set(times(3))
    assert sets.names(("average", "other")) == set()
    assert equal(sets.read(("raw",)), times(3))
    # in the precision of the file, whatever the module's
    assert equal(sets.read(AVERAGE), half)
    assert sets.read(("average", "other")) is None


def test_of_the_weights_those_are_read_that_are_asked_for(tmp_path):
    sets = open_sets(save(tmp_path / "x", {("raw",): times(3)}), tmp_path / "x", module())
    assert equal(sets.read_state_dict({"0.bias"}), times(1, ["0.bias"]))
    assert equal(sets.read_state_dict({"0.bias", "1.weight", "9.weight"}), times(1, ["0.bias", "1.weight"]))
    assert sets.read_state_dict(set()) == {}


def test_what_the_module_has_no_place_for_is_named_and_not_read(tmp_path):
    other = {"0.weight": torch.ones(5, 5), "9.weight": torch.ones(2), "0.bias": times(3)["0.bias"]}
    found = open_sets(save(tmp_path / "x", {("raw",): other}), tmp_path / "x", module()).read(("raw",))
    assert {name: tensor.is_meta for name, tensor in found.items()} == {
        "0.weight": True,
        "9.weight": True,
        "0.bias": False,
    }
    assert torch.equal(found["0.bias"], other["0.bias"])


def test_a_checkpoint_that_replaces_another_takes_its_sets_away(tmp_path):
    save(tmp_path / "x", {("raw",): times(3), AVERAGE: times(2)})
    sets = open_sets(save(tmp_path / "x", {("raw",): times(4)}), tmp_path / "x", module())
    assert (AVERAGE in sets, equal(sets.read(("raw",)), times(4))) == (False, True)
    said = save(tmp_path / "x", {})
    assert not (tmp_path / "x" / SECOND_SETS_FOLDER).exists()
    assert open_sets(said, tmp_path / "x", module()) is None
    (tmp_path / "y").write_bytes(b"a file of that name")
    assert open_sets(save(tmp_path / "y", {("raw",): times(4)}), tmp_path / "y", module())


def test_what_lies_there_is_gone_before_other_ranks_know_where_to_write(tmp_path):
    """They make the folder anew, and one that vanishes meanwhile is an error of theirs."""

    class Tells(Strategy):
        def broadcast(self, value):
            self.saved.append((tmp_path / "x" / SECOND_SETS_FOLDER).exists())
            return value

    save(tmp_path / "x", {AVERAGE: times(2)})
    strategy = Tells()
    save(tmp_path / "x", {AVERAGE: times(3)}, strategy)
    assert strategy.saved[0] is False


def test_a_file_made_of_a_directory_has_its_sets_no_more(tmp_path):
    """What it repeats of the directory is no reason to refuse it."""
    said = save(tmp_path / "x", {("raw",): times(3)})
    torch.save(said, tmp_path / "file.ckpt")
    assert open_sets(said, tmp_path / "file.ckpt", module()) is None
    assert open_sets({}, tmp_path / "x", module()) is None


def test_a_save_that_did_not_come_does_not_swallow_the_next_one(tmp_path):
    """Another callback raised after the sets were put beside the checkpoint."""
    strategy = FSDPStrategy()
    put_beside(strategy, {"state_dict": {}}, {})
    whole = {"state_dict": times(1), "global_step": 9}
    strategy.save_checkpoint(whole, tmp_path / "x", storage_options="as asked")
    assert [(saved is whole, options) for saved, options in strategy.saved] == [(True, "as asked")]
    assert (tmp_path / "x" / "meta.pt").exists()
    assert not {SAVE, SECOND_SETS} & whole.keys()
    assert "save_checkpoint" not in vars(strategy)


def test_sets_that_several_ask_for_are_written_once(tmp_path):
    """An average and a carried window see the same save."""
    strategy = Strategy()
    checkpoint = {"state_dict": {"0.bias": times(1)["0.bias"].as_subclass(Share)}}
    put_beside(strategy, checkpoint, {("raw",): times(3)})
    for _ in range(2):
        write_beside(strategy, checkpoint, tmp_path / "x")
    strategy.save_checkpoint(checkpoint, tmp_path / "x")
    said = strategy.load_checkpoint(tmp_path / "x", weights_only=True)
    assert equal(open_sets(said, tmp_path / "x", module()).read(("raw",)), times(3))
    assert said[SECOND_SETS]["step"] == said[SAVE]["step"] == 0


def test_a_save_that_is_killed_between_its_sets_and_the_rest_is_refused(tmp_path):
    class Dying(Strategy):
        def save_checkpoint(self, checkpoint, filepath, storage_options=None):
            raise KeyboardInterrupt

    save(tmp_path / "x", {})
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "x", {("raw",): times(3)}, Dying())
    strategy, patches = Strategy(), Patches()
    refuse_cut_off(patches, strategy)
    with pytest.raises(CheckpointError, match=r"its folder \w+ is of step 7 and its meta\.pt of no step"):
        strategy.load_checkpoint(tmp_path / "x", weights_only=True)


def test_a_file_has_nothing_beside_it():
    strategy, checkpoint = Strategy(), {"state_dict": times(1)}
    assert not is_distributed(checkpoint)
    put_beside(strategy, checkpoint, {("raw",): times(3)})
    with marking(strategy, checkpoint):
        assert dcp.save.__module__.startswith("torch.")
    assert vars(strategy).keys() == {"saved"}
    assert checkpoint.keys() == {"state_dict"}


def test_only_a_save_into_a_directory_is_marked(tmp_path):
    original, checkpoint = dcp.save, {"global_step": 8}
    with marking(FSDPStrategy(), checkpoint):
        # as a plugin may do beside the checkpoint
        dcp.save(times(2), storage_writer=dcp.FileSystemWriter(tmp_path / "own"))
        dcp.save(times(2), checkpoint_id=tmp_path / "planned", planner=dcp.DefaultSavePlanner())
        assert SAVE not in checkpoint
        dcp.save({"state_dict": times(1)}, checkpoint_id=tmp_path / "x")
    assert dcp.save is original
    check_marks(tmp_path / "x", checkpoint[SAVE])
    assert checkpoint[SAVE]["step"] == 8
    for name in ("own", "planned"):
        check_marks(tmp_path / name, None)
    found = {name: torch.zeros_like(tensor) for name, tensor in times(2).items()}
    dcp.load(found, checkpoint_id=tmp_path / "own")
    assert equal(found, times(2))


def test_a_save_that_several_mark_has_one_mark(tmp_path):
    checkpoints = {"global_step": 8}, {"global_step": 8}
    with marking(FSDPStrategy(), checkpoints[0]), marking(FSDPStrategy(), checkpoints[1]):
        dcp.save({"state_dict": times(1)}, checkpoint_id=tmp_path / "x")
    (said,) = (checkpoint[SAVE] for checkpoint in checkpoints if SAVE in checkpoint)
    check_marks(tmp_path / "x", said)


def test_sets_of_two_saves_are_refused(tmp_path):
    """Both of the same step, as two runs write them."""
    said, _ = (save(tmp_path / name, {("raw",): times(factor)}) for factor, name in ((3, "x"), (4, "y")))
    part = Path(SECOND_SETS_FOLDER, "__0_0.distcp")
    shutil.copy(tmp_path / "y" / part, tmp_path / "x" / part)
    with pytest.raises(CheckpointError, match=r"its __0_0\.distcp and .* are of different saves"):
        open_sets(said, tmp_path / "x", module())


def test_a_directory_that_was_cut_off_is_refused_before_it_is_read(tmp_path):
    strategy, patches = Strategy(), Patches()
    said = save(tmp_path / "x", {("raw",): times(3)})
    refuse_cut_off(patches, strategy)
    assert strategy.load_checkpoint(tmp_path / "x", weights_only=True) == said
    (tmp_path / "x" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="is incomplete"):
        strategy.load_checkpoint(tmp_path / "x", weights_only=True)
    patches.undo()
    assert strategy.load_checkpoint(tmp_path / "x", weights_only=True) == said
