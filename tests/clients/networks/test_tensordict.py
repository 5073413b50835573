"""All techniques with batches that are TensorDicts, or tensor classes made from them."""

import pytest
import torch
from tensordict import TensorDict, tensorclass
from torch.utils.data import DataLoader

from lightning_plugins import MicroBatching, TensorBoardStatisticsLogger, Tokens
from tests.clients import plain_torch
from tests.clients.comparison import assert_the_logs_are_the_clients, assert_the_same_steps
from tests.clients.fitting import Module, fit
from tests.clients.stack import Stack, chart

LR, EPOCHS, NUMBER, BATCH = 0.1, 2, 27, 4


@tensorclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


def as_tensordict(x, y):
    return TensorDict({"x": x, "y": y}, batch_size=[len(x)])


def as_nested(x, y):
    return TensorDict({"inputs": TensorDict({"x": x}, batch_size=[len(x)]), "y": y}, batch_size=[len(x)])


def as_tensorclass(x, y):
    return Sample(x=x, y=y, batch_size=[len(x)])


KINDS = {"tensordict": as_tensordict, "nested": as_nested, "tensorclass": as_tensorclass}


class Network(torch.nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def forward(self, batch):
        nested = ("inputs", "x") in batch.keys(include_nested=True) if isinstance(batch, TensorDict) else False
        return super().forward(batch["inputs", "x"] if nested else batch.get("x")).squeeze(1)


def loss_of(module, batch):
    return torch.nn.functional.mse_loss(module(batch), batch.get("y"))


def loader(make):
    x = torch.randn(NUMBER, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(make(x, x.sum(1)), batch_size=BATCH, collate_fn=lambda rows: rows)


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tensordict")
    stack, watch = Stack(path, warmup=2), plain_torch.Watch()
    module = Module(Network(), loss_of, LR)
    fit(module, path, [*stack.callbacks, watch], loader(KINDS[request.param]), epochs=EPOCHS)
    return stack, watch, module, KINDS[request.param]


def test_every_step_is_the_one_that_plain_torch_takes(run):
    stack, watch, module, _ = run
    assert len(watch.batches) == EPOCHS * 7
    assert_the_same_steps(stack, watch, module, loss_of=loss_of, join=torch.cat, lr=LR, epochs=EPOCHS)


def test_the_logs_hold_the_losses_of_the_batches(run):
    assert_the_logs_are_the_clients(*run[:2], lr=LR, epochs=EPOCHS)


def test_pieces_of_a_batch_make_the_same_steps(run, tmp_path):
    stack, watch, _, make = run
    pieces, seen = Stack(tmp_path, warmup=2, count=Tokens("y")), plain_torch.Watch()
    callbacks = [pieces.accumulation, pieces.scheduler, pieces.ema, MicroBatching(3), seen]
    fit(Module(Network(), loss_of, LR), tmp_path, callbacks, loader(make), epochs=EPOCHS)
    assert seen.losses == pytest.approx(watch.losses, rel=1e-5)
    assert plain_torch.distance(pieces.ema.raw_state_dict(), stack.ema.raw_state_dict(), watch.initial) < 1e-5


def test_samples_are_rows(run, tmp_path):
    logger = TensorBoardStatisticsLogger(tmp_path / "tensorboard", axis="samples")
    fit(Module(Network(), loss_of, LR), tmp_path, [logger], loader(run[3]), epochs=EPOCHS)
    assert [place for place, _ in chart(tmp_path / "tensorboard", "train")] == [NUMBER, 2 * NUMBER]
