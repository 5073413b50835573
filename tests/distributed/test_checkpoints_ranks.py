"""Checkpoint averaging on two ranks: DDP, and FSDP2 with single-file and with sharded checkpoints."""

from __future__ import annotations

import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as unified
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.data import DataLoader, DistributedSampler, Subset

from lightning_plugins import CheckpointAveraging, average_checkpoints, select_checkpoints
from lightning_plugins.checkpoints import CheckpointError, read_manifest
from lightning_plugins.checkpoints.formats import open_checkpoint
from lightning_plugins.checkpoints.streaming_mean import CheckpointMean
from tests.support.checkpoints_models import Regressor, assert_is_mean, float64_mean, load_state, loader, trainer
from tests.support.ranks import run_ranks


class Sharded(Regressor):
    """Its layers are sharded; the second's five rows are shared out unevenly."""

    def __init__(self, **more):
        super().__init__(width=5, **more)

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for part in (self.net[0], self.net[2]):
            torch.distributed.fsdp.fully_shard(part, mesh=mesh)


class Returning(Regressor):
    """Returns its validation loss and logs other numbers, one of them on rank zero alone."""

    def validation_step(self, batch, batch_idx):
        if self.global_rank == 0:
            self.log("of_zero", 1.0, rank_zero_only=True)
        self.log("largest", batch[0].max(), reduce_fx="max", batch_size=len(batch[0]))
        self.log("rows", float(len(batch[0])), reduce_fx="sum", batch_size=len(batch[0]))
        return self._loss(batch)


UNEVEN = loader(count=20, batch=4, seed=1)  # a rank has batches of 4, 4 and 2


def compare_uneven(folder: str, monitor: str | None) -> dict:
    """Compare by a number that no rank knows alone."""
    torch.manual_seed(0)
    averaging = CheckpointAveraging(**({"last": 3} if monitor is None else {"best": 3}))
    saving = unified.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, monitor=monitor)
    run = trainer(folder, callbacks=[averaging, saving], **options_of("ddp"))
    run.fit(Returning(), loader(), UNEVEN)
    return {"path": str(averaging.path), "scores": averaging.scores, "metric": averaging.metric}


def options_of(kind: str) -> dict:
    if kind == "ddp":
        return {"devices": 2, "strategy": unified.strategies.DDPStrategy(process_group_backend="gloo")}
    strategy = unified.strategies.ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=kind == "fsdp2-sharded",
    )
    return {"devices": 2, "strategy": strategy}


def local_weights(module) -> list[list[float]]:
    tensors = [tensor.detach() for tensor in [*module.parameters(), *module.buffers()]]
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return [part.double().flatten().tolist() for part in parts]


def fit(kind: str, folder: str, save_top_k: int, batch_norm: bool, ckpt_path: Path | None = None) -> dict:
    torch.manual_seed(0)
    module = (Regressor if kind == "ddp" else Sharded)(batch_norm=batch_norm)
    averaging = CheckpointAveraging(last=3)
    checkpoint = unified.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=save_top_k)
    weights = []

    class First(unified.Callback):
        def on_train_end(self, trainer, pl_module):
            weights.append(local_weights(pl_module))

    class Last(First):
        pass

    run = trainer(folder, callbacks=[First(), averaging, Last(), checkpoint], **options_of(kind))
    with counted_reads() as reads:
        run.fit(module, loader(), loader(seed=1), ckpt_path=ckpt_path)
    if ckpt_path is not None:  # nothing was left to train
        return {"path": str(averaging.path), "scores": averaging.scores, "step": run.global_step}
    found = {"path": str(averaging.path), "scores": averaging.scores, "unchanged": weights[0] == weights[1]}
    return {**found, "reads of ranks": gathered(sum(reads))}


@contextmanager
def counted_reads():
    """How many numbers of the mean this rank computes."""
    part, reads = CheckpointMean.part, []

    def counted(self, name, start, stop, *rest):
        reads.append(stop - start)
        return part(self, name, start, stop, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointMean, "part", counted)
        yield reads


def gathered(value) -> list:
    values = [None, None]
    torch.distributed.all_gather_object(values, value)
    return values


CASES = {"kept by ModelCheckpoint": (-1, False), "own files": (1, False), "batch norm": (1, True)}


def fit_all(kind: str, folder: str) -> dict:
    """Three fits in one pair of processes, which take longer to start than to train."""
    found = {case: fit(kind, f"{folder}/{case}", *options) for case, options in CASES.items()}
    kept = f"{folder}/kept by ModelCheckpoint"
    if kind == "ddp":
        found["uneven"] = {str(name): compare_uneven(f"{folder}/{name}", name) for name in (None, "largest", "rows")}
    return {**found, "resumed at its end": fit(kind, kept, -1, False, select_checkpoints(kept)[-1])}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2-full", "fsdp2-sharded"])
def test_ranks_agree_and_rank_zero_writes_the_mean(tmp_path, kind):
    first, second = run_ranks(fit_all, kind, str(tmp_path))
    assert first == second
    if kind == "ddp":
        check_uneven(first["uneven"])
    at_end, before = first["resumed at its end"], first["kept by ModelCheckpoint"]
    assert at_end == {"path": before["path"], "scores": before["scores"], "step": 8}
    for case, (_, batch_norm) in CASES.items():
        found, folder = first[case], tmp_path / case
        assert found["unchanged"]
        zero, one = found["reads of ranks"]
        assert (0 < one <= zero) if kind == "fsdp2-sharded" else (one == 0 < zero)
        path = Path(found["path"])
        assert path == folder / "averaged.ckpt"
        manifest = read_manifest(path)
        assert [file["epoch"] for file in manifest["files"]] == [1, 2, 3]
        files = [(folder / file["path"]).resolve() for file in manifest["files"]]
        assert all(file.is_dir() == (kind == "fsdp2-sharded") for file in files)
        if kind == "fsdp2-sharded":
            parts_of_two_saves_are_refused(*files[:2], tmp_path / f"{case} mixed")
        expected = float64_mean([whole(file, tmp_path) for file in files])
        statistics = (
            {f"net.1.running_{name}": expected.pop(f"net.1.running_{name}") for name in ("mean", "var")}
            if batch_norm
            else {}
        )
        assert manifest["replaced"] == list(statistics)
        assert_is_mean(load_state(path), expected)
        assert set(found["scores"]) == {"average", "best_single"}
        module = Regressor.load_from_checkpoint(path, **({} if kind == "ddp" else {"width": 5}))
        check_score(module, found["scores"]["average"], tmp_path)
        if kind == "ddp" and batch_norm:
            check_statistics(path)


def check_uneven(found: dict) -> None:
    """The loss is the mean over 20 samples, the largest that of both ranks, the rows those of both."""
    by_loss = found["None"]
    module = Regressor.load_from_checkpoint(by_loss["path"])
    with torch.no_grad():
        inputs, targets = UNEVEN.dataset.tensors
        loss = torch.nn.functional.mse_loss(module(inputs), targets).item()
    assert by_loss["metric"] == "returned loss"
    assert by_loss["scores"]["average"] == pytest.approx(loss, rel=1e-5)
    largest = inputs.max().item()
    assert found["largest"]["scores"] == {name: pytest.approx(largest) for name in ("average", "best_single")}
    assert found["rows"]["scores"] == {"average": 20.0, "best_single": 20.0}


def check_score(module, score: float, folder: Path) -> None:
    """The ranks validate every other sample: the score is that of all samples, and not of rank zero's half."""
    whole_score = trainer(folder).validate(module, loader(seed=1), verbose=False)[0]["val_loss"]
    assert whole_score == pytest.approx(score, rel=1e-5)
    half = DataLoader(Subset(loader(seed=1).dataset, range(0, 16, 2)), batch_size=4)
    assert trainer(folder).validate(module, half, verbose=False)[0]["val_loss"] != pytest.approx(score, rel=1e-3)


def check_statistics(path: Path) -> None:
    """The mean over ranks of what torch's update_bn finds on each rank's batches of the last epoch."""
    found = []
    for rank in range(2):
        module = Regressor.load_from_checkpoint(path)
        data = loader().dataset
        sampler = DistributedSampler(data, 2, rank, shuffle=True, seed=0)
        sampler.set_epoch(3)
        torch.optim.swa_utils.update_bn(DataLoader(data, batch_size=4, sampler=sampler), module)
        found.append(module.state_dict())
    state = load_state(path)
    for name in ("net.1.running_mean", "net.1.running_var"):
        assert torch.allclose(state[name], (found[0][name] + found[1][name]) / 2, rtol=1e-4, atol=1e-6)


def parts_of_two_saves_are_refused(old: Path, new: Path, mixed: Path) -> None:
    """What only averaging is there for is marked as well."""
    shutil.copytree(old, mixed)
    shutil.copy(new / "__1_0.distcp", mixed)
    with pytest.raises(ValueError, match=r"mixed is incomplete: its __1_0\.distcp and meta\.pt, of step \d, are of"):
        average_checkpoints([mixed, new])


def whole(path: Path, folder: Path) -> Path:
    """One file with what a sharded directory holds, by torch's own converter."""
    if path.is_file():
        return path
    converted = folder / f"{path.stem}.pt"
    dcp_to_torch_save(path, converted)
    return converted


def save_sharded(folder: str) -> dict:
    """Directories as Lightning writes them, with tensors sharded by rows, by columns and not at all."""
    from torch.distributed.checkpoint import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method="env://", rank=rank_of(), world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        full = {name: torch.randn(5, 3, generator=generator) for name in ("rows", "columns", "same")}
        state = {
            "rows": distribute_tensor(full["rows"], mesh, [Shard(0)]),
            "columns": distribute_tensor(full["columns"], mesh, [Shard(1)]),
            "same": full["same"],
            "half": distribute_tensor(full["rows"].bfloat16(), mesh, [Shard(0)]),
            "count": torch.tensor(i),
            "_extra_state": {"note": i},
            "empty": torch.empty(0, 3),
        }
        path = Path(folder) / f"{i}.ckpt"
        save({"state_dict": state, "optimizer_0": {"exp_avg": state["rows"]}}, checkpoint_id=path)
        if rank_of() == 0:
            torch.save({"global_step": 10 * i, "epoch": i, "hyper_parameters": {"a": 1}}, path / "meta.pt")
            torch.save({"state_dict": {**full, "half": full["rows"].bfloat16()}}, Path(folder).parent / f"whole{i}.pt")
    torch.distributed.barrier()
    told = write_with_faults(folder)
    torch.distributed.destroy_process_group()
    return told


def rank_of() -> int:
    import os

    return int(os.environ["LOCAL_RANK"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "files"
    folder.mkdir()
    return folder, run_ranks(save_sharded, str(folder))


@pytest.fixture(scope="module")
def directories(saved):
    return saved[0]


def test_one_process_averages_sharded_directories(directories, tmp_path):
    paths = select_checkpoints(directories)
    assert [path.name for path in paths] == ["0.ckpt", "1.ckpt", "2.ckpt"]
    expected = float64_mean([directories.parent / f"whole{i}.pt" for i in range(3)])
    state = average_checkpoints(paths)
    assert_is_mean(state, expected)
    assert set(state) == {*expected, "count", "_extra_state", "empty"}
    assert (state["count"].item(), state["_extra_state"]) == (2, {"note": 2})
    assert state["half"].dtype == torch.bfloat16
    written = average_checkpoints(paths, tmp_path / "out.ckpt")
    content = torch.load(written, weights_only=True)
    assert (content["global_step"], content["hyper_parameters"]) == (20, {"a": 1})
    assert_is_mean(content["state_dict"], expected)


def test_parts_of_rows_are_mapped_one_by_one(directories):
    checkpoint = open_checkpoint(directories / "0.ckpt", trust=False)
    assert checkpoint.parts("rows") == [(0, 9), (9, 15)]
    assert checkpoint.parts("columns") == [(0, 15)]
    whole_rows = load_state(directories.parent / "whole0.pt")["rows"].flatten()
    assert torch.equal(checkpoint.flat("rows", 4, 12), whole_rows[4:12])
    assert torch.equal(checkpoint.flat("rows", 9, 15), whole_rows[9:])
    assert checkpoint.flat("empty", 0, 0).shape == (0,)


def test_parts_are_put_together_by_their_places_not_by_their_order_in_the_index(directories, tmp_path):
    """Under tensor parallelism and FSDP2 together the rows of ranks alternate."""
    place = shutil.copytree(directories / "0.ckpt", tmp_path / "x.ckpt")
    index = pickle.loads((place / ".metadata").read_bytes())
    index.state_dict_metadata["state_dict.rows"].chunks.reverse()
    (place / ".metadata").write_bytes(pickle.dumps(index))
    whole_rows = load_state(directories.parent / "whole0.pt")["rows"].flatten()
    assert torch.equal(open_checkpoint(place, trust=False).flat("rows", 4, 12), whole_rows[4:12])


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch pwned",)


def test_damaged_and_malicious_directories_are_refused(directories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = directories / "0.ckpt"

    def copied(name: str) -> Path:
        shutil.copytree(good, tmp_path / name)
        return tmp_path / name

    evil = copied("evil.ckpt")
    (evil / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"it names posix\.system, which no index of torch needs"):
        average_checkpoints([good, evil])
    evil_meta = copied("meta.ckpt")
    torch.save({"global_step": 1, "hyper_parameters": Evil()}, evil_meta / "meta.pt")
    with pytest.raises(CheckpointError, match=r"meta\.pt needs more than tensors.*posix\.system"):
        average_checkpoints([good, evil_meta])
    assert not (tmp_path / "pwned").exists()

    cut = copied("cut.ckpt")
    shard = cut / "__1_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is cut off"):
        average_checkpoints([good, cut])
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        average_checkpoints([good, cut])
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: __1_0\.distcp does not exist"):
        average_checkpoints([good, cut])
    odd = copied("odd.ckpt")
    (odd / ".metadata").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"is not a checkpoint that torch\.distributed\.checkpoint wrote"):
        average_checkpoints([good, odd])


def write_with_faults(folder: str) -> dict:
    """Average together while one rank fails, and without a fault; return what this rank was told."""
    from lightning_plugins.checkpoints.distributed import write_together

    told = {}
    for fault in ("read", "write", "none"):
        output = Path(folder).parent / ("nowhere/out.ckpt" if fault == "write" else f"{fault}.ckpt")

        def mean(fault: str = fault) -> CheckpointMean:
            if fault == "read" and rank_of() == 1:
                raise OSError("rank one cannot read")
            return CheckpointMean([open_checkpoint(Path(folder) / f"{i}.ckpt", trust=False) for i in range(3)])

        try:
            write_together(mean, output, torch.device("cpu"))
            told[fault] = "nothing"
        except (OSError, ValueError) as error:
            told[fault] = f"{type(error).__name__}: {error}"
    return told


def test_a_fault_on_one_rank_is_told_to_both_and_leaves_nothing(saved):
    directories, (zero, one) = saved
    assert zero["read"] == "CheckpointError: rank one cannot read"
    assert one["read"] == "OSError: rank one cannot read"
    assert zero["write"].startswith("FileNotFoundError: The directory of `output`")
    assert one["write"].startswith("CheckpointError: The directory of `output`")
    assert not (directories.parent / "read.ckpt").exists()
    assert (zero["none"], one["none"]) == ("nothing", "nothing")
    expected = float64_mean([directories.parent / f"whole{i}.pt" for i in range(3)])
    assert_is_mean(load_state(directories.parent / "none.ckpt"), expected)
