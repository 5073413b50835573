"""The callback that writes running statistics for TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from lightning_plugins.core.counting import CountedBy, counter
from lightning_plugins.core.lightning import LightningModule, MisconfigurationException, Trainer
from lightning_plugins.core.validation import a_path, one_of, shown, whole_number
from lightning_plugins.core.writable import check_writable
from lightning_plugins.statistics.event_file import EventFile, Scalars, chart_sections, hyperparameter_summaries
from lightning_plugins.statistics.row_writer import RowWriter
from lightning_plugins.statistics.rows import TRAIN, VALIDATION, StatisticsRow
from lightning_plugins.statistics.saved_states import LARGEST_COUNT
from lightning_plugins.statistics.spool import Spool, can_append, is_remote

# below the root
_NAME = re.compile(r"(?!\.+(?:/|$))[\w.,+=@ -]{1,100}(?:/(?!\.+(?:/|$))[\w.,+=@ -]{1,100}){0,4}")
# as _free_name writes it
_MOMENT = r"[0-9]{4}-[0-9]{2}-[0-9]{2}_[0-9]{2}-[0-9]{2}-[0-9]{2}-[0-9]{6}"


class TensorBoardStatisticsLogger(RowWriter):
    """Event files for TensorBoard, with training and validation as two lines on one chart.

    A run of the Trainer is two runs of TensorBoard, ``<root>/<time stamp>/train`` and ``.../validation``, with the
    same tags: ``epoch_<statistic>`` in both at the end of each phase, and in ``train`` ``batch_<statistic>`` and
    ``batch_loss_step`` (the batch's own loss) and ``batch_lr`` for each optimizer step. Statistics are those of the
    :class:`StatisticsRecorder` in the same Trainer, and ``loss`` without one; with either, whatever the module logs is
    there too, less the prefixes ``train_`` and ``val_`` where the shorter name is free. The module's ``hparams``, if it
    saved any, are on the HPARAMS page, for each of the two runs.

    TensorBoard's page of scalars sorts by tag. On its Custom Scalars page the ``epoch_`` charts come first, in a
    section of their own.

    When:
        Events are written every five seconds, at phase ends, when a checkpoint is cut and on exceptions.
    Checkpoint:
        The time stamp and the last place on the x axis; without a recorder also the sums of the loss. A resumed run
        goes on in the same directories, in a new file that voids what came after the checkpoint. A second fit of the
        same callback goes on; validate, test and ``fast_dev_run`` write nothing.
    Distributed:
        Rank 0 writes; every value is the sum over all ranks. The time stamp is rank 0's.
    Cost:
        One record per step, about two microseconds per scalar and twelve bytes.
    Does not compose with:
        A root that is not a local directory, which is refused.

    Args:
        root: Directory of all runs, the one for ``tensorboard --logdir``.
        name: The run's directory below ``root``, with ``-1``, ``-2``, ... behind it if it is taken; ``None`` for a time
            stamp.
        axis: What the x axis counts: ``"step"``, optimizer steps; ``"epoch"``, epochs from 1 (then there are only the
            ``epoch_`` charts, with ``epoch_lr``); ``"samples"``, training samples of all ranks; ``"time"``, whole
            seconds since the run began.
        count: What ``axis="samples"`` counts: ``"samples"``, ``Tokens("labels")``, or any function of the batch that
            returns a number.

    Raises:
        TypeError: If ``root`` is not a path, or ``count`` no function.
        ValueError: If ``axis`` is none of these, ``root`` is not local, or ``name`` is no plain name.

    Example:
        >>> TensorBoardStatisticsLogger(axis="hours")
        Traceback (most recent call last):
        ...
        ValueError: `axis` must be one of 'step', 'epoch', 'samples', 'time', got 'hours'.

    References:
        Swift for TensorFlow, swift-models, tensorBoardStatisticsLogger. Differs: one directory per phase rather than
        per statistic and phase; ``epoch_`` charts share the x axis of the ``batch_`` charts; epochs of one batch have
        a ``batch_`` point too; events stand in order.
    """

    def __init__(
        self,
        root: str | Path = "run/tensorboard/stats",
        *,
        name: str | None = None,
        axis: Literal["step", "epoch", "samples", "time"] = "step",
        count: CountedBy = "samples",
    ) -> None:
        self.root = a_path("root", root)
        if is_remote(self.root):
            raise ValueError(f"`root` must be a local directory, got {shown(self.root)}.")
        if name is not None and not _is_name(name):
            raise ValueError(f"`name` must be a plain name of a directory below `root`, got {shown(name)}.")
        self.name = name
        self.axis = one_of("axis", axis, ("step", "epoch", "samples", "time"))
        counter(count)
        self.count = count
        self.needs_samples = self.axis == "samples"
        super().__init__(root=self.root, axis=self.axis, **({} if name is None else {"name": name}))
        self._stamp = ""
        self._files: dict[str, EventFile] = {}
        # where a mount cannot append
        self._spool: Spool | None = None
        # places on the x axis
        self._last = {TRAIN: -1, VALIDATION: -1}
        self._last_step = 0
        # the tags of each phase that the run has told TensorBoard how to arrange
        self._arranged: dict[str, list[str]] = {}
        self._batch_tags: dict[str, None] = {}

    @property
    def run_directory(self) -> Path | None:
        """``<root>/<time stamp>`` of the run, ``None`` before the first fit."""
        return Path(self.root) / self._stamp if self._stamp else None

    # hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the recorder, refuse a directory of no use, and name the run as rank 0 does."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self._stamp:
            return
        if self._writes:
            check_writable("root", self.root, directory=True)
        self._stamp = trainer.strategy.broadcast(_free_name(Path(self.root), self.name))
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by the callback connector
        loggers = [found for found in callbacks if isinstance(found, TensorBoardStatisticsLogger)]
        runs = [(Path(found.root).resolve(), found._stamp) for found in loggers]
        if runs.count((Path(self.root).resolve(), self._stamp)) > 1:
            raise MisconfigurationException(
                f"Two TensorBoardStatisticsLogger callbacks write to {shown(self.root)}; give each its own `root`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where a checkpoint was cut, or name the run's hyper-parameters."""
        super().on_train_start(trainer, pl_module)
        self._tell_late_start(trainer, begun=bool(self._files))
        resumed, self._restored = self._restored, None
        # a state that was cut before the first fit names no run
        resumed = resumed if resumed and resumed["stamp"] else None
        if resumed is not None:
            self.close()
            self._stamp, self._last, self._last_step = resumed["stamp"], dict(resumed["last"]), resumed["last_step"]
            self._files = {}
        # a second fit goes on
        if not self._writes or self._files:
            return
        self._arranged, self._batch_tags = {}, {}
        hyperparameters = dict(getattr(pl_module, "hparams", {})) if resumed is None else {}
        tags = [] if self._recording is None else [f"epoch_{name}" for name in self._recording.statistics.names]
        root = Path(self.root)
        self._spool = None if can_append(root) else Spool(str(root.absolute()))
        for phase in (TRAIN, VALIDATION):
            run = f"{self._stamp}/{phase}"
            self._files[phase] = EventFile(
                (root if self._spool is None else self._spool.local) / run,
                behind=root / run,
                purge_from=self._last[phase] + 1 if resumed else None,
                summaries=hyperparameter_summaries(hyperparameters, tags, run) if hyperparameters else (),
            )

    def write(self, rows: Sequence[StatisticsRow]) -> None:
        """Write the batches that made an optimizer step."""
        if self.axis == "epoch" or self._recording is None or self._recording.every == "epoch":
            return
        events: list[Scalars] = []
        for row in rows:
            if row.phase == TRAIN and row.step != self._last_step:
                self._last_step = row.step
                scalars = {f"batch_{name}": value for name, value in _shared_names(row).items()}
                if row.loss_step is not None:
                    scalars["batch_loss_step"] = row.loss_step
                if row.lr is not None:
                    scalars["batch_lr"] = float(row.lr)
                events.append((self._place(row), row.wall_time, scalars))
        if events and self._files:
            self._batch_tags.update(dict.fromkeys(events[-1][2]))
            self._files[TRAIN].add(events)

    def phase_end(self, row: StatisticsRow) -> None:
        """Write the phase's final values."""
        scalars = {f"epoch_{name}": value for name, value in _shared_names(row).items()}
        if self.axis == "epoch" and row.lr is not None:
            scalars["epoch_lr"] = float(row.lr)
        place = self._place(row)
        if self._files:
            self._files[row.phase].add([(place, row.wall_time, scalars)])
            self._arrange(row, place, list(scalars))
        self._upload()

    def _arrange(self, row: StatisticsRow, place: int, tags: list[str]) -> None:
        """Give the charts of epochs a section of their own, before that of the batches, once their tags are known."""
        if self._arranged.get(row.phase) != tags:
            self._arranged[row.phase] = tags
            of_batches = list(self._batch_tags) if row.phase == TRAIN else []
            sections = {"epochs": tags, **({"batches": of_batches} if of_batches else {})}
            self._files[row.phase].describe(place, row.wall_time, chart_sections(sections))

    def close(self) -> None:
        """Write what is left and close the files."""
        for file in self._files.values():
            file.close()
        self._upload()

    def _upload(self) -> None:
        if self._spool is not None:
            self._spool.upload()

    # state

    def place(self) -> dict[str, Any]:
        """Return the run's name and its last places on the x axis."""
        self._upload()
        return {"stamp": self._stamp, "last": dict(self._last), "last_step": self._last_step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Keep the place until the fit begins, if its run is one that this logger would name so."""
        stamp = state.get("stamp")
        wanted = _MOMENT if self.name is None else re.escape(self.name)
        if not isinstance(stamp, str) or not re.fullmatch(rf"(?:{wanted}(?:-[0-9]{{1,9}})?)?", stamp):
            raise MisconfigurationException(
                "The checkpoint's `stamp` of TensorBoardStatisticsLogger must be the name of a run, "
                f"{'a time stamp' if self.name is None else shown(self.name)}, got {shown(stamp)}."
            )
        last = state.get("last")
        if not isinstance(last, dict) or set(last) != {TRAIN, VALIDATION}:
            raise MisconfigurationException(
                "The checkpoint's `last` of TensorBoardStatisticsLogger must have a place for train and validation, "
                f"got {shown(last)}."
            )
        places = {
            phase: whole_number("last", place, at_least=-1, at_most=LARGEST_COUNT) for phase, place in last.items()
        }
        step = whole_number("last_step", state.get("last_step"), at_most=LARGEST_COUNT)
        super().set_state({**state, "last": places, "last_step": step})

    def _place(self, row: StatisticsRow) -> int:
        """Return the row's place on the x axis, and remember that the phase got there."""
        counts = {"step": row.step, "epoch": row.epoch, "samples": row.samples, "time": row.seconds}
        place = int(counts[self.axis])
        self._last[row.phase] = max(self._last[row.phase], place)
        return place


def _shared_names(row: StatisticsRow) -> dict[str, float]:
    """Return the row's values without the prefixes by which modules tell phases apart.

    Where that would give two values one name, the module's keeps its prefix; one that is the recorder's own is left
    out.
    """
    values = row.values or {}
    shared: dict[str, float] = {}
    for name, value in values.items():
        short = name.removeprefix("train_").removeprefix("val_")
        taken = values[short] if short != name and short in values else shared.get(short)
        if taken is None:
            shared[short] = value
        elif taken != value:
            shared[name] = value
    return shared


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _free_name(root: Path, name: str | None) -> str:
    """Return the run's name, or the moment, with a number behind it where that is taken."""
    wanted = name or f"{datetime.now().astimezone():%Y-%m-%d_%H-%M-%S-%f}"
    free, number = wanted, 1
    while (root / free).exists():
        free, number = f"{wanted}-{number}", number + 1
    return free
