"""From a checkpoint's sets of weights to a module and its average; everything is checked before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_plugins.core.module_state import averaged_slots, misfits, named_slots
from lightning_plugins.ema.checkpoint_format import Contents


def fitting_average(
    module: nn.Module, contents: Contents, name: str, state_dict: Mapping[str, Tensor] | None, *, strict: bool = True
) -> dict[str, Tensor] | None:
    """Return the average called ``name`` that a checkpoint holds for ``module``, ``None`` when it holds none.

    Args:
        module: The module that the average is for.
        contents: What the checkpoint holds.
        name: The EMA's name.
        state_dict: The checkpoint's own, ``None`` where a sharded strategy has already consumed it.
        strict: Whether names must match exactly; otherwise weights without an average begin as they are, and averages
            without a weight are left out.

    Raises:
        ValueError: If the average or the raw weights beside it do not fit the module.
    """
    average = contents.average(name, state_dict)
    trainable = averaged_slots(module)
    if average is not None and contents.updates is not None:  # Lightning averages frozen weights and integers, too
        average = {key: value for key, value in average.items() if key in trainable}
    for what, tensors, required in (
        ("raw weights", contents.raw, []),
        (f"average {name!r}", average, list(trainable)),
    ):
        if tensors is not None:
            check_fit(module, what, tensors, required=required, strict=strict)
    return average


def check_fit(
    module: nn.Module, what: str, tensors: dict[str, Tensor], *, required: Collection[str] = (), strict: bool = True
) -> None:
    """Check that ``tensors`` of a checkpoint can be loaded into ``module``.

    Args:
        module: The module.
        what: What they are, for the message.
        tensors: Clean name -> full tensor; without ``strict``, those that the module lacks are taken out.
        required: Names that must be there.
        strict: Whether the names must match.

    Raises:
        ValueError: If they cannot.
    """
    if not strict:
        known = {key for key, _ in named_slots(module)}
        for key in [key for key in tensors if key not in known]:
            del tensors[key]
    faults = misfits(module, tensors, required=required if strict else ())
    if faults:
        raise ValueError(
            f"The checkpoint's {what} must have the names and shapes of the module's trainable weights; "
            f"{'; '.join(faults)}. Resume with the module that wrote it, or load its weights with `extract_weights`."
        )


def lightning_steps(contents: Contents, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the counters for a file of Lightning's own callback, ``None`` for other files."""
    if contents.updates is None:
        return None
    applied = max(int(checkpoint.get("global_step", 0)), contents.updates)
    return {"applied_steps": applied, "origin": applied - contents.updates, "last_update": contents.updates}
