"""Every benchmark runs, at sizes that mean nothing, and keeps no numbers of such a trial."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch

from benchmarks import __main__ as command, harness
from tests.support import conditions


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return command.main()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=conditions.ema_weight_averaging if name in {"ema", "real_models", "whole_stack"} else ()
        )
        for name in command.names()
        if name != "gpu"
    ],
)
def test_a_benchmark_runs(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert run(monkeypatch, name, "--quick") == 0
    printed = capsys.readouterr().out
    assert f"# {name}\n" in printed
    assert "|---|" in printed
    assert f"({name} took " in printed
    assert not list(tmp_path.iterdir())


def test_without_names_all_run_but_the_one_for_gpus_where_there_is_none(monkeypatch):
    ran = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def main(self, *, quick):
            ran.append((self.name, quick))

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Fake(name.removeprefix("benchmarks.")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch) == 0
    assert ran == [(name, False) for name in command.names() if name != "gpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ran.clear()
    run(monkeypatch, "--quick")
    assert ran == [(name, True) for name in command.names()]


def test_a_benchmark_that_fails_fails_the_command(monkeypatch):
    class Failing:
        main = staticmethod(lambda *, quick: 1)

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Failing)
    assert run(monkeypatch, "schedules", "ema") == 2


def test_an_unknown_name_is_refused_with_those_there_are(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "shedules")
    assert "no benchmark is called shedules; there are accumulation," in capsys.readouterr().err


def test_candidates_take_turns_and_the_order_rotates():
    seen = []
    candidates = {name: lambda name=name: seen.append(name) or name.upper() for name in "abc"}
    assert harness.turns(candidates, rounds=3) == {"a": ["A"] * 3, "b": ["B"] * 3, "c": ["C"] * 3}
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab"


def test_a_table_has_medians_quartiles_and_ratios():
    text = harness.table("Title", {"one": [1e-6] * 3, "two": [2e-6, 3e-6, 4e-6]}, base="one")
    assert "| two | 3 | 2 to 4 | 3.00 |" in text


def test_results_are_kept_as_json_and_markdown(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    harness.report("trial", ["### A table"], {"numbers": {"one": [1.0]}})
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["trial.json", "trial.md"]
    assert "### A table" in (tmp_path / "results" / "trial.md").read_text()
    assert f"torch {metadata.version('torch')}" in (tmp_path / "results" / "trial.md").read_text()


def test_a_peer_that_is_not_there_is_named_with_the_reason():
    assert harness.absentees({"the standard library": "json"}) == []
    (text,) = harness.absentees({"Nobody": "no_such_module_at_all", "json": "json"})
    assert text == "Not importable here: Nobody (ModuleNotFoundError: No module named 'no_such_module_at_all')."


@pytest.mark.slow
def test_checkpoints_can_be_measured_in_processes_of_their_own(tmp_path):
    files = [tmp_path / f"{name}.ckpt" for name in "ab"]
    for file in files:
        torch.save({"state_dict": {"w": torch.zeros(8)}}, file)
    command_line = [sys.executable, "-m", "benchmarks.checkpoints", "time", "ours, float64", *map(str, files)]
    done = subprocess.run(command_line, capture_output=True, text=True, check=True, cwd=harness.RESULTS.parents[1])
    assert 0 < float(done.stdout.splitlines()[-1]) < 600
