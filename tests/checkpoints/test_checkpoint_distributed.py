"""Directories are averaged by all ranks of a group, of which there may be one, and without a group by one process."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_plugins.checkpoints import CheckpointError
from lightning_plugins.checkpoints.average_of_run import AverageOfRun
from lightning_plugins.checkpoints.distributed import on_rank_zero, write_together
from lightning_plugins.checkpoints.formats import open_checkpoint
from lightning_plugins.checkpoints.isolated_validation import load_weights
from lightning_plugins.checkpoints.streaming_mean import CheckpointMean
from lightning_plugins.core import flat_shards
from lightning_plugins.core.save_marks import new_save, write_marked

CPU = torch.device("cpu")


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / f"{number}.ckpt" for number in range(2)]
    for number, path in enumerate(found):
        with warnings.catch_warnings():  # that there is one process
            warnings.simplefilter("ignore")
            state = {"w": torch.arange(6.0).view(3, 2) + number, "half": torch.full((2,), number).bfloat16()}
            dcp.save({"state_dict": state}, checkpoint_id=path)
        torch.save({"global_step": number}, path / "meta.pt")
    return found


@pytest.fixture
def _group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def mean_of(paths):
    return CheckpointMean([open_checkpoint(path, trust=False) for path in paths])


def assert_is_mean(path):
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == 1
    assert content["state_dict"]["w"].tolist() == [[0.5, 1.5], [2.5, 3.5], [4.5, 5.5]]
    assert content["state_dict"]["half"].tolist() == [0.5, 0.5]


@pytest.mark.usefixtures("_group")
def test_a_group_of_one_writes_the_mean(paths, tmp_path):
    output = tmp_path / "mean.ckpt"
    write_together(lambda: mean_of(paths), output, CPU)
    assert_is_mean(output)
    with pytest.raises(FileExistsError, match=r"mean\.ckpt"):
        write_together(lambda: mean_of(paths), output, CPU)
    output.write_bytes(b"")
    write_together(lambda: mean_of(paths), output, CPU, overwrite=True)
    assert_is_mean(output)


@pytest.mark.usefixtures("_group")
def test_a_file_counts_as_one_part(paths, tmp_path):
    """As one that another strategy wrote before the run went on in shards, or after."""
    whole = {"w": torch.arange(6.0).view(3, 2) + 1, "half": torch.ones(2).bfloat16()}
    torch.save({"state_dict": whole, "global_step": 1}, tmp_path / "file.ckpt")
    write_together(lambda: mean_of([paths[0], tmp_path / "file.ckpt"]), tmp_path / "mean.ckpt", CPU)
    assert_is_mean(tmp_path / "mean.ckpt")


@pytest.mark.usefixtures("_group")
def test_what_goes_wrong_before_the_file_is_raised_as_it_is(paths, tmp_path):
    (paths[1] / ".metadata").unlink()
    with pytest.raises((CheckpointError, OSError), match=r"1\.ckpt"):
        write_together(lambda: mean_of(paths), tmp_path / "mean.ckpt", CPU)
    assert not (tmp_path / "mean.ckpt").exists()


def test_a_directory_of_two_saves_is_refused(tmp_path):
    with warnings.catch_warnings():  # that there is one process
        warnings.simplefilter("ignore")
        write_marked(dcp.save, {"state_dict": {"w": torch.ones(1)}}, tmp_path / "x", save=new_save(), step=0, rank=0)
    torch.save({"global_step": 1}, tmp_path / "x" / "meta.pt")
    with pytest.raises(CheckpointError, match=r"its \.metadata is of a save of which there is no meta\.pt"):
        open_checkpoint(tmp_path / "x", trust=False)


def test_a_process_alone_needs_no_group(paths, tmp_path):
    strategy = SimpleNamespace(broadcast=lambda value: value, root_device=CPU)
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, strategy=strategy)
    written = []
    files = SimpleNamespace(open=lambda path: open_checkpoint(path, trust=False), add=written.append)
    average = AverageOfRun(trainer, None, files, paths, tmp_path / "new" / "mean.ckpt")
    for target in (None, tmp_path / "other.ckpt"):
        average.write(target)
    assert written == [tmp_path / "new" / "mean.ckpt", tmp_path / "other.ckpt"]
    for path in written:
        assert_is_mean(path)


def test_other_ranks_hear_what_rank_zero_could_not_do():
    def fail():
        raise ValueError("no room")

    told = []
    on_rank_zero(lambda: told.append("done"), told.append, is_zero=True)
    assert told == ["done", None]
    with pytest.raises(ValueError, match=r"^no room$"):
        on_rank_zero(fail, told.append, is_zero=True)
    assert told[2:] == ["ValueError: no room"]
    on_rank_zero(fail, lambda text: None, is_zero=False)
    with pytest.raises(CheckpointError, match=r"^Rank zero failed: ValueError: no room$"):
        on_rank_zero(fail, lambda text: "ValueError: no room", is_zero=False)


class FullyShardedDataParallel(torch.nn.Module):
    """What FSDP1 wraps a module in that it leaves whole, as far as it is read."""

    class Handle:
        uses_sharded_strategy, flat_param = False, SimpleNamespace(_params=())

    def __init__(self, module):
        super().__init__()
        self.module, self._handle = module, self.Handle()


@pytest.mark.parametrize("strict", [True, False])
def test_each_rank_of_fsdp1_takes_its_part_out_of_the_whole(tmp_path, strict):
    module = torch.nn.Linear(3, 2)
    module.strict_loading = strict
    model = FullyShardedDataParallel(module)
    flat_shards.look_up(model, module)
    for number, more in enumerate(({}, {"other": torch.ones(1)})):
        state = {name: torch.full_like(value, number + 1.0) for name, value in module.state_dict().items()}
        torch.save({"state_dict": state | more}, tmp_path / f"{number}.ckpt")
    load_weights(None, module, open_checkpoint(tmp_path / "0.ckpt", trust=False))
    assert {value.item() for parameter in module.parameters() for value in parameter.flatten()} == {1.0}
    other = open_checkpoint(tmp_path / "1.ckpt", trust=False)
    if strict:
        with pytest.raises(RuntimeError, match="The checkpoint's weights are not the module's: unexpected: other"):
            load_weights(None, module, other)
    else:
        load_weights(None, module, other)
    assert module.weight[0, 0].item() == (1.0 if strict else 2.0)
