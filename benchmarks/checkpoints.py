"""Checkpoint averaging: time and memory beside the peers' ways, as ratios.

``make bench ARGS=checkpoints``, or ``python benchmarks/checkpoints.py --mb 405 --rounds 5 --folder DIR``.

Every way runs in a process of its own on the same files in the page cache, in turn, round after round. Printed are
medians; the floor is reading the bytes that must be read. Memory is the peak of anonymous memory, which is what can run
out: pages of mapped files can be given back. The peers' ways are written out here as their programs do it, since none
of them is a library that could be imported.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Way = Callable[[list[str]], object]


def write_checkpoints(folder: Path, count: int, megabytes: float, *, optimizer: bool, width: int = 768) -> list[Path]:
    """Write Lightning checkpoints of a transformer-like model with as many parameters."""
    blocks = max(1, round((megabytes * 1e6 / 4 - 20_000 * width) / (12 * width * width)))
    shapes = {"embedding.weight": (20_000, width)}
    for block in range(blocks):
        for name, shape in {"qkv": (3, 1), "out": (1, 1), "up": (4, 1), "down": (1, 4)}.items():
            shapes[f"blocks.{block}.{name}.weight"] = (shape[0] * width, shape[1] * width)
            shapes[f"blocks.{block}.{name}.bias"] = (shape[0] * width,)
    paths = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        content = {"state_dict": state, "global_step": i, "epoch": i, "pytorch-lightning_version": "2.6.6"}
        if optimizer:
            moments = {k: {"exp_avg": t.clone(), "exp_avg_sq": t.clone()} for k, t in enumerate(state.values())}
            content["optimizer_states"] = [{"state": moments, "param_groups": []}]
        path = folder / f"{'full' if optimizer else 'weights'}-{i}.ckpt"
        torch.save(content, path)
        paths.append(path)
    return paths


# --- the ways ---


def read_bytes(paths: list[str]) -> None:
    """The floor: read every byte once, into one buffer."""
    buffer = memoryview(bytearray(1 << 20))
    for path in paths:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123  # unbuffered
            while file.readinto(buffer):
                pass


def ours(paths: list[str]) -> object:
    from lightning_plugins import average_checkpoints
    from lightning_plugins.checkpoints.formats import open_checkpoint
    from lightning_plugins.checkpoints.streaming_mean import CheckpointMean

    if len(paths) == 1:  # which average_checkpoints refuses
        return CheckpointMean([open_checkpoint(paths[0], trust=False)]).state_dict()
    return average_checkpoints(paths, progress=False)


def ours_float32(paths: list[str]) -> object:
    from lightning_plugins import average_checkpoints

    return average_checkpoints(paths, dtype=torch.float32, progress=False)


def ours_to_ckpt(paths: list[str]) -> object:
    from lightning_plugins import average_checkpoints

    return average_checkpoints(paths, Path(paths[0]).parent / "mean.ckpt", overwrite=True, progress=False)


def ours_to_safetensors(paths: list[str]) -> object:
    from lightning_plugins import average_checkpoints

    return average_checkpoints(paths, Path(paths[0]).parent / "mean.safetensors", overwrite=True, progress=False)


def load_all(paths: list[str]) -> object:
    """The usual loop: load every file, add, divide."""
    states = [torch.load(path, map_location="cpu", weights_only=True)["state_dict"] for path in paths]
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def load_all_and_save(paths: list[str]) -> object:
    mean = load_all(paths)
    torch.save({"state_dict": mean}, Path(paths[0]).parent / "mean.ckpt")
    return mean


def fairseq(paths: list[str]) -> object:
    """One file after the other, cloned, added up, divided at the end."""
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        for name, tensor in state.items():
            total[name] = total[name] + tensor if name in total else tensor.clone()
    return {name: tensor / len(paths) for name, tensor in total.items()}


def timm(paths: list[str]) -> object:
    """Sums in float64, results in float32."""
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        for name, tensor in state.items():
            if name in total:
                total[name] += tensor.double()
            else:
                total[name] = tensor.double()
    return {name: (tensor / len(paths)).float() for name, tensor in total.items()}


def running_mean(paths: list[str]) -> object:
    """OpenNMT-py: a running mean in the tensors' own dtype."""
    mean: dict[str, torch.Tensor] = {}
    for number, path in enumerate(paths):
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        for name, tensor in state.items():
            if number:
                mean[name].mul_(number).add_(tensor).div_(number + 1)
            else:
                mean[name] = tensor
    return mean


FLOOR, USUAL = "read the bytes (floor)", "load all, add, divide (usual)"
# the default adds in float64 and rounds once
OURS = "ours, float64"
PEERS = ["fairseq's way", "timm's way", "OpenNMT-py's way"]
WAYS: dict[str, Way] = {
    FLOOR: read_bytes,
    OURS: ours,
    "ours, float32": ours_float32,
    USUAL: load_all,
    "fairseq's way": fairseq,
    "timm's way": timm,
    "OpenNMT-py's way": running_mean,
    "ours -> .ckpt": ours_to_ckpt,
    "ours -> .safetensors": ours_to_safetensors,
    "load all -> torch.save": load_all_and_save,
}


# --- measuring ---


def anonymous_megabytes() -> float:
    """Return the memory that can run out: pages of mapped files are not among it."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


def warmed(way: str, folder: Path) -> Way:
    """Return a way whose imports and first calls are behind it."""
    small = [str(folder / f"small-{i}.ckpt") for i in range(2)]
    for path in small:
        torch.save({"state_dict": {"w": torch.zeros(8)}}, path)
    function = WAYS[way]
    function(small)
    return function


def time_of(way: str, paths: list[str]) -> float:
    function = warmed(way, Path(paths[0]).parent)
    begin = time.perf_counter()
    kept = function(paths)
    seconds = time.perf_counter() - begin
    del kept
    return seconds


def memory_of(way: str, paths: list[str]) -> float:
    """Return the peak above what the process had before; watching costs time, so this is a run of its own."""
    function = warmed(way, Path(paths[0]).parent)
    base, peak, stop = anonymous_megabytes(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, anonymous_megabytes())

    thread = threading.Thread(target=watch)
    thread.start()
    kept = function(paths)
    peak = max(peak, anonymous_megabytes())
    stop.set()
    thread.join()
    del kept
    return peak - base


def here(what: str, way: str, paths: list[Path]) -> float:
    """Measure in this process, to see whether a way runs at all."""
    return (time_of if what == "time" else memory_of)(way, [str(path) for path in paths])


def in_a_process(what: str, way: str, paths: list[Path]) -> float:
    command = [sys.executable, "-m", "benchmarks.checkpoints", what, way, *map(str, paths)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=600)
    return float(done.stdout.splitlines()[-1])


def compare(
    title: str,
    ways: list[str],
    paths: list[Path],
    rounds: int,
    *,
    memory: bool = True,
    measure: Callable[[str, str, list[Path]], float] = in_a_process,
) -> tuple[str, dict[str, list[float]]]:
    """Return one table, in Markdown, and its seconds."""
    seconds: dict[str, list[float]] = {way: [] for way in [FLOOR, *ways]}
    for path in paths:
        read_bytes([str(path)])  # into the page cache
    for _ in range(rounds):
        for way, found in seconds.items():
            found.append(measure("time", way, paths))
    size = paths[0].stat().st_size / 1e6
    floor, usual = (statistics.median(seconds[way]) for way in (FLOOR, USUAL if USUAL in seconds else ways[-1]))
    lines = [f"### {title}: {len(paths)} files of {size:.0f} MB, {rounds} rounds, warm page cache", ""]
    lines += [
        "| | median s | fastest to slowest | x floor | x usual | anonymous MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for way, found in seconds.items():
        middle = statistics.median(found)
        peak = f"{measure('memory', way, paths):.0f}" if memory else ""
        spread = f"{min(found):.3f} to {max(found):.3f}"
        lines.append(f"| {way} | {middle:.3f} | {spread} | {middle / floor:.2f} | {middle / usual:.2f} | {peak} |")
        print(lines[-1], flush=True)
    return "\n".join(lines), seconds


def main(
    *, quick: bool = False, megabytes: float = 405.0, rounds: int = 5, width: int = 768, folder: Path | None = None
) -> None:
    from benchmarks.harness import report

    if quick:
        megabytes, rounds, width = 0.7, 1, 8
    tables, data = [], {}
    measure = here if quick else in_a_process

    def add(title: str, *arguments: Any, **options: Any) -> None:
        text, seconds = compare(title, *arguments, measure=measure, **options)
        tables.append(text)
        data[title] = seconds

    with tempfile.TemporaryDirectory(dir=folder) as name:
        paths = write_checkpoints(Path(name), 8, megabytes, optimizer=False, width=width)
        add("Load and average", [OURS, "ours, float32", USUAL, *PEERS], paths[:5], rounds)
        add("To a file", ["ours -> .ckpt", "ours -> .safetensors", "load all -> torch.save"], paths[:5], rounds)
        for count in (1, 2, 4, 8):
            add(f"{count} input{'s' if count > 1 else ''}", [OURS, USUAL], paths[:count], min(rounds, 3), memory=False)
        for path in paths:
            path.unlink()
        full = write_checkpoints(Path(name), 5, megabytes, optimizer=True, width=width)
        add("With Adam states", [OURS, "ours -> .ckpt", USUAL, "fairseq's way"], full, rounds)
    report("checkpoints", tables, data, keep=not quick)


if __name__ == "__main__":
    if sys.argv[1:2] in (["time"], ["memory"]):
        print({"time": time_of, "memory": memory_of}[sys.argv[1]](sys.argv[2], sys.argv[3:]))
    else:
        parser = argparse.ArgumentParser(description="Checkpoint averaging beside the peers' ways.")
        parser.add_argument("--mb", type=float, default=405.0, help="size of one file of weights, in MB")
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--folder", type=Path, default=None, help="where to write the files")
        options = parser.parse_args()
        main(megabytes=options.mb, rounds=options.rounds, folder=options.folder)
