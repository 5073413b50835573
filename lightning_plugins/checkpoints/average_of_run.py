"""Makes the average of a run that has ended, with all its ranks: writes it, refreshes its statistics, compares it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_plugins.checkpoints.averaged_file import ema_of, write_average
from lightning_plugins.checkpoints.distributed import on_rank_zero, write_together
from lightning_plugins.checkpoints.isolated_validation import load_weights, refreshed_statistics
from lightning_plugins.checkpoints.run_files import RunFiles
from lightning_plugins.checkpoints.streaming_mean import CheckpointMean
from lightning_plugins.checkpoints.validation_scores import loss_name, validate
from lightning_plugins.core import flat_shards
from lightning_plugins.core.sharded_directory import is_sharded_checkpoint
from lightning_plugins.core.sharding import is_sharded


@dataclass
class AverageOfRun:
    """The average of one fit; every rank has one and calls the same methods in the same order.

    Args:
        trainer: The Trainer, at the end of training.
        pl_module: Its module.
        files: What the run has written.
        paths: The checkpoints to average.
        target: The file to write.
        ema: What is known of the averaged weights if the run has an EMA; after :meth:`write`, on rank zero.
    """

    trainer: Any
    pl_module: Any
    files: RunFiles
    paths: list[Path]
    target: Path
    ema: str | None = field(default=None, init=False)

    def write(self, target: Path | None = None, replace: Mapping[str, Tensor] | None = None) -> None:
        """Average and write.

        Args:
            target: Another file than :attr:`target`.
            replace: Tensors that are written instead of averaged.
        """
        trainer, path = self.trainer, self.target if target is None else target

        def mean() -> CheckpointMean:
            # here, where a fault of one rank is raised on all
            path.parent.mkdir(parents=True, exist_ok=True)
            sources = [self.files.open(source) for source in self.paths]
            made = CheckpointMean(sources, replace=dict(replace or {}))
            self.ema = ema_of(made)
            return made

        if trainer.world_size > 1 and is_sharded_checkpoint(self.paths[-1]):
            write_together(mean, path, trainer.strategy.root_device, overwrite=True)
        else:
            on_rank_zero(
                lambda: write_average(mean(), path, overwrite=True),
                trainer.strategy.broadcast,
                is_zero=trainer.is_global_zero,
            )
        self.files.add(path)

    def batch_norm_statistics(self) -> Mapping[str, Tensor]:
        """Return the batch-normalization statistics of the averaged weights, inside an isolated Trainer."""
        # hidden, so that no choice of checkpoints sees it
        draft = self.target.with_name(f".{self.target.stem}.draft.ckpt")
        try:
            self.write(draft)
            self._load(draft)
            return refreshed_statistics(self.trainer, self.pl_module)
        finally:
            self.trainer.strategy.barrier()
            if self.trainer.is_global_zero:
                draft.unlink(missing_ok=True)

    def compare(self, best: Path, monitor: str | None) -> tuple[str | None, dict[str, float] | None]:
        """Validate the average and the best single checkpoint, inside an isolated Trainer.

        Args:
            best: The best single checkpoint.
            monitor: The metric that ranks checkpoints; a validation loss stands in where it is not logged.

        Returns:
            The metric and both scores, ``None`` each when nothing tells them apart.
        """
        found = {}
        for name, path in (("average", self.target), ("best_single", best)):
            self._load(path)
            found[name] = self.trainer.strategy.broadcast(validate(self.trainer))
        metric = monitor if monitor in found["average"] else loss_name(found["average"])
        return metric, None if metric is None else {name: metrics[metric] for name, metrics in found.items()}

    def _load(self, path: Path) -> None:
        flat_shards.look_up(self.trainer.strategy.model, self.pl_module)
        # what FSDP1 has cut every rank takes out of the whole itself
        shared = is_sharded(self.pl_module) and not flat_shards.are_in(self.pl_module)
        reads = self.trainer.is_global_zero or not shared
        load_weights(self.trainer, self.pl_module, self.files.open(path) if reads else None)
