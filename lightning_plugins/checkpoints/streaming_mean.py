r"""The mean of open checkpoints, made one range of one tensor at a time from mapped files.

With weights :math:`w_i` each element is :math:`\sum_i w_i x_i / \sum_i w_i`. Numbers of up to 32 bits are added in
float64, where hardly a sum is rounded, and the quotient is rounded once to the tensor's own type. Wider numbers have
no such room; their mean is kept running, :math:`m_i = m_{i-1} + \frac{w_i}{\sum_{j \le i} w_j} (x_i - m_{i-1})`, which
gives equal files back their own numbers and cannot overflow on the way.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.checkpoints.compatibility import Differences, differences
from lightning_plugins.checkpoints.formats.base import Checkpoint
from lightning_plugins.core.checkpoint_file import CheckpointError
from lightning_plugins.core.progress import Advance
from lightning_plugins.core.validation import shortened

# A range of so many elements, with its sums, stays in the processor's cache while all files are added.
_CHUNK = 1 << 18
# Bytes of a tensor from which on large pages are worth asking for.
_LARGE = 1 << 22
# Ranges averaged side by side; two keep up with the memory of most machines.
_WORKERS = 2


class CheckpointMean:
    """The mean of open checkpoints; nothing is read before a tensor is asked for.

    Args:
        sources: The open checkpoints.
        weights: One number of at least 0 for each, not all 0; ``None`` for equal ones.
        dtype: What to add in: float64, or float32 for numbers of up to 32 bits.
        strict: Whether names, shapes and dtypes must agree.
        allow_nonfinite: Whether NaN and infinity may pass.
        replace: Tensors of the result that are given instead of averaged.

    Attributes:
        newest: The source that integers, other entries and the header come from: the highest step, then the later.
        specs: The result's tensors, by name, in the newest file's order.
        extras: Entries of its state dict that are no dense tensors.
        differences: What is left out because the sources differ.
        shares: The weights, normalized to sum 1.
        first_names: Name -> the first name that is the same elements in every source (tied weights).

    Raises:
        CheckpointError: If the sources differ and ``strict`` is set.
    """

    def __init__(
        self,
        sources: Sequence[Checkpoint],
        weights: Sequence[float] | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        strict: bool = True,
        allow_nonfinite: bool = False,
        replace: dict[str, Tensor] | None = None,
    ) -> None:
        self.sources, self.dtype = list(sources), dtype
        self._weights = [1.0] * len(self.sources) if weights is None else _simplest(weights)
        total = math.fsum(self._weights)
        self.shares = [weight / total for weight in self._weights]
        self._divide = _division_by(total)
        self.newest = self.sources[0]
        newest_step = -1
        for source in self.sources:
            step = source.step
            if (-1 if step is None else step) >= newest_step:
                self.newest, newest_step = source, -1 if step is None else step
        self.differences: Differences = differences(self.sources)
        if strict and self.differences.lines:
            raise CheckpointError(
                f"The checkpoints differ: {self.differences.text()} Pass strict=False to average what they share."
            )
        self.specs, self.extras = dict(self.newest.specs), dict(self.newest.extras)
        for name in self.differences.unshared:
            self.specs.pop(name, None)
            self.extras.pop(name, None)
        self.replace = dict(replace or {})
        for name in self.replace.keys() - self.specs:
            del self.replace[name]
        self._allow_nonfinite = allow_nonfinite
        self._per_thread = threading.local()
        self.first_names = self._ties()

    @property
    def nbytes(self) -> int:
        """The bytes that will be read."""
        return sum([source.specs[name].nbytes for source in self.sources for name in self.specs])

    def _ties(self) -> dict[str, str]:
        first: dict[Any, str] = {}
        ties = {}
        for name in self.specs:
            alias = [source.specs[name].alias for source in self.sources]
            ties[name] = name if None in alias else first.setdefault(tuple(alias), name)
        return ties

    def state_dict(self, advance: Advance | None = None) -> OrderedDict[str, Any]:
        """Return the whole result; tied names share one tensor."""
        result: OrderedDict[str, Any] = OrderedDict()
        for name in self.specs:
            first = self.first_names[name]
            result[name] = result[first] if first in result else self.tensor(name, advance)
        return self.completed(result)

    def completed(self, state: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
        """Add to the result's tensors what is no tensor: other entries and the modules' versions."""
        state.update(self.extras)
        if self.newest.layout is not None:
            # where torch keeps module versions
            state._metadata = self.newest.layout  # type: ignore[attr-defined]
        return state

    def tensor(self, name: str, advance: Advance | None = None, scratch: Tensor | None = None) -> Tensor:
        """Return one tensor of the result, contiguous; it lies in ``scratch`` if one is given."""
        if name in self.replace:
            return self.replaced(name)
        spec = self.specs[name]
        size = spec.numel
        result = _memory(spec.nbytes).view(spec.dtype) if scratch is None else self.cut(name, scratch)
        return self.part(name, 0, size, advance, result).view(spec.shape)

    def scratch(self) -> Tensor:
        """Return memory for any one tensor of the result: one block, used again, leaves no holes behind."""
        return _memory(max((spec.nbytes for spec in self.specs.values()), default=0))

    def cut(self, name: str, scratch: Tensor) -> Tensor:
        """Return the beginning of ``scratch`` as one flattened tensor of the result."""
        spec = self.specs[name]
        return scratch[: spec.nbytes].view(spec.dtype)

    def replaced(self, name: str, tensor: Tensor | None = None) -> Tensor:
        """Return the tensor that was given instead of a mean; ``tensor`` if none was."""
        if tensor is not None and name not in self.replace:
            return tensor
        spec = self.specs[name]
        return self.replace[name].to("cpu", spec.dtype).reshape(spec.shape).contiguous()

    def part(
        self, name: str, start: int, stop: int, advance: Advance | None = None, result: Tensor | None = None
    ) -> Tensor:
        """Return elements ``start`` to ``stop`` of one flattened tensor, in ``result`` if that is given."""
        if result is None:
            result = torch.empty(stop - start, dtype=self.specs[name].dtype)
        begins = range(0, stop - start, _CHUNK)
        # Several ranges are averaged side by side, each operation by one thread: where cores are shared, the threads
        # inside an operation wait for each other, which was seen to take ten times as long.
        threads = torch.get_num_threads()
        if threads == 1 or len(begins) <= 1:
            for begin in begins:
                self._fill(name, start + begin, result[begin : begin + _CHUNK], advance)
            return result

        def fill(begin: int, result: Tensor = result) -> None:
            self._fill(name, start + begin, result[begin : begin + _CHUNK], advance)

        for source in self.sources:
            # opened once, before several threads ask for it
            source.flat(name, start, start)
        with _one_thread_per_operation(threads):
            for _ in self._pool.map(fill, begins):
                pass
        return result

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_WORKERS, "averaging")

    def _fill(self, name: str, start: int, piece: Tensor, advance: Advance | None) -> None:
        """Fill ``piece`` with the elements of one flattened tensor from ``start`` on."""
        spec, stop = self.specs[name], start + len(piece)
        if advance is not None:
            advance(len(piece) * sum(source.specs[name].dtype.itemsize for source in self.sources))
        if not spec.averaged:
            piece.copy_(self.newest.flat(name, start, stop))
            return
        values = [source.flat(name, start, stop) for source in self.sources]
        if spec.dtype.is_complex:
            piece, *values = map(_parts, (piece, *values))
        wide = torch.float64 if torch.float64 in (self.dtype, piece.dtype) else torch.float32
        mean = self._running_mean(values, wide) if wide == piece.dtype else self._divided_sum(values, wide)
        _round_into(piece, mean)
        # a finite sum, which needs no second tensor, shows that all are finite; an infinite one shows nothing
        summed = piece if piece.dtype.itemsize >= 4 else mean
        if not (self._allow_nonfinite or summed.sum().isfinite() or _is_finite(mean)):
            raise CheckpointError(self._nonfinite(name, start, stop))

    def _divided_sum(self, values: list[Tensor], wide: torch.dtype) -> Tensor:
        total, widened = self._sums(len(values[0]), wide)
        total.copy_(values[0])
        if self._weights[0] != 1.0:
            total.mul_(self._weights[0])
        for value, weight in zip(values[1:], self._weights[1:], strict=True):
            total.add_(widened.copy_(value), alpha=weight)
        return self._divide(total)

    def _sums(self, size: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return memory for two ranges of sums, each thread's own and used again: new memory is slow at first."""
        kept: dict[str, Tensor] = vars(self._per_thread)
        found = kept.get(str(wide))
        if found is None or found.shape[1] < size:
            found = kept[str(wide)] = torch.empty(2, size, dtype=wide)
        total, widened = found[:, :size]
        return total, widened

    def _running_mean(self, values: list[Tensor], wide: torch.dtype) -> Tensor:
        mean, total = values[0].to(wide, copy=True), self.shares[0]
        for value, share in zip(values[1:], self.shares[1:], strict=True):
            total += share
            # as long as all before it weigh nothing, so does this mean
            mean.lerp_(value.to(wide), share / total if total else 0.0)
        return mean

    def _nonfinite(self, name: str, start: int, stop: int) -> str:
        guilty = [s.path for s in self.sources if not _is_finite(s.flat(name, start, stop).to(torch.complex128))]
        where = f"in {guilty[0]}" if guilty else "in the mean"
        return f"`{shortened(name)}` holds NaN or infinity {where}. Leave that file out, or pass allow_nonfinite=True."


def _memory(nbytes: int) -> Tensor:
    """Return memory for a result, not initialized.

    A large one gets the large pages of Linux, if it has any: with small ones the system takes longer to hand out memory
    for a result than all files take to be read.
    """
    if nbytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)


@contextlib.contextmanager
def _one_thread_per_operation(before: int) -> Iterator[None]:
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _simplest(weights: Sequence[float]) -> list[float]:
    """Return weights of the same proportions: whole numbers where possible, whose products are exact."""
    if list(weights).count(weights[0]) == len(weights):
        return [1.0] * len(weights)
    smallest = min(weight for weight in weights if weight)
    ratios = [weight / smallest for weight in weights]
    if all(ratio < 2**20 and ratio.is_integer() for ratio in ratios):
        exact = [Fraction(ratio) * Fraction(smallest) == weight for ratio, weight in zip(ratios, weights, strict=True)]
        if all(exact):
            return ratios
    # scaled by a power of two, which rounds nothing, so that sums of huge weights stay finite
    exponent = math.frexp(max(weights))[1]
    return [math.ldexp(weight, -exponent) for weight in weights]


def _division_by(total: float) -> Callable[[Tensor], Tensor]:
    """Return what divides a tensor in place: by its reciprocal, which is faster, where that rounds alike.

    A quotient that lies exactly between two neighbors of the narrower type must come out exact, or the tie is broken
    the wrong way. A product with the reciprocal does that if the reciprocal is off by at most 2^-54 of itself.
    """
    reciprocal = 1 / total
    if abs(Fraction(reciprocal) * Fraction(total) - 1) <= Fraction(1, 2**54):
        return lambda tensor: tensor.mul_(reciprocal)
    return lambda tensor: tensor.div_(total)


def _parts(numbers: Tensor) -> Tensor:
    """Return the real and imaginary parts of complex numbers, in turn: the mean of numbers is that of their parts."""
    return torch.view_as_real(numbers.resolve_conj()).reshape(-1)


def _round_into(target: Tensor, values: Tensor) -> None:
    """Round ``values`` to the type of ``target``, once.

    torch goes from float64 to types of 16 and 8 bits by way of float32. Its first rounding can end on a number halfway
    between two of the narrow type, which the second then rounds as a tie. Rounded to odd on the way, a number never
    lands on such a half unless it is one.
    """
    if values.dtype == torch.float64 and target.dtype not in (torch.float32, torch.float64):
        near = values.float()
        exact = near.double()
        bits = near.view(torch.int32)
        # the magnitude lies in the lower bits, so that one less is one step toward zero
        bits -= (exact.abs() > values.abs()).int()
        bits |= (exact != values).int()
        values = near
    target.copy_(values)


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
