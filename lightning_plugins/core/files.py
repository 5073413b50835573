"""Writes files completely or not at all, finds free names, and says whether a place can be written.

Knows no Trainer. Files that only grow are in :mod:`~lightning_plugins.core.append_only_file`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lightning_plugins.core.temporary_files import hold, remove_abandoned, temporary_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_FULL = (errno.ENOSPC, errno.EDQUOT)
_OTHER_KINDS = (
    (rb"version https://git-lfs", "a Git LFS pointer; get the file with `git lfs pull`"),
    (rb"\s*<(!doctype|html|\?xml|head)", "a web page; the download of the file has failed"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "compressed; unpack it first"),
    (rb"\x89HDF|\x93NUMPY|GGUF", "of another program"),
    (rb"(?s).{8}\s*\{", "a .safetensors file under another name"),
    (rb"(?s).{257}ustar", "a tar archive, which torch before 0.2 wrote; load and save it with torch first"),
    (rb"[\x20-\x7e\s]+\Z", "a text"),
)


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; when the block ends well, sync it and rename it to ``path``.

    Whenever the process dies, ``path`` is the old file, or the whole new one, or does not exist. After ``kill -9`` a
    hidden ``.<name>.*.tmp`` can stay behind, which the next run removes; on any exception it is removed. The new file
    has the mode of the one that it replaces. A link at ``path`` is replaced, and what it leads to stays as it is.

    Args:
        path: The file to write.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileNotFoundError: If its directory does not exist.
        FileExistsError: If it exists and may not be replaced.
        OSError: If its directory cannot be written to, or the disk is full.
    """
    check_output(path, overwrite=overwrite)
    temporary, handle = _temporary_beside(path)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            check_output(path, overwrite=overwrite)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _temporary_beside(path: Path) -> tuple[Path, int]:
    """Make a file under a name that cannot be known before, with the mode that ``path`` has; return it, open."""
    temporary = temporary_name(path)
    mode = _mode(path)
    try:
        # O_EXCL follows no link; 0o666 is lessened by the process's umask, as for every new file
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600)
    except OSError as error:
        # name the file that was asked for
        raise type(error)(error.errno, error.strerror, str(path)) from error
    hold(handle)
    if mode is not None:
        os.fchmod(handle, mode)
    return temporary, handle


def _mode(path: Path) -> int | None:
    """Return the permissions of a file that is about to be replaced, ``None`` if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return stat.S_IMODE(found.st_mode) if stat.S_ISREG(found.st_mode) else None


def replace_file(path: Path, *parts: bytes) -> None:
    """Write a file in one atomic step: at any moment either the old or the new one is there.

    Raises:
        OSError: If it could not be written; the old file is then untouched.
    """
    with replacing(path, overwrite=True) as handle:
        handle.writelines(parts)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise if ``path`` cannot become a new file: see :func:`replacing`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The directory of `output`, {path.parent}, does not exist.")
    if path.is_dir():
        raise FileExistsError(f"`output` is a directory: {path}.")
    if is_special(path):
        raise FileExistsError(f"`output` is a device or a pipe: {path}.")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True (--overwrite on the command line) to replace it.")


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a pipe, which would wait for a writer, or a device is refused.

    Raises:
        OSError: If it cannot be opened, or is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(f"{path} is a device or a pipe, not a file.")


def kind_of_file(start: bytes) -> str | None:
    """Return what a file is that is evidently no file of weights, by its first 512 bytes; ``None`` if it may be one.

    Example:
        >>> kind_of_file(b""), kind_of_file(b"<!DOCTYPE html>")
        ('empty', 'a web page; the download of the file has failed')
    """
    if not start:
        return "empty"
    return next((kind for pattern, kind in _OTHER_KINDS if re.match(pattern, start, re.IGNORECASE)), None)


def is_special(path: Path) -> bool:
    """Return whether a path leads to something that is neither a file nor a directory, such as a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def probe(path: Path) -> None:
    """Raise unless a file can be made at ``path``; nothing is left behind, and missing directories are not made.

    A disk that is full now is no error: there can be room when the file is written.

    Raises:
        OSError: If ``path`` is a directory, a device, a pipe or a link to nothing, or lies below a file, or if its
            directory cannot be written to.
    """
    if path.is_dir():
        raise IsADirectoryError("it is a directory")
    if is_special(path):
        raise OSError("it is a device or a pipe")
    if path.is_symlink() and not path.exists():
        raise OSError("it is a link to a file that does not exist")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()
    probe_directory(path.parent)


def probe_directory(path: Path) -> None:
    """Raise unless files can be made in a directory, or in the nearest one above it that exists.

    What killed runs have left of files that they were writing there is removed.

    Raises:
        OSError: If it is a file or below one, or cannot be written to.
    """
    # a name that is too long for the system is an error of its own
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()
    nearest = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file")
    remove_abandoned(path)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        if not is_full_disk(error):
            raise


def is_full_disk(error: OSError) -> bool:
    """Return whether an error says that the disk, or the user's share of it, is full: there can be room again."""
    return error.errno in _FULL


def free_name(path: Path, word: str = "") -> Path:
    """Return the first name beside ``path`` that is not taken.

    Example:
        >>> free_name(Path("/nowhere/log.csv")).name, free_name(Path("/nowhere/log.csv"), "replaced").name
        ('log.1.csv', 'log.replaced.1.csv')
    """
    middle = f".{word}" if word else ""
    number = 1
    while os.path.lexists(candidate := path.with_name(f"{path.stem}{middle}.{number}{path.suffix}")):
        number += 1
    return candidate


def move_aside(path: Path) -> Path | None:
    """Give an existing file the first free name beside it, and return that; ``None`` if there is no file."""
    if not os.path.lexists(path):
        return None
    aside = free_name(path)
    path.rename(aside)
    return aside


def write_state_dict(state_dict: Mapping[str, Tensor], output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a plain state dict: ``.safetensors`` as such, any other suffix by ``torch.save``.

    Args:
        state_dict: Name -> tensor. Names that share one tensor, as tied weights do, share it in the file too;
            safetensors has no such thing and gets a copy for each.
        output: The file.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: If its directory does not exist.
        FileExistsError: If it exists and may not be replaced.
        ValueError: If ``.safetensors`` cannot hold a tensor's type or name.
    """
    path = Path(output)
    with replacing(path, overwrite=overwrite) as file:
        if path.suffix == ".safetensors":
            # a command that only lists files needs no torch
            from lightning_plugins.core.safetensors_file import write_tensors  # noqa: PLC0415

            write_tensors(file, state_dict, {"format": "pt"})
        else:
            import torch  # noqa: PLC0415

            torch.save(dict(state_dict), file)
    return path


def _sync_directory(path: Path) -> None:
    # not every system can open or sync a directory; the rename itself is done
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
