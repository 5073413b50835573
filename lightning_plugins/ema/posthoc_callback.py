"""The PostHocEMA callback: when the power averages are updated, and when a snapshot of them is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_plugins.core.lightning import LightningModule, MisconfigurationException, Trainer, rank_zero_info
from lightning_plugins.core.module_state import clean_name
from lightning_plugins.core.sharding import gather, local
from lightning_plugins.core.validation import a_list, a_path, one_of, whole_number
from lightning_plugins.ema.averaging_callback import WeightFollower
from lightning_plugins.ema.decay import PowerDecay
from lightning_plugins.ema.restore import check_fit
from lightning_plugins.ema.shadow import Shadow
from lightning_plugins.ema.snapshots import FORMATS, Loaded, set_aside, write_frozen, write_snapshot

POSTHOC_KEY = "lightning_plugins_posthoc_ema"
_FOLDER = "posthoc_ema"


class PostHocEMA(WeightFollower):
    """Records power averages of the weights, from which an average of any length can be made after the run.

    Training, evaluation and checkpoints' ``state_dict`` are left alone; :func:`~lightning_plugins.synthesize_ema` turns
    the snapshots into weights.

    Args:
        sigma_rels: Relative standard deviations of the averages that are kept, each above 0 and below 0.2887; two, 0.05
            and 0.10, span what is usually wanted.
        every_n_steps: Applied steps between two snapshots; at least 1. A last one is written when fit ends. Some tens
            of snapshots over a run are enough.
        dirpath: Directory of the snapshots; ``None`` for ``posthoc_ema/`` beside the run's checkpoints. A resumed run
            goes on in the directory that it began in if that lies beside or below its checkpoint's or below the
            Trainer's root directory; a checkpoint cannot name any other place.
        dtype: Type in which snapshots are stored: ``"float32"``, or ``"float16"`` or ``"bfloat16"`` at half the size
            and three or two digits. The averages themselves are kept in float32.
        file_format: ``"torch"`` or ``"safetensors"``, which needs the package of that name.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of its range or a word not one of those listed.

    Checkpoint:
        Full files hold the averages under ``lightning_plugins_posthoc_ema``, so that a resumed run writes the
        snapshots that it would have written.

    Distributed:
        Every rank keeps the averages of its own weights or shards; the first writes.

    Cost:
        4 bytes per trainable parameter and average, an update each per step, and as many bytes per snapshot.

    References:
        T. Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2023, arXiv:2312.02696.
    """

    def __init__(
        self,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        *,
        every_n_steps: int = 1000,
        dirpath: str | Path | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        file_format: Literal["torch", "safetensors"] = "torch",
    ) -> None:
        super().__init__(start_step=0, every=1)
        self.rules = [PowerDecay(sigma) for sigma in a_list("sigma_rels", sigma_rels, "a list of numbers")]
        self.sigma_rels = tuple(rule.sigma_rel for rule in self.rules)
        if not self.rules or len(set(self.sigma_rels)) < len(self.rules):
            raise ValueError(f"`sigma_rels` must be one or more different numbers, got {self.sigma_rels}.")
        self.every_n_steps = whole_number("every_n_steps", every_n_steps, at_least=1, unit="steps")
        self.dirpath = None if dirpath is None else Path(a_path("dirpath", dirpath))
        self.dtype = one_of("dtype", dtype, ("float32", "float16", "bfloat16"))
        self.file_format = one_of("file_format", file_format, FORMATS)
        self._shadows: list[Shadow] = []
        self._restored: list[dict[str, Tensor]] | None = None
        self._directory: Path | None = None
        self._claimed: Path | None = None  # where a file says that its run wrote
        self._written = 0  # step of the last snapshot

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the counters; one per choice of averages, wherever the snapshots lie."""
        return self._generate_state_key(sigma_rels=self.sigma_rels)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; a second fit of the same module goes on, of another one begins anew."""
        if stage != "fit":
            return
        self._refuse_strategy(trainer)
        if self._shadows and self._shadows[0].module is not pl_module:
            self._forget()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the averages out of the file."""
        if trainer.state.fn != "fit":
            return
        self._forget()
        found = checkpoint.get(POSTHOC_KEY, {}).get(self.state_key)
        if found is None:
            return
        try:
            for average in found:
                check_fit(pl_module, "post-hoc average", average, strict=pl_module.strict_loading)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self._restored = list(found)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters over, if there are averages that they belong to."""
        if self._restored is not None:
            self._pace.load_state_dict(state_dict)
            self._written = state_dict["written"]
            self._claimed = Path(a_path("directory", state_dict["directory"]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on, to count and to average, in a directory without traces of another run."""
        self._place(trainer, pl_module)
        for shadow in self._shadows:
            shadow.rebind()
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and self._directory is not None and self._directory.is_dir():
            moved = set_aside(self._directory, after=self._pace.last)
            if moved is not None:
                rank_zero_info(f"PostHocEMA: snapshots of another run, later than this one is, were moved to {moved}.")

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and the directory."""
        self._catch_up()
        counters = super().state_dict()
        return {**counters, "written": self._written, "directory": str(self._directory)} if counters else {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the averages into a full file."""
        if self._shadows and self._shadows[0].module is pl_module:
            keep = trainer.is_global_zero
            averages = [shadow.collect("average", keep=keep) for shadow in self._shadows]
            checkpoint.setdefault(POSTHOC_KEY, {})[self.state_key] = averages

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a last snapshot."""
        self._place(trainer, pl_module)
        self._catch_up()
        if self._pace.last > self._written:
            self._write(trainer, self._pace.last)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer."""
        if trainer.world_size == 1:  # the others may not have got so far, and a snapshot takes all of them
            self._last_catch_up()
        self._release_clock()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizer, and follow the module to where it was moved."""
        self._release_clock()
        if self._shadows and self._shadows[0].module is pl_module:
            for shadow in self._shadows:
                shadow.rebind()

    def _known_directory(self, trainer: Trainer) -> Path | None:
        """Return where an earlier fit, or the run that is resumed, wrote; a file may not choose any other place."""
        if self._claimed is None:
            return self._directory
        claimed, self._claimed = self._claimed, None
        folder = Path(str(trainer.ckpt_path)).resolve().parent  # the checkpoint's
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

    def _begin(self, pl_module: LightningModule) -> None:
        self._build(pl_module)

    def _update(self, trainer: Trainer, n: int, steps: int) -> None:
        for rule, shadow in zip(self.rules, self._shadows, strict=True):
            shadow.update(rule(n, steps))
        if n // self.every_n_steps > self._written // self.every_n_steps:
            self._write(trainer, n)

    def _adopt(self) -> None:
        for shadow in self._shadows:
            shadow.adopt()

    def _place(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place what a file gave, now that the module is on its device, and find the directory."""
        if self._restored is not None:
            self._build(pl_module)
        self._directory = self.dirpath or self._known_directory(trainer) or _beside_checkpoints(trainer)

    def _build(self, pl_module: LightningModule) -> None:
        starts: Sequence[dict[str, Tensor] | None] = self._restored or [None] * len(self.rules)
        self._shadows = [Shadow(pl_module, start=start) for start in starts]
        self._restored = None

    def _forget(self) -> None:
        self._shadows, self._restored, self._directory, self._claimed, self._written = [], None, None, None, 0
        self._pace.reset()

    def _write(self, trainer: Trainer, n: int) -> None:
        """Write a snapshot; a collective when the module is sharded."""
        keep = trainer.is_global_zero
        averages = [shadow.collect("average", keep=keep) for shadow in self._shadows]
        first = self._shadows[0]
        averaged = set(first.names)
        others = {
            clean_name(key): gather(local(value), value).detach()
            for key, value in first.module.state_dict().items()
            if clean_name(key) not in averaged
        }
        self._written = n
        if not keep or self._directory is None:
            return
        parameters = {clean_name(name) for name, _ in first.module.named_parameters(remove_duplicate=False)}
        frozen = {name: value for name, value in others.items() if name in parameters}
        if frozen and not (self._directory / "frozen.pt").exists():
            write_frozen(self._directory, frozen)
        tied = first.tied
        loaded = Loaded(
            [{name: tensor for name, tensor in average.items() if name not in tied} for average in averages],
            {name: value for name, value in others.items() if name not in parameters},
            tied,
        )
        write_snapshot(
            self._directory, n, self.sigma_rels, loaded, dtype=getattr(torch, self.dtype), file_format=self.file_format
        )


def _beside_checkpoints(trainer: Trainer) -> Path:
    """Return ``posthoc_ema/`` beside the directory of the run's checkpoints."""
    dirpath = getattr(trainer.checkpoint_callback, "dirpath", None)
    return (Path(dirpath).parent if dirpath else Path(trainer.default_root_dir)) / _FOLDER
