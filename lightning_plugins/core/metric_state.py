"""What a torchmetrics metric has gathered: copied and put back, or as plain values for a checkpoint.

A metric's states are attributes of its own, neither buffers nor parameters, so that a module's ``state_dict`` has none.
Metrics are recognized by what they have, so that torchmetrics is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_BESIDE = ("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced")
"""Attributes of a metric that belong to its states: how many updates, and values that were computed from them."""


def metrics_in(module: nn.Module) -> list[Any]:
    """Return the metrics in ``module``, those inside other metrics too."""
    return [part for part in module.modules() if hasattr(part, "metric_state") and hasattr(part, "update_count")]


class MetricState:
    """A copy of what one metric has gathered; :meth:`restore` puts it back.

    Args:
        metric: A torchmetrics metric.
    """

    def __init__(self, metric: Any) -> None:
        self.values = {name: _copied(value) for name, value in metric.metric_state.items()}
        self._beside = {name: vars(metric)[name] for name in _BESIDE if name in vars(metric)}
        self.updates: int = metric.update_count

    def restore(self, metric: Any) -> None:
        """Put the copy into ``metric``; may be called again, as what is put there is a further copy."""
        for name, value in self.values.items():
            setattr(metric, name, _copied(value))
        vars(metric).update(self._beside)


def plain_state(metric: Any) -> dict[str, Any]:
    """Return a metric's states as tensors on the CPU, joined over all ranks: every rank must call it."""
    with metric.sync_context():
        states = metric.metric_state
        return {
            "updates": metric.update_count,
            "states": {
                name: [part.cpu().clone() for part in value] if isinstance(value, list) else value.cpu().clone()
                for name, value in states.items()
            },
        }


def load_plain_state(metric: Any, state: Mapping[str, Any], device: torch.device) -> None:
    """Let ``metric`` go on from a :func:`plain_state`, on ``device``."""
    for name, value in state["states"].items():
        parts = [part.to(device) for part in (value if isinstance(value, list) else [value])]
        listed = isinstance(metric.metric_state[name], list)
        setattr(metric, name, parts if listed else parts[0])
    metric._update_count = state["updates"]
    # a value that was computed before is not that of these states
    metric._computed = None


def _copied(value: Tensor | Sequence[Tensor]) -> Any:
    """Return a copy; of a list's tensors, which metrics append and never write into, the list alone."""
    return value.detach().clone() if isinstance(value, Tensor) else list(value)
