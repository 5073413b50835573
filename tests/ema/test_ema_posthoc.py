"""Post-hoc averages: the solver against the reference's numbers, snapshots as files, the callback in a run."""

import json
import pickle
import random

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_plugins import EMA, PostHocEMA, PowerDecay, synthesize_ema
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.ema import snapshots as snapshots_module
from lightning_plugins.ema.posthoc import synthesis_weights
from lightning_plugins.ema.snapshots import (
    SnapshotContents,
    list_snapshots,
    read_frozen,
    set_aside,
    write_frozen,
    write_snapshot,
)
from tests.support.ema_changes import At
from tests.support.ema_runs import THETA, Net, Scripted, follow, numbers, regression, same, trainer

PROFILES = [(step, sigma) for sigma in (0.05, 0.10) for step in (2, 4, 6, 8, 10)]
# Computed with the authors' own formulas: the normalized shares for sigma 0.08 at step 10, and the two results.
NORMALIZED = [
    1.301984e-08, 1.747745e-05, 1.115625e-03, 2.008501e-02, 2.396747e-01,
    -1.779557e-07, -9.471768e-05, -4.071390e-03, -6.067163e-02, 8.039451e-01,
]  # fmt: skip


def power_average(sigma, theta):
    return follow(theta, [PowerDecay(sigma)(n) for n in range(1, len(theta) + 1)])


def test_solver_agrees_with_the_reference():
    shares = synthesis_weights(PROFILES, step=10, sigma_rel=0.08)
    assert shares == pytest.approx(NORMALIZED, rel=1e-5)
    assert sum(shares) == pytest.approx(1, rel=1e-12)
    averages = {sigma: power_average(sigma, THETA) for sigma in (0.05, 0.10)}
    values = [averages[sigma][step - 1] for step, sigma in PROFILES]
    assert sum(x * v for x, v in zip(shares, values, strict=True)) == pytest.approx(8.880310, rel=1e-6)
    plain = synthesis_weights(PROFILES, step=10, sigma_rel=0.08, normalize=False)
    assert sum(plain) == pytest.approx(1.004997, rel=1e-5)
    assert sum(x * v for x, v in zip(plain, values, strict=True)) == pytest.approx(8.924685, rel=1e-6)


def test_synthesis_of_a_recorded_average_is_that_average():
    shares = synthesis_weights(PROFILES, step=8, sigma_rel=0.10)
    assert shares[PROFILES.index((8, 0.10))] == pytest.approx(1, abs=1e-9)


def test_synthesis_is_close_to_the_direct_average_of_a_long_walk():
    generator = random.Random(0)
    theta, walk = 0.0, []
    for _ in range(2000):
        theta += generator.gauss(0, 1)
        walk.append(theta)
    profiles = [(step, sigma) for sigma in (0.05, 0.10) for step in range(200, 2001, 200)]
    averages = {sigma: power_average(sigma, walk) for sigma in (0.05, 0.10)}
    spread = max(walk) - min(walk)
    for sigma in (0.06, 0.08, 0.10):
        shares = synthesis_weights(profiles, step=2000, sigma_rel=sigma)
        value = sum(x * averages[s][t - 1] for x, (t, s) in zip(shares, profiles, strict=True))
        assert value == pytest.approx(power_average(sigma, walk)[-1], abs=2e-3 * spread)


# -- in a run


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_snapshots_hold_the_power_averages(tmp_path, file_format):
    module = Scripted()
    trainer(PostHocEMA(every_n_steps=4, dirpath=tmp_path, file_format=file_format)).fit(module, numbers(10))
    assert module.weight.item() == THETA[9]  # training is left alone
    found = list_snapshots(tmp_path)
    assert [snapshot.step for snapshot in found] == [4, 8, 10]
    for snapshot in found:
        assert snapshot.sigma_rels == (0.05, 0.10)
        for sigma, average in zip(snapshot.sigma_rels, snapshot.read().averages, strict=True):
            assert average["weight"].item() == pytest.approx(power_average(sigma, THETA)[snapshot.step - 1], rel=1e-5)
    assert synthesize_ema(tmp_path, 0.05)["weight"].item() == pytest.approx(power_average(0.05, THETA)[9], rel=1e-5)
    assert synthesize_ema(tmp_path, 0.1, step=8)["weight"].item() == pytest.approx(
        power_average(0.1, THETA)[7], rel=1e-5
    )
    suffix = {"torch": "pt", "safetensors": "safetensors"}[file_format]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step={n:010d}.{suffix}" for n in (4, 8, 10)]


def test_synthesised_weights_load_into_the_module(tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(4, 8)
            self.again.weight = self.net[0].weight
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    for file_format in ("torch", "safetensors"):
        module, where = Tied(), tmp_path / file_format
        trainer(PostHocEMA(every_n_steps=3, dirpath=where, file_format=file_format)).fit(module, regression())
        state = synthesize_ema(where, 0.08)
        module.load_state_dict(state)
        assert state["net.0.weight"] is state["again.weight"]
        assert torch.equal(state["frozen.weight"], module.frozen.weight)
        assert state["net.1.num_batches_tracked"].item() == 8
        assert set(read_frozen(where)) == {"frozen.weight", "frozen.bias"}
        assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_snapshots_may_be_stored_small(tmp_path, dtype, tolerance):
    trainer(PostHocEMA(every_n_steps=5, dirpath=tmp_path, dtype=dtype)).fit(Scripted(), numbers(10))
    average = list_snapshots(tmp_path)[-1].read().averages[1]["weight"]
    assert average.dtype == getattr(torch, dtype)
    assert synthesize_ema(tmp_path, 0.1)["weight"].item() == pytest.approx(power_average(0.1, THETA)[9], rel=tolerance)


def test_weights_unfrozen_in_mid_run_count_as_constant_before(tmp_path):
    class Unfreeze(Net):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Unfreeze()
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.detach().clone()
    trainer(PostHocEMA(every_n_steps=4, dirpath=tmp_path), max_epochs=2).fit(module, regression())
    state = synthesize_ema(tmp_path, 0.1)
    assert torch.isfinite(state["net.0.weight"]).all()
    assert not torch.equal(state["net.0.weight"], before)
    assert torch.allclose(synthesize_ema(tmp_path, 0.1, step=8)["net.0.weight"], before)


def test_default_directory_lies_beside_the_checkpoints(tmp_path):
    files = ModelCheckpoint(tmp_path / "checkpoints")
    trainer(PostHocEMA(every_n_steps=5), files).fit(Scripted(), numbers(5))
    assert [snapshot.step for snapshot in list_snapshots(tmp_path / "posthoc_ema")] == [5]
    trainer(PostHocEMA(every_n_steps=5), default_root_dir=tmp_path / "root").fit(Scripted(), numbers(5))
    assert [snapshot.step for snapshot in list_snapshots(tmp_path / "root" / "posthoc_ema")] == [5]


@pytest.mark.parametrize(
    ("first", "second"),
    [(None, None), ("same", "same"), (None, "posthoc_ema"), ("same", "other/../same"), ("same", "link")],
)
def test_two_that_would_write_into_one_directory_are_refused(tmp_path, monkeypatch, first, second):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same").mkdir()
    (tmp_path / "link").symlink_to("same")
    callbacks = PostHocEMA((0.05, 0.1), dirpath=first), PostHocEMA((0.05, 0.2), dirpath=second)
    with pytest.raises(MisconfigurationException, match=r"`dirpath` must differ .*got /.* twice.* all `sigma_rels` to"):
        trainer(*callbacks, default_root_dir=tmp_path).fit(Scripted(), numbers(5))
    assert not list(tmp_path.rglob("step=*"))


def test_two_of_overlapping_widths_go_on_with_their_own_averages(tmp_path):
    """The second begins later: one width has two averages."""
    options = {"every_n_steps": 5}
    late = PostHocEMA((0.05, 0.2), dirpath=tmp_path / "late", **options)

    def callbacks():
        return PostHocEMA((0.05, 0.1), dirpath=tmp_path / "early", **options)

    trainer(callbacks(), ModelCheckpoint(tmp_path, filename="5")).fit(Scripted(), numbers(5))
    trainer(callbacks(), late, ModelCheckpoint(tmp_path, filename="10"), max_epochs=2).fit(
        Scripted(), numbers(5), ckpt_path=tmp_path / "5.ckpt"
    )
    kept = torch.load(tmp_path / "10.ckpt", weights_only=True)["lightning_plugins_posthoc_ema"]
    early, late = (average[0]["weight"] for average in kept.values())
    assert early != late
    assert torch.equal(early, list_snapshots(tmp_path / "early")[-1].read().averages[0]["weight"])
    assert torch.equal(late, list_snapshots(tmp_path / "late")[-1].read().averages[0]["weight"])


@pytest.mark.parametrize(("dirpath", "folder"), [("mine", "mine"), (None, "root/posthoc_ema")])
def test_a_run_that_changes_the_working_directory_keeps_its_folder(tmp_path, monkeypatch, dirpath, folder):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    moves = At(5, lambda *_: monkeypatch.chdir(tmp_path / "elsewhere"), batch=True)
    run = trainer(PostHocEMA(every_n_steps=2, dirpath=dirpath), moves, default_root_dir="root")
    run.fit(Scripted(), numbers(10))
    assert [found.step for found in list_snapshots(tmp_path / folder)] == [2, 4, 6, 8, 10]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_new_run_moves_old_snapshots_aside(tmp_path, caplog):
    trainer(PostHocEMA(every_n_steps=5, dirpath=tmp_path)).fit(Scripted(), numbers(10))
    with caplog.at_level("INFO"):
        trainer(PostHocEMA(every_n_steps=3, dirpath=tmp_path)).fit(Scripted(), numbers(3))
    assert [snapshot.step for snapshot in list_snapshots(tmp_path)] == [3]
    assert [snapshot.step for snapshot in list_snapshots(tmp_path / "superseded-1")] == [5, 10]
    assert "were moved to" in caplog.text


def test_second_fit_of_the_module_goes_on_and_of_another_begins_anew(tmp_path):
    module, post = Scripted(), PostHocEMA(every_n_steps=5, dirpath=tmp_path)
    trainer(post).fit(module, numbers(5))
    module.values = THETA[5:]
    trainer(post).fit(module, numbers(5))
    assert [snapshot.step for snapshot in list_snapshots(tmp_path)] == [5, 10]
    assert synthesize_ema(tmp_path, 0.1)["weight"].item() == pytest.approx(power_average(0.1, THETA)[9], rel=1e-5)
    trainer(post).fit(Scripted(), numbers(5))
    assert [snapshot.step for snapshot in list_snapshots(tmp_path)] == [5]


def test_beside_an_ema_both_see_raw_weights(tmp_path):
    module, post, ema = Scripted(), PostHocEMA(every_n_steps=10, dirpath=tmp_path / "snapshots"), EMA(0.9)
    files = ModelCheckpoint(tmp_path, filename="full", every_n_train_steps=3, save_top_k=-1)
    trainer(post, ema, files, val_check_interval=2).fit(module, numbers(10), numbers(1))
    assert synthesize_ema(tmp_path / "snapshots", 0.1)["weight"].item() == pytest.approx(
        power_average(0.1, THETA)[9], rel=1e-5
    )


def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch):
    def half(contents, file):
        file.write(b"half")
        raise KeyboardInterrupt

    loaded = SnapshotContents([{"w": torch.ones(2)}], {})
    write_snapshot(tmp_path, 1, [0.1], loaded)
    monkeypatch.setattr(snapshots_module.torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        write_snapshot(tmp_path, 2, [0.1], loaded)
    with pytest.raises(KeyboardInterrupt):
        write_snapshot(tmp_path, 1, [0.1], loaded)
    monkeypatch.undo()
    assert [snapshot.step for snapshot in list_snapshots(tmp_path)] == [1]
    assert torch.equal(list_snapshots(tmp_path)[0].read().averages[0]["w"], torch.ones(2))
    assert len(list(tmp_path.iterdir())) == 1


def test_resume_with_a_file_that_does_not_fit_is_refused(tmp_path):
    post = PostHocEMA(every_n_steps=5, dirpath=tmp_path)
    trainer(post, ModelCheckpoint(tmp_path, filename="full")).fit(Net(), regression())
    contents = torch.load(tmp_path / "full.ckpt", weights_only=True)
    contents["lightning_plugins_posthoc_ema"][post.state_key][0]["old"] = torch.ones(1)
    torch.save(contents, tmp_path / "changed.ckpt")
    with pytest.raises(MisconfigurationException, match=r"post-hoc average must have .*unexpected: old"):
        trainer(PostHocEMA(every_n_steps=5, dirpath=tmp_path), max_epochs=2).fit(
            Net(), regression(), ckpt_path=tmp_path / "changed.ckpt"
        )
    plain = PostHocEMA((0.07,), every_n_steps=5, dirpath=tmp_path / "other")
    trainer(plain, max_epochs=2).fit(Net(), regression(), ckpt_path=tmp_path / "full.ckpt")  # joins at step 8
    assert plain.state_dict()["origin"] == 8
    trainer(plain).validate(Net(), regression(8), ckpt_path=tmp_path / "full.ckpt", verbose=False)


def test_a_run_that_is_resumed_from_elsewhere_goes_on_beside_its_checkpoint(tmp_path, caplog):
    first, elsewhere = tmp_path / "first", tmp_path / "elsewhere"
    files = ModelCheckpoint(first / "checkpoints", filename="full")
    trainer(PostHocEMA(every_n_steps=5), files, default_root_dir=first).fit(Scripted(), numbers(5))
    again, more = PostHocEMA(every_n_steps=5), ModelCheckpoint(elsewhere / "checkpoints")
    with caplog.at_level("INFO"):
        trainer(again, more, default_root_dir=elsewhere, max_epochs=2).fit(
            Scripted(), numbers(5), ckpt_path=first / "checkpoints" / "full.ckpt"
        )
    assert [snapshot.step for snapshot in list_snapshots(first / "posthoc_ema")] == [5, 10]
    assert not (elsewhere / "posthoc_ema").exists()
    assert "are said to lie in" not in caplog.text


def test_a_run_that_was_moved_goes_on_where_it_is_told_to(tmp_path):
    trainer(PostHocEMA(every_n_steps=5, dirpath=tmp_path / "old"), ModelCheckpoint(tmp_path, filename="full")).fit(
        Scripted(), numbers(5)
    )
    again = PostHocEMA(every_n_steps=5, dirpath=tmp_path / "new")
    trainer(again, max_epochs=2).fit(Scripted(), numbers(5), ckpt_path=tmp_path / "full.ckpt")
    (found,) = list_snapshots(tmp_path / "new")
    assert found.step == 10
    assert found.read().averages[1]["weight"].item() == pytest.approx(power_average(0.1, THETA)[9], rel=1e-5)
    unnamed = PostHocEMA(every_n_steps=5)
    trainer(unnamed, max_epochs=2).fit(Scripted(), numbers(5), ckpt_path=tmp_path / "full.ckpt")
    assert [snapshot.step for snapshot in list_snapshots(tmp_path / "old")] == [5, 10]  # where it began


def test_wrong_files_and_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`dirpath` must be a directory with snapshots of PostHocEMA, got"):
        synthesize_ema(tmp_path, 0.1)
    write_snapshot(tmp_path, 5, [0.1], SnapshotContents([{"w": torch.ones(2)}], {}))
    with pytest.raises(ValueError, match=r"`step` must be that of a snapshot in .*, got 4; there are 5"):
        synthesize_ema(tmp_path, 0.1, step=4)
    with pytest.raises(ValueError, match=r"`sigma_rel` must be above 0 and below 0.288675, got 0.4"):
        synthesize_ema(tmp_path, 0.4)
    torch.save({"version": 2, "averages": [], "rest": {}, "tied": {}}, tmp_path / "step=0000000007.pt")
    with pytest.raises(ValueError, match=r"must be of version 1, but .*0007.pt is of version 2"):
        list_snapshots(tmp_path)
    torch.save([1], tmp_path / "step=0000000007.pt")
    with pytest.raises(ValueError, match=r"must hold snapshots of PostHocEMA, but .*0007.pt is none"):
        list_snapshots(tmp_path)
    (tmp_path / "step=0000000007.pt").rename(tmp_path / "step=notes.txt")  # not ours: ignored
    (tmp_path / "step=0000000008.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"0008.safetensors is none"):
        list_snapshots(tmp_path)


def test_a_snapshot_later_than_the_step_that_is_asked_for_need_not_be_readable(tmp_path):
    for step in (5, 10, 15):
        write_snapshot(tmp_path, step, [0.1], SnapshotContents([{"w": torch.tensor([float(step)])}], {}))
    (tmp_path / "step=0000000015.pt").write_bytes(b"")
    assert synthesize_ema(tmp_path, 0.1, 10)["w"].tolist() == [10]
    for step in (None, 15):
        with pytest.raises(ValueError, match=r"0015\.pt is none: it is empty"):
            synthesize_ema(tmp_path, 0.1, step)


def test_set_aside_spares_what_is_not_later(tmp_path):
    for step in (5, 10):
        write_snapshot(tmp_path, step, [0.1], SnapshotContents([{"w": torch.ones(2)}], {}))
    write_frozen(tmp_path, {"f": torch.ones(1)})
    assert set_aside(tmp_path, after=10) is None
    assert set_aside(tmp_path, after=5) == tmp_path / "superseded-1"
    assert (tmp_path / "frozen.pt").exists()
    assert set_aside(tmp_path, after=0) == tmp_path / "superseded-2"
    assert not (tmp_path / "frozen.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma_rels": ()}, r"`sigma_rels` must be one or more different numbers, got \(\)"),
        ({"sigma_rels": (0.1, 0.1)}, r"`sigma_rels` must be one or more different numbers, got \(0.1, 0.1\)"),
        ({"sigma_rels": range(1, 12_001)}, r"`sigma_rels` must be at most 100 numbers, got 12000"),
        ({"sigma_rels": [number / 1000 for number in range(1, 102)]}, r"`sigma_rels` must be at most 100 .* got 101"),
        ({"sigma_rels": (0.1, 0.5)}, r"`sigma_rels` must be above 0 and below 0.288675, got 0.5"),
        ({"every_n_steps": 0}, r"`every_n_steps` must be at least 1 step, got 0"),
        ({"dtype": "int8"}, r"`dtype` must be one of 'float32', 'float16', 'bfloat16', got 'int8'"),
        ({"file_format": "zarr"}, r"`file_format` must be one of 'torch', 'safetensors', got 'zarr'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PostHocEMA(**arguments)


def test_a_hundred_averages_are_allowed():
    assert len(PostHocEMA([number / 1000 for number in range(1, 101)]).rules) == 100


def test_callback_is_picklable_and_its_state_plain(tmp_path):
    post = PostHocEMA(every_n_steps=5, dirpath=tmp_path)
    assert pickle.loads(pickle.dumps(post)).state_key == post.state_key
    assert post.state_dict() == {}
    trainer(post).fit(Scripted(), numbers(5))
    assert json.loads(json.dumps(post.state_dict()))["written"] == 5
    first, second = list_snapshots(tmp_path)[0].read().averages
    assert not same(first, second)
