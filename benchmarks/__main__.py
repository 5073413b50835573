"""``make bench``: every benchmark, or those named: ``make bench ARGS="schedules"``.

``--quick`` tries whether they run: tiny sizes, numbers that mean nothing, nothing written.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"__init__", "__main__", "harness", "scale_model"}


def names() -> list[str]:
    """Return every benchmark of this directory."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NOT_BENCHMARKS)


def main() -> int:
    """Run the benchmarks one after the other; return how many of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"out of {', '.join(names())}; none: all")
    parser.add_argument("--quick", action="store_true", help="only try whether they run")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(names())
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    chosen = arguments.names or [name for name in names() if name != "gpu" or torch.cuda.is_available()]
    failed, threads = 0, torch.get_num_threads()
    for name in chosen:
        begin = time.perf_counter()
        torch.set_num_threads(threads)  # each benchmark chooses its own number
        failed += bool(importlib.import_module(f"benchmarks.{name}").main(quick=arguments.quick))
        print(f"({name} took {time.perf_counter() - begin:.0f} s)\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
