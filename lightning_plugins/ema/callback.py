"""The EMA callback: when the average is updated, shown and saved. What an average is stands in ``shadow.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from lightning_plugins.core.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_plugins.core.module_state import clean_name, device_name, fill, load_named, named_tensors, uncompiled
from lightning_plugins.core.sharding import gather, local, reshard
from lightning_plugins.core.validation import LightningPluginsWarning, one_of, shown, whole_number
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
from lightning_plugins.ema.decay import DecayRule, as_decay_rule
from lightning_plugins.ema.ownership import Roles, assign_roles, refuse_other_averages
from lightning_plugins.ema.shadow import Shadow, Which, disown, showing
from lightning_plugins.ema.swapping import Swapper


class EMA(AveragingCallback):
    """Keeps an exponential moving average of the weights and evaluates, saves and ends with it.

    shadow <- shadow - (1 - decay) * (shadow - weight), after every applied optimizer step, in float32 at least. A step
    that a gradient scaler skipped, a batch that returned ``None`` and a batch inside an accumulation window change no
    weight and no average.

    Args:
        decay: Share of the old average that an update keeps. A number d means
            :class:`~lightning_plugins.WarmupDecay`: min(d, (1 + n) / (10 + n)) at the n-th step, so that the untrained
            weights are forgotten at once; otherwise a :class:`~lightning_plugins.DecayRule`.
        update_every_n_steps: Applied steps between two updates, each with the decay of that many steps; at least 1.
        start_step: Applied steps after which the average begins, as a copy of the weights; before, everything is raw.
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
        ValueError: If a number is out of its range or a word not one of those listed.

    When:
        ``on_train_batch_end`` updates; ``on_validation_start``/``_end`` and their siblings swap.

    Checkpoint:
        ``state_dict`` is the average, so ``load_from_checkpoint`` needs nothing of this. The raw weights lie under
        ``lightning_plugins_ema`` in full files; :func:`~lightning_plugins.extract_weights` gives either.

    Distributed:
        Under DDP every rank keeps the same average, without communication; under FSDP2 its own share, and the whole
        is gathered only to be saved.

    Cost:
        4 bytes per trainable parameter; an update takes as long as reading and writing the average once. A module in
        half precision keeps its raw weights, 2 bytes per parameter, while the average is swapped in.

    References:
        B. Polyak and A. Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the warm-up is
        TensorFlow's. Differs from Lightning's ``EMAWeightAveraging``: see the card in ``ema/README.md``.
    """

    technique = "EMA"

    def __init__(
        self,
        decay: float | DecayRule = 0.9999,
        *,
        update_every_n_steps: int = 1,
        start_step: int = 0,
        device: str | None = None,
        buffers: Literal["copy", "average"] = "copy",
        evaluate: Literal["average", "raw"] = "average",
        checkpoint: Literal["average", "raw"] = "average",
        after_fit: Literal["average", "raw"] = "average",
        name: str = "ema",
    ) -> None:
        self.update_every_n_steps = whole_number("update_every_n_steps", update_every_n_steps, at_least=1, unit="steps")
        self.start_step = whole_number("start_step", start_step, unit="steps")
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a word, got {shown(name)}.")
        self.decay = as_decay_rule(decay)
        super().__init__([self.decay], self.start_step, self.update_every_n_steps, name=name)
        self.device = device_name(device)
        self.average_buffers = one_of("buffers", buffers, ("copy", "average")) == "average"
        self.evaluate = one_of("evaluate", evaluate, ("average", "raw"))
        self.checkpoint = one_of("checkpoint", checkpoint, ("average", "raw"))
        self.after_fit = one_of("after_fit", after_fit, ("average", "raw"))
        self.name = name
        self._restored: dict[str, Tensor] | None = None  # from a file, until the module is on its device
        self._swapper = Swapper()
        self._buffers_at_end: dict[str, Tensor] = {}
        self._writes_files = False  # whether the run's files are this one's to sort out
        self._filled: Any = None  # the state dict of the file that is being made

    # -- hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; a second fit of the same module goes on from its raw weights."""
        super().setup(trainer, pl_module, stage)
        _roles(trainer)
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

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sort out the file's sets: the module has been given the one in ``state_dict``."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._fitting:
            return
        try:
            contents = read_contents(checkpoint)
            if contents is not None:
                self._choose(trainer, pl_module, contents)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(str(error)) from error

    def set_state(self, state: dict[str, Any]) -> None:
        """Take the counters over, if there is an average that they belong to."""
        if self._fitting and (self._restored is not None or self._shadows or state.get("origin") == -1):
            super().set_state(state)

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

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put both sets into a full file, each where it belongs, whichever the module holds at the moment."""
        if not self._serves(pl_module):
            return
        found, keep, shadow = record(checkpoint), trainer.is_global_zero, self._shadows[0]
        if _roles(trainer).writer is self:
            if not self._file_patches:
                # after the fit
                self._fill_state_dict(checkpoint["state_dict"])
            self._label(checkpoint)
            found["raw"] = shadow.collect("raw", keep=keep) if self._owns_files else None
        if not self._owns_files or (shadow.sharded and shadow.rounds):
            found["averages"][self.name] = shadow.collect("average", keep=keep)

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

    @property
    def _active(self) -> bool:
        return bool(self._shadows) and self._counter.last > 0

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
        self._swapper.kept = _roles(trainer).keeper is self
        if self._shadows:
            shadow = self._shadows[0]
            self._swapper.apply(shadow, ready=self._active, keep_shadows=True)
            self._report()
            self._buffers_at_end = {
                name: found.tensor.detach().clone()
                for found in named_tensors(shadow.module)
                if found.is_buffer
                for name in found.names
            }

    # -- files

    @property
    def _owns_files(self) -> bool:
        """Whether the ``state_dict`` of a file is this average now."""
        return self._active and self.checkpoint == "average"

    def _watch_files(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._watch_files(trainer, pl_module)
        self._writes_files = _roles(trainer).writer is self
        if self._writes_files:

            def state_dict(original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
                state = original()
                self._fill_state_dict(state)
                self._filled = state
                return state

            self._file_patches.wrap(trainer.strategy, "lightning_module_state_dict", state_dict)

    def _fill_state_dict(self, state: dict[str, Any]) -> None:
        """Make a state dict of the module what files should have, whichever set the module holds at the moment."""
        self._catch_up_all()
        # under FSDP2 only the first rank gets one
        keep = bool(state)
        if self._shadows:
            shadow = self._shadows[0]
            if self._serves(shadow.module):
                fill(state, shadow.collect("average" if self._owns_files else "raw", keep=keep))
                self._report()
        elif self._trainer is not None and (other := showing(self._trainer.lightning_module)) is not None:
            fill(state, other.collect("raw", keep=keep))

    def _label(self, checkpoint: dict[str, Any]) -> None:
        """Say in a file what its state dict is."""
        owns = self._owns_files
        record(checkpoint).update(state_dict="average" if owns else "raw", name=self.name if owns else None)

    def _before_writing(self, checkpoint: dict[str, Any]) -> None:
        state, filled, self._filled = checkpoint.get("state_dict"), self._filled, None
        if not (self._writes_files and self._shadows and state is not None):
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

    def _restore(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> bool:
        """Keep the file's average for the shadow and give the module its raw weights."""
        contents = read_contents(checkpoint)
        if contents is None:
            return False
        state_dict, strict = checkpoint.get("state_dict"), pl_module.strict_loading
        self._restored = fitting_average(pl_module, contents, self.name, state_dict, strict=strict)
        steps = lightning_steps(contents, checkpoint)
        if steps is not None:
            self._counter.load(steps)
        found = self._restored is not None or contents.owns_state_dict(self.name)
        if found and trainer.strategy.restore_checkpoint_after_setup:
            # the module may hold the only average
            self._begin(pl_module)
        emas = _averages(trainer) or [self]
        loader = next((ema for ema in emas if contents.owns_state_dict(ema.name)), emas[0])
        if loader is self and contents.raw is not None:
            load_named(pl_module, contents.raw)
        return found

    def _before_loading(self) -> None:
        if self._shadows:
            self._shadows[0].swap_out()

    def _restore_in_mid_fit(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super()._restore_in_mid_fit(trainer, pl_module, checkpoint)
        self._show()

    def _choose(self, trainer: Trainer, pl_module: LightningModule, contents: Contents) -> None:
        """Give a module that is only evaluated the set that it is to be evaluated with."""
        evaluator = _roles(trainer).evaluator
        if evaluator is self and not contents.owns_state_dict(self.name):
            average = fitting_average(pl_module, contents, self.name, None, strict=pl_module.strict_loading)
            load_named(pl_module, average or {})
        elif evaluator is None and _averages(trainer)[0] is self:
            load_named(pl_module, contents.raw or {})

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
        if not served:
            found = {**self._buffers_at_end, **found}
        self._report()
        state = shadow.module.state_dict()
        return {
            key: found[clean_name(key)] if clean_name(key) in found else gather(local(value), value).detach().clone()
            for key, value in state.items()
        }


def _averages(trainer: Trainer) -> list[EMA]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]


def _roles(trainer: Trainer) -> Roles[EMA]:
    try:
        if trainer.state.fn == "fit":
            refuse_other_averages(trainer.callbacks)  # type: ignore[attr-defined]
        return assign_roles(_averages(trainer))
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
