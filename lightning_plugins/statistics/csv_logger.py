"""The callback that writes running statistics into a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_plugins.core.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_plugins.core.validation import (
    LightningPluginsWarning,
    a_list,
    a_path,
    did_you_mean,
    one_of,
    real_number,
    shown,
)
from lightning_plugins.core.writable import check_writable
from lightning_plugins.statistics.csv_file import (
    LAYOUTS,
    SEPARATORS,
    CSVFile,
    batch_columns,
    epoch_cells,
    epoch_columns,
)
from lightning_plugins.statistics.row_writer import RowWriter
from lightning_plugins.statistics.rows import TRAIN, StatisticsRow
from lightning_plugins.statistics.saved_states import checked_place_in_csv
from lightning_plugins.statistics.spool import Spool, can_append, is_remote


class CSVStatisticsLogger(RowWriter):
    """A CSV file with a row per batch, training and validation, that a resume continues and nothing destroys.

    The columns are ``epoch,batch,phase,step,lr,<statistics>,loss_step,time``: epoch and batch are whole numbers from
    1, ``phase`` is ``train`` or ``validation``, ``step`` counts optimizer steps, ``lr`` is the rate that the batch was
    trained with, ``loss_step`` the batch's own loss, ``time`` is seconds since the run began. Statistics are those of
    the :class:`StatisticsRecorder` in the same Trainer, and ``loss`` without one; with either, whatever the module
    logs has columns of its own.

    A fresh fit moves an existing file aside (``log.1.csv``). A resumed run moves the rows after its checkpoint to
    ``log.replaced.1.csv`` and goes on, so that in the end the file is that of an uninterrupted run, but for ``time``.
    A second fit of the same callback goes on; validate, test and ``fast_dev_run`` write nothing.

    When:
        Rows are written every ``flush_seconds``, at phase ends, when a checkpoint is cut and on exceptions, always
        whole rows in one append. A statistic that appears later becomes a column on the right; that rewrites the file
        once, atomically. A full disk costs a warning; the rows wait.
    Checkpoint:
        The number of rows and the last row's epoch, batch and phase; without a recorder also the sums of the loss.
    Distributed:
        Rank 0 writes; every row is the sum over all ranks.
    Cost:
        About a microsecond per cell when rows are written; nothing in the other batches.
    Does not compose with:
        Another one on the same path, which is refused at setup.

    Args:
        path: Where, with the suffix ``.csv``; its directory is made. A path that fsspec knows (``s3://...``,
            ``memory://...``), or on a mount that cannot append, is written locally and uploaded at phase ends,
            checkpoints and the end.
        columns: Which columns, and in which order, after ``epoch`` and ``batch``; ``None`` means all.
        every: ``"batch"``, or ``"epoch"`` for one row with ``train_<name>`` and ``val_<name>`` per epoch.
        layout: ``"numbers"`` as above; ``"s4tf"`` is Swift for TensorFlow's: ``epoch, batch`` as ``1/12, 3/468``,
            then its names for the statistics, a comma and a space between cells, float32 at its shortest.
        flush_seconds: How old rows may become before they are written; with 0 each is written when the next one
            comes. A kill loses at most this stretch, and a resume writes it again. Writing is what reads the device.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``path`` does not end in ``.csv``, or another argument is not one of its choices.

    Example:
        >>> CSVStatisticsLogger("run/log.txt")
        Traceback (most recent call last):
        ...
        ValueError: `path` must end in '.csv', got 'run/log.txt'.

    References:
        Swift for TensorFlow, swift-models, TrainingLoop CSVLogger. Differs: phase, step, rate and time columns; the
        header grows; no file is truncated at construction; the sums are read from the device together.
    """

    def __init__(
        self,
        path: str | Path = "run/log.csv",
        *,
        columns: Sequence[str] | None = None,
        every: Literal["batch", "epoch"] = "batch",
        layout: Literal["numbers", "s4tf"] = "numbers",
        flush_seconds: float = 5.0,
    ) -> None:
        self.path = a_path("path", path)
        if Path(self.path).suffix != ".csv":
            raise ValueError(f"`path` must end in '.csv', got {shown(self.path)}.")
        self.columns = _checked_columns(columns)
        self.every = one_of("every", every, ("batch", "epoch"))
        self.layout = one_of("layout", layout, tuple(LAYOUTS))
        self.flush_seconds: float = real_number("flush_seconds", flush_seconds, at_least=0)
        super().__init__(path=self.path)
        self._file: CSVFile | None = None
        self._spool: Spool | None = None
        self._train: StatisticsRow | None = None
        self._validation: StatisticsRow | None = None
        # the row of an epoch that has not ended
        self._pending: dict[str, str] = {}
        # the chosen columns without a value so far, and the names that had one
        self._empty = set(self.columns or ())
        self._filled: set[str] = set()

    # hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the recorder; refuse columns it does not have, a second logger on the path, and a path of no use."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        same = [c for c in trainer.callbacks if isinstance(c, CSVStatisticsLogger) and _same_place(c.path, self.path)]  # type: ignore[attr-defined]
        if len(same) > 1:
            raise MisconfigurationException(
                f"Two CSVStatisticsLogger callbacks write to {shown(self.path)}; give each its own `path`."
            )
        self._check_columns()
        if self._writes and not is_remote(self.path):
            check_writable("path", self.path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file, or go on with it."""
        super().on_train_start(trainer, pl_module)
        if self._writes:
            self._tell_late_start(trainer, begun=self._file is not None)
            self._open()
        self._restored = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row of an epoch that a resume found finished but for its end."""
        super().on_train_epoch_start(trainer, pl_module)
        self._end_epoch()

    def write(self, rows: Sequence[StatisticsRow]) -> None:
        """Append rows of batches."""
        if self._file is not None and self.every == "batch":
            self._add(list(map(LAYOUTS[self.layout], rows)))

    def phase_end(self, row: StatisticsRow) -> None:
        """Keep what the epoch's row needs."""
        if self.every == "epoch":
            self._train, self._validation = (row, self._validation) if row.phase == TRAIN else (self._train, row)
            cells = self._pending | epoch_cells(self.layout, self._train, self._validation)
            # a resume has only its cells; the validation's own place is not the epoch's
            if self._train is None:
                cells |= {name: self._pending[name] for name in ("batch", "lr") if name in self._pending}
            clock = {name: cells.pop(name) for name in ("time",) if name in cells}
            self._pending = cells | clock
        self._upload()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's row."""
        super().on_train_epoch_end(trainer, pl_module)
        self._end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left."""
        self._end_epoch()
        super().on_train_end(trainer, pl_module)
        for name in sorted(self._empty) if self._filled else ():
            rank_zero_warn(
                f"`columns` names {shown(name)}, but nothing of that name was logged{did_you_mean(name, self._filled)}",
                category=LightningPluginsWarning,
            )

    def close(self) -> None:
        """Write what is left and close the file; a second fit opens it again."""
        if self._file is not None:
            self._file.close()
            self._upload()

    # state

    def place(self) -> dict[str, Any]:
        """Return the place in the file and the row of the epoch that is under way."""
        self._upload()
        mark = {"rows": 0, "last": []} if self._file is None else self._file.mark()
        return {"pending": dict(self._pending), **mark}

    def set_state(self, state: dict[str, Any]) -> None:
        """Keep the place until the fit begins."""
        super().set_state(state | checked_place_in_csv(type(self).__name__, state))

    # the file

    def _open(self) -> None:
        restored = self._restored
        if self._file is not None and restored is None:
            # a second fit goes on
            return
        folder, _, name = self.path.rpartition("/") if is_remote(self.path) else ("", "", "")
        local = Path(self.path)
        if not is_remote(self.path) and not can_append(local.parent):
            folder, name = str(local.absolute().parent), local.name
        if name:
            self._spool = Spool(folder)
            local = self._spool.local / name
        self._file = CSVFile(local, separator=SEPARATORS[self.layout], columns=self.columns)
        if restored is None:
            aside = self._file.begin() if self._spool is None else self._spool.move_aside(name)
            if aside is not None:
                rank_zero_info(f"CSVStatisticsLogger: an earlier {self.path} was moved to {aside}.")
            return
        self._pending = dict(restored["pending"])
        if self._spool is not None:
            self._spool.download(name)
        for line in self._file.resume(restored):
            rank_zero_info(f"CSVStatisticsLogger: {line}")

    def _add(self, rows: list[dict[str, str]]) -> None:
        if self._file is not None:
            self._file.add(rows)
        # without a recorder the names are not known before something has been logged
        if self._empty:
            self._filled.update(*rows)
            self._empty -= self._filled

    def _end_epoch(self) -> None:
        if self._pending and self._file is not None:
            self._add([self._pending])
        self._pending, self._train, self._validation = {}, None, None

    def _upload(self) -> None:
        if self._spool is not None:
            self._spool.upload()

    def _check_columns(self) -> None:
        if self.columns is None or self._records is not None or self._recording is None:
            return
        names = self._recording.statistics.names
        known = (batch_columns if self.every == "batch" else epoch_columns)(names, self.layout)
        for name in self.columns:
            if name not in known:
                raise MisconfigurationException(
                    f"`columns` must name some of {', '.join(map(repr, known))}, got {shown(name)}"
                    f"{did_you_mean(name, known)}"
                )


def _checked_columns(columns: Sequence[str] | None) -> tuple[str, ...] | None:
    if columns is None:
        return None
    names = a_list("columns", columns, "a list of names")
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`columns` must be a list of names, got {shown(columns)}.")
    if len(set(names)) != len(names):
        raise ValueError(f"`columns` must be distinct, got {shown(names)}.")
    return tuple(dict.fromkeys(("epoch", "batch", *names)))


def _same_place(one: str, other: str) -> bool:
    if is_remote(one) or is_remote(other):
        return one == other
    return Path(one).resolve() == Path(other).resolve()
