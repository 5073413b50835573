"""Which strategies each technique supports, and what a user of another one is told."""

from __future__ import annotations

from typing import Any

from lightning_plugins.core.lightning import MisconfigurationException, Trainer

_ONE, _DDP, _FSDP1, _FSDP2 = "SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy"

SUPPORTED: dict[str, tuple[str, ...]] = {
    "Cancelling": (_ONE, _DDP, _FSDP2),
    "CheckpointAveraging": (_ONE, _DDP, _FSDP1, _FSDP2),
    "EMA": (_ONE, _DDP, _FSDP2),
    "GradientAccumulation": (_ONE, _DDP, _FSDP1, _FSDP2),
    # the gradients of an open window are not saved in shards
    "GradientAccumulation(carry=True)": (_ONE, _DDP),
    "MicroBatching": (_ONE, _DDP),
    "PostHocEMA": (_ONE, _DDP, _FSDP2),
}
"""What was tested: technique -> names of Lightning's strategies. Their subclasses are supported, too."""

# Subclasses of DDPStrategy that keep parameters or gradients in another place, so they are no DDP.
_NO_DDP = ("DeepSpeedStrategy", "XLAStrategy")

# These count or split the batch of a process, which must be its own.
_NEED_OWN_BATCHES = ("GradientAccumulation", "GradientAccumulation(carry=True)", "MicroBatching")
# These steer the batches of a step, which a strategy must not do by itself.
_STEER_WINDOWS = ("Cancelling", *_NEED_OWN_BATCHES)

# What comes nearest to a strategy that is not supported: first those that shard as it does.
_NEAREST = {
    "DeepSpeedStrategy": (_FSDP2, _FSDP1, _DDP),
    _FSDP1: (_FSDP2, _DDP),
    _FSDP2: (_FSDP1, _DDP),
}


def check_strategy(trainer: Trainer, technique: str) -> None:
    """Refuse a strategy that a technique does not support.

    Args:
        trainer: The Trainer, at setup.
        technique: A key of :data:`SUPPORTED`.

    Raises:
        MisconfigurationException: If the strategy is not in the table, accumulates gradients by itself, or splits one
            batch over several processes where the technique needs whole ones. The message names the strategy, the
            technique and the nearest strategy that works.
    """
    strategy: Any = trainer.strategy
    name, supported = type(strategy).__name__, SUPPORTED[technique]
    known = _known_as(type(strategy))
    accumulates = strategy.handles_gradient_accumulation and technique in _STEER_WINDOWS
    if accumulates and technique in _NEED_OWN_BATCHES:
        problem = f"does not work under {name}, which accumulates gradients by itself"
    elif accumulates or known not in supported:
        problem = f"was not tested under {name}"
    elif technique in _NEED_OWN_BATCHES and _shares_batches(strategy):
        raise MisconfigurationException(
            f"{technique} does not work with tensor parallelism, where several processes share a batch. Give "
            f"{name}(data_parallel_size={trainer.world_size}, tensor_parallel_size=1)."
        )
    else:
        return
    nearest = next(like for like in (*_NEAREST.get(known, ()), _DDP) if like in supported)
    raise MisconfigurationException(
        f"{technique} {problem}; it works under {', '.join(sorted(supported))}. The nearest to {name} is {nearest}."
    )


def _known_as(kind: type) -> str:
    """Return the name of the nearest of Lightning's strategies among a class and its bases, an empty text for none."""
    names = {_ONE, _DDP, _FSDP1, _FSDP2, *_NO_DDP}
    return next((base.__name__ for base in kind.__mro__ if base.__name__ in names), "")


def _shares_batches(strategy: Any) -> bool:
    mesh = getattr(strategy, "_device_mesh", None)
    return mesh is not None and mesh["tensor_parallel"].size() > 1
