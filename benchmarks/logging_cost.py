"""What statistics cost: a training step with them, a CSV row, a TensorBoard scalar, rows in ever longer files."""

import csv
import shutil
import tempfile
from pathlib import Path
from statistics import median, quantiles

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from benchmarks.harness import interleaved, quiet, report, table
from lightning_plugins import CSVStatisticsLogger, StatisticsRecorder, TensorBoardStatisticsLogger
from lightning_plugins.statistics.csv_file import CSVFile, number_cells
from lightning_plugins.statistics.event_file import EventFile
from lightning_plugins.statistics.rows import StatisticsRow
from lightning_plugins.statistics.running import PhaseState

NAMES = ("loss", "accuracy", "top5_accuracy", "perplexity", "f1")
STEPS, ROWS, EVENTS = 1000, 10_000, 1000
LENGTHS = {10**3: 21, 10**4: 11, 10**5: 5, 10**6: 3}  # rows of a file -> rounds


class Tiny(pl.LightningModule):
    """Four layers of eight units: a model so small that logging shows."""

    def __init__(self, logs):
        super().__init__()
        self.layers = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
        self.logs = logs

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        if self.logs:
            self.log("train_loss", loss)
            self.log("train_accuracy", (logits.argmax(1) == batch[1]).float().mean())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(steps, callbacks=(), *, logger=False, logs=False):
    data = TensorDataset(torch.randn(4 * steps, 8), torch.randint(8, (4 * steps,)))
    trainer = pl.Trainer(
        max_epochs=1, logger=logger, callbacks=list(callbacks), accelerator="cpu", log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Tiny(logs), DataLoader(data, batch_size=4))


def training(folder, steps, rounds):
    """A row per step, the worst case: a step is about 0.4 ms long."""
    number = iter(range(10**6))

    def place():
        return folder / str(next(number))

    def recorder():
        return StatisticsRecorder(["accuracy"])

    return interleaved(
        {
            "bare Trainer": lambda: fit(steps),
            "two self.log": lambda: fit(steps, logs=True),
            "two self.log, Lightning's CSVLogger": lambda: fit(steps, logger=CSVLogger(place()), logs=True),
            "two self.log, Lightning's TensorBoardLogger": lambda: fit(
                steps, logger=TensorBoardLogger(place()), logs=True
            ),
            "StatisticsRecorder of loss and accuracy": lambda: fit(steps, [recorder()]),
            "the same, CSVStatisticsLogger": lambda: fit(steps, [recorder(), CSVStatisticsLogger(place() / "log.csv")]),
            "the same, TensorBoardStatisticsLogger": lambda: fit(
                steps, [recorder(), TensorBoardStatisticsLogger(place())]
            ),
        },
        rounds=rounds,
    )


def added(seconds, steps):
    """What is added to a bare step, and how much of what Lightning's way adds; a pair of turns at a time."""
    pairs = [
        ("the same, CSVStatisticsLogger", "two self.log, Lightning's CSVLogger", 0.15),
        ("the same, TensorBoardStatisticsLogger", "two self.log, Lightning's TensorBoardLogger", 0.10),
    ]
    lines = [
        "### Added to a step, as a share of what Lightning's way adds",
        "",
        "| | added us | Lightning's us | share | quartiles | goal |",
        "|---|---:|---:|---:|---:|---|",
    ]
    bare = seconds["bare Trainer"]
    for ours, theirs, goal in pairs:
        mine = [1e6 * (value - base) / steps for value, base in zip(seconds[ours], bare, strict=True)]
        peer = [1e6 * (value - base) / steps for value, base in zip(seconds[theirs], bare, strict=True)]
        low, _, high = quantiles([m / p for m, p in zip(mine, peer, strict=True)], n=4)
        share = median(mine) / median(peer)
        lines.append(
            f"| {ours} | {median(mine):.0f} | {median(peer):.0f} | {share:.2f} | {low:.2f} to {high:.2f} "
            f"| at most {goal:.2f}: {'met' if share <= goal else 'MISSED'} |"
        )
    return "\n".join(lines)


def rows(count):
    """Return evaluated rows, as a buffer hands them out."""
    sums = PhaseState(1, torch.zeros(()), None, None, None, "", (), {})
    return [
        StatisticsRow("train", 1, 1, i + 1, count, i + 1, i, 0.1, i / 1e3, 1e9 + i / 1e3, sums,
            {name: 1.0 / (i + 2 + k) for k, name in enumerate(NAMES)})
        for i in range(count)
    ]  # fmt: skip


def csv_rows(folder, size, rounds):
    made, path = rows(size), folder / "rows.csv"

    def ours():
        path.unlink(missing_ok=True)
        file = CSVFile(path)
        for start in range(0, size, 100):
            file.add([number_cells(row) for row in made[start : start + 100]])
        file.close()

    def csv_writer():
        with path.open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(("epoch", "batch", "phase", "step", "lr", *NAMES, "time"))
            for index, row in enumerate(made):
                writer.writerow((row.epoch, row.batch, row.phase, row.step, row.lr, *row.values.values(), row.seconds))
                if index % 100 == 99:
                    handle.flush()

    def floor():
        with path.open("wb") as handle:
            for _ in range(0, size, 100):
                handle.write(b"x" * 100 * 150)
                handle.flush()

    def lightnings(save_every):
        logger = CSVLogger(folder / "csv", flush_logs_every_n_steps=10**9)
        for index, row in enumerate(made):
            logger.log_metrics(row.values, row.step)
            if index % save_every == save_every - 1:
                logger.save()
        shutil.rmtree(folder / "csv")

    return interleaved(
        {
            "csv.writer, flushed every 100 rows": csv_writer,
            "ours, written every 100 rows": ours,
            "Lightning's CSVLogger, saved every 100 rows": lambda: lightnings(100),
            "Lightning's CSVLogger, saved every row as in a Trainer": lambda: lightnings(1),
            "the bytes alone, 150 a row": floor,
        },
        rounds=rounds,
    )


def scalars(folder, size, rounds):
    made = [(row.step, row.wall_time, row.values) for row in rows(size)]
    place = folder / "events"

    def ours():
        file = EventFile(place)
        for start in range(0, size, 100):
            file.add(made[start : start + 100])
        file.close()
        shutil.rmtree(place)

    def torchs():
        with SummaryWriter(place) as writer:
            for step, wall_time, values in made:
                for tag, value in values.items():
                    writer.add_scalar(tag, value, step, wall_time)
        shutil.rmtree(place)

    def lightnings():
        logger = TensorBoardLogger(place)
        for step, _, values in made:
            logger.log_metrics(values, step)
        logger.finalize("success")
        shutil.rmtree(place)

    def floor():
        place.mkdir()
        with (place / "floor").open("wb") as handle:
            for _ in made:
                handle.write(b"x" * 17 * len(NAMES))
        shutil.rmtree(place)

    return interleaved(
        {
            "ours": ours,
            "torch's add_scalar": torchs,
            "Lightning's TensorBoardLogger.log_metrics": lightnings,
            "the bytes alone": floor,
        },
        rounds=rounds,
    )


def lengths(folder, sizes):
    """A row in files of growing length, 500 written at a time, with and without a column that comes half way."""
    block = [number_cells(row) for row in rows(500)]
    wider = [{**cells, "late": "0.5"} for cells in block]
    path = folder / "long.csv"

    def write(size, late):
        path.unlink(missing_ok=True)
        file = CSVFile(path)
        for start in range(0, size, 500):
            file.add(wider if late and start >= size // 2 else block)
        file.close()

    measured = {}
    for size, rounds in sizes.items():
        seconds = interleaved(
            {
                f"{size:,} rows": lambda size=size: write(size, late=False),
                f"{size:,} rows, a new column half way": lambda size=size: write(size, late=True),
            },
            rounds=rounds,
        )
        measured |= {name: [value / size for value in values] for name, values in seconds.items()}
    return measured


def main(*, quick=False):
    torch.set_num_threads(1)
    quiet()
    steps, size, events, rounds = (8, 200, 200, 2) if quick else (STEPS, ROWS, EVENTS, 7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step = training(folder, steps, 2 if quick else 11)
        row, scalar = csv_rows(folder, size, rounds), scalars(folder, events, rounds)
        length = lengths(folder, {10**3: 2} if quick else LENGTHS)
    tables = [
        table("A training step of 4 x Linear(8, 8), batch of 4, a row per step", step, base="bare Trainer", per=steps),
        added(step, steps),
        table("A CSV row of 11 cells (ours: at most 3)", row, base="csv.writer, flushed every 100 rows", per=size),
        table("A TensorBoard scalar, five per step (ours: at most 6 us where torch takes 57)", scalar, base="ours",
              per=events * len(NAMES)),
        table("A CSV row by the length of its file", length, base="1,000 rows"),
    ]  # fmt: skip
    data = {"step": step, "row": row, "scalar": scalar, "length": length}
    report("logging_cost", tables, data, keep=not quick)


if __name__ == "__main__":
    main()
