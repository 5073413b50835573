"""The PostHocEMA callback: when the power averages are updated, and when a snapshot of them is written."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.distributed_sets import is_distributed
from lightning_plugins.core.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_plugins.core.module_state import is_opaque, named_tensors
from lightning_plugins.core.validation import LightningPluginsWarning, a_list, a_path, one_of, shown, whole_number
from lightning_plugins.core.writable import check_writable, leaves_files
from lightning_plugins.core.zero import is_deepspeed, zero_of
from lightning_plugins.ema.averaging_callback import AveragingCallback
from lightning_plugins.ema.checkpoint_directory import posthoc_label
from lightning_plugins.ema.checkpoint_format import check_fit, follow_pruning, tensors_by_name
from lightning_plugins.ema.checkpoint_sets import move_sets
from lightning_plugins.ema.decay import PowerDecay, UpdateCounter
from lightning_plugins.ema.master_shadow import MasterShadow, whole_averages
from lightning_plugins.ema.power_exponent import check_sigma_rel
from lightning_plugins.ema.shadow import Shadow
from lightning_plugins.ema.snapshots import (
    FORMATS,
    MOST_AVERAGES,
    SnapshotContents,
    check_history,
    set_aside,
    write_frozen,
    write_snapshot,
)
from lightning_plugins.ema.zero_saves import ZeroSaves

POSTHOC_KEY = checkpoint_keys.POSTHOC_EMA
_FOLDER = "posthoc_ema"


class PostHocEMA(AveragingCallback):
    """Records power averages of the weights, from which an average of any length can be made after the run.

    Training, evaluation and checkpoints' ``state_dict`` are left alone; :func:`~lightning_plugins.synthesize_ema` turns
    the snapshots into weights.

    When:
        ``on_train_batch_end`` updates and writes, ``on_train_end`` writes a last snapshot. With ``fast_dev_run``
        nothing is written.

    Checkpoint:
        Full files hold the averages under ``lightning_plugins_posthoc_ema``, directories in their folder, so that a
        resumed run writes the snapshots that it would have written.

    Distributed:
        Every rank keeps the averages of its own weights or shards, under DeepSpeed's ZeRO of its part of the float32
        masters; the first writes.

    Cost:
        4 bytes per trainable parameter and average, an update each per step, and as many bytes per snapshot.

    Does not compose with:
        Another PostHocEMA that writes into the same directory, which is refused. Parts taken out of the module in
        mid-run, which end the fit with an error.

    Args:
        sigma_rels: Relative standard deviations of the averages that are kept, each above 0 and below 0.2887, 100 at
            most; two, 0.05 and 0.10, span what is usually wanted.
        every_n_steps: Applied steps between two snapshots; at least 1. A last one is written when fit ends. Some tens
            of snapshots over a run are enough.
        dirpath: Directory of the snapshots; ``None`` for ``posthoc_ema/`` beside the run's checkpoints. A resumed run
            goes on in the directory that it began in if that lies beside or below its checkpoint's or below the
            Trainer's root directory; a checkpoint cannot name any other place.
        dtype: Type in which snapshots are stored: ``"float32"``, or ``"float16"`` or ``"bfloat16"`` at half the size
            and three or two digits; complex weights always as complex64. The averages themselves are kept in float32.
        file_format: ``"torch"`` or ``"safetensors"``, which needs the package of that name.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of its range or a word not one of those listed.

    References:
        T. Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2023, arXiv:2312.02696.
    """

    technique = "PostHocEMA"

    def __init__(
        self,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        *,
        every_n_steps: int = 1000,
        dirpath: str | Path | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        file_format: Literal["torch", "safetensors"] = "torch",
    ) -> None:
        given = a_list("sigma_rels", sigma_rels, "a list of numbers")
        if len(given) > MOST_AVERAGES:
            raise ValueError(f"`sigma_rels` must be at most {MOST_AVERAGES} numbers, got {len(given)}.")
        self.sigma_rels = tuple(check_sigma_rel("sigma_rels", sigma) for sigma in given)
        if not given or len(set(self.sigma_rels)) < len(given):
            raise ValueError(f"`sigma_rels` must be one or more different numbers, got {self.sigma_rels}.")
        self.rules = [PowerDecay(sigma) for sigma in self.sigma_rels]
        super().__init__([*self.rules], UpdateCounter(), sigma_rels=self.sigma_rels)
        self.every_n_steps = whole_number("every_n_steps", every_n_steps, at_least=1, unit="steps")
        self.dirpath = None if dirpath is None else Path(a_path("dirpath", dirpath)).absolute()
        self.dtype = one_of("dtype", dtype, ("float32", "float16", "bfloat16"))
        self.file_format = one_of("file_format", file_format, FORMATS)
        self._restored: list[dict[str, Tensor]] | None = None
        self._directory: Path | None = None
        self._warned = False
        # another callback may have some of the same widths
        mine = f"{zlib.crc32(repr(self.sigma_rels).encode()):08x}"
        self._zero_saves = [ZeroSaves(f"post-hoc {sigma} {mine}") for sigma in self.sigma_rels]
        self._start_history()

    def _start_history(self) -> None:
        # where a file says that its run wrote
        self._claimed: Path | None = None
        # step of the last snapshot
        self._written = 0
        # tells this run's snapshots from others'
        self._run: str | None = None
        # parameters that were replaced -> the step that they began at
        self._began: dict[str, int] = {}
        # parameters that were moved -> what they were called at first
        self._first_names: dict[str, str] = {}

    # -- hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; a second fit of the same module goes on, of another one begins anew."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.dirpath is not None and trainer.is_global_zero and leaves_files(trainer):
            check_writable("dirpath", self.dirpath, directory=True)

    def set_state(self, state: dict[str, Any]) -> None:
        """Take the counters over, if there are averages that they belong to."""
        if not self._fitting or (self._restored is None and not self._shadows):
            return
        super().set_state(state)
        self._written = whole_number("written", state.get("written"), unit="steps")
        if self._written > self._counter.last:
            raise ValueError(f"`written` must be at most `last_update`, got {self._written} of {self._counter.last}.")
        self._claimed = Path(a_path("directory", state.get("directory")))
        self._run, self._began, self._first_names = check_history(state)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place what a file gave, and find the directory."""
        super().on_fit_start(trainer, pl_module)
        self._refuse_shared_directory(trainer)
        if trainer.is_global_zero and leaves_files(trainer):
            check_writable("dirpath", self._find_directory(trainer), directory=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on, to count and to average, in a directory without traces of another run."""
        resumed = self._restored is not None or bool(self._shadows)
        super().on_train_start(trainer, pl_module)
        # under a sharded strategy a checkpoint's directory is known only now
        self._refuse_shared_directory(trainer)
        self._set_aside(trainer, resumed=resumed)

    def get_state(self) -> dict[str, Any]:
        """Return the counters and where and as what the snapshots are written."""
        self._catch_up()
        counters = super().get_state()
        if not counters:
            return {}
        history = {"began": dict(self._began), "first_names": dict(self._first_names)}
        kept = {name: value for name, value in history.items() if value}
        return {**counters, "written": self._written, "directory": str(self._directory), "run": self._run or "", **kept}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the averages into a full file; DeepSpeed's directories get them when they are written."""
        if self._serves(pl_module) and not is_deepspeed(trainer.strategy):
            shares = is_distributed(checkpoint)
            keep = trainer.is_global_zero or shares
            averages = [shadow.collect("average", keep=keep, shares=shares) for shadow in self._shadows]
            checkpoint.setdefault(POSTHOC_KEY, {})[self.state_key] = averages
            move_sets(trainer.strategy, checkpoint)
            self._report()

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizer, and follow the module to where it was moved."""
        if trainer.world_size > 1:
            # after an error other ranks may not have got so far, and a snapshot takes all of them
            self._release_clock()
        super().release(trainer, pl_module)

    # -- following the weights

    def _begin(self, pl_module: LightningModule) -> None:
        for found in named_tensors(pl_module):
            if is_opaque(found.tensor):
                raise MisconfigurationException(
                    f"`PostHocEMA` must be able to write every weight into a snapshot, but `{found.described}` is a "
                    f"{type(found.tensor).__name__}. Use EMA, which leaves frozen weights where they are."
                )
        if self._restored is None:
            self._run = secrets.token_hex(8)
        starts: Sequence[dict[str, Tensor] | None] = self._restored or [None] * len(self.rules)
        zero = zero_of(pl_module.trainer)
        make: Callable[..., Shadow] = Shadow if zero is None else partial(MasterShadow, zero)
        self._shadows = [make(pl_module, start=start) for start in starts]
        self._restored = None

    def _place_restored(self, pl_module: LightningModule) -> None:
        if self._restored is not None:
            self._begin(pl_module)

    def _forget(self) -> None:
        self._shadows, self._restored = [], None
        self._start_history()
        self._counter.reset()

    def _updated(self, trainer: Trainer, n: int) -> None:
        if n // self.every_n_steps > self._written // self.every_n_steps:
            self._write(trainer, n)

    def _end_training(self, trainer: Trainer) -> None:
        """Write a last snapshot."""
        self._find_directory(trainer)
        if self._shadows and self._counter.last > self._written:
            self._write(trainer, self._counter.last)

    def _report(self) -> None:
        """Log what the shadows noticed, once for all, and remember what it means for the snapshots."""
        changes = self._shadows[0].changes if self._shadows else None
        for shadow in self._shadows[1:]:
            shadow.changes = None
        if changes is not None:
            n = max(self._counter.applied - (self._counter.origin or 0), 1)
            self._began.update(dict.fromkeys(changes.replaced, n))
            for now, before in changes.moved.items():
                self._first_names[now] = self._first_names.pop(before, before)
                if before in self._began:
                    self._began[now] = self._began.pop(before)
            self._first_names = {now: before for now, before in self._first_names.items() if now != before}
        super()._report()

    # -- files

    def _watch_files(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._watch_files(trainer, pl_module)
        if is_deepspeed(trainer.strategy):
            for number, saves in enumerate(self._zero_saves):
                saves.watch(trainer, partial(self._master_shadow, number))

    def leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let later files be those of a run without these averages."""
        super().leave(trainer, pl_module)
        for saves in self._zero_saves:
            saves.leave()

    def _master_shadow(self, number: int) -> MasterShadow | None:
        self._catch_up()
        shadow = self._shadows[number] if self._shadows else None
        return shadow if isinstance(shadow, MasterShadow) and self._serves(shadow.module) else None

    def _restore_parts(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Go on with this rank's parts of the averages in a directory of DeepSpeed."""
        parts = [saves.read(trainer, pl_module) for saves in self._zero_saves]
        found = [part[0] for part in parts if part is not None]
        if len(found) < len(self.rules):
            return False
        self._restored = found
        self._begin(pl_module)
        return True

    def _restore(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> bool:
        if is_deepspeed(trainer.strategy):
            return self._restore_parts(trainer, pl_module)
        sets = checkpoint.get(POSTHOC_KEY, {})
        if not isinstance(sets, dict):
            raise TypeError(f"`{POSTHOC_KEY}` must be averages by callback, got {shown(sets)}.")
        found = sets.get(self.state_key, sets.get(self._key_of_0_1))
        if (beside := self._sets_beside(trainer, pl_module, checkpoint)) is not None:
            read = [beside.read(posthoc_label(self.state_key, number)) for number in range(len(self.rules))]
            found = None if None in read else read
        if found is None:
            return False
        if not isinstance(found, list) or len(found) != len(self.rules) or not all(map(tensors_by_name, found)):
            raise ValueError(
                f"`{POSTHOC_KEY}` must be {len(self.rules)} averages of named tensors, got {shown(found)}."
            )
        for average in found:
            check_fit(pl_module, "post-hoc average", average, strict=pl_module.strict_loading)
        self._restored = list(found)
        return True

    def _restore_in_mid_fit(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super()._restore_in_mid_fit(trainer, pl_module, checkpoint)
        self._set_aside(trainer, resumed=True)

    def _before_writing(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("state_dict")
        if state and self._shadows:
            for average in checkpoint.get(POSTHOC_KEY, {}).get(self.state_key, []):
                follow_pruning(state, self._shadows[0].module, average)

    def _find_directory(self, trainer: Trainer) -> Path:
        """Return the directory: the one given, that of an earlier fit or of the run that is resumed, or the usual."""
        self._directory = self.dirpath or self._known_directory(trainer) or _beside_checkpoints(trainer)
        return self._directory

    def _known_directory(self, trainer: Trainer) -> Path | None:
        """Return where an earlier fit, or the run that is resumed, wrote; a file may not choose any other place."""
        if self._claimed is None:
            return self._directory
        claimed, self._claimed = self._claimed, None
        # the checkpoint's
        folder = Path(str(trainer.ckpt_path)).resolve().parent
        places = (folder.parent / _FOLDER, _beside_checkpoints(trainer).resolve())
        above = (folder, Path(trainer.default_root_dir).resolve())
        place = claimed.resolve()
        if place in places or any(place.is_relative_to(root) for root in above):
            return claimed
        rank_zero_info(
            f"PostHocEMA: the snapshots of the run that is resumed are said to lie in {claimed}, neither beside its "
            "checkpoint nor below the Trainer's directory. Pass `dirpath` to go on there."
        )
        return None

    def _refuse_shared_directory(self, trainer: Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by the callback connector
        all_of_run = [callback for callback in callbacks if isinstance(callback, PostHocEMA)]
        places = [callback._find_directory(trainer).resolve() for callback in all_of_run]
        mine = self._find_directory(trainer).resolve()
        if places.count(mine) > 1:
            raise MisconfigurationException(
                f"`dirpath` must differ among a Trainer's PostHocEMA callbacks, got {mine} twice: they would write "
                "over each other's snapshots. Give one of them another, or all `sigma_rels` to one callback."
            )

    def _set_aside(self, trainer: Trainer, *, resumed: bool) -> None:
        """Move snapshots out of the way that this run will write again, and those of an old run when one begins."""
        directory = self._find_directory(trainer)
        if trainer.is_global_zero and leaves_files(trainer) and directory.is_dir():
            run = (self._run or "") if resumed else None
            moved = set_aside(directory, after=self._counter.last, run=run)
            if moved is not None:
                rank_zero_info(f"PostHocEMA: snapshots of another run, later than this one is, were moved to {moved}.")

    def _write(self, trainer: Trainer, n: int) -> None:
        """Write a snapshot; a collective when the module is sharded."""
        keep, first = trainer.is_global_zero and leaves_files(trainer), self._shadows[0]
        averaged = set(first.names)
        averages, others = whole_averages(self._shadows, averaged, keep=keep)
        self._report()
        self._written = n
        if not keep:
            return
        directory = self._find_directory(trainer)
        parameters = {name for found in named_tensors(first.module) if not found.is_buffer for name in found.names}
        tied = first.tied
        contents = SnapshotContents(
            [{name: tensor for name, tensor in average.items() if name not in tied} for average in averages],
            {name: value for name, value in others.items() if name not in parameters},
            tied,
            run=self._run or "",
            began={name: step for name, step in self._began.items() if name in averaged},
            first_names={name: before for name, before in self._first_names.items() if name in averaged},
        )
        frozen = {name: value for name, value in others.items() if name in parameters}
        try:
            if frozen and not (directory / "frozen.pt").exists():
                write_frozen(directory, frozen)
            dtype = getattr(torch, self.dtype)
            write_snapshot(directory, n, self.sigma_rels, contents, dtype=dtype, file_format=self.file_format)
        except OSError as error:
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"{self.state_key}: the snapshot of step {n} could not be written to {directory}: {error}. "
                    "It is lost; the training goes on, and later snapshots are tried without another warning.",
                    category=LightningPluginsWarning,
                )


def _beside_checkpoints(trainer: Trainer) -> Path:
    """Return ``posthoc_ema/`` beside the directory of the run's checkpoints."""
    dirpath = getattr(trainer.checkpoint_callback, "dirpath", None)
    return (Path(dirpath).parent if dirpath else Path(trainer.default_root_dir)).absolute() / _FOLDER
