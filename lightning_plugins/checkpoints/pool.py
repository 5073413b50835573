"""The checkpoints of a run that an average is made of: what ModelCheckpoint keeps, or files of our own.

Knows files, numbers and what a ModelCheckpoint has, and no Trainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_plugins.checkpoints.record import Record, read_manifest
from lightning_plugins.checkpoints.run_files import RunFiles, readable_records, remove
from lightning_plugins.checkpoints.selection import best_of, found_in, last_of, one_per_step
from lightning_plugins.checkpoints.validation_scores import loss_name
from lightning_plugins.core.checkpoint_file import CheckpointError
from lightning_plugins.core.checkpoints_of_run import capacity, kept_scores, last_file
from lightning_plugins.core.files import probe
from lightning_plugins.core.module_state import shorten
from lightning_plugins.core.validation import printable, shown

_LARGEST = 2**1000  # a float holds it
_MOST_STEPS = 1000  # validations whose metrics are remembered
_MOST_METRICS = 100_000


class History:
    """The metrics of the last 1000 validations, by step: they tell the best single checkpoint.

    Attributes:
        metrics: Step -> name -> value.
    """

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def add(self, step: int, found: Mapping[str, float]) -> None:
        """Remember what was logged at a step, the latest value of each name."""
        if found:
            self.metrics.setdefault(step, {}).update(found)
        for old in sorted(self.metrics)[:-_MOST_STEPS]:
            del self.metrics[old]

    def scores(self, name: str | None) -> dict[int, float]:
        """Return step -> value of a metric, where it is a number; of a validation loss if ``name`` is ``None``."""
        if name is None:
            name = loss_name(sorted({key for metrics in self.metrics.values() for key in metrics}))
        known = {step: metrics[name] for step, metrics in self.metrics.items() if name in metrics}
        return {step: value for step, value in known.items() if not math.isnan(value)}

    def load(self, plain: Any) -> None:
        """Take over :attr:`metrics` as a checkpoint holds them.

        Raises:
            TypeError: If they are nothing of the kind.
        """
        if not isinstance(plain, Mapping) or len(plain) > _MOST_STEPS:
            raise TypeError(f"`history` must be a mapping of at most {_MOST_STEPS} steps, got {shown(plain)}.")
        self.metrics = {_checked_step(step): _checked_metrics(metrics) for step, metrics in plain.items()}


def _checked_step(step: Any) -> int:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise TypeError(f"`history` must be by steps of at least 0, got {shown(step)}.")
    return step


def _checked_metrics(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping) or len(metrics) > _MOST_METRICS:
        raise TypeError(f"`history` must hold metrics by name, got {shown(metrics)}.")
    for name, value in metrics.items():
        is_number = isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST)
        if not isinstance(name, str) or not is_number:
            raise TypeError(f"`history` must hold numbers by name, got {shown(name)}: {shown(value)}.")
    return {str(name): float(value) for name, value in metrics.items()}


@dataclass
class Choice:
    """What is averaged.

    Args:
        paths: In the order of their steps.
        best: The best single one of them.
        warnings: What the user should not miss.
        notes: What the user may want to know.
    """

    paths: list[Path] = field(default_factory=list)
    best: Path = Path()
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Pool:
    """Where the checkpoints of a fit lie, and how they are ranked.

    Args:
        files: The files that the run has written.
        history: The metrics of its validations.
        checkpoint: The ModelCheckpoint to follow, ``None`` if there is none.
        folder: Where it writes, or would.
        count: How many checkpoints are averaged.
        by_score: Whether the best of them, or the last.
        own_folder: Where files of our own lie, when it keeps too few; ``None`` when it keeps enough.
        own_key: The state key of the callback, which keeps them.
    """

    files: RunFiles
    history: History
    checkpoint: Any
    folder: Path
    count: int
    by_score: bool
    own_folder: Path | None = None
    own_key: str = ""

    def target(self, output: str) -> Path:
        """Return the file that the argument ``output`` means."""
        return self.folder / output

    def separate(self, output: str, own_key: str) -> None:
        """Take a folder of our own beside ``output`` if ModelCheckpoint keeps too few files."""
        self.own_key = own_key
        if self.checkpoint is None or capacity(self.checkpoint) < self.count:
            target = self.target(output)
            self.own_folder = target.parent / f"{target.stem}_pool"

    def choose(self) -> Choice:
        """Return the checkpoints to average, and what there is to say of others in their directory."""
        candidates = [path for path in self.files if self._holds(path)]
        unchanged = [path for path in candidates if path in self.files]
        records, damaged = readable_records(unchanged)
        changed, damaged_too = self._changed(candidates, unchanged)
        given_up = self._given_up(records)
        chosen = self._ranked(one_per_step([record for record in records if record not in given_up]))
        best = self._best_single(chosen)
        choice = Choice([record.path for record in chosen], best)
        if damaged or damaged_too:
            names = _names([*damaged, *damaged_too])
            choice.warnings.append(f"Left out, as they cannot be read: {names}.")
        if changed:
            names = _names(changed)
            choice.warnings.append(f"Left out, as they have changed since this run wrote them: {names}.")
        if given_up:
            names = _names([record.path for record in given_up])
            choice.notes.append(f"Left out, as ModelCheckpoint no longer keeps them: {names}.")
        strangers = self._strangers(candidates)
        if strangers:
            choice.notes.append(f"Left out, as this run did not write them: {_names(strangers)}.")
        return choice

    def _holds(self, path: Path) -> bool:
        """Return whether a file that the run wrote is one of those that can be averaged."""
        # by the keeper also after a resume into another directory, as loggers make a new one for every fit
        keeper = self.files.keeper(path)
        if self.own_folder is not None:
            return path.parent == self.own_folder or keeper == self.own_key
        if self.by_score:
            return path in kept_scores(self.checkpoint)
        return self.folder in path.parents or keeper == self.checkpoint.state_key

    def _given_up(self, records: list[Record]) -> list[Record]:
        """Return the files that a ModelCheckpoint that ranks has given up, but a kill has left.

        It writes a better file before it deletes the worst one, and replaces its ``last.ckpt`` after both. After a
        resume into a new directory it has no record of the files before, and gives none of them up.
        """
        if self.own_folder is not None or not self.checkpoint.monitor:
            return []
        keeper, kept = (self.checkpoint.state_key, str(self.checkpoint.dirpath)), kept_scores(self.checkpoint)
        newest = max((record.step or 0 for record in records if record.path in kept), default=0)
        others = [record for record in records if (record.keeper, record.folder) == keeper and record.path not in kept]
        last = last_file(self.checkpoint)
        return [record for record in others if record.path != last or (record.step or 0) < newest]

    def _changed(self, candidates: list[Path], unchanged: list[Path]) -> tuple[list[Path], list[Path]]:
        """Return the files that are not what the run wrote: those that can still be read, and those that cannot."""
        others = [path for path in candidates if path not in unchanged and path.exists()]
        readable = {record.path for record in readable_records(others)[0]}
        return [path for path in others if path in readable], [path for path in others if path not in readable]

    def _strangers(self, candidates: list[Path]) -> list[Path]:
        folder = self.own_folder or self.folder
        found = [path for path in found_in(folder) if path not in candidates] if folder.is_dir() else []
        # a link to one of the run's own is no stranger, and an average is none that could be meant
        found = [path for path in found if path.resolve() not in candidates and self.files.keeper(path) is None]
        records, damaged = readable_records(found)
        return [path for path in found if path in damaged or path in {record.path for record in records}]

    def _ranked(self, records: list[Record]) -> list[Record]:
        if not self.by_score:
            return last_of(records, self.count)
        return best_of(records, self._scores(records, as_kept=self.own_folder is None), self.count, self._mode)

    def _best_single(self, chosen: list[Record]) -> Path:
        scores = self._scores(chosen, as_kept=self.by_score and self.own_folder is None)
        best = best_of(chosen, scores, 1, self._mode) or chosen[-1:]
        return best[0].path if best else Path()

    def _scores(self, records: list[Record], *, as_kept: bool) -> dict[Path, float]:
        """Return path -> score: as ModelCheckpoint has them, or as they were logged at the file's step."""
        if as_kept:
            return kept_scores(self.checkpoint)
        scores = self.history.scores(None if self.checkpoint is None else self.checkpoint.monitor)
        return {record.path: scores[record.step] for record in records if record.step in scores}

    @property
    def _mode(self) -> str:
        ranks = self.checkpoint is not None and self.checkpoint.monitor
        return str(self.checkpoint.mode) if ranks else "min"

    def prune(self) -> None:
        """Delete files of our own, in our own folder, that are none of the best or last."""
        if self.own_folder is None:
            return
        paths = [path for path in self.files if self._holds(path) and path in self.files]
        records = one_per_step(readable_records(paths)[0])
        kept = {record.path for record in self._ranked(records)}
        for path in paths:
            if path.parent == self.own_folder and path not in kept:
                remove(path)


def _names(paths: list[Path]) -> str:
    return shorten([printable(path.name) for path in paths], 10)


def output_problem(target: Path) -> str | None:
    """Return why a file cannot be written as an average, ``None`` if it can.

    What is there may be replaced only if it is an average of an earlier fit.
    """
    try:
        probe(target)
        if not target.exists() or read_manifest(target) is not None:
            return None
    except CheckpointError:
        # it is there, and it is no checkpoint at all
        pass
    except OSError as error:
        return f"must be a file that can be written, got {target}: {error}."
    return f"is a file that it did not write: {target}. Choose another name."
