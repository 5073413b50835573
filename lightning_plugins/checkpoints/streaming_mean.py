r"""How each tensor of an average is made from mapped files, and how the whole is written, one tensor at a time.

For files with weights :math:`w_i` the mean is updated as :math:`m_i = m_{i-1} + \frac{w_i}{\sum_{j \le i} w_j}
(x_i - m_{i-1})`, :math:`m_1 = x_1`: equal files give back exactly their own numbers, and nothing overflows on the way.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.checkpoints.compatibility import Differences, differences
from lightning_plugins.checkpoints.formats.base import EMA_RECORD, Checkpoint, CheckpointError, ema_note, second_sets
from lightning_plugins.checkpoints.formats.safetensors import SafetensorsWriter
from lightning_plugins.checkpoints.formats.torch_writer import Slot, TorchArchive, bytes_of
from lightning_plugins.core.files import replacing
from lightning_plugins.core.progress import Advance

MANIFEST = "checkpoint_averaging"
"""The key of the manifest in a written checkpoint (a JSON text in a ``.safetensors`` file's metadata)."""

_CHUNK = 1 << 18  # elements: they stay in the processor's cache while all files are added
_WORKERS = 2  # ranges averaged side by side; two keep up with the memory of most machines
_DROPPED = (
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "current_model_state",
    "averaging_state",
    "MixedPrecision",
    EMA_RECORD,
)


class Recipe:
    """What is averaged with which weights, and how to make each tensor of the result.

    Args:
        sources: The open checkpoints.
        shares: Their weights, of sum 1.
        accumulate: The dtype of the sums of tensors that are no wider.
        strict: See :func:`average_checkpoints`, also for the next one.
        allow_nonfinite: Whether NaN and infinity may pass.
        replace: Tensors of the result that are given instead of averaged.

    Attributes:
        newest: The source that integers, other entries and the header come from.
        specs: The result's tensors, by name, in the newest file's order.
        differences: What is left out because the sources differ.
    """

    def __init__(
        self,
        sources: Sequence[Checkpoint],
        shares: Sequence[float],
        *,
        accumulate: torch.dtype = torch.float32,
        strict: bool = True,
        allow_nonfinite: bool = False,
        replace: dict[str, Tensor] | None = None,
    ) -> None:
        self.sources, self.shares = list(sources), list(shares)
        self.newest = max(enumerate(sources), key=lambda item: (_order(item[1]), item[0]))[1]
        self.differences: Differences = differences(self.sources)
        if strict and self.differences:
            raise CheckpointError(
                f"The checkpoints differ: {self.differences.text()} Pass strict=False to average what they share."
            )
        self.specs = {name: s for name, s in self.newest.specs.items() if name not in self.differences.unshared}
        self._accumulate, self._allow_nonfinite = accumulate, allow_nonfinite
        self._replace = {name: tensor for name, tensor in (replace or {}).items() if name in self.specs}
        self._first = self._ties()

    @property
    def nbytes(self) -> int:
        """The bytes that will be read."""
        return sum(source.specs[name].nbytes for source in self.sources for name in self.specs)

    def _ties(self) -> dict[str, str]:
        """Return for each name the first name that is the same elements of the same storage in every source."""
        first: dict[Any, str] = {}
        ties = {}
        for name in self.specs:
            alias = tuple(source.specs[name].alias for source in self.sources)
            ties[name] = name if None in alias else first.setdefault(alias, name)
        return ties

    def tensor(self, name: str, advance: Advance | None = None, scratch: Tensor | None = None) -> Tensor:
        """Return one tensor of the result, contiguous; it lies in ``scratch`` if one is given."""
        if name in self._replace:
            return self.replaced(name)
        spec = self.specs[name]
        result = torch.empty(spec.numel, dtype=spec.dtype) if scratch is None else self.cut(name, scratch)
        return self.part(name, 0, spec.numel, advance, result).view(spec.shape)

    def scratch(self) -> Tensor:
        """Return memory for any one tensor of the result: one block, used again, leaves no holes behind."""
        return torch.empty(max((spec.nbytes for spec in self.specs.values()), default=0), dtype=torch.uint8)

    def cut(self, name: str, scratch: Tensor) -> Tensor:
        """Return the beginning of ``scratch`` as one flattened tensor of the result."""
        spec = self.specs[name]
        return scratch[: spec.nbytes].view(spec.dtype)

    def replaced(self, name: str, tensor: Tensor | None = None) -> Tensor:
        """Return the tensor that was given instead of a mean; ``tensor`` if none was."""
        if tensor is not None and name not in self._replace:
            return tensor
        spec = self.specs[name]
        return self._replace[name].to("cpu", spec.dtype).reshape(spec.shape).contiguous()

    def part(
        self, name: str, start: int, stop: int, advance: Advance | None = None, result: Tensor | None = None
    ) -> Tensor:
        """Return elements ``start`` to ``stop`` of one flattened tensor, in ``result`` if that is given."""
        if result is None:
            result = torch.empty(stop - start, dtype=self.specs[name].dtype)
        width = sum(source.specs[name].dtype.itemsize for source in self.sources)

        def fill(begin: int, result: Tensor = result) -> None:
            piece = result[begin : begin + _CHUNK]
            mean = self.mean(name, start + begin, start + begin + len(piece), piece)
            if mean.data_ptr() != piece.data_ptr():
                piece.copy_(mean)
            if advance is not None:
                advance(width * len(piece))

        begins = range(0, stop - start, _CHUNK)
        for source in self.sources:
            source.flat(name, start, start)  # opened once, before several threads ask for it
        with _one_thread_per_operation() as threads:
            for _ in map(fill, begins) if threads == 1 or len(begins) == 1 else self._pool.map(fill, begins):
                pass
        return result

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_WORKERS, "averaging")

    def mean(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the mean of a range of the flattened tensor, in the dtype it was accumulated in.

        Args:
            name: The tensor.
            start: First element.
            stop: One past the last.
            out: Memory to accumulate in, used if its dtype fits.
        """
        spec = self.specs[name]
        if not spec.averaged:
            return self.newest.flat(name, start, stop)
        accumulate = _accumulator(spec.dtype, self._accumulate)
        if out is None or out.dtype != accumulate:
            out = torch.empty(stop - start, dtype=accumulate)
        total = 0.0
        for source, share in zip(self.sources, self.shares, strict=True):
            values = source.flat(name, start, stop)
            total += share
            if total == share:  # the first, or all before it weigh nothing
                out.copy_(values)
            else:
                out.lerp_(values.to(accumulate), share / total)
        if not self._allow_nonfinite and not _is_finite(out):
            raise CheckpointError(self._nonfinite(name, start, stop))
        return out

    def _nonfinite(self, name: str, start: int, stop: int) -> str:
        guilty = [s.path for s in self.sources if not _is_finite(s.flat(name, start, stop).to(torch.complex128))]
        where = f"in {guilty[0]}" if guilty else "in the mean"
        return f"`{name}` holds NaN or infinity {where}. Leave that file out, or pass allow_nonfinite=True."

    def state_dict(self, advance: Advance | None = None) -> OrderedDict[str, Any]:
        """Return the whole result; tied names share one tensor."""
        result: OrderedDict[str, Any] = OrderedDict()
        for name in self.specs:
            first = self._first[name]
            result[name] = result[first] if first in result else self.tensor(name, advance)
        return self._completed(result)

    def _completed(self, state: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
        state.update(self.newest.extras)
        if self.newest.layout is not None:
            state._metadata = self.newest.layout  # type: ignore[attr-defined]  # where torch keeps module versions
        return state

    def write(
        self,
        output: Path,
        *,
        overwrite: bool = False,
        advance: Advance | None = None,
        tensors: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        """Write the result to a ``.ckpt`` or ``.safetensors`` file, completely or not at all.

        Args:
            output: The file.
            overwrite: Whether it may be replaced.
            advance: Is told how many bytes have been read.
            tensors: The result's tensors in the order of ``specs``, if somebody else makes them. Each is written before
                the next is asked for.
        """
        if tensors is None:
            scratch = self.scratch()
            tensors = ((name, self.tensor(name, advance, scratch)) for name in self.specs)
        manifest = self.manifest(output.parent)
        with replacing(output, overwrite=overwrite) as file:
            if output.suffix == ".safetensors":
                self._write_safetensors(file, tensors, manifest)
            else:
                self._write_ckpt(file, tensors, manifest)

    def _write_ckpt(self, file: Any, tensors: Iterable[tuple[str, Tensor]], manifest: dict[str, Any]) -> None:
        digest = WeightsDigest()
        slots: OrderedDict[str, Any] = OrderedDict()
        with TorchArchive(file) as archive:
            for name, tensor in tensors:
                content = bytes_of(tensor)
                digest.add(name, tensor, content)
                tied = slots.get(self._first[name])
                slots[name] = tied or Slot(archive.add(content), tensor.dtype, tuple(tensor.shape))
            manifest["digest"] = digest.text()
            archive.finish({**self.header(), "state_dict": self._completed(slots), MANIFEST: manifest})

    def header(self) -> dict[str, Any]:
        """Return what a written checkpoint holds beside the weights: the newest file's, without what training needs."""
        second = second_sets(self.newest.header, self.newest.specs)
        dropped = {*_DROPPED, *(place.partition("/")[0] for place in second)}
        header = {key: value for key, value in self.newest.header.items() if key not in dropped}
        if "pytorch-lightning_version" not in header:  # load_from_checkpoint asks for it; a plain state dict has none
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                header["pytorch-lightning_version"] = importlib.metadata.version("lightning")
        return header

    def ema_note(self) -> str | None:
        """Return what is known of the averaged weights if the newest file is of a run with an EMA."""
        return ema_note(self.newest.header, self.newest.specs)

    def _write_safetensors(self, file: Any, tensors: Iterable[tuple[str, Tensor]], manifest: dict[str, Any]) -> None:
        if self.newest.extras:
            names = ", ".join(f"`{name}`" for name in list(self.newest.extras)[:10])
            raise CheckpointError(f"{names} is no tensor, which .safetensors cannot hold; write a .ckpt instead.")
        numbers = {"global_step": self.newest.step, "epoch": self.newest.epoch}
        metadata = {key: str(value) for key, value in numbers.items() if value is not None}
        metadata |= {"format": "pt", MANIFEST: json.dumps(manifest)}
        digest = WeightsDigest()
        writer = SafetensorsWriter(file, self.specs, metadata, late=("weights_digest", len(digest.text())))
        for name, tensor in tensors:
            content = bytes_of(tensor)
            digest.add(name, tensor, content)
            writer.add(content)
        writer.finish(digest.text())

    def manifest(self, folder: Path) -> dict[str, Any]:
        """Return what was averaged, in plain values; paths are relative to ``folder``."""
        return {
            "version": 1,
            "files": [
                {"path": _relative(s.path, folder), "step": s.step, "epoch": s.epoch, "weight": share}
                for s, share in zip(self.sources, self.shares, strict=True)
            ],
            "newest": _relative(self.newest.path, folder),
            "accumulated_in": str(self._accumulate).removeprefix("torch."),
            "left_out": sorted(self.differences.unshared),
            "replaced": sorted(self._replace),
            "ema": self.ema_note(),
        }


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


@contextlib.contextmanager
def _one_thread_per_operation() -> Iterator[int]:
    """Give how many threads torch may use, and let each operation use one.

    Several ranges are averaged side by side instead: where cores are shared, the threads inside an operation wait for
    each other, which was seen to take ten times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def _order(source: Checkpoint) -> int:
    return -1 if source.step is None else source.step


def _accumulator(dtype: torch.dtype, requested: torch.dtype) -> torch.dtype:
    wide = requested == torch.float64 or dtype in (torch.float64, torch.complex128)
    if dtype.is_complex:
        return torch.complex128 if wide else torch.complex64
    return torch.float64 if wide else torch.float32


def _is_finite(values: Tensor) -> bool:
    """Return whether all are finite; a finite sum, which needs no second tensor, shows it, an infinite one does not."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _relative(path: Path, folder: Path) -> str:
    try:
        return os.path.relpath(path.resolve(), folder.resolve())
    except ValueError:  # another drive
        return str(path)
