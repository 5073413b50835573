"""Which set of weights a checkpoint gets from an average, and gives to it and to its module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_plugins.core.distributed_sets import is_distributed
from lightning_plugins.core.lightning import LightningModule, MisconfigurationException, Trainer
from lightning_plugins.core.module_state import fill, load_named
from lightning_plugins.core.sharding import any_sharded
from lightning_plugins.core.strategies import learn_shards
from lightning_plugins.core.zero import is_deepspeed
from lightning_plugins.ema.averaging_callback import AveragingCallback
from lightning_plugins.ema.checkpoint_format import (
    Contents,
    fitting_average,
    follow_pruning,
    lightning_steps,
    read_contents,
    record,
    replace_raw,
)
from lightning_plugins.ema.checkpoint_sets import add_sets, move_sets
from lightning_plugins.ema.decay import DecayRule, UpdateCounter
from lightning_plugins.ema.master_shadow import MasterShadow
from lightning_plugins.ema.ownership import Roles, assign_roles, refuse_other_averages
from lightning_plugins.ema.shadow import showing
from lightning_plugins.ema.zero_saves import ZeroSaves


class AverageInCheckpoints(AveragingCallback):
    """Base of a callback whose one average can be a checkpoint's ``state_dict``.

    Args:
        rule: The average's decay.
        counter: When it begins and when it is updated.
        name: Tells it from others.

    Attributes:
        evaluate: Which weights evaluations use, ``"average"`` or ``"raw"``.
        checkpoint: Which weights a file's ``state_dict`` is.
        after_fit: Which weights the module keeps.
    """

    evaluate: str
    checkpoint: str
    after_fit: str

    def __init__(self, rule: DecayRule, counter: UpdateCounter, name: str) -> None:
        super().__init__([rule], counter, name=name)
        self.name = name
        # from a file, until the module is on its device
        self._restored: dict[str, Tensor] | None = None
        # whether the run's files are this one's to sort out
        # the state dict of the file that is being made
        self._filled: Any = None
        self._zero_saves = ZeroSaves(name)

    @property
    def _active(self) -> bool:
        return bool(self._shadows) and self._counter.last > 0

    @abstractmethod
    def _show(self) -> None:
        """Make the module hold what is wanted now."""

    # -- hooks

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sort out the file's sets: the module has been given the one in ``state_dict``."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._fitting:
            return
        learn_shards(trainer, pl_module)
        try:
            if is_deepspeed(trainer.strategy):
                if roles_of(trainer).evaluator is self:
                    self._zero_saves.load_for_evaluation(trainer, pl_module)
                return
            contents = read_contents(checkpoint)
            if contents is not None:
                self._choose(trainer, pl_module, checkpoint, contents)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(str(error)) from error

    def set_state(self, state: dict[str, Any]) -> None:
        """Take the counters over, if there is an average that they belong to."""
        if self._fitting and (self._restored is not None or self._shadows or state.get("origin") == -1):
            super().set_state(state)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put both sets into a full file, each where it belongs, whichever the module holds at the moment."""
        if is_deepspeed(trainer.strategy) or not self._serves(pl_module):
            return
        found, shadow, distributed = record(checkpoint), self._shadows[0], is_distributed(checkpoint)
        keep = trainer.is_global_zero or distributed
        if roles_of(trainer).writer is self:
            if not self._file_patches:
                # after the fit
                self._fill_state_dict(checkpoint["state_dict"])
            self._label(checkpoint)
            found["raw"] = shadow.collect("raw", keep=keep, shares=distributed) if self._owns_files else None
        if not self._owns_files or (shadow.sharded and shadow.rounds and not distributed):
            found["averages"][self.name] = shadow.collect("average", keep=keep, shares=distributed)
        move_sets(trainer.strategy, checkpoint)

    # -- what files get

    @property
    def _owns_files(self) -> bool:
        """Whether the ``state_dict`` of a file is this average now."""
        return self._active and self.checkpoint == "average"

    def _watch_files(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._watch_files(trainer, pl_module)
        if is_deepspeed(trainer.strategy):
            self._zero_saves.watch(trainer, self._master_shadow)
            return

        def state_dict(original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            state = original()
            # asked each time: the one that was it may have been taken out of the Trainer
            if roles_of(trainer).writer is self:
                self._fill_state_dict(state)
                self._filled = state
            return state

        self._file_patches.wrap(trainer.strategy, "lightning_module_state_dict", state_dict)

    def leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let later files be those of a run without this average."""
        super().leave(trainer, pl_module)
        self._zero_saves.leave()

    def _master_shadow(self) -> MasterShadow | None:
        self._catch_up_all()
        shadow = self._shadows[0] if self._shadows else None
        return shadow if isinstance(shadow, MasterShadow) and self._serves(shadow.module) else None

    def _fill_state_dict(self, state: dict[str, Any]) -> None:
        """Make a state dict of the module what files should have, whichever set the module holds at the moment."""
        self._catch_up_all()
        # under FSDP2 only the first rank gets one, or every rank its shares
        keep, shares = bool(state), any_sharded(state.values())
        if self._shadows:
            shadow = self._shadows[0]
            if self._serves(shadow.module):
                fill(state, shadow.collect("average" if self._owns_files else "raw", keep=keep, shares=shares))
                self._report()
        elif self._trainer is not None and (other := showing(self._trainer.lightning_module)) is not None:
            fill(state, other.collect("raw", keep=keep, shares=shares))

    def _label(self, checkpoint: dict[str, Any]) -> None:
        """Say in a file what its state dict is."""
        owns = self._owns_files
        record(checkpoint).update(state_dict="average" if owns else "raw", name=self.name if owns else None)

    def _before_writing(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        state, filled, self._filled = checkpoint.get("state_dict"), self._filled, None
        if not self._shadows or state is None or is_deepspeed(trainer.strategy) or roles_of(trainer).writer is not self:
            return
        shadow = self._shadows[0]
        if not self._serves(shadow.module):
            return
        self._label(checkpoint)
        if state is filled or shadow.sharded:
            return
        # a callback has put another state dict into the file, as ModelPruning does, which may be one of the raw weights
        found = record(checkpoint)
        raw, average = shadow.collect("raw"), shadow.collect("average")
        for tensors in (raw, average, found["raw"] or {}, *found["averages"].values()):
            follow_pruning(state, shadow.module, tensors)
        if self._owns_files:
            replace_raw(state, raw, average)

    # -- what files give

    def _restore(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> bool:
        """Keep the file's average for the shadow and give the module its raw weights."""
        contents = read_contents(checkpoint)
        if is_deepspeed(trainer.strategy):
            return self._restore_part(trainer, pl_module, contents)
        if contents is None:
            return False
        emas = averages(trainer) or [self]
        loader = next((ema for ema in emas if contents.owns_state_dict(ema.name)), emas[0])
        if (sets := self._sets_beside(trainer, pl_module, checkpoint)) is not None:
            add_sets(contents, sets, self.name, raw=loader is self)
        state_dict, strict = checkpoint.get("state_dict"), pl_module.strict_loading
        self._restored = fitting_average(pl_module, contents, self.name, state_dict, strict=strict)
        steps = lightning_steps(contents, checkpoint)
        if steps is not None:
            self._counter.load(steps)
        found = self._restored is not None or contents.owns_state_dict(self.name)
        if found and trainer.strategy.restore_checkpoint_after_setup:
            # the module may hold the only average
            self._begin(pl_module)
        if loader is self and contents.raw is not None:
            load_named(pl_module, contents.raw)
        return found

    def _restore_part(self, trainer: Trainer, pl_module: LightningModule, contents: Contents | None) -> bool:
        """Keep this rank's part of the average in a directory of DeepSpeed, which has restored the raw weights."""
        if contents is not None:
            raise ValueError(
                f"{self.technique} under DeepSpeed must resume from a directory of DeepSpeed, got a file that holds an "
                "average: the master weights are in none. Begin with `extract_weights(file, 'raw')` in the module "
                "instead."
            )
        found = self._zero_saves.read(trainer, pl_module)
        if found is None:
            return False
        self._restored, snapshots = found
        self._take_snapshots(snapshots)
        self._begin(pl_module)
        return True

    def _take_snapshots(self, snapshots: list[dict[str, Tensor]]) -> None:
        """Take over what the average in a directory of DeepSpeed is made of; a blend is made of nothing else."""

    def _choose(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any], contents: Contents
    ) -> None:
        """Give a module that is only evaluated the set that it is to be evaluated with."""
        evaluator = roles_of(trainer).evaluator
        if (sets := self._sets_beside(trainer, pl_module, checkpoint)) is not None:
            add_sets(contents, sets, self.name, raw=evaluator is None)
        if evaluator is self and not contents.owns_state_dict(self.name):
            average = fitting_average(pl_module, contents, self.name, None, strict=pl_module.strict_loading)
            load_named(pl_module, average or {})
        elif evaluator is None and averages(trainer)[0] is self:
            load_named(pl_module, contents.raw or {})

    def _before_loading(self) -> None:
        if self._shadows:
            self._shadows[0].swap_out()

    def _restore_in_mid_fit(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super()._restore_in_mid_fit(trainer, pl_module, checkpoint)
        self._show()


def averages(trainer: Trainer) -> list[AverageInCheckpoints]:
    """Return the averages of a run that can be a checkpoint's state dict."""
    return [callback for callback in trainer.callbacks if isinstance(callback, AverageInCheckpoints)]  # type: ignore[attr-defined]


def roles_of(trainer: Trainer) -> Roles[AverageInCheckpoints]:
    """Return who does what among them, or refuse what cannot work."""
    try:
        if trainer.state.fn == "fit":
            refuse_other_averages(trainer.callbacks)  # type: ignore[attr-defined]
        return assign_roles(averages(trainer))
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
