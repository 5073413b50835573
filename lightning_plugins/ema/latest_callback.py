"""The callback that averages the latest snapshots of the weights, all alike; ``weight_average.py`` has the rest."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.distributed_sets import is_distributed
from lightning_plugins.core.lightning import LightningModule, Trainer
from lightning_plugins.core.validation import shown, whole_number
from lightning_plugins.core.zero import is_deepspeed, zero_of
from lightning_plugins.ema.checkpoint_directory import posthoc_label
from lightning_plugins.ema.checkpoint_format import (
    check_fit,
    follow_pruning,
    name_technique,
    technique_of,
    tensors_by_name,
)
from lightning_plugins.ema.checkpoint_sets import move_sets
from lightning_plugins.ema.decay import ConstantDecay, UpdateCounter, interval
from lightning_plugins.ema.latest_shadow import LatestShadow
from lightning_plugins.ema.master_shadow import LatestMasterShadow
from lightning_plugins.ema.weight_average import WeightAverage

_KEY = checkpoint_keys.POSTHOC_EMA


class LatestWeightAveraging(WeightAverage):
    """Averages the latest snapshots of the weights, all alike, and evaluates, saves and ends with their mean (LAWA).

    A snapshot is taken every so many applied optimizer steps; the average is the mean of the last ``last`` of them, or
    of all while there are fewer. It is computed anew at each snapshot, in float64, and kept in float32 at least.

    When:
        ``on_train_batch_end`` takes the snapshots; ``on_validation_start``/``_end`` and their siblings swap;
        ``on_train_end`` leaves the module with what ``after_fit`` says.

    Checkpoint:
        As with :class:`~lightning_plugins.EMA`: ``state_dict`` is the average, the raw weights lie beside it. The
        snapshots are in full files, too, so that a resumed run goes on exactly: ``last`` times the weights.

    Distributed:
        Under DDP every rank keeps the same snapshots, without communication; under FSDP1 and FSDP2 its own share, and
        under DeepSpeed's ZeRO its part of the float32 masters. In a distributed checkpoint and beside DeepSpeed's files
        they stay so; for a file the whole is gathered.

    Cost:
        ``last`` copies of the trainable weights in their own type, and 4 bytes per parameter for the mean. A step
        between two snapshots costs nothing; a snapshot reads all of them once.

    Does not compose with:
        Lightning's StochasticWeightAveraging and WeightAveraging, which are refused at setup, and strategies that
        ``docs/strategies.md`` does not list; parts taken out of the module in mid-run, which end the fit with an error.

    Args:
        last: How many snapshots are averaged, at least 1.
        every: Applied steps between two snapshots: a number, a share of the run (``0.01``, ``"1%"``) or epochs
            (``"1ep"``); at least 1.
        device: Where the snapshots and their mean lie; ``None`` for beside the weights. ``"cpu"`` spares GPU memory.
        buffers: ``"copy"`` evaluates the average with the module's own buffers (batch statistics), ``"average"``
            averages the floating-point ones too. Integers are never averaged.
        evaluate: The weights that validation, test and predict use, from the first snapshot on.
        checkpoint: What every file that is written during fit has as its ``state_dict``, from the first snapshot on.
        after_fit: What the module holds when fit has ended.
        name: Distinguishes it from other averages of the Trainer, of which at most one evaluates and one owns the
            ``state_dict``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of its range or a word not one of those listed.
        MisconfigurationException: When the fit starts, if ``every`` depends on the length of a run that is not known.

    References:
        J. Kaddour, "Stop wasting my time! Saving days of ImageNet and BERT training with latest weight averaging",
        2022, arXiv:2209.14981; S. Sanyal et al., "Early weight averaging meets high learning rates for LLM
        pre-training", 2023, arXiv:2306.03241, for snapshots that lie far apart.
    """

    technique = "LatestWeightAveraging"

    def __init__(
        self,
        last: int = 5,
        *,
        every: int | float | str = "1%",
        device: str | None = None,
        buffers: Literal["copy", "average"] = "copy",
        evaluate: Literal["average", "raw"] = "average",
        checkpoint: Literal["average", "raw"] = "average",
        after_fit: Literal["average", "raw"] = "average",
        name: str = "lawa",
    ) -> None:
        self.last = whole_number("last", last, at_least=1, unit="snapshots")
        self.every = interval("every", every)
        super().__init__(
            # an update takes the weights as they are
            ConstantDecay(0.0),
            UpdateCounter(0, self.every, name_of_every="every"),
            device=device,
            buffers=buffers,
            evaluate=evaluate,
            checkpoint=checkpoint,
            after_fit=after_fit,
            name=name,
        )
        self._restored_snapshots: list[dict[str, Tensor]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put both sets into a full file, and the snapshots beside them."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        # DeepSpeed's directories get them when they are written
        if self._serves(pl_module) and not is_deepspeed(trainer.strategy):
            [shadow] = self._shadows
            assert isinstance(shadow, LatestShadow)  # noqa: S101  # made by `_begin`
            shares = is_distributed(checkpoint)
            snapshots = shadow.collect_snapshots(keep=trainer.is_global_zero or shares, shares=shares)
            checkpoint.setdefault(_KEY, {})[self.state_key] = snapshots
            name_technique(checkpoint, self.name, self.technique)
            move_sets(trainer.strategy, checkpoint)

    def _label(self, checkpoint: dict[str, Any]) -> None:
        super()._label(checkpoint)
        name_technique(checkpoint, self.name, self.technique)

    def _begin(self, pl_module: LightningModule) -> None:
        options: dict[str, Any] = {
            "last": self.last,
            "snapshots": self._restored_snapshots,
            "device": self.device,
            "start": self._restored,
        }
        zero = zero_of(pl_module.trainer)
        if zero is None:
            self._shadows = [LatestShadow(pl_module, buffers=self.average_buffers, **options)]
        else:
            self._shadows = [LatestMasterShadow(zero, pl_module, **options)]
        self._restored, self._restored_snapshots = None, []

    def _forget(self) -> None:
        super()._forget()
        self._restored_snapshots = []

    def _take_snapshots(self, snapshots: list[dict[str, Tensor]]) -> None:
        if not snapshots:
            raise ValueError(self._not_its_own)
        self._restored_snapshots = snapshots

    def _restore(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> bool:
        if is_deepspeed(trainer.strategy):
            return super()._restore(trainer, pl_module, checkpoint)
        found = self._snapshots_of(checkpoint)
        if (beside := self._sets_beside(trainer, pl_module, checkpoint)) is not None:
            found = []
            while (snapshot := beside.read(posthoc_label(self.state_key, len(found)))) is not None:
                found.append(snapshot)
        for snapshot in found or []:
            check_fit(pl_module, f"snapshots of {self._called}", snapshot, strict=pl_module.strict_loading)
        self._restored_snapshots = found or []
        restored = super()._restore(trainer, pl_module, checkpoint)
        if restored and (found is None or technique_of(checkpoint, self.name) != self.technique):
            raise ValueError(self._not_its_own)
        return restored

    @property
    def _not_its_own(self) -> str:
        return (
            f"The checkpoint's average {self.name!r} must come with the snapshots that it is made of, but another "
            "callback wrote it. Give another `name` to begin anew."
        )

    def _snapshots_of(self, checkpoint: dict[str, Any]) -> list[dict[str, Tensor]] | None:
        sets = checkpoint.get(_KEY, {})
        if not isinstance(sets, dict):
            raise TypeError(f"`{_KEY}` must be sets of weights by callback, got {shown(sets)}.")
        found = sets.get(self.state_key)
        if found is None:
            return None
        latest = found[-self.last :] if isinstance(found, list) else None
        if latest is None or not all(map(tensors_by_name, latest)):
            raise ValueError(f"`{_KEY}` must be snapshots of named tensors for {self._called}, got {shown(found)}.")
        return latest

    def _before_writing(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        super()._before_writing(trainer, checkpoint)
        state = checkpoint.get("state_dict")
        if state and self._shadows:
            for snapshot in checkpoint.get(_KEY, {}).get(self.state_key, []):
                follow_pruning(state, self._shadows[0].module, snapshot)
