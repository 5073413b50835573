"""Checkpoint directories of DeepSpeed: which they are, what they say of themselves, and their weights in full.

DeepSpeed writes a folder for each save, names the newest in a file called ``latest``, and lets every rank write its own
parts. Its files hold objects of its own, so that its own conversion opens them, which runs the code that they name.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_plugins.core.files import open_regular
from lightning_plugins.core.stand_ins import UnreadableError
from lightning_plugins.core.torch_file import Archive

_LONGEST_TAG = 1000


def is_deepspeed_directory(path: Path) -> bool:
    """Return whether ``path`` is a directory of DeepSpeed with at least one save in it."""
    return (path / "latest").is_file() and any(_folder(path).glob("*_model_states.pt"))


def _folder(path: Path) -> Path:
    with open_regular(path / "latest") as file:
        tag = file.read(_LONGEST_TAG).decode("utf-8", "replace").strip()
    # a name, and no way out of the directory
    return path / (tag if tag and tag == Path(tag).name and "\0" not in tag else "no such folder")


def step_of(path: Path) -> int | None:
    """Return the optimizer step of the newest save, as its files say without running anything; ``None`` if they do not.

    Raises:
        ValueError: If a file is damaged, or the files of the ranks are of several steps.
    """
    steps = set()
    for file in sorted(_folder(path).glob("*_model_states.pt")):
        try:
            with open_regular(file) as opened:
                content: Any = Archive(opened).found.content
        except UnreadableError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        step = content.get("global_steps") if isinstance(content, dict) else None
        steps.add(step if type(step) is int else None)
    if len(steps) > 1:
        raise ValueError(f"{path} is incomplete: the files of its ranks are of several steps.")
    return steps.pop() if steps else None


def full_weights(path: Path, *, trust: bool) -> dict[str, Tensor]:
    """Return the float32 master weights and the rest of the module's state, put together by DeepSpeed itself.

    Args:
        path: The directory.
        trust: Load what its files name, which runs code that they choose.

    Raises:
        ValueError: If it is not trusted, DeepSpeed is not installed, or the directory is incomplete.
    """
    if not trust:
        raise ValueError(
            f"{path} holds objects of DeepSpeed, which its own conversion opens. If you trust its author, pass "
            "trust=True (--trust on the command line), which runs code that the files choose."
        )
    try:
        conversion: Any = importlib.import_module("deepspeed.utils.zero_to_fp32")
    except ImportError as error:
        raise ValueError(
            f"{path} can only be read where DeepSpeed is installed ({error}). There, `python {path}/zero_to_fp32.py "
            f"{path} OUTPUT` writes its weights into plain files."
        ) from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            state: dict[str, Tensor] = conversion.get_fp32_state_dict_from_zero_checkpoint(str(path))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is incomplete, DeepSpeed cannot put it together: {error}") from error
    return dict(state)
