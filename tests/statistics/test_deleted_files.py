"""Files of statistics that are deleted in mid-run begin anew."""

import shutil
import warnings

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.statistics.csv_file import CSVFile
from lightning_plugins.statistics.event_file import EventFile
from tests.support.statistics_runs import read


def cells(number, **more):
    return {"epoch": "1", "batch": str(number), "phase": "train", **more}


def test_a_file_that_is_deleted_in_mid_run_begins_anew(tmp_path):
    folder, runs = tmp_path / "run", tmp_path / "run" / "events"
    rows, events = CSVFile(folder / "log.csv"), EventFile(runs)
    rows.add([cells(3)])
    events.add([(1, 0.0, {"loss": 1.0})])
    shutil.rmtree(folder)
    with pytest.warns(LightningPluginsWarning, match=r"log\.csv was deleted during the run: a new file has the rows"):
        rows.add([cells(4, late="1")])
    with pytest.warns(LightningPluginsWarning, match="was deleted during the run: a new file has the events"):
        events.add([(2, 0.1, {"loss": 0.5})])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows.add([cells(5)])
        events.add([(3, 0.2, {"loss": 0.25})])
    rows.close()
    events.close()
    assert [(row["batch"], row["late"]) for row in read(folder / "log.csv")] == [("4", "1"), ("5", "")]
    found = EventAccumulator(str(runs)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(2, 0.5), (3, 0.25)]
