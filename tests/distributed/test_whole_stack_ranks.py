"""All techniques in one Trainer on two ranks: the ranks agree, and their run is the one of a single process.

Everything is in float64, so that what differs is not rounding.
"""

import csv
from pathlib import Path

import lightning.pytorch as unified
import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_plugins import (
    EMA,
    CheckpointAveraging,
    Cosine,
    CSVStatisticsLogger,
    GradientAccumulation,
    LatestWeightAveraging,
    LearningRateScheduler,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    WarmupCosine,
    average_checkpoints,
)
from tests.support import conditions
from tests.support.fsdp1 import FSDPOnCPU, double_precision
from tests.support.ranks import run_ranks
from tests.support.training import make_trainer

EPOCHS = 4
KILLED_IN = 2  # the epoch that the killed run does not begin
TRAINING_BATCHES, VALIDATION_BATCHES = 10, 3  # batches of eight samples, on however many ranks
STEPS = 3  # of an epoch: windows of 4, 4 and 2 batches

pytestmark = pytest.mark.slow


class Classifier(unified.LightningModule):
    """Two ranks share the last three rows out unevenly."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def training_step(self, batch, batch_idx):
        logits = self.network(batch[0])
        return {"loss": nn.functional.cross_entropy(logits, batch[1]), "logits": logits, "target": batch[1]}

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Sharded(Classifier):
    def configure_model(self):
        for layer in (self.network[0], self.network[2]):
            torch.distributed.fsdp.fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Parallel(Classifier):
    """The same two layers, each on both ranks, which see the same batches."""

    def configure_model(self):
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if not hasattr(self.network[0].weight, "placements"):
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.network, self.device_mesh["tensor_parallel"], plan)


MODULES = {"fsdp2": Sharded, "tensor": Parallel}


class Die(unified.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == KILLED_IN:
            raise RuntimeError("killed")


def data(batches, seed, trainer, *, shared=False):
    """Batches of eight samples in all, dealt out to the ranks in turn; Lightning's own sampler would shuffle."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8 * batches, 6, generator=generator, dtype=torch.float64)
    target = (inputs[:, :3] + 0.5 * inputs[:, 3:]).argmax(1)
    samples, ranks = TensorDataset(inputs, target), trainer.world_size
    if shared:
        ranks = 1
    sampler = DistributedSampler(samples, ranks, trainer.global_rank % ranks, shuffle=False)
    return DataLoader(samples, batch_size=8 // ranks, sampler=sampler)


def strategy_options(kind):
    if kind == "single":
        return {}
    if kind == "ddp":
        return {"devices": 2, "strategy": unified.strategies.DDPStrategy(process_group_backend="gloo")}
    if kind == "fsdp1":
        strategy = FSDPOnCPU(parts=("network.0",), process_group_backend="gloo")
        return {"devices": 2, "strategy": strategy, "plugins": [double_precision()]}
    sizes = (1, 2) if kind == "tensor" else (2, 1)
    return {"devices": 2, "strategy": unified.strategies.ModelParallelStrategy(*sizes, process_group_backend="gloo")}


def fit(kind, folder, *more, ckpt_path=None):
    """Train with everything; return what this rank has at the end."""
    folder = Path(folder)
    torch.manual_seed(0)
    module, shared = MODULES.get(kind, Classifier)(), kind == "tensor"
    average, averaging = EMA(Cosine(None, 0.5, 1.0), update_every_n_steps=2), CheckpointAveraging(last=3)
    latest = LatestWeightAveraging(3, every="10%", evaluate="raw", checkpoint="raw", after_fit="raw")
    scheduler = LearningRateScheduler({0: WarmupCosine("20%")}, record=True)
    momentum = LearningRateScheduler(Cosine(None, 1, 0.5), parameter="momentum")
    callbacks = [
        GradientAccumulation(4),
        scheduler,
        momentum,
        average,
        latest,
        StatisticsRecorder(["accuracy"]),
        CSVStatisticsLogger(str(folder / "log.csv")),
        TensorBoardStatisticsLogger(str(folder / "tensorboard")),
        averaging,
        ModelCheckpoint(folder, "{epoch}", save_top_k=-1),
        *more,
    ]
    options = {"max_epochs": EPOCHS, "enable_checkpointing": True, **strategy_options(kind)}
    trainer = make_trainer(folder, callbacks=callbacks, **options)
    training = data(TRAINING_BATCHES, 0, trainer, shared=shared)
    validation = data(VALIDATION_BATCHES, 1, trainer, shared=shared)
    trainer.fit(module, training, validation, ckpt_path=ckpt_path)
    return {
        "steps": trainer.global_step,
        "raw": plain(average.raw_state_dict()),
        "average": plain(average.average_state_dict()),
        "latest": plain(latest.average_state_dict()),
        "rates": scheduler.lrs,
        "statistics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "scores": averaging.scores,
        "averaged": str(averaging.path),
    }


def plain(state_dict):
    return {name: tensor.tolist() for name, tensor in state_dict.items()}


def fit_all(kind, folder):
    """A run, and one that is killed and resumed, in one pair of processes, which take longer to start than to train."""
    whole = fit(kind, f"{folder}/whole")
    with pytest.raises(RuntimeError, match="killed"):
        fit(kind, f"{folder}/killed", Die())
    saved = f"{folder}/killed/epoch={KILLED_IN - 1}.ckpt"
    return {"whole": whole, "resumed": fit(kind, f"{folder}/killed", ckpt_path=saved)}


@pytest.fixture(scope="module", params=["ddp", "fsdp1", "fsdp2", pytest.param("tensor", marks=conditions.fsdp2_on_cpu)])
def runs(request, tmp_path_factory):
    """The folder of a strategy's runs, and what each rank had."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, run_ranks(fit_all, request.param, str(folder))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one process on the ranks' batches put together, and its folder."""
    folder = tmp_path_factory.mktemp("single")
    return folder, fit("single", folder)


def rows(folder):
    """What the run logged, without the clock."""
    with (folder / "log.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "time"} for row in csv.DictReader(file)]


def files(folder):
    """What the run wrote; what is TensorBoard's is named by the time, and checkpoints may be directories."""
    stamps = list((folder / "tensorboard").iterdir())
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.suffix == ".ckpt"]
    names = [name for name in names if not any(parent.suffix == ".ckpt" for parent in name.parents)]
    events = sorted(path.parent.name for path in names if path.parts[0] == "tensorboard")
    return len(stamps), events, sorted(str(path) for path in names if path.parts[0] != "tensorboard")


def flat(values):
    """The numbers of a state dict, in its order."""
    return torch.cat([torch.tensor(value, dtype=torch.float64).flatten() for value in values.values()])


def test_the_ranks_agree_in_every_bit(runs):
    _, (first, second) = runs
    assert first == second


def test_the_run_is_that_of_one_process_on_all_batches(runs, single):
    folder, [ranks, _] = runs
    found, expected = ranks["whole"], single[1]
    assert found["steps"] == expected["steps"] == EPOCHS * STEPS
    assert found["rates"] == expected["rates"]
    for weights in ("raw", "average", "latest"):
        assert found[weights].keys() == expected[weights].keys()
        torch.testing.assert_close(flat(found[weights]), flat(expected[weights]), rtol=1e-10, atol=1e-12)
    for weights in ("average", "latest"):
        assert not torch.allclose(flat(found["raw"]), flat(found[weights]), rtol=1e-3)
    assert found["statistics"] == pytest.approx(expected["statistics"], rel=1e-6)
    assert found["scores"] == pytest.approx(expected["scores"], rel=1e-6)
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} <= set(found["statistics"])

    logged, alone = rows(folder / "whole"), rows(single[0])
    assert [row["phase"] for row in logged] == (
        ["train"] * TRAINING_BATCHES + ["validation"] * VALIDATION_BATCHES
    ) * EPOCHS
    for row, other in zip(logged, alone, strict=True):
        assert {name: float(row[name]) for name in ("loss", "accuracy")} == pytest.approx(
            {name: float(other[name]) for name in ("loss", "accuracy")}, rel=1e-6
        )
        assert all(row[name] == other[name] for name in ("epoch", "batch", "phase", "step", "lr"))


def test_every_file_is_written_once(runs, single):
    folder, _ = runs
    assert files(folder / "whole") == files(single[0])
    stamps, events, names = files(folder / "whole")
    assert (stamps, events) == (1, ["train", "validation"])
    assert names == ["averaged.ckpt", *(f"epoch={epoch}.ckpt" for epoch in range(EPOCHS)), "log.csv"]


def test_the_averaged_file_opens_and_is_the_mean_of_the_last_three(runs, single):
    folder, [ranks, _] = runs
    module = Classifier.load_from_checkpoint(ranks["whole"]["averaged"])
    averaged = flat(plain(module.state_dict()))
    last = [folder / "whole" / f"epoch={epoch}.ckpt" for epoch in range(EPOCHS - 3, EPOCHS)]
    states = [(_load_distributed_checkpoint if path.is_dir() else torch.load)(path)["state_dict"] for path in last]
    mean = torch.stack([flat(plain({name: state[name] for name in module.state_dict()})) for state in states]).mean(0)
    torch.testing.assert_close(averaged, mean, rtol=1e-6, atol=1e-7)
    expected = flat(plain(average_checkpoints([single[0] / path.name for path in last])))
    torch.testing.assert_close(averaged, expected, rtol=1e-6, atol=1e-7)


def test_a_killed_and_resumed_run_is_the_uninterrupted_one(runs):
    folder, [ranks, _] = runs
    whole, resumed = ranks["whole"], ranks["resumed"]
    for part in ("steps", "raw", "average", "latest", "statistics", "scores"):
        assert resumed[part] == whole[part]
    assert resumed["rates"] == whole["rates"][KILLED_IN * STEPS :]
    assert rows(folder / "killed") == rows(folder / "whole")
    averaged = [torch.load(ranks[run]["averaged"])["state_dict"] for run in ranks]
    assert all(torch.equal(averaged[0][name], averaged[1][name]) for name in averaged[0])
