"""A file that would run code when it is unpickled: whoever reads it with this package runs nothing, and says so."""

import io
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_plugins import average_checkpoints, extract_weights, greedy_soup, select_checkpoints, synthesize_ema
from lightning_plugins.checkpoints import CheckpointError
from lightning_plugins.ema.snapshots import SnapshotContents, write_snapshot
from tests.support import counts
from tests.support.audit_events import code_run, listening, outside
from tests.support.damage import bounded
from tests.support.damaged_cases import command, write_whole_files

pytestmark = pytest.mark.filterwarnings("ignore::lightning_plugins.core.validation.LightningPluginsWarning")
MARKER = "pwned"


class Call:
    """Becomes a call when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evils(marker):
    """Return what would write the file ``marker``, by name; each in another way."""
    text = f"__import__('pathlib').Path({str(marker)!r}).write_text('x')"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, text),
        "exec": Call(exec, text),
        "open": Call(open, str(marker), "w"),
        "pathlib": Call(Path.touch, Path(marker)),
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "pickle in a pickle": Call(pickle.loads, pickle.dumps(Call(exec, text))),
        "torch.load": Call(torch.load, str(marker)),
        "getattr": Call(getattr, "x", "upper"),
        "builtin of torch": Call(torch.hub.load, "nowhere", "nothing"),
        "numpy": Call(np.save, str(marker), 1),
    }


def checkpoint(evil):
    return {"state_dict": {"w": torch.ones(2)}, "global_step": 1, "callbacks": {"x": evil}, "hyper_parameters": evil}


def archive(content, folder="archive"):
    """The bytes of a zip file as torch reads it, with any pickle inside."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr(f"{folder}/data.pkl", content)
        zipped.writestr(f"{folder}/version", "3\n")
        zipped.writestr(f"{folder}/byteorder", "little")
    return file.getvalue()


def as_archive(evil):
    file = io.BytesIO()
    torch.save(checkpoint(evil), file)
    return file.getvalue()


def as_legacy(evil):
    file = io.BytesIO()
    torch.save(checkpoint(evil), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def as_plain_pickle(evil):
    return pickle.dumps(checkpoint(evil)["callbacks"])


def as_other_zip(evil):
    return archive(pickle.dumps({"state_dict": {}, "x": evil}), folder="../../outside")


def as_tar(evil):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("storages", "tensors", "pickle", "../../pwned"):
            content = pickle.dumps(evil)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def as_first_object(evil):
    """Old files begin with pickled numbers, which are read before anything is checked."""
    return pickle.dumps(evil) + pickle.dumps(1001) + pickle.dumps({"state_dict": {}})


FORMATS = [as_archive, as_legacy, as_plain_pickle, as_other_zip, as_tar, as_first_object]


@pytest.fixture
def good(tmp_path):
    folder = tmp_path / "good"
    folder.mkdir()
    write_whole_files(folder)
    return folder


def read_everywhere(path, good, folder):
    """Yield what every reader makes of a file."""
    yield lambda: average_checkpoints([path, good / "1.ckpt"])
    yield lambda: average_checkpoints([good / "1.ckpt", path], folder / "out.ckpt", overwrite=True, strict=False)
    yield lambda: greedy_soup([path], lambda state: 1.0)
    yield lambda: select_checkpoints(path.parent)
    yield lambda: select_checkpoints(path.parent, best=1)
    yield lambda: extract_weights(path, "raw")
    yield lambda: extract_weights(path)
    yield lambda: command("inspect", path)
    yield lambda: command("average", path, good / "1.ckpt", "--output", folder / "out.ckpt", "--overwrite")
    yield lambda: command("average", path.parent, "--last", 2, "--dry-run")
    yield lambda: command("extract", path, "--weights", "raw", "--output", folder / "out.pt")


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_no_pickle_is_run(tmp_path, good, form, record_property):
    marker, tried = tmp_path / MARKER, 0
    for name, evil in evils(marker).items():
        folder = tmp_path / "evil"
        folder.mkdir(exist_ok=True)
        path = folder / "1.ckpt"
        path.write_bytes(form(evil))
        for read in read_everywhere(path, good, tmp_path):
            assert harm(read, tmp_path) == [], name
            assert not marker.exists(), name
            tried += 1
    counts.record(record_property, "hostile inputs", {"malicious pickles": tried})


def harm(read, folder):
    """Read; return what ran besides torch's own lazy imports, what was written elsewhere, and errors of many lines."""
    said = ""
    with listening() as events:
        try:
            read()
        except FileNotFoundError:
            pass
        except ValueError as error:
            said = str(error)
    bad = [event for event in code_run(events) if event[0] not in ("exec", "import", "marshal.loads")]
    bad += [event for event in events if event[0] == "pickle.find_class" and event[1][0] in ("os", "posix", "builtins")]
    bad += outside(events, folder)
    if len(said.splitlines()) > 1:
        bad.append(said)
    return bad


@pytest.mark.parametrize("place", [".metadata", "__0_0.distcp", "meta.pt"])
def test_no_pickle_of_a_sharded_directory_is_run(tmp_path, good, place):
    marker, path = tmp_path / MARKER, good / "sharded"
    for name, evil in evils(marker).items():
        for form in FORMATS if place != ".metadata" else [as_plain_pickle, pickle.dumps]:
            (path / place).write_bytes(form(evil))
            for read in (
                lambda: average_checkpoints([path, good / "1.ckpt"], strict=False),
                lambda: select_checkpoints(good),
                lambda: command("average", path, good / "1.ckpt", "--output", tmp_path / "o.ckpt", "--overwrite"),
            ):
                assert harm(read, tmp_path) == [], name
                assert not marker.exists(), name


@pytest.mark.parametrize("place", ["step=0000000005.pt", "frozen.pt", "step=0000000005.safetensors"])
def test_no_pickle_of_a_snapshot_is_run(tmp_path, place):
    marker, path = tmp_path / MARKER, tmp_path / "snapshots"
    for name, evil in evils(marker).items():
        for form in FORMATS:
            write_snapshot(path, 10, [0.05], SnapshotContents([{"w": torch.ones(2)}], {}))
            (path / place).write_bytes(form(evil))
            assert harm(lambda: synthesize_ema(path, 0.05), tmp_path) == [], name
            with pytest.raises(ValueError, match=r"`dirpath` must hold snapshots"):
                synthesize_ema(path, 0.05)
            assert not marker.exists(), name


def test_what_is_refused_is_named_and_trust_runs_it(tmp_path, good):
    """The documented difference: ``trust=True`` loads what the file names, and only then does it run."""
    marker, path = tmp_path / MARKER, tmp_path / "1.ckpt"
    path.write_bytes(as_archive(evils(marker)["exec"]))
    with pytest.raises(CheckpointError, match=r"it names .*exec.* pass trust=True \(--trust on the command line\)"):
        average_checkpoints([path, good / "1.ckpt"], strict=False)
    with pytest.raises(ValueError, match=r"error: .* trust=True"):
        command("average", path, good / "1.ckpt", "--output", tmp_path / "o.ckpt")
    assert not marker.exists()
    with pytest.raises(CheckpointError, match="differ"):
        average_checkpoints([path, good / "1.ckpt"], trust=True)
    assert marker.exists()


def test_a_pickle_that_never_ends_or_eats_memory_is_refused(tmp_path, good):
    """Opcodes that a hand has put together: a length of an exabyte, memo numbers out of range, endless nesting."""
    pickles = [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
        b"\x80\x02j" + struct.pack("<I", 2**32 - 1) + b".",
        b"\x80\x02K\x01r" + struct.pack("<I", 2**31) + b".",
        b"\x80\x02K\x01r" + struct.pack("<I", 2**27) + b".",
        b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b".",
        b"\x80\x02]" + b"]a" * 50_000 + b".",
        b"\x80\x02" + b"\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x.",
        b"",
        b".",
        b"\x80\xff.",
    ]
    path = tmp_path / "1.ckpt"
    for number, content in enumerate(pickles):
        for data in (content, archive(content)):
            path.write_bytes(data)
            for read in (lambda: average_checkpoints([path, good / "1.ckpt"]), lambda: select_checkpoints(tmp_path)):
                with bounded():
                    assert harm(read, tmp_path) == [], number
            (good / "sharded" / ".metadata").write_bytes(data)
            with pytest.raises(CheckpointError), bounded():
                average_checkpoints([good / "sharded", good / "1.ckpt"])


def test_the_ear_hears():
    """The proof of the proof: what the tests above look for is heard when it happens."""
    with listening() as events:
        eval("1 + 1")  # noqa: S307
        pickle.loads(pickle.dumps(Call(os.system, "true")))
    names = [name for name, _ in events]
    assert {"exec", "os.system", "pickle.find_class"} <= set(names)
    assert [name for name, _ in code_run(events)].count("os.system") == 1
