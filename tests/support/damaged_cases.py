"""Whole files of every kind that the package reads, and what is done with each."""

import contextlib
import io
import warnings

import torch
import torch.distributed.checkpoint as dcp

from lightning_plugins import average_checkpoints, extract_weights, select_checkpoints, synthesize_ema
from lightning_plugins.cli import main
from lightning_plugins.core.files import write_state_dict
from lightning_plugins.ema.snapshots import SnapshotContents, write_frozen, write_snapshot
from lightning_plugins.statistics.csv_file import CSVFile
from lightning_plugins.statistics.plot import read_curves

# What is damaged: a file, or one of the files of a directory.
SUBJECTS = {
    "Lightning": "1.ckpt",
    "before torch 1.6": "legacy.ckpt",
    "average": "average.ckpt",
    "safetensors": "average.safetensors",
    "index": "sharded/.metadata",
    "shard": "sharded/__0_0.distcp",
    "rest of shards": "sharded/meta.pt",
    "snapshot": "snapshots/step=0000000005.pt",
    "frozen": "snapshots/frozen.pt",
    "safetensors snapshot": "snapshots-safe/step=0000000010.safetensors",
    "CSV": "log.csv",
    "S4TF's CSV": "s4tf.csv",
}


def state(seed):
    chance = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(4, 3, generator=chance),
        "half": torch.randn(6, generator=chance).bfloat16(),
        "count": torch.tensor(seed),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
    }


def checkpoint(step):
    """What Lightning writes in a run with a ModelCheckpoint and two EMAs."""
    kept = {
        "monitor": "val_loss",
        "best_k_models": {"run/1.ckpt": torch.tensor(0.5)},
        "current_score": torch.tensor(0.3),
    }
    return {
        "epoch": step,
        "global_step": step,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": state(step),
        "loops": {},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}": kept, "EMA": {"n": step}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(4, 3)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"width": 4},
        "lightning_plugins_ema": {
            "version": 1,
            "state_dict": "average",
            "name": "ema",
            "raw": {"weight": torch.zeros(4, 3)},
            "averages": {"slow": {"weight": torch.ones(4, 3)}},
        },
    }


def write_whole_files(folder):
    for step in (1, 2):
        torch.save(checkpoint(step), folder / f"{step}.ckpt")
    torch.save(checkpoint(3), folder / "legacy.ckpt", _use_new_zipfile_serialization=False)
    for name in ("average.ckpt", "average.safetensors"):
        average_checkpoints([folder / "1.ckpt", folder / "2.ckpt"], folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about one process
        dcp.save({"state_dict": state(3)}, checkpoint_id=folder / "sharded")
    torch.save({"epoch": 3, "global_step": 3}, folder / "sharded" / "meta.pt")
    for name, kind in (("snapshots", "torch"), ("snapshots-safe", "safetensors")):
        for step in (5, 10):
            averages = [{"weight": state(step + index)["weight"]} for index in range(2)]
            loaded = SnapshotContents(averages, {"count": torch.tensor(1)}, {"tied": "weight"})
            write_snapshot(folder / name, step, [0.05, 0.1], loaded, file_format=kind)
        write_frozen(folder / name, {"frozen": torch.ones(3)})
    for name, separator in (("log.csv", ","), ("s4tf.csv", ", ")):
        file = CSVFile(folder / name, separator=separator)
        file.add([row(number, s4tf=separator != ",") for number in range(40)])
        file.close()


def row(number, *, s4tf):
    epoch, batch = 1 + number // 10, 1 + number % 10
    if s4tf:
        return {"epoch": f"{epoch}/4", "batch": f"{batch}/10", "loss": repr(0.5 / (number + 1)), "accuracy": "0.25"}
    phase = "train" if batch < 8 else "validation"
    key = {"epoch": str(epoch), "batch": str(batch), "phase": phase}
    return {**key, "step": str(number), "lr": "0.1", "loss": repr(0.5 / (number + 1)), "time": f"{number / 10:.3f}"}


def command(*arguments):
    """Run the command line; status 2 is an error of one line, and anything but that and 0 fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = main([str(argument) for argument in arguments])
    assert status in (0, 2)
    assert len(said.getvalue().splitlines()) == (status == 2)
    if status:
        raise ValueError(said.getvalue().rstrip("\n"))


def resume_csv(path):
    file = CSVFile(path)
    said = file.resume({"rows": 30, "last": ["3", "10", "validation"]})
    file.add([{"epoch": "4", "batch": "1", "phase": "train", "loss": "1"}])
    file.close()
    lines = path.read_text(errors="replace").splitlines()
    assert lines[-1].startswith("4,1,train")
    assert said or len(lines) == 32


def are_weights(found):
    """Torch compares no check sum when it loads: other numbers, or another name, may come out, but nothing else."""
    assert found
    for name, tensor in found.items():
        assert isinstance(name, str)
        assert isinstance(tensor, torch.Tensor), name


def uses(subject, path, good):
    """Yield a name and a function for everything that is done with a damaged file or the directory that it lies in.

    Args:
        subject: One of ``SUBJECTS``.
        path: Of the damaged file, or of its directory.
        good: The directory of the whole files.
    """
    if subject.endswith("CSV"):
        yield "curves", lambda: read_curves(path)
        if subject == "CSV":
            yield "resume", lambda: resume_csv(path)
    elif "snapshot" in subject or subject == "frozen":
        yield "synthesize", lambda: are_weights(synthesize_ema(path, 0.08))
        output = path.parent / "s.pt"
        yield "command", lambda: command("synthesize", path, "--sigma-rel", 0.07, "--output", output, "--overwrite")
    else:
        other = good / ("sharded" if path.is_dir() else "2.ckpt")
        output = path.parent / "out" / "average.ckpt"
        yield "average", lambda: are_weights(average_checkpoints([other, path], progress=False))
        yield "write", lambda: average_checkpoints([path, other], output, overwrite=True, strict=False)
        yield "select", lambda: select_checkpoints(path.parent)
        yield "table", lambda: command("average", path, other, "--dry-run")
        if not path.is_dir():
            for which, name in (("raw", "ema"), ("average", "ema"), ("average", "slow")):
                yield (
                    f"{which} {name}",
                    lambda which=which, name=name: are_weights(extract_weights(path, which, name)),
                )
            yield "inspect", lambda: command("inspect", path)
            plain = path.parent / "out" / "plain.safetensors"
            yield "extract", lambda: write_state_dict(extract_weights(path, "raw"), plain, overwrite=True)
