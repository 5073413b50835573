"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; when the block ends well, sync it and rename it to ``path``.

    Whenever the process dies, ``path`` is the old file, or the whole new one, or does not exist. After ``kill -9`` a
    hidden ``.<name>.*.tmp`` can stay behind; on any exception it is removed.

    Args:
        path: The file to write.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileNotFoundError: If its directory does not exist.
        FileExistsError: If it exists and may not be replaced.
        OSError: If its directory cannot be written to, or the disk is full.
    """
    check_output(path, overwrite=overwrite)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # the file that was asked for
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it the owner's alone
        check_output(path, overwrite=overwrite)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise if ``path`` cannot become a new file: see :func:`replacing`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The directory of `output`, {path.parent}, does not exist.")
    if path.is_dir():
        raise FileExistsError(f"`output` is a directory: {path}.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True (--overwrite on the command line) to replace it.")


def write_state_dict(state_dict: Mapping[str, Tensor], output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a plain state dict: ``.safetensors`` by safetensors, any other suffix by ``torch.save``.

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
        ImportError: If safetensors is asked for and not installed.
    """
    path = Path(output)
    with replacing(path, overwrite=overwrite) as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import save  # noqa: PLC0415  # optional

            file.write(save({name: tensor.contiguous().clone() for name, tensor in state_dict.items()}))
        else:
            import torch  # noqa: PLC0415  # what only lists files needs no torch

            torch.save(dict(state_dict), file)
    return path


def read_plain(path: Path, *, trust: bool = False) -> Any:
    """Return what ``torch.save`` wrote, its tensors mapped from the file; nothing that the file names is run.

    Args:
        path: The file.
        trust: Load whatever the file names all the same, which runs code that it chooses.

    Raises:
        OSError: If the file cannot be opened.
        pickle.UnpicklingError: If it holds more than tensors and plain values, or its pickle is damaged.
        ValueError: If it is damaged. Either message is the reason alone, on one line.
    """
    import torch  # noqa: PLC0415  # what only lists files needs no torch

    path.open("rb").close()  # what cannot be opened is no damaged file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on how the file was written
            return torch.load(path, map_location="cpu", weights_only=not trust, mmap=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(first_line(str(error).split("WeightsUnpickler error:")[-1])) from error
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(first_line(error)) from error


def first_line(error: object) -> str:
    """Return the beginning of what an error says, on one line; its type's name if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can open or sync a directory; the rename itself is done
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
