"""What is on disk when the writing is cut short: the old file, the whole new one, or none."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_plugins import average_checkpoints
from lightning_plugins.core.files import replacing
from tests.support.checkpoints_models import assert_is_mean, float64_mean, load_state, write_files

ROOT = Path(__file__).parents[2]

# Every written part is announced and then waited upon, so that the parent kills in the middle of the file.
SLOW_WRITER = """
import sys, time
from lightning_plugins.checkpoints.formats import torch_writer as writing
from lightning_plugins.core import safetensors_file
from lightning_plugins import average_checkpoints

def slowed(method):
    def add(self, content):
        result = method(self, content)
        self._file.flush()
        print("part", flush=True)
        time.sleep(0.2)
        return result
    return add

writing.TorchArchive.add = slowed(writing.TorchArchive.add)
safetensors_file.SafetensorsWriter.add = slowed(safetensors_file.SafetensorsWriter.add)
average_checkpoints(sys.argv[2:], sys.argv[1], overwrite=True)
print("done", flush=True)
"""


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("exists", [True, False])
def test_kill_during_the_write_leaves_the_old_file_or_none(tmp_path, suffix, exists):
    paths = write_files(tmp_path, 2, big=lambda i: torch.randn(200_000))
    output = tmp_path / f"out{suffix}"
    if exists:
        output.write_text("the old file")
    command = [sys.executable, "-c", SLOW_WRITER, str(output), *map(str, paths)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "part\n"
        assert process.stdout.readline() == "part\n"
        assert any(path.stat().st_size for path in tmp_path.glob(f".{output.name}.*.tmp"))
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    if exists:
        assert output.read_text() == "the old file"
    else:
        assert not output.exists()
    average_checkpoints(paths, output, overwrite=exists)  # and the next try works
    if suffix == ".ckpt":
        assert_is_mean(load_state(output), float64_mean(paths))


def test_no_space_left_is_one_line_and_leaves_nothing(tmp_path):
    """The limit of file sizes stands in for a full disk: the write fails in the middle with an OSError."""
    paths = write_files(tmp_path, 2, big=lambda i: torch.randn(200_000))
    program = """
import resource, signal, sys
from lightning_plugins import average_checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
try:
    average_checkpoints(sys.argv[2:], sys.argv[1], overwrite=True)
except OSError as error:
    print(f"{type(error).__name__}: {error}")
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)  # what measures coverage writes later
"""
    for suffix in (".ckpt", ".safetensors"):
        output = tmp_path / f"out{suffix}"
        output.write_text("the old file")
        command = [sys.executable, "-c", program, str(output), *map(str, paths)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.startswith("OSError: [Errno 27] File too large")
        assert len(done.stdout.splitlines()) == 1
        assert done.stderr == ""
        assert output.read_text() == "the old file"
    assert not list(tmp_path.glob(".*"))


def cut_short(path: Path, error: BaseException) -> None:
    with replacing(path, overwrite=False) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_or_an_interrupt_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        cut_short(tmp_path / "x.ckpt", error)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(FileExistsError, match="exists"), replacing(tmp_path / "x", overwrite=False):
        (tmp_path / "x").write_text("theirs")
    assert (tmp_path / "x").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_file_gets_the_usual_permissions(tmp_path):
    output = average_checkpoints(write_files(tmp_path, 2), tmp_path / "out.ckpt")
    (tmp_path / "other").write_text("")
    assert output.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_memory_is_one_tensor_however_many_files_and_states(tmp_path):
    """Anonymous memory, which is what can run out, in a process of its own: three files of six 8 MB tensors."""
    paths = []
    for i in range(3):
        state = {f"w{k}": torch.randn(2_000_000) for k in range(6)}
        content = {
            "state_dict": state,
            "global_step": i,
            "optimizer_states": [{0: torch.ones(12_000_000)}],
        }
        torch.save(content, tmp_path / f"{i}.ckpt")
        paths.append(str(tmp_path / f"{i}.ckpt"))
    program = """
import sys, threading, time
from pathlib import Path
from lightning_plugins import average_checkpoints

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024

average_checkpoints(sys.argv[2:4], None if sys.argv[1] == "-" else sys.argv[1], overwrite=True, progress=False)
base, peak, stop = anonymous(), 0.0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
average_checkpoints(sys.argv[2:], None if sys.argv[1] == "-" else sys.argv[1], overwrite=True, progress=False)
stop = True
thread.join()
print(peak - base)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    peaks = {}
    for output in ("-", str(tmp_path / "out.ckpt"), str(tmp_path / "out.safetensors")):
        command = [sys.executable, "-c", program, output, *paths]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        peaks[output] = float(done.stdout)
    model = 6 * 8 * 1e6 / 2**20
    assert peaks["-"] < 1.25 * model
    assert peaks[str(tmp_path / "out.ckpt")] < 0.5 * model  # one of six tensors, and what Python needs
    assert peaks[str(tmp_path / "out.safetensors")] < 0.5 * model


def test_a_copied_checkpoint_needs_no_time_of_its_own(tmp_path):
    """Order is by the step inside, so that touching a file changes nothing."""
    paths = write_files(tmp_path, 2)
    time.sleep(0.01)
    paths[0].touch()
    assert average_checkpoints(paths)["count"].item() == 1
