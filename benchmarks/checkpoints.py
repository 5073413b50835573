"""Checkpoint averaging: time and memory beside the peers' ways, as ratios.

    python benchmarks/checkpoints.py [--mb 405] [--rounds 5] [--folder DIR]

Every way runs in a process of its own on the same files in the page cache, in turn, round after round. Printed are
medians; the floor is reading the bytes that must be read. Memory is the peak of anonymous memory, which is what can run
out: pages of mapped files can be given back. The peers' ways are written out here as their programs do it, since none
of them is a library that could be imported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

Ways = dict[str, Callable[[list[str]], object]]


def write_checkpoints(folder: Path, count: int, megabytes: float, *, optimizer: bool) -> list[Path]:
    """Write Lightning checkpoints of a transformer-like model with as many parameters."""
    width = 768
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

    return average_checkpoints(paths, progress=False)


def ours_float64(paths: list[str]) -> object:
    from lightning_plugins import average_checkpoints

    return average_checkpoints(paths, dtype=torch.float64, progress=False)


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


WAYS: Ways = {
    "read the bytes (floor)": read_bytes,
    "ours": ours,
    "ours, float64": ours_float64,
    "load all, add, divide": load_all,
    "fairseq's way": fairseq,
    "timm's way": timm,
    "OpenNMT-py's way": running_mean,
}
WRITING: Ways = {
    "ours -> .ckpt": ours_to_ckpt,
    "ours -> .safetensors": ours_to_safetensors,
    "load all -> torch.save": load_all_and_save,
}


# --- measuring ---


def anonymous_megabytes() -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024 * 1.048576


def measure(way: str, paths: list[str]) -> tuple[float, float]:
    """Return seconds and the peak of anonymous memory in MB, above what the process had before."""
    function = {**WAYS, **WRITING}[way]
    small = Path(paths[0]).parent / "small.ckpt"
    other = small.with_name("small2.ckpt")
    for path in (small, other):
        torch.save({"state_dict": {"w": torch.zeros(8)}}, path)
    function([str(small), str(other)])  # imports and first calls
    base, peak, stop = anonymous_megabytes(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, anonymous_megabytes())

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.perf_counter()
    kept = function(paths)
    seconds = time.perf_counter() - begin
    stop.set()
    thread.join()
    del kept
    return seconds, max(peak, base) - base


def in_a_process(way: str, paths: list[Path]) -> tuple[float, float]:
    command = [sys.executable, __file__, "--child", way, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, megabytes


def table(title: str, ways: Ways, paths: list[Path], rounds: int, floor: float | None = None) -> float:
    """Print one table and return the floor in seconds."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for path in paths:
        path.read_bytes()  # into the page cache
    for _ in range(rounds):
        for way in ways:
            found[way].append(in_a_process(way, paths))
    floor = floor or statistics.median(seconds for seconds, _ in found["read the bytes (floor)"])
    usual = next((w for w in ways if w.startswith("load all")), None)
    reference = statistics.median(seconds for seconds, _ in found[usual]) if usual else float("nan")
    size = paths[0].stat().st_size / 1e6
    print(f"\n{title}: {len(paths)} files of {size:.0f} MB, {rounds} rounds, warm page cache")
    print(f"{'':26}{'s':>8}{'spread':>15}{'x floor':>9}{'x usual':>9}{'anon MB':>9}{'x file':>8}")
    for way, pairs in found.items():
        times = sorted(seconds for seconds, _ in pairs)
        middle, memory = statistics.median(times), max(megabytes for _, megabytes in pairs)
        spread = f"{times[0]:.2f}-{times[-1]:.2f}"
        ratios = f"{middle / floor:>9.2f}{middle / reference:>9.2f}{memory:>9.0f}{memory / size:>8.2f}"
        print(f"{way:26}{middle:>8.3f}{spread:>15}{ratios}", flush=True)
    return floor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=405.0, help="size of one file of weights, in MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write the files (a temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        paths = write_checkpoints(folder, 8, options.mb, optimizer=False)
        table("Weights only", WAYS, paths[:5], options.rounds)
        table("To a file", {"read the bytes (floor)": read_bytes, **WRITING}, paths[:5], options.rounds)
        print("\nTime over the number of files")
        few = {way: WAYS[way] for way in ("read the bytes (floor)", "ours", "load all, add, divide")}
        for count in (2, 4, 8):
            table(f"{count} files", few, paths[:count], min(options.rounds, 3))
        for path in paths:
            path.unlink()
        full = write_checkpoints(folder, 5, options.mb, optimizer=True)
        table("With Adam states", {**few, "fairseq's way": fairseq}, full, options.rounds)


def child(arguments: list[str]) -> None:
    print(json.dumps(measure(arguments[0], arguments[1:])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
