"""When an average under DeepSpeed's ZeRO is written beside DeepSpeed's files, and read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_plugins.core.lightning import LightningModule, MisconfigurationException, Trainer
from lightning_plugins.core.patching import Patches
from lightning_plugins.core.sharding import agreed
from lightning_plugins.core.zero import Zero, load_full, zero_of
from lightning_plugins.core.zero_directory import is_deepspeed_directory
from lightning_plugins.ema.master_shadow import MasterShadow
from lightning_plugins.ema.shadow import Shadow
from lightning_plugins.ema.zero_files import extract, files_of, read_part, write_part


class ZeroSaves:
    """Writes the average of one callback into every directory that a run writes; every rank its part.

    DeepSpeed's own files hold the trained weights always: an average that is in the masters is taken out for as long.
    The strategy's method stays wrapped after the fit, when its directories are written as well, until the next one.

    Args:
        name: The callback's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._patches = Patches()

    def watch(self, trainer: Trainer, current: Callable[[], MasterShadow | None]) -> None:
        """See every directory that a run writes.

        Args:
            trainer: The Trainer.
            current: Returns the average, up to date, ``None`` while there is none.
        """
        strategy: Any = trainer.strategy

        def save(original: Callable[..., None], checkpoint: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            shadow = current()
            if shadow is None:
                original(checkpoint, path, *args, **kwargs)
                return
            shown = shadow.swapped
            keeps = shadow.ended
            shadow.swap_out()
            self._write(trainer, shadow, Path(strategy.broadcast(path)))
            original(checkpoint, path, *args, **kwargs)
            if shown:
                shadow.swap_in(keep_shadows=keeps)
                shadow.remember()

        self._patches.undo()
        self._patches.wrap(strategy, "save_checkpoint", save)

    def leave(self) -> None:
        """See no directory any more."""
        self._patches.undo()

    def _write(self, trainer: Trainer, shadow: MasterShadow, directory: Path) -> None:
        rank, failure = trainer.global_rank, None
        without_frozen = bool(getattr(trainer.strategy, "exclude_frozen_parameters", False))
        others = [
            part
            for part in shadow.others()
            # what is not cut is the same on every rank
            if (rank == 0 or hasattr(part.found.tensor, "ds_id")) and (part.found.is_buffer or not without_frozen)
        ]
        try:
            write_part(
                directory,
                self._name,
                step=shadow.zero.attempted,
                rank=rank,
                ranks=trainer.world_size,
                keys=list(shadow.module.state_dict()),
                parts=shadow.averages(),
                others=others,
                snapshots=shadow.snapshots(),
            )
        except OSError as error:
            failure = error
        if not agreed(failure is None, shadow.parts[0].values):
            raise failure or OSError(f"Another rank could not write its part of the average into {directory}.")

    def read(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]] | None:
        """Return this rank's part of the average in the directory that a fit resumes from, and of its snapshots.

        ``None`` if the directory has no such average.

        Raises:
            ValueError: If it is incomplete or does not fit, on any rank.
        """
        zero, path = zero_of(trainer), trainer.ckpt_path
        if zero is None or path is None:
            return None
        masters = zero.masters(pl_module)
        found, failure = None, None
        try:
            found = read_part(
                Path(path),
                self._name,
                step=zero.attempted,
                rank=trainer.global_rank,
                ranks=trainer.world_size,
                parts=masters,
            )
        except ValueError as error:
            failure = error
        if not agreed(failure is None, masters[0].values):
            raise failure or ValueError(f"Another rank could not read its part of the average in {path}.")
        return found

    def load_for_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give a module that is only evaluated the average in the directory of its weights, if there is one.

        Raises:
            ValueError: If it is incomplete.
        """
        path = Path(trainer.ckpt_path or "")
        if is_deepspeed_directory(path) and self._name in files_of(path):
            load_full(pl_module, extract(path, "average", self._name, trust=False))


def rebind(shadows: list[Shadow], trainer: Trainer) -> None:
    """Let averages follow the weights of the fit that begins.

    Raises:
        MisconfigurationException: If they were begun under another strategy, or other settings of it.
    """
    try:
        zero = zero_of(trainer)
        for shadow in shadows:
            _rebind(shadow, zero)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def _rebind(shadow: Shadow, zero: Zero | None) -> None:
    if isinstance(shadow, MasterShadow) != (zero is not None):
        raise ValueError(
            "An average must go on under the strategy that it was begun with: DeepSpeed's averages are of its master "
            "weights. Make a new EMA for the other strategy."
        )
    if zero is not None and isinstance(shadow, MasterShadow):
        shadow.rebind_to(zero)
    else:
        shadow.rebind()
