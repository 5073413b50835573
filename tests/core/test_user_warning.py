"""A warning names the user's line, and not one of the package, however deep inside it comes from."""

import linecache
import warnings

import pytest
import torch

from lightning_plugins import Constant, ScheduleLR, average_checkpoints, select_checkpoints
from lightning_plugins.core.user_warning import warn
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.statistics.csv_file import CSVFile
from lightning_plugins.statistics.event_file import EventFile


def average(folder):
    for number in range(2):
        torch.save({"shared": torch.ones(1), f"own{number}": torch.ones(1)}, folder / f"{number}.pt")
    average_checkpoints(folder.glob("*.pt"), strict=False)  # line


def select(folder):
    torch.save({"state_dict": {}, "global_step": 1}, folder / "1.ckpt")
    select_checkpoints(folder, last=2)  # line


def schedule(folder):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    scheduler = ScheduleLR(optimizer, Constant())
    for _ in range(2):
        optimizer.step()
    scheduler.step()  # line


def log_rows(folder):
    file = CSVFile(folder / "log.csv")
    file.add([{"epoch": "1"}])
    file.path.unlink()
    file.add([{"epoch": "2"}])  # line


def log_events(folder):
    file = EventFile(folder)
    file.add([(1, 0.0, {"loss": 0.5})])
    next(folder.iterdir()).unlink()
    file.add([(2, 0.0, {"loss": 0.5})])  # line


def outside(folder):
    warn("made up")  # line


@pytest.mark.parametrize("call", [average, select, schedule, log_rows, log_events, outside])
def test_the_line_that_called_is_named(tmp_path, call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(tmp_path)
    (found,) = (one for one in caught if one.category is LightningPluginsWarning)
    assert found.filename == __file__
    assert linecache.getline(found.filename, found.lineno).endswith("# line\n")
