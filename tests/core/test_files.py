"""Files are written completely or not at all, keep their modes, follow no planted link, and places are probed."""

import os
import signal
import stat
import tempfile
import time
from pathlib import Path

import pytest

from lightning_plugins.core.append_only_file import AppendOnlyFile
from lightning_plugins.core.files import check_output, free_name, move_aside, replace_file, replacing
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.temporary_files import remove_abandoned
from lightning_plugins.core.writable import check_writable


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o444, 0o604])
def test_a_replaced_file_keeps_its_mode(tmp_path, permissions):
    path = tmp_path / "log.csv"
    path.write_text("old")
    path.chmod(permissions)
    replace_file(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", permissions)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_a_new_file_has_the_mode_that_any_new_file_has(tmp_path, mask):
    before = os.umask(mask)
    try:
        replace_file(tmp_path / "new", b"")
        AppendOnlyFile(tmp_path / "appended").close()
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == mode(tmp_path / "appended") == 0o666 & ~mask


def test_a_private_file_is_private_before_its_first_byte(tmp_path):
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o600)
    with replacing(path, overwrite=True) as file:
        file.write(b"new")
        (temporary,) = [entry for entry in tmp_path.iterdir() if entry != path]
        assert mode(temporary) == 0o600


def test_the_temporary_name_cannot_be_known_before_and_links_stay_unfollowed(tmp_path):
    """Two writers of one name use different names; a link at the target is replaced, and what it leads to stays."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "out"
    path.symlink_to(victim)
    names = set()
    for _ in range(2):
        with replacing(path, overwrite=True) as file:
            file.write(b"new")
            names |= {entry.name for entry in tmp_path.iterdir()} - {"victim", "out"}
    assert len(names) == 2
    assert victim.read_text() == "precious"
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()


@pytest.fixture
def left(tmp_path):
    """What a writer that was killed left, after a look at the directory while it was alive."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with replacing(tmp_path / "log.csv", overwrite=True):
            os.write(told, b"!")
            time.sleep(60)
        os._exit(1)
    try:
        os.read(ready, 1)
        (temporary,) = tmp_path.iterdir()
        check_writable("path", aged(temporary, 10**6).with_name("log.csv"))
        assert temporary.exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return temporary


def aged(path, seconds):
    """Let a file be written last so many seconds ago."""
    os.utime(path, (0, time.time() - seconds))
    return path


@pytest.mark.parametrize("directory", [False, True])
def test_what_a_killed_writer_left_is_removed_when_the_next_run_is_set_up(left, directory):
    aged(left, 5)
    check_writable("path", left.parent if directory else left.with_name("log.csv"), directory=directory)
    assert left.exists()
    aged(left, 11)
    check_writable("path", left.parent if directory else left.with_name("log.csv"), directory=directory)
    assert not left.exists()


def test_of_another_machine_whose_locks_may_not_be_seen_it_is_removed_later(left):
    other = left.rename(left.with_name(f".log.csv.{'0' * 24}.tmp"))
    assert remove_abandoned(aged(other, 3500).parent) == []
    assert remove_abandoned(aged(other, 3700).parent) == [other]


def test_only_our_own_files_are_removed(tmp_path):
    token = "0123456789abcdef01234567"
    kept = [
        ".log.csv.tmp",
        f"log.csv.{token}.tmp",
        f".log.csv.{token[:-1]}g.tmp",
        f".log.csv.{token}.tmp~",
        f".{token}.tmp",
    ]
    for name in kept:
        (tmp_path / name).touch()
        aged(tmp_path / name, 10**6)
    (tmp_path / f".link.{token}.tmp").symlink_to(tmp_path / kept[0])
    (tmp_path / f".folder.{token}.tmp").mkdir()
    os.mkfifo(tmp_path / f".pipe.{token}.tmp")
    for kind in ("folder", "pipe"):
        aged(tmp_path / f".{kind}.{token}.tmp", 10**6)
    before, opened = sorted(tmp_path.iterdir()), len(list(Path("/proc/self/fd").iterdir()))
    assert remove_abandoned(tmp_path) == remove_abandoned(tmp_path / "nowhere") == []
    assert sorted(tmp_path.iterdir()) == before
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_a_link_to_nothing_is_not_written_through(tmp_path):
    path, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    path.symlink_to(elsewhere)
    with pytest.raises(FileExistsError):
        check_output(path, overwrite=False)
    with pytest.raises(OSError, match="exists"):
        AppendOnlyFile(path)
    with pytest.raises(
        MisconfigurationException, match=r"`path` must be .* it is a link to a file that does not exist"
    ):
        check_writable("path", path)
    replace_file(path, b"new")
    assert not elsewhere.exists()
    path.unlink()
    path.symlink_to(elsewhere)
    assert free_name(tmp_path / "x").name == "x.1"
    assert move_aside(path).is_symlink()
    assert not elsewhere.exists()


def test_a_pipe_is_refused_at_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="pipe"):
        AppendOnlyFile(path)
    with pytest.raises(OSError, match="pipe"):
        replace_file(path, b"new")
    with pytest.raises(MisconfigurationException, match="it is a device or a pipe"):
        check_writable("output", path)
    with pytest.raises(OSError, match="pipe"):
        AppendOnlyFile(Path("/dev/zero"))
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("directory", [False, True])
def test_places_that_cannot_be_written_are_refused_by_the_users_argument_and_path(tmp_path, directory):
    (tmp_path / "file").write_text("")
    kind = "directory that can be written to" if directory else "file that can be written"
    for bad in ("file/below", "file/deep/below", "n" * 300 + "/x", *([] if directory else ["."])):
        with pytest.raises(MisconfigurationException) as caught:
            check_writable("where", tmp_path / bad, directory=directory)
        assert str(caught.value).startswith(f"`where` must be a {kind}, got '{tmp_path / bad}': ")
        assert len(str(caught.value).splitlines()) == 1
    before = sorted(tmp_path.rglob("*"))
    check_writable("where", tmp_path / "new" / "deep" / "below", directory=directory)
    check_writable("where", "relative/below", directory=directory)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the rights of root, which it lowers")
def test_a_directory_without_rights_is_refused():
    # not below pytest's own, which is this user's alone
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o555)
        os.seteuid(65534)
        try:
            with pytest.raises(MisconfigurationException) as caught:
                check_writable("root", Path(name) / "tensorboard", directory=True)
        finally:
            os.seteuid(0)
    assert str(caught.value) == (
        f"`root` must be a directory that can be written to, got '{name}/tensorboard': Permission denied."
    )


def test_an_append_only_file_knows_whether_its_path_still_leads_to_it(tmp_path):
    file = AppendOnlyFile(tmp_path / "log")
    file.append([b"before"])
    assert (file.is_in_place, file.is_deleted, file.size) == (True, False, 6)
    (tmp_path / "log").rename(tmp_path / "moved")
    assert (file.is_in_place, file.is_deleted, file.read()) == (False, False, b"before")
    (tmp_path / "log").write_bytes(b"another")
    assert (file.is_in_place, file.is_deleted) == (False, False)
    (tmp_path / "moved").unlink()
    assert (file.is_in_place, file.is_deleted, file.read()) == (False, True, b"before")
    file.close()


@pytest.mark.parametrize("room", range(0, 40, 3))
def test_an_append_only_file_keeps_whole_records(tmp_path, room):
    records = [bytes([65 + number]) * (number + 1) for number in range(8)]
    file = AppendOnlyFile(tmp_path / "log")
    file.append([b"before"])
    handle, left = file._handle, [room]

    class Disk:
        def fileno(self):
            return handle.fileno()

        def write(self, data):
            taken = min(len(data), left[0])
            if not taken:
                raise OSError(28, "No space left on device")
            left[0] -= taken
            return handle.write(data[:taken])

    file._handle = Disk()
    texts = [b"before" + b"".join(records[:count]) for count in range(9)]
    try:
        file.append(records)
    except OSError:
        assert room < 36
    assert (tmp_path / "log").read_bytes() == max((t for t in texts if len(t) <= 6 + room), key=len)
    assert file.size == (tmp_path / "log").stat().st_size
    handle.close()
