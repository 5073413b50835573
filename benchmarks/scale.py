"""How every technique grows: constants measured at two sizes, checked at two others, then put to a large cluster.

Fails when a prediction is more than a fifth off. What is measured is one core of this machine, the least processor time
of several rounds, which other load can only lengthen; what is assumed of a cluster is in ``scale_model.Cluster`` and
printed. Collectives over many hosts cannot be measured here, so their latency is an assumption too.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.checkpoints import OURS as AVERAGING, anonymous_megabytes, in_a_process, ours, warmed, write_checkpoints
from benchmarks.ema import many_small, perturbed, transformer
from benchmarks.harness import interleaved, quiet, report, turns
from benchmarks.logging_cost import rows
from benchmarks.scale_model import (
    SHADOW,
    Cluster,
    Line,
    Plane,
    accumulation_seconds,
    averaging_memory,
    averaging_seconds,
    ema_memory,
    ema_update_seconds,
    fit_plane,
    gather_latency,
    gather_memory,
    gather_seconds,
    largest_file,
    largest_replica,
    solve,
    statistics_seconds,
    step_seconds,
    tensors,
)
from benchmarks.whole_stack import BARE, OURS, fitting, stacks
from lightning_plugins.ema.shadow import Shadow
from lightning_plugins.statistics.csv_file import CSVFile, number_cells

TOLERANCE = 0.2
ROWS_TOGETHER = 512  # so many wait for each other on several ranks


@dataclasses.dataclass(frozen=True)
class Check:
    """A prediction beside its measurement."""

    what: str
    size: str
    predicted: float
    measured: float
    unit: str

    @property
    def off(self) -> float:
        return self.predicted / self.measured - 1 if self.measured else math.inf

    @property
    def holds(self) -> bool:
        return abs(self.off) <= TOLERANCE


# --- measuring: each returns a model made at two or three sizes, and checks at two others ---


def equal_tensors(count: int, elements: int) -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.randn(elements)) for _ in range(count)])


def sizes_of(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return len(parameters), sum(p.numel() for p in parameters)


def check_ema(*, quick: bool) -> tuple[dict[str, Line], list[Check]]:
    """Updates and swaps: a constant per tensor and one per parameter; memory of the shadows."""
    small = 50 if quick else 1
    made: list[Callable[[], nn.Module]] = [
        partial(many_small, 1000 // small),  # large and tiny tensors in turn, as layers have them
        partial(equal_tensors, 20, 1_000_000 // small),
        partial(transformer, 8) if quick else transformer,
        partial(many_small, 1500 // small),
    ]
    modules = [perturbed(make()) for make in made]
    before = anonymous_megabytes()
    shadows, grown = [], []
    for module in modules:
        shadows.append(Shadow(module))
        after = anonymous_megabytes()
        grown.append((after - before) * 1e6)
        before = after

    def swap(shadow: Shadow) -> None:
        shadow.swap_in()
        shadow.swap_out()

    lines, checks = {}, []
    for name, act in (("update", lambda shadow: shadow.update(0.999)), ("two swaps", swap)):
        candidates = {str(i): partial(act, shadow) for i, shadow in enumerate(shadows)}
        with torch.no_grad():
            seconds = interleaved(candidates, rounds=2 if quick else 15)
        cost = [min(values) for values in seconds.values()]
        shapes = [sizes_of(module) for module in modules]
        line = lines[name] = solve((*shapes[0], cost[0]), (*shapes[1], cost[1]))
        for shape, took in zip(shapes[2:], cost[2:], strict=True):
            size = f"{shape[1] / 1e6:.0f} M in {shape[0]} tensors"
            checks.append(Check(f"EMA, {name}", size, 1e3 * line(*shape), 1e3 * took, "ms"))
    for module, found in zip(modules[2:], grown[2:], strict=True):
        count, elements = sizes_of(module)
        predicted = ema_memory(elements, 1, weight_bytes=4) / 1e6
        checks.append(Check("EMA, memory", f"{elements / 1e6:.0f} M in {count} tensors", predicted, found / 1e6, "MB"))
    return lines, checks


def check_averaging(folder: Path, *, quick: bool) -> tuple[Plane, float, list[Check]]:
    """Averaging files in the page cache; what streaming holds in memory."""
    if quick:
        points, others, width = [(2, 0.7), (4, 0.7), (2, 1.4)], [(3, 1.0), (3, 1.4)], 8
    else:
        points, others, width = [(2, 80.0), (6, 80.0), (2, 400.0)], [(5, 160.0), (4, 320.0)], 768
    files: dict[float, list[Path]] = {}
    for size in {size for _, size in points + others}:
        place = folder / f"{size:.1f}"
        place.mkdir()
        files[size] = write_checkpoints(place, _most(points + others, size), size, optimizer=False, width=width)
    warmed(AVERAGING, folder)

    def average(count: int, size: float) -> Callable[[], float]:
        paths = [str(path) for path in files[size][:count]]

        def run() -> float:
            begin = time.process_time()
            kept = ours(paths)
            seconds = time.process_time() - begin
            del kept
            return seconds

        return run

    found = turns({f"{k} x {size}": average(k, size) for k, size in points + others}, rounds=2 if quick else 7)
    cost = {key: min(values) for key, values in found.items()}

    def weights(size: float) -> float:
        return float(files[size][0].stat().st_size)

    plane = fit_plane([(k, weights(size), cost[f"{k} x {size}"]) for k, size in points])
    checks = [
        Check(
            "checkpoint averaging, processor time",
            f"{k} files of {weights(size) / 1e6:.0f} MB",
            1e3 * plane(k, weights(size)),
            1e3 * cost[f"{k} x {size}"],
            "ms",
        )
        for k, size in others
    ]
    if quick:
        return plane, 64e6, checks
    buffer = in_a_process("memory", "ours -> .ckpt", files[80.0][:2])
    for k, size in others:
        name = f"{k} files of {weights(size) / 1e6:.0f} MB"
        held = in_a_process("memory", "ours -> .ckpt", files[size][:k])
        checks.append(Check("checkpoint averaging to a file, memory", name, buffer, held, "MB"))
    return plane, buffer * 1e6, checks


def _most(points: list[tuple[int, float]], size: float) -> int:
    return max(count for count, other in points if other == size)


def check_rows(folder: Path, *, quick: bool) -> tuple[Line, list[Check]]:
    """CSV rows, 500 written at a time."""
    block, path = [number_cells(row) for row in rows(500)], folder / "log.csv"

    def write(size: int) -> None:
        path.unlink(missing_ok=True)
        file = CSVFile(path)
        for _ in range(0, size, 500):
            file.add(block)
        file.close()

    sizes = [2_000, 20_000, 5_000, 100_000][: 3 if quick else 4]
    seconds = interleaved({str(size): partial(write, size) for size in sizes}, rounds=2 if quick else 9)
    line = solve((1, sizes[0], min(seconds["2000"])), (1, sizes[1], min(seconds["20000"])))
    checks = [
        Check("CSV rows", f"{size:,} rows", 1e3 * line(1, size), 1e3 * min(seconds[str(size)]), "ms")
        for size in sizes[2:]
    ]
    return line, checks


def check_steps(*, quick: bool) -> tuple[float, list[Check]]:
    """The whole stack: a constant per step, however long the run is."""
    lengths = (20, 10, 30) if quick else (800, 400, 1600)
    made = stacks()
    with tempfile.TemporaryDirectory() as name:
        fits = {f"{steps}": fitting(made[OURS], steps, Path(name) / str(steps)) for steps in lengths}
        fits[BARE] = fitting(made[BARE], lengths[0], Path(name) / BARE)
        found = turns(fits, rounds=2 if quick else 15)
    took = {title: min(step for step, _ in pairs) for title, pairs in found.items()}
    first = took[f"{lengths[0]}"]
    checks = [
        Check("whole stack", f"{steps} steps", 1e3 * first * steps, 1e3 * took[f"{steps}"] * steps, "ms")
        for steps in lengths[1:]
    ]
    return first - took[BARE], checks


# --- predicting ---


def table_of_checks(checks: list[Check]) -> str:
    lines = [f"### Predicted and measured (at most {TOLERANCE:.0%} off)", ""]
    lines += ["| | size | predicted | measured | off | |", "|---|---|---:|---:|---:|---|"]
    for check in checks:
        numbers = f"{check.predicted:.4g} {check.unit} | {check.measured:.4g} {check.unit} | {check.off:+.0%}"
        lines.append(f"| {check.what} | {check.size} | {numbers} | {'' if check.holds else 'WRONG'} |")
    return "\n".join(lines)


def assumptions(cluster: Cluster, per_step: float) -> str:
    values = ", ".join(f"{field.name} {getattr(cluster, field.name):.3g}" for field in dataclasses.fields(cluster))
    return (
        f"Assumed of the cluster, in bytes, seconds and operations: {values}; weights and gradients in bfloat16, "
        f"sharded by FSDP2 over all ranks; {12 * 24} tensors at 1 B parameters. Measured: the host's "
        f"{1e6 * per_step:.0f} us of the whole stack per step, which do not depend on parameters or ranks."
    )


def at_scale(cluster: Cluster, plane: Plane, buffer: float, per_step: float) -> str:
    lines = ["### At scale", ""]
    lines.append(
        "| parameters | ranks | step s | EMA MB a rank | update, share of a step | statistics and accumulation, share "
        "| rank 0's host while saving GB | gather s | average of 5 files s | MB a reader |"
    )
    lines.append("|---:|---:|" + "---:|" * 8)
    for parameters in (1e9, 1e10, 1e11, 1e12):
        for ranks in (1, 8, 128, 1024, 16_384):
            if 16 * parameters / ranks > cluster.device_memory:
                continue  # the model itself does not fit
            step = step_seconds(parameters, cluster)
            waits = statistics_seconds(per_step, ROWS_TOGETHER, ranks, cluster) + accumulation_seconds(ranks, cluster)
            lines.append(
                f"| {parameters / 1e9:,.0f} B | {ranks:,} | {step:.3g} | {ema_memory(parameters, ranks) / 1e6:,.3g} "
                f"| {ema_update_seconds(parameters, ranks, cluster) / step:.1e} | {waits / step:.1e} "
                f"| {gather_memory(parameters) / 1e9:,.0f} | {gather_seconds(parameters, ranks, cluster):.3g} "
                f"| {averaging_seconds(plane, parameters, 5, ranks, cluster):,.0f} "
                f"| {averaging_memory(parameters, ranks, buffer) / 1e6:,.0f} |"
            )
    return "\n".join(lines)


def first_to_break(cluster: Cluster, plane: Plane, buffer: float) -> str:
    """Return, in words, what fails first on the way to 1 T parameters and 16,384 ranks."""
    parameters, ranks = 1e12, 16_384
    host = gather_memory(parameters)
    one = averaging_seconds(plane, parameters, 5, 1, cluster)
    written = (2 + SHADOW) * parameters / cluster.disk
    return (
        "### What would break first\n\n"
        f"The file of a run. A checkpoint with both sets of weights is one file that rank 0 holds whole: at 1 T "
        f"parameters {host / 1e12:.0f} TB of host memory (Lightning's own full state dict with Adam's moments is "
        f"larger still), so with {cluster.host_memory / 1e12:.0f} TB it ends at {largest_file(cluster) / 1e9:,.0f} B "
        f"parameters. Lightning's distributed checkpoints are the way out: every rank writes its shares of both sets. "
        f"In one file, next is time: bringing both sets to one place takes "
        f"{gather_seconds(parameters, ranks, cluster):.0f} s, of which "
        f"{gather_latency(parameters, ranks, cluster):.1f} s are the latency of "
        f"{2 * tensors(parameters):,} collectives, and writing it {written / 60:,.0f} minutes, with {ranks:,} ranks "
        f"waiting. Averaging five such files takes one process {one / 3600:.1f} hours ({ranks:,} readers "
        f"{averaging_seconds(plane, parameters, 5, ranks, cluster) / 60:.0f} minutes, all but the disks of the one "
        f"that writes idle). What runs in every step does not break: the average's share of a rank is "
        f"{ema_memory(parameters, ranks) / 1e6:.0f} MB, its update "
        f"{1e6 * ema_update_seconds(parameters, ranks, cluster):.0f} us, exact accumulation adds one sum of one number "
        f"({1e6 * accumulation_seconds(ranks, cluster):.0f} us), statistics one small sum every {ROWS_TOGETHER} rows. "
        f"Under DDP the average's 4 bytes on top of Adam's 16 end at {largest_replica(cluster) / 1e9:.0f} B parameters "
        f'on one {cluster.device_memory / 1e9:.0f} GB device (EMA(device="cpu") moves them to the host). A process '
        f"that streams an average of files needs {buffer / 1e6:.0f} MB whatever their size."
    )


def main(*, quick: bool = False) -> int:
    """Measure, check, predict; return 1 if a prediction is wrong."""
    torch.set_num_threads(1)
    quiet()
    cluster = Cluster()
    with tempfile.TemporaryDirectory() as name:
        lines, checks = check_ema(quick=quick)
        plane, buffer, more = check_averaging(Path(name), quick=quick)
        row, others = check_rows(Path(name), quick=quick)
        per_step, last = check_steps(quick=quick)
    checks += more + others + last
    constants = {name: dataclasses.asdict(line) for name, line in {**lines, "average": plane, "row": row}.items()}
    tables = [
        table_of_checks(checks),
        assumptions(cluster, per_step),
        at_scale(cluster, plane, buffer, per_step),
        first_to_break(cluster, plane, buffer),
    ]
    data = {
        "constants": {**constants, "buffer": buffer, "per_step": per_step},
        "checks": [dataclasses.asdict(check) for check in checks],
        "cluster": dataclasses.asdict(cluster),
    }
    report("scale", tables, data, keep=not quick)
    return int(not quick and not all(check.holds for check in checks))


if __name__ == "__main__":
    raise SystemExit(main())
