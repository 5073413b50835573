"""Which of several averages does what only one can do: evaluate, own a file's state dict, stay in the module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Averaging(Protocol):
    """What an average says about its part in a run."""

    name: str
    evaluate: str
    checkpoint: str
    after_fit: str


# Lightning's own callbacks that exchange the module's weights for an average; two of a kind undo each other's swaps.
_OTHER_AVERAGES = ("StochasticWeightAveraging", "WeightAveraging")

T = TypeVar("T", bound=Averaging)


@dataclass(frozen=True)
class Roles(Generic[T]):
    """Who does what.

    Args:
        writer: Decides a file's ``state_dict``: the one that owns it; without one, the evaluator or else the first
            keeps files raw.
        evaluator: Puts its average into the module for an evaluation, if any does.
        keeper: Leaves its average in the module after fit, if any does: of several, the evaluator, else the first.
    """

    writer: T | None
    evaluator: T | None
    keeper: T | None


def assign_roles(averages: Sequence[T]) -> Roles[T]:
    """Return who does what among ``averages``.

    Raises:
        ValueError: If two have one name, or two claim what only one can have.
    """
    names = [average.name for average in averages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"`name` must differ among the averages of a Trainer, got {twice[0]!r} twice. Give one of them another."
        )
    evaluators = [average for average in averages if average.evaluate == "average"]
    owners = [average for average in averages if average.checkpoint == "average"]
    for claim, claimants, what in (
        ("evaluate", evaluators, "be evaluated"),
        ("checkpoint", owners, "own the `state_dict` of a checkpoint"),
    ):
        if len(claimants) > 1:
            listed = ", ".join(repr(average.name) for average in claimants)
            raise ValueError(
                f"`{claim}` must be 'average' for at most one EMA, because only one can {what}, got {listed}: "
                f"pass {claim}='raw' to the others."
            )
    evaluator = evaluators[0] if evaluators else None
    keepers = [average for average in averages if average.after_fit == "average"]
    keeper = evaluator if evaluator in keepers else next(iter(keepers), None)
    writer = next(iter(owners), None) or evaluator or next(iter(averages), None)
    return Roles(writer, evaluator, keeper)


def refuse_other_averages(callbacks: Sequence[object]) -> None:
    """Refuse Lightning's own averaging beside an EMA, of either namespace.

    Raises:
        ValueError: If one of ``callbacks`` exchanges the weights, too.
    """
    for callback in callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in _OTHER_AVERAGES and "lightning" in kind.__module__:
                raise ValueError(
                    "`EMA` must be the only callback that exchanges the module's weights for an average, got "
                    f"{type(callback).__name__} as well. Remove one of the two."
                )
