"""Train on several processes, by DDP or by FSDP2, every technique of this package at work, and show that they agree.

    python examples/distributed.py
    python examples/distributed.py --strategy fsdp2
    python examples/distributed.py --strategy fsdp2 --epochs 25 --devices 1 --resume
    torchrun --standalone --nproc-per-node 2 examples/distributed.py --strategy fsdp2

Where there are no two GPUs, two processes share the CPU, and gloo carries what they tell each other. Lightning starts
the second process, or torchrun both. The callbacks are those that a program for one device has; nothing in them, nor in
the module but `configure_model`, knows how many processes there are.

Under FSDP2 a checkpoint is a directory, in which every process writes its shares of the average, of the trained weights
beside it, and of the optimizer's state. A run goes on from it on any number of processes.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import ModelParallelStrategy
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from _common import CommandLine, trainer_options
from lightning_plugins import (
    EMA,
    CheckpointAveraging,
    CSVStatisticsLogger,
    GradientAccumulation,
    LearningRateScheduler,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    WarmupCosine,
    extract_weights,
)
from lightning_plugins.statistics import plot_log

warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # a later run replaces it


class Classifier(LightningModule):
    """Pixels in, one of ten classes out. Under FSDP2 every process keeps its share of each layer."""

    def __init__(self, width: int = 128, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers = [nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(width, 10))

    def configure_model(self) -> None:
        """Shard the layers, where the strategy is FSDP2; Lightning calls this when all processes are there."""
        if self.device_mesh is not None:
            for layer in self.network:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the loss, and what the callbacks read."""
        images, target = batch
        logits = self(images)
        return {"loss": functional.cross_entropy(logits, target), "logits": logits.detach(), "target": target}

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer with its peak rate; the callback does the rest."""
        return torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9, weight_decay=5e-4)


def digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """scikit-learn's 1,797 scans of 8 x 8 pixels: 1,167 to learn from, 270 to choose by, 360 to test."""
    scans = load_digits()
    images, target = scans.images / 16, scans.target
    images, tested, target, tested_target = train_test_split(
        images, target, test_size=360, stratify=target, random_state=0
    )
    images, chosen, target, chosen_target = train_test_split(
        images, target, test_size=270, stratify=target, random_state=0
    )
    parts = (images, target), (chosen, chosen_target), (tested, tested_target)
    learned, validated, held_out = (
        TensorDataset(torch.tensor(part, dtype=torch.float32), torch.tensor(classes)) for part, classes in parts
    )
    return learned, validated, held_out


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Train; then compare what the processes have, and test what rank zero wrote."""
    torch.set_num_threads(1)  # the processes share the cores
    parser = command_line()
    options = parser.options()
    folder = options.output / options.strategy  # not named by the time: every process finds the same
    best = ModelCheckpoint(folder, "best", monitor="val_loss", enable_version_counter=False)
    last = ModelCheckpoint(folder, "last", enable_version_counter=False)
    averaging = CheckpointAveraging(last=5)
    average = EMA(0.99)
    scheduler = LearningRateScheduler(WarmupCosine(warmup="5%", hold="5%"), record=True)
    if options.resume and not (folder / "last.ckpt").exists():
        parser.error(f"--resume needs a run to go on with, but {folder / 'last.ckpt'} does not exist")
    with parser.refusing(OSError, RuntimeError, TypeError, ValueError):  # an option that cannot be followed here
        callbacks: list[Callback] = [
            GradientAccumulation(effective_batch_size=options.effective_batch_size),  # of all processes
            scheduler,
            average,
            StatisticsRecorder(["accuracy"]),
            CSVStatisticsLogger(str(folder / "log.csv")),
            TensorBoardStatisticsLogger(str(folder / "tensorboard")),
            best,
            last,
            averaging,
            TQDMProgressBar(refresh_rate=10),
        ]
        seed_everything(options.seed, workers=True, verbose=False)
        processes = max(torch.cuda.device_count(), 1) if options.devices == "auto" else int(options.devices)
        if options.accelerator == "auto" and torch.cuda.device_count() < processes:
            options.accelerator = "cpu"  # and not the one GPU that there is
        trainer = Trainer(
            **trainer_options(options),
            strategy="ddp" if options.strategy == "ddp" else sharded(processes),
            callbacks=callbacks,
            logger=False,
            enable_model_summary=False,
        )

    learned, validated, held_out = digits()
    module = Classifier(lr=options.lr)
    start = time.perf_counter()
    with parser.refusing():  # options that do not go together
        trainer.fit(
            module,
            DataLoader(learned, options.batch_size, shuffle=True),
            DataLoader(validated, options.batch_size),
            ckpt_path=folder / "last.ckpt" if options.resume else None,
        )
    seconds = time.perf_counter() - start

    ranks = gathered(
        {
            "weights": digest(average.raw_state_dict()),
            "average": digest(average.average_state_dict()),
            "rates": digest({"rates": torch.tensor(scheduler.lrs)}),
            "loss": f"{trainer.callback_metrics['val_loss']:.6f}",
            "accuracy": f"{trainer.callback_metrics['val_accuracy']:.6f}",
        }
    )
    if trainer.is_global_zero:
        weights = {
            "raw, last step": extract_weights(last.best_model_path, "raw"),
            "EMA, last step": extract_weights(last.best_model_path, "average"),
            "best single (EMA)": extract_weights(best.best_model_path, "average"),
        }
        if averaging.path is not None:  # it takes two epochs
            weights["averaged (EMA)"] = Classifier.load_from_checkpoint(averaging.path).state_dict()
        report(ranks, {name: tested(state, held_out) for name, state in weights.items()})
        steps = f"{trainer.global_step} steps of {trainer.world_size} processes in {seconds:.1f} seconds"
        print(f"\nOpen {plot_log(folder / 'log.csv', folder / 'curves.png')} for loss, accuracy and rate.")
        print(f"\n{steps}. Written:", *sorted(folder.iterdir()), sep="\n  ")
    if distributed.is_initialized():
        distributed.barrier()  # who leaves first would end the others' group
        distributed.destroy_process_group()
    if any(rank != ranks[0] for rank in ranks):
        raise SystemExit("The processes do not agree.")


def sharded(processes: int) -> ModelParallelStrategy:
    """Return FSDP2: every process has its share of the weights, and its own batches."""
    return ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)


def digest(state_dict: Mapping[str, Tensor]) -> str:
    """Return a few letters that are others when a single bit of a state dict is."""
    found = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def gathered(mine: dict[str, str]) -> list[dict[str, str]]:
    """Return what every process has, by rank, on every process."""
    if not distributed.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    return everyone


def tested(state_dict: Mapping[str, Any], held_out: TensorDataset) -> float:
    """Return the share of images that were never seen and that these weights read correctly, on one process."""
    module = Classifier()
    module.load_state_dict(state_dict)
    images, target = held_out.tensors
    with torch.no_grad():
        return float((module.eval()(images).argmax(1) == target).float().mean())


def report(ranks: list[dict[str, str]], accuracy: dict[str, float]) -> None:
    """Print what every process has, and the test accuracies."""
    print("\nrank", *(f"{name:>14}" for name in ranks[0]), sep="")
    for rank, values in enumerate(ranks):
        print(f"{rank:<4}", *(f"{value:>14}" for value in values.values()), sep="")
    print(f"\n{'weights':<20}{'test accuracy':>15}")
    for weights, value in accuracy.items():
        print(f"{weights:<20}{value:>15.4f}")


def command_line() -> CommandLine:
    """Return the parser."""
    parser = CommandLine(__doc__, epochs=20, batch_size=16, lr=0.1)
    add = parser.add_argument
    add("--strategy", choices=("ddp", "fsdp2"), default="ddp", help="copies, or shares of the weights (%(default)s)")
    add("--effective-batch-size", type=int, default=64, help="images of a step, of all processes (%(default)s)")
    add("--resume", action="store_true", help="go on from last.ckpt, on as many processes as you like now")
    parser.set_defaults(devices="2", output=Path("runs/distributed"))
    return parser


if __name__ == "__main__":
    main()
