"""What it takes to run a batch again after the device ran out of memory: nothing of the failed attempt remains."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_plugins.core.metric_state import MetricState, metrics_in
from lightning_plugins.core.random_state import RandomState

_TEXTS = (
    # CUDA, HIP, XPU, MPS, NPU and others: "... out of memory"
    "out of memory",
    "outofmemory",
    "out_of_memory",
    "out_of_host_memory",
    "out_of_device_memory",
    "memoryallocation",
    # Level Zero and SYCL below XPU
    "error_out_of_resources",
    # cuBLAS, cuDNN, cuFFT, cuSOLVER, cuSPARSE, cuRAND, MIOpen, HPU
    "alloc_failed",
    "allocation_failed",
    "allocfailed",
    "allocation failed",
    "cusparse_status_insufficient_resources",
    # a handle is the first thing that does not fit
    "cublas_status_not_initialized when calling `cublascreate",
    # cuDNN says so when its work space does not fit; so reads Lightning's own `is_oom_error`
    "cudnn_status_not_supported",
    "unable to find a valid cudnn algorithm",
    "unable to find an engine to execute this computation",
    # the host: Linux, Windows, C++
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    # XLA
    "resource_exhausted",
    "resource exhausted",
)
"""What the libraries below PyTorch say, in small letters."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: an accelerator's or the host's, also in an error that led to this one.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")), is_out_of_memory(KeyError())
        (True, False)
    """
    return any(map(_says_so, _chain(error)))


def _says_so(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(said in text for said in _TEXTS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, those that it came from, and those of a group; each once."""
    waiting, seen = [error], set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        before = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
        waiting += [] if before is None else [before]
        waiting += getattr(found, "exceptions", ())


def halved(size: int) -> int:
    """Return the next size to try, 0 when there is none.

    Example:
        >>> halved(64), halved(5), halved(1)
        (32, 3, 0)
    """
    return -(-size // 2) if size > 1 else 0


def add_hint(error: BaseException, hint: str) -> None:
    """Append ``hint`` to the message of ``error``, once."""
    message = str(error)
    if hint not in message:
        error.args = (f"{message}\n{hint}", *error.args[1:])


class StateBeforeBatch:
    """A copy of what a training step changes besides the weights; whose that is, is looked up before every batch.

    Args:
        module: Its buffers (a forward updates running statistics), its metrics (whose states are no buffers) and its
            gradients are kept.
        device: Its random numbers are kept besides the host's.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._parameters = list(module.parameters())
        self._random = RandomState([device])
        self._buffers = [
            (child._buffers, name, buffer, buffer.detach().clone())
            for child in module.modules()
            for name, buffer in child._buffers.items()
            if buffer is not None
        ]
        self._metrics = [(metric, MetricState(metric)) for metric in metrics_in(module)]
        self._gradients: list[Tensor | None] | None = None

    @torch.no_grad()
    def keep_gradients(self) -> None:
        """Copy the gradients that are there before the first backward of the batch; later calls do nothing."""
        if self._gradients is None:
            gradients = [parameter.grad for parameter in self._parameters]
            self._gradients = [None if gradient is None else gradient.clone() for gradient in gradients]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; may be called again after another attempt."""
        self._random.restore()
        for buffers, name, buffer, value in self._buffers:
            # a forward may have replaced it
            buffers[name] = buffer.copy_(value)
        for metric, state in self._metrics:
            state.restore(metric)
        for parameter, gradient in zip(self._parameters, self._gradients or (), strict=False):
            parameter.grad = None if gradient is None else gradient.clone()


def empty_caches() -> None:
    """Give memory that the allocators keep back to the devices."""
    if torch.accelerator.is_available():
        # older releases of torch have one for each kind of device
        getattr(torch.accelerator, "empty_cache", torch.cuda.empty_cache)()
