"""How many batches make one optimizer step, from the arguments of ``GradientAccumulation``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_plugins.core.validation import shown, whole_number


def plan_changes(
    batches: int | None, effective_batch_size: int | None, schedule: Mapping[int, int] | None
) -> tuple[tuple[int, int], ...] | None:
    """Return the arguments of ``GradientAccumulation`` as ``((step, batches), ...)``, ``None`` if a loader must tell.

    Raises:
        TypeError: If a number is not a whole number, or none or several of the three are given.
        ValueError: If one is below 1, or the schedule does not begin at step 0.
    """
    names = {"batches": batches, "effective_batch_size": effective_batch_size, "schedule": schedule}
    given = [f"{name}={shown(value)}" for name, value in names.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise TypeError(f"exactly one of `batches`, `effective_batch_size` and `schedule` must be given, got {got}.")
    if effective_batch_size is not None:
        whole_number("effective_batch_size", effective_batch_size, at_least=1, unit="samples")
        return None
    if schedule is None:
        return ((0, whole_number("batches", batches, at_least=1, unit="batches")),)
    if not isinstance(schedule, Mapping) or 0 not in schedule:
        raise ValueError(f"`schedule` must map steps to batches and begin at step 0, got {shown(schedule)}.")
    return tuple(
        sorted(
            (
                whole_number("schedule", step, at_least=0, unit="steps"),
                whole_number(f"schedule[{shown(step)}]", number, at_least=1, unit="batches"),
            )
            for step, number in schedule.items()
        )
    )


def batches_for(effective_batch_size: int, *, batch_size: int, ranks: int) -> int:
    """Return how many batches of ``batch_size`` on each of ``ranks`` processes make ``effective_batch_size`` samples.

    Raises:
        ValueError: If no whole number does; the message names the nearest sizes that are possible.

    Example:
        >>> batches_for(256, batch_size=32, ranks=2)
        4
    """
    unit = batch_size * ranks
    batches, rest = divmod(effective_batch_size, unit)
    if rest:
        nearest = " or ".join(str(number * unit) for number in (batches, batches + 1) if number)
        where = f"{batch_size} samples" + (f" on each of {ranks} processes" if ranks > 1 else "")
        raise ValueError(
            f"`effective_batch_size` must be a multiple of {unit}, for batches of {where}, "
            f"got {effective_batch_size}. Take {nearest}, or another batch size in the loader."
        )
    return batches


def describe(changes: Sequence[tuple[int, int]], *, batch_size: int | None, ranks: int) -> str:
    """Return in words what a step is made of.

    Example:
        >>> describe([(0, 4)], batch_size=8, ranks=2)
        '4 batches of 8 samples on each of 2 processes per optimizer step (effective batch size 64)'
    """
    samples = f" of {batch_size} samples" if batch_size else ""
    if ranks > 1:
        samples += f" on each of {ranks} processes"
    parts = []
    for start, batches in changes:
        part = f"{batches} {'batches' if batches > 1 else 'batch'}{samples} per optimizer step"
        part += f" (effective batch size {batches * batch_size * ranks})" if batch_size else ""
        parts.append(f"from step {start} on {part}" if len(changes) > 1 else part)
    return "; ".join(parts)
