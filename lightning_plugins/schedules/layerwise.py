"""Parameter groups whose rates fall from the head to the input: layer-wise learning-rate decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_plugins.core.validation import a_list, real_number, shown


def layerwise_decay(
    module: nn.Module, base_lr: float, decay: float, *, order: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups, one for each layer, with the rate base_lr * decay^(L - l) for layer l of 0 to L.

    The last layer, the head, has ``base_lr``. Give the groups to an optimizer, and drive them with any schedule: they
    keep their ratio. Frozen parameters are left out; one that several layers share belongs to the first.

    Args:
        module: The network.
        base_lr: Rate of the last layer, above 0.
        decay: Ratio of the rates of neighboring layers, above 0 and at most 1; 0.65 to 0.9 is usual.
        order: Names of parts or parameters, from input to output; each is a layer and its group's name. Every
            parameter must lie in one (in the one of the longest name, where several fit). ``None``: a module whose
            only part with parameters is another module is that module. The blocks of its largest ``ModuleList`` or
            ``Sequential`` are a layer each; what is defined before them, and the module's own parameters, are layer 0
            (``"input"``); what is defined after them is the last (``"head"``). Without such a list, every part is a
            layer.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range, or a parameter has no place in ``order`` or a name no parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> [(group["name"], group["lr"]) for group in layerwise_decay(model, 1.0, 0.5)]
        [('0', 0.25), ('1', 0.5), ('2', 1.0)]

    References:
        Clark et al., ELECTRA, 2020, arXiv:2003.10555; Bao et al., BEiT, 2021, arXiv:2106.08254; He et al., MAE, 2021,
        arXiv:2111.06377. timm's and MAE's groups have a ``lr_scale`` in place of the rate.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch module, got {shown(module)}.")
    base_lr = float(real_number("base_lr", base_lr, above=0))
    decay = float(real_number("decay", decay, above=0, at_most=1))
    trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    layers = _layers_of(module) if order is None else [(name, (name,)) for name in _names(order)]
    places = {prefix: index for index, (_, prefixes) in enumerate(layers) for prefix in prefixes}
    members: list[list[nn.Parameter]] = [[] for _ in layers]
    for name, weight in trained.items():
        members[_place(name, places)].append(weight)
    for (name, _), weights in zip(layers, members, strict=True):
        if not weights and order is not None:
            raise ValueError(f"`order` must name parts with parameters that are trained, got {name!r}, which has none.")
    kept = [(name, weights) for (name, _), weights in zip(layers, members, strict=True) if weights]
    last = len(kept) - 1
    return [
        {"params": weights, "lr": base_lr * decay ** (last - index), "name": name}
        for index, (name, weights) in enumerate(kept)
    ]


def _names(order: Any) -> list[str]:
    for index, name in enumerate(a_list("order", order)):
        if not isinstance(name, str):
            raise TypeError(f"`order[{index}]` must be the name of a part, got {shown(name)}.")
    return list(order)


def _place(name: str, places: dict[str, int]) -> int:
    fitting = [prefix for prefix in places if not prefix or name == prefix or name.startswith(f"{prefix}.")]
    if not fitting:
        raise ValueError(f"`order` must have a place for every parameter, got none for {name!r}.")
    return places[max(fitting, key=len)]


def _layers_of(module: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """Return the name and the prefixes of every layer, from input to output."""
    prefix, owner = "", module
    while True:
        parts = [(name, part) for name, part in owner.named_children() if any(True for _ in part.parameters())]
        if len(parts) != 1 or list(owner.parameters(recurse=False)):
            break
        prefix, owner = f"{prefix}{parts[0][0]}.", parts[0][1]
    own: tuple[str, ...] = tuple(f"{prefix}{name}" for name, _ in owner.named_parameters(recurse=False))
    lists = [(name, part) for name, part in parts if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) > 1]
    if not lists or isinstance(owner, nn.Sequential):
        first = [("input", own)] if own else []
        return first + [(f"{prefix}{name}", (f"{prefix}{name}",)) for name, _ in parts]
    trunk, blocks = max(lists, key=lambda item: sum(weight.numel() for weight in item[1].parameters()))
    before = [name for name, _ in parts][: [name for name, _ in parts].index(trunk)]
    after = [name for name, _ in parts if name not in before and name != trunk]
    middle = [(f"{prefix}{trunk}.{name}", (f"{prefix}{trunk}.{name}",)) for name, _ in blocks.named_children()]
    below = (*own, *(f"{prefix}{name}" for name in before))
    return [("input", below), *middle, ("head", tuple(f"{prefix}{name}" for name in after))]
