"""Which checkpoints of a directory to average: the last, the best, or a range of steps or epochs.

Files are told apart and ordered by the ``global_step`` inside them, never by date or name. Reading it runs nothing that
a file names.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_plugins.checkpoints.record import Record, looked_up, read_record, read_records
from lightning_plugins.checkpoints.run_identity import newest_run
from lightning_plugins.core.checkpoint_file import CheckpointError, refuse_remote
from lightning_plugins.core.module_state import shorten
from lightning_plugins.core.sharded_directory import is_sharded_checkpoint
from lightning_plugins.core.user_warning import warn
from lightning_plugins.core.validation import a_path, printable, shown, whole_number
from lightning_plugins.core.zero_directory import is_deepspeed_directory

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Selection:
    """Chosen checkpoints.

    Args:
        records: In the order of their steps.
        notes: What the user should know of the choice, one line each.
        scores: Path -> score, for those whose score is known.
    """

    records: list[Record]
    notes: list[str] = field(default_factory=list)
    scores: Mapping[Path, float] = field(default_factory=dict)


def select_checkpoints(
    dirpath: str | Path,
    *,
    last: int | None = None,
    best: int | None = None,
    min_step: int | None = None,
    max_step: int | None = None,
    min_epoch: int | None = None,
    max_epoch: int | None = None,
) -> list[Path]:
    """Return the checkpoints of a directory, in the order of their steps.

    One file for each step: of several with one step the one with the highest ``-v`` number counts, which
    ModelCheckpoint wrote last, and ``last.ckpt`` only when no other has its step. Averages that this package wrote and
    files that hold no step are left out. Of several runs in one directory the newest counts, and a warning names the
    rest: runs with a :class:`CheckpointAveraging` are told apart by what it writes into their files, and the latest
    begun is the newest; others by an epoch that falls while the step rises, and the one with the highest step is.

    A file that cannot be read is an error if it could be one of those asked for. It could not where the step or epoch
    in its name (``step=20``) or its score in ModelCheckpoint's record says so; then a warning names it.

    Args:
        dirpath: The directory. Of a sub-directory only files count that ModelCheckpoint put there because of a slash
            in a metric's name (``filename="{epoch}-{val/loss:.2f}"``).
        last: Only the ones with the highest steps, this many.
        best: Only the ones with the best score, this many: by ModelCheckpoint's record in the newest file, else by the
            metric that each file holds. Files saved weights-only hold none.
        min_step: Only from this step on.
        max_step: Only up to this step.
        min_epoch: Only from this epoch on (counted from 0, as in the files).
        max_epoch: Only up to this epoch.

    Returns:
        Paths, the lowest step first. Fewer than asked for only with a warning.

    Raises:
        NotADirectoryError: If ``dirpath`` is none.
        TypeError: If a number is not whole.
        ValueError: If ``last`` and ``best`` are both given, or no file has a score. A :class:`CheckpointError` if a
            file that could be one of those asked for cannot be read.

    Example:
        >>> import torch
        >>> folder = getfixture("tmp_path")
        >>> for step in (20, 100, 3):
        ...     torch.save({"state_dict": {}, "global_step": step}, folder / f"{step}.ckpt")
        >>> [path.name for path in select_checkpoints(folder, last=2)]
        ['20.ckpt', '100.ckpt']
    """
    refuse_remote(a_path("dirpath", dirpath))
    dirpath = Path(dirpath)
    if not dirpath.is_dir():
        raise NotADirectoryError(f"{dirpath} is not a directory.")
    limits = Limits(min_step, max_step, min_epoch, max_epoch)
    selection = choose(directories=[dirpath], last=last, best=best, limits=limits)
    for note in selection.notes:
        warn(note)
    return [record.path for record in selection.records]


@dataclass(frozen=True)
class Limits:
    """Inclusive limits of steps and epochs; ``None`` is no limit."""

    min_step: int | None = None
    max_step: int | None = None
    min_epoch: int | None = None
    max_epoch: int | None = None

    def __post_init__(self) -> None:
        for name, value in dict(vars(self)).items():
            if value is not None:
                self.__dict__[name] = whole_number(name, value)  # past the frozen dataclass's __setattr__
        for low, high in (("min_step", "max_step"), ("min_epoch", "max_epoch")):
            bottom, top = getattr(self, low), getattr(self, high)
            if bottom is not None and top is not None and bottom > top:
                raise ValueError(f"`{low}` must be at most `{high}`, got {bottom} and {top}.")

    def admit(self, record: Record) -> bool:
        """Return whether a checkpoint lies inside."""
        return _between(record.step, self.min_step, self.max_step) and _between(
            record.epoch, self.min_epoch, self.max_epoch
        )

    def may_admit(self, path: Path) -> bool:
        """Return whether a file that cannot be read may lie inside: it is there, and its name does not deny it."""
        step, epoch = _said(path, "step"), _said(path, "epoch")
        return (
            path.exists()
            and (step is None or _between(step, self.min_step, self.max_step))
            and (epoch is None or _between(epoch, self.min_epoch, self.max_epoch))
        )


def _said(path: Path, what: str) -> int | None:
    """Return the step or epoch that ModelCheckpoint has written into a name, ``None`` if there is none."""
    found = re.search(rf"(?<!\w){what}=(\d+)(?![\d.])", path.stem)
    return int(found[1]) if found else None


def _between(value: int | None, low: int | None, high: int | None) -> bool:
    if value is None:
        return low is None and high is None
    return (low is None or value >= low) and (high is None or value <= high)


def found_in(dirpath: Path) -> list[Path]:
    """Return what may be a checkpoint in a directory, by name."""
    return sorted(path for path in dirpath.iterdir() if _may_be_checkpoint(path))


def _may_be_checkpoint(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return is_checkpoint_directory(path) if path.is_dir() else path.suffix in SUFFIXES


def is_checkpoint_directory(path: Path) -> bool:
    """Return whether a directory is one checkpoint; those of DeepSpeed are found, to be told of."""
    return is_sharded_checkpoint(path) or is_deepspeed_directory(path)


def _found_below(dirpath: Path) -> list[Record]:
    """Return the checkpoints in sub-directories that ModelCheckpoint has put there, by its own record in them."""
    found = []
    for folder, folders, names in os.walk(dirpath):
        here = Path(folder)
        inside = [name for name in folders if not name.startswith(".")]
        folders[:] = [] if is_checkpoint_directory(here) else inside
        if here == dirpath:
            continue
        for path in sorted(here / name for name in [*names, *inside] if _may_be_checkpoint(here / name)):
            try:
                record = read_record(path)
            except (CheckpointError, OSError):
                # what lies below a directory was not asked for, so that a damaged file there is no error
                continue
            if path.relative_to(dirpath).as_posix() in record.written:
                found.append(record)
    return found


def choose(
    paths: Sequence[Path] = (),
    directories: Sequence[Path] = (),
    *,
    last: int | None = None,
    best: int | None = None,
    limits: Limits | None = None,
) -> Selection:
    """Choose among checkpoints, and those in directories, as :func:`select_checkpoints` does."""
    if last is not None and best is not None:
        raise ValueError(f"`last` and `best` cannot be given together, got last={shown(last)} and best={shown(best)}.")
    last = None if last is None else whole_number("last", last, at_least=1, unit="checkpoints")
    best = None if best is None else whole_number("best", best, at_least=1, unit="checkpoints")
    limits = limits or Limits()
    there, notes, faults = _there(paths, directories)
    records = sorted(filter(limits.admit, there), key=step_of)
    ranking = _ranking(records)
    scores, mode = known_scores(records)
    if best is not None and (records or not faults):
        records = _best(records, scores, mode, best, directories)
    elif last is not None:
        records = last_of(records, last)
    asked = last or best
    possible = [path for path in faults if limits.may_admit(path)]
    if len(records) == last:
        possible = list(filter(Limits(min_step=step_of(records[0])).may_admit, possible))
    elif len(records) == best:
        possible = _no_worse(possible, ranking, [scores[record.path] for record in records], mode)
    if possible:
        raise CheckpointError(
            f"{shorten([faults[path].rstrip('.') for path in possible], 10)}. What cannot be read may be one of the "
            "checkpoints asked for: take it out of the directory, or name the files."
        )
    notes += [f"Left out: {why}" for why in faults.values()]
    if asked is not None and len(records) < asked:
        what = "with a score " if best else ""
        where = "" if records else f" in {shorten([str(directory) for directory in directories])}"
        notes.append(f"{asked} checkpoints were asked for, {len(records)} {what}found{where}.")
    return Selection(records, notes, scores)


def _there(paths: Sequence[Path], directories: Sequence[Path]) -> tuple[list[Record], list[str], dict[Path, str]]:
    """Return what there is to choose from, what to say of the rest, and why files in directories cannot be read."""
    named, notes = _usable([read_record(path) for path in paths])
    records = one_per_step(named)
    faults: dict[Path, str] = {}
    for directory in directories:
        readable, unreadable = read_records(found_in(directory))
        of_run, more = _of_newest_run(directory, readable)
        records, notes, faults = records + one_per_step(of_run), notes + more, faults | unreadable
    return records, notes, faults


def _of_newest_run(directory: Path, readable: list[Record]) -> tuple[list[Record], list[str]]:
    """Return the checkpoints of the newest run in and below a directory, and what to say of the rest."""
    records, notes = _usable([*readable, *_found_below(directory)])
    told = {record.path: (record.lineage, record.step or 0, record.epoch) for record in records}
    newest = set(newest_run(list(told), told))
    rest = [printable(str(path.relative_to(directory))) for path in told if path not in newest]
    if rest:
        notes.append(f"Left out, as they are of another run than the newest in {directory}: {shorten(rest, 10)}.")
    return [record for record in records if record.path in newest], notes


def _usable(records: Iterable[Record]) -> tuple[list[Record], list[str]]:
    """Return the checkpoints that hold a step and are no averages."""
    ordinary = [record for record in records if record.manifest is None]
    without = [printable(record.path.name) for record in ordinary if record.step is None]
    notes = [f"Left out, as they hold no step: {', '.join(without)}."] if without else []
    return [record for record in ordinary if record.step is not None], notes


def one_per_step(records: Iterable[Record]) -> list[Record]:
    """Return one checkpoint for each step, in the order of steps; those without a step are left out."""
    chosen: dict[int, Record] = {}
    for record in records:
        if record.step is not None:
            other = chosen.get(record.step)
            if other is None or _precedence(record.path) > _precedence(other.path):
                chosen[record.step] = record
    return [chosen[step] for step in sorted(chosen)]


def _precedence(path: Path) -> tuple[bool, int, str]:
    """Return what decides between files of one step: not ``last``, then ModelCheckpoint's version, then the name."""
    is_last = path.is_symlink() or re.fullmatch(r"last(-v\d+)?", path.stem) is not None
    version = re.search(r"-v(\d+)$", path.stem)
    return not is_last, int(version[1]) if version else 0, path.name


def known_scores(records: Iterable[Record]) -> tuple[dict[Path, float], str]:
    """Return the scores of checkpoints and which are better.

    ModelCheckpoint's record in the newest file counts first: it names every file that was among the best by then. A
    file that it does not name is scored by the metric it holds itself. Files are named from ModelCheckpoint's directory
    on, so that a copied run keeps its scores.
    """
    newest_first = list(reversed(list(records)))
    record = next((found for found in newest_first if found.scores), None)
    scores = {}
    for found in newest_first:
        score = looked_up(found.path, record.scores) if record else None
        score = found.score if score is None else score
        if score is not None and not math.isnan(score):
            scores[found.path] = score
    return scores, record.mode if record else next((found.mode for found in newest_first if found.score), "min")


def _ranking(records: Iterable[Record]) -> Mapping[str, float]:
    """Return ModelCheckpoint's record in the newest file that has one: file -> score."""
    return next((record.scores for record in reversed(list(records)) if record.scores), {})


def _no_worse(paths: list[Path], ranking: Mapping[str, float], chosen: list[float], mode: str) -> list[Path]:
    """Return those that are not known to be worse than every chosen score."""
    sign = 1 if mode == "min" else -1
    worst = max(sign * score for score in chosen)
    scores = {path: looked_up(path, ranking) for path in paths}
    return [path for path, score in scores.items() if score is None or sign * score <= worst]


def _best(
    records: list[Record], scores: Mapping[Path, float], mode: str, count: int, directories: Sequence[Path]
) -> list[Record]:
    if not records and directories:
        raise CheckpointError(
            f"`best` needs checkpoints, and there are none in {shorten(list(map(str, directories)))}."
        )
    if not scores:
        raise CheckpointError(
            "`best` needs scores, and these checkpoints hold none: ModelCheckpoint writes them with `monitor` set and "
            "save_weights_only=False. Use `last`, or name the files."
        )
    return best_of(records, scores, count, mode)


def last_of(records: Iterable[Record], count: int) -> list[Record]:
    """Return the records with the highest steps, in their order."""
    return sorted(records, key=step_of)[-count:]


def best_of(records: Iterable[Record], scores: Mapping[Path, float], count: int, mode: str) -> list[Record]:
    """Return the records with the best scores, in the order of steps; of equal ones the later.

    Args:
        records: Checkpoints.
        scores: Path -> score; a checkpoint without one is none of the best.
        count: How many.
        mode: ``"min"`` or ``"max"``.
    """
    sign = 1 if mode == "min" else -1
    scored = [record for record in records if record.path in scores]
    ranked = sorted(scored, key=lambda record: (sign * scores[record.path], -step_of(record)))
    return sorted(ranked[:count], key=step_of)


def step_of(record: Record) -> int:
    """Return a checkpoint's step, -1 if it does not say."""
    return -1 if record.step is None else record.step
