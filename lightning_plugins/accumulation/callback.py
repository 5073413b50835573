"""The callback that accumulates gradients exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_plugins.accumulation.carried_windows import CarriedWindows
from lightning_plugins.accumulation.weighting import Window, first_gradient, scale, scale_gradients, weigh_backward
from lightning_plugins.accumulation.windows import batches_for, describe, plan_changes
from lightning_plugins.accumulation.zero_windows import ZeroWindows
from lightning_plugins.core.automatic_optimization import check_automatic, overrides
from lightning_plugins.core.callback import Callback, Stage
from lightning_plugins.core.counting import Count, CountCheck, CountedBy, as_count, counter, wide
from lightning_plugins.core.distributed_sets import put_beside, refuse_cut_off
from lightning_plugins.core.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    sum_over_ranks,
    torch_optimizers,
)
from lightning_plugins.core.loaders import data_ranks, loader_batch_size
from lightning_plugins.core.run_length import AccumulationPlan
from lightning_plugins.core.strategies import check_strategy, learn_shards
from lightning_plugins.core.validation import real_number, true_or_false


class GradientAccumulation(Callback):
    """Accumulates gradients so that each step has the gradient of the mean over its whole window, on all ranks.

    Lightning divides every loss by the number of batches and averages ranks, which is right only if all batches of
    all ranks hold equally many items and the window is full. Here every item counts the same: with batches of unequal
    size, a short window at an epoch's end, unequal token counts, fully masked batches, and ranks that differ. The
    optimizer, gradient clipping and every ``on_before_optimizer_step`` see that gradient, also where the module's
    ``optimizer_step`` steps in a way of its own.
    The formula is in :mod:`lightning_plugins.accumulation.weighting`. Equal, full windows are bit-identical to
    ``Trainer(accumulate_grad_batches=...)``.

    The loss that ``training_step`` returns must be a mean over what ``count`` counts. Logged losses and
    ``outputs["loss"]`` stay what Lightning makes of them (the latter divided by the number of batches).

    When:
        Each batch's loss is weighted in ``on_before_backward``; the gradient is complete when the closure of the
        window's last batch returns, before any callback's ``on_before_optimizer_step``, clipping and the optimizer.

    Checkpoint:
        The number that weights are relative to; with ``carry=True`` also the place, the count and the gradients of an
        open window.

    Distributed:
        A window's counts are added over all ranks, so that every sample of the step has the same weight on all. DDP,
        FSDP1, FSDP2 with and without tensor parallelism and DeepSpeed's ZeRO 1, 2 and 3, which has no ``carry``. One
        reduction of one number a step. Under DeepSpeed its windows become Lightning's, the short one at an epoch's end
        included, and this rank's part of the gradients is scaled; not with ``offload_optimizer``.

    Cost:
        A count of each batch and one scaling of the gradients a step, without a wait for the device. Memory: two
        numbers.

    Does not compose with:
        Manual optimization, LBFGS, ``Trainer(accumulate_grad_batches=...)`` or another callback that sets it. Losses
        over pairs of samples and batch normalization see one batch at a time.

    Args:
        batches: Batches of one optimizer step. Exactly one of the first three arguments is given.
        effective_batch_size: Samples of one optimizer step: a multiple of the loader's batch size times the ranks.
        schedule: ``{step: batches}``: from that optimizer step on so many batches. It begins at step 0. Lightning
            aligns windows to the batch index, so a change may leave one shorter window at the joint.
        count: What the loss is a mean over: ``"samples"`` (the rows of the batch's tensors), ``Tokens("labels")``, or
            a function of the batch that returns a number or, to spare a wait for the device, a tensor on it.
        carry: Take a window that an epoch's end leaves incomplete into the next epoch instead of stepping on it. The
            run's last window may still be short. Checkpoints cut in such a window contain its gradients.

    Raises:
        TypeError: If an argument has the wrong type, or not exactly one of the three is given.
        ValueError: If a number is below 1, ``schedule`` lacks step 0 or ``count`` is another string; during the run if
            ``count`` returns a negative number, only zeros, or cannot read the batch.
        MisconfigurationException: At setup: manual optimization, ``Trainer(accumulate_grad_batches=...)`` or another
            callback that sets it, LBFGS, an untested strategy, or an effective batch size that no window has; during
            the run if the module's ``optimizer_zero_grad`` does not zero.

    Example:
        >>> GradientAccumulation(effective_batch_size=256).effective_batch_size
        256
    """

    stage = Stage.ACCUMULATION

    def __init__(
        self,
        batches: int | None = None,
        *,
        effective_batch_size: int | None = None,
        schedule: Mapping[int, int] | None = None,
        count: CountedBy = "samples",
        carry: bool = False,
    ) -> None:
        self._changes = plan_changes(batches, effective_batch_size, schedule)
        # checked here; the function itself need not be picklable and is made in the fit
        counter(count)
        self.batches = batches
        self.effective_batch_size = effective_batch_size
        self.schedule = dict(schedule) if schedule is not None else None
        self.count = count
        self.carry = true_or_false("carry", carry)
        super().__init__(
            batches=batches, effective_batch_size=effective_batch_size, schedule=self.schedule, carry=carry
        )
        self._window = Window()
        self._check = CountCheck()
        self._carried = CarriedWindows() if carry else None
        # DeepSpeed's, while a run is under it
        self._zero: ZeroWindows | None = None
        self._counter: Callable[[Any], Count] = as_count
        self._count: Count = 0
        self._counted = False
        self._weight: Count = 1
        # what the gradients of a complete window were multiplied by
        self._factor: Count | None = None
        # whether the module zeroes gradients in a way of its own, and what one of them was before it did
        self._zeroes_itself = False
        self._before_zeroing: tuple[int, int] | None = None
        self._plan: AccumulationPlan | None = None
        self._scheduled = False
        self._holds = False

    def accumulation_plan(self, trainer: Trainer) -> AccumulationPlan:
        """Return the run's windows; from ``on_fit_start`` on, since an effective batch size needs the loader.

        Raises:
            MisconfigurationException: If the effective batch size is not a multiple of the loader's.
        """
        if self._plan is None:
            changes = self._changes or ((0, self._batches_of_loader(trainer)),)
            self._plan = AccumulationPlan(changes, unit="step", carry=self.carry)
        return self._plan

    # hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        super().setup(trainer, pl_module, stage)
        if self.carry:
            refuse_cut_off(self.patches, trainer.strategy)
        if stage != "fit":
            return
        check_automatic(pl_module, "GradientAccumulation")
        check_strategy(trainer, "GradientAccumulation")
        if self.carry:
            check_strategy(trainer, "GradientAccumulation(carry=True)")
        self._refuse_another_master(trainer)
        self._plan, self._window, self._check = None, Window(), CountCheck()
        self._holds = True
        # so that `trainer.estimated_stepping_batches`, which loads the data, is right in `configure_optimizers`
        if self._changes is not None:
            trainer.accumulate_grad_batches = self._changes[0][1]
        else:
            self.patches.wrap(trainer.fit_loop, "setup_data", lambda original: self._load_data(trainer, original))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the windows, the loader is known now."""
        if any(isinstance(optimizer, LBFGS) for optimizer in torch_optimizers(trainer)):
            raise MisconfigurationException(
                "GradientAccumulation does not work with LBFGS, which runs the last batch of a window several times "
                "in one step. Take another optimizer, or accumulate in `training_step`."
            )
        trainer.accumulate_grad_batches = self.accumulation_plan(trainer).changes[0][1]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once what a step is made of, and go on with a carried window."""
        self._counter = counter(self.count, module=pl_module, full=loader_batch_size(trainer))
        self._scheduled = len(self.accumulation_plan(trainer).changes) > 1
        rank_zero_info(f"GradientAccumulation: {self._describe(trainer)}.")
        trainer.accumulate_grad_batches = self._batches_now(trainer)
        self._window.total, self._window.batches = 0, None
        self._zeroes_itself = overrides(pl_module, "optimizer_zero_grad")
        automatic = trainer.fit_loop.epoch_loop.automatic_optimization
        self.patches.wrap(automatic, "_optimizer_step", partial(self._optimizer_step, trainer))
        try:
            self._zero = ZeroWindows.take_over(trainer, self.patches)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        if self._carried is not None:
            learn_shards(trainer, pl_module)
            self._carried.take_over(trainer, self.patches)
            self._window.total = self._carried.resume(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose the length of a window that begins, and count the batch; all ranks are at the same point here."""
        if not self._holds:  # put into the Trainer in mid-run
            return
        if self._carried is not None:
            if self._carried.next_batch(trainer):
                trainer.accumulate_grad_batches = self._batches_now(trainer)
        elif self._scheduled and batch_idx % trainer.accumulate_grad_batches == 0:
            self._begin_scheduled(trainer, pl_module, batch_idx)
        if self._zero is not None:
            self._zero.next_batch(trainer)
        self._count, self._counted, self._factor = self._counter(batch), False, None
        if self._window.reference is None:
            self._window.reference = _reference(trainer, self._count)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin the window anew: what was counted before is not in the gradients any more."""
        self._window.total, self._window.batches = 0, None
        self._counted, self._factor = False, None
        if self._zeroes_itself:
            self._before_zeroing = first_gradient(_parameters(trainer))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weigh the backward by the batch's count; a batch that runs in pieces has several."""
        if not self._holds:
            return
        if self._before_zeroing is not None:
            self._check_zeroed(trainer, pl_module)
        # counted here, since a `training_step` that returned None must not count
        if not self._counted:
            self._counted = True
            self._weight = self._window.add(self._count, trainer.accumulate_grad_batches)
            if isinstance(self._count, Tensor):
                self._check.add_batch(self._count)
        weight = self._weight
        if self._factor is not None:
            # the window is complete: an optimizer that runs the closure again adds to a gradient that is multiplied
            weight = weight * self._factor
        if isinstance(weight, Tensor) or weight != 1:
            weigh_backward(loss, weight)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the counts that were left on the device."""
        self._check.verify()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the run was stopped in a carried window, whose gradients no step will use."""
        if self._carried is not None and self._carried.is_open(trainer):
            rank_zero_info(
                f"GradientAccumulation: the run ended {self._carried.done(trainer)} batches into a window, without a "
                f"step."
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save a carried window that is open; every rank takes part."""
        if self._carried is None:
            return
        # with or without a window: the gradients of an earlier one must go from a directory
        put_beside(trainer.strategy, checkpoint, {})
        if self._carried.is_open(trainer):
            shared = trainer.world_size / data_ranks(trainer)
            total = float(_sum(trainer, self._window.total)) / shared
            state = self._carried.state(trainer, pl_module, total, checkpoint)
            checkpoint["callbacks"][self.state_key]["carried"] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the gradients of an open window that lie beside a distributed checkpoint; every rank takes part."""
        if self._carried is not None and self._holds:
            self._carried.read_beside(trainer, pl_module, checkpoint)

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the Trainer as it was."""
        self._counter, self._zero = as_count, None
        if self._holds:
            trainer.accumulate_grad_batches = 1
            self._holds = False

    def get_state(self) -> dict[str, Any]:
        """Return the count that weighs 1; an open carried window is added by ``on_save_checkpoint``."""
        return {"reference": self._window.reference}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If one is out of range.
        """
        reference = state.get("reference")
        if reference is not None:
            reference = float(real_number("state['reference']", reference, above=0))
        if self._carried is not None:
            self._carried.load(state.get("carried"))
        self._window.reference = reference

    # what the hooks are made of

    def _optimizer_step(self, trainer: Trainer, original: Any, batch_idx: int, closure: Callable[..., Any]) -> None:
        """Complete the gradient in the closure: a module's ``optimizer_step`` may leave out the hook before a step."""
        original(batch_idx, partial(self._run_last_batch, trainer, closure))

    def _run_last_batch(self, trainer: Trainer, closure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the closure, and turn the window's gradient into that of the mean over all its items."""
        result = closure(*args, **kwargs)
        zero = self._zero
        # Lightning asks DeepSpeed for a step after every batch
        if self._factor is not None or (zero is not None and not zero.ends):
            return result
        # ranks that share a batch count it each, and are counted each
        total, ranks = self._window.total, trainer.world_size
        if ranks > 1:
            total = _sum(trainer, total)
        factor = self._factor = self._window.factor(total, divisor=ranks * (1 if zero is None else zero.divisor))
        # equal, full windows pay nothing
        if isinstance(factor, Tensor) or factor != 1:
            if zero is not None:
                scale(zero.gradients(), factor)
            else:
                scale_gradients(_parameters(trainer), factor)
        if not self._check.counted:
            self._check.add_window(total)
        if self._carried is not None:
            self._carried.stepped = True
        return result

    def _check_zeroed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before, self._before_zeroing = self._before_zeroing, None
        if before is not None and first_gradient(_parameters(trainer)) == before:
            raise MisconfigurationException(
                f"`optimizer_zero_grad` of {type(pl_module).__name__} has left the gradients of an earlier window, of "
                f"which GradientAccumulation decides. Let it zero them, or accumulate without GradientAccumulation."
            )

    def _load_data(self, trainer: Trainer, original: Callable[[], None]) -> None:
        """Load the training data, and set the window again if another loader has another batch size."""
        original()
        batches, before = self._batches_of_loader(trainer), self._plan
        if before is None or before.changes[0][1] != batches:
            self._plan = AccumulationPlan(((0, batches),), unit="step", carry=self.carry)
            trainer.accumulate_grad_batches = batches
        if before is not None and before is not self._plan:
            rank_zero_info(f"GradientAccumulation: the loader has changed; {self._describe(trainer)}.")

    def _begin_scheduled(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Begin a window where the last one has ended: the number of batches may change here."""
        # the epoch in which stochastic weight averaging refreshes statistics
        if trainer.fit_loop._skip_backward:
            return
        batches = trainer.accumulate_grad_batches = self._batches_now(trainer)
        # Lightning zeroes gradients at multiples only; this window begins at a joint
        if batch_idx % batches:
            self.on_before_zero_grad(trainer, pl_module, trainer.optimizers[0])
            pl_module.optimizer_zero_grad(trainer.current_epoch, batch_idx, trainer.optimizers[0])

    def _batches_now(self, trainer: Trainer) -> int:
        plan = self.accumulation_plan(trainer)
        return plan.changes[0][1] if len(plan.changes) == 1 else plan.batches(epoch=0, step=trainer.global_step)

    def _batches_of_loader(self, trainer: Trainer) -> int:
        batch_size = loader_batch_size(trainer)
        if batch_size is None:
            raise MisconfigurationException(
                f"`effective_batch_size` needs a training loader with a `batch_size`, and "
                f"{type(trainer.train_dataloader).__name__} has none. Give `batches` instead."
            )
        wanted = self.effective_batch_size or 0
        try:
            return batches_for(wanted, batch_size=batch_size, ranks=data_ranks(trainer))
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None

    def _refuse_another_master(self, trainer: Trainer) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"GradientAccumulation sets the accumulation, and so does Trainer(accumulate_grad_batches="
                f"{trainer.accumulate_grad_batches}). Remove it from the Trainer."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by the callback connector
            if callback is not self and (
                hasattr(callback, "accumulation_plan") or hasattr(callback, "get_accumulate_grad_batches")
            ):
                raise MisconfigurationException(
                    f"GradientAccumulation sets the accumulation, and so does {type(callback).__name__}. Keep one."
                )

    def _describe(self, trainer: Trainer) -> str:
        changes = self.accumulation_plan(trainer).changes
        return describe(changes, batch_size=loader_batch_size(trainer), ranks=data_ranks(trainer))


def _parameters(trainer: Trainer) -> Iterator[Any]:
    return (parameter for group in torch_optimizers(trainer)[0].param_groups for parameter in group["params"])


def _sum(trainer: Trainer, count: Count) -> Count:
    """Return ``count`` summed over the ranks: one scalar collective, and no wait for a device."""
    add_up = sum_over_ranks(trainer)
    if add_up is None:
        return count
    total = add_up(wide(count, trainer.strategy.root_device))
    return total if total.device.type != "cpu" else total.item()


def _reference(trainer: Trainer, count: Count) -> float:
    """Return rank 0's ``count`` on every rank, 1 if it is 0; once in a run, so it may wait."""
    value = as_count(count.item() if isinstance(count, Tensor) else count)
    return float(trainer.strategy.broadcast(value)) or 1.0
