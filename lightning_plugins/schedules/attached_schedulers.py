"""The schedulers that a callback puts beside a Trainer's optimizers, where they are saved and monitors see them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_plugins.core.lightning import (
    LRSchedulerConfig,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
    torch_optimizers,
)
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.schedules.scheduler import ScheduleLR
from lightning_plugins.schedules.scheduler_arguments import first_of, named_groups

_NEVER = sys.maxsize  # frequency at which Lightning steps our scheduler, which follows the optimizer by itself
_REWRITE_BASE_RATES = ("CyclicLR", "OneCycleLR")  # torch's; the user's own rate is lost in their groups


class AttachedSchedulers:
    """One scheduler beside each chosen optimizer, for the length of a fit.

    Args:
        schedule: A closed schedule to begin with, or one for each group.
        index: Of the optimizer to schedule; ``None``: all.
        existing: ``"refuse"`` or ``"replace"`` schedulers that the module brings.
        options: Keyword arguments of :class:`ScheduleLR`.

    Attributes:
        options: The same.
        schedulers: Those that are there now.
        optimizers: The Trainer's list as last seen: another list may hold other optimizers.
    """

    def __init__(self, schedule: Any, index: int | None, existing: str, options: dict[str, Any]) -> None:
        self._schedule, self._index, self._existing, self.options = schedule, index, existing, options
        self.schedulers: list[ScheduleLR] = []
        self._left: list[Optimizer] = []  # those whose rates another scheduler has taken over in mid-fit
        self.optimizers: list[Optimizer] = []

    def attach(self, trainer: Trainer) -> None:
        """Put a scheduler beside each chosen optimizer; it is told its schedule later.

        Raises:
            MisconfigurationException: If an optimizer is scheduled already, or there is none of that index.
        """
        self.optimizers = trainer.strategy.optimizers
        for optimizer in self._chosen(trainer):
            self._displace(trainer.strategy.lr_scheduler_configs, optimizer)
            self._put_beside(trainer, optimizer)

    def follow(self, trainer: Trainer) -> list[tuple[ScheduleLR, int]]:
        """Leave optimizers whose rates another scheduler has taken over, and go on beside those that are set up anew.

        Lightning's SWA callback puts a scheduler in our place; a finetuning callback may exchange the optimizer.

        Returns:
            The new schedulers and their positions.
        """
        self.optimizers = trainer.strategy.optimizers
        chosen, configs = self._chosen(trainer), trainer.strategy.lr_scheduler_configs
        known = [*self._left, *(scheduler.optimizer for scheduler in self.schedulers)]
        new = [optimizer for optimizer in chosen if not _holds(known, optimizer)]
        begun = []
        for scheduler in list(self.schedulers):
            stays = _holds(chosen, scheduler.optimizer)
            if stays and any(config.scheduler is scheduler for config in configs):
                continue
            scheduler.close()
            self.schedulers.remove(scheduler)
            optimizer = scheduler.optimizer if stays or not new else new.pop(0)
            taken = self._existing == "refuse" and any(
                self._conflicts(config.scheduler, optimizer) for config in configs
            )
            if stays or taken or not _holds(chosen, optimizer):
                self._left.append(optimizer)
                rank_zero_info("LearningRateScheduler leaves an optimizer to the scheduler that has replaced its own.")
                continue
            configs[:] = [config for config in configs if config.scheduler is not scheduler]
            self._displace(configs, optimizer)
            other, position = self._put_beside(trainer, optimizer), scheduler.position
            other.schedule, other.scale = scheduler.schedule, scheduler.scale
            begun.append((other, position))
            rank_zero_info(f"LearningRateScheduler follows an optimizer that was set up anew, from step {position} on.")
        return begun

    def detach(self, trainer: Trainer) -> None:
        """Take the schedulers out of the Trainer's."""
        configs = trainer.strategy.lr_scheduler_configs
        configs[:] = [config for config in configs if not any(config.scheduler is own for own in self.schedulers)]

    def release(self) -> None:
        """Take every hook off the optimizers."""
        for scheduler in self.schedulers:
            scheduler.close()
        self.schedulers, self._left, self.optimizers = [], [], []

    def _chosen(self, trainer: Trainer) -> list[Optimizer]:
        optimizers = torch_optimizers(trainer)
        if self._index is None:
            return optimizers
        if self._index >= len(optimizers):
            raise MisconfigurationException(
                f"`optimizer` must be the index of one of the module's {len(optimizers)} optimizers, got {self._index}."
            )
        return [optimizers[self._index]]

    def _put_beside(self, trainer: Trainer, optimizer: Optimizer) -> ScheduleLR:
        options, rates = self.options, self.options["base_lr"]
        if isinstance(rates, tuple) and trainer.ckpt_path is not None:  # groups that came later may be there already
            options = {**options, "base_lr": rates + (None,) * (len(optimizer.param_groups) - len(rates))}
        scheduler = ScheduleLR(optimizer, self._schedule, **options)
        scheduler.held = True
        self.schedulers.append(scheduler)
        trainer.strategy.lr_scheduler_configs.append(LRSchedulerConfig(scheduler, interval="step", frequency=_NEVER))
        return scheduler

    def _conflicts(self, scheduler: Any, optimizer: Optimizer) -> bool:
        """Return whether a scheduler sets what we set, of one group at least."""
        parameter = self.options["parameter"]
        if getattr(scheduler, "optimizer", None) is not optimizer:
            return False
        if not isinstance(scheduler, ScheduleLR):  # torch's cyclic ones drive the momentum as well
            return parameter == "lr" or (_cycles_momentum(scheduler) and parameter in ("momentum", "betas"))
        ours = named_groups(self._schedule, optimizer.param_groups)
        return scheduler.parameter == parameter and not ours.isdisjoint(scheduler.named_groups())

    def _displace(self, configs: list[Any], optimizer: Optimizer) -> None:
        """Refuse or remove schedulers of the same rates."""
        for config in [config for config in configs if self._conflicts(config.scheduler, optimizer)]:
            name = type(config.scheduler).__name__
            if isinstance(config.scheduler, ScheduleLR) and config.scheduler.held:
                raise MisconfigurationException(
                    f"`{self.options['parameter']}` of the {type(optimizer).__name__} is already scheduled by another "
                    "LearningRateScheduler. Remove one, or give each its own groups or its own `parameter`."
                )
            if self._existing == "refuse":
                raise MisconfigurationException(
                    f"the {type(optimizer).__name__} is already scheduled, by a {name}. Either return the optimizer "
                    "without a scheduler from `configure_optimizers`, or pass "
                    "`LearningRateScheduler(..., existing='replace')`, which takes that scheduler away."
                )
            if self.options["base_lr"] is None and _rewrites_base_rates(config.scheduler):
                raise MisconfigurationException(
                    f"`base_lr` must be given to replace a {name}, which has overwritten the optimizer's own rates."
                )
            configs.remove(config)
            rank_zero_info(f"LearningRateScheduler replaces the module's {name}.")
            if self.options["parameter"] == "lr" and any(_cycles_momentum(part) for part in _parts(config.scheduler)):
                group = optimizer.param_groups[0]
                momentum = first_of(group.get("momentum", group.get("betas")))
                rank_zero_warn(
                    f"The {name} that is replaced has overwritten the optimizer's own momentum, which stays at "
                    f"{momentum:g}. Pass it cycle_momentum=False, or return the optimizer alone from "
                    "`configure_optimizers`.",
                    category=LightningPluginsWarning,
                )


def _rewrites_base_rates(scheduler: Any) -> bool:
    return any(type(part).__name__ in _REWRITE_BASE_RATES for part in _parts(scheduler))


def _cycles_momentum(scheduler: Any) -> bool:
    return bool(getattr(scheduler, "cycle_momentum", False))


def _parts(scheduler: Any) -> tuple[Any, ...]:
    """Return a scheduler and those that it is made of."""
    return (scheduler, *getattr(scheduler, "_schedulers", ()))


def _holds(optimizers: Sequence[Optimizer], optimizer: Optimizer) -> bool:
    return any(found is optimizer for found in optimizers)
