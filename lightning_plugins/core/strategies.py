"""The table of techniques and strategies, and what a user of a combination outside of it is told.

The page docs/strategies.md is made from this table, and the callbacks ask it at setup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_plugins.core import flat_shards
from lightning_plugins.core.lightning import LightningModule, MisconfigurationException, Trainer

ONE, DDP, FSDP1, FSDP2 = "SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy"
# a strategy of Lightning's in a way of its own: several processes share a batch
TENSOR = "ModelParallelStrategy(tensor_parallel_size>1)"
DEEPSPEED, XLA = "DeepSpeedStrategy", "XLAStrategy"

# a note for the page
_ZERO = "ZeRO 1, 2, 3"

STRATEGIES = {
    ONE: "one device",
    DDP: "DDP",
    FSDP1: "FSDP1",
    FSDP2: "FSDP2",
    TENSOR: "FSDP2 x tensor parallel",
    DEEPSPEED: "DeepSpeed",
    XLA: "XLA",
}
"""Lightning's name of a strategy -> its name on the page. A subclass is treated as the nearest of these above it."""


@dataclass(frozen=True)
class Support:
    """What was tested of a technique.

    Args:
        tested: Names of :data:`STRATEGIES`, each with a note for the page, empty where there is nothing to say.
        instead: Another strategy -> what comes nearest, where that is not another strategy.
        refuses: Whether the technique refuses every strategy that is not in ``tested``; if not, it runs there untested.
        steers_windows: Whether it steers the batches of a step, which a strategy must not do by itself then.
    """

    tested: Mapping[str, str]
    instead: Mapping[str, str] = field(default_factory=dict)
    refuses: bool = True
    steers_windows: bool = False


SUPPORTED: dict[str, Support] = {
    "LearningRateScheduler": Support(
        {ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: "", DEEPSPEED: _ZERO}, refuses=False
    ),
    "EMA": Support({ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: "", DEEPSPEED: _ZERO}),
    "LatestWeightAveraging": Support({ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: "", DEEPSPEED: _ZERO}),
    "PostHocEMA": Support({ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: "", DEEPSPEED: _ZERO}),
    "CheckpointAveraging": Support({ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: ""}),
    "GradientAccumulation": Support(
        {ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: "", DEEPSPEED: _ZERO}, steers_windows=True
    ),
    # no DeepSpeed checkpoint has the gradients of an open window
    "GradientAccumulation(carry=True)": Support(
        {ONE: "", DDP: "", FSDP1: "not with torch 2.6", FSDP2: "", TENSOR: ""},
        {DEEPSPEED: "GradientAccumulation without carry"},
        steers_windows=True,
    ),
    "MicroBatching(size)": Support({ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: ""}, steers_windows=True),
    # a rank that runs out of memory in a forward leaves the others waiting in that forward's collectives
    'MicroBatching("auto")': Support(
        {ONE: "", DDP: ""}, dict.fromkeys((FSDP1, FSDP2, TENSOR), "MicroBatching(size)"), steers_windows=True
    ),
    "StatisticsRecorder": Support(
        {ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: "", DEEPSPEED: _ZERO}, refuses=False
    ),
    "CSVStatisticsLogger": Support(
        {ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: "", DEEPSPEED: _ZERO}, refuses=False
    ),
    "TensorBoardStatisticsLogger": Support(
        {ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: "", DEEPSPEED: _ZERO}, refuses=False
    ),
    "ClassificationReport": Support({ONE: "", DDP: "", FSDP2: "", DEEPSPEED: _ZERO}, refuses=False),
    "EventCallback": Support({ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: "", DEEPSPEED: _ZERO}, refuses=False),
    "Cancelling": Support({ONE: "", DDP: "", FSDP1: "", FSDP2: "", TENSOR: ""}, steers_windows=True),
}
"""Technique, or a mode of it, -> what was tested."""

# What comes nearest to a strategy that is not supported: first those that shard as it does.
_NEAREST = {
    DEEPSPEED: (FSDP2, FSDP1, DDP),
    FSDP1: (FSDP2, DDP),
    FSDP2: (FSDP1, DDP),
    TENSOR: (FSDP2, FSDP1, DDP),
}


def check_strategy(trainer: Trainer, technique: str, pl_module: LightningModule | None = None) -> None:
    """Refuse a strategy that a technique does not support.

    Args:
        trainer: The Trainer, at setup.
        technique: A key of :data:`SUPPORTED`.
        pl_module: The module, if the technique must see its parameters one by one.

    Raises:
        MisconfigurationException: If the strategy is not in the table, or accumulates gradients by itself where the
            technique steers them. The message names the strategy, the technique and the nearest thing that works. Also
            if it is DeepSpeed's without ZeRO.
    """
    strategy: Any = trainer.strategy
    kind = type(strategy).__name__
    told = refusal(technique, known_as(strategy), kind, accumulates=strategy.handles_gradient_accumulation)
    if told:
        raise MisconfigurationException(told)
    if pl_module is not None:
        learn_shards(trainer, pl_module)
    if known_as(strategy) == DEEPSPEED and SUPPORTED[technique].refuses:
        stage = (getattr(strategy, "config", None) or {}).get("zero_optimization", {}).get("stage", 0)
        if stage not in (1, 2, 3):
            raise MisconfigurationException(
                f"{technique} under {kind} needs ZeRO of stage 1, 2 or 3, got {stage}. Pass `stage`, or take {DDP}."
            )


def refusal(technique: str, strategy: str, name: str = "", *, accumulates: bool = False) -> str:
    """Return what a user of a technique under a strategy is told, an empty text where it is not refused.

    Args:
        technique: A key of :data:`SUPPORTED`.
        strategy: A key of :data:`STRATEGIES`, or an empty text for a strategy of no such kind.
        name: The strategy's class.
        accumulates: Whether it accumulates gradients by itself; DeepSpeed always does.

    Example:
        >>> refusal("EMA", "DDPStrategy"), "ModelParallelStrategy" in refusal("EMA", "XLAStrategy")
        ('', True)
    """
    support = SUPPORTED[technique]
    clashes = support.steers_windows and (accumulates or strategy == DEEPSPEED)
    # a technique that supports DeepSpeed lives with its windows
    if not support.refuses or (strategy in support.tested and (strategy == DEEPSPEED or not clashes)):
        return ""
    name = name if name and strategy != TENSOR else strategy
    reason = f"does not work under {name}, which accumulates gradients by itself"
    problem = reason if clashes else f"was not tested under {name}"
    works = ", ".join(sorted(support.tested))
    return f"{technique} {problem}; it works under {works}. The nearest to {name} is {nearest(technique, strategy)}."


def nearest(technique: str, strategy: str) -> str:
    """Return what comes nearest to a technique under a strategy that it refuses: another strategy, or another mode."""
    support = SUPPORTED[technique]
    other = next(like for like in (*_NEAREST.get(strategy, ()), DDP) if like in support.tested)
    return support.instead.get(strategy, other)


def known_as(strategy: Any) -> str:
    """Return the key of :data:`STRATEGIES` that a strategy is treated as, an empty text for none.

    DeepSpeed's and XLA's are subclasses of DDP's that keep parameters or gradients in another place, so the nearest of
    the class and its bases decides.
    """
    kind = next((base.__name__ for base in type(strategy).__mro__ if base.__name__ in STRATEGIES), "")
    mesh = getattr(strategy, "_device_mesh", None)
    return TENSOR if kind == FSDP2 and mesh is not None and mesh["tensor_parallel"].size() > 1 else kind


def forwards_are_collective(strategy: Any) -> bool:
    """Return whether every forward and backward of a rank waits for the other ranks."""
    return known_as(strategy) in (FSDP1, FSDP2, TENSOR)


def learn_shards(trainer: Trainer, pl_module: LightningModule) -> None:
    """Learn what FSDP1 has made of a module, or will; nothing happens under other strategies.

    Raises:
        MisconfigurationException: If it shows no parameters of the module's own.
    """
    try:
        flat_shards.check_shown(trainer.strategy)
        flat_shards.look_up(trainer.strategy.model, pl_module)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
