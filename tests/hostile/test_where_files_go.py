"""Nothing is written, moved or removed outside the directories that were named, whatever else is called what."""

import os
import pickle
import shutil
import stat
import struct
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from lightning_plugins import (
    EMA,
    CheckpointAveraging,
    ClassificationReport,
    CSVStatisticsLogger,
    GradientAccumulation,
    LearningRateScheduler,
    PostHocEMA,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    WarmupCosine,
    average_checkpoints,
    extract_weights,
    synthesize_ema,
)
from lightning_plugins.checkpoints import CheckpointError
from lightning_plugins.core.files import write_state_dict
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.ema.snapshots import SnapshotContents, write_frozen, write_snapshot
from lightning_plugins.statistics.csv_file import CSVFile
from tests.support import conditions
from tests.support.audit_events import listening, outside, paths_changed
from tests.support.damaged_cases import command, write_whole_files
from tests.support.training import loader, make_module, make_trainer

NAMES = ["../../evil", "/evil", "a/b", "x\ny", "..", ".", "~", "%s", "{0}", "con", "\\", "a,b", '"', " "]
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The directory that is given; beside it nothing may change."""
    folder = tmp_path / "given"
    (folder / "tmp").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))  # where Lightning prepares a checkpoint
    return folder


def module():
    """A module that logs numbers under hostile names and says hostile things of itself."""
    made = make_module(momentum=0.9)
    made.save_hyperparameters({"../../evil": "/evil", "x\ny": "../evil"})

    def validation_step(batch, batch_idx):
        loss = made.layer(batch).pow(2).mean()
        for number, name in enumerate(NAMES):
            made.log(f"val_{name}", loss + number)
            made.log(name, loss + number)
        made.log("val_loss", loss)
        return {"loss": loss, "preds": torch.zeros(1, dtype=torch.long), "target": torch.zeros(1, dtype=torch.long)}

    made.validation_step = validation_step
    return made


def callbacks(folder, **options):
    return [
        GradientAccumulation(2),
        LearningRateScheduler(WarmupCosine("20%")),
        EMA(0.9, name="../../evil/ema"),
        PostHocEMA(every_n_steps=2, **options),
        CSVStatisticsLogger(folder / "log.csv"),
        TensorBoardStatisticsLogger(folder / "tensorboard"),
        ClassificationReport(2, target_names=["../evil", "x\ny"], path=folder / "report-{phase}-{epoch}.txt"),
        CheckpointAveraging(last=2),
        pl.callbacks.ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=1),
    ]


def fit(folder, *, epochs=2, ckpt_path=None, extra=(), **options):
    stack = [*callbacks(folder, **options), *extra]
    trainer = make_trainer(folder, callbacks=stack, max_epochs=epochs, enable_checkpointing=True)
    with listening() as events:
        trainer.fit(module(), loader(6), loader(2), ckpt_path=ckpt_path, **conditions.LOAD_ANY_OBJECT)
    return events


def test_a_whole_stack_stays_in_its_directories_whatever_things_are_called(tmp_path, given):
    events = fit(given)
    assert outside(events, given) == []
    assert len({path for path in paths_changed(events) if path.is_file()}) > 8  # and it wrote
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_other_columns_are_quoted_and_stay_one_row(given):
    columns = ["val_loss", "x\ny", "a,b", '"']
    recorder = StatisticsRecorder()
    logger = CSVStatisticsLogger(given / "log.csv", columns=columns)
    with pytest.raises(MisconfigurationException, match="`columns` must name some of"):
        make_trainer(given, callbacks=[recorder, logger]).fit(module(), loader(4), loader(2))


@pytest.mark.parametrize("output", ["../averaged.ckpt", "sub/../averaged.ckpt", "absolute"])
def test_an_output_that_leads_upwards_is_the_users_own_choice(given, output):
    """A relative output lies in the checkpoint directory; one that leads out of it was written by the user."""
    target = given / "elsewhere" / "averaged.ckpt" if output == "absolute" else given / "checkpoints" / output
    (given / "elsewhere").mkdir()
    (given / "checkpoints" / "sub").mkdir(parents=True)
    averaging = CheckpointAveraging(last=2, output=str(target) if output == "absolute" else output, compare=False)
    saving = pl.callbacks.ModelCheckpoint(given / "checkpoints")
    trainer = make_trainer(given, callbacks=[averaging, saving], max_epochs=2, enable_checkpointing=True)
    with listening() as events:
        trainer.fit(make_module(), loader(2))
    assert target.is_file()
    assert outside(events, given / "checkpoints", target.resolve().parent, given / "tmp") == []


@pytest.fixture
def stopped(given):
    """A full checkpoint of a run that has an epoch to go."""
    fit(given, epochs=1)
    path = given / "checkpoints" / "last.ckpt"
    return path, torch.load(path, weights_only=False)


def states(content, kind):
    return [state for key, state in content["callbacks"].items() if key.startswith(kind)]


@pytest.mark.parametrize("stamp", ["../../evil", "/evil", "..", "a/../b", "a/b", "a", "a\0", 5, None, "x" * 5000])
def test_a_checkpoint_does_not_choose_where_tensorboard_files_go(tmp_path, given, stopped, stamp):
    path, content = stopped
    for state in states(content, "TensorBoardStatisticsLogger"):
        state["stamp"] = stamp if stamp != "/evil" else str(tmp_path / "evil")
    torch.save(content, path)
    before = sorted(tmp_path.iterdir())
    with listening() as events, pytest.raises((MisconfigurationException, OSError)):
        fit(given, ckpt_path=path)
    assert outside(events, given) == []
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_does_not_choose_where_snapshots_go(tmp_path, given, stopped, caplog):
    path, content = stopped
    evil = tmp_path / "evil" / "posthoc_ema"
    evil.mkdir(parents=True)
    (evil / "step=0000009999.pt").write_text("somebody else's")
    for state in states(content, "PostHocEMA"):
        assert state["directory"] == str(given / "posthoc_ema")
        state["directory"] = str(evil)
    torch.save(content, path)
    with caplog.at_level("INFO"):
        events = fit(given, ckpt_path=path)
    assert outside(events, given) == []
    assert [file.name for file in evil.iterdir()] == ["step=0000009999.pt"]
    assert f"are said to lie in {evil}, neither beside" in caplog.text
    assert (given / "posthoc_ema" / "step=0000000006.pt").is_file()


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_run_that_was_moved_goes_on_beside_its_checkpoint(tmp_path, given, stopped, monkeypatch):
    moved = tmp_path / "moved"
    given.rename(moved)
    monkeypatch.setattr(tempfile, "tempdir", str(moved / "tmp"))
    events = fit(moved, ckpt_path=moved / "checkpoints" / "last.ckpt")
    assert outside(events, moved) == []
    assert synthesize_ema(moved / "posthoc_ema", 0.08)["layer.weight"].shape == (2, 4)
    assert not given.exists()


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_run_of_the_next_version_goes_on_where_the_first_wrote(given):
    """Lightning's loggers give a resumed run a directory of its own; the snapshots stay together in the first one's."""
    for epochs in (1, 2):
        found = sorted(given.rglob("*.ckpt"))
        trainer = make_trainer(
            given,
            callbacks=[PostHocEMA(every_n_steps=2)],
            logger=pl.loggers.CSVLogger(given),
            enable_checkpointing=True,
            max_epochs=epochs,
        )
        trainer.fit(make_module(), loader(4), ckpt_path=found[0] if found else None)
    assert sorted(path.name for path in given.rglob("version_*")) == ["version_0", "version_1"]
    names = sorted(path.name for path in (given / "lightning_logs" / "version_0" / "posthoc_ema").iterdir())
    assert names == [f"step={step:010d}.pt" for step in (2, 4, 6, 8)]


@pytest.mark.parametrize("name", ["../../evil", "/evil", "", "..", "sub/../../evil.distcp", "link"])
def test_an_index_that_points_outside_is_refused(tmp_path, given, name):
    folder, evil = given / "sharded", tmp_path / "evil.distcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"state_dict": {"w": torch.ones(2)}}, checkpoint_id=folder)
    (folder / "__0_0.distcp").rename(evil)
    (folder / "link").symlink_to(evil)
    index = pickle.loads((folder / ".metadata").read_bytes())
    place = str(evil) if name == "/evil" else name
    for key, info in index.storage_data.items():
        index.storage_data[key] = _StorageInfo(place, info.offset, info.length)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    torch.save({"w": torch.ones(2)}, given / "good.ckpt")
    with listening() as events, pytest.raises(CheckpointError, match=r"outside|incomplete|cannot be read"):
        average_checkpoints([folder, given / "good.ckpt"])
    opened = [Path(arguments[0]) for event, arguments in events if event == "open" and isinstance(arguments[0], str)]
    assert evil not in [path.resolve() for path in opened]


def test_names_inside_files_name_no_files(tmp_path, given):
    """Tensors, archives, manifests and snapshots with names of paths: they are names and stay names."""
    tensors = {name: torch.full((2,), float(number)) for number, name in enumerate(NAMES)}
    ema = {"version": 1, "state_dict": "raw", "name": None, "averages": {"../../evil": tensors}}
    manifest = {"version": 1, "files": [{"path": "../../evil", "weight": 1.0}]}
    for step in (1, 2):
        content = {"state_dict": tensors, "global_step": step, "epoch": step, "lightning_plugins_ema": ema}
        torch.save({**content, "hyper_parameters": {"path": "/evil"}, "x": manifest}, given / f"{step}.ckpt")
    with listening() as events:
        for suffix in (".ckpt", ".safetensors"):
            path = average_checkpoints([given / "1.ckpt", given / "2.ckpt"], given / f"averaged{suffix}")
            assert path.is_file()
        average_checkpoints([given / "averaged.ckpt", given / "averaged.safetensors"], given / "twice.ckpt")
        for suffix in (".pt", ".safetensors"):
            write_state_dict(extract_weights(given / "1.ckpt", name="../../evil"), given / f"extracted{suffix}")
        command("average", given, "--output", given / "all.ckpt")
        command("inspect", given / "1.ckpt")
        command("extract", given / "1.ckpt", "--weights", "average", "--name", "../../evil", "--output", given / "e.pt")
    assert outside(events, given) == []
    assert torch.load(given / "e.pt")["../../evil"].tolist() == [0.0, 0.0]
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_commands_write_what_they_are_told_to_and_nothing_else(tmp_path, given):
    write_whole_files(given)
    command("plot", given / "log.csv")  # matplotlib makes its list of fonts on first use
    out = tmp_path / "out"
    out.mkdir()
    with listening() as events:
        command("average", given / "1.ckpt", given / "2.ckpt", "--output", out / "a.ckpt")
        command("extract", given / "1.ckpt", "--weights", "raw", "--output", out / "e.pt")
        command("synthesize", given / "snapshots", "--sigma-rel", 0.1, "--output", out / "s.pt")
        command("schedule", "WarmupCosine('5%')", "--total", 100, "--output", out / "s.png")
        command("schedule", "WarmupCosine('5%')", "--total", 100)
        command("plot", given / "log.csv", "--output", out / "p.png")
        command("inspect", given / "1.ckpt")
    assert outside(events, out) == []
    assert sorted(path.name for path in out.iterdir()) == ["a.ckpt", "e.pt", "p.png", "s.png", "s.pt"]


def test_a_foreign_event_file_does_not_stop_the_run(given):
    """A name with letters where TensorBoard puts the seconds used to be an error about int()."""
    from lightning_plugins.statistics.event_file import EventFile

    for name in ("1x.host", "1.", "99999999999999999999999999.host", "1"):
        (given / f"events.out.tfevents.{name}").write_bytes(struct.pack("<Q", 0))
    file = EventFile(given)
    file.add([(1, 0.0, {"loss": 1.0})])
    file.close()
    assert len(list(given.glob("events.*"))) == 5


def test_the_ear_hears_every_kind_of_change(tmp_path, given):
    """The proof of the proof: each way to change a file outside is found.

    But for files that torch's and safetensors' own code opens: those are renamed, which is heard, and looked for.
    """
    evil = tmp_path / "evil"
    ways = [
        evil.mkdir,
        lambda: (evil / "a").write_text("x"),
        lambda: (evil / "a").rename(evil / "b"),
        lambda: (evil / "b").replace(evil / "c"),
        lambda: (evil / "d").symlink_to(given),
        lambda: os.close(os.open(evil / "e", os.O_CREAT | os.O_WRONLY)),
        lambda: (evil / "e").chmod(0o600),
        (evil / "e").unlink,
        lambda: shutil.rmtree(evil),
    ]
    for way in ways:
        with listening() as events:
            way()
        assert outside(events, given)
    with listening() as events:
        (given / "a").write_text("x")
        (given / "a").read_text()
    assert outside(events, given) == []


@pytest.mark.parametrize("permissions", [0o600, 0o640])
def test_a_private_log_stays_private(given, permissions):
    """A new column rewrites the file, and a resume cuts rows off: both by whole files, with the mode of the old one."""
    path = given / "log.csv"
    file = CSVFile(path)
    file.add([{"epoch": "1", "batch": str(batch), "phase": "train"} for batch in (1, 2, 3)])
    path.chmod(permissions)
    file.add([{"epoch": "1", "batch": "4", "phase": "train", "late": "1"}])
    file.close()
    assert stat.S_IMODE(path.stat().st_mode) == permissions
    again = CSVFile(path)
    again.resume({"rows": 2, "last": ["1", "2", "train"]})
    again.close()
    assert stat.S_IMODE(path.stat().st_mode) == permissions
    assert len(path.read_text().splitlines()) == 3


def test_snapshots_follow_no_planted_links(given):
    """The name under which a snapshot is written first cannot be known before; a link at its place is replaced."""
    victim = given / "victim"
    victim.write_text("precious")
    folder = given / "snapshots"
    folder.mkdir()
    for name in ("step=0000000005.pt", ".step=0000000005.pt.part", ".step=0000000005.pt.tmp", "frozen.pt"):
        (folder / name).symlink_to(victim)
    write_snapshot(folder, 5, [0.05], SnapshotContents([{"w": torch.ones(2)}], {}))
    write_frozen(folder, {"f": torch.ones(1)})
    assert victim.read_text() == "precious"
    assert not (folder / "step=0000000005.pt").is_symlink()
    assert synthesize_ema(folder, 0.05)["w"].tolist() == [1, 1]
