"""Memory that ran out is recognized in the words of every library below PyTorch; nothing of the attempt is left."""

import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.utilities.memory import is_oom_error

from lightning_plugins import MicroBatching
from lightning_plugins.microbatching.out_of_memory import is_out_of_memory
from lightning_plugins.microbatching.size_finder import Ranks
from tests.support.accumulation_runs import batches, fit
from tests.support.microbatch_cases import Fitting

TEXTS = {
    "CUDA": "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
    "CUDA's runtime": "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA's runtime, by its constant": "CUDA error: cudaErrorMemoryAllocation",
    "CUDA's driver": "CUDA driver error: out of memory",
    "HIP": "HIP out of memory. Tried to allocate 20.00 MiB",
    "HIP's runtime": "HIP error: hipErrorOutOfMemory",
    "MPS": "MPS backend out of memory (MPS allocated: 17.93 GB, other allocations: 384.00 KB)",
    "NPU": "NPU out of memory. Tried to allocate 4.00 GiB (NPU 0; 60.97 GiB total capacity)",
    "XPU": "XPU out of memory. Tried to allocate 1.17 GiB (GPU 0; 14.90 GiB total capacity)",
    "XPU, unified runtime": "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "XPU, resources": "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
    "XPU, plug-in": "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)",
    "XPU, host": "Native API failed. Native API returns: -6 (PI_ERROR_OUT_OF_HOST_MEMORY)",
    "Level Zero": "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    "HPU": "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::1073741824 (1024)MB",
    "XLA": "RESOURCE_EXHAUSTED: Attempting to reserve 4.50G at the bottom of memory.",
    "cuBLAS": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasSgemm(handle, opa, opb, m, n, k)`",
    "cuBLAS's handle": "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN's work space": (
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
    ),
    "cuDNN's search": "Unable to find a valid cuDNN algorithm to run convolution",
    "cuDNN's engines": "GET was unable to find an engine to execute this computation",
    "cuFFT": "cuFFT error: CUFFT_ALLOC_FAILED",
    "cuSOLVER": "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cuSPARSE": "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",
    "cuSPARSE's resources": "CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseSpMM`",
    "cuRAND": "CURAND_STATUS_ALLOCATION_FAILED",
    "MIOpen": "miopenStatusAllocFailed",
    "the host": "[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory: you tried to",
    "the host, Windows": "[enforce fail at alloc_cpu.cpp:72] . DefaultCPUAllocator: not enough memory: you tried to",
    "shared memory": "unable to mmap 1048576 bytes from file: Cannot allocate memory (12)",
    "C++": "std::bad_alloc",
}

OTHERS = {
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"),
    "another status": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    "an illegal access": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "a kernel's shared memory": RuntimeError(
        "out of resource: shared memory, Required: 114688, Hardware limit: 101376"
    ),
    "the user's words": ValueError("the buffer is out of memory slots"),
    "a key": KeyError("out of memory"),
    "a stop": KeyboardInterrupt(),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_that_says_that_memory_ran_out(text):
    assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(getattr(torch, "AcceleratorError", RuntimeError)(text))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), MemoryError(), OSError(12, "Cannot allocate memory")], ids=repr
)
def test_a_type_that_says_so(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_nothing_that_lightning_recognizes_is_missed(text):
    assert is_out_of_memory(RuntimeError(text)) >= is_oom_error(RuntimeError(text))


@pytest.mark.parametrize("error", OTHERS.values(), ids=OTHERS)
def test_another_error(error):
    assert not is_out_of_memory(error)


def after(error, *, cause=None, context=None):
    """The error as it is when another one led to it, said (``from``) or not."""
    error.__context__ = context
    if cause is not None:
        error.__cause__ = cause
    return error


def test_an_error_that_came_of_one():
    assert is_out_of_memory(after(ValueError("the attention failed"), cause=torch.OutOfMemoryError()))
    assert is_out_of_memory(after(KeyError("cache"), context=MemoryError()))
    assert is_out_of_memory(after(KeyError("cache"), context=after(ValueError("one"), cause=MemoryError())))


def test_an_error_in_the_place_of_one():
    hidden = after(KeyError("cache"), context=MemoryError())
    hidden.__suppress_context__ = True  # raised `from None`
    assert not is_out_of_memory(hidden)


def test_errors_that_lead_to_each_other():
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert not is_out_of_memory(one)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs groups of exceptions (Python 3.11)")
def test_one_of_a_group():
    assert is_out_of_memory(ExceptionGroup("several", [ValueError("one"), MemoryError()]))  # noqa: F821


@pytest.mark.parametrize(
    "error",
    [
        MemoryError,
        lambda: RuntimeError(TEXTS["cuFFT"]),
        lambda: after(ValueError("it failed"), cause=MemoryError()),
        lambda: RuntimeError(TEXTS["HPU"]),
    ],
    ids=["MemoryError", "cuFFT", "a chained error", "HPU"],
)
def test_the_search_goes_on_with_half(error):
    class Fails(Fitting):
        def training_step(self, batch, batch_idx):
            try:
                return super().training_step(batch, batch_idx)
            except torch.OutOfMemoryError:
                failure = error()
                raise failure from failure.__cause__

    callback = MicroBatching()
    fit(Fails(fits=3), [callback], batches((8, 5), dtype=torch.float64, tokens=False))
    assert callback.size_found == 2


def ranks_beside(monkeypatch, other, model=None):
    """Return what one of two ranks has; the other brings ``other``, in turn, to each reduction of all."""
    brought = iter(other)

    def all_reduce(tensor, op=torch.distributed.ReduceOp.SUM):
        part = torch.as_tensor(next(brought), dtype=tensor.dtype)
        tensor.copy_(torch.minimum(tensor, part) if op is torch.distributed.ReduceOp.MIN else tensor + part)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    strategy = SimpleNamespace(model=SimpleNamespace(module=model), root_device=torch.device("cpu"))
    return Ranks(SimpleNamespace(strategy=strategy, world_size=2))


@pytest.mark.parametrize(
    ("own", "other", "agreed"), [(None, 2**62, None), (None, 1, 1), (1, 2**62, 1), (5, 3, 3), (3, 5, 3), (0, 1, 0)]
)
def test_ranks_agree_on_the_smallest_size_that_any_of_them_wants(monkeypatch, own, other, agreed):
    assert ranks_beside(monkeypatch, [other]).agree(own) == agreed


def test_gradients_are_averaged_over_the_ranks_and_none_is_made_for_what_no_rank_uses(monkeypatch):
    model = torch.nn.ParameterDict({name: torch.zeros(2) for name in ("both", "frozen", "none", "other", "own")})
    model["frozen"].requires_grad_(False)
    model["both"].grad, model["own"].grad = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 6.0])
    brought = [[1, 0, 1, 0], [3.0, 4.0], [8.0, 2.0], [0.0, 0.0]]
    ranks_beside(monkeypatch, brought, model)._average_gradients()
    found = {name: None if parameter.grad is None else parameter.grad.tolist() for name, parameter in model.items()}
    assert found == {"both": [2.0, 3.0], "other": [4.0, 1.0], "own": [2.0, 3.0], "none": None, "frozen": None}


def test_parts_that_were_exchanged_are_put_back_too_when_a_batch_runs_again():
    class Exchanged(pl.LightningModule):
        def __init__(self, fails_at=0):
            super().__init__()
            self.body, self.calls, self.fails_at = torch.nn.Linear(2, 2).double(), 0, fails_at

        def on_train_epoch_start(self):
            self.head, self.mean = torch.nn.Linear(2, 1).double(), torchmetrics.MeanMetric()
            self.head.register_buffer("seen", torch.zeros(()))
            self.trainer.optimizers[0].add_param_group({"params": list(self.head.parameters())})

        def training_step(self, batch, batch_idx):
            self.calls += 1
            self.head.seen += len(batch)
            self.mean.update(torch.full((len(batch),), float(batch_idx)))
            loss = self.head(self.body(batch)).pow(2).mean()
            if self.calls == self.fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated).")
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.body.parameters(), lr=0.1)

    runs = []
    # in pieces of 4; in the second epoch the second piece of the first batch fails
    for callbacks, fails_at in (([], 0), ([MicroBatching("auto")], 6)):
        torch.manual_seed(0)
        module = Exchanged(fails_at)
        if callbacks:
            callbacks[0]._found = 4
        data = [torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(2)]
        fit(module, callbacks, data, epochs=2, accumulate_grad_batches=2)
        runs.append((module.state_dict(), module.mean.compute(), module.calls))
    assert runs[1][2] == 4 + 2 + 4 + 4
    assert callbacks[0].size_found == 2
    torch.testing.assert_close(runs[1][:2], runs[0][:2], rtol=1e-12, atol=1e-14)
