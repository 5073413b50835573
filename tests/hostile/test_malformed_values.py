"""Files whose values are not what their names say, and names that a terminal would act upon: one printable line each.

``TORTURE=1`` in the environment tries every value in every place with every command; the gate some hundred, each with
one of the commands.
"""

import contextlib
import io
import random
import warnings

import pytest
import torch

from lightning_plugins import select_checkpoints
from lightning_plugins.cli import main
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support import counts
from tests.support.damage import bounded
from tests.support.damaged_cases import checkpoint, write_whole_files
from tests.support.other_values import NASTY, ODD, places, replaced


def run(*arguments):
    """Run a command; return its status, and what it said in lines, all of which can be printed."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors), warnings.catch_warnings():
        warnings.simplefilter("ignore", LightningPluginsWarning)
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
    assert status in (0, 2)
    lines = errors.getvalue().splitlines() if status else said.getvalue().splitlines()
    assert status == 0 or len(lines) == 1, lines
    assert all(line.isprintable() for line in lines), lines
    assert status == 0 or errors.getvalue().count("\n") == 1
    assert "weights_only" not in errors.getvalue()
    return status, lines


def commands(path, other, folder):
    output = folder / "out.ckpt"
    yield "inspect", path
    yield "inspect", path, "--json"
    yield "extract", path, "--weights", "raw", "--overwrite", "--output", folder / "raw.safetensors"
    yield "extract", path, "--weights", "average", "--name", "slow", "--overwrite", "--output", folder / "out.pt"
    yield "average", path, other, "--dry-run"
    yield "average", path, other, "--overwrite", "--output", output
    yield "average", path.parent, "--last", "2", "--dry-run"


def test_any_value_in_any_place_of_a_checkpoint_is_one_line_or_no_matter(tmp_path, record_property):
    content = checkpoint(1) | {
        "checkpoint_averaging": {
            "version": 1,
            "files": [{"path": "a.ckpt", "step": 1, "weight": 0.5}],
            "weights": "raw",
        },
        "lightning_plugins_posthoc_ema": {"PostHocEMA": [{"weight": torch.ones(4, 3)}]},
        "current_model_state": {"weight": torch.ones(4, 3)},
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }
    everywhere = [(path, value) for path in places(content) for value in ODD]
    random.Random(counts.seed()).shuffle(everywhere)
    cases = everywhere[: counts.wanted(210, 10_000)]
    folder, out = tmp_path / "files", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    torch.save(checkpoint(2), folder / "2.ckpt")
    refused = 0
    for number, (path, value) in enumerate(cases):
        # a file has one of the three records
        whole = dict(content)
        for key in random.Random(len(path)).sample(
            ["checkpoint_averaging", "lightning_plugins_ema", "averaging_state"], 2
        ):
            if path[:1] != (key,):
                whole.pop(key)
        torch.save(replaced(whole, path, value), folder / "1.ckpt")
        of_all = list(commands(folder / "1.ckpt", folder / "2.ckpt", out))
        for command in of_all if counts.TORTURE else [of_all[number % len(of_all)]]:
            with bounded(30, 1):
                refused += run(*command)[0] == 2
    counts.record(record_property, "hostile inputs", {"values in a checkpoint": len(cases)})
    assert refused > len(cases) // 10


def test_any_value_in_any_place_of_a_snapshot_is_one_line_or_no_matter(tmp_path, record_property):
    tensors = {"w": torch.ones(2)}
    content = {"version": 1, "step": 5, "sigma_rels": [0.05], "tied": {"t": "w"}, "averages": [tensors], "rest": {}}
    everywhere = [(path, value) for path in places(content) for value in ODD]
    cases = everywhere[: counts.wanted(100, 10_000)]
    for path, value in cases:
        torch.save(replaced(content, path, value), tmp_path / "step=0000000005.pt")
        with bounded(30, 1):
            run("synthesize", tmp_path, "--sigma-rel", "0.07", "--overwrite", "--output", tmp_path / "out.pt")
    counts.record(record_property, "hostile inputs", {"values in a snapshot": len(cases)})


def test_names_of_files_reach_no_terminal_as_they_are(tmp_path):
    for step in (1, 2, 3):
        torch.save(checkpoint(step), tmp_path / f"{step}{NASTY.replace('/', '')}.ckpt")
    torch.save({"w": torch.ones(1)}, tmp_path / f"none{NASTY}.pt")
    (tmp_path / f"damaged{NASTY}.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / f"log{NASTY}.csv").write_text(f"epoch,batch,{NASTY!r}\n1,1,x\n")
    files = sorted(tmp_path.glob("[123]*"))
    for command in (
        ("average", tmp_path, "--dry-run"),
        ("average", *files, "--dry-run"),
        ("average", *files, "--output", tmp_path / f"out{NASTY}.ckpt"),
        ("inspect", files[0]),
        ("inspect", tmp_path),
        ("plot", tmp_path / f"log{NASTY}.csv"),
        ("extract", files[0], "--weights", "average", "--name", NASTY, "--output", tmp_path / "x.pt"),
        ("extract", files[0], "--weights", "raw", "--output", tmp_path / f"y{NASTY}.pt"),
        ("schedule", f"Linear('{NASTY}', 0, 1)", "--total", "9"),
        ("schedule", f"Linear{NASTY}", "--total", "9"),
        (NASTY,),
        ("plot", NASTY),
    ):
        run(*command)
    (tmp_path / f"damaged{NASTY}.pt").unlink()
    with pytest.warns(LightningPluginsWarning) as caught:
        select_checkpoints(tmp_path)
    assert all(str(warning.message).isprintable() for warning in caught)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory:\nframe #0")])
def test_memory_that_is_not_there_is_one_line(tmp_path, monkeypatch, error):
    write_whole_files(tmp_path)

    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch, "zeros", full)
    status, lines = run("average", tmp_path / "1.ckpt", tmp_path / "2.ckpt", "--output", tmp_path / "out.ckpt")
    assert status == 2
    assert "memory" in lines[0]
    assert not (tmp_path / "out.ckpt").exists()
