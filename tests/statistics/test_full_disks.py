"""A disk that fills up keeps every whole event that fits; the rest follows when there is room again."""

import errno
import warnings

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_plugins.core import append_only_file as files
from lightning_plugins.statistics import event_file
from lightning_plugins.statistics.event_file import EventFile


@pytest.mark.parametrize("room", [0, 10, 100, 200, 300, 10**6])
@pytest.mark.parametrize("purge_from", [None, 3])
def test_a_disk_that_is_full_from_the_first_event_keeps_every_whole_event_that_fits(tmp_path, room, purge_from):
    """TensorBoard's own reader finds whole events, or no file of a run, and the rest when there is room again."""

    class Disk(files.AppendOnlyFile):
        left = room

        def __init__(self, path):
            super().__init__(path)
            self._handle = Handle(self._handle)

    class Handle:
        def __init__(self, handle):
            self._handle = handle

        def __getattr__(self, name):
            return getattr(self._handle, name)

        def write(self, data):
            taken = min(len(data), Disk.left)
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            Disk.left -= taken
            return self._handle.write(data[:taken])

    file = EventFile(tmp_path, purge_from=purge_from)
    events = [(step, 0.0, {"loss": step / 4}) for step in range(3, 13)]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(event_file, "AppendOnlyFile", Disk)
        file.add(events)
        there = EventAccumulator(str(tmp_path)).Reload()
        kept = [event.step for event in there.Scalars("loss")] if "loss" in there.Tags()["scalars"] else []
        assert kept == list(range(3, 3 + len(kept)))
        assert (len(kept) == 10) == (room == 10**6)
        assert len(kept) > 0 or room <= 100
        Disk.left = 10**6
        file.close()
    assert len(caught) == (room < 10**6)
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(step, values["loss"]) for step, _, values in events]
