"""The greedy soup: an average that only takes in what improves it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from lightning_plugins.checkpoints.average import average_checkpoints
from lightning_plugins.checkpoints.formats import open_checkpoint
from lightning_plugins.checkpoints.streaming_mean import CheckpointMean
from lightning_plugins.core.validation import a_list, a_path, one_of, shown, true_or_false

StateDict = OrderedDict[str, Any]


def greedy_soup(
    paths: Iterable[str | Path],
    score: Callable[[StateDict], float],
    mode: Literal["max", "min"] = "max",
    *,
    trust: bool = False,
) -> tuple[StateDict, list[Path], float]:
    """Average checkpoints one by one, best first, and keep each one that makes the average better.

    Starting from the best single checkpoint, every other one, in the order of its own score, is averaged in with equal
    weights; it stays if the score improves, else it is left out for good. The result is never worse than the best
    single checkpoint, as far as ``score`` can tell. ``score`` is called at most 2 n - 1 times for n paths.

    Args:
        paths: Checkpoints of one model, as for :func:`average_checkpoints`; one is enough.
        score: Takes a state dict, returns a number: for example loads it into a module and validates that. It must
            not change the tensors. NaN counts as worse than anything.
        mode: ``"max"`` if higher scores are better, ``"min"`` if lower ones are.
        trust: Load files whose pickle needs more than tensors and plain values, which runs code that they choose.

    Returns:
        The averaged state dict, the paths in it (in the order in which they went in), and its score.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there are no paths, ``mode`` is neither, or every score is NaN. A :class:`CheckpointError`,
            which is a ``ValueError`` too, if a file cannot be read or averaged.

    Example:
        >>> import torch
        >>> folder = getfixture("tmp_path")
        >>> for name, value in {"a": 1.0, "b": 4.0, "c": 2.0}.items():
        ...     torch.save({"w": torch.tensor(value)}, folder / f"{name}.pt")
        >>> state, kept, best = greedy_soup(sorted(folder.glob("*.pt")), lambda state: -abs(state["w"].item() - 1.5))
        >>> [path.name for path in kept], state["w"].item(), best
        (['a.pt', 'c.pt'], 1.5, -0.0)

    References:
        Wortsman et al., Model soups, 2022 (arXiv:2203.05482), recipe 1. Differs: an ingredient must improve the score,
        as in the authors' program, where the paper's recipe also admits one that leaves it as it is.
    """
    sign = 1.0 if one_of("mode", mode, ("min", "max")) == "max" else -1.0
    files = _checked(paths, score, trust)

    def value(state: StateDict) -> float:
        number = _number(score(state))
        return -math.inf if math.isnan(number) else sign * number

    def mean(chosen: list[Path]) -> StateDict:
        if len(chosen) == 1:
            return CheckpointMean([open_checkpoint(path, trust=trust) for path in chosen]).state_dict()
        state = average_checkpoints(chosen, trust=trust, progress=False)
        assert isinstance(state, OrderedDict)  # noqa: S101  # for the type checker: no output was named
        return state

    singles = {path: value(mean([path])) for path in files}
    ranked = sorted(files, key=lambda path: -singles[path])  # stable: of equal scores the first given comes first
    kept, best = ranked[:1], singles[ranked[0]]
    if best == -math.inf:
        raise ValueError("`score` returned NaN for every checkpoint.")
    for path in ranked[1:]:
        tried = value(mean([*kept, path]))
        if tried > best:
            kept, best = [*kept, path], tried
    return mean(kept), kept, sign * best


def _checked(paths: Any, score: Any, trust: Any) -> list[Path]:
    """Return the paths as a list, or raise if an argument is of no use."""
    true_or_false("trust", trust)
    if not callable(score):
        raise TypeError(f"`score` must be a function of a state dict, got {shown(score)}.")
    files = [Path(a_path("paths", path)) for path in a_list("paths", paths, "a list of paths")]
    if not files:
        raise ValueError("`paths` must name at least one checkpoint, got none.")
    return files


def _number(returned: Any) -> float:
    """Return what ``score`` returned, NaN included, as a number."""
    try:
        return float(returned)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`score` must return a number, got {shown(returned)}.") from error
