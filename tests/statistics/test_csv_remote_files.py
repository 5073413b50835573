"""CSV files on file systems that cannot append."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_plugins import CSVStatisticsLogger, StatisticsRecorder
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.statistics_runs import (
    fit,
    read,
    resumable,
    without_time,
)

METRICS = ["accuracy", "top5_accuracy", "perplexity"]


@pytest.mark.parametrize("every", ["batch", "epoch"])
def test_a_file_on_a_file_system_that_cannot_append(every):
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/runs/remote.csv", b"precious\n")
    url = "memory://runs/remote.csv"
    fit([CSVStatisticsLogger(url, every=every), StatisticsRecorder(["accuracy"])])
    fit([CSVStatisticsLogger("local.csv", every=every), StatisticsRecorder(["accuracy"])])
    Path("fetched.csv").write_bytes(system.cat("/runs/remote.csv"))
    assert without_time("fetched.csv") == without_time("local.csv")
    assert system.cat("/runs/remote.1.csv") == b"precious\n"
    system.rm("/runs", recursive=True)


def test_a_remote_file_is_resumed(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    url = "memory://again/remote.csv"
    checkpoint = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=2, save_top_k=1)
    fit([CSVStatisticsLogger(url), checkpoint], enable_checkpointing=True, max_epochs=1, data=resumable())
    again = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=2, save_top_k=1)
    fit([CSVStatisticsLogger(url), again], ckpt_path=tmp_path / "mid.ckpt", enable_checkpointing=True, data=resumable())
    Path("fetched.csv").write_bytes(system.cat("/again/remote.csv"))
    fit([CSVStatisticsLogger("whole.csv")])
    assert without_time("fetched.csv")[:3] == without_time("whole.csv")[:3]
    assert len(read("fetched.csv")) == 10
    assert len(system.cat("/again/remote.replaced.1.csv").splitlines()) == 4
    system.rm("/again", recursive=True)


def test_an_upload_that_fails_costs_one_warning(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    def refuse(self, *args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    with pytest.warns(LightningPluginsWarning, match="could not be uploaded: no route to host") as caught:
        fit([CSVStatisticsLogger("memory://lost/remote.csv")])
    assert len([w for w in caught if "uploaded" in str(w.message)]) == 1
