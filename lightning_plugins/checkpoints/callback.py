"""Checkpoint averaging at the end of a fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_plugins.checkpoints.batch_norm import batch_norms
from lightning_plugins.checkpoints.candidates import (
    Signature,
    best_records,
    foreign_files,
    is_average_or_none,
    last_records,
    loss_name,
    own_records,
    remove,
)
from lightning_plugins.checkpoints.distributed import on_rank_zero, write_together
from lightning_plugins.checkpoints.formats import open_checkpoint
from lightning_plugins.checkpoints.formats.sharded import is_sharded
from lightning_plugins.checkpoints.isolated_validation import (
    can_refresh,
    last_order,
    load_checkpoint,
    no_trace,
    numbers,
    refreshed_statistics,
    validate,
)
from lightning_plugins.checkpoints.selection import Record
from lightning_plugins.checkpoints.streaming_mean import Recipe
from lightning_plugins.core.checkpoints_of_run import capacity, checkpoint_folder, followed, model_checkpoints
from lightning_plugins.core.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    RemainingEnd,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_plugins.core.validation import (
    LightningPluginsWarning,
    a_path,
    one_of,
    shown,
    true_or_false,
    whole_number,
)

_HISTORY = 1000  # validations whose metrics are remembered


class CheckpointAveraging(Callback):
    r"""Averages the run's last or best checkpoints when the fit ends, and writes one file that loads.

    :math:`\bar\theta = \frac{1}{N} \sum_{i=1}^{N} \theta_i` over the last (or best) N checkpoints that ModelCheckpoint
    kept. When it keeps fewer than N (its default is one), this callback writes weights-only files of its own, one per
    epoch, into ``<output>_pool/`` beside the output, keeps N of them, and says so once. The averaged file is a
    Lightning checkpoint: ``load_from_checkpoint`` and ``Trainer.validate(ckpt_path=...)`` open it.

    Args:
        last: Average the last N checkpoints, by their step. 5 when neither this nor ``best`` is given, as in
            Vaswani et al.
        best: Average the best N by the metric that a ModelCheckpoint monitors, instead.
        output: The file to write, ``.ckpt`` or ``.safetensors``; a relative one lies in the checkpoint directory. Its
            predecessor of an earlier fit is replaced; any other file of that name is refused at setup.
        refresh_batch_norm: Estimate batch-normalisation statistics of the averaged weights from one pass of
            ``training_step`` over the training data (200 batches of data without a length). ``"auto"``: when the
            module has layers whose statistics follow the data and optimises automatically.
        compare: Validate the average and the best single checkpoint with the fit's own validation data, log one line
            with both scores and keep them in ``scores``. The score is the monitored metric, else a validation loss.

    Attributes:
        path: The file that was written, ``None`` before.
        scores: ``{"average": ..., "best_single": ...}`` after a comparison.
        metric: The name of the metric that ``scores`` hold.

    When:
        Own files in ``on_train_epoch_end``, everything else in ``on_train_end``. Nothing in a training step.
        ``fast_dev_run``, which writes no checkpoints, averages none.

    Checkpoint:
        ``version``, ``foreign`` (files in the directory that are another run's) and ``history`` (validation metrics by
        step). The pool itself is what exists on disk.

    Distributed:
        Rank zero averages and writes; of sharded checkpoints (FSDP, FSDP2) every rank averages its own parts. Every
        rank validates. The file system is shared, as for Lightning's own ``ckpt_path``.

    Cost:
        None per step. At the end: reading N files once, for comparing two validations and the module's weights once
        more in host memory, for batch normalisation one epoch of forward passes.

    Raises:
        TypeError: If a number is not whole.
        ValueError: If ``last`` and ``best`` are both given, or another argument is not one of its values.
    """

    def __init__(
        self,
        last: int | None = None,
        best: int | None = None,
        *,
        output: str = "averaged.ckpt",
        refresh_batch_norm: bool | Literal["auto"] = "auto",
        compare: bool = True,
    ) -> None:
        if last is not None and best is not None:
            raise ValueError(
                f"`last` and `best` cannot be given together, got last={shown(last)} and best={shown(best)}."
            )
        name, count = ("best", best) if best is not None else ("last", 5 if last is None else last)
        self.count = whole_number(name, count, at_least=2, unit="checkpoints")
        self.by_score = best is not None
        self.output = a_path("output", output)
        if Path(self.output).suffix not in (".ckpt", ".safetensors"):
            raise ValueError(f"`output` must end in .ckpt or .safetensors, got {shown(self.output)}.")
        if not isinstance(refresh_batch_norm, bool):
            one_of("refresh_batch_norm", refresh_batch_norm, ("auto",))
        self.refresh_batch_norm = refresh_batch_norm
        self.compare = true_or_false("compare", compare)
        self.path: Path | None = None
        self.scores: dict[str, float] | None = None
        self.metric: str | None = None
        self._foreign: dict[str, Signature] = {}
        self._history: dict[int, dict[str, float]] = {}
        self._own_pool = False
        self._folder: Path | None = None  # of this fit's checkpoints; None: nothing is averaged
        self._end = RemainingEnd()

    @property
    def state_key(self) -> str:
        """The output tells two instances apart."""
        return f"CheckpointAveraging[{self.output}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit":
            return
        strategy = type(trainer.strategy).__name__
        if strategy == "DeepSpeedStrategy":
            raise MisconfigurationException(
                f"CheckpointAveraging cannot read the checkpoints of {strategy}; convert them with its own tool and "
                f"use average_checkpoints."
            )
        if self.by_score and not model_checkpoints(trainer, monitoring=True):
            raise MisconfigurationException(
                f"CheckpointAveraging(best={self.count}) needs a ModelCheckpoint with `monitor`; or use `last`."
            )
        if self.refresh_batch_norm is True and not can_refresh(pl_module):
            raise MisconfigurationException(
                "CheckpointAveraging(refresh_batch_norm=True) runs `training_step` for its forward pass, which manual "
                "optimisation and `dataloader_iter` do not allow; pass False."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]  # set by the callback connector
            if other is not self and isinstance(other, CheckpointAveraging) and Path(other.output) == Path(self.output):
                raise MisconfigurationException(
                    f"Two CheckpointAveraging callbacks would write {self.output}; give them different `output` names."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that a run that was killed while it ended gets its average."""
        self._end.watch(trainer, lambda: self._finish(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose whose files will be averaged, now that directories and the run's position are known."""
        self._end.remove()
        self.path, self.scores, self.metric = None, None, None
        self._folder = None if trainer.fast_dev_run else self._checkpoint_folder(trainer)  # type: ignore[attr-defined]
        if self._folder is None:
            return
        checkpoint = self._followed(trainer)
        self._own_pool = checkpoint is None or capacity(checkpoint) < self.count
        self._check_output(self._target)
        if trainer.is_global_zero:
            found = foreign_files(self._pool_folder, trainer.global_step)
            self._foreign = {**(self._foreign if trainer.global_step else {}), **found}
        if self._own_pool:
            rank_zero_info(
                f"CheckpointAveraging needs {self.count} checkpoints, and ModelCheckpoint keeps fewer: it writes "
                f"weights-only files of its own, one per epoch, to {self._pool_folder} and keeps {self.count}."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics of this step, to know the best single checkpoint."""
        if self._folder is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._remember(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune the own files, now that all metrics of the last epoch are known."""
        self._prune(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's own file."""
        if self._folder is None or not self._own_pool:
            return
        name = f"epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(self._pool_folder / name, weights_only=True)
        self._remember(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average, refresh, compare."""
        if self._folder is None:
            return
        self._prune(trainer)
        paths: list[str]
        paths, best = trainer.strategy.broadcast(self._choose(trainer) if trainer.is_global_zero else ([], ""))
        if len(paths) < 2:
            rank_zero_info(f"CheckpointAveraging: {len(paths)} checkpoint(s) on disk, nothing to average.")
            return
        target = self._target
        refresh, compare = self._refreshes(trainer, pl_module), self._compares(trainer)
        if not refresh and not compare:
            self._write(trainer, paths, target)
        else:
            with no_trace(trainer, pl_module):
                self._write(trainer, paths, target, self._statistics(trainer, pl_module, paths, target, wanted=refresh))
                if compare:
                    self._compare(trainer, pl_module, target, Path(best))
        self.path = target
        rank_zero_info(f"CheckpointAveraging: the mean of {len(paths)} checkpoints is in {target}.")
        self._report(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the Trainer as it was."""
        self._end.remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer as it was."""
        self._end.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return which files are another run's, and the validation metrics by step."""
        return {"version": 1, "foreign": dict(self._foreign), "history": dict(self._history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both over from the run that is resumed."""
        self._foreign = dict(state_dict["foreign"])
        self._history = dict(state_dict["history"])

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last_order(trainer)
        self.on_train_start(trainer, pl_module)
        self.on_train_end(trainer, pl_module)

    # --- the files -------------------------------------------------------------------------------------------------

    def _checkpoint_folder(self, trainer: Trainer) -> Path:
        folder = checkpoint_folder(trainer, self._followed(trainer))
        if "://" in folder:
            raise MisconfigurationException(
                f"CheckpointAveraging needs checkpoints on a local disk, they are in {folder}."
            )
        return Path(folder).absolute()

    def _followed(self, trainer: Trainer) -> Any:
        return followed(trainer, self.count, monitoring=self.by_score)

    @property
    def _target(self) -> Path:
        return (self._folder or Path()) / self.output

    @property
    def _pool_folder(self) -> Path:
        own = self._target.parent / f"{self._target.stem}_pool"
        return own if self._own_pool else self._folder or Path()

    def _check_output(self, target: Path) -> None:
        if not is_average_or_none(target):
            raise MisconfigurationException(
                f"`output` of CheckpointAveraging is a file that it did not write: {target}. Choose another name."
            )

    def _scores(self, trainer: Trainer) -> tuple[dict[int, float], str]:
        """Return the score of each validated step, and which scores are better."""
        checkpoint = self._followed(trainer)
        name, mode = (checkpoint.monitor, checkpoint.mode) if checkpoint is not None else (None, "min")
        if name is None:
            name, mode = loss_name({key for metrics in self._history.values() for key in metrics}), "min"
        known = {step: metrics[name] for step, metrics in self._history.items() if name in metrics}
        return {step: score for step, score in known.items() if not math.isnan(score)}, mode

    def _choose(self, trainer: Trainer) -> tuple[list[str], str]:
        """Return the paths to average and the best single one, on rank zero."""
        records = own_records(self._pool_folder, self._foreign)
        scores, mode = self._scores(trainer)
        checkpoint = self._followed(trainer)
        if self.by_score and not self._own_pool:  # the record of ModelCheckpoint counts, and Lightning resumes it
            kept = {Path(path).name: float(score) for path, score in checkpoint.best_k_models.items()}
            records = [record for record in records if record.path.name in kept]
            scores = {record.step: kept[record.path.name] for record in records if record.step is not None}
        chosen = best_records(records, scores, self.count, mode) if self.by_score else last_records(records, self.count)
        best = best_records(chosen, scores, 1, mode) or chosen[-1:]
        return [str(record.path) for record in chosen], str(best[0].path) if best else ""

    def _remember(self, trainer: Trainer) -> None:
        found = numbers(trainer.callback_metrics)
        if found:
            self._history.setdefault(trainer.global_step, {}).update(found)
        for step in sorted(self._history)[:-_HISTORY]:
            del self._history[step]

    def _prune(self, trainer: Trainer) -> None:
        """Keep the best or last own files; a score logged at the very end of the epoch is known by now."""
        if self._folder is None or not self._own_pool:
            return
        self._remember(trainer)
        if not trainer.is_global_zero:
            return
        records = own_records(self._pool_folder, self._foreign)
        kept = self._kept(trainer, records)
        for record in records:
            if record not in kept:
                remove(record.path)

    def _kept(self, trainer: Trainer, records: list[Record]) -> list[Record]:
        if not self.by_score:
            return last_records(records, self.count)
        scores, mode = self._scores(trainer)
        return best_records(records, scores, self.count, mode)

    # --- the average -----------------------------------------------------------------------------------------------

    def _write(
        self, trainer: Trainer, paths: list[str], target: Path, replace: Mapping[str, Tensor] | None = None
    ) -> None:
        def recipe() -> Recipe:
            sources = [open_checkpoint(path, trust=True) for path in paths]  # the run's own files
            made = Recipe(sources, [1 / len(paths)] * len(paths), replace=dict(replace or {}))
            if made.ema_note() and target == self._target:  # once, not for the draft
                rank_zero_info(f"CheckpointAveraging: the run has an EMA; {made.ema_note()}.")
            return made

        if trainer.world_size > 1 and is_sharded(Path(paths[-1])):
            write_together(recipe, target, trainer.strategy.root_device, overwrite=True)
        else:
            on_rank_zero(
                lambda: recipe().write(target, overwrite=True),
                trainer.strategy.broadcast,
                is_zero=trainer.is_global_zero,
            )

    def _refreshes(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        if self.refresh_batch_norm is False or not batch_norms(pl_module):
            return False
        if not can_refresh(pl_module):
            rank_zero_warn(
                "CheckpointAveraging averages the batch-normalisation statistics: it cannot estimate them anew in "
                "manual optimisation. Pass refresh_batch_norm=False to accept that.",
                category=LightningPluginsWarning,
            )
            return False
        return True

    def _statistics(
        self, trainer: Trainer, pl_module: LightningModule, paths: list[str], target: Path, *, wanted: bool
    ) -> Mapping[str, Tensor]:
        """Return the batch-normalisation statistics of the averaged weights."""
        if not wanted:
            return {}
        draft = target.with_name(f".{target.stem}.draft.ckpt")  # hidden: no choice of checkpoints sees it
        try:
            self._write(trainer, paths, draft)
            load_checkpoint(trainer, pl_module, draft)
            return refreshed_statistics(trainer, pl_module)
        finally:
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                draft.unlink(missing_ok=True)

    # --- the comparison --------------------------------------------------------------------------------------------

    def _compares(self, trainer: Trainer) -> bool:
        if self.compare and type(trainer.strategy).__name__ == "FSDPStrategy":
            rank_zero_info(
                "CheckpointAveraging does not compare under FSDPStrategy; ModelParallelStrategy (FSDP2) can."
            )
            return False
        return self.compare and bool(trainer.enable_validation)

    def _compare(self, trainer: Trainer, pl_module: LightningModule, target: Path, best: Path) -> None:
        """Validate both; every rank takes part, rank zero's numbers count."""
        found = {}
        for name, path in (("average", target), ("best_single", best)):
            load_checkpoint(trainer, pl_module, path)
            found[name] = trainer.strategy.broadcast(validate(trainer))
        checkpoint = self._followed(trainer)
        monitor = None if checkpoint is None else checkpoint.monitor
        self.metric = monitor if monitor in found["average"] else loss_name(found["average"])
        if self.metric is not None:
            self.scores = {name: metrics[self.metric] for name, metrics in found.items()}

    def _report(self, trainer: Trainer) -> None:
        if self.scores is not None:
            average, best = self.scores["average"], self.scores["best_single"]
            rank_zero_info(
                f"CheckpointAveraging: {self.metric} {average:.6g} averaged, {best:.6g} for the best single."
            )
        elif self._compares(trainer):
            rank_zero_info(
                "CheckpointAveraging: no comparison, as validation logs neither the monitored metric nor a loss, and "
                "returns none."
            )
