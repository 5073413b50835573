"""The mean of checkpoints: one function."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_plugins.checkpoints.averaged_file import write_average
from lightning_plugins.checkpoints.formats import open_checkpoint
from lightning_plugins.checkpoints.streaming_mean import CheckpointMean
from lightning_plugins.core.files import check_output
from lightning_plugins.core.progress import progress_bar
from lightning_plugins.core.user_warning import warn
from lightning_plugins.core.validation import a_list, a_path, real_number, shown, true_or_false


def average_checkpoints(
    paths: Iterable[str | Path],
    output: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | str | None = None,
    strict: bool = True,
    trust: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> OrderedDict[str, Any] | Path:
    r"""Average the weights of checkpoints: :math:`\bar\theta = \sum_i w_i \theta_i`, :math:`\sum_i w_i = 1`.

    Floating-point and complex tensors are averaged and keep their dtype; integers, booleans and entries that are no
    tensors come from the newest file, which is the one with the highest ``global_step``, then the later in ``paths``.
    So do tensors without a plain block of numbers (quantized by torchao, sparse), which must be the same in all files.
    Tied weights are averaged once and stay tied. Numbers of up to 32 bits are added in float64 and rounded once. Files
    are mapped, not loaded: memory is one model, and with ``output`` one tensor, however many files there are and
    however large their optimizer states.

    Args:
        paths: At least two checkpoints of one model: Lightning ``.ckpt``, other files of ``torch.save`` with a state
            dict, ``.safetensors``, directories of ``torch.distributed.checkpoint``. Formats may be mixed.
        output: A ``.ckpt`` (what ``load_from_checkpoint`` needs is taken from the newest file, optimizer and callback
            states are left out) or ``.safetensors`` file to write. It carries a manifest: files, steps, weights, and a
            digest of the averaged weights. ``None`` returns the state dict.
        weights: One number of at least 0 for each path, normalized to sum 1. ``None`` weighs all alike.
        dtype: What to add in: ``torch.float64`` (the default) or ``torch.float32``, which rounds at every file. The
            result's dtypes do not depend on it.
        strict: Refuse files whose names, shapes or dtypes differ. ``False`` averages the names that all files share
            with one shape, in the newest file's dtypes, leaves out the others and warns which.
        trust: Load files whose pickle needs more than tensors and plain values. This runs code that the files choose.
        allow_nonfinite: Let NaN and infinity pass; by default they are refused with the tensor's name.
        overwrite: Replace an existing ``output``.
        progress: Show a bar on standard error. ``None``: only on a terminal and for more than 1 GB.

    Returns:
        The averaged state dict, or the path that was written.

    Raises:
        TypeError: If ``paths`` is one string, or a number is none.
        ValueError: If there are fewer than two paths, one comes twice, or ``weights`` do not fit. A
            :class:`CheckpointError`, which is a ``ValueError`` too, if a file cannot be read, needs trust, differs
            from the others, or holds NaN.
        OSError: If a file does not exist, ``output`` exists or its directory does not, or there is no space left.
            Whatever is raised, ``output`` is as it was.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> for step in (1, 2, 3):
        ...     torch.save({"weight": torch.full((2,), float(step))}, folder / f"{step}.pt")
        >>> average_checkpoints(sorted(folder.glob("*.pt")), weights=[1, 1, 2])["weight"]
        tensor([2.2500, 2.2500])

    References:
        Vaswani et al., Attention Is All You Need, 2017 (arXiv:1706.03762), section 6.1: the last 5 or 20 checkpoints.
        Differs: nothing; the paper does not say how integers, ties and dtypes are treated.
    """
    for name, flag in {"strict": strict, "trust": trust, "allow_nonfinite": allow_nonfinite}.items():
        true_or_false(name, flag)
    target = None if output is None else _output_path(output, overwrite=true_or_false("overwrite", overwrite))
    files = distinct_files(paths)
    numbers = checked_weights(weights, len(files))
    mean = CheckpointMean(
        [open_checkpoint(path, trust=trust) for path in files],
        numbers,
        dtype=_adding_dtype(dtype),
        strict=strict,
        allow_nonfinite=allow_nonfinite,
    )
    if mean.differences.lines:
        warn(f"Left out: {mean.differences.text()}")
    with progress_bar(mean.nbytes, "averaging", show=progress) as advance:
        if target is None:
            return mean.state_dict(advance)
        write_average(mean, target, overwrite=overwrite, advance=advance)
    return target


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return ``count`` weights as floats, equal ones for ``None``.

    Raises:
        ValueError: If their number differs, one is negative or not finite, or all are 0.

    Example:
        >>> checked_weights([1, 3], 2)
        [1.0, 3.0]
    """
    if weights is None:
        return [1.0] * count
    given = a_list("weights", weights, "a list of numbers")
    values = [float(real_number("weights", value, at_least=0)) for value in given]
    if len(values) != count:
        raise ValueError(f"`weights` must have one number for each of the {count} checkpoints, got {len(values)}.")
    if not any(values):
        raise ValueError("`weights` must not all be 0.")
    return values


def _adding_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return torch.float64
    if found is not torch.float32 and found is not torch.float64:
        raise ValueError(
            f"`dtype` must be torch.float32 or torch.float64, got {shown(dtype)}. Results keep their dtypes."
        )
    return found


def _output_path(output: str | Path, *, overwrite: bool) -> Path:
    path = Path(a_path("output", output))
    if path.suffix not in (".ckpt", ".safetensors"):
        raise ValueError(f"`output` must end in .ckpt or .safetensors, got {shown(str(output))}.")
    check_output(path, overwrite=overwrite)
    return path


def distinct_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return the paths as a list.

    Raises:
        TypeError: If it is one path.
        ValueError: If there are fewer than two, or two are the same file.
    """
    if isinstance(paths, (str, Path)):
        raise TypeError(
            f"`paths` must be several paths, got {shown(paths)}. select_checkpoints lists those of a directory."
        )
    files = [Path(a_path("paths", path)) for path in a_list("paths", paths, "a list of paths")]
    if len(files) < 2:
        raise ValueError(f"`paths` must name at least two checkpoints, got {len(files)}.")
    seen: dict[Path, Path] = {}
    for path in files:
        real = path.resolve()
        if real in seen:
            raise ValueError(f"{path} and {seen[real]} are the same file; use `weights` to count one more than once.")
        seen[real] = path
    return files
