"""Averages in distributed checkpoints: FSDP2 with the strategy's default, on two ranks, on four and on one."""

import json
import runpy
import shutil
import signal
import sys

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from torch import nn

from lightning_plugins import GradientAccumulation, average_checkpoints, extract_weights, synthesize_ema
from lightning_plugins.checkpoints import read_manifest
from lightning_plugins.checkpoints.record import read_record
from lightning_plugins.cli import main
from tests.support import ema_directories
from tests.support.conditions import fsdp2_on_cpu
from tests.support.ema_directories import FOLDER, mixtures, plain_steps, recursion, untrained
from tests.support.ema_distributed import launch
from tests.support.ema_runs import Net, regression, same, trainer
from tests.support.ranks import ended_ranks

pytestmark = fsdp2_on_cpu
WHOLE = ["end", "full/epoch=2.ckpt", "full/last.ckpt", "pruned/last.ckpt", "steps/step=24.ckpt"]


def close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value.double(), b[key].double(), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("directories")
    for ranks in "124":
        (directory / ranks).mkdir()
    return directory, launch(ema_directories.write, directory, timeout=300)


@pytest.fixture(scope="module")
def resumed(written):
    return launch(ema_directories.resume, written[0], "2", timeout=300)


def test_the_average_is_that_of_one_process_in_float64(written):
    for rank in written[1]:
        steps = plain_steps(3)[1]
        close(rank["average"], recursion(untrained(), steps, 0.8))
        close(rank["slow"], recursion(untrained(), steps, 0.95))
        latest = {name: sum(steps[n - 1][name].double() for n in range(6, 25, 3)) / 7 for name in untrained()}
        close(rank["latest"], latest)
        close(rank["raw"], steps[-1])
        # and of this run's own weights
        close(rank["average"], recursion(untrained(), rank["steps"], 0.8))


def test_a_step_asks_no_other_rank_for_the_average(written):
    for rank in written[1]:
        assert rank["counts"] == rank["plain_counts"] != {}


@pytest.mark.parametrize(
    "name", ["end", "full/epoch=2.ckpt", "full/last.ckpt", "pruned/last.ckpt", "steps/step=24.ckpt"]
)
def test_a_directory_holds_every_set(written, name):
    directory, ranks = written
    path = directory / name
    assert same(extract_weights(path), ranks[0]["average"])
    assert same(extract_weights(path, "raw"), ranks[0]["raw"])
    assert same(extract_weights(path, name="slow.one"), ranks[0]["slow"])
    assert same(extract_weights(path, name="slow.two"), ranks[0]["latest"])
    with pytest.raises(ValueError, match=r"it has 'ema', 'slow\.one'"):
        extract_weights(path, name="fast")


@pytest.mark.parametrize(("mid", "end"), [("mid", "full"), ("half-mid", "half")])
def test_a_directory_that_is_written_in_the_middle_of_a_swap(written, mid, end):
    directory = written[0]
    for which in ("average", "raw"):
        assert same(extract_weights(directory / mid, which), extract_weights(directory / end / "epoch=0.ckpt", which))


def test_no_extra_name_is_in_the_state_dict_and_the_rest_is_plain(written):
    path = written[0] / "full" / "epoch=2.ckpt"
    consolidated = _load_distributed_checkpoint(path)
    assert consolidated["state_dict"].keys() == untrained().keys()
    rest = torch.load(path / "meta.pt", weights_only=True)
    assert rest["lightning_plugins_ema"] == {
        "version": 2, "state_dict": "average", "name": "ema", "raw": None, "averages": {},
        "techniques": {"slow.two": "LatestWeightAveraging"},
    }  # fmt: skip
    assert "lightning_plugins_posthoc_ema" not in rest
    assert json.loads((path / FOLDER / "sets.json").read_text())["step"] == rest["global_step"] == 24


def test_what_is_pruned_goes_as_a_whole(written):
    directory, ranks = written
    assert (directory / "full" / "last.ckpt").is_symlink()
    assert {path.name for path in (directory / "full").iterdir()} == {
        *(f"epoch={n}.ckpt" for n in range(3)),
        "last.ckpt",
    }
    assert {path.name for path in (directory / "steps").iterdir()} == {"step=21.ckpt", "step=24.ckpt"}
    (kept,) = ranks[0]["kept"]
    assert sorted(map(str, (directory / "pruned").iterdir())) == [kept, str(directory / "pruned" / "last.ckpt")]


def test_a_weights_only_directory_holds_one_set(written):
    directory, ranks = written
    (path,) = (directory / "weights").iterdir()
    assert not (path / FOLDER).exists()
    assert same(extract_weights(path), ranks[0]["average"])
    with pytest.raises(ValueError, match="it is a weights-only file"):
        extract_weights(path, "raw")


def test_raw_in_the_state_dict_and_the_average_beside_it(written, resumed):
    directory, ranks = written
    path = directory / "raw" / "epoch=0.ckpt"
    assert same(_load_distributed_checkpoint(path)["state_dict"], ranks[0]["raw_raw"])
    assert same(extract_weights(path), ranks[0]["raw_average"])
    assert same(extract_weights(path, "raw"), ranks[0]["raw_raw"])
    for rank in resumed:  # nothing was left to train
        assert same(rank["raw_average"], ranks[0]["raw_average"])
        assert same(rank["raw_raw"], ranks[0]["raw_raw"])


def test_a_wide_average_of_half_precision_is_never_rounded(written, resumed):
    directory, ranks = written
    path = directory / "half" / "epoch=1.ckpt"
    average = extract_weights(path)
    assert {value.dtype for value in average.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in average.values())
    assert same(average, ranks[0]["half"])
    assert same(extract_weights(path, "raw"), ranks[0]["half_raw"])
    for rank in resumed:
        assert same(rank["half"], ranks[0]["half"])
        assert same(rank["half_raw"], ranks[0]["half_raw"])
        assert {value.dtype for value in rank["half_raw"].values()} == {torch.bfloat16}


def test_a_resume_on_as_many_ranks_is_bit_for_bit(written, resumed):
    directory, ranks = written
    for rank in resumed:
        assert all(same(rank[key], ranks[0][key]) for key in ("average", "slow", "latest", "raw"))
    before, after = directory / "snapshots", directory / "2" / "snapshots"
    assert [path.name for path in sorted(after.iterdir())] == ["step=0000000016.pt", "step=0000000024.pt"]
    for path in after.iterdir():
        found, expected = (torch.load(folder / path.name, weights_only=True)["averages"] for folder in (after, before))
        assert all(same(*pair) for pair in zip(found, expected, strict=True))
    assert synthesize_ema(before, 0.07).keys() == untrained().keys()


def test_what_is_not_sharded_lies_beside_what_is(written, resumed):
    for rank in resumed:
        assert same(rank["partly_again"], rank["partly"])
    path = written[0] / "partly" / "epoch=1.ckpt"
    assert same(extract_weights(path), resumed[0]["partly"])
    statistics = [extract_weights(path, which)["net.1.running_mean"] for which in ("average", "raw")]
    assert not torch.equal(*statistics)


def test_an_average_that_has_not_begun_has_no_set(written, resumed):
    assert not (written[0] / "late" / "epoch=0.ckpt" / FOLDER).exists()
    assert (written[0] / "late" / "epoch=1.ckpt" / FOLDER).exists()
    for rank in resumed:
        assert same(rank["late_again"], rank["late"])


@pytest.mark.parametrize("count", [1, 4])
def test_a_resume_on_another_number_of_ranks(written, count):
    directory, ranks = written
    found = launch(ema_directories.resume, directory, str(count), ranks=count, timeout=300)
    assert len(found) == count
    for rank in found:
        for key in ("average", "slow", "latest", "raw", "carried"):
            close(rank[key], ranks[0][key])
    shared = directory / str(count) / "snapshots" / "step=0000000024.pt"
    pairs = zip(
        *(torch.load(path, weights_only=True)["averages"] for path in (shared, directory / "snapshots" / shared.name)),
        strict=True,
    )
    for pair in pairs:
        close(*pair)


# -- the gradients of a window that an epoch's end leaves open


def test_windows_over_the_ends_of_epochs_are_those_of_one_process(written):
    torch.manual_seed(0)
    module = Net(width=5)
    module.net[1] = nn.Identity()
    optimizer, batches = module.configure_optimizers(), [*regression()] * 3
    for begin in range(0, len(batches), 3):
        window = [torch.cat(values) for values in zip(*batches[begin : begin + 3], strict=True)]
        optimizer.zero_grad()
        module.training_step(window, 0).backward()
        optimizer.step()
    for rank in written[1]:
        close(rank["carried"], dict(module.named_parameters()))
        assert same(rank["carried_ema"], rank["carried"])


def test_a_directory_holds_the_gradients_of_an_open_window_in_shares(written):
    """Two batches of the window are done after eight, one after sixteen, none after all."""
    for epoch, sets in ((0, [["gradients"]]), (1, [["gradients"]]), (2, [])):
        place = written[0] / "carried" / f"epoch={epoch}.ckpt"
        meta = torch.load(place / "meta.pt", weights_only=True)
        assert meta.get("lightning_plugins_second_sets", {}).get("sets", []) == sets
        (window,) = (state.get("carried") for state in meta["callbacks"].values() if "reference" in state)
        assert (window is not None) == bool(sets)
        assert window is None or (window["gradients"], window["total"]) == (None, {0: 8.0, 1: 4.0}[epoch])
        assert (place / FOLDER).is_dir() == bool(sets)
    # what lay there of an open window is gone with it
    assert not (written[0] / "carried-same" / "same.ckpt" / FOLDER).exists()
    both = written[0] / "carried-ema" / "epoch=1.ckpt"
    listing = json.loads((both / FOLDER / "sets.json").read_text())
    assert sorted(listing["sets"]) == [["gradients"], ["raw"]]
    assert len(list((both / FOLDER).glob("*.distcp"))) == 2
    assert same(extract_weights(both, "raw"), extract_weights(written[0] / "carried" / "epoch=1.ckpt", "raw"))


def test_an_open_window_is_listed_as_it_is_of_a_file(written, tmp_path, capsys):
    """31 numbers of 4 bytes; of all, since each parameter has a gradient."""
    gradients, sets = {"gradients of an open window": 124}, {"raw weights": 124}
    for place, expected in (
        ("carried/epoch=0.ckpt", gradients),
        ("carried/epoch=2.ckpt", {}),
        ("carried-ema/epoch=1.ckpt", {**sets, **gradients}),
    ):
        main(["inspect", str(written[0] / place), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert (found["beside"], found["kind"]) == (expected, "sharded")
    whole = torch.load(written[0] / "carried" / "epoch=0.ckpt" / "meta.pt", weights_only=True)
    (key,) = (key for key, state in whole["callbacks"].items() if "carried" in state)
    whole["callbacks"][key]["carried"]["gradients"] = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    torch.save({**whole, "state_dict": {}}, tmp_path / "file.ckpt")
    main(["inspect", str(tmp_path / "file.ckpt")])
    assert "gradients of an open window 28" in capsys.readouterr().out


def test_a_resume_in_mid_window_on_as_many_ranks_is_bit_for_bit(written, resumed):
    for first, rank in zip(written[1], resumed, strict=True):
        assert same(rank["carried"], first["carried"])
        assert same(rank["carried_ema"], first["carried_ema"])


def test_a_file_that_was_put_together_without_the_gradients_is_refused(written, tmp_path):
    checkpoint = _load_distributed_checkpoint(written[0] / "carried" / "epoch=0.ckpt")
    [state] = (state for state in checkpoint["callbacks"].values() if "carried" in state)
    accumulation = GradientAccumulation(3, carry=True)
    accumulation.load_state_dict(state)
    with pytest.raises(ValueError, match=r"must lie beside the checkpoint, in its folder lightning_plugins_ema, but"):
        trainer(accumulation).fit(Net(), regression())


def test_removing_the_average_trains_on_from_it(written, resumed):
    average = extract_weights(written[0] / "full" / "epoch=0.ckpt")
    for rank in resumed:
        assert same(rank["removed"], average)
    # the sets of a run before, which lie in a directory that Lightning alone has replaced, are not this one's
    replaced = written[0] / "replaced" / "x.ckpt"
    assert (replaced / FOLDER / "sets.json").exists()
    assert same(extract_weights(replaced, "raw"), average)
    with pytest.raises(ValueError, match="it has none, only the trained weights"):
        extract_weights(replaced)


def test_adding_an_average_begins_it_there(written, resumed):
    begin = extract_weights(written[0] / "plain" / "epoch=0.ckpt", "raw")
    for rank in resumed:
        close(rank["added"], recursion(begin, rank["added_steps"], 0.8))


def test_weights_that_are_loaded_in_mid_fit_bring_their_average(written, resumed):
    for rank in resumed:
        assert same(rank["loaded"], written[1][0]["raw"])
        assert same(rank["loaded_average"], written[1][0]["average"])


def test_an_evaluation_without_a_fit_takes_the_set_that_is_asked_for(written, resumed):
    for rank in resumed:
        assert same(rank["evaluated_average"], written[1][0]["average"])
        assert same(rank["evaluated_trained"], written[1][0]["raw"])
        assert same(rank["evaluated_slow"], written[1][0]["slow"])


class Plain(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net[1] = nn.Identity()


def test_consolidation_gives_a_file_with_the_average_and_says_what_it_lacks(written, tmp_path, monkeypatch):
    directory, ranks = written
    file = tmp_path / "one.ckpt"
    arguments = [str(directory / "full" / "epoch=2.ckpt"), "--output_file", str(file)]
    monkeypatch.setattr(sys, "argv", ["consolidate_checkpoint", *arguments])
    monkeypatch.delitem(sys.modules, "lightning.fabric.utilities.consolidate_checkpoint", raising=False)
    runpy.run_module("lightning.fabric.utilities.consolidate_checkpoint", run_name="__main__")
    assert same(Plain.load_from_checkpoint(file).state_dict(), ranks[0]["average"])
    assert same(extract_weights(file), ranks[0]["average"])
    for arguments in ({"which": "raw"}, {"name": "slow.one"}):
        with pytest.raises(ValueError, match=r"stayed behind\. Pass the directory"):
            extract_weights(file, **arguments)


def test_the_commands_open_directories(written, tmp_path, capsys):
    directory, ranks = written
    paths = [str(directory / "full" / f"epoch={n}.ckpt") for n in range(3)]
    main(["extract", paths[2], "--weights", "raw", "--output", str(tmp_path / "raw.pt")])
    assert same(torch.load(tmp_path / "raw.pt", weights_only=True), ranks[0]["raw"])
    capsys.readouterr()
    main(["inspect", paths[2], "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["global_step"], found["optimizers"]) == ("sharded", 24, 1)
    assert found["state_dict"]["weights"] == "average of EMA 'ema'"
    # 31 numbers of 4 bytes
    posthoc = {"PostHocEMA(sigma_rels=(0.05, 0.1))": 248}
    latest = {
        "average of LatestWeightAveraging 'slow.two'": 124,
        "LatestWeightAveraging(name='slow.two')": 7 * 124,
    }
    assert found["beside"] == {"raw weights": 124, "average of EMA 'slow.one'": 124, **latest, **posthoc}
    assert found["file_bytes"] == sum(
        file.stat().st_size for file in (directory / "full" / "epoch=2.ckpt").rglob("*.*")
    )
    main(["average", *paths, "--output", str(tmp_path / "mean.ckpt")])
    manifest = read_manifest(tmp_path / "mean.ckpt")
    assert (manifest["weights"], manifest["ema_name"]) == ("average", "ema")
    sets = [extract_weights(path) for path in paths]
    mean = {name: sum(one[name].double() for one in sets) / 3 for name in sets[0]}
    close(torch.load(tmp_path / "mean.ckpt", weights_only=True)["state_dict"], mean)
    assert "lightning_plugins_second_sets" not in torch.load(tmp_path / "mean.ckpt", weights_only=True)


# -- killed


def test_what_a_kill_leaves_is_refused(written, tmp_path):
    directory = written[0]
    old, new, whole = (directory / "full" / f"epoch={n}.ckpt" for n in range(3))
    mixtures(old, new, tmp_path / "cut")
    mixtures(*(directory / "carried" / f"epoch={n}.ckpt" for n in range(2)), tmp_path / "cut-carried")
    places = sorted((tmp_path / "cut").iterdir())
    for place in places:
        for read in (extract_weights, lambda path: average_checkpoints([path, whole])):
            with pytest.raises(ValueError, match=r"incomplete|cannot be read") as error:
                read(place)
            assert str(place) in str(error.value)
            assert str(error.value).count("\n") == 0
        with pytest.raises(ValueError, match=r"incomplete|cannot be read"):
            read_record(place)
    launch(ema_directories.refused, tmp_path, ranks=1, timeout=300)
    messages = json.loads((tmp_path / "refused.json").read_text())
    assert list(messages) == [f"{kind}/{place.name}" for kind in ("cut", "cut-carried") for place in places]
    for place, message in messages.items():
        assert message.startswith("CheckpointError: "), place
        assert "is incomplete: its folder" in message or "meta.pt cannot be read as a checkpoint" in message, message


def test_a_folder_that_was_cut_off_leaves_a_plain_directory_as_it_was(written, tmp_path):
    """Lightning has not begun to write, so what it had written is whole."""
    place = shutil.copytree(written[0] / "plain" / "epoch=0.ckpt", tmp_path / "x")
    before = extract_weights(place, "raw")
    shutil.copytree(written[0] / "full" / "epoch=0.ckpt" / FOLDER, place / FOLDER)
    (place / FOLDER / "sets.json").unlink()
    assert same(extract_weights(place, "raw"), before)


def test_a_run_that_is_killed_while_it_replaces_a_checkpoint(tmp_path):
    (rank,) = ended_ranks(ema_directories.killed, str(tmp_path), world_size=1, timeout=300)
    assert rank.code == -signal.SIGKILL, rank.output[-2000:]
    place = tmp_path / "killed" / "same.ckpt"
    assert (place / "meta.pt").is_file()
    assert json.loads((place / FOLDER / "sets.json").read_text())["step"] == 16
    with pytest.raises(ValueError, match=r"its folder lightning_plugins_ema is of step 16 and its meta\.pt of step 8"):
        extract_weights(place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "must be of version 1, got 2"),
        ({"sets": [["raw", 1]]}, "must have a list of names as `sets`"),
        ({"step": -1}, "`step` must be at least 0"),
        ({"save": 3}, "`save` must be a text"),
        (None, "cannot be read as a checkpoint"),
    ],
)
def test_a_listing_is_checked(written, tmp_path, change, message):
    place = shutil.copytree(written[0] / "full" / "epoch=0.ckpt", tmp_path / "x")
    listing = place / FOLDER / "sets.json"
    listing.write_text("[[" if change is None else json.dumps({**json.loads(listing.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        extract_weights(place)
