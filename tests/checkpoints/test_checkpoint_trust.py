"""Only files that the run is known to have written are opened: no other pickle runs, no other weights get in."""

from __future__ import annotations

import copy
import os
import pathlib
import shutil
import zipfile

import pytest
import torch
from torch import nn

from lightning_plugins import CheckpointAveraging
from lightning_plugins.checkpoints import CheckpointError, read_manifest
from lightning_plugins.checkpoints.run_files import RunFiles, digest
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support import conditions
from tests.support.checkpoints_models import (
    NAMESPACES,
    VALIDATION,
    Regressor,
    assert_is_mean,
    float64_mean,
    load_state,
    loader,
    trainer as make_trainer,
)

LIGHTNING = NAMESPACES["lightning.pytorch"]


class Payload:
    """Leaves a marker when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.marker),)


class Crash(Regressor):
    at_epoch = -1

    def on_train_epoch_start(self):
        if self.current_epoch == self.at_epoch:
            raise RuntimeError("crash")


class Kind:
    """Hyper-parameters that weights-only loading refuses."""


def fit(folder, *more, crash_at=-1, hyper_parameters=None, save_top_k=-1, last=9, **options):
    torch.manual_seed(0)
    module = Crash()
    module.at_epoch = crash_at
    if hyper_parameters is not None:
        module.hparams["kind"] = hyper_parameters
    averaging = CheckpointAveraging(last=last, compare=False)
    saving = LIGHTNING.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=save_top_k)
    run = make_trainer(folder, callbacks=[*more, averaging, saving], max_epochs=5)
    run.fit(module, loader(), **VALIDATION, **options)
    return averaging


def stranger(path, step, marker=None, value=100.0):
    """Write a file that fits the run's model, with other weights and, if asked, a payload."""
    state = {name: torch.full_like(tensor, value) for name, tensor in Regressor().state_dict().items()}
    content = {"state_dict": state, "global_step": step, "epoch": 1, "pytorch-lightning_version": "2.6.6"}
    torch.save(content if marker is None else content | {"hyper_parameters": Payload(marker)}, path)


def epochs(averaging):
    return [file["epoch"] for file in read_manifest(averaging.path)["files"]]


class Plants(LIGHTNING.Callback):
    """Puts a file into the folder at the end of an epoch."""

    def __init__(self, plant):
        self.plant = plant

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.plant()


PLACES = {"of ModelCheckpoint": ("", -1), "of our own": ("averaged_pool", 1)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", [True, False])
@pytest.mark.parametrize("step", [3, 10, 1000])
def test_a_stranger_that_appears_during_a_fit_is_named_and_left_out(tmp_path, said, place, payload, step):
    below, save_top_k = PLACES[place]
    marker, path = tmp_path / "marker", tmp_path / "c" / below / "stranger.ckpt"
    plant = Plants(lambda: stranger(path, step, marker if payload else None))
    averaging = fit(tmp_path / "c", plant, save_top_k=save_top_k)
    assert not marker.exists()
    assert epochs(averaging) == [0, 1, 2, 3, 4]
    assert [line for line in said if "did not write" in line] == [
        "CheckpointAveraging: Left out, as this run did not write them: stranger.ckpt."
    ]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", [True, False])
@pytest.mark.parametrize("weights_only", [{}, pytest.param({"weights_only": True}, marks=conditions.weights_only_fit)])
def test_a_stranger_in_the_folder_of_a_resumed_run_never_runs(tmp_path, said, place, payload, weights_only):
    below, save_top_k = PLACES[place]
    folder = tmp_path / "c"
    with pytest.raises(RuntimeError, match="crash"):
        fit(folder, crash_at=3, save_top_k=save_top_k)
    marker = tmp_path / "marker"
    stranger(folder / below / "stranger.ckpt", 6, marker if payload else None)
    (newest,) = folder.glob("epoch=2*.ckpt")
    averaging = fit(folder, save_top_k=save_top_k, ckpt_path=newest, **weights_only)
    assert not marker.exists()
    assert epochs(averaging) == [0, 1, 2, 3, 4]
    assert sum("this run did not write them: stranger.ckpt." in line for line in said) == 1


def test_a_file_of_the_run_with_other_weights_under_a_new_name_is_a_stranger(tmp_path, said):
    """It has the run's name in it, copied from one of the run's own files."""

    def forge():
        content = torch.load(tmp_path / "epoch=0-step=4.ckpt", weights_only=False)
        content["state_dict"] = {name: torch.zeros_like(value) for name, value in content["state_dict"].items()}
        torch.save(content | {"global_step": 6}, tmp_path / "epoch=9.ckpt")

    assert epochs(fit(tmp_path, Plants(forge))) == [0, 1, 2, 3, 4]
    assert any("did not write them: epoch=9.ckpt." in line for line in said)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_file_that_was_replaced_since_is_left_out_with_a_warning(tmp_path, resumed):
    marker = tmp_path / "marker"

    def replace():
        stranger(tmp_path / "epoch=0-step=4.ckpt", 4, marker)

    if resumed:
        with pytest.raises(RuntimeError, match="crash"):
            fit(tmp_path, crash_at=3)
        replace()
        options = {"ckpt_path": tmp_path / "epoch=2-step=12.ckpt"}
    with pytest.warns(LightningPluginsWarning, match=r"changed since this run wrote them: epoch=0-step=4\.ckpt\."):
        averaging = fit(tmp_path, **options) if resumed else fit(tmp_path, Plants(replace))
    assert not marker.exists()
    assert epochs(averaging) == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("save_top_k", [-1, 1])
def test_the_runs_own_files_are_trusted_also_after_a_resume(tmp_path, save_top_k):
    """Their hyper-parameters need more than plain values."""
    options = {"hyper_parameters": Kind(), "save_top_k": save_top_k}
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, crash_at=3, **options)
    (newest,) = tmp_path.glob("epoch=2*.ckpt")
    averaging = fit(tmp_path, ckpt_path=newest, **conditions.LOAD_ANY_OBJECT, **options)
    assert epochs(averaging) == [0, 1, 2, 3, 4]
    assert isinstance(torch.load(averaging.path, weights_only=False)["hyper_parameters"]["kind"], Kind)


def test_a_link_to_a_file_of_the_run_is_no_stranger(tmp_path, said):
    def link():
        (tmp_path / "best.ckpt").symlink_to("epoch=0-step=4.ckpt")

    assert epochs(fit(tmp_path, Plants(link))) == [0, 1, 2, 3, 4]
    assert not any("did not write" in line for line in said)


def test_files_written_by_hand_into_the_folder_are_the_runs_own(tmp_path):
    class ByHand(LIGHTNING.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "by-hand.ckpt")

    averaging = fit(tmp_path, ByHand())
    assert [file["step"] for file in read_manifest(averaging.path)["files"]] == [4, 6, 8, 12, 16, 20]


def test_the_mean_is_that_of_the_files_that_are_left(tmp_path):
    plant = Plants(lambda: stranger(tmp_path / "stranger.ckpt", 10))
    averaging = fit(tmp_path, plant)
    paths = [tmp_path / file["path"] for file in read_manifest(averaging.path)["files"]]
    assert_is_mean(load_state(averaging.path), float64_mean(paths))


# --- digests ---


def test_a_digest_tells_any_change_of_what_decides_loading(tmp_path):
    path = tmp_path / "a.ckpt"
    content = {"state_dict": {"w": torch.ones(300)}, "hyper_parameters": {"a": 1}, "global_step": 3}
    torch.save(content, path)
    first = digest(path)
    shutil.copy(path, tmp_path / "b.ckpt")
    assert digest(tmp_path / "b.ckpt") == first
    for other in ({"global_step": 4}, {"hyper_parameters": {"a": 2}}, {"state_dict": {"w": torch.zeros(300)}}):
        torch.save(content | other, tmp_path / "b.ckpt")
        assert digest(tmp_path / "b.ckpt") != first
    whole = path.read_bytes()
    for changed in (whole + b"x", whole[:-1], b"x" + whole, whole[:200], b""):
        (tmp_path / "b.ckpt").write_bytes(changed)
        assert digest(tmp_path / "b.ckpt") != first
    with zipfile.ZipFile(path) as archive:
        (pickle_at,) = [entry.header_offset for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
    for at in (pickle_at, whole.index(b"global_step")):
        # where the table of contents says nothing else
        (tmp_path / "b.ckpt").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert digest(tmp_path / "b.ckpt") != first
    (tmp_path / "plain").write_bytes(b"no archive")
    assert digest(tmp_path / "plain") != digest(path)


def test_a_digest_reaches_to_the_end_of_a_pickle_behind_the_longest_header(tmp_path):
    path = tmp_path / "a.ckpt"
    entry = zipfile.ZipInfo("a" * 65531 + ".pkl")
    entry.extra = b"\x99\x99" + (65531).to_bytes(2, "little") + bytes(65531)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry, b"pickle")
    first = digest(path)
    path.write_bytes(path.read_bytes().replace(b"pickle", b"pickl."))
    assert digest(path) != first


def test_a_sharded_directory_has_a_digest_of_its_index_and_header(tmp_path):
    folder = tmp_path / "a.ckpt"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"index")
    torch.save({"global_step": 1}, folder / "meta.pt")
    first = digest(folder)
    torch.save({"global_step": 2}, folder / "meta.pt")
    second = digest(folder)
    (folder / ".metadata").write_bytes(b"other")
    assert len({first, second, digest(folder)}) == 3


def test_what_is_not_there_or_not_listed_is_not_among_the_files(tmp_path):
    files = RunFiles()
    files.add(tmp_path / "later.ckpt")
    assert tmp_path / "later.ckpt" not in files
    # written in the background: the first that is found there counts
    torch.save({"w": torch.ones(1)}, tmp_path / "later.ckpt")
    assert tmp_path / "later.ckpt" in files
    torch.save({"w": torch.zeros(1)}, tmp_path / "later.ckpt")
    assert tmp_path / "later.ckpt" not in files
    assert tmp_path / "other.ckpt" not in files


# --- states ---


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("run")).state_dict()


def test_a_state_goes_through_a_file_and_back(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    fresh = CheckpointAveraging()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert fresh.state_dict() == state


LIES = [None, -1, 1.5, "x", b"x", [], {}, [1], {"a": 1}, {1: 1}, True, float("nan"), [["x", -1]], "x" * 10**6, object()]
RIGHT = {"fits": [], "folder": ["x", "x" * 10**6], "files": [{}], "history": [{}]}


@pytest.mark.parametrize("key", ["fits", "folder", "files", "history"])
@pytest.mark.parametrize("lie", LIES, ids=lambda lie: repr(lie)[:12])
def test_a_state_is_checked_like_arguments(state, key, lie):
    averaging = CheckpointAveraging()
    lying = {**state, key: lie}
    if any(lie == right and type(lie) is type(right) for right in RIGHT[key]):
        averaging.load_state_dict(lying)
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        averaging.load_state_dict(lying)
    assert f"`{key}`" in str(caught.value) or "`lightning_plugins_run`" in str(caught.value)
    assert len(str(caught.value)) < 600


INNER = {
    "a name of a fit": ("fits", lambda part: part["fits"][0].__setitem__(0, "two\nlines")),
    "a long name": ("fits", lambda part: part["fits"][0].__setitem__(0, "x" * 81)),
    "an empty name": ("fits", lambda part: part["fits"][0].__setitem__(0, "")),
    "a negative step": ("fits", lambda part: part["fits"][0].__setitem__(1, -1)),
    "a step that is true": ("fits", lambda part: part["fits"][0].__setitem__(1, True)),
    "three parts": ("fits", lambda part: part["fits"][0].append(1)),
    "too many fits": ("fits", lambda part: part["fits"].extend([["a", 1]] * 10_001)),
    "a digest": ("files", lambda part: next(iter(part.values())).__setitem__(0, "0" * 63)),
    "an odd digest": ("files", lambda part: next(iter(part.values())).__setitem__(0, "G" * 64)),
    "a keeper": ("files", lambda part: next(iter(part.values())).__setitem__(1, 5)),
    "a path": ("files", lambda part: part.update({"a\0b": ["0" * 64, ""]})),
    "an empty path": ("files", lambda part: part.update({"": ["0" * 64, ""]})),
    "a negative step of the history": ("history", lambda part: part.update({-1: {}})),
    "a step as text": ("history", lambda part: part.update({"4": {}})),
    "too many steps": ("history", lambda part: part.update({step: {} for step in range(1001)})),
    "a metric as text": ("history", lambda part: next(iter(part.values())).update(val_loss="1")),
    "a metric that no float holds": ("history", lambda part: next(iter(part.values())).update(val_loss=10**400)),
    "a metric that is true": ("history", lambda part: next(iter(part.values())).update(val_loss=True)),
    "a metric without a name": ("history", lambda part: next(iter(part.values())).update({3: 1.0})),
}


@pytest.mark.parametrize("lie", INNER)
def test_single_values_of_a_state_are_checked(state, lie):
    key, change = INNER[lie]
    lying = copy.deepcopy(state)
    change(lying[key])
    with pytest.raises((TypeError, ValueError)):
        CheckpointAveraging().load_state_dict(lying)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_state_cannot_have_files_deleted_outside_our_own_folder(tmp_path):
    """Its list names a victim, with the right digest, as a file of our own."""
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path / "c", crash_at=3, save_top_k=1, last=2)
    victim = tmp_path / "victim.ckpt"
    stranger(victim, 1)
    (newest,) = (tmp_path / "c").glob("epoch=2*.ckpt")
    content = torch.load(newest, weights_only=True)
    [found] = [value for key, value in content["callbacks"].items() if key.startswith("CheckpointAveraging")]
    keeper = next(keeper for _, keeper in found["files"].values() if keeper.startswith("CheckpointAveraging"))
    found["files"][str(victim)] = [digest(victim), keeper]
    torch.save(content, newest)
    averaging = fit(tmp_path / "c", save_top_k=1, last=2, ckpt_path=newest)
    assert epochs(averaging) == [3, 4]
    assert victim.exists()


def test_a_module_is_no_part_of_the_state(state):
    assert not any(isinstance(value, (nn.Module, torch.Tensor)) for value in state.values())


def test_a_pipe_with_the_name_of_a_file_of_the_run_keeps_nothing_waiting(tmp_path):
    def exchange():
        (tmp_path / "epoch=0-step=4.ckpt").unlink()
        os.mkfifo(tmp_path / "epoch=0-step=4.ckpt")

    with pytest.warns(LightningPluginsWarning, match=r"cannot be read: epoch=0-step=4\.ckpt\."):
        assert epochs(fit(tmp_path, Plants(exchange))) == [1, 2, 3, 4]


def test_files_written_in_the_background_are_in_the_state(tmp_path):
    files = RunFiles()
    files.add(tmp_path / "a.ckpt", keeper="ModelCheckpoint")
    assert files.plain() == {}
    torch.save({"w": torch.ones(1)}, tmp_path / "a.ckpt")
    assert files.plain() == {str(tmp_path / "a.ckpt"): [digest(tmp_path / "a.ckpt"), "ModelCheckpoint"]}
    (tmp_path / "a.ckpt").unlink()
    assert files.plain() == {}


def test_trust_ends_where_the_list_ends(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "stranger.ckpt"
    stranger(path, 1, marker)
    with pytest.raises(CheckpointError, match="needs more than tensors and plain values"):
        RunFiles().open(path)
    assert not marker.exists()
    files = RunFiles()
    files.add(path)
    files.open(path)
    assert marker.exists()
