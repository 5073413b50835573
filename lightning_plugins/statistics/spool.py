"""Files on a file system that cannot append, such as an object store or its mount: written locally, uploaded whole."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from pathlib import Path

import fsspec

from lightning_plugins.core.append_only_file import AppendOnlyFile
from lightning_plugins.core.files import is_full_disk, replace_file
from lightning_plugins.core.temporary_files import temporary_name
from lightning_plugins.core.user_warning import warn


def is_remote(path: str) -> bool:
    """Return whether a path names a file system, as in ``s3://bucket/log.csv``; ``file://`` does too."""
    return "://" in path


def can_append(folder: Path) -> bool:
    """Return whether files in a directory can be appended to; the directory is made.

    Mounts of object stores take a new file and refuse to open it again. What fails for another reason is left to the
    one who writes.
    """
    probe = temporary_name(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
    except OSError:
        return True
    try:
        for _ in range(2):
            file = AppendOnlyFile(probe)
            try:
                file.append([b"\n"])
            finally:
                file.close()
    except OSError as error:
        return is_full_disk(error)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return True


class Spool:
    """A temporary directory whose files are uploaded to another one.

    Args:
        target: The directory, as fsspec writes it, or a local path.

    Attributes:
        local: The temporary directory.
    """

    def __init__(self, target: str) -> None:
        self._system, self._target = fsspec.core.url_to_fs(target)
        self._is_local = not is_remote(target)
        self.local = Path(tempfile.mkdtemp(prefix="lightning_plugins-"))
        weakref.finalize(self, shutil.rmtree, str(self.local), ignore_errors=True)
        self._complained = False

    def move_aside(self, name: str) -> str | None:
        """Start a new file; return where an existing one was moved to."""
        path = f"{self._target}/{name}"
        if not self._system.exists(path):
            return None
        stem, _, suffix = path.rpartition(".")
        number = 1
        while self._system.exists(aside := f"{stem}.{number}.{suffix}"):
            number += 1
        self._system.mv(path, aside)
        return aside

    def download(self, name: str) -> None:
        """Bring a file here, if there is one."""
        path = f"{self._target}/{name}"
        if self._system.exists(path):
            self._system.get_file(path, str(self.local / name))

    def upload(self) -> None:
        """Put everything that lies in the temporary directory where it belongs; a failure costs a warning."""
        try:
            for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
                self._put(file, f"{self._target}/{file.relative_to(self.local).as_posix()}")
        except OSError as error:
            if not self._complained:
                warn(
                    f"{self._target} could not be uploaded: {error}. Training goes on; what is missing there is tried "
                    "again."
                )
            self._complained = True

    def _put(self, file: Path, target: str) -> None:
        self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
        if self._is_local:
            # in one step, where the mount can rename
            with contextlib.suppress(OSError):
                replace_file(Path(target), file.read_bytes())
                return
        self._system.put_file(str(file), target)
