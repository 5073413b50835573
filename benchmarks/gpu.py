"""The same questions on one CUDA device: bandwidth, memory, waits, skipped steps and a real lack of memory.

Prints one line and does nothing where there is no such device. Fails when a bound is missed: an update reaches 90 % of
a copy's bandwidth, update and swap need at most 64 MB beyond weights and average, the whole stack makes the host wait
for the device no more often than a bare Trainer does (in bfloat16 never, under a gradient scaler as often as the
scaler), averages count what a scaler skipped, and a batch that does not fit runs in pieces.
"""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.ema import flat, half_methods, perturbed, swap_methods, update_methods
from benchmarks.harness import interleaved, quiet, report, table
from benchmarks.whole_stack import whole
from lightning_plugins import EMA, GradientAccumulation, LearningRateScheduler, MicroBatching, WarmupCosine
from lightning_plugins.ema.shadow import Shadow

WAIT = "called a synchronizing CUDA operation"
LEAST_BANDWIDTH, MOST_MEGABYTES = 0.9, 64
WIDTH, CLASSES, STEPS = 256, 16, 40


class Classifier(pl.LightningModule):
    """A few layers; its data lie on the device already, so that nothing but callbacks could wait for it."""

    def __init__(self, width: int = WIDTH, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.GELU())]
        self.layers = nn.Sequential(*blocks, nn.Linear(width, CLASSES))
        self.applied = 0

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        optimizer.register_step_post_hook(self._count)
        return optimizer

    def _count(self, *args):
        self.applied += 1


class Waits(pl.Callback):
    """Counts how often the host waits for the device in the batches from ``first`` up to ``last``.

    Torch says so by a warning whenever it happens. The first batches are left out, where references are taken and
    buffers made, and the last, where the rows of a phase are read.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.count, self._caught = first, last, 0, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.first:
            self._caught = warnings.catch_warnings(record=True)
            self._heard = self._caught.__enter__()
            warnings.simplefilter("always")
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.last and self._caught is not None:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self._caught = None
            self.count = sum(WAIT in str(warning.message) for warning in self._heard)


def loader(device: str, steps: int = STEPS, batch_size: int = 64, width: int = WIDTH) -> DataLoader:
    """Return batches that lie on the device."""
    data = TensorDataset(
        torch.randn(steps * batch_size, width, device=device),
        torch.randint(CLASSES, (steps * batch_size,), device=device),
    )
    # batches are slices: collating samples one by one would be all that is measured
    slices = [data[i : i + batch_size] for i in range(0, len(data), batch_size)]
    return DataLoader(slices, batch_size=None)


def trainer(device: str, callbacks: list[pl.Callback], **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator=device,
        devices=1,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def stack(folder: Path) -> list[pl.Callback]:
    """Return the whole stack for a loader that tells no batch size."""
    others = [callback for callback in whole(folder) if not isinstance(callback, GradientAccumulation)]
    return [GradientAccumulation(1), *others]


def waits_per_run(device: str, make: Callable[[Path], list[pl.Callback]], **settings: Any) -> int:
    """Return how often the host waited in the middle batches of a run."""
    waits = Waits(5, STEPS - 5)
    with tempfile.TemporaryDirectory() as name:
        callbacks = [*make(Path(name)), waits]
        trainer(device, callbacks, default_root_dir=name, **settings).fit(Classifier(), loader(device))
    return waits.count


def skipped_steps(device: str, *, init_scale: float = 2.0**40, **settings: Any) -> dict[str, int]:
    """Return what was counted in a run whose gradient scaler skips its first steps: its scale is too large."""
    module, ema = Classifier(), EMA(0.9)
    schedule = LearningRateScheduler(WarmupCosine(2, total=STEPS), record=True)
    fit = trainer(device, [ema, schedule], **settings)
    fit.precision_plugin.scaler = torch.amp.GradScaler(device, init_scale=init_scale, growth_interval=10**6)
    fit.fit(module, loader(device))
    return {
        "attempted": fit.global_step,
        "applied": module.applied,
        "EMA": int(ema.state_dict()["applied_steps"]),
        "rates": len(schedule.lrs),
    }


def run_batch(device: str, batch_size: int, width: int, *, limit: float | None = None) -> tuple[int | None, Tensor]:
    """Run one step; return the size of the pieces, ``None`` for a batch that fitted, and what the step did.

    Args:
        device: Where.
        batch_size: Samples of the batch.
        width: Units of the eight layers.
        limit: Bytes that the process may have of the device.
    """
    module, callback, data = Classifier(width, layers=8), MicroBatching(), loader(device, 1, batch_size, width)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    if limit is not None:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory)
    try:
        trainer(device, [callback], max_steps=1).fit(module, data)
    finally:
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)
    moved = [now.detach().cpu() - old for now, old in zip(module.parameters(), before, strict=True)]
    return callback.size_found, torch.cat([part.reshape(-1) for part in moved])


# --- what needs the device ---


def blocks(layers: int) -> nn.Module:
    """Return a module of 16.8 M parameters a layer, on the device."""
    return nn.ModuleList(nn.Linear(4096, 4096, device="cuda") for _ in range(layers))


def wall_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth(module: nn.Module, dtype: torch.dtype) -> tuple[float, float]:
    """Return the bytes per second that an update and a copy of the same weights move."""
    module = module.to(dtype)
    shadow, source = Shadow(module), flat(module)
    target = torch.empty_like(source)
    rates = []
    for run, size in (
        (lambda: shadow.update(0.999), source.numel() * (2 * 4 + dtype.itemsize)),
        (lambda: target.copy_(source), 2 * source.nbytes),
    ):
        run()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(20):
            run()
        end.record()
        end.synchronize()
        rates.append(20 * size / start.elapsed_time(end) * 1e3)
    return rates[0], rates[1]


def extra_megabytes(module: nn.Module, act: Callable[[Shadow], None]) -> float:
    """Return the peak of the device's memory beyond weights and average."""
    shadow = Shadow(perturbed(module))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    act(shadow)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def swap_twice(shadow: Shadow) -> None:
    shadow.update(0.999)
    shadow.swap_in()
    shadow.swap_out()


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def tables(layers: int, rounds: int) -> tuple[list[str], dict[str, Any]]:
    """Return the tables of times, a billion parameters in ``layers`` of 60."""
    found, texts = {}, []
    for name, methods in (("update", update_methods), ("update, bfloat16", half_methods), ("swap", swap_methods)):
        candidates = methods(blocks(layers))
        size = f"{layers * (4096 * 4096 + 4096) / 1e9:.2f} B in {2 * layers} tensors"
        with torch.no_grad():
            found[name] = interleaved(candidates, rounds=rounds, clock=wall_clock)
        texts.append(table(f"{name}, {size}", found[name], base=next(iter(candidates)), unit="ms"))
        del candidates
        release()
    return texts, found


def steps(rounds: int) -> tuple[str, dict[str, list[float]]]:
    """Return the table of a Trainer step of 16 M parameters, bare and with the whole stack."""
    data = loader("cuda", width=2048)

    def run(make: Callable[[Path], list[pl.Callback]]) -> None:
        with tempfile.TemporaryDirectory() as name:
            settings = {"precision": "bf16-mixed", "default_root_dir": name}
            trainer("cuda", make(Path(name)), **settings).fit(Classifier(2048), data)

    candidates = {"bare Trainer": partial(run, nothing), "the whole stack": partial(run, stack)}
    seconds = interleaved(candidates, rounds=rounds, clock=wall_clock)
    title = "A fit of 40 steps, 4 x Linear(2048, 2048), bf16-mixed, per step"
    return table(title, seconds, base="bare Trainer", per=STEPS), seconds


def nothing(folder: Path) -> list[pl.Callback]:
    return []


Bounds = dict[str, tuple[str, bool]]
"""What -> what was found, and whether it holds."""


def average_bounds(layers: int) -> Bounds:
    found: Bounds = {}
    for dtype in (torch.float32, torch.bfloat16):
        update, copy = bandwidth(blocks(layers), dtype)
        text = f"{update / 1e9:.0f} of {copy / 1e9:.0f} GB/s, {update / copy:.0%}"
        found[f"bandwidth of an update, {dtype}"] = (text, update >= LEAST_BANDWIDTH * copy)
        release()
    for name, dtype, act in (
        ("update and two swaps, float32", torch.float32, swap_twice),
        ("update, bfloat16", torch.bfloat16, lambda shadow: shadow.update(0.999)),
    ):
        extra = extra_megabytes(blocks(layers).to(dtype), act)
        found[f"memory beyond weights and average, {name}"] = (f"{extra:.1f} MB", extra <= MOST_MEGABYTES)
        release()
    return found


def step_bounds() -> Bounds:
    found: Bounds = {}
    for precision in ("bf16-mixed", "bf16-true", "16-mixed"):
        bare, ours = (waits_per_run("cuda", make, precision=precision) for make in (nothing, stack))
        holds = ours <= bare and (precision == "16-mixed" or ours == 0)
        found[f"waits in {STEPS - 9} steps, {precision}"] = (f"{ours}, bare Trainer {bare}", holds)
    counts = skipped_steps("cuda", precision="16-mixed")
    holds = counts["EMA"] == counts["applied"] < counts["attempted"] == counts["rates"]
    found["skipped steps, 16-mixed"] = (", ".join(f"{name} {count}" for name, count in counts.items()), holds)
    return found


def memory_bounds() -> Bounds:
    batch_size, width = 2**16, 2048
    _, ample = run_batch("cuda", batch_size, width)
    release()
    # the batch and the weights fit, the activations of eight layers and their gradients do not
    size, tight = run_batch("cuda", batch_size, width, limit=6 * 4 * batch_size * width + 1e9)
    off = float((tight - ample).abs().max() / ample.abs().max())
    text = f"{batch_size} samples in pieces of {size}, the step {off:.0e} from the whole batch's"
    return {'MicroBatching("auto"), out of memory': (text, 0 < (size or 0) < batch_size and off < 1e-3)}


def main(*, quick: bool = False) -> int:
    """Measure, print and keep; return 1 if a bound is missed."""
    if not torch.cuda.is_available():
        print("gpu: there is no CUDA device here, nothing was measured.")
        return 0
    quiet()
    room = torch.cuda.mem_get_info()[0]
    layers = 2 if quick else min(60, int(room / 40e9 * 60))  # 28 GB of weights and averages at 60, and some air
    texts, data = tables(layers, 2 if quick else 11)
    text, data["step"] = steps(2 if quick else 7)
    found = {**average_bounds(layers), **step_bounds(), **memory_bounds()}
    lines = ["### Bounds", "", "| | found | |", "|---|---|---|"]
    lines += [f"| {what} | {text} | {'' if holds else 'MISSED'} |" for what, (text, holds) in found.items()]
    device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {room / 1e9:.0f} GB free"
    whole_step = median(data["step"]["the whole stack"]) / median(data["step"]["bare Trainer"])
    data["bounds"] = {what: {"found": text, "holds": holds} for what, (text, holds) in found.items()}
    data["device"], data["ratio of a step"] = device, whole_step
    report("gpu", [device, *texts, text, "\n".join(lines)], data, keep=not quick)
    return int(not quick and not all(holds for _, holds in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
