"""Writes a mean of checkpoints as one file, tensor by tensor, with a manifest of what it is the mean of."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from lightning_plugins.checkpoints.formats.base import ema_note, second_sets
from lightning_plugins.checkpoints.formats.torch_writer import Slot, TorchArchive
from lightning_plugins.checkpoints.streaming_mean import CheckpointMean
from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.checkpoint_file import CheckpointError
from lightning_plugins.core.files import replacing
from lightning_plugins.core.progress import Advance
from lightning_plugins.core.safetensors_file import SafetensorsWriter, bytes_of

# What a checkpoint holds to train on from it, which a mean is not for.
_DROPPED = (
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "current_model_state",
    "averaging_state",
    "MixedPrecision",
    checkpoint_keys.EMA,
    checkpoint_keys.POSTHOC_EMA,
    checkpoint_keys.RUN,
    checkpoint_keys.MEAN,
    checkpoint_keys.SAVE,
    checkpoint_keys.SECOND_SETS,
)


def write_average(
    mean: CheckpointMean,
    output: Path,
    *,
    overwrite: bool = False,
    advance: Advance | None = None,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write a mean to a ``.ckpt`` or ``.safetensors`` file, completely or not at all.

    Args:
        mean: What to write.
        output: The file.
        overwrite: Whether it may be replaced.
        advance: Is told how many bytes have been read.
        tensors: The mean's tensors in the order of its ``specs``, if they are made elsewhere. Each is written before
            the next is asked for.
    """
    if tensors is None:
        scratch = mean.scratch()
        tensors = ((name, mean.tensor(name, advance, scratch)) for name in mean.specs)
    manifest = _manifest(mean, output.parent)
    with replacing(output, overwrite=overwrite) as file:
        if output.suffix == ".safetensors":
            _write_safetensors(mean, file, tensors, manifest)
        else:
            _write_ckpt(mean, file, tensors, manifest)


def ema_of(mean: CheckpointMean) -> str | None:
    """Return what is known of the averaged weights if the newest file is of a run with an EMA."""
    return ema_note(mean.newest.header, mean.newest.specs)


def _write_ckpt(
    mean: CheckpointMean, file: BinaryIO, tensors: Iterable[tuple[str, Tensor]], manifest: dict[str, Any]
) -> None:
    digest = WeightsDigest()
    slots: OrderedDict[str, Any] = OrderedDict()
    with TorchArchive(file) as archive:
        for name, tensor in tensors:
            content = bytes_of(tensor)
            digest.add(name, tensor, content)
            tied = slots.get(mean.first_names[name])
            slots[name] = tied or Slot(archive.add(content), tensor.dtype, tuple(tensor.shape))
        manifest["digest"] = digest.text()
        archive.finish({**_header(mean), "state_dict": mean.completed(slots), checkpoint_keys.MEAN: manifest})


def _header(mean: CheckpointMean) -> dict[str, Any]:
    """Return what a written checkpoint holds beside the weights: the newest file's, without what training needs."""
    newest = mean.newest
    # a second set of weights, of whatever averaging, would be that of one file and not the mean's
    dropped = {*_DROPPED, *(place.partition("/")[0] for place in second_sets(newest.header, newest.specs))}
    header = {key: value for key, value in newest.header.items() if key not in dropped}
    if "pytorch-lightning_version" not in header:
        # load_from_checkpoint asks for it, and a plain state dict has none
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            header["pytorch-lightning_version"] = importlib.metadata.version("lightning")
    return header


def _write_safetensors(
    mean: CheckpointMean, file: BinaryIO, tensors: Iterable[tuple[str, Tensor]], manifest: dict[str, Any]
) -> None:
    if mean.extras:
        names = ", ".join(f"`{name}`" for name in list(mean.extras)[:10])
        raise CheckpointError(f"{names} is no dense tensor, which .safetensors cannot hold; write a .ckpt instead.")
    numbers = {"global_step": mean.newest.step, "epoch": mean.newest.epoch}
    metadata = {key: str(value) for key, value in numbers.items() if value is not None}
    metadata |= {"format": "pt", checkpoint_keys.MEAN: json.dumps(manifest)}
    digest = WeightsDigest()
    try:
        writer = SafetensorsWriter(file, mean.specs, metadata, late=("weights_digest", len(digest.text())))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    for name, tensor in tensors:
        content = bytes_of(tensor)
        digest.add(name, tensor, content)
        writer.add(content)
    writer.finish(digest.text())


def _manifest(mean: CheckpointMean, folder: Path) -> dict[str, Any]:
    """Return what was averaged, in plain values; paths are relative to ``folder``."""
    record = mean.newest.header.get(checkpoint_keys.EMA)
    told = record if isinstance(record, Mapping) else {}
    weights = told.get("state_dict")
    return {
        "version": 1,
        "files": [
            {"path": _relative(source.path, folder), "step": source.step, "epoch": source.epoch, "weight": share}
            for source, share in zip(mean.sources, mean.shares, strict=True)
        ],
        "newest": _relative(mean.newest.path, folder),
        "accumulated_in": str(mean.dtype).removeprefix("torch."),
        "left_out": sorted(mean.differences.unshared),
        "replaced": sorted(mean.replace),
        "ema": ema_of(mean),
        "ema_name": told.get("name") if weights == "average" and isinstance(told.get("name"), str) else None,
        "weights": weights if weights in ("average", "raw") else "raw" if ema_of(mean) is None else None,
    }


def _relative(path: Path, folder: Path) -> str:
    try:
        return os.path.relpath(path.resolve(), folder.resolve())
    except ValueError:
        # another drive
        return str(path)


class WeightsDigest:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors, in their order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, tensor: Tensor, content: memoryview) -> None:
        """Add one tensor, whose bytes are ``content``."""
        self._hash.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        self._hash.update(content)

    def text(self) -> str:
        """Return the digest so far."""
        return f"sha256:{self._hash.hexdigest()}"


def weights_digest(state_dict: dict[str, Any]) -> str:
    """Return the digest that the manifest of a file with this ``state_dict`` has; its bytes are unchanged if equal."""
    digest = WeightsDigest()
    for name, tensor in state_dict.items():
        if isinstance(tensor, Tensor):
            whole = tensor.detach().cpu().contiguous()
            digest.add(name, whole, bytes_of(whole))
    return digest.text()
