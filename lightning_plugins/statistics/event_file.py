"""TensorBoard event files: one record per step with all its scalars.

An event goes into a file of one run (a directory). What makes this cheap is one record per step instead of one per
scalar, checksums of all records in one go, and no queue with a thread behind it: records are encoded when they are
handed in and appended together. Nothing here knows a Trainer.
"""

from __future__ import annotations

import os
import re
import socket
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2, metadata as custom_scalars
from tensorboard.plugins.hparams import summary_v2 as hparams

from lightning_plugins.core.append_only_file import AppendOnlyFile
from lightning_plugins.core.files import is_full_disk
from lightning_plugins.core.user_warning import warn
from lightning_plugins.statistics.event_record import event_record
from lightning_plugins.statistics.tfrecord import frame

FILE_VERSION = "brain.Event:2"

Scalars = tuple[int, float, Mapping[str, float]]
"""Step (any whole number: the place on the x axis), seconds since 1970, tag -> value."""


class EventFile:
    """The event file of one run.

    Args:
        folder: The run's directory; it and the file are made with the first event.
        purge_from: The step from which on everything in the directory's older files is void, as after a resume;
            ``None`` for a new run.
        summaries: What plugins show of the run, written before the first event.
        behind: The directory whose event files this one comes after, where that is another.

    Example:
        >>> import tempfile
        >>> from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        >>> folder = Path(tempfile.mkdtemp())
        >>> file = EventFile(folder)
        >>> file.add([(1, 0.0, {"loss": 0.5, "accuracy": 0.25}), (2, 0.1, {"loss": 0.25, "accuracy": 0.75})])
        >>> file.close()
        >>> [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]
        [(1, 0.5), (2, 0.25)]
    """

    def __init__(
        self,
        folder: Path,
        *,
        purge_from: int | None = None,
        summaries: Sequence[Any] = (),
        behind: Path | None = None,
    ) -> None:
        self.folder = folder
        self._behind = folder if behind is None else behind
        self._summaries = summaries
        self._purge_from = purge_from
        self._path: Path | None = None
        self._file: AppendOnlyFile | None = None
        # records that a full disk did not take; of those, the ones handed over last, and where the file ends with each
        self._waiting: list[bytes] = []
        self._sent: tuple[list[bytes], list[int]] = ([], [])
        self._complained = False

    def add(self, events: Sequence[Scalars]) -> None:
        """Append one event per step."""
        self._write([event_record(*event) for event in events])

    def describe(self, step: int, wall_time: float, summary: Summary) -> None:
        """Append what a plugin shows of the run."""
        self._write([Event(wall_time=wall_time, step=step, summary=summary).SerializeToString()])

    def close(self) -> None:
        """Write what is left and close the file; the next event opens it again."""
        if self._waiting:
            self._write([])
        if self._waiting:
            warn(f"{len(self._waiting)} events for {self._path or self.folder} could not be written.")
            self._waiting = []
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, records: Sequence[bytes]) -> None:
        self._waiting.extend(frame(records))
        self._let_go()
        try:
            file, waiting = self._open(), self._waiting
            first = self._first_records() if waiting and not file.size else []
            ends = list(accumulate(map(len, [*first, *waiting]), initial=file.size))[len(first) + 1 :]
            self._sent = waiting, ends
            file.append([*first, *waiting])
        except OSError as error:
            self._let_go()
            if not self._complained:
                self._complained = True
                when = "when there is room again" if is_full_disk(error) else "as soon as that works"
                warn(
                    f"{self._path or self.folder} could not be written ({error}): training goes on, the events wait "
                    f"in memory and are written {when}."
                )
            return
        self._let_go()
        self._complained = False

    def _let_go(self) -> None:
        """Forget the events that the file has: as soon as it has them, or later, if Ctrl-C came in between."""
        sent, ends = self._sent
        if sent is self._waiting and self._file is not None:
            self._waiting = self._waiting[bisect_right(ends, self._file.size) :]

    def _open(self) -> AppendOnlyFile:
        if self._file is not None and self._file.is_deleted:
            self._file.close()
            self._file = None
            warn(f"{self._path} was deleted during the run: a new file has the events from here on.")
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self._path or self.folder / _file_name(self._behind)
            self._file = AppendOnlyFile(self._path)
        return self._file

    def _first_records(self) -> list[bytes]:
        now = time.time()
        records = [Event(wall_time=now, file_version=FILE_VERSION).SerializeToString()]
        if self._purge_from is not None:
            start = SessionLog(status=SessionLog.START)
            records.append(Event(wall_time=now, step=self._purge_from, session_log=start).SerializeToString())
        for given in self._summaries:
            summary = Summary.FromString(given.SerializeToString())
            records.append(Event(wall_time=now, summary=summary).SerializeToString())
        # as one: of half of them a reader would think that nothing is void
        return [b"".join(frame(records))]


def hyperparameter_summaries(hyperparameters: Mapping[str, Any], tags: Sequence[str], run: str) -> list[Any]:
    """Return what the HPARAMS page needs to show a run.

    Args:
        hyperparameters: Name -> value; what is no number, text or truth value is shown as text.
        tags: The scalars to show beside them.
        run: The run's name.
    """
    plain = {str(k): v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in hyperparameters.items()}
    config = hparams.hparams_config_pb([hparams.HParam(name) for name in plain], [hparams.Metric(tag) for tag in tags])
    return [config, hparams.hparams_pb(plain, trial_id=run)]


def chart_sections(sections: Mapping[str, Sequence[str]]) -> Summary:
    """Return what the Custom Scalars page needs: its sections in this order, the first one open.

    The page of all scalars sorts by tag. Here a run says itself what comes first.

    Args:
        sections: Title -> the tags of its charts, one each.
    """
    layout = layout_pb2.Layout()
    for number, (title, tags) in enumerate(sections.items()):
        category = layout.category.add(title=title, closed=number > 0)
        for tag in tags:
            category.chart.add(title=tag, multiline={"tag": [f"^{re.escape(tag)}$"]})
    tensor = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto())
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=custom_scalars.PLUGIN_NAME))
    value = Summary.Value(tag=custom_scalars.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=plugin)
    return Summary(value=[value])


def _file_name(folder: Path) -> str:
    """Return a name that sorts after those of the directory's other event files, for readers go by name."""
    names = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.[0-9]*.*")]
    # other names are not of event files
    seconds = [int(name) for name in names if re.fullmatch(r"[0-9]{1,12}", name)]
    second = max([int(time.time()), *[taken + 1 for taken in seconds]])
    return f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"
