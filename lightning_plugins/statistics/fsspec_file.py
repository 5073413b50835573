"""A file on a file system that cannot append, such as an object store: written locally, uploaded as a whole."""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from pathlib import Path

import fsspec

from lightning_plugins.core.validation import LightningPluginsWarning


def is_remote(path: str) -> bool:
    """Return whether a path names a file system, as in ``s3://bucket/log.csv``; ``file://`` does too."""
    return "://" in path


class RemoteFile:
    """The local copy of a file that lies elsewhere.

    Args:
        url: Where it lies, as fsspec writes it.

    Attributes:
        local: The copy, in a temporary directory of its own.
    """

    def __init__(self, url: str) -> None:
        self._system, self._path = fsspec.core.url_to_fs(url)
        folder = tempfile.mkdtemp(prefix="lightning_plugins-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.local = Path(folder) / Path(self._path).name
        self._complained = False

    def begin(self) -> str | None:
        """Start a new file; return where an existing one was moved to."""
        if not self._system.exists(self._path):
            return None
        number = 1
        while self._system.exists(aside := self._numbered(number)):
            number += 1
        self._system.mv(self._path, aside)
        return aside

    def download(self) -> None:
        """Bring the file here, if there is one."""
        if self._system.exists(self._path):
            self._system.get_file(self._path, str(self.local))

    def upload(self) -> None:
        """Put everything that lies in the local directory where it belongs; a failure costs a warning."""
        folder = self._path.rpartition("/")[0]
        try:
            self._system.makedirs(folder, exist_ok=True)
            for file in sorted(self.local.parent.glob("*.csv")):
                self._system.put_file(str(file), f"{folder}/{file.name}")
        except OSError as error:
            if not self._complained:
                warnings.warn(f"{self._path} could not be uploaded: {error}.", LightningPluginsWarning, stacklevel=4)
            self._complained = True

    def _numbered(self, number: int) -> str:
        stem, _, suffix = self._path.rpartition(".")
        return f"{stem}.{number}.{suffix}"
