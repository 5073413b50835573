"""The loss, predictions and targets of a step: what it returned, what ``forward`` returned, what the batch holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.core.imports import by_import_path
from lightning_plugins.core.validation import shown, takes

Source = str | Callable[[Any, Any], Any]
"""A key of the step's output or of the batch, a submodule's dotted name, or ``f(outputs, batch)``, also its path."""

PREDICTION_KEYS = ("logits", "preds")
TARGET_KEYS = ("target", "targets", "label", "labels")
_MOST_PIECES = 256  # calls of a module that are remembered within a batch
_ABSENT: Any = object()


def loss_of(outputs: Any) -> Tensor | None:
    """Return the loss in what a step returned: a number, or the entry ``"loss"``; ``None`` if there is none.

    Example:
        >>> loss_of({"loss": torch.tensor(0.5), "logits": torch.zeros(3, 2)}), loss_of(None)
        (tensor(0.5000), None)
    """
    loss = outputs.get("loss") if _is_mapping(outputs) else outputs
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            return None
        return loss.detach() if loss.requires_grad else loss
    # NumPy's numbers are among them
    if not isinstance(loss, bool) and isinstance(loss, Real):
        return torch.tensor(float(loss), dtype=torch.float64)
    return None


def predictions_of(outputs: Any, otherwise: Any = None) -> Any:
    """Return the predictions among what a step returned: its entry ``"logits"`` or ``"preds"``, else ``otherwise``."""
    if _is_mapping(outputs):
        for key in PREDICTION_KEYS:
            if key in outputs:
                return outputs[key]
    return otherwise


def targets_of(outputs: Any, batch: Any, otherwise: Any = None) -> Any:
    """Return the targets of a step.

    These are its output's ``"target"``, else the second item of a batch that is a tuple or list, else the batch's one
    entry among ``"target"``, ``"targets"``, ``"label"`` and ``"labels"``; ``otherwise`` if there is none of these.

    Raises:
        ValueError: If a batch has more than one such entry.

    Example:
        >>> targets_of(None, {"input_ids": torch.zeros(2, 3), "labels": torch.tensor([0, 1])})
        tensor([0, 1])
    """
    if _is_mapping(outputs) and "target" in outputs:
        return outputs["target"]
    if type(batch) in (tuple, list):
        return batch[1] if len(batch) > 1 else otherwise
    found = {key: value for key in TARGET_KEYS if (value := entry_of(batch, key)) is not None}
    if len(found) > 1:
        raise ValueError(
            f"The batch has {' and '.join(map(repr, found))}, and either may be the targets: name one, as in "
            f"targets={next(iter(found))!r}."
        )
    if found:
        return next(iter(found.values()))
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else otherwise


def _is_mapping(outputs: Any) -> bool:
    # the plain type first: an abstract one is asked at ten times the price
    return type(outputs) is dict or isinstance(outputs, Mapping)


def _without_graph(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def entry_of(holder: Any, key: str) -> Any:
    """Return what a mapping, or another object with named parts, has under ``key``; ``None`` if it has none.

    Example:
        >>> entry_of({"labels": 3}, "labels"), entry_of([1, 2], "labels")
        (3, None)
    """
    if type(holder) in (tuple, list):
        return None
    if isinstance(holder, Mapping):
        return holder.get(key)
    if not isinstance(holder, tuple) and hasattr(type(holder), "__getitem__"):
        try:
            return holder[key]
        except (LookupError, TypeError, ValueError, AttributeError):  # every library has its own
            return None
    return getattr(holder, key, None)


class StepSources:
    """Finds the predictions and targets of a batch.

    Predictions: ``outputs["logits"]`` or ``outputs["preds"]``, else what the module's ``forward`` returned last.
    Targets: see :func:`targets_of`.

    Args:
        predictions: A key of what the step returns or of the batch, the name of a submodule whose last output is
            meant, or a function of the step's output and the batch or its import path; ``None`` for the rule above.
        targets: A key of what the step returns or of the batch, or a function of the step's output and the batch or
            its import path; ``None`` for the rule above.
        owner: Who asks, for messages.

    Raises:
        TypeError: If an argument is none of these.
    """

    def __init__(self, predictions: Source | None, targets: Source | None, owner: str) -> None:
        for name, value in (("predictions", predictions), ("targets", targets)):
            if value is not None and not isinstance(value, str):
                takes(name, value, "outputs", "batch", what="None, a key or a function")
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

    @property
    def listens(self) -> bool:
        """Whether a module's output is where predictions come from."""
        return self._handle is not None

    @property
    def heard(self) -> bool:
        """Whether the module was called since the last batch."""
        return bool(self._captured)

    def find(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the batch's predictions and targets, without a graph.

        Raises:
            TypeError: If what was found is no tensor.
            ValueError: If there are none; the message says where they were looked for.
        """
        captured = self._captured
        if self._predictions is None:
            predictions = predictions_of(outputs)
        else:
            predictions = self._named(self._predictions, outputs, batch)
        targets = targets_of(outputs, batch) if self._targets is None else self._named(self._targets, outputs, batch)
        if predictions is None and captured:
            predictions = captured[-1] if len(captured) == 1 else _joined(list(captured), targets)
        captured.clear()
        if not isinstance(predictions, Tensor):
            raise self._missing("predictions", predictions, outputs, batch)
        if not isinstance(targets, Tensor):
            raise self._missing("targets", targets, outputs, batch)
        return _without_graph(predictions), _without_graph(targets)

    def _named(self, source: Source, outputs: Any, batch: Any) -> Any:
        if not isinstance(source, str):
            return source(outputs, batch)
        for holder in (outputs, batch):
            found = entry_of(holder, source)
            if found is not None:
                return found
        if self._captured and source is self._predictions:
            return None
        function = _imported(source)
        return None if function is None else function(outputs, batch)

    def _capture(self, module: nn.Module, args: Any, output: Any) -> None:
        # Under DistributedDataParallel the step itself runs as the module's forward, so its result comes here last.
        found = predictions_of(output, getattr(output, "logits", None)) if not isinstance(output, Tensor) else output
        if isinstance(found, Tensor) and found.dim():
            self._captured.append(found.detach())

    def _missing(self, what: str, found: Any, outputs: Any, batch: Any) -> Exception:
        if found is not None:
            return TypeError(
                f"The {what} must be a tensor, got {type(found).__name__}: give {self._owner}({what}=lambda outputs, "
                "batch: ...)."
            )
        source = self._predictions if what == "predictions" else self._targets
        keys = (source,) if isinstance(source, str) else PREDICTION_KEYS if what == "predictions" else TARGET_KEYS
        returned = (
            f"a dict with the keys {shown(list(outputs))[1:-1] or '(none)'}"
            if isinstance(outputs, Mapping)
            else (type(outputs).__name__)
        )
        places = f"the step returned {returned} (looked for {' or '.join(map(repr, keys))})"
        if what == "predictions" and source is None:
            places += " and the module's `forward` was not called or returned no scores"
        elif what == "predictions":
            places += " and no submodule of that name returned scores, nor is it a function's import path"
        elif source is None:
            places += f" and the batch, a {type(batch).__name__}, has no second item and no such entry"
        else:
            places += " and it is no function's import path"
        return ValueError(
            f"`{self._owner}` found no {what}: {places}. Return them from the step, or name them: "
            f"{self._owner}({what}='key of the output or of the batch') or "
            f"{self._owner}({what}=lambda outputs, batch: ...)."
        )


def _imported(source: str) -> Callable[[Any, Any], Any] | None:
    """Return the function that ``source`` is the import path of, if it is one."""
    if "." not in source:
        return None
    try:
        found = by_import_path(source)
    except ImportError:
        return None
    return found if callable(found) else None


def _joined(captured: list[Tensor], targets: Any) -> Tensor:
    """Return the last output, or the last few joined where a batch went through in pieces."""
    size = len(targets) if isinstance(targets, Tensor) and targets.dim() else 1
    rows, first = 0, len(captured)
    while first and rows < size:
        first -= 1
        rows += captured[first].shape[0]
    return torch.cat(captured[first:]) if first < len(captured) - 1 and rows == size else captured[-1]
