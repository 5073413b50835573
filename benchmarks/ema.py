"""An average's update and swap beside other libraries and the physical floor.

``make bench ARGS=ema``, or ``python -m benchmarks.ema --threads 2``. The same on a GPU is in ``benchmarks.gpu``.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from benchmarks import whole_stack
from benchmarks.harness import Seconds, absentees, interleaved, quiet, report, table, why_absent
from lightning_plugins import EMA, LatestWeightAveraging
from lightning_plugins.ema.latest_shadow import LatestShadow
from lightning_plugins.ema.shadow import Shadow

CHUNK = 2**18  # elements of a mebibyte of float32
LAST, EVERY = 5, 100  # the defaults, in a run of 10,000 steps
MODULES = {"timm": "timm.utils.model_ema", "ema-pytorch": "ema_pytorch"}
Methods = dict[str, Callable[[], object]]


def transformer(width: int = 768) -> nn.Module:
    """101 M parameters in 148 tensors, the largest 61 MB."""
    blocks = [block(width) for _ in range(12)]
    return nn.ModuleList([nn.Embedding(20_000, width), nn.Embedding(1024, width), nn.LayerNorm(width), *blocks])


def block(width: int) -> nn.Module:
    parts = [nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)]
    return nn.ModuleList([*parts, nn.Linear(width, 4 * width), nn.Linear(4 * width, width)])


def many_small(layers: int = 500) -> nn.Module:
    """5 M parameters in 1000 tensors."""
    return nn.ModuleList(nn.Linear(100, 100) for _ in range(layers))


def flat(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    size, device = sum(p.numel() for p in module.parameters()), next(module.parameters()).device
    return torch.randn(size, device=device).to(dtype)


def perturbed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01)
    return module


def update_methods(module: nn.Module) -> Methods:
    """Return ours, the floor, and the peers that can be imported, each with its own average of ``module``."""
    shadow, average, weights = Shadow(module), flat(module), flat(module)
    return {
        "floor: flat lerp_": lambda: average.lerp_(weights, 0.001),
        "lightning_plugins": lambda: shadow.update(0.999),
        **torch_peers(module),
        **lightning_peer(module),
        **timm_peer(module),
        **ema_pytorch_peer(module),
    }


def torch_peers(module: nn.Module) -> Methods:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    averaged.update_parameters(module)
    return {"torch AveragedModel, multi_avg_fn": lambda: averaged.update_parameters(module)}


def lightning_peer(module: nn.Module) -> Methods:
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

    # What lightning.pytorch.callbacks.EMAWeightAveraging calls after every step; it admits no other function.
    averaged = AveragedModel(module, use_buffers=True, avg_fn=get_ema_avg_fn(0.999))
    averaged.update_parameters(module)
    return {"Lightning EMAWeightAveraging": lambda: averaged.update_parameters(module)}


def timm_peer(module: nn.Module) -> Methods:
    if why_absent(MODULES["timm"]) is not None:
        return {}
    from timm.utils.model_ema import ModelEmaV3

    averaged = ModelEmaV3(module, decay=0.999)
    return {"timm ModelEmaV3": lambda: averaged.update(module)}


def ema_pytorch_peer(module: nn.Module) -> Methods:
    if why_absent(MODULES["ema-pytorch"]) is not None:
        return {}
    from ema_pytorch import EMA

    averaged = EMA(module, beta=0.999, update_every=1, update_after_step=0, include_online_model=False)
    averaged.update()
    averaged.update()
    return {"ema-pytorch": averaged.update}


def half_methods(module: nn.Module) -> Methods:
    """Return ways to blend bfloat16 weights into float32 averages."""
    module = module.to(torch.bfloat16)
    shadow, average, weights = Shadow(module), flat(module), flat(module, torch.bfloat16)
    scratch = torch.empty(CHUNK, device=average.device)

    def chunked() -> None:
        for a, w in zip(torch.split(average, CHUNK), torch.split(weights, CHUNK), strict=True):
            part = scratch[: a.numel()]
            part.copy_(w)
            a.lerp_(part, 0.001)

    return {"floor: flat chunked cast and lerp_": chunked, "lightning_plugins": lambda: shadow.update(0.999)}


def swap_methods(module: nn.Module) -> Methods:
    """Return ways to exchange weights and averages, once."""
    shadow, average, weights = Shadow(perturbed(module)), flat(module), flat(module)
    scratch = torch.empty(CHUNK, device=average.device)

    def chunked() -> None:
        for a, w in zip(torch.split(average, CHUNK), torch.split(weights, CHUNK), strict=True):
            part = scratch[: a.numel()]
            part.copy_(w)
            w.copy_(a)
            a.copy_(part)

    def ours() -> None:
        shadow.swap_out() if shadow.swapped else shadow.swap_in()

    return {"floor: flat chunked swap": chunked, "lightning_plugins": ours, **lightning_swap(module)}


def lightning_swap(module: nn.Module) -> Methods:
    from lightning.pytorch.callbacks import EMAWeightAveraging
    from torch.optim.swa_utils import AveragedModel

    callback = EMAWeightAveraging()
    callback._average_model = AveragedModel(module)
    return {"Lightning EMAWeightAveraging": lambda: callback._swap_models(module)}


def latest_methods(module: nn.Module) -> Methods:
    """Return ways to take a snapshot of the weights and average the last ones, each with all of its snapshots."""
    mean, weights, copies = flat(module), flat(module), deque(flat(module) for _ in range(LAST))
    shadow = LatestShadow(module, last=LAST)
    methods = {"lightning_plugins": shadow.update, "plain torch: a deque of copies": plain_latest(module)}
    for method in methods.values():
        for _ in range(LAST):
            method()

    def chunked() -> None:
        copies.rotate(-1)
        copies[-1].copy_(weights)
        for target, first, *others in zip(*(torch.split(flat, CHUNK) for flat in (mean, *copies)), strict=True):
            target.copy_(first)
            for part in others:
                target.add_(part)
            target.div_(LAST)

    return {"floor: flat copy and chunked mean": chunked, **methods}


def plain_latest(module: nn.Module) -> Callable[[], None]:
    copies: deque[list[Tensor]] = deque(maxlen=LAST)
    average: list[Tensor] = []

    def update() -> None:
        copies.append([parameter.detach().clone() for parameter in module.parameters()])
        average[:] = [sum(parts) / len(parts) for parts in zip(*copies, strict=True)]

    return update


def extra_memory(module: nn.Module) -> list[str]:
    """Return how much is allocated at once beyond averages and snapshots, as sentences."""
    shadow = Shadow(perturbed(module))

    def update_and_swap() -> None:
        shadow.update(0.999)
        shadow.swap_in()
        shadow.swap_out()

    # before anything of them is made, the latest
    update = f"Allocated by one update and two swaps, beyond the average: {allocated(update_and_swap)} MB."
    _, ours, plain = (allocated(method) for method in latest_methods(module).values())
    beyond = f"beyond the last {LAST} and their mean"
    return [update, f"Allocated by one snapshot, {beyond}: {ours} MB (a deque of copies: {plain} MB)."]


def allocated(work: Callable[[], object]) -> str:
    """Return how many megabytes more than before ``work`` holds at its height."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return f"{max(accumulate(event.self_cpu_memory_usage for event in events)) / 1e6:.2f}"


def trainer_steps(*, quick: bool) -> Seconds:
    """Return seconds per step of a tiny model, with and without an average."""
    callbacks: dict[str, Callable[[], list]] = {
        whole_stack.BARE: list,
        "EMA": lambda: [EMA(0.9999)],
        f"LatestWeightAveraging({LAST}, every={EVERY})": lambda: [LatestWeightAveraging(LAST, every=EVERY)],
    }
    makes = {
        name: lambda folder, make=make: (whole_stack.Tiny, {"callbacks": make()}) for name, make in callbacks.items()
    }
    return whole_stack.measure(makes, *((20, 2) if quick else (1000, 15)))[0]


TABLES: list[tuple[str, Callable[[nn.Module], Methods], Callable[[], nn.Module], int, int]] = [
    ("update, 101 M in 148 tensors, float32", update_methods, transformer, 21, 1),
    ("update, 5 M in 1000 tensors, float32", update_methods, many_small, 61, 1),
    ("update, 101 M in 148 tensors, bfloat16 into float32", half_methods, transformer, 21, 1),
    ("swap, 101 M in 148 tensors, float32", swap_methods, transformer, 21, 1),
    ("swap, 5 M in 1000 tensors, float32", swap_methods, many_small, 61, 1),
    (f"a step with the mean of the latest {LAST}, one in {EVERY} steps; 101 M in 148 tensors, float32",
     latest_methods, transformer, 21, EVERY),
    (f"a step with the mean of the latest {LAST}, one in {EVERY} steps; 5 M in 1000 tensors, float32",
     latest_methods, many_small, 61, EVERY),
]  # fmt: skip
"""Title, what takes turns, on which module, in how many rounds, and the steps that one call is for."""
STEP = "a Trainer step of 4 x Linear(8, 8)"
SMALL = {transformer: partial(transformer, 8), many_small: partial(many_small, 4)}


def main(*, quick: bool = False, threads: int = 1, only: str = "") -> None:
    """Measure, print and keep; one thread unless told otherwise, by the processor's clock, which is steadier."""
    torch.set_num_threads(threads)
    quiet()
    clock = time.perf_counter if threads > 1 else time.process_time
    tables, data = [], {}
    for title, methods, module, rounds, steps in TABLES:
        if only not in title:
            continue
        candidates = methods((SMALL[module] if quick else module)())
        with torch.no_grad():
            data[title] = interleaved(candidates, rounds=2 if quick else rounds, clock=clock)
        head = f"{title}, {threads} thread" + "s" * (threads > 1)
        tables.append(table(head, data[title], base=next(iter(candidates)), per=steps, unit="ms"))
        tables.append("best times: " + best(data[title]))
    if only in STEP:
        data[STEP] = trainer_steps(quick=quick)
        tables.append(table(STEP, data[STEP], base=whole_stack.BARE))
    tables += [*extra_memory(SMALL[transformer]() if quick else transformer()), *absentees(MODULES)]
    report("ema", tables, data, keep=not quick)


def best(seconds: Mapping[str, list[float]]) -> str:
    """Return the ratios of the shortest times, which load on the machine can only lengthen."""
    floor = min(next(iter(seconds.values())))
    return ", ".join(f"{name} {min(values) / floor:.2f}" for name, values in seconds.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ema", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="tables whose title contains this")
    main(**vars(parser.parse_args()))
