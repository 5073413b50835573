"""EMA, schedules and accumulation beside finetuning-scheduler: three phases, the best one restored, a new optimizer."""

import copy
import csv

import pytest
import torch
from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins import (
    EMA,
    CSVStatisticsLogger,
    GradientAccumulation,
    LearningRateScheduler,
    WarmupCosine,
    extract_weights,
)
from tests.clients import plain_torch
from tests.clients.fitting import fit
from tests.clients.stack import DECAY, WINDOW

LR, NUMBER, BATCH, EPOCHS, END = 0.1, 39, 5, 6, 0.1
WINDOWS = (0, 0, 0, 1, 1, 1, 2, 2)  # of the batches of an epoch, whose last one has 4 samples
STEPS = 3
TOTAL = STEPS * EPOCHS
# so that the best epoch is no phase's last one: the third epoch goes on from the first, the fifth from the third
SCORES = [1.0, 2.0, 0.9, 0.95, 0.8, 0.7]
PARTS, JOINS_AT, PEAKS = ("head", "middle", "first"), (0, 2, 4), (LR, 0.05, 0.02)


class Network(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.middle(self.first(x).tanh()).tanh()).squeeze(1)

    def training_step(self, batch, batch_idx):
        return loss_of(self, batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", SCORES[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)


def loss_of(net, batch):
    return (net(batch[0]) - batch[1]).square().mean()


def loader(batch_size=BATCH):
    x = torch.randn(NUMBER, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1)), batch_size=batch_size)


def phases(new_optimizer):
    """The client's schedule: what is thawed at which epoch, and at which rate."""
    made = {}
    for number, (part, begins, peak) in enumerate(zip(PARTS, JOINS_AT, PEAKS, strict=True)):
        made[number] = {"params": [rf"{part}.*"], "max_transition_epoch": begins + 2}
        if number:
            made[number]["lr"] = peak
    if new_optimizer:
        made[2]["new_optimizer"] = {
            "optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0, "momentum": 0.9}}
        }
    return made


def factor(step):
    return END + (1 - END) * plain_torch.warmup_cosine(step, warmup=2, total=TOTAL) if step >= 2 else step / 2


def rates(epoch, step):
    """A group's rate is the one that the client gives it when it joins; from then on it follows the schedule."""
    joined = [(begins * STEPS, peak) for begins, peak in zip(JOINS_AT, PEAKS, strict=True) if begins <= epoch]
    return [peak * factor(step) / (factor(begun) if begun else 1) for begun, peak in joined]


def by_plain_torch(new_optimizer):
    """The same run as a loop: the weights, momenta and averages of the best epoch are kept and put back."""
    net = Network()
    averages = plain_torch.Averages(net, {"ema": lambda n: plain_torch.ema_decay(n, DECAY)})
    optimizer, step, best = None, 0, None
    for epoch in range(EPOCHS):
        if epoch in JOINS_AT:
            before, optimizer = optimizer, optimizer_at(net, epoch)
        if epoch in JOINS_AT[1:]:
            weights, momenta, averages.kept, averages.n = copy.deepcopy(best)
            net.load_state_dict(weights)
            kept = [] if new_optimizer and epoch == JOINS_AT[-1] else before.state
            for parameter in kept:
                optimizer.state[parameter]["momentum_buffer"] = momenta[parameter_name(net, parameter)]
        for batch in loader(BATCH * WINDOW):
            for group, rate in zip(optimizer.param_groups, rates(epoch, step), strict=True):
                group["lr"] = rate
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()
            averages.update()
            step += 1
        if SCORES[epoch] == min(SCORES[: epoch + 1]):
            momenta = {parameter_name(net, p): state["momentum_buffer"] for p, state in optimizer.state.items()}
            best = copy.deepcopy((net.state_dict(), momenta, averages.kept, averages.n))
    return net.state_dict(), averages.kept["ema"]


def optimizer_at(net, epoch):
    """A group for each part that is trained from this epoch on."""
    parts = PARTS[: 1 + JOINS_AT.index(epoch)]
    groups = [{"params": list(getattr(net, part).parameters())} for part in parts]
    return torch.optim.SGD(groups, lr=LR, momentum=0.9)


def parameter_name(net, parameter):
    return next(name for name, other in net.named_parameters() if other is parameter)


@pytest.fixture(scope="module", params=[False, True], ids=["the optimizer kept", "a new optimizer"])
def run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("finetuning")
    ema, seen, net = EMA(DECAY), Rates(), Network()
    callbacks = [
        FinetuningScheduler(phases(request.param), epoch_transitions_only=True, allow_untested=True, restore_best=True),
        FTSCheckpoint(monitor="val_loss", save_top_k=-1, filename="{epoch}"),
        GradientAccumulation(WINDOW),
        ema,
        LearningRateScheduler(WarmupCosine(2, end=END)),
        CSVStatisticsLogger(path / "log.csv"),
        seen,
    ]
    initial = copy.deepcopy(net.state_dict())
    fit(net, path, callbacks, loader(), loader(), EPOCHS)
    return ema, seen.used, path, initial, request.param


class Rates(plain_torch.Watch):
    """Notes the rates of all groups inside each step, of whichever optimizer takes it."""

    def __init__(self):
        super().__init__()
        self.used, self._taken_by = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.optimizers[0] is not self._taken_by:
            self._taken_by = trainer.optimizers[0]
            self._taken_by.register_step_pre_hook(self._note_all)

    def _note_all(self, optimizer, args, kwargs):
        self.used.append([float(group["lr"]) for group in optimizer.param_groups])


def test_every_group_follows_the_schedule_from_the_rate_that_it_joined_with(run):
    _, used, path, _, _ = run
    expected = [rates(step // STEPS, step) for step in range(TOTAL)]
    assert [len(found) for found in used] == [1] * 6 + [2] * 6 + [3] * 6
    for found, wanted in zip(used, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-9)
    with (path / "log.csv").open() as file:
        logged = [float(row["lr"]) for row in csv.DictReader(file) if row["phase"] == "train"]
    of_batches = [expected[STEPS * epoch + window][0] for epoch in range(EPOCHS) for window in WINDOWS]
    assert logged == pytest.approx(of_batches, rel=1e-9)


def test_the_weights_and_the_average_are_those_of_a_plain_loop(run):
    ema, _, path, initial, new_optimizer = run
    raw, average = by_plain_torch(new_optimizer)
    assert plain_torch.distance(ema.raw_state_dict(), raw, initial) < 1e-5
    assert plain_torch.distance(ema.average_state_dict(), average, initial) < 1e-5
    assert ema.state_dict()["last_update"] == 4 * STEPS  # two of the six epochs were taken back
    last = path / "checkpoints" / "epoch=5.ckpt"
    assert plain_torch.distance(extract_weights(last, "raw", trust=True), raw, initial) < 1e-5
    assert plain_torch.distance(extract_weights(last, trust=True), average, initial) < 1e-5


def test_the_bound_would_notice_an_average_that_is_not_put_back(run):
    ema, _, _, initial, new_optimizer = run
    _, average = by_plain_torch(not new_optimizer)
    assert plain_torch.distance(ema.average_state_dict(), average, initial) > 1e-3
