"""The EMA callback: when the average is updated, shown and saved. What an average is stands in ``shadow.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from lightning_plugins.core.durations import check_duration
from lightning_plugins.core.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_plugins.core.module_state import clean_name, device_name, named_tensors, uncompiled
from lightning_plugins.core.sharding import gather, local, reshard
from lightning_plugins.core.validation import LightningPluginsWarning, one_of, shown
from lightning_plugins.ema.checkpoint_hooks import AverageInCheckpoints, roles_of
from lightning_plugins.ema.decay import DecayRule, UpdateCounter, interval
from lightning_plugins.ema.function_decay import as_decay_rule
from lightning_plugins.ema.shadow import Shadow, Which, disown
from lightning_plugins.ema.swapping import Swapper


class EMA(AverageInCheckpoints):
    """Keeps an exponential moving average of the weights and evaluates, saves and ends with it.

    shadow <- shadow - (1 - decay) * (shadow - weight), after every applied optimizer step, in float32 at least. A step
    that a gradient scaler skipped, a batch that returned ``None`` and a batch inside an accumulation window change no
    weight and no average.

    When:
        ``on_train_batch_end`` updates; ``on_validation_start``/``_end`` and their siblings swap; ``on_train_end``
        leaves the module with what ``after_fit`` says.

    Checkpoint:
        ``state_dict`` is the average, so ``load_from_checkpoint`` needs nothing of this. The raw weights lie under
        ``lightning_plugins_ema`` in full files; :func:`~lightning_plugins.extract_weights` gives either. Weights that
        the strategy loads in mid-fit restore both sets. A file saved after other weights were written into the module
        holds those alone.

    Distributed:
        Under DDP every rank keeps the same average, without communication; under FSDP2 its own share, and the whole
        is gathered only to be saved.

    Cost:
        4 bytes per trainable parameter; an update takes as long as reading and writing the average once. A module in
        half precision keeps its raw weights, 2 bytes per parameter, while the average is swapped in. After a fit that
        leaves the average in the module the raw weights are kept on the host.

    Does not compose with:
        Lightning's StochasticWeightAveraging and WeightAveraging, which are refused at setup; FSDP1, DeepSpeed and
        distributed checkpoints, likewise; parts taken out of the module in mid-run, which end the fit with an error.

    Args:
        decay: Share of the old average that an update keeps. A number d means
            :class:`~lightning_plugins.WarmupDecay`: min(d, (1 + n) / (10 + n)) at the n-th step, so that the untrained
            weights are forgotten at once. A :class:`~lightning_plugins.DecayRule`, or any function of n, the first step
            being 1, or its import path. A :class:`~lightning_plugins.Schedule` is taken at n - 1, as it counts steps
            from 0, and counts its lengths in the run's: ``Cosine(None, 0.996, 1.0)`` is BYOL's and DINO's momentum.
        update_every_n_steps: Applied steps between two updates, each with the decay of that many steps; at least 1. Or
            a share of the run (``0.01``, ``"1%"``) or epochs (``"1ep"``).
        start_step: Applied steps after which the average begins, as a copy of the weights; before, everything is raw.
            Or a share of the run, as ``"95%"``, or epochs.
        device: Where the average lies; ``None`` for beside the weights. ``"cpu"`` spares GPU memory: the average is
            pinned and every update streams it over the bus twice, so pair it with a large ``update_every_n_steps``.
        buffers: ``"copy"`` evaluates the average with the module's own buffers (batch statistics), ``"average"``
            averages the floating-point ones too. Integers are never averaged.
        evaluate: The weights that validation, test and predict use, from the first update on.
        checkpoint: What every file that is written during fit has as its ``state_dict``, from the first update on.
        after_fit: What the module holds when fit has ended; the other is in :meth:`raw_state_dict` or
            :meth:`average_state_dict`. After an exception the module holds its raw weights.
        name: Distinguishes several EMAs of one Trainer, of which at most one evaluates and one owns the ``state_dict``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of its range or a word not one of those listed; in a run, if a decay of your own
            is outside [0, 1].
        MisconfigurationException: When the fit starts, if something depends on the length of a run that is not known.

    References:
        B. Polyak and A. Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the warm-up is
        TensorFlow's. Differs from Lightning's ``EMAWeightAveraging``: see the card in ``ema/README.md``.
    """

    technique = "EMA"

    def __init__(
        self,
        decay: float | DecayRule | Callable[[int], float] = 0.9999,
        *,
        update_every_n_steps: int | float | str = 1,
        start_step: int | float | str = 0,
        device: str | None = None,
        buffers: Literal["copy", "average"] = "copy",
        evaluate: Literal["average", "raw"] = "average",
        checkpoint: Literal["average", "raw"] = "average",
        after_fit: Literal["average", "raw"] = "average",
        name: str = "ema",
    ) -> None:
        self.update_every_n_steps = interval("update_every_n_steps", update_every_n_steps)
        self.start_step = check_duration("start_step", start_step)
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a word, got {shown(name)}.")
        self.decay = as_decay_rule(decay)
        super().__init__(self.decay, UpdateCounter(self.start_step, self.update_every_n_steps), name)
        self.device = device_name(device)
        self.average_buffers = one_of("buffers", buffers, ("copy", "average")) == "average"
        self.evaluate = one_of("evaluate", evaluate, ("average", "raw"))
        self.checkpoint = one_of("checkpoint", checkpoint, ("average", "raw"))
        self.after_fit = one_of("after_fit", after_fit, ("average", "raw"))
        self._swapper = Swapper()
        self._buffers_at_end: dict[str, Tensor] = {}
        self._keys_at_end: list[str] = []

    # -- hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; a second fit of the same module goes on from its raw weights."""
        super().setup(trainer, pl_module, stage)
        roles_of(trainer)
        if stage != "fit":
            return
        if self._swapper.blocks:
            raise MisconfigurationException(
                f"A fit must not begin inside a `with` block of `averaged` of EMA {self.name!r}: it would train the "
                "average."
            )
        self._swapper.kept = False
        self._show()
        # an EMA of an earlier fit may have left its average there: it is trained on
        disown(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the weights that are to be evaluated."""
        self._start_evaluation(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back what was there."""
        self._end_evaluation()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the weights that are to be evaluated."""
        self._start_evaluation(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back what was there."""
        self._end_evaluation()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the weights that are to be evaluated."""
        self._start_evaluation(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back what was there."""
        self._end_evaluation()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the raw weights back, wherever it happened."""
        # a fit that has not been torn down has its clock
        if self._clock is not None:
            self._swapper.kept = False
        super().on_exception(trainer, pl_module, exception)

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the evaluation or the fit that was under way."""
        self._evaluating, self._swapper.evaluating = False, None
        self._show()
        super().release(trainer, pl_module)
        if self._shadows and self._shadows[0].module is pl_module:
            self._shadows[0].rebind()

    # -- for users

    def average_state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights as a state dict of the module, in copies.

        Averages are in float32 also where the weights are not; buffers that are not averaged and frozen weights are
        the module's. Weights that were loaded into the module after the fit change nothing but frozen ones. A
        collective under FSDP2, where every rank gets the full tensors.

        Raises:
            RuntimeError: If nothing was averaged yet.
        """
        return self._whole_state("average")

    def raw_state_dict(self) -> dict[str, Tensor]:
        """Return the trained weights likewise, whichever set the module holds.

        Raises:
            RuntimeError: If nothing was averaged yet, or the module held them and has been written to since.
        """
        return self._whole_state("raw")

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[LightningModule]:
        """Put the average into the module for the length of a ``with`` block; blocks may be nested.

        Before the first update the module is left as it is.

        Raises:
            ValueError: If it is not the module that was averaged.
        """
        module: Any = uncompiled(pl_module)
        if self._shadows and self._shadows[0].module is not module:
            raise ValueError(f"`pl_module` must be the module that EMA {self.name!r} averaged, got another one.")
        self._catch_up_all()
        shown = self._can_show(module)
        self._swapper.blocks += shown
        try:
            self._show()
            yield pl_module
        finally:
            self._swapper.blocks -= shown
            self._show()

    # -- following the weights

    def _begin(self, pl_module: LightningModule) -> None:
        self._shadows = [Shadow(pl_module, buffers=self.average_buffers, device=self.device, start=self._restored)]
        self._restored = None

    def _place_restored(self, pl_module: LightningModule) -> None:
        if self._restored is not None:
            self._begin(pl_module)

    def _forget(self) -> None:
        """Start anew."""
        self._shadows, self._restored, self._buffers_at_end = [], None, {}
        self._swapper.forget()
        self._counter.reset()

    # -- what the module holds

    def _show(self) -> None:
        """Make the module hold what is wanted now."""
        if self._shadows:
            shadow, keep = self._shadows[0], not self._fitting
            if self._swapper.apply(shadow, ready=self._active, keep_shadows=keep) and keep:
                shadow.remember()
            self._report()

    def _can_show(self, pl_module: nn.Module) -> bool:
        """Return whether the average may be put into the module; say so if something else was written into it."""
        if self._serves(pl_module):
            return True
        if self._shadows and self._shadows[0].module is pl_module:
            rank_zero_info(f"{self.state_key}: other weights are in the module than its fit left; they are used.")
        return False

    def _start_evaluation(self, pl_module: LightningModule) -> None:
        self._catch_up_all()
        if self._can_show(pl_module):
            shadow = self._shadows[0]
            if not self._fitting:
                shadow.rebind()
            self._evaluating, self._swapper.evaluating = True, self.evaluate
            self._show()
            shadow.count_writes()

    def _end_evaluation(self) -> None:
        if not self._evaluating:
            return
        self._evaluating, self._swapper.evaluating = False, None
        shadow = self._shadows[0]
        if shadow.swapped and shadow.written_into():
            rank_zero_warn(
                f"{self.state_key}: the average was written into while it was evaluated, so the scores are of weights "
                "that no file holds. An optimizer whose `eval()` exchanges the weights, as those without a schedule "
                "do, needs EMA(evaluate='raw').",
                category=LightningPluginsWarning,
            )
        self._show()

    def _end_training(self, trainer: Trainer) -> None:
        """Leave the module with what ``after_fit`` says."""
        self._evaluating, self._swapper.evaluating = False, None
        self._swapper.kept = roles_of(trainer).keeper is self
        if self._shadows:
            shadow = self._shadows[0]
            self._swapper.apply(shadow, ready=self._active, keep_shadows=True)
            self._report()
            self._keys_at_end = list(shadow.module.state_dict())
            self._buffers_at_end = {
                name: found.tensor.detach().clone()
                for found in named_tensors(shadow.module)
                if found.is_buffer
                for name in found.names
            }

    def _whole_state(self, which: Which) -> dict[str, Tensor]:
        if not self._shadows:
            raise RuntimeError(f"EMA {self.name!r} has no weights to give: it begins with a fit, after `start_step`.")
        self._catch_up_all()
        shadow = self._shadows[0]
        served = self._serves(shadow.module)
        if which == "raw" and not served and not shadow.swapped:
            raise RuntimeError(
                f"The raw weights of EMA {self.name!r} were in the module when something else was written into it."
            )
        if shadow.sharded:
            reshard(shadow.module)
        found = shadow.collect(which, copies=True)
        self._report()
        state = shadow.module.state_dict()
        names = {clean_name(key): key for key in state}
        if not served:
            if found.keys() - names.keys():
                # the module has other parts now
                names = {clean_name(key): key for key in self._keys_at_end}
            found = {**self._buffers_at_end, **found}
        others = {name: state[key] for name, key in names.items() if key in state and name not in found}
        # a module's extra state is no tensor
        tensors = {name: value for name, value in others.items() if isinstance(value, Tensor)}
        found.update({**others, **{name: gather(local(v), v).detach().clone() for name, v in tensors.items()}})
        return {key: found[name] for name, key in names.items() if name in found}
