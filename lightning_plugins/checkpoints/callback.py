"""Checkpoint averaging at the end of a fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_plugins.checkpoints.average_of_run import AverageOfRun
from lightning_plugins.checkpoints.batch_norm import batch_norms
from lightning_plugins.checkpoints.isolated_validation import can_refresh, isolated, numbers, set_order_of_last_epoch
from lightning_plugins.checkpoints.pool import Choice, History, Pool, output_problem
from lightning_plugins.checkpoints.run_files import RunFiles, keeper_in
from lightning_plugins.checkpoints.run_identity import Lineage, checked_lineage, new_fit_name
from lightning_plugins.core import checkpoint_keys, flat_shards
from lightning_plugins.core.callback import Callback, Stage
from lightning_plugins.core.checkpoint_file import CheckpointError
from lightning_plugins.core.checkpoints_of_run import (
    checkpoint_folder,
    followed,
    keeper_of,
    model_checkpoints,
    wait_for_files,
)
from lightning_plugins.core.distributed_sets import marking, refuse_cut_off
from lightning_plugins.core.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_plugins.core.module_state import is_opaque
from lightning_plugins.core.strategies import check_strategy
from lightning_plugins.core.validation import (
    LightningPluginsWarning,
    a_path,
    one_of,
    shown,
    true_or_false,
    whole_number,
)
from lightning_plugins.core.writable import leaves_files


class CheckpointAveraging(Callback):
    r"""Averages the run's last or best checkpoints when the fit ends, and writes one file that loads.

    :math:`\bar\theta = \frac{1}{N} \sum_{i=1}^{N} \theta_i` over the last (or best) N checkpoints that ModelCheckpoint
    kept. When it keeps fewer than N (its default is one), this callback writes weights-only files of its own, one per
    epoch, into ``<output>_pool/`` beside the output, keeps N of them, and says so once. The averaged file is a
    Lightning checkpoint: ``load_from_checkpoint`` and ``Trainer.validate(ckpt_path=...)`` open it.

    When:
        Own files in ``on_train_epoch_end``, everything else in ``on_train_end``. Nothing in a training step.
        ``fast_dev_run``, which writes no checkpoints, averages none. A fault while files are written or averaged is a
        warning and never ends the fit.

    Checkpoint:
        ``fits`` (which fits have led to the file), ``folder`` and ``files`` (what the run has written, with digests)
        and ``history`` (validation metrics by step). Only files that the run itself is known to have written are
        averaged; others in their directory are named and left out.

    Distributed:
        Rank zero averages and writes; of sharded checkpoints (FSDP, FSDP2) every rank averages its own parts. Every
        rank validates, and scores are over the samples of all ranks. The file system is shared, as for Lightning's own
        ``ckpt_path``.

    Cost:
        None per step. At the end: reading N files once, for comparing two validations and the module's weights once
        more in host memory, for batch normalization one epoch of forward passes.

    Does not compose with:
        DeepSpeed, whose files have a format of their own; remote directories; quantized weights that are trained.

    Args:
        last: Average the last N checkpoints, by their step. 5 when neither this nor ``best`` is given, as in
            Vaswani et al.
        best: Average the best N by the metric that a ModelCheckpoint monitors, instead.
        output: The file to write, ``.ckpt`` or ``.safetensors``; a relative one lies in the checkpoint directory. Its
            predecessor of an earlier fit is replaced; any other file of that name, and a place that cannot be written
            to, are refused before training starts.
        refresh_batch_norm: Estimate batch-normalization statistics of the averaged weights from one pass of
            ``training_step`` over the training data (200 batches of data without a length). ``"auto"``: when the
            module has layers whose statistics follow the data and optimizes automatically.
        compare: Validate the average and the best single checkpoint with the fit's own validation data, log one line
            with both scores and keep them in ``scores``. The score is the monitored metric, else a validation loss.

    Attributes:
        path: The file that was written, ``None`` before.
        scores: ``{"average": ..., "best_single": ...}`` after a comparison.
        metric: The name of the metric that ``scores`` hold.

    Raises:
        TypeError: If a number is not whole.
        ValueError: If ``last`` and ``best`` are both given, or another argument is not one of its values.
    """

    stage: ClassVar[Stage] = Stage.CHECKPOINTS
    state_version: ClassVar[int] = 2

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
            one_of("refresh_batch_norm", refresh_batch_norm, ("auto",), or_else=", True or False")
        self.refresh_batch_norm = refresh_batch_norm
        self.compare = true_or_false("compare", compare)
        self.path: Path | None = None
        self.scores: dict[str, float] | None = None
        self.metric: str | None = None
        super().__init__(output=self.output)
        self._lineage = Lineage()
        self._files = RunFiles()
        self._history = History()
        # of this fit's checkpoints; None: nothing is averaged
        self._pool: Pool | None = None
        self._saved_in = ""
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        super().setup(trainer, pl_module, stage)
        refuse_cut_off(self.patches, trainer.strategy)
        if stage != "fit":
            return
        check_strategy(trainer, "CheckpointAveraging")
        if self.refresh_batch_norm is True and not can_refresh(pl_module):
            raise MisconfigurationException(
                "CheckpointAveraging(refresh_batch_norm=True) runs `training_step` for its forward pass, which manual "
                "optimization and `dataloader_iter` do not allow; pass False."
            )
        self._check_weights(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that a run that was killed while it ended gets its average."""
        self._check_weights(pl_module)
        self.when_nothing_is_left(trainer, lambda: self._finish(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose whose files will be averaged, now that all callbacks, directories and the run's position are known."""
        self.training_starts()
        self.path, self.scores, self.metric, self._warned = None, None, None, False
        self._pool = self._make_pool(trainer) if leaves_files(trainer) else None
        if self._pool is None:
            return
        self._check_output(trainer, self._pool)
        self._begin_fit(trainer, self._pool)
        if self._pool.own_folder is not None:
            rank_zero_info(
                f"CheckpointAveraging needs {self.count} checkpoints, and ModelCheckpoint keeps fewer: it writes "
                f"weights-only files of its own, one per epoch, to {self._pool.own_folder} and keeps {self.count}."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics of this step, to know the best single checkpoint."""
        if self._pool is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._history.add(trainer.global_step, numbers(trainer.callback_metrics))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune the own files, now that all metrics of the last epoch are known."""
        self._prune(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's own file."""
        if self._pool is None or self._pool.own_folder is None:
            return
        path = self._pool.own_folder / f"epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
        try:
            trainer.save_checkpoint(path, weights_only=True)
        except OSError as error:
            self._warn(f"CheckpointAveraging could not write {path}: {error}. The average will lack this epoch.")
            # the other ranks wait here for the one that failed to write
            trainer.strategy.barrier()
        self._history.add(trainer.global_step, numbers(trainer.callback_metrics))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average, refresh, compare."""
        if self._pool is None:
            return
        wait_for_files(trainer)
        self._prune(trainer)
        choice: Choice = trainer.strategy.broadcast(self._pool.choose() if trainer.is_global_zero else Choice())
        if not trainer.is_global_zero:
            # the list of the run's files is kept on rank zero, which has looked at these
            self._files.add(*choice.paths)
        for text in choice.warnings:
            rank_zero_warn(text, category=LightningPluginsWarning)
        for text in choice.notes:
            rank_zero_info(f"CheckpointAveraging: {text}")
        if len(choice.paths) < 2:
            where = self._pool.own_folder or self._pool.folder
            rank_zero_info(
                f"CheckpointAveraging: {len(choice.paths)} checkpoint(s) on disk, nothing to average, in {where}."
            )
            return
        try:
            self._average(trainer, pl_module, self._pool, choice)
        except (OSError, CheckpointError, MemoryError) as error:
            lost = "no average" if self.path is None else "no comparison"
            self._warn(f"CheckpointAveraging made {lost}: {error}")
            return
        self._report(trainer)

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know no fit any more."""
        self._pool = None

    def get_state(self) -> dict[str, Any]:
        """Return what tells the run's files from others, and the validation metrics by step."""
        return {
            "fits": self._lineage.plain(),
            "folder": self._saved_in,
            "files": self._files.plain(),
            "history": dict(self._history.metrics),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what the run that is resumed had written and logged."""
        self._lineage = checked_lineage(state.get("fits"))
        folder = state.get("folder", "")
        self._saved_in = folder if folder == "" else a_path("folder", folder)
        self._files.load(state.get("files"))
        self._history.load(state.get("history"))

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_order_of_last_epoch(trainer)
        self.on_train_start(trainer, pl_module)
        self.on_train_end(trainer, pl_module)

    # --- the files -------------------------------------------------------------------------------------------------

    def _make_pool(self, trainer: Trainer) -> Pool:
        if self.by_score and not model_checkpoints(trainer, monitoring=True):
            raise MisconfigurationException(
                f"CheckpointAveraging(best={self.count}) needs a ModelCheckpoint with `monitor`; or use `last`."
            )
        checkpoint = followed(trainer, self.count, monitoring=self.by_score)
        folder = checkpoint_folder(trainer, checkpoint)
        if "://" in folder:
            raise MisconfigurationException(
                f"CheckpointAveraging needs checkpoints on a local disk, they are in {folder}."
            )
        pool = Pool(self._files, self._history, checkpoint, Path(folder).absolute(), self.count, self.by_score)
        pool.separate(self.output, self.state_key)
        return pool

    def _check_output(self, trainer: Trainer, pool: Pool) -> None:
        """Refuse an ``output`` that cannot be written, on all ranks alike."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by the callback connector
        ours = [other for other in callbacks if isinstance(other, CheckpointAveraging) and other is not self]
        theirs = {place for other in ours if other._pool for place in _places(other._pool, other.output)}
        for place in sorted(theirs.intersection(_places(pool, self.output))):
            raise MisconfigurationException(
                f"Two CheckpointAveraging callbacks would write {place}; give them different `output` names."
            )
        problem = output_problem(pool.target(self.output)) if trainer.is_global_zero else None
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise MisconfigurationException(f"`output` of CheckpointAveraging {problem}")

    @staticmethod
    def _check_weights(pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and is_opaque(parameter):
                raise MisconfigurationException(
                    f"CheckpointAveraging cannot average `{name}`, a trainable {type(parameter).__name__}: it has no "
                    "numbers whose mean could be taken. Freeze it (`requires_grad_(False)`), or remove "
                    "CheckpointAveraging."
                )

    def _begin_fit(self, trainer: Trainer, pool: Pool) -> None:
        """Begin a fit's own part of the run, and note from now on what it writes."""
        if not trainer.global_step:
            self._files.clear()
            self._history.metrics.clear()
        name = trainer.strategy.broadcast(new_fit_name())
        self._lineage = self._lineage.new_fit(name, trainer.global_step)
        resumed = Path(trainer.ckpt_path).absolute() if trainer.ckpt_path else None
        if self._saved_in:
            for place in filter(None, (pool.folder, resumed and resumed.parent)):
                self._files.moved(Path(self._saved_in), place)
        if resumed is not None and resumed.exists():
            # it is the run's own because the Trainer has loaded it; its own state cannot name it, nor the file that a
            # link, such as ModelCheckpoint's last.ckpt, stands for
            file = resumed.parent / resumed.readlink() if resumed.is_symlink() else resumed
            self._files.add(file, keeper=keeper_in(file))
        self._saved_in = str(pool.folder)
        self.patches.wrap(trainer.strategy, "save_checkpoint", self._saving(trainer))

    def _saving(self, trainer: Trainer) -> Callable[..., None]:
        """Return a wrapper of the one place through which every checkpoint is written."""

        def save(
            write: Callable[..., None], checkpoint: dict[str, Any], filepath: Any, *args: Any, **more: Any
        ) -> None:
            checkpoint.setdefault(checkpoint_keys.RUN, self._lineage.at(trainer.global_step).plain())
            with marking(trainer.strategy, checkpoint):
                write(checkpoint, filepath, *args, **more)
            if trainer.is_global_zero:
                path = Path(filepath).absolute()
                own = self._pool is not None and path.parent == self._pool.own_folder
                keeper = self if own else keeper_of(trainer, filepath)
                self._files.add(path, keeper="" if keeper is None else keeper.state_key)

        return save

    def _prune(self, trainer: Trainer) -> None:
        if self._pool is None or self._pool.own_folder is None:
            return
        # a score that was logged at the very end of the epoch is known by now
        self._history.add(trainer.global_step, numbers(trainer.callback_metrics))
        if trainer.is_global_zero:
            try:
                self._pool.prune()
            except OSError as error:
                self._warn(f"CheckpointAveraging could not delete old files in {self._pool.own_folder}: {error}.")

    def _warn(self, text: str) -> None:
        """Warn of the first fault of a fit alone: those that follow have the same cause."""
        if not self._warned:
            self._warned = True
            rank_zero_warn(text, category=LightningPluginsWarning)

    # --- the average -----------------------------------------------------------------------------------------------

    def _average(self, trainer: Trainer, pl_module: LightningModule, pool: Pool, choice: Choice) -> None:
        average = AverageOfRun(trainer, pl_module, self._files, choice.paths, pool.target(self.output))
        refresh, compare = self._refreshes(trainer, pl_module), self._compares(trainer)
        if not refresh and not compare:
            average.write()
            self._written(average)
            return
        with isolated(trainer, pl_module):
            average.write(replace=average.batch_norm_statistics() if refresh else None)
            self._written(average)
            if compare:
                monitor = None if pool.checkpoint is None else pool.checkpoint.monitor
                self.metric, self.scores = average.compare(choice.best, monitor)

    def _written(self, average: AverageOfRun) -> None:
        self.path = average.target
        if average.ema:
            rank_zero_info(f"CheckpointAveraging: the run has an EMA; {average.ema}.")
        rank_zero_info(f"CheckpointAveraging: the mean of {len(average.paths)} checkpoints is in {average.target}.")

    def _refreshes(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        if self.refresh_batch_norm is False or not batch_norms(pl_module):
            return False
        if not can_refresh(pl_module):
            rank_zero_warn(
                "CheckpointAveraging averages the batch-normalization statistics: it cannot estimate them anew in "
                "manual optimization. Pass refresh_batch_norm=False to accept that.",
                category=LightningPluginsWarning,
            )
            return False
        return True

    def _compares(self, trainer: Trainer) -> bool:
        try:
            flat_shards.check_shown(trainer.strategy)
        except ValueError as error:
            rank_zero_info(f"CheckpointAveraging does not compare: {error}")
            return False
        return self.compare and bool(trainer.enable_validation)

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


def _places(pool: Pool, output: str) -> list[Path]:
    """Return what a callback writes: the average, and the folder of files of its own."""
    return [place.resolve() for place in (pool.target(output), pool.own_folder) if place is not None]
