"""A CSV file that is only appended to, gets new columns on the right, and finds its place again after a resume.

Cells are text that needs no quoting (numbers and plain words); column names are quoted where they must be. Nothing
here knows a Trainer.
"""

from __future__ import annotations

import codecs
import csv
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from lightning_plugins.core.append_only_file import AppendOnlyFile
from lightning_plugins.core.files import free_name, is_full_disk, move_aside, open_regular, replace_file
from lightning_plugins.core.user_warning import warn
from lightning_plugins.statistics.rows import TRAIN, StatisticsRow
from lightning_plugins.statistics.running import S4TF_NAMES

_KEY = ("epoch", "batch", "phase")

Cells = dict[str, str]


class CSVFile:
    """Rows of text cells in a local CSV file.

    Args:
        path: The file. It is opened, and the header written, with the first row.
        separator: Between cells: ``","``, or S4TF's ``", "``.
        columns: The only columns, in order; ``None`` takes those of the first row, and new ones go to the right.

    Example:
        >>> import tempfile
        >>> file = CSVFile(Path(tempfile.mkdtemp()) / "log.csv")
        >>> file.add([{"epoch": "1", "batch": "1"}, {"epoch": "1", "batch": "2", "loss": "0.5"}])
        >>> file.close()
        >>> print(file.path.read_text(), end="")
        epoch,batch,loss
        1,1,
        1,2,0.5
    """

    def __init__(self, path: Path, *, separator: str = ",", columns: Sequence[str] | None = None) -> None:
        self.path = path
        self._separator = separator
        self._fixed = columns is not None
        self._columns: list[str] = list(columns or ())
        self._file: AppendOnlyFile | None = None
        self._is_new = False
        self._waiting: list[Mapping[str, str]] = []
        # the list of rows that was handed over last, and where the file ends with each of them
        self._sent: tuple[list[Mapping[str, str]], list[int]] = ([], [])
        self._rows = 0
        self._last_key: list[str] = []
        # of those that were added
        self._last_row: Mapping[str, str] | None = None
        self._complained: set[str] = set()

    def add(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Append rows; what a full disk does not take waits in memory for the next call."""
        if not rows:
            return
        self._waiting.extend(rows)
        self._rows += len(rows)
        self._last_row = rows[-1]
        self._write()

    def begin(self) -> Path | None:
        """Start a new file; return where an existing one was moved to."""
        self._is_new = True
        return move_aside(self.path)

    def mark(self) -> dict[str, Any]:
        """Return the place that :meth:`resume` finds again: rows so far, and what the last one is called."""
        last = self._last_key if self._last_row is None else _key(self._last_row)
        return {"rows": self._rows, "last": list(last)}

    def resume(self, mark: Mapping[str, Any]) -> list[str]:
        """Go on after the row at ``mark``; return what there is to say about the file that was found.

        Later rows, which will be written again, are moved to a file beside this one. If the file has lost rows, what
        there is stays; if its rows are not those of ``mark``, it is moved aside as a whole.
        """
        self.close()
        self._rows, self._last_key, self._last_row = mark["rows"], list(mark["last"]), None
        if not self._rows:
            aside = self.begin()
            return [f"{self.path.name} was moved to {aside.name}."] if aside else []
        if not self.path.exists():
            return [f"{self.path} is not there any more: the {self._rows} rows before the checkpoint are missing."]
        with open_regular(self.path) as file:
            return self._find_place(file.read())

    def close(self) -> None:
        """Close the file; rows that never found room are counted in a warning."""
        if self._waiting:
            self._write()
        if self._waiting:
            warn(f"{len(self._waiting)} rows of {self.path} could not be written.")
            self._waiting.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    # writing

    def _write(self) -> None:
        self._let_go()
        try:
            if not self._fixed and not set(self._columns).issuperset(chain(*self._waiting)):
                self._make_room_for_columns()
            join, columns, file = self._separator.join, self._columns, self._open()
            lines = [(join(map(row.get, columns, repeat(""))) + "\n").encode() for row in self._waiting]
            header = [self._header(columns)] if lines and not file.size else []
            ends = list(accumulate(map(len, [*header, *lines]), initial=file.size))[len(header) + 1 :]
            self._sent = self._waiting, ends
            file.append([*header, *lines])
        except OSError as error:
            self._let_go()
            when = "when there is room again" if is_full_disk(error) else "as soon as that works"
            self._complain_once(
                "disk",
                f"{self.path} could not be written ({error}): training goes on, the rows wait in memory and are "
                f"written {when}.",
            )
            return
        self._let_go()
        self._complained.discard("disk")

    def _let_go(self) -> None:
        """Forget the rows that the file has: as soon as it has them, or later, if Ctrl-C came in between."""
        sent, ends = self._sent
        if sent is self._waiting and self._file is not None:
            self._waiting = self._waiting[bisect_right(ends, self._file.size) :]

    def _make_room_for_columns(self) -> None:
        # in the order in which the rows have them
        wider = list(dict.fromkeys(chain(self._columns, *self._waiting)))
        if self._columns and self._open().size:
            self._rewrite(wider, padding=len(wider) - len(self._columns))
        self._columns = wider

    def _open(self) -> AppendOnlyFile:
        if self._file is not None and self._file.is_deleted:
            self._file.close()
            self._file = None
            warn(f"{self.path} was deleted during the run: a new file has the rows from here on.")
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._is_new:
                # that of another run, which began in the same moment and writes on in the file that is moved
                move_aside(self.path)
            self._file = AppendOnlyFile(self.path, new=self._is_new)
            self._is_new = False
        elif not self._file.is_in_place:
            self._complain_once(
                "moved",
                f"{self.path} was moved or replaced during the run; rows are still written to the original file.",
            )
        return self._file

    def _rewrite(self, columns: list[str], padding: int) -> None:
        """Put a wider file in place of this one, in one atomic step; the one rewrite that a new column costs."""
        file = self._open()
        content = file.read()
        body = content[content.index(b"\n") + 1 :]
        if not file.is_in_place:
            self.path = free_name(self.path)
        blank = self._separator * padding
        replace_file(self.path, self._header(columns), body.replace(b"\n", f"{blank}\n".encode()))
        file.close()
        self._file = AppendOnlyFile(self.path)

    def _header(self, columns: Sequence[str]) -> bytes:
        return (self._separator.join(map(_quoted, columns)) + "\n").encode()

    def _complain_once(self, about: str, message: str) -> None:
        if about not in self._complained:
            self._complained.add(about)
            warn(message)

    # resuming

    def _find_place(self, content: bytes) -> list[str]:
        # a spreadsheet may have put a mark of the encoding before the first name
        lines = [line for line in content.removeprefix(codecs.BOM_UTF8).splitlines(keepends=True) if line.strip()]
        header = _cells(lines[0]) if lines else []
        if header[:2] != ["epoch", "batch"]:
            return self._give_up("its first line does not name the columns")
        if lines[0].startswith(b"epoch") and not lines[0].startswith(f"epoch{self._separator}batch".encode()):
            return self._give_up("it is of another layout")
        if self._fixed and header != self._columns:
            return self._give_up(f"its columns are not {', '.join(self._columns)}")
        place = self._row_number(lines, header)
        if place is None and len(lines) > self._rows + 1:
            return self._give_up(f"row {self._rows} is not that of the checkpoint")
        said = []
        if place is None:
            place = len(lines) - 1
            said.append(f"{self.path} has lost {self._rows - place or 1} rows; the run goes on after what is there.")
        elif place != self._rows:
            said.append(f"{self.path} has {place} rows up to the checkpoint, where {self._rows} were written.")
        self._columns, self._rows = header, place
        return said + self._keep(lines[: place + 1], lines[place + 1 :], content)

    def _keep(self, kept: list[bytes], later: list[bytes], content: bytes) -> list[str]:
        """Leave ``kept`` in the file and put ``later`` beside it first, so that no kill loses a row."""
        said = []
        if later:
            beside = free_name(self.path, "replaced")
            replace_file(beside, kept[0], *later)
            said = [f"{len(later)} rows after the checkpoint were moved from {self.path.name} to {beside.name}."]
        # an editor may have changed the line ends
        whole = b"".join(line.rstrip(b"\r\n") + b"\n" for line in kept)
        if whole != content:
            replace_file(self.path, whole)
        return said

    def _row_number(self, lines: list[bytes], header: list[str]) -> int | None:
        """Return which line is the last row before the checkpoint; line 0 is the header."""

        def is_it(line: bytes) -> bool:
            return _key(dict(zip(header, _cells(line), strict=False))) == self._last_key

        if len(lines) > self._rows and is_it(lines[self._rows]):
            return self._rows
        return next((number for number in range(len(lines) - 1, 0, -1) if is_it(lines[number])), None)

    def _give_up(self, why: str) -> list[str]:
        aside = move_aside(self.path)
        self._rows, self._columns = 0, (self._columns if self._fixed else [])
        return [f"{self.path} was damaged: {why}. It was moved to {aside and aside.name}, and a new file begins."]


def _key(row: Mapping[str, str]) -> list[str]:
    return [row.get(name, "") for name in _KEY]


def _quoted(name: str) -> str:
    """Return a column's name as a cell; in quotes where it needs them."""
    return f'"{name.replace(chr(34), chr(34) * 2)}"' if re.search(r'[,"\r\n]|^ | $|^$', name) else name


def _cells(line: bytes) -> list[str]:
    """Return the cells of a line, none if it is of no CSV file."""
    try:
        text = line.decode(errors="replace").rstrip("\r\n")
        return [cell.strip() for cell in next(csv.reader([text], skipinitialspace=True), [])]
    except csv.Error:
        return []


# how a row reads as cells


def number_cells(row: StatisticsRow) -> Cells:
    """Return the cells of the default layout: whole numbers from 1, and every digit of the statistics."""
    cells = {
        "epoch": str(row.epoch),
        "batch": str(row.batch),
        "phase": row.phase,
        "step": str(row.step),
        "lr": "" if row.lr is None else repr(row.lr),
    }
    for name, value in (row.values or {}).items():
        cells[name] = repr(value)
    if row.loss_step is not None:
        cells["loss_step"] = repr(row.loss_step)
    cells["time"] = f"{row.seconds:.3f}"
    return cells


def s4tf_cells(row: StatisticsRow) -> Cells:
    """Return the cells of Swift for TensorFlow's layout: ``1/12``, ``3/468``, its names, float32 at its shortest."""
    cells = {"epoch": _of(row.epoch, row.epochs), "batch": _of(row.batch, row.batches)}
    for name, value in (row.values or {}).items():
        cells[S4TF_NAMES.get(name, name)] = shortest_float32(value)
    return cells


LAYOUTS: Mapping[str, Callable[[StatisticsRow], Cells]] = {"numbers": number_cells, "s4tf": s4tf_cells}
SEPARATORS = {"numbers": ",", "s4tf": ", "}
BASE_COLUMNS = {"numbers": ("epoch", "batch", "phase", "step", "lr"), "s4tf": ("epoch", "batch")}


def epoch_cells(layout: str, train: StatisticsRow | None, validation: StatisticsRow | None) -> Cells:
    """Return one row for a whole epoch: ``train_<name>`` and ``val_<name>``, blank where nothing was measured.

    Args:
        layout: ``"numbers"`` or ``"s4tf"``.
        train: The training phase's last row.
        validation: The last row of the epoch's last validation.
    """
    make = LAYOUTS[layout]
    lead = train or validation
    base = {} if lead is None else make(lead)
    cells = {name: base[name] for name in BASE_COLUMNS[layout] if name in base and name != "phase"}
    for prefix, row in (("train", train), ("val", validation)):
        names = [] if row is None else [S4TF_NAMES.get(n, n) if layout == "s4tf" else n for n in row.values or {}]
        made = {} if row is None else make(row)
        cells |= {f"{prefix}_{name}": made[name] for name in names}
    if "time" in base:
        cells["time"] = f"{max(row.seconds for row in (train, validation) if row is not None):.3f}"
    return cells


def epoch_columns(names: tuple[str, ...], layout: str) -> tuple[str, ...]:
    """Return every column that :func:`epoch_cells` can have for statistics called ``names``."""
    shown = [S4TF_NAMES.get(name, name) if layout == "s4tf" else name for name in names]
    base = tuple(name for name in BASE_COLUMNS[layout] if name != "phase")
    clock = ("time",) if layout == "numbers" else ()
    return (*base, *(f"{TRAIN}_{name}" for name in shown), *(f"val_{name}" for name in shown), *clock)


def batch_columns(names: tuple[str, ...], layout: str) -> tuple[str, ...]:
    """Return every column that a row of a batch has for statistics called ``names``."""
    if layout == "s4tf":
        return (*BASE_COLUMNS[layout], *(S4TF_NAMES.get(name, name) for name in names))
    return (*BASE_COLUMNS[layout], *names, "loss_step", "time")


def shortest_float32(value: float) -> str:
    """Return the shortest decimal that is this number in float32.

    Example:
        >>> [shortest_float32(value) for value in (0.1, 1.0, 1e-5, float("nan"), float("-inf"), 1e300)]
        ['0.1', '1.0', '1e-05', 'nan', '-inf', 'inf']
    """
    with np.errstate(over="ignore"):
        return str(np.float32(value))


def _of(number: int, total: int | None) -> str:
    return f"{number}/{'?' if total is None else total}"
