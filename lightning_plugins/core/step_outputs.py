"""Where the predictions and the targets of a batch come from.

Serves the recorder and the classification report, knows modules and batches but no Trainer.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.core.imports import by_import_path
from lightning_plugins.core.validation import shown

Source = str | Callable[[Any, Any], Any]
"""A key of what the step returns, the dotted name of a submodule, or ``f(outputs, batch)``, also by import path."""

_PREDICTION_KEYS = ("logits", "preds")
_TARGET_KEY = "target"
_MOST_PIECES = 256  # calls of a module that are remembered within a batch


class StepSources:
    """Finds the predictions and targets of a batch.

    Predictions: ``outputs["logits"]`` or ``outputs["preds"]``, else what the module's ``forward`` returned last.
    Targets: ``outputs["target"]``, else ``batch[1]``.

    Args:
        predictions: A key of what the step returns, the name of a submodule whose last output is meant, or a function
            of the step's output and the batch or its import path; ``None`` for the rule above.
        targets: A key of what the step returns, or a function of the step's output and the batch or its import path;
            ``None`` for the rule above.
        owner: Who asks, for messages.

    Raises:
        TypeError: If an argument is none of these.
    """

    def __init__(self, predictions: Source | None, targets: Source | None, owner: str) -> None:
        for name, value in (("predictions", predictions), ("targets", targets)):
            if not (value is None or isinstance(value, str) or callable(value)):
                raise TypeError(f"`{name}` must be a key, a function of (outputs, batch) or None, got {shown(value)}.")
        self._predictions = predictions
        self._targets = targets
        self._owner = owner
        self._handle: Any = None
        self._captured: deque[Tensor] = deque(maxlen=_MOST_PIECES)

    def listen(self, module: nn.Module) -> None:
        """Remember from now on what ``module``, or the submodule that was named, returns from ``forward``."""
        self.close()
        watched = module if self._predictions is None else None
        if isinstance(self._predictions, str):
            watched = dict(module.named_modules()).get(self._predictions) if self._predictions else None
        if watched is not None:
            self._handle = watched.register_forward_hook(self._capture)

    def close(self) -> None:
        """Take the hook off again."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self.forget()

    def forget(self) -> None:
        """Let go of what was remembered; a batch later it would be another batch's."""
        self._captured.clear()

    def predictions(self, outputs: Any, batch: Any) -> Tensor:
        """Return the batch's predictions.

        Raises:
            ValueError: If there are none; the message says where they were looked for.
        """
        captured = list(self._captured)
        self._captured.clear()
        if callable(self._predictions):
            return _tensor("predictions", self._predictions(outputs, batch))
        wanted = (self._predictions,) if self._predictions is not None else _PREDICTION_KEYS
        for key in wanted:
            if isinstance(outputs, Mapping) and key in outputs:
                return _tensor("predictions", outputs[key])
        if not captured:
            function = _imported(self._predictions)
            if function is None:
                raise ValueError(self._nothing_found("predictions", wanted, outputs))
            return _tensor("predictions", function(outputs, batch))
        return captured[-1] if len(captured) == 1 else _whole(captured, batch_size(batch))

    def targets(self, outputs: Any, batch: Any) -> Tensor:
        """Return the batch's targets.

        Raises:
            ValueError: If there are none; the message says where they were looked for.
        """
        if callable(self._targets):
            return _tensor("targets", self._targets(outputs, batch))
        key = _TARGET_KEY if self._targets is None else self._targets
        if isinstance(outputs, Mapping) and key in outputs:
            return _tensor("targets", outputs[key])
        if self._targets is None and isinstance(batch, (tuple, list)) and len(batch) > 1:
            return _tensor("targets", batch[1])
        function = _imported(self._targets)
        if function is not None:
            return _tensor("targets", function(outputs, batch))
        raise ValueError(self._nothing_found("targets", (key,), outputs, batch))

    def _capture(self, module: nn.Module, args: Any, output: Any) -> None:
        # Under DistributedDataParallel the step itself runs as the module's forward, so its result comes here last.
        found = _prediction_like(output)
        if found is not None:
            self._captured.append(found)

    def _nothing_found(self, what: str, keys: tuple[str, ...], outputs: Any, batch: Any = None) -> str:
        if isinstance(outputs, Mapping):
            returned = f"a dict with the keys {', '.join(map(repr, outputs)) or '(none)'}"
        else:
            returned = f"{type(outputs).__name__}"
        places = f"the step returned {returned} (looked for {' or '.join(map(repr, keys))})"
        if what == "predictions":
            if self._predictions is None:
                places += " and the module's `forward` was not called or returned no scores"
            else:
                places += " and no submodule of that name returned scores, nor is it a function's import path"
        elif self._targets is None:
            places += f" and the batch, a {type(batch).__name__}, has no second item"
        else:
            places += " and it is no function's import path"
        return (
            f"`{self._owner}` found no {what}: {places}. Return them from the step, or name them: "
            f"{self._owner}({what}='key of the returned dict') or "
            f"{self._owner}({what}=lambda outputs, batch: ...)."
        )


def _imported(source: Source | None) -> Callable[[Any, Any], Any] | None:
    """Return the function that ``source`` is the import path of, if it is one."""
    if not isinstance(source, str) or "." not in source:
        return None
    try:
        found = by_import_path(source)
    except ImportError:
        return None
    return found if callable(found) else None


def _prediction_like(output: Any) -> Tensor | None:
    """Return the scores in a module's output: a tensor with at least one dimension, or one under a familiar key."""
    if isinstance(output, Tensor):
        return output.detach() if output.dim() else None
    if isinstance(output, Mapping):
        return next((_prediction_like(output[key]) for key in _PREDICTION_KEYS if key in output), None)
    logits = getattr(output, "logits", None)
    return logits.detach() if isinstance(logits, Tensor) else None


def _whole(captured: list[Tensor], size: int) -> Tensor:
    """Return the last output, or the last few joined where a batch of ``size`` went through in pieces."""
    for first in range(len(captured) - 1, -1, -1):
        rows = sum(part.shape[0] for part in captured[first:])
        if rows >= size:
            break
    return torch.cat(captured[first:]) if first < len(captured) - 1 and rows == size else captured[-1]


def batch_size(batch: Any) -> int:
    """Return the length of the first tensor in a batch, 1 if there is none.

    Example:
        >>> batch_size(({"x": torch.zeros(5, 2)}, torch.zeros(3)))
        5
    """
    return next((len(tensor) for tensor in _tensors(batch) if tensor.dim()), 1)


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nest of mappings, sequences and dataclasses in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        batch = list(batch.values())
    elif dataclasses.is_dataclass(batch):
        batch = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    if isinstance(batch, (list, tuple)):
        for part in batch:
            yield from _tensors(part)


def _tensor(what: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"The {what} must be a tensor, got {type(value).__name__}.")
    return value.detach()
