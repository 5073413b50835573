"""What the distributed tests run in processes of their own."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.ranks import run_ranks


def launch(scenario, directory, *more, ranks=2, timeout=180):
    """Run a scenario on ``ranks`` ranks of this machine; return what each saved."""
    run_ranks(scenario, str(directory), *more, world_size=ranks, timeout=timeout)
    found = [Path(directory, *more[:1]) / f"{scenario.__name__}-{rank}.pt" for rank in range(ranks)]
    return [torch.load(file, weights_only=True) for file in found if file.exists()]


def trainer(strategy, *callbacks, **kwargs):
    import lightning.pytorch as lightning

    settings = {
        "accelerator": "cpu",
        "devices": int(os.environ["RANKS_OF_TEST"]),
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(hasattr(callback, "best_k_models") for callback in callbacks),
        "callbacks": list(callbacks),
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return lightning.Trainer(strategy=strategy, **{**settings, **kwargs})


def sharded_strategy(kind, **kwargs):
    """FSDP2 with single files, or FSDP1 with the first layer in a part of its own."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    if kind == "fsdp1":
        from tests.support.fsdp1 import FSDPOnCPU

        return FSDPOnCPU(parts=("net.0",), **kwargs)
    sizes = {"data_parallel_size": int(os.environ["RANKS_OF_TEST"]), "tensor_parallel_size": 1}
    return ModelParallelStrategy(**{**sizes, "save_distributed_checkpoint": False, **kwargs})


def sharded_net(kind="fsdp2", **kwargs):
    """The network of the other tests with odd sizes, so that shards are uneven and some are empty."""
    from torch.distributed.fsdp import fully_shard

    from tests.support.ema_runs import Net

    class Sharded(Net):
        seen = None

        def configure_model(self):
            if kind == "fsdp1" or hasattr(self.net[0], "unshard"):
                return
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net[3], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if batch_idx == 0:
                self.seen = self(batch[0]).detach().clone()

    torch.manual_seed(0)
    module = Sharded(width=5, **kwargs)
    module.net[1] = nn.Identity()  # batch statistics differ between ranks
    return module


def save(scenario, directory, **results):
    torch.save(results, Path(directory) / f"{scenario}-{os.environ['LOCAL_RANK']}.pt")


def ddp(directory):
    """Two ranks on different data, several EMAs, a file in mid-run and one after fit."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_plugins import EMA, HalfLife
    from tests.support.ema_runs import Net, regression

    torch.manual_seed(0)
    rank = int(os.environ["LOCAL_RANK"])
    module = Net(width=5)
    fast = EMA(0.5)
    slow = EMA(0.9, name="slow", evaluate="raw", checkpoint="raw", after_fit="raw")
    beside = {"evaluate": "raw", "checkpoint": "raw", "after_fit": "raw"}
    samples, steps = EMA(HalfLife(samples=64), name="samples", **beside), EMA(HalfLife(steps=8), name="steps", **beside)
    files = ModelCheckpoint(directory, filename="{step}", save_weights_only=True)
    run = trainer("ddp", fast, slow, samples, steps, files, max_epochs=2)
    run.fit(module, regression(seed=rank), regression(seed=9))
    run.save_checkpoint(Path(directory) / "end.ckpt")
    save(
        "ddp", directory,
        average=fast.average_state_dict(), slow=slow.average_state_dict(), raw=fast.raw_state_dict(),
        samples=samples.average_state_dict(), steps=steps.average_state_dict(),
        module=dict(module.state_dict()), file=files.best_model_path,
    )  # fmt: skip


LATEST = {"last": 3, "every": 3, "evaluate": "raw", "checkpoint": "raw", "after_fit": "raw"}
"""Of 16 steps in two epochs, the snapshots of 9, 12 and 15: one of them and two older ones are in the first file."""


def sharded_run(kind, max_epochs, *callbacks, ema=None, ckpt_path=None, strategy=None, **kwargs):
    from lightning_plugins import EMA, ConstantDecay
    from tests.support.ema_runs import regression

    module, ema = sharded_net(kind), ema or EMA(ConstantDecay(0.8))
    fit = trainer(strategy or sharded_strategy(kind), ema, *callbacks, max_epochs=max_epochs, **kwargs)
    fit.fit(module, regression(), regression(n=8, seed=9), ckpt_path=ckpt_path)
    return fit, module, ema


def own_weights(path):
    """Return a callback that writes a file after step 3 and gives it other weights, on the rank alone that writes."""
    from lightning.pytorch.callbacks import Callback

    class Own(Callback):
        writes = False

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                self.writes = True
                trainer.save_checkpoint(path)
                self.writes = False

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            if self.writes and trainer.is_global_zero:
                checkpoint["state_dict"] = {"own": torch.ones(1)}

    return Own()


def fsdp(directory, kind):
    """A sharded run, its files, a resumed one; post-hoc snapshots; half precision."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_plugins import EMA, ConstantDecay, LatestWeightAveraging, PostHocEMA
    from lightning_plugins.core.lightning import MisconfigurationException
    from tests.support.ema_runs import regression

    full, light = Path(directory) / "full", Path(directory) / "weights"
    latest, latest_again = (LatestWeightAveraging(**LATEST) for _ in range(2))
    fit, module, ema = sharded_run(
        kind, 2, latest, own_weights(Path(directory) / "own.ckpt"),
        PostHocEMA(every_n_steps=8, dirpath=Path(directory) / "snapshots"),
        ModelCheckpoint(full, filename="{epoch}", save_top_k=-1),
        ModelCheckpoint(light, filename="{epoch}", save_weights_only=True, save_top_k=-1, every_n_train_steps=16),
    )  # fmt: skip
    fit.save_checkpoint(Path(directory) / "end.ckpt")
    average, raw, seen = ema.average_state_dict(), ema.raw_state_dict(), module.seen
    latest_state = latest.average_state_dict()
    empty = sum(getattr(p, "to_local", lambda p=p: p)().numel() == 0 for p in module.parameters())
    again_fit, again_module, resumed = sharded_run(
        kind, 2, latest_again, ema=EMA(ConstantDecay(0.8), after_fit="raw"), ckpt_path=full / "epoch=0.ckpt"
    )
    resumed_average, resumed_raw = resumed.average_state_dict(), resumed.raw_state_dict()
    resumed_latest = latest_again.average_state_dict()
    if kind == "fsdp2":  # Lightning cannot wrap a module of FSDP1 again
        again_module.seen = None
        again_fit.validate(again_module, regression(n=8, seed=9), verbose=False)  # on the average once more

    # half precision: the file keeps the float32 average beside its state_dict
    half = EMA(0.9)
    sharded_run(kind, 1, ModelCheckpoint(directory, filename="half"), ema=half, precision="bf16-true")
    half_average, half_raw = half.average_state_dict(), half.raw_state_dict()
    again = EMA(0.9)
    sharded_run(kind, 1, ema=again, precision="bf16-true", ckpt_path=Path(directory) / "half.ckpt")

    # a crash in validation, the module gathered and swapped
    crashed, kept, strategy = sharded_net(kind), EMA(0.9), sharded_strategy(kind)
    crashed.crash = ("val", 0, 1)
    with pytest.raises(RuntimeError, match="killed"):
        trainer(strategy, kept).fit(crashed, regression(), regression(n=8, seed=9))
    if kind == "fsdp1":
        # FSDP1 gathers nothing after an error in a forward; the parts of the ranks follow one another
        parts = {name.replace("_fsdp_wrapped_module.", ""): p.detach() for name, p in crashed.named_parameters()}
        lengths = {name: [torch.tensor(0), torch.tensor(0)] for name in parts}
        for name, part in parts.items():
            torch.distributed.all_gather(lengths[name], torch.tensor(part.numel()))
        crashed_raw = {}
        for name, tensor in kept.raw_state_dict().items():
            both = [torch.zeros(tensor.numel()), torch.zeros(tensor.numel())]
            padded = torch.nn.functional.pad(parts[name], (0, tensor.numel() - len(parts[name])))
            torch.distributed.all_gather(both, padded)
            whole = [part[:length] for part, length in zip(both, lengths[name], strict=True)]
            crashed_raw[name] = torch.cat(whole).view(tensor.shape)
        with pytest.raises(MisconfigurationException) as refusal:
            trainer(sharded_strategy(kind, use_orig_params=False), EMA(0.9)).fit(sharded_net(kind), regression())
        refused = str(refusal.value)
    else:
        crashed_raw, refused = {name: p.full_tensor().detach() for name, p in crashed.named_parameters()}, ""
    save(
        kind, directory, average=average, raw=raw, seen=seen, empty=empty,
        latest=latest_state, resumed_latest=resumed_latest,
        resumed_average=resumed_average, resumed_raw=resumed_raw, validated=again_module.seen,
        validated_raw=resumed.raw_state_dict(),
        half_average=half_average, half_raw=half_raw, again_average=again.average_state_dict(),
        again_raw=again.raw_state_dict(), crashed_raw=crashed_raw, kept_raw=kept.raw_state_dict(), refused=refused,
    )  # fmt: skip


def fsdp2(directory):
    """The run under FSDP2."""
    fsdp(directory, "fsdp2")


def fsdp1(directory):
    """The same under FSDP1; then with files that all ranks write."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_plugins import EMA, LatestWeightAveraging

    fsdp(directory, "fsdp1")
    parts, results = Path(directory) / "parts", {}
    for path, ckpt_path in (("whole", None), ("resumed", parts / "epoch=0.ckpt")):
        files = ModelCheckpoint(parts, filename="{epoch}", save_top_k=-1)
        strategy = sharded_strategy("fsdp1", state_dict_type="sharded")
        latest = LatestWeightAveraging(**LATEST)
        slow = EMA(0.99, name="slow", evaluate="raw", checkpoint="raw", after_fit="raw")
        _, _, ema = sharded_run("fsdp1", 2, files, latest, slow, strategy=strategy, ckpt_path=ckpt_path)
        results[f"{path}_latest"] = latest.average_state_dict()
        results |= {f"{path}_average": ema.average_state_dict(), f"{path}_raw": ema.raw_state_dict()}
        results[f"{path}_slow"] = slow.average_state_dict()
    if os.environ["LOCAL_RANK"] == "0":
        mixtures(*(parts / f"epoch={n}.ckpt" for n in (0, 1)), Path(directory) / "mixtures")
    torch.distributed.barrier()
    save("fsdp1-parts", directory, **results, refused=refused(sorted((Path(directory) / "mixtures").iterdir())))


def mixtures(old, new, target):
    """Directories of two saves: as a kill leaves them while ``new`` replaces ``old``, and as copies do."""
    names = [*(path.name for path in sorted(old.glob("*.distcp"))), ".metadata", "meta.pt"]
    for number in range(1, len(names)):
        # an index is removed first
        place = shutil.copytree(old, target / f"killed-{number - 1}")
        (place / ".metadata").unlink()
        for name in names[: number - 1]:
            shutil.copy(new / name, place / name)
    for name in names:
        for around, kind in ((old, "new"), (new, "old")):
            place = shutil.copytree(around, target / f"{kind}-{name}")
            shutil.copy((new if kind == "new" else old) / name, place / name)


def refused(places):
    """Resume from directories of two saves under FSDP1; return what is said."""
    messages = {}
    for place in places:
        strategy = sharded_strategy("fsdp1", state_dict_type="sharded")
        with pytest.raises(ValueError, match=r"is incomplete: ") as error:
            sharded_run("fsdp1", 2, strategy=strategy, ckpt_path=place)
        messages[place.name] = f"{type(error.value).__name__}: {error.value}"
    return messages


def killed(directory, name):
    """Replace a checkpoint under FSDP1 and die when a file of that name is about to be there."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    seen = []

    def dying(original):
        def call(content, path, *args, **kwargs):
            seen.extend([path] if str(path).endswith(name) else [])
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(content, path, *args, **kwargs)

        return call

    torch.save, Path.rename = dying(torch.save), dying(Path.rename)
    strategy = sharded_strategy("fsdp1", state_dict_type="sharded")
    files = ModelCheckpoint(directory, filename="same", enable_version_counter=False)
    sharded_run("fsdp1", 2, files, strategy=strategy)


def other_ranks(directory, kind="fsdp2"):
    """Resume what two ranks saved on one."""
    _, _, ema = sharded_run(kind, 2, ckpt_path=Path(directory) / "full" / "epoch=0.ckpt")
    save(
        "other_ranks" if kind == "fsdp2" else "other_ranks_fsdp1",
        directory,
        average=ema.average_state_dict(),
        raw=ema.raw_state_dict(),
    )


def other_ranks_fsdp1(directory):
    """The same under FSDP1."""
    other_ranks(directory, "fsdp1")
