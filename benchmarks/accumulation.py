"""What exact accumulation and micro-batching cost: per batch of a tiny model, and per step of a larger one."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.harness import interleaved, quiet, report, table
from lightning_plugins import GradientAccumulation, MicroBatching, Tokens

WINDOW = 4


class Network(pl.LightningModule):
    """Linear layers: the smaller they are, the more the loop around them counts."""

    def __init__(self, width, layers):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))

    def training_step(self, batch, batch_idx):
        return self.layers(batch["x"]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def trainer_run(width, layers, batch_size, batches, callbacks=list, **settings):
    """Return a function that fits a network; the loop's own cost is in every candidate."""
    batch = {"x": torch.randn(batch_size, width), "labels": torch.zeros(batch_size, 8, dtype=torch.long)}
    data = DataLoader([batch] * batches, batch_size=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}

    def run():
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=callbacks(), **quiet, **settings
        )
        trainer.fit(Network(width, layers), data)

    return run


def plain_loop(width, layers, batch_size, batches, pieces=1):
    """Return a function that does the same steps in plain torch: the floor."""
    batch = torch.randn(batch_size, width)

    def run():
        network = Network(width, layers)
        optimizer = network.configure_optimizers()
        for _ in range(batches):
            optimizer.zero_grad()
            for piece in batch.chunk(pieces):
                (network.layers(piece).pow(2).mean() / pieces).backward()
            optimizer.step()

    return run


def tiny(rounds, batches):
    """Per batch, for a model so small that the loop is all there is; the bound is 0.2 of the bare Trainer's step."""
    size = {"width": 8, "layers": 4, "batch_size": 4, "batches": batches}
    candidates = {
        "bare Trainer": trainer_run(**size),
        "plain torch loop": plain_loop(**size),
        "Trainer with an empty callback": trainer_run(**size, callbacks=lambda: [pl.Callback()]),
        "GradientAccumulation(1)": trainer_run(**size, callbacks=lambda: [GradientAccumulation(1)]),
        "MicroBatching(4), the batch fits": trainer_run(**size, callbacks=lambda: [MicroBatching(4)]),
        'MicroBatching("auto"), the batch fits': trainer_run(**size, callbacks=lambda: [MicroBatching()]),
    }
    return interleaved(candidates, rounds=rounds)


def accumulated(rounds, batches):
    """The same with windows of four batches, beside Lightning's own accumulation."""
    size = {"width": 8, "layers": 4, "batch_size": 4, "batches": batches}
    candidates = {
        "Trainer(accumulate_grad_batches=4)": trainer_run(**size, accumulate_grad_batches=WINDOW),
        "GradientAccumulation(4)": trainer_run(**size, callbacks=lambda: [GradientAccumulation(WINDOW)]),
        'GradientAccumulation(4, count=Tokens("labels"))': trainer_run(
            **size, callbacks=lambda: [GradientAccumulation(WINDOW, count=Tokens("labels"))]
        ),
    }
    return interleaved(candidates, rounds=rounds)


def larger(rounds, batches, width):
    """A step of some milliseconds; the bound for a batch that fits is 1.05."""
    size = {"width": width, "layers": 6, "batch_size": 256, "batches": batches}
    candidates = {
        "bare Trainer": trainer_run(**size),
        "MicroBatching(256), the batch fits": trainer_run(**size, callbacks=lambda: [MicroBatching(256)]),
        'MicroBatching("auto"), the batch fits': trainer_run(**size, callbacks=lambda: [MicroBatching()]),
        "MicroBatching(64): 4 pieces": trainer_run(**size, callbacks=lambda: [MicroBatching(64)]),
        "plain torch loop, whole": plain_loop(**size),
        "plain torch loop, 4 pieces": plain_loop(**size, pieces=4),
    }
    return interleaved(candidates, rounds=rounds)


def main(*, quick=False):
    quiet()
    torch.set_num_threads(1)
    rounds, short, long, width = (2, 8, 2, 8) if quick else (21, 600, 20, 512)
    parts = {
        "A batch of 4 Linear(8, 8)": (tiny(rounds, short), "bare Trainer", short),
        "A batch of 4 Linear(8, 8) in windows of 4": (
            accumulated(rounds, short),
            "Trainer(accumulate_grad_batches=4)",
            short,
        ),
        "A step of 6 Linear(512, 512), batch 256": (larger(rounds, long, width), "bare Trainer", long),
    }
    tables = [table(title, seconds, base=base, per=batches) for title, (seconds, base, batches) in parts.items()]
    report("accumulation", tables, {title: seconds for title, (seconds, _, _) in parts.items()}, keep=not quick)


if __name__ == "__main__":
    main()
