"""Measuring side by side: candidates take turns in one process, and what counts is the ratio of their medians."""

import gc
import importlib
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
Seconds = dict[str, list[float]]
"""Candidate -> what it took, one number a round."""

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "transformers", "timm", "ema-pytorch", "scikit-learn", "tensorboard")
SCALES = {"us": 1e6, "ms": 1e3, "s": 1.0}


def turns(candidates: Mapping[str, Callable[[], Result]], *, rounds: int) -> dict[str, list[Result]]:
    """Return what each candidate returned, one result a round; the order rotates from round to round."""
    names = list(candidates)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for candidate in candidates.values():
        candidate()  # warm up
    gc.freeze()  # what is there stays: collecting then takes no time
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            gc.disable()
            results[name].append(candidates[name]())
            gc.enable()
    gc.unfreeze()
    return results


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repeats: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> Seconds:
    """Return seconds per call of each candidate.

    The default clock counts this process's processor time, which other load on the machine disturbs least; pass
    ``time.perf_counter`` for work that waits or that other processes do.
    """

    def timed(function: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            begin = clock()
            for _ in range(repeats):
                function()
            return (clock() - begin) / repeats

        return run

    return turns({name: timed(function) for name, function in candidates.items()}, rounds=rounds)


def table(title: str, seconds: Mapping[str, list[float]], *, base: str, per: int = 1, unit: str = "us") -> str:
    """Return a Markdown table: median, spread (quartiles) and the ratio of medians to ``base``."""
    scale = SCALES[unit] / per
    reference = statistics.median(seconds[base])
    lines = [f"### {title}", "", f"| | median {unit} | quartiles | ratio |", "|---|---:|---:|---:|"]
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        lines.append(
            f"| {name} | {scale * middle:.3g} | {scale * low:.3g} to {scale * high:.3g} | {middle / reference:.2f} |"
        )
    return "\n".join(lines)


def why_absent(module: str) -> str | None:
    """Return why a peer's module cannot be imported, ``None`` if it can; peers are optional, all of them."""
    try:
        importlib.import_module(module)
    except (
        ImportError,
        RuntimeError,
        AttributeError,
    ) as error:  # timm needs torchvision, which has no build everywhere
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def absentees(modules: Mapping[str, str]) -> list[str]:
    """Return a paragraph about the peers that are not in the tables, none if all are.

    Args:
        modules: Peer -> the module that has to be imported.
    """
    missing = [f"{peer} ({why})" for peer, module in modules.items() if (why := why_absent(module)) is not None]
    return ["Not importable here: " + "; ".join(missing) + "."] if missing else []


def quiet() -> None:
    """Silence what Lightning says at every fit."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning_utilities", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def report(name: str, tables: list[str], data: Mapping[str, Any], *, keep: bool = True) -> None:
    """Print the tables and keep them, with the raw numbers and the machine, under ``benchmarks/results/``.

    Args:
        name: The benchmark's name.
        tables: Markdown.
        data: The raw numbers behind them.
        keep: Whether to write files; a trial does not.
    """
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    versions = {package: installed[package] for package in PACKAGES if package in installed}
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    head = f"{machine}; " + ", ".join(f"{package} {version}" for package, version in versions.items())
    text = "\n\n".join([f"# {name}", head, *tables]) + "\n"
    print(text)
    if not keep:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    kept = {"machine": machine, "versions": versions, "seconds": data}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
