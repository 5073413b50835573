"""The callback that runs batches in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from lightning_plugins.core.automatic_optimization import check_automatic
from lightning_plugins.core.callback import Callback, Stage
from lightning_plugins.core.counting import CountedBy, counter
from lightning_plugins.core.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
    torch_optimizers,
)
from lightning_plugins.core.loaders import loader_batch_size
from lightning_plugins.core.strategies import check_strategy, forwards_are_collective
from lightning_plugins.core.validation import LightningPluginsWarning, shown, takes, whole_number
from lightning_plugins.microbatching.loop import BatchInPieces, PiecewiseClosure, RanksInStep
from lightning_plugins.microbatching.merging import checked_ways
from lightning_plugins.microbatching.out_of_memory import add_hint, is_out_of_memory
from lightning_plugins.microbatching.pieces import Pieces, Split
from lightning_plugins.microbatching.size_finder import SizeSearch


class MicroBatching(Callback):
    """Runs every batch in pieces that fit into memory, with the gradient, the outputs and the logs of the whole batch.

    ``training_step`` is called once per piece, each with its own backward weighted by the piece's share of the
    batch; the ranks synchronize once. Pieces are even, their sizes differ by one at most. ``outputs["loss"]`` is the
    whole batch's, other outputs are put together (rows), averaged (fractions) or added (whole numbers).
    What is logged is what the whole batch would log, also ``on_step``.

    With ``"auto"`` the whole batch is tried first. When memory runs out, the size is halved and the same batch runs
    again: gradients, random numbers, buffers, metrics and logs of the failed attempt are undone. The size found is
    kept for the following batches, logged, and saved in checkpoints.

    When:
        In the place of Lightning's closure of a batch: hooks of a batch and of a step fire once, those of a backward
        once per piece.

    Checkpoint:
        The size that ``"auto"`` has found.

    Distributed:
        One device and DDP, where ranks may run different numbers of pieces; only the last piece's backward
        synchronizes. With ``"auto"`` the ranks agree on the size. FSDP and tensor parallelism, with a number as
        ``size``: all ranks run as many pieces as the one that needs most, which they agree on for each batch.

    Cost:
        What the device loses by smaller batches, without a wait for it. Memory: the activations of one piece; with
        ``"auto"`` a copy of the buffers and, from a window's second batch on, of the gradients.

    Does not compose with:
        Manual optimization, several optimizers, DDP's ``static_graph``, synchronized batch normalization. Dropout
        draws other random numbers per piece than for the whole batch, from the same distribution. Batch normalization
        (warned of) and losses over pairs inside a batch see only their piece.

    Args:
        size: Samples that fit at once, or ``"auto"``.
        count: What the loss is a mean over, as in ``GradientAccumulation``: ``"samples"``, ``Tokens("labels")``, or a
            function of the batch.
        split: ``split(batch, sizes) -> pieces`` for batches that only you can take apart: a batch for each of the
            sizes, which are in samples and add up to the whole. Where the samples of a batch cannot be told, ``size``
            and ``sizes`` are in what ``count`` counts. ``None`` cuts tensors, arrays, lists and nests of them.
        logged: What a name that is logged is of a batch: ``"mean"`` over what ``count`` counts, which is taken of
            fractions that are averaged over batches, ``"sample_mean"``, ``"sum"``, ``"max"`` or ``"min"``, which are
            taken where ``reduce_fx`` is that, or ``"last"`` for what the last piece has, as gradients in
            ``on_after_backward``. Whole numbers that are averaged over batches need it.

    Raises:
        TypeError: If ``size`` is no whole number, ``split`` no function or ``logged`` no mapping; during the run if the
            batch cannot be split.
        ValueError: If ``size`` is below 1 or another word, ``count`` or ``logged`` another word; during the run if the
            batch's size cannot be told, ``split`` returns another number of pieces, or ``logged`` lacks a name.
        MisconfigurationException: At setup: manual optimization, several optimizers, DDP's ``static_graph``,
            synchronized batch normalization, or a strategy that it was not tested under.

    Example:
        >>> MicroBatching(16).size, MicroBatching().size
        (16, 'auto')
    """

    stage = Stage.ACCUMULATION

    def __init__(
        self,
        size: int | Literal["auto"] = "auto",
        *,
        count: CountedBy = "samples",
        split: Split | None = None,
        logged: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(size, str):
            if size != "auto":
                raise ValueError(f'`size` must be a number of samples or "auto", got {shown(size)}.')
        else:
            size = whole_number("size", size, at_least=1, unit="samples")
        counter(count)
        if split is not None:
            takes("split", split, "batch", "sizes", what="None or a function")
        self.size = size
        self.count = count
        self.split = split
        self.logged = checked_ways(logged)
        super().__init__(size=size)
        self._found: int | None = None
        self._search: SizeSearch | None = None
        self._in_step: RanksInStep | None = None
        self._pieces = Pieces("samples", None)
        self._warned = False
        # whether a batch's logs were collected, and names that never came
        self._ran = False
        self._unseen: set[str] = set()
        self._told: set[str] = set()

    @property
    def size_found(self) -> int | None:
        """The largest piece that fitted, in samples; ``None`` as long as whole batches do."""
        return self.size if isinstance(self.size, int) else self._found

    # hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_automatic(pl_module, "MicroBatching")
            check_strategy(trainer, 'MicroBatching("auto")' if self.size == "auto" else "MicroBatching(size)")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what only the strategy's model and the optimizers show, and warn of batch normalization."""
        if len(torch_optimizers(trainer)) > 1:
            raise MisconfigurationException("MicroBatching works with one optimizer, and the module has several.")
        if getattr(trainer.strategy.model, "static_graph", False):
            raise MisconfigurationException(
                "MicroBatching does not work with DDPStrategy(static_graph=True), which expects one backward per "
                "forward. Leave `static_graph` out."
            )
        norms = [
            name for name, layer in pl_module.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        ]
        if any(isinstance(layer, nn.SyncBatchNorm) for layer in pl_module.modules()):
            raise MisconfigurationException(
                "MicroBatching does not work with synchronized batch normalization, whose ranks would have to run "
                "equally many pieces. Set Trainer(sync_batchnorm=False)."
            )
        if norms:
            rank_zero_warn(
                f"MicroBatching splits batches, and batch normalization ({norms[0]}"
                f"{f' and {len(norms) - 1} more' if len(norms) > 1 else ''}) then takes its statistics over pieces: "
                f"the gradients are not those of the whole batch. Layers such as GroupNorm have no such effect.",
                category=LightningPluginsWarning,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's closures and say so once."""
        full = loader_batch_size(trainer)
        self._pieces = Pieces(self.count, self.split, module=pl_module, full=full)
        self._in_step = None
        if forwards_are_collective(trainer.strategy):
            self._in_step = RanksInStep(trainer)
        self._warned, self._ran, self._unseen, self._told = False, False, set(self.logged), set()
        if self.size == "auto":
            self._search = SizeSearch(trainer, self._found)
            known = f"in pieces of at most {self._found} samples" if self._found else "whole"
            rank_zero_info(f"MicroBatching: batches run {known}, and in smaller pieces if memory runs out.")
        else:
            rank_zero_info(f"MicroBatching: batches run in pieces of at most {self.size} samples.")

        def make_closure(whole: Any, kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
            return self._closure(trainer, whole, kwargs, optimizer, batch_idx)

        self.patches.wrap(trainer.fit_loop.epoch_loop.automatic_optimization, "_make_closure", make_closure)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if a name of ``logged`` was never logged."""
        for name in sorted(self._unseen) if self._ran else ():
            rank_zero_warn(
                f"`logged` of MicroBatching names {shown(name)}, but nothing of that name was logged in training.",
                category=LightningPluginsWarning,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the Trainer as it was; say what helps when memory ran out."""
        if is_out_of_memory(exception) and trainer.training:
            add_hint(exception, self._hint())
        super().on_exception(trainer, pl_module, exception)

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of what belongs to the run."""
        self._search = self._in_step = None
        self._pieces = Pieces("samples", None)

    def get_state(self) -> dict[str, Any]:
        """Return the size found by ``"auto"``."""
        return {"size_found": self._found}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take the size found by ``"auto"`` before.

        Raises:
            TypeError: If it is no whole number.
            ValueError: If it is below 1.
        """
        found = state.get("size_found")
        self._found = None if found is None else whole_number("state['size_found']", found, at_least=1, unit="samples")

    # what the hooks are made of

    def _closure(self, trainer: Trainer, whole: Any, kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
        """Return what runs the batch: Lightning's own closure if it need not be split nor guarded.

        Several ranks log in one order, after the backward, also where one has a single piece: logging may synchronize.
        """
        size, search, pieces = self.size, self._search, self._pieces
        if isinstance(size, int) and trainer.world_size == 1 and pieces.length(kwargs["batch"]) <= size:
            return whole(kwargs, optimizer, batch_idx)
        ways, in_step = self.logged, self._in_step
        batch = BatchInPieces(trainer, kwargs, optimizer, batch_idx, pieces=pieces, logged=ways, in_step=in_step)

        def run() -> Any:
            batch.begin()
            result = batch.run(int(size)) if search is None else search.run(batch)
            self._found = None if search is None else search.size
            self._warn_of(batch.dropped)
            self._tell_of(batch.logs.bounds)
            self._unseen -= batch.logs.names
            self._ran = True
            return result

        return PiecewiseClosure(run)

    def _warn_of(self, dropped: dict[str, str]) -> None:
        """Say once in a run what is missing in the outputs of a step."""
        if dropped and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"MicroBatching leaves out what it cannot merge of the outputs of `training_step` for the pieces of a "
                f"batch: {' '.join(dropped.values())} Return tensors with a row per sample, numbers, or nothing.",
                category=LightningPluginsWarning,
            )

    def _tell_of(self, bounds: set[str]) -> None:
        """Say once in a run which values were taken for the largest or smallest of a batch."""
        for name in sorted(bounds - self._told):
            rank_zero_info(
                f"MicroBatching takes {name!r} for the largest or smallest of a batch, as its reduce_fx says. If it is "
                f"the mean of a batch, write MicroBatching(logged={{{name!r}: 'mean'}})."
            )
        self._told |= bounds

    def _hint(self) -> str:
        if self._search is not None and self._search.settled:
            return (
                f"MicroBatching had settled on a size under DDP, where one rank cannot ask the others to go back. Give "
                f"a number of samples below {self._search.largest()} as `size`."
            )
        if self.size == "auto":
            return "MicroBatching found no size that fits. Shorten the samples, or free memory in another way."
        return f'MicroBatching ran pieces of at most {self.size} samples. Take a smaller `size`, or "auto".'
