"""What the command ``lightning-plugins average`` does, without its argument parsing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_plugins.checkpoints.average import average_checkpoints, checked_weights, distinct_files
from lightning_plugins.checkpoints.record import Record, read_record
from lightning_plugins.checkpoints.selection import Limits, Selection, choose, is_checkpoint_directory
from lightning_plugins.core.checkpoint_file import refuse_remote
from lightning_plugins.core.module_state import shorten
from lightning_plugins.core.validation import a_path, printable


@dataclass(frozen=True)
class PlannedFile:
    """One line of the table of what is averaged.

    Args:
        path: The checkpoint.
        step: Its optimizer step, ``None`` if it does not say.
        epoch: Its epoch, from 0.
        score: Its value of the monitored metric.
        weight: Its share of the mean; the shares sum to 1.
        nbytes: Its size on disk, optimizer states and all.
    """

    path: Path
    step: int | None
    epoch: int | None
    score: float | None
    weight: float
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What will be averaged.

    Args:
        rows: One for each checkpoint.
        notes: What the user should know of the choice, one line each.
    """

    rows: list[PlannedFile]
    notes: list[str]

    @property
    def paths(self) -> list[Path]:
        """The checkpoints."""
        return [row.path for row in self.rows]

    def table(self) -> str:
        """Return the rows as aligned text under a header."""
        lines = [("step", "epoch", "score", "weight", "MB", "checkpoint")]
        for row in self.rows:
            score = "-" if row.score is None else f"{row.score:.6g}"
            step, epoch = ("-" if number is None else str(number) for number in (row.step, row.epoch))
            lines.append((step, epoch, score, f"{row.weight:.4f}", f"{row.nbytes / 1e6:.1f}", printable(str(row.path))))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        return "\n".join(
            "  ".join([*(cell.rjust(width) for cell, width in zip(line[:5], widths, strict=True)), line[5]])
            for line in lines
        )

    def run(
        self, output: str | Path, *, trust: bool = False, overwrite: bool = False, progress: bool | None = None
    ) -> Path:
        """Average and write ``output``; see :func:`average_checkpoints` for the arguments and what is raised."""
        weights = [row.weight for row in self.rows]
        return Path(
            average_checkpoints(  # type: ignore[arg-type]  # a path, since an output is named
                self.paths, output, weights=weights, trust=trust, overwrite=overwrite, progress=progress
            )
        )


def plan_average(
    inputs: Sequence[str | Path],
    *,
    last: int | None = None,
    best: int | None = None,
    steps: str | None = None,
    weights: Sequence[float] | None = None,
) -> Plan:
    """Choose what to average, without loading it.

    Args:
        inputs: Checkpoints, or directories of checkpoints, which stand for all in them.
        last: Only the ones with the highest steps, this many.
        best: Only the ones with the best score, this many.
        steps: Only from step A to step B, both included, as ``"A:B"``; either may be left out.
        weights: One number for each chosen checkpoint, in the table's order; ``None`` weighs all alike.

    Returns:
        The plan: rows for a table, and :meth:`Plan.run`.

    Raises:
        ValueError: If ``last`` and ``best`` come together, ``steps`` cannot be read, one file comes twice, or fewer
            than two checkpoints are left; also :class:`CheckpointError`.
        FileNotFoundError: If an input does not exist.
    """
    given = [Path(a_path("inputs", path)) for path in inputs]
    for path, text in zip(given, inputs, strict=True):
        refuse_remote(text)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
    directories = [path for path in given if path.is_dir() and not is_checkpoint_directory(path)]
    files = [path for path in given if path not in directories]
    chosen_by_user = not directories and last is None and best is None and steps is None
    selection = (
        Selection([read_record(path) for path in files])
        if chosen_by_user
        else choose(files, directories, last=last, best=best, limits=parse_steps(steps))
    )
    count = len(selection.records)
    if count < 2:
        where = f" in {shorten(list(map(str, directories)))}" if directories else ""
        raise ValueError(f"At least two checkpoints are needed, found {count}{where}.")
    distinct_files([record.path for record in selection.records])
    numbers = checked_weights(weights, count)
    shares = [number / math.fsum(numbers) for number in numbers]
    rows = [_row(record, selection, share) for record, share in zip(selection.records, shares, strict=True)]
    notes = sorted({f"A run with an EMA: {record.ema}." for record in selection.records if record.ema})
    return Plan(rows, [*selection.notes, *notes])


def _row(record: Record, selection: Selection, share: float) -> PlannedFile:
    score = selection.scores.get(record.path, record.score)
    return PlannedFile(record.path, record.step, record.epoch, score, share, size_on_disk(record.path))


def size_on_disk(path: Path) -> int:
    """Return the bytes of a file, or of all files in a directory."""
    files = [inner for inner in path.rglob("*") if inner.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def parse_steps(text: str | None) -> Limits:
    """Return the limits that ``"A:B"`` means.

    Raises:
        ValueError: If it is written otherwise.

    Example:
        >>> parse_steps("100:")
        Limits(min_step=100, max_step=None, min_epoch=None, max_epoch=None)
    """
    if text is None:
        return Limits()
    low, colon, high = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (low, high)):
        raise ValueError(f"`steps` must be written A:B with whole numbers, either of them optional, got {text!r}.")
    return Limits(int(low) if low else None, int(high) if high else None)
