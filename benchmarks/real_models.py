"""The whole stack on models that people train: beside the same Trainer without it, and beside Lightning's equivalents.

Three models in batches that fit two CPU cores: the demo's ResNet on 8 x 8 digits, a transformer of GPT-2 small's width
with few layers, a table of 64 columns. All three ways take two batches for an optimizer step and one row of statistics
for a batch. The clock runs from the first batch to the end of the last, so validation, checkpoints and the average of
files are outside. Lightning's StochasticWeightAveraging is not among its callbacks here: it moves the learning rate and
adds an epoch, so its steps are not those of the others.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Seconds, quiet, report, table, turns
from lightning_plugins import (
    EMA,
    CheckpointAveraging,
    CSVStatisticsLogger,
    GradientAccumulation,
    LearningRateScheduler,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    WarmupCosine,
)

BARE, OURS, LIGHTNINGS = "bare Trainer", "the whole stack", "Lightning's equivalents"
WINDOW = 2
GOAL, FROM_MS, ROUNDS = 1.02, 20, 7


class Task(NamedTuple):
    """A network, its samples and how it is trained."""

    network: Callable[[], nn.Module]
    inputs: Callable[[int], torch.Tensor]
    classes: int
    batch: int
    steps: int
    """Batches of the epoch: enough for its beginning and end, where files are opened and closed, to weigh little."""
    optimizer: Callable[[Any], torch.optim.Optimizer]
    targets: tuple[int, ...] = ()
    """The shape of a sample's targets: one class, or one for every token."""


class Language(nn.Module):
    """A causal transformer of GPT-2 small's width, heads and feed-forward."""

    def __init__(self, layers: int, words: int, length: int, width: int = 768) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.words(tokens) + self.places(torch.arange(length))
        return self.head(self.layers(hidden, mask=mask, is_causal=True))


class Model(pl.LightningModule):
    """Trains a task, and times its own epoch."""

    def __init__(self, task: Task, steps: int, *, scheduled: bool, logs: bool) -> None:
        super().__init__()
        self.task, self.network = task, task.network()
        self.steps, self.scheduled, self.logs, self.seconds = steps, scheduled, logs, 0.0

    def forward(self, inputs):
        return self.network(inputs)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 0:
            self.seconds = -time.perf_counter()

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())
        if self.logs:
            self.log("train_loss", loss)
            self.log("train_accuracy", (logits.argmax(-1) == batch[1]).float().mean())
        return loss

    # after the callbacks' hooks of this name
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx + 1 == self.steps:
            self.seconds += time.perf_counter()

    def configure_optimizers(self):
        optimizer = self.task.optimizer(self.parameters())
        if not self.scheduled:
            return optimizer
        steps = self.steps // WINDOW
        schedule = WarmupCosine(steps // 20, steps // 20, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"},
        }


@contextmanager
def the_demo():
    """The programs find each other in their own directory."""
    folder = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, folder)
    try:
        import digits

        yield digits
    finally:
        sys.path.remove(folder)


def resnet() -> nn.Module:
    with the_demo() as demo:
        return demo.Classifier().network


def tasks(*, quick: bool) -> dict[str, Task]:
    """Return the models by their names in the tables."""
    layers, words, length, width = (1, 64, 8, 64) if quick else (2, 8192, 128, 768)

    def sgd(parameters):
        return torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def adamw(parameters):
        return torch.optim.AdamW(parameters, 3e-4, weight_decay=0.1)

    def table_network():
        parts = [nn.Linear(64, 512), nn.ReLU()]
        for _ in range(3):
            parts += [nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU()]
        return nn.Sequential(*parts, nn.Linear(512, 10))

    return {
        "the demo's ResNet, 64 images": Task(resnet, lambda n: torch.randn(n, 1, 8, 8), 10, 64, 200, sgd),
        f"a transformer, {layers} layers of width {width}, 4 x {length} tokens": Task(
            lambda: Language(layers, words, length, width),
            lambda n: torch.randint(words, (n, length)),
            words,
            4,
            20,
            adamw,
            (length,),
        ),
        "a table of 64 columns, 4 layers of width 512, 1024 rows": Task(
            table_network, lambda n: torch.randn(n, 64), 10, 1024, 100, adamw
        ),
    }


def stack(folder: Path, batch: int) -> list[pl.Callback]:
    """Return the callbacks of the README."""
    return [
        GradientAccumulation(effective_batch_size=WINDOW * batch),
        LearningRateScheduler(WarmupCosine(warmup="5%", hold="5%")),
        EMA(0.9999),
        StatisticsRecorder(["accuracy"]),
        CSVStatisticsLogger(folder / "log.csv"),
        TensorBoardStatisticsLogger(folder),
        CheckpointAveraging(last=5),
    ]


def settings(way: str, folder: Path, batch: int) -> dict[str, Any]:
    """Return the Trainer's arguments."""
    if way == OURS:
        return {"callbacks": stack(folder, batch)}
    if way == BARE:
        return {"accumulate_grad_batches": WINDOW}
    callbacks = [
        LearningRateMonitor("step"),
        pl.callbacks.EMAWeightAveraging(decay=0.9999),
        ModelCheckpoint(folder, save_top_k=-1),
    ]
    return {"accumulate_grad_batches": WINDOW, "callbacks": callbacks, "logger": CSVLogger(folder)}


def fitting(task: Task, way: str, folder: Path) -> Callable[[], float]:
    """Return a function that trains once and returns the seconds of a batch."""
    steps = task.steps
    samples = steps * task.batch
    data = TensorDataset(task.inputs(samples), torch.randint(task.classes, (samples, *task.targets)))
    number = count()

    def fit() -> float:
        place = folder / str(next(number))
        torch.manual_seed(0)
        model = Model(task, steps, scheduled=way == LIGHTNINGS, logs=way == LIGHTNINGS)
        options = {"logger": False, "callbacks": [], **settings(way, place, task.batch)}
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            default_root_dir=place,
            log_every_n_steps=1,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in options["callbacks"]),
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(model, DataLoader(data, batch_size=task.batch))
        return model.seconds / steps

    return fit


def verdict(seconds: Seconds) -> str:
    """Return whether the goal is met; ratios are formed round by round, of turns that stood side by side."""
    bare = seconds[BARE]
    ratios = {way: [mine / base for mine, base in zip(seconds[way], bare, strict=True)] for way in (OURS, LIGHTNINGS)}
    low, ratio, high = quantiles(ratios[OURS], n=4)
    if 1e3 * median(bare) < FROM_MS:
        goal = f"the goal is for {FROM_MS} ms and more"
    else:
        goal = f"goal at most {GOAL}: {'met' if ratio <= GOAL else 'MISSED'}"
    return (
        f"A batch with the whole stack takes {ratio:.3f} of a bare one (quartiles {low:.3f} to {high:.3f}; {goal}), "
        f"with Lightning's equivalents {median(ratios[LIGHTNINGS]):.3f}."
    )


def main(*, quick: bool = False) -> None:
    quiet()
    torch.set_num_threads(1 if quick else len(os.sched_getaffinity(0)))
    tables, data = [], {}
    for title, task in tasks(quick=quick).items():
        tried = task._replace(batch=2, steps=2) if quick else task
        with tempfile.TemporaryDirectory() as name:
            ways = (BARE, OURS, LIGHTNINGS)
            fits = {way: fitting(tried, way, Path(name) / str(i)) for i, way in enumerate(ways)}
            seconds = turns(fits, rounds=2 if quick else ROUNDS)
        tables += [table(f"One batch of {title}", seconds, base=BARE, unit="ms"), verdict(seconds)]
        data[title] = seconds
        if not quick:
            print(tables[-2], tables[-1], sep="\n\n", flush=True)
    report("real_models", tables, data, keep=not quick)


if __name__ == "__main__":
    main()
