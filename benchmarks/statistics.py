"""Statistics beside Lightning's ``self.log`` and loggers, csv.writer and torch's SummaryWriter, as ratios.

Run ``python -m benchmarks.statistics``. Everything is measured in turns in one run and the medians are compared, so
that a busy machine slows all of them alike; the spread is the ratio of the slowest to the fastest turn.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins import CSVStatisticsLogger, StatisticsRecorder, TensorBoardStatisticsLogger
from lightning_plugins.statistics.csv_file import CSVFile
from lightning_plugins.statistics.event_file import EventFile
from lightning_plugins.statistics.layouts import number_cells
from lightning_plugins.statistics.rows import Row
from lightning_plugins.statistics.running import Snapshot

NAMES = ("loss", "accuracy", "top5_accuracy", "perplexity", "f1")


class Tiny(pl.LightningModule):
    """Four layers of eight units: a model so small that logging shows."""

    def __init__(self, *, log: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
        self.logs = log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        if self.logs:
            self.log("train_loss", loss)
            self.log("train_accuracy", (logits.argmax(1) == batch[1]).float().mean())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Stopwatch(pl.Callback):
    """Times the training loop between its first and its last batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 20:  # the first batches warm up
            self.started = time.process_time()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds = time.process_time() - self.started


def fit(steps: int, logger: Any, callbacks: list[Any], *, log: bool) -> float:
    """Return microseconds per training step."""
    watch = Stopwatch()
    data = TensorDataset(torch.randn(4 * steps, 8), torch.randint(8, (4 * steps,)))
    trainer = pl.Trainer(
        max_epochs=1, logger=logger, callbacks=[*callbacks, watch], accelerator="cpu", log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Tiny(log=log), DataLoader(data, batch_size=4))
    return watch.seconds / (steps - 20) * 1e6


def in_turns(turns: int, subjects: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Return what every subject measured, one measurement of each per turn."""
    measured: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(turns):
        for name, subject in subjects.items():
            measured[name].append(subject())
    return measured


def training(turns: int, steps: int, folder: Path) -> None:
    number = iter(range(10**6))

    def place() -> Path:
        return folder / str(next(number))

    def recorder() -> StatisticsRecorder:
        return StatisticsRecorder(["accuracy"])

    measured = in_turns(
        turns,
        {
            "bare Trainer": lambda: fit(steps, False, [], log=False),
            "two self.log": lambda: fit(steps, False, [], log=True),
            "two self.log + Lightning CSVLogger": lambda: fit(steps, CSVLogger(place()), [], log=True),
            "two self.log + Lightning TensorBoardLogger": lambda: fit(steps, TensorBoardLogger(place()), [], log=True),
            "StatisticsRecorder(loss, accuracy)": lambda: fit(steps, False, [recorder()], log=False),
            "... + CSVStatisticsLogger": lambda: fit(
                steps, False, [recorder(), CSVStatisticsLogger(place() / "log.csv")], log=False
            ),
            "... + TensorBoardStatisticsLogger": lambda: fit(
                steps, False, [recorder(), TensorBoardStatisticsLogger(place())], log=False
            ),
        },
    )
    bare = measured["bare Trainer"]
    print(f"\nTraining step, 4 x Linear(8, 8), batch of 4, a row per step; median of {turns} turns")
    print(f"{'':46s}{'us/step':>9s}{'added':>8s}{'spread':>8s}{'added, as a share of Lightning':>32s}")
    added = {}
    for name, values in measured.items():
        added[name] = statistics.median(v - b for v, b in zip(values, bare, strict=True))
        peer = {
            "... + CSVStatisticsLogger": "two self.log + Lightning CSVLogger",
            "... + TensorBoardStatisticsLogger": "two self.log + Lightning TensorBoardLogger",
        }.get(name)
        share = f"{added[name] / added[peer]:.2f} (limit 0.25)" if peer else ""
        spread = max(values) / min(values)
        print(f"{name:46s}{statistics.median(values):9.0f}{added[name]:8.0f}{spread:8.2f}{share:>32s}")


def rows(count: int, first: int = 0) -> list[Row]:
    """Return evaluated rows, as a ledger hands them out."""
    snapshot = Snapshot(1, (), {})
    return [
        Row("train", 1, 1, i + 1, count, i + 1, i, 0.1, i / 1e3, 1e9 + i / 1e3, snapshot,
            {name: 1.0 / (i + 2 + k) for k, name in enumerate(NAMES)})
        for i in range(first, first + count)
    ]  # fmt: skip


def per_item(items: int, work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) / items * 1e6


def csv_rows(turns: int, count: int, folder: Path) -> None:
    made = rows(count)
    path = folder / "rows.csv"

    def ours() -> None:
        path.unlink(missing_ok=True)
        file = CSVFile(path)
        for start in range(0, count, 100):
            file.add([number_cells(row) for row in made[start : start + 100]])
        file.close()

    def csv_writer() -> None:
        with path.open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(("epoch", "batch", "phase", "step", "lr", *NAMES, "time"))
            for index, row in enumerate(made):
                writer.writerow((row.epoch, row.batch, row.phase, row.step, row.lr, *row.values.values(), row.seconds))
                if index % 100 == 99:
                    handle.flush()

    def lightnings(save_every: int) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            logger = CSVLogger(place, flush_logs_every_n_steps=10**9)
            for index, row in enumerate(made):
                logger.log_metrics(row.values, row.step)
                if index % save_every == save_every - 1:
                    logger.save()

    table(
        f"CSV row of 11 cells, {count} rows",
        in_turns(
            turns,
            {
                "csv.writer, flush every 100 rows": lambda: per_item(count, csv_writer),
                "ours, flush every 100 rows": lambda: per_item(count, ours),
                "Lightning CSVLogger, save every 100 rows": lambda: per_item(count, lambda: lightnings(100)),
                "Lightning CSVLogger, save every row": lambda: per_item(count, lambda: lightnings(1)),
            },
        ),
        "us/row",
    )


def growth(turns: int, largest: int, folder: Path) -> None:
    """Show that a row costs the same in a long file, and what a new column costs spread over all rows."""
    print(f"\nCSV row in files of growing length, written 500 at a time; median of {turns} turns")
    print(f"{'rows':>10s}{'us/row':>9s}{'with a new column half way':>28s}{'that rewrite, ms':>18s}")
    block = [number_cells(row) for row in rows(500)]
    wider = [{**cells, "late": "0.5"} for cells in block]
    sizes = [size for size in (10**3, 10**4, 10**5, 10**6) if size <= largest]
    for size in sizes:

        def write(size: int = size, *, late: bool) -> float:
            path = folder / "growth.csv"
            path.unlink(missing_ok=True)
            file = CSVFile(path)
            started = time.perf_counter()
            for start in range(0, size, 500):
                file.add(wider if late and start >= size // 2 else block)
            file.close()
            return (time.perf_counter() - started) / size * 1e6

        measured = in_turns(
            turns,
            {"plain": lambda size=size: write(size, late=False), "late": lambda size=size: write(size, late=True)},
        )
        plain, late = (statistics.median(measured[name]) for name in ("plain", "late"))
        print(f"{size:10d}{plain:9.2f}{late:28.2f}{(late - plain) * size / 1e3:18.1f}")


def scalars(turns: int, count: int, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    made = [(row.step, row.wall_time, row.values) for row in rows(count)]

    def ours() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            file = EventFile(Path(place))
            for start in range(0, count, 100):
                file.add(made[start : start + 100])
            file.close()

    def torchs() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place, SummaryWriter(place) as writer:
            for step, wall_time, values in made:
                for tag, value in values.items():
                    writer.add_scalar(tag, value, step, wall_time)

    def lightnings() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            logger = TensorBoardLogger(place)
            for step, _, values in made:
                logger.log_metrics(values, step)
            logger.finalize("success")

    def floor() -> None:
        with (folder / "floor").open("wb") as handle:
            for _ in made:
                handle.write(b"x" * 17 * len(NAMES))

    table(
        f"TensorBoard scalar, 5 a step, {count} steps",
        in_turns(
            turns,
            {
                "ours": lambda: per_item(5 * count, ours),
                "torch add_scalar": lambda: per_item(5 * count, torchs),
                "Lightning TensorBoardLogger.log_metrics": lambda: per_item(5 * count, lightnings),
                "the bytes alone": lambda: per_item(5 * count, floor),
            },
        ),
        "us/scalar",
    )


def table(title: str, measured: dict[str, list[float]], unit: str) -> None:
    first = statistics.median(next(iter(measured.values())))
    print(f"\n{title}; median of {len(next(iter(measured.values())))} turns")
    print(f"{'':46s}{unit:>10s}{'ratio':>8s}{'spread':>8s}")
    for name, values in measured.items():
        middle = statistics.median(values)
        print(f"{name:46s}{middle:10.2f}{middle / first:8.2f}{max(values) / min(values):8.2f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=10**6, help="longest CSV file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        training(options.turns, options.steps, Path(folder))
        csv_rows(options.turns, 10_000, Path(folder))
        scalars(options.turns, 2000, Path(folder))
        growth(max(1, options.turns // 2), options.rows, Path(folder))


if __name__ == "__main__":
    main()
