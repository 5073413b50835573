"""Measuring side by side: candidates take turns in one process, and what counts is the ratio of their medians."""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "transformers", "timm", "ema-pytorch", "scikit-learn", "tensorboard")


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repeats: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Return seconds per call of each candidate, one number a round; the order rotates from round to round.

    The default clock counts this process's processor time, which other load on the machine disturbs least; pass
    ``time.perf_counter`` for work that waits or that other processes do.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for candidate in candidates.values():
        candidate()  # warm up
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            function = candidates[name]
            gc.collect()
            gc.disable()
            begin = clock()
            for _ in range(repeats):
                function()
            seconds[name].append((clock() - begin) / repeats)
            gc.enable()
    return seconds


def table(title: str, seconds: Mapping[str, list[float]], *, base: str, per: int = 1, unit: str = "us") -> str:
    """Return a Markdown table: median, spread (quartiles) and the ratio of medians to ``base``."""
    scale = {"us": 1e6, "ms": 1e3, "s": 1.0}[unit] / per
    reference = statistics.median(seconds[base])
    lines = [f"### {title}", "", f"| | median {unit} | quartiles | ratio |", "|---|---:|---:|---:|"]
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        lines.append(
            f"| {name} | {scale * middle:.3g} | {scale * low:.3g} to {scale * high:.3g} | {middle / reference:.2f} |"
        )
    return "\n".join(lines)


def report(name: str, tables: list[str], data: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Print the tables and keep them, with the raw numbers and the machine, under ``benchmarks/results/``."""
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    versions = {package: installed[package] for package in PACKAGES if package in installed}
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    head = f"{machine}; " + ", ".join(f"{package} {version}" for package, version in versions.items())
    text = "\n\n".join([f"# {name}", head, *tables]) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    kept = {"machine": machine, "versions": versions, "seconds": data}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
