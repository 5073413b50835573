"""What only a CUDA device shows: waits, bandwidth of its memory, real half precision and a real lack of memory.

What can be, is tried on the CPU as well, so that the tests themselves are known to work.
"""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from benchmarks import gpu
from lightning_plugins.ema.shadow import Shadow

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
ON_BOTH = pytest.mark.parametrize("device", ["cpu", CUDA])
ON_CUDA = pytest.mark.parametrize("device", [CUDA])
PRECISIONS = pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])

pytestmark = [
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]


class Waiting(pl.Callback):
    """Says what torch says when the host waits for the device, and on a device really waits."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if outputs["loss"].is_cuda:
            outputs["loss"].item()
        else:
            warnings.warn(f"{gpu.WAIT} (made up)", stacklevel=1)


@pytest.mark.filterwarnings("ignore:called a synchronizing CUDA operation")  # those that are not counted
@ON_BOTH
def test_every_wait_is_counted(device):
    assert gpu.waits_per_run(device, lambda folder: [Waiting()]) == gpu.STEPS - 9  # of batches 5 to STEPS - 5


@ON_BOTH
def test_a_bare_trainer_never_waits(device):
    assert gpu.waits_per_run(device, gpu.nothing) == 0


@ON_CUDA
@PRECISIONS
def test_the_whole_stack_makes_the_host_wait_no_more_often_than_a_bare_trainer(device, precision):
    bare = gpu.waits_per_run(device, gpu.nothing, precision=precision)
    assert gpu.waits_per_run(device, gpu.stack, precision=precision) == bare
    assert (bare == 0) is (precision != "16-mixed")  # a gradient scaler reads one number a step


@ON_BOTH
def test_the_whole_stack_never_waits_in_full_precision(device):
    assert gpu.waits_per_run(device, gpu.stack) == 0


@ON_BOTH
def test_averages_do_not_count_the_steps_that_a_scaler_skips_and_schedules_do(device):
    settings = {"precision": "16-mixed"}
    if device == "cpu":  # where Lightning offers no scaler for the asking
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    counts = gpu.skipped_steps(device, **settings)
    assert counts["EMA"] == counts["applied"]
    assert counts["attempted"] == counts["rates"] == gpu.STEPS
    assert 5 < counts["applied"] < gpu.STEPS - 5  # steps of both kinds


@ON_BOTH
def test_a_batch_that_fits_runs_whole(device):
    size, moved = gpu.run_batch(device, 64, 32)
    assert size is None
    assert moved.abs().max() > 0


def test_a_batch_that_does_not_fit_runs_in_pieces_and_makes_the_same_step(monkeypatch):
    _, whole = gpu.run_batch("cpu", 64, 32)

    def forward(self, x):
        if len(x) > 20:
            raise torch.OutOfMemoryError("out of memory (made up)")
        return self.layers(x)

    monkeypatch.setattr(gpu.Classifier, "forward", forward)
    size, moved = gpu.run_batch("cpu", 64, 32)
    assert size == 16
    torch.testing.assert_close(moved, whole, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@ON_CUDA
def test_a_batch_beyond_the_devices_memory_runs_in_pieces_and_makes_the_same_step(device):
    for what, (found, holds) in gpu.memory_bounds().items():
        assert holds, f"{what}: {found}"


@pytest.mark.slow
@ON_CUDA
def test_an_update_is_as_fast_as_a_copy_and_needs_no_room(device):
    layers = 20  # a third of a billion parameters
    for what, (found, holds) in gpu.average_bounds(layers).items():
        assert holds, f"{what}: {found}"


@ON_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_an_average_is_updated_without_a_wait_wherever_it_lies(device, place, dtype):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)).to(device, dtype)
    begin = [parameter.detach().double() for parameter in module.parameters()]
    shadow = Shadow(module, device=place)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    shadow.update(0.5)  # makes its buffers
    torch.cuda.set_sync_debug_mode("error")
    try:
        shadow.update(0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ends = [parameter.detach().double() for parameter in module.parameters()]
    for start, end, average in zip(begin, ends, shadow.collect("average").values(), strict=True):
        assert average.dtype == torch.float32
        assert average.device.type == place
        torch.testing.assert_close(average.to(device).double(), start * 0.25 + end * 0.75, rtol=1e-5, atol=1e-6)


@ON_CUDA
def test_swapping_there_and_back_makes_no_wait_and_loses_no_bit(device):
    module = torch.nn.Linear(512, 512, device=device, dtype=torch.bfloat16)
    shadow = Shadow(module)
    with torch.no_grad():
        module.weight.mul_(2)
    raw = module.weight.detach().clone()
    shadow.update(0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        shadow.swap_in()
        shadow.swap_out()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(module.weight, raw)


def test_without_a_device_the_benchmark_says_so_in_one_line_and_does_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 0
    assert capsys.readouterr().out == "gpu: there is no CUDA device here, nothing was measured.\n"
