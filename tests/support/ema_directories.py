"""Runs with distributed checkpoints in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_plugins import EMA, ConstantDecay, GradientAccumulation, LatestWeightAveraging, PostHocEMA
from lightning_plugins.accumulation import carried_windows as accumulated
from lightning_plugins.core.sharding import collected
from tests.support.ema_distributed import save, sharded_net, trainer
from tests.support.ema_runs import Net, regression

FOLDER = "lightning_plugins_ema"
RAW = {"evaluate": "raw", "checkpoint": "raw", "after_fit": "raw"}


def callbacks(directory):
    """Two averages, the latest snapshots, and two averages of the post-hoc kind."""
    slow = EMA(ConstantDecay(0.95), name="slow.one", **RAW)
    # in a resumed run some of its snapshots are of the run before
    latest = LatestWeightAveraging(7, every=3, name="slow.two", **RAW)
    posthoc = PostHocEMA(every_n_steps=8, dirpath=Path(directory) / "snapshots")
    return EMA(ConstantDecay(0.8)), slow, latest, posthoc


def fit(*others, max_epochs=2, ckpt_path=None, module=None, data=None, **kwargs):
    strategy = ModelParallelStrategy(data_parallel_size=int(os.environ["RANKS_OF_TEST"]), tensor_parallel_size=1)
    module = module or sharded_net()
    run = trainer(strategy, *others, max_epochs=max_epochs, **kwargs)
    run.fit(module, data or regression(), regression(n=8, seed=9), ckpt_path=ckpt_path)
    return run, module


def carried(*others, ckpt_path=None, max_epochs=3):
    """Three epochs of eight batches in windows of three, each batch shared out to the ranks."""
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["RANKS_OF_TEST"])
    shares = [tuple(values[rank::ranks] for values in batch) for batch in regression()]
    data = DataLoader(shares, batch_size=None)
    accumulation = GradientAccumulation(3, carry=True)
    return whole(fit(accumulation, *others, max_epochs=max_epochs, ckpt_path=ckpt_path, data=data)[1])


def states(ema, slow, latest):
    return {
        "average": ema.average_state_dict(),
        "slow": slow.average_state_dict(),
        "latest": latest.average_state_dict(),
        "raw": ema.raw_state_dict(),
    }


def whole(module):
    return {name: value.full_tensor().detach().clone() for name, value in module.named_parameters()}


class _Calls(TorchDispatchMode):
    """Counts what is asked of torch.distributed, in whichever of its forms."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind is DTensor for kind in types):
            return NotImplemented
        if "c10d" in func.namespace:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class CountCalls(lightning.Callback):
    """What the steps of an epoch ask of torch.distributed."""

    def __init__(self):
        self.mode = _Calls()

    def on_train_epoch_start(self, trainer, pl_module):
        self.mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_last_batch:
            self.mode.__exit__(None, None, None)


def kept_in_shares(part, like, *, keep, shares):
    """Instead of what gathers gradients: those of a directory are not brought to one place."""
    assert shares
    return collected(part, like, keep=keep, shares=shares)


class Weights(lightning.Callback):
    """The weights after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(whole(pl_module))


class PartlySharded(Net):
    """Its batch normalization is whole on every rank; both see the same data."""

    def configure_model(self):
        for layer in (self.net[0], self.net[3]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class SaveInMidValidation(lightning.Callback):
    """Saves while the average is in the module, and FSDP2 has gathered it."""

    def __init__(self, path):
        self.path = path

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1 and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def write(directory):
    """Directories of every kind, as two ranks write them, and what the averages were."""
    directory = Path(directory)
    ema, slow, latest, posthoc = callbacks(directory)
    files = {
        "full": ModelCheckpoint(directory / "full", filename="{epoch}", save_top_k=-1, save_last="link"),
        "pruned": ModelCheckpoint(
            directory / "pruned", filename="{epoch}", monitor="val_loss", mode="max", save_last=True
        ),
        "steps": ModelCheckpoint(directory / "steps", filename="{step}", every_n_train_steps=3, save_top_k=2,
                                 monitor="step", mode="max"),
        "weights": ModelCheckpoint(
            directory / "weights", filename="{step}", save_weights_only=True, every_n_train_steps=8
        ),
    }  # fmt: skip
    weights = Weights()
    saving = SaveInMidValidation(directory / "mid")
    run, _ = fit(posthoc, slow, latest, ema, weights, saving, *files.values(), max_epochs=3)
    found = states(ema, slow, latest)
    with pytest.MonkeyPatch.context() as patch:
        # nothing is brought to one place to be saved
        patch.setattr(DTensor, "full_tensor", None)
        run.save_checkpoint(directory / "end")
    run.save_checkpoint(directory / "end-weights", weights_only=True)

    counted, plain = CountCalls(), CountCalls()
    raw = EMA(ConstantDecay(0.8), checkpoint="raw", after_fit="raw")
    fit(counted, raw, ModelCheckpoint(directory / "raw", filename="{epoch}"), max_epochs=1)
    fit(plain, ModelCheckpoint(directory / "plain", filename="{epoch}"), max_epochs=1)

    half, half_files = EMA(0.9), ModelCheckpoint(directory / "half", filename="{epoch}", save_top_k=-1)
    fit(half, half_files, SaveInMidValidation(directory / "half-mid"), max_epochs=2, precision="bf16-true")
    windows = ModelCheckpoint(directory / "carried", filename="{epoch}", save_top_k=-1)
    both = ModelCheckpoint(directory / "carried-ema", filename="{epoch}", save_top_k=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulated, "collected", kept_in_shares)
        same = ModelCheckpoint(directory / "carried-same", filename="same", enable_version_counter=False, mode="max")
        found["carried"] = carried(windows, same)
    found["carried_ema"] = carried(EMA(ConstantDecay(0.8), after_fit="raw"), both)

    save(
        "write", directory, **found,
        steps=weights.seen, raw_average=raw.average_state_dict(), raw_raw=raw.raw_state_dict(),
        half=half.average_state_dict(), half_raw=half.raw_state_dict(), counts=dict(counted.mode.counts),
        plain_counts=dict(plain.mode.counts), kept=[str(path) for path in files["pruned"].best_k_models],
    )  # fmt: skip


def resume(directory, ranks="2"):
    """Go on from what two ranks wrote."""
    directory = Path(directory)
    ema, slow, latest, posthoc = callbacks(directory / ranks)
    fit(ema, slow, latest, posthoc, max_epochs=3, ckpt_path=directory / "full" / "epoch=0.ckpt")
    found = states(ema, slow, latest)
    found["carried"] = carried(ckpt_path=directory / "carried" / "epoch=0.ckpt")
    if ranks == "2":
        found |= only_two(directory)
    save("resume", directory / ranks, **found)


def only_two(directory):
    """What needs no other number of ranks."""
    half = EMA(0.9)
    fit(half, max_epochs=2, precision="bf16-true", ckpt_path=directory / "half" / "epoch=0.ckpt")
    found = {"half": half.average_state_dict(), "half_raw": half.raw_state_dict()}
    ema = EMA(ConstantDecay(0.8), after_fit="raw")
    found["carried_ema"] = carried(ema, ckpt_path=directory / "carried-ema" / "epoch=1.ckpt")

    raw = EMA(ConstantDecay(0.8), checkpoint="average")
    fit(raw, max_epochs=1, ckpt_path=directory / "raw" / "epoch=0.ckpt")
    found |= {"raw_average": raw.average_state_dict(), "raw_raw": raw.raw_state_dict()}

    # without the plugin: what Lightning alone loads is the average, and it is trained on
    run, module = fit(max_epochs=1, ckpt_path=directory / "full" / "epoch=0.ckpt")
    found["removed"] = whole(module)
    # and where it replaces a directory, the sets that are left over are not taken for its own
    replaced = directory / "replaced"
    with_ema = EMA(ConstantDecay(0.8))
    fit(with_ema, ModelCheckpoint(replaced, filename="x"), max_epochs=1)
    run.save_checkpoint(replaced / "x.ckpt")

    added = EMA(ConstantDecay(0.8))
    weights = Weights()
    fit(added, weights, max_epochs=2, ckpt_path=directory / "plain" / "epoch=0.ckpt")
    found |= {"added": added.average_state_dict(), "added_steps": weights.seen, "added_from": whole(module)}

    # parameters and averaged buffers that are not sharded lie beside those that are
    def partly_sharded():
        torch.manual_seed(0)
        return {"module": PartlySharded(width=5), "max_epochs": 2}

    first, again = (EMA(ConstantDecay(0.8), buffers="average") for _ in range(2))
    fit(first, ModelCheckpoint(directory / "partly", filename="{epoch}", save_top_k=-1), **partly_sharded())
    fit(again, ckpt_path=directory / "partly" / "epoch=0.ckpt", **partly_sharded())
    found |= {"partly": first.average_state_dict(), "partly_again": again.average_state_dict()}

    # before it begins an average has no set
    late, later = (EMA(ConstantDecay(0.8), start_step=12) for _ in range(2))
    fit(late, ModelCheckpoint(directory / "late", filename="{epoch}", save_top_k=-1), max_epochs=2)
    fit(later, max_epochs=2, ckpt_path=directory / "late" / "epoch=0.ckpt")
    found |= {"late": late.average_state_dict(), "late_again": later.average_state_dict()}

    # weights that are loaded in mid-fit bring their averages
    class Loading(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                trainer.strategy.load_model_state_dict(trainer.strategy.load_checkpoint(directory / "end"))
                found["loaded"] = whole(pl_module)
                found["loaded_average"] = loading.average_state_dict()

    loading = EMA(ConstantDecay(0.8))
    fit(loading, Loading(), max_epochs=1)

    # evaluated without a fit: the set that the callbacks ask for
    for name, ema in (("average", EMA()), ("trained", EMA(evaluate="raw")), ("slow", EMA(name="slow.one"))):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        module = sharded_net()
        trainer(strategy, ema).validate(
            module, regression(n=8, seed=9), verbose=False, ckpt_path=directory / "full" / "last.ckpt"
        )
        found[f"evaluated_{name}"] = whole(module)
    return found


def refused(directory):
    """Resume from directories that were cut off; note what is said."""
    directory = Path(directory)
    messages = {}
    for kind, resumed in (("cut", lambda **options: fit(EMA(0.8), **options)), ("cut-carried", carried)):
        for place in sorted((directory / kind).iterdir()):
            with pytest.raises(ValueError, match=str(place)) as error:
                resumed(max_epochs=1, ckpt_path=place)
            messages[f"{kind}/{place.name}"] = f"{type(error.value).__name__}: {error.value}"
    (directory / "refused.json").write_text(json.dumps(messages))


def killed(directory):
    """Replace a checkpoint and die when its weights are there, and its `meta.pt` is still that of before."""
    original, calls = torch.save, []

    def dying(content, place, *args, **kwargs):
        if str(place).endswith("meta.pt"):
            calls.append(place)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(content, place, *args, **kwargs)

    torch.save = dying
    files = ModelCheckpoint(Path(directory) / "killed", filename="same", enable_version_counter=False)
    fit(EMA(0.8), files, max_epochs=2)


def plain_steps(epochs):
    """The weights after every step of a plain loop on one process."""
    torch.manual_seed(0)
    module = Net(width=5)
    module.net[1] = nn.Identity()
    optimizer = module.configure_optimizers()
    steps = []
    for _ in range(epochs):
        for batch in regression():
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
            steps.append({name: value.detach().clone() for name, value in module.named_parameters()})
    return module, steps


def recursion(start, steps, decay):
    """The average in float64."""
    shadow = {name: value.double() for name, value in start.items()}
    for weights in steps:
        shadow = {name: decay * value + (1 - decay) * weights[name].double() for name, value in shadow.items()}
    return shadow


def untrained():
    torch.manual_seed(0)
    module = Net(width=5)
    module.net[1] = nn.Identity()
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def mixtures(old, new, target):
    """Directories as a kill leaves them while ``new`` replaces ``old``, in the order in which files are written."""
    rank_files = [path.name for path in sorted(new.glob("*.distcp"))]
    stages = {"0-no-folder": [], "1-folder": [FOLDER], "2-one-rank": [FOLDER, rank_files[0]]}
    stages["3-all-ranks"] = [FOLDER, *rank_files]
    stages["4-index"] = [FOLDER, *rank_files, ".metadata"]
    for stage, names in stages.items():
        shutil.copytree(old, target / stage)
        shutil.rmtree(target / stage / FOLDER)
        for name in names:
            copy = shutil.copytree if (new / name).is_dir() else shutil.copy
            copy(new / name, target / stage / name)
    shutil.copytree(new, target / "5-half-a-rest")
    content = (new / "meta.pt").read_bytes()
    (target / "5-half-a-rest" / "meta.pt").write_bytes(content[: len(content) // 2])
    # where nothing was before
    shutil.copytree(new, target / "6-fresh")
    (target / "6-fresh" / "meta.pt").unlink()
