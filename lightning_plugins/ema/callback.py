"""The EMA callback: when the average is updated, shown and saved. What an average is stands in ``shadow.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from lightning_plugins.core.lightning import LightningModule, MisconfigurationException, Trainer, rank_zero_info
from lightning_plugins.core.loaders import samples_per_step
from lightning_plugins.core.module_state import clean_name, device_name, fill, load_named
from lightning_plugins.core.sharding import gather, local, reshard
from lightning_plugins.core.validation import one_of, shown, whole_number
from lightning_plugins.ema.averaging_callback import WeightFollower
from lightning_plugins.ema.checkpoint_format import Contents, read_contents, record
from lightning_plugins.ema.checkpoint_hooks import CheckpointSeam
from lightning_plugins.ema.decay import DecayRule, as_decay_rule
from lightning_plugins.ema.ownership import Roles, assign_roles
from lightning_plugins.ema.restore import fitting_average, lightning_steps
from lightning_plugins.ema.shadow import Shadow, Which, disown, showing
from lightning_plugins.ema.swapping import Stage


class EMA(WeightFollower):
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
        every = whole_number("update_every_n_steps", update_every_n_steps, at_least=1, unit="steps")
        super().__init__(whole_number("start_step", start_step, unit="steps"), every)
        self.decay = as_decay_rule(decay)
        self.device = device_name(device)
        self.average_buffers = one_of("buffers", buffers, ("copy", "average")) == "average"
        self.evaluate = one_of("evaluate", evaluate, ("average", "raw"))
        self.checkpoint = one_of("checkpoint", checkpoint, ("average", "raw"))
        self.after_fit = one_of("after_fit", after_fit, ("average", "raw"))
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a word, got {shown(name)}.")
        self.name = name
        self._key = self._generate_state_key(name=name)  # kept, because Lightning asks for it at every hook
        self._shadow: Shadow | None = None
        self._restored: dict[str, Tensor] | None = None  # from a file, until the module is on its device
        self._seam: CheckpointSeam | None = None
        self._fitting = False
        self._stage = Stage()

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the counters; one per name."""
        return self._key

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).copy()
        if self._shadow is not None and not self._fitting:
            state["_stage"] = self._stage.for_copy(self._shadow)
        return state

    # -- hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; a second fit of the same module goes on from its raw weights."""
        _roles(trainer)
        if stage != "fit":
            return
        self._refuse_strategy(trainer)
        if self._shadow is not None and not self._serves(pl_module):
            self._forget()
        self._stage.kept, self._fitting = False, True
        self._settle()
        disown(pl_module)  # an EMA of an earlier fit may have left its average there: it is trained on

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sort out the file's sets: the module has been given the one in ``state_dict``."""
        if self._fitting:
            self._forget()
        try:
            contents = read_contents(checkpoint)
            if contents is not None and self._fitting:
                self._restore(trainer, pl_module, contents, checkpoint)
            elif contents is not None:
                self._choose(trainer, pl_module, contents, checkpoint)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters over, if there is an average that they belong to."""
        if self._fitting and (self._restored is not None or self._shadow is not None or state_dict["origin"] < 0):
            self._pace.load_state_dict(state_dict)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place what a file gave, now that the module is on its device; watch the run's files."""
        if self._restored is not None:
            self._build(pl_module)
        super().on_fit_start(trainer, pl_module)
        if _roles(trainer).writer is self:
            self._seam = CheckpointSeam(trainer.strategy, self._fill_state_dict, self._stamp)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on, to count and to average."""
        if self._shadow is not None:
            self._shadow.rebind()
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the raw weights back if an evaluation ended without saying so."""
        self._stage.evaluating = None
        self._settle()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

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
        if self._shadow is None or self._shadow.module is not pl_module:
            return
        found, keep = record(checkpoint), trainer.is_global_zero
        if _roles(trainer).writer is self:
            if self._seam is None or not self._seam.active:  # after fit
                self._fill_state_dict(checkpoint["state_dict"])
            self._stamp(checkpoint)
            found["raw"] = self._collect("raw", keep=keep) if self._owns_files else None
        if not self._owns_files or (self._shadow.sharded and self._shadow.rounds):
            found["averages"][self.name] = self._collect("average", keep=keep)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module with what ``after_fit`` says."""
        self._all_catch_up()
        self._stage.evaluating, self._stage.kept = None, _roles(trainer).keeper is self
        self._settle()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the raw weights back, wherever it happened."""
        self._last_catch_up()
        self._stage.kept = self._stage.kept and not self._fitting
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizer and the strategy, and follow the module to where it was moved."""
        self._leave()
        if self._seam is not None:
            self._seam.remove()
            self._seam = None
        if self._shadow is not None and self._shadow.module is pl_module:
            self._shadow.rebind()

    # -- for users

    def average_state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights as a state dict of the module, in copies.

        Averages are in float32 also where the weights are not; buffers that are not averaged and frozen weights are
        the module's. A collective under FSDP2, where every rank gets the full tensors.

        Raises:
            RuntimeError: If nothing was averaged yet, or the module held the average and has been written to since.
        """
        return self._whole_state("average")

    def raw_state_dict(self) -> dict[str, Tensor]:
        """Return the trained weights likewise, whatever the module holds."""
        return self._whole_state("raw")

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[LightningModule]:
        """Put the average into the module for the length of a ``with`` block; blocks may be nested.

        Before the first update the module is left as it is.

        Raises:
            ValueError: If it is not the module that was averaged.
        """
        if self._shadow is not None and self._shadow.module is not pl_module:
            raise ValueError(f"`pl_module` must be the module that EMA {self.name!r} averaged, got another one.")
        self._all_catch_up()
        serves = self._serves(pl_module)
        self._stage.blocks += serves
        try:
            self._settle()
            yield pl_module
        finally:
            self._stage.blocks = max(self._stage.blocks - serves, 0)
            self._settle()

    # -- following the weights

    def _begin(self, pl_module: LightningModule) -> None:
        self._build(pl_module)

    def _update(self, trainer: Trainer, n: int, steps: int) -> None:
        rule = self.decay
        if rule.needs_samples_per_step:
            samples = samples_per_step(trainer)
            if samples is None:
                raise MisconfigurationException(
                    "`HalfLife(samples=...)` must find the batch size of the training loader, which has none: "
                    "give the half-life as HalfLife(steps=...)."
                )
            rule = rule.for_samples_per_step(samples)
        if self._shadow is not None:
            self._shadow.update(rule(n, steps))

    def _adopt(self) -> None:
        if self._shadow is not None:
            self._shadow.adopt()

    def _build(self, pl_module: LightningModule) -> None:
        self._shadow = Shadow(pl_module, buffers=self.average_buffers, device=self.device, start=self._restored)
        self._restored = None

    def _forget(self) -> None:
        """Start anew."""
        self._shadow, self._restored, self._stage = None, None, Stage()
        self._pace.reset()

    # -- what the module holds

    @property
    def _active(self) -> bool:
        return self._shadow is not None and self._pace.last > 0

    def _settle(self) -> None:
        changed = self._stage.settle(self._shadow, ready=self._active)
        if changed and self._shadow is not None and not self._fitting:
            self._stage.remember(self._shadow)

    def _serves(self, pl_module: nn.Module) -> bool:
        """Return whether ``pl_module`` is the averaged module and nobody has changed its weights since."""
        shadow = self._shadow
        if shadow is None or shadow.module is not pl_module:
            return False
        if self._fitting or self._stage.untouched(shadow):
            return True
        rank_zero_info(f"{self.state_key}: the weights were changed since they were averaged; the average is not used.")
        return False

    def _start_evaluation(self, pl_module: LightningModule) -> None:
        self._all_catch_up()
        if self._shadow is not None and self._serves(pl_module):
            if not self._fitting:
                self._shadow.rebind()
            self._stage.evaluating = self.evaluate
            self._settle()

    def _end_evaluation(self) -> None:
        if self._stage.evaluating is not None:
            self._stage.evaluating = None
            self._settle()

    def _leave(self) -> None:
        """End whatever was under way: no block, no loop, no fit."""
        self._release_clock()
        self._stage.clear()
        self._settle()
        if self._fitting and self._shadow is not None:
            self._stage.remember(self._shadow)
        self._fitting = False

    # -- files

    @property
    def _owns_files(self) -> bool:
        """Whether the ``state_dict`` of a file is this average now."""
        return self._active and self.checkpoint == "average"

    def _fill_state_dict(self, state: dict[str, Any]) -> None:
        """Make a state dict of the module what files should have, whatever the module holds at the moment."""
        self._all_catch_up()
        keep = bool(state)  # under FSDP2 only the first rank gets one
        if self._shadow is not None:
            fill(state, self._collect("average" if self._owns_files else "raw", keep=keep))
        elif self._trainer is not None and (other := showing(self._trainer.lightning_module)) is not None:
            fill(state, other.collect("raw", keep=keep))

    def _stamp(self, checkpoint: dict[str, Any]) -> None:
        """Say in a file what its state dict is."""
        if self._shadow is not None and "state_dict" in checkpoint:
            owns = self._owns_files
            record(checkpoint).update(state_dict="average" if owns else "raw", name=self.name if owns else None)

    def _collect(self, which: Which, *, keep: bool = True, copies: bool = False) -> dict[str, Tensor]:
        """Return the averaged tensors' values, the raw ones also while another average is in the module."""
        shadow = self._shadow
        if shadow is None:
            return {}
        tensors = shadow.collect(which, keep=keep, copies=copies)
        other = showing(shadow.module)
        if which == "raw" and other is not None and other is not shadow:
            shown = other.collect(which, keep=keep, copies=copies)
            tensors.update({name: shown[name] for name in tensors if name in shown})
        return tensors

    def _restore(
        self, trainer: Trainer, pl_module: LightningModule, contents: Contents, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the file's average for the shadow and give the module its raw weights."""
        state_dict, strict = checkpoint.get("state_dict"), pl_module.strict_loading
        self._restored = fitting_average(pl_module, contents, self.name, state_dict, strict=strict)
        self._pace.load_state_dict(lightning_steps(contents, checkpoint) or self._pace.state_dict())
        found = self._restored is not None or contents.owns_state_dict(self.name)
        if found and trainer.strategy.restore_checkpoint_after_setup:  # and the module may hold the only average
            self._build(pl_module)
        emas = _averages(trainer)
        loader = next((ema for ema in emas if contents.owns_state_dict(ema.name)), emas[0])
        if loader is self and contents.raw is not None:
            load_named(pl_module, contents.raw)

    def _choose(
        self, trainer: Trainer, pl_module: LightningModule, contents: Contents, checkpoint: dict[str, Any]
    ) -> None:
        """Give a module that is only evaluated the set that it is to be evaluated with."""
        evaluator = _roles(trainer).evaluator
        if evaluator is self and not contents.owns_state_dict(self.name):
            average = fitting_average(pl_module, contents, self.name, None, strict=pl_module.strict_loading)
            load_named(pl_module, average or {})
        elif evaluator is None and _averages(trainer)[0] is self:
            load_named(pl_module, contents.raw or {})

    def _whole_state(self, which: Which) -> dict[str, Tensor]:
        shadow = self._shadow
        if shadow is None:
            raise RuntimeError(f"EMA {self.name!r} has no weights to give: it begins with a fit, after `start_step`.")
        self._all_catch_up()
        if which == "average" and shadow.swapped and not self._serves(shadow.module):
            raise RuntimeError(
                f"The average of EMA {self.name!r} was in the module when something else was written into the module."
            )
        if shadow.sharded:
            reshard(shadow.module)
        collected = self._collect(which, copies=True)
        state = shadow.module.state_dict()
        return {
            key: collected[clean_name(key)]
            if clean_name(key) in collected
            else gather(local(value), value).detach().clone()
            for key, value in state.items()
        }


def _averages(trainer: Trainer) -> list[EMA]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]


def _roles(trainer: Trainer) -> Roles[EMA]:
    try:
        return assign_roles(_averages(trainer))
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
