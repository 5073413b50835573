"""What every callback does that keeps one average of the weights and evaluates, saves and ends with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_plugins.core.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_plugins.core.module_state import clean_name, device_name, named_tensors, state_of, uncompiled
from lightning_plugins.core.sharding import gather, local, reshard
from lightning_plugins.core.validation import LightningPluginsWarning, one_of, shown
from lightning_plugins.core.zero import is_deepspeed, zero_of
from lightning_plugins.ema.checkpoint_hooks import AverageInCheckpoints, roles_of
from lightning_plugins.ema.decay import DecayRule, UpdateCounter
from lightning_plugins.ema.master_shadow import MasterShadow
from lightning_plugins.ema.shadow import Shadow, Which, disown
from lightning_plugins.ema.swapping import Swapper


class WeightAverage(AverageInCheckpoints):
    """Base of a callback with one average, which it puts into the module for evaluations and at the end.

    Args:
        rule: The average's decay.
        counter: When it begins and when it is updated.
        device: Where the average lies; ``None`` for beside the weights.
        buffers: ``"average"`` averages floating-point buffers, too; ``"copy"`` leaves all to the module.
        evaluate: The weights that evaluations use.
        checkpoint: What a file's ``state_dict`` is.
        after_fit: What the module holds when fit has ended.
        name: Tells it from others.
    """

    def __init__(
        self,
        rule: DecayRule,
        counter: UpdateCounter,
        *,
        device: str | None,
        buffers: str,
        evaluate: str,
        checkpoint: str,
        after_fit: str,
        name: str,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a word, got {shown(name)}.")
        super().__init__(rule, counter, name)
        self.device = device_name(device)
        self.average_buffers = one_of("buffers", buffers, ("copy", "average")) == "average"
        self.evaluate = one_of("evaluate", evaluate, ("average", "raw"))
        self.checkpoint = one_of("checkpoint", checkpoint, ("average", "raw"))
        self.after_fit = one_of("after_fit", after_fit, ("average", "raw"))
        self._swapper = Swapper()
        self._buffers_at_end: dict[str, Tensor] = {}
        self._keys_at_end: list[str] = []

    @property
    def _called(self) -> str:
        """What it is called in messages."""
        return f"{self.technique} {self.name!r}"

    # -- hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; a second fit of the same module goes on from its raw weights."""
        super().setup(trainer, pl_module, stage)
        roles_of(trainer)
        if stage != "fit":
            return
        if self._swapper.blocks:
            raise MisconfigurationException(
                f"A fit must not begin inside a `with` block of `averaged` of {self._called}: it would train the "
                "average."
            )
        if self.average_buffers and is_deepspeed(trainer.strategy):
            raise MisconfigurationException(
                "`buffers` must be 'copy' under DeepSpeed, which keeps no float32 masters of buffers, got 'average'."
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
        for shadow in self._shadows:
            if isinstance(shadow, MasterShadow):
                # other ranks may not come here
                shadow.alone = True
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
            raise ValueError(f"`pl_module` must be the module that {self._called} averaged, got another one.")
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
        zero, start, self._restored = zero_of(pl_module.trainer), self._restored, None
        if zero is None:
            self._shadows = [Shadow(pl_module, buffers=self.average_buffers, device=self.device, start=start)]
        else:
            self._shadows = [MasterShadow(zero, pl_module, device=self.device, start=start)]

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
                "do, needs `evaluate='raw'`.",
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
            self._keys_at_end = list(state_of(shadow.module))
            self._buffers_at_end = {
                name: found.tensor.detach().clone()
                for found in named_tensors(shadow.module)
                if found.is_buffer
                for name in found.names
            }

    def _whole_state(self, which: Which) -> dict[str, Tensor]:
        if not self._shadows:
            raise RuntimeError(f"{self._called} has no weights to give: it begins with a fit, after `start_step`.")
        self._catch_up_all()
        shadow = self._shadows[0]
        served = self._serves(shadow.module)
        if which == "raw" and not served and not shadow.swapped:
            raise RuntimeError(
                f"The raw weights of {self._called} were in the module when something else was written into it."
            )
        if isinstance(shadow, MasterShadow):
            return shadow.whole_state(which)
        if shadow.sharded:
            reshard(shadow.module)
        found = shadow.collect(which, copies=True)
        self._report()
        state = state_of(shadow.module)
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
