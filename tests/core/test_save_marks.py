"""What the marks of a save tell, and that what a damaged checkpoint says of them is checked."""

import shutil
import warnings

import pytest
import torch
from torch.distributed.checkpoint import save

from lightning_plugins.core.checkpoint_file import CheckpointError
from lightning_plugins.core.save_marks import check_marks, new_save, write_marked
from lightning_plugins.core.sharded_directory import ShardedTensors

KEY = "lightning_plugins_save"
WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


@pytest.fixture(autouse=True)
def _alone():
    with warnings.catch_warnings():
        # torch says that it saves in a single process
        warnings.simplefilter("ignore")
        yield


def marked(path, step=8, weights=WEIGHTS):
    return write_marked(save, {"model": weights}, path, save=new_save(), step=step, rank=0)


def test_what_is_marked_is_whole_and_holds_what_was_saved(tmp_path):
    said = marked(tmp_path / "x")
    check_marks(tmp_path / "x", said)
    found = ShardedTensors(tmp_path / "x", ("model",))
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in WEIGHTS.items())
    assert found.specs.keys() == WEIGHTS.keys()
    # only Lightning's meta.pt is to say it
    assert said["save"] not in (tmp_path / "x" / ".metadata").read_bytes().decode("latin-1")


def test_every_file_of_another_save_is_seen(tmp_path):
    said, other = marked(tmp_path / "x"), marked(tmp_path / "y", 16)
    with pytest.raises(CheckpointError, match=r"its \.metadata and meta\.pt, of step 16, are of different saves"):
        check_marks(tmp_path / "x", other)
    shutil.copy(tmp_path / "y" / "__0_0.distcp", tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"its __0_0\.distcp and meta\.pt, of step 8, are of different saves"):
        check_marks(tmp_path / "x", said)
    (tmp_path / "x" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"its __0_0\.distcp does not exist"):
        check_marks(tmp_path / "x", said)
    (tmp_path / "x" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"it has no \.metadata"):
        check_marks(tmp_path / "x", said)


def test_an_index_is_gone_before_the_first_file_of_another_save_comes(tmp_path):
    def dying(state, checkpoint_id):
        assert sorted(path.name for path in checkpoint_id.iterdir()) == ["__0_0.distcp"]
        raise KeyboardInterrupt

    marked(tmp_path / "x")
    with pytest.raises(KeyboardInterrupt):
        write_marked(dying, {}, tmp_path / "x", save=new_save(), step=9, rank=0)


def test_an_index_with_marks_wants_to_be_spoken_of(tmp_path):
    marked(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"its \.metadata is of a save of which there is no meta\.pt"):
        check_marks(tmp_path / "x", None)


def test_nothing_is_asked_of_a_directory_without_marks(tmp_path):
    """Nor can anything be seen: files of two such saves are alike."""
    for name, weights in (("x", WEIGHTS), ("y", {name: tensor + 1 for name, tensor in WEIGHTS.items()})):
        save({"model": weights}, checkpoint_id=tmp_path / name)
    shutil.copy(tmp_path / "y" / "__0_0.distcp", tmp_path / "x")
    check_marks(tmp_path / "x", None)
    assert torch.equal(ShardedTensors(tmp_path / "x", ("model",)).tensor("b"), WEIGHTS["b"] + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: [], r"must say which save it is of, got \[\]"),
        (lambda said: {"version": 1}, "must say which save it is of"),
        (lambda said: {**said, "version": 2}, "must be of version 1, got 2: the checkpoint was written by another"),
        (lambda said: {**said, "version": True}, "must be of version 1, got True"),
        (lambda said: {**said, "save": ""}, "must name its save and step"),
        (lambda said: {**said, "step": "8"}, "must name its save and step"),
        (lambda said: {**said, "index": None}, "are of different saves"),
        (lambda said: {**said, "places": None}, "must name places in its files, got None"),
        (lambda said: {**said, "places": [["../x/__0_0.distcp", 0, 9]]}, "must name places in its files"),
        (lambda said: {**said, "places": [["\0", 0, 9]]}, "must name places in its files"),
        (lambda said: {**said, "places": [["__0_0.distcp", -1, 9]]}, "must name places in its files"),
        (lambda said: {**said, "places": [["__0_0.distcp", 0, 2.5]]}, "must name places in its files"),
        (lambda said: {**said, "places": [["__0_0.distcp", 0, 10**9]]}, "must name short places"),
        (lambda said: {**said, "places": said["places"] * 2}, "must name short places, one in a file"),
        (lambda said: {**said, "places": [["__0_0.distcp", 10**12, 9]]}, "are of different saves"),
    ],
)
def test_what_is_said_of_them_is_checked(tmp_path, change, message):
    said = marked(tmp_path / "x")
    with pytest.raises(CheckpointError, match=message) as error:
        check_marks(tmp_path / "x", change(said))
    assert KEY in str(error.value) or "is incomplete" in str(error.value)
    assert "\n" not in str(error.value)
