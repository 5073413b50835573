"""Type checkers know every public name, argument and word: each wrong line below is an error, and no right one is."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import conditions
from tests.support.cases import PUBLIC
from tests.support.snippets import ROOT

# What is installed beside this package is not followed: minutes become seconds.
MYPY = """
[mypy]
strict = True
mypy_path = {root}
[mypy-lightning.*,lightning_fabric.*,lightning_utilities.*,pytorch_lightning.*,torch.*,torchmetrics.*,numpy.*,tensorboard.*]
follow_imports = skip
[mypy-fsspec.*,matplotlib.*,safetensors.*,sklearn.*,tqdm.*]
follow_imports = skip
ignore_missing_imports = True
"""
HEAD = """
from collections.abc import Callable
from typing import Any
import lightning_plugins as lp
optimizer: Any = None
"""
RIGHT = """
lp.EMA(0.9)
lp.EMA(lp.HalfLife(steps=100), evaluate="raw")
lp.EMA(lp.Cosine(None, 0.996, 1.0), start_step="95%", update_every_n_steps=0.01)
lp.EMA(lambda n: 1 - 1 / n)
lp.EMA(lp.HalfLife("2%"))
lp.LatestWeightAveraging(5, every="1ep", evaluate="raw")
lp.EventCallback(lambda loop, event: None, events=[lp.Event.BATCH_END, "epochEnd"])
lp.GradientAccumulation(4)
lp.GradientAccumulation(schedule={0: 1, 100: 4})
lp.LearningRateScheduler(lp.WarmupCosine("5%"), existing="replace", clock="applied")
lp.MicroBatching()
lp.MicroBatching("auto")
lp.MicroBatching(16)
lp.Plateau("val_loss", "max")
lp.StatisticsRecorder(["accuracy"], every="epoch")
lp.WarmupCosine(100, hold=0.1, total="2ep")
lp.WarmupStableDecay(warmup=10, decay="20%", shape="linear")
lp.WarmupCosineLR(optimizer, 10, 100, end_factor=0.1)
lp.WarmupCosineLR(optimizer, warmup="5%", total=100, end=0.1)
lp.NoamLR(optimizer, 512, warmup=4000)
warmup: lp.Duration = "5%"
lp.WarmupCosine(warmup)
lp.Segments([lp.Segment(end=1, steps=10), lp.Segment("cosine", end=0)])
lp.PiecewiseConstant([100, "80%"], [1.0, 0.5, 0.1])
lp.Plateau("val_loss", mode="max")
listen: Callable[[lp.TrainingLoop, lp.Event], None] = lambda loop, event: print(loop.batch_index)
lp.EventCallback(listen)
lp.extract_weights("last.ckpt", "raw")
schedule: lp.Schedule = lp.Linear(10, 0, 1) * lp.Constant(0.5)
rate: float = schedule(3)
"""
WRONG = """
lp.Ema
lp.ema.Emma
from lightning_plugins import WarmupCosin
from lightning_plugins.events import EventCallbak
lp.EMA("often")
lp.EMA(decays=0.9)
lp.EMA(evaluate="both")
lp.EMA(len)
lp.EMA(start_step=None)
lp.WarmupCosineLR(optimizer, 10)
lp.WarmupCosineLR(optimizer, warmup="5%", total="2ep")
lp.NoamLR(optimizer, 512)
lp.LatestWeightAveraging("5")
lp.LatestWeightAveraging(evaluate="both")
lp.EventCallback(3)
lp.CSVStatisticsLogger(every="minute")
lp.TensorBoardStatisticsLogger(axis="minutes")
number: int = lp.Linear(10, 0, 1)
lp.WarmupCosine(warm=5)
lp.WarmupCosine()
lp.WarmupCosine([5])
lp.WarmupStableDecay(10)
lp.WarmupStableDecay(10, 5, shape="cos")
lp.OneCycle(shape="square")
lp.Linear(10, 0)
lp.Segment("linear", 0)
lp.Segment()
lp.Plateau()
lp.Plateau("val_loss", mode="maximum")
lp.LearningRateScheduler()
lp.MicroBatching("automatic")
lp.LearningRateScheduler(lp.Constant(), existing="replce")
lp.LearningRateScheduler(lp.Constant(), clock="both")
lp.extract_weights("last.ckpt", "both")
lp.greedy_soup([], len, "maximum")
"""


def lines(text):
    return text.strip().splitlines()


def errors_of_mypy(folder):
    """Return line number -> message."""
    pytest.importorskip("mypy")
    (folder / "mypy.ini").write_text(MYPY.format(root=ROOT))
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", ".cache", "lines.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert not done.stderr, done.stderr
    found = re.findall(r"^(\S+):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    assert {name for name, _, _ in found} <= {"lines.py"}, done.stdout
    return {int(line): message for _, line, message in found}, done.stdout


def errors_of_pyright(folder):
    beside = Path(sys.executable).parent
    names = ("pyright", "basedpyright")
    command = next((found for name in names if (found := shutil.which(name, path=beside) or shutil.which(name))), None)
    if command is None:
        pytest.skip(f"{conditions.NEEDS}the package pyright or basedpyright")
    configuration = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)], "include": ["lines.py"]}
    (folder / "pyrightconfig.json").write_text(json.dumps(configuration))
    command = [command, "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [each for each in found if each["severity"] == "error"]
    shown = "\n".join(each["message"] for each in found if each["severity"] == "information")
    return {each["range"]["start"]["line"] + 1: each["message"] for each in errors}, shown


@pytest.fixture(scope="module", params=[errors_of_mypy, errors_of_pyright], ids=["mypy", "pyright"])
def checked(request, tmp_path_factory):
    """The lines, what a checker finds wrong by line number, and what it shows of every public name."""
    folder = tmp_path_factory.mktemp("lines")
    shown = [f"reveal_type(lp.{name})" for name in sorted(PUBLIC)]
    written = [*lines(HEAD), *lines(RIGHT), *lines(WRONG), *shown]
    (folder / "lines.py").write_text("\n".join(written) + "\n")
    return written, *request.param(folder)


def test_wrong_lines_are_errors_and_right_ones_are_not(checked):
    written, errors, _ = checked
    assert [written[line - 1] for line in sorted(errors)] == lines(WRONG), errors


def test_hovering_over_a_name_shows_what_it_is(checked):
    _, _, shown = checked
    revealed = re.findall(r"(?:Revealed type is|Type of) (.*)", shown)
    assert len(revealed) == len(PUBLIC)
    assert [name for name, text in zip(sorted(PUBLIC), revealed, strict=True) if "Any" in text.split("(")[0]] == []
    unclear = [
        name for name, text in zip(sorted(PUBLIC), revealed, strict=True) if name not in text and "->" not in text
    ]
    assert unclear in ([], ["Duration"])  # shown as what it stands for
