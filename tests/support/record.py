"""What a run of the suite was and how it ended, as JSON: a row of docs/compatibility.md is made from it.

`pytest --record docs/compatibility/NAME.json` writes it.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.support.snippets import ROOT

PACKAGES = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "tensorboard", "numpy", "jsonargparse")
COUNTED = ("passed", "failed", "error", "skipped", "xfailed")


_BEGAN = time.time()


def write(path: Path, stats: dict[str, list[Any]]) -> None:
    """Write what pytest's terminal reporter counted.

    Args:
        path: The JSON file.
        stats: Outcome -> reports.
    """
    skipped = Counter(_reason(report) for report in stats.get("skipped", ()))
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "counts": {outcome: len(stats.get(outcome, ())) for outcome in COUNTED},
        "skipped": dict(sorted(skipped.items())),
        "inside": _inside(stats),
        "seconds": round(time.time() - _BEGAN),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def _inside(stats: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Return the libraries inside which tests ran, by name: their versions, and how many tests ended how."""
    ran = {outcome: Counter(_client(report) for report in stats.get(outcome, ())) for outcome in COUNTED}
    clients = sorted({client for counts in ran.values() for client in counts if client})
    return {
        client: {"version": _version(client), **{outcome: counts[client] for outcome, counts in ran.items()}}
        for client in clients
    }


def _client(report: Any) -> str:
    """Return the library that a test is of, which its file or folder is named for; an empty text for none."""
    found = re.match(r"tests/(?:clients/\w+/test_(\w+)\.py|(deepspeed)/)", report.nodeid)
    return (found[1] or found[2]).replace("_", "-") if found else ""


def _reason(report: Any) -> str:
    """Return why a test was skipped; a package that `importorskip` did not find is one that the test needs."""
    said = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return re.sub(r"^could not import '(\w+)[\w.]*'.*", r"needs the package \1", said, flags=re.DOTALL)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Return the commit that was run, with a ``+`` when a tracked file differs from it."""
    try:
        commit = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/compatibility*")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
