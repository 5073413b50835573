"""Damaged checkpoints, snapshots and logs: one clear error, or the numbers; never a crash, a hang or gigabytes.

``TORTURE=1`` in the environment tries ten thousand, the gate a tenth of that.
"""

import json
import shutil
import struct

import pytest
import torch

from lightning_plugins import average_checkpoints, extract_weights, select_checkpoints, synthesize_ema
from lightning_plugins.checkpoints import CheckpointError
from lightning_plugins.statistics.plot import plot_log
from tests.support import counts
from tests.support.audit_events import code_run, listening, outside
from tests.support.damage import CASES, bounded, damage
from tests.support.damaged_cases import SUBJECTS, uses, write_whole_files

pytestmark = pytest.mark.filterwarnings("ignore::lightning_plugins.core.validation.LightningPluginsWarning")
SEEDS = -(-CASES // len(SUBJECTS))
PARTS = 5  # so that workers can share a format


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_whole_files(folder)
    return folder


def place(whole, folder, subject, content):
    """Put a damaged copy into an empty ``folder``; return what is to be read."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out").mkdir(parents=True)
    first, _, inner = SUBJECTS[subject].partition("/")
    if inner:
        shutil.copytree(whole / first, folder / first)
    (folder / SUBJECTS[subject]).write_bytes(content)
    return folder / first


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_damaged_file_is_one_clear_error_or_the_numbers(whole, tmp_path, record_property, subject, part):
    content = (whole / SUBJECTS[subject]).read_bytes()
    refused, seeds = 0, range(part, SEEDS, PARTS)
    for seed in seeds:
        damaged, what = damage(content, seed)
        path = place(whole, tmp_path / "damaged", subject, damaged)
        errors = [error for name, use in uses(subject, path, whole) if (error := outcome(use, tmp_path, (name, what)))]
        refused += bool(errors)
    counts.record(record_property, "hostile inputs", {"damaged files": len(seeds)})
    assert refused > len(seeds) // 8  # the damage is seen, and seen often


def outcome(use, folder, about):
    """Return the message of the error that is raised, if any; whatever happens, no code runs and no path leaves."""
    message = None
    with listening() as events, bounded():
        try:
            use()
        except (ValueError, OSError) as error:
            message = f"{type(error).__name__}: {error}"
    assert outside(events, folder) == [], about
    assert [event for event in code_run(events) if event[0] not in ("exec", "import", "marshal.loads")] == [], about
    if message is not None:
        assert message.startswith(("CheckpointError: ", "NoStateDictError: ", "ValueError: ", "FileNotFoundError: ")), (
            about,
            message,
        )
        assert len(message.splitlines()) == 1, (about, message)
        assert len(message) < 1200, (about, message)
        assert str(folder) in message or "`" in message or "checkpoints" in message, (about, message)
    return message


@pytest.mark.parametrize("subject", SUBJECTS)
def test_an_undamaged_file_works(whole, tmp_path, subject):
    content = (whole / SUBJECTS[subject]).read_bytes()
    path = place(whole, tmp_path / "copied", subject, content)
    good = [name for name, use in uses(subject, path, whole) if outcome(use, tmp_path, name) is None]
    assert good


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_log_is_drawn_or_refused(whole, tmp_path, seed):
    path = tmp_path / "log.csv"
    path.write_bytes(damage((whole / "log.csv").read_bytes(), seed)[0])
    outcome(lambda: plot_log(path), tmp_path, seed)


# Files that lie: what random damage seldom makes.

TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS = {
    "a header of an exabyte": (2**60, {}),
    "a header longer than the file": (10_000, {"w": TENSOR}),
    "a tensor of a terabyte": (None, {"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}),
    "sizes whose product overflows": (None, {"w": {**TENSOR, "shape": [2**62, 2**62]}}),
    "sizes of 5000 digits": (None, '{"w": {"dtype": "F32", "data_offsets": [0, 16], "shape": [' + "9" * 5000 + "]}}"),
    "a negative size": (None, {"w": {**TENSOR, "shape": [-2, -2]}}),
    "sizes that are texts": (None, {"w": {**TENSOR, "shape": ["4"]}}),
    "no sizes": (None, {"w": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "a dtype that is a list": (None, {"w": {**TENSOR, "dtype": ["F32"]}}),
    "a tensor before the beginning": (None, {"w": {**TENSOR, "data_offsets": [-8, 8]}}),
    "a tensor of negative length": (None, {"w": {**TENSOR, "shape": [0], "data_offsets": [16, 0]}}),
    "an entry that is a number": (None, {"w": 5}),
    "metadata that are a list": (None, {"__metadata__": ["x"], "w": TENSOR}),
    "metadata that are numbers": (None, {"__metadata__": {"global_step": 5, "checkpoint_averaging": 7}, "w": TENSOR}),
    "a list": (None, []),
    "lists inside each other": (None, "[" * 100_000),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, name):
    length, header = HEADERS[name]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path, good = tmp_path / "lies.safetensors", tmp_path / "good.ckpt"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(16))
    torch.save({"w": torch.ones(4)}, good)
    with bounded():
        with pytest.raises(CheckpointError, match=r"lies\.safetensors"):
            average_checkpoints([path, good])
        outcome(lambda: select_checkpoints(tmp_path), tmp_path, name)
        outcome(lambda: extract_weights(path), tmp_path, name)


def test_a_compressed_archive_is_not_unpacked_to_be_looked_at(tmp_path):
    """A few kilobytes can hold gigabytes of zeros; torch itself writes no compressed archive."""
    import zipfile

    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w") as file:
        for _ in range(64):
            file.write(bytes(2**20))
    with pytest.raises(CheckpointError, match=r"bomb\.ckpt cannot be read .*data\.pkl is compressed"):
        select_checkpoints(tmp_path)


@pytest.mark.parametrize("change", ["step", "version", "sigma_rels", "averages", "names", "shape", "tied", "twice"])
def test_a_snapshot_that_lies_is_refused(tmp_path, change):
    for step in (5, 10):
        content = {"version": 1, "step": step, "sigma_rels": [0.05, 0.1], "tied": {}, "rest": {}}
        content["averages"] = [{"w": torch.ones(2)}, {"w": torch.ones(2)}]
        if step == 5:
            lies = {
                "step": {"step": 7},
                "version": {"version": 2},
                "sigma_rels": {"sigma_rels": "0.05"},
                "averages": {"averages": [torch.ones(2)] * 2},
                "names": {"averages": [{"w": torch.ones(2)}, {"v": torch.ones(2)}]},
                "shape": {"averages": [{"w": torch.ones(3)}] * 2},
                "tied": {"tied": {"v": "u"}},
                "twice": {"sigma_rels": [0.1, 0.1]},
            }
            content.update(lies[change])
        torch.save(content, tmp_path / f"step={step:010d}.pt")
    with pytest.raises(ValueError, match=r"`dirpath`|`snapshots`|A snapshot"):
        synthesize_ema(tmp_path, 0.08)
