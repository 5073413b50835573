"""The mean of the latest snapshots, against NumPy's, the table of the paper's rule, and uninterrupted runs."""

import copy
import pickle

import lightning.pytorch as unified
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_plugins import EMA, ConstantDecay, LatestWeightAveraging, average_checkpoints, extract_weights
from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.ema import describe_checkpoint
from lightning_plugins.ema.latest_shadow import LatestShadow, means_into
from tests.support.ema_runs import (
    NAMESPACES,
    THETA,
    Net,
    Scripted,
    clone_state,
    numbers,
    regression,
    same,
    trainer,
)

MEANS = [1.0, 1.5, 2.333333, 3.0, 4.0, 5.333333, 6.666667, 8.0, 7.333333, 8.333333]  # of the last 3 of THETA
RAW = {"evaluate": "raw", "checkpoint": "raw", "after_fit": "raw"}


class Save(unified.Callback):
    """Writes a checkpoint after a certain step, in the middle of an epoch."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def weight_of(average):
    return average.average_state_dict()["weight"].item()


# -- the mean


@pytest.mark.parametrize("steps", range(1, 11))
@NAMESPACES
def test_it_is_the_mean_of_the_last_snapshots_or_of_those_there_are(trainer_class, module_class, steps):
    average = LatestWeightAveraging(3, every=1)
    module = module_class()
    trainer(average, trainer_class=trainer_class).fit(module, numbers(steps), numbers(1))
    assert weight_of(average) == module.weight.item() == module.seen[-1] == pytest.approx(MEANS[steps - 1], abs=1e-6)
    assert average.raw_state_dict()["weight"].item() == THETA[steps - 1]


@pytest.mark.parametrize(("shape", "memory_format"), [((5, 3, 2, 2), torch.channels_last), ((7,), None), ((), None)])
def test_a_thousand_snapshots_do_not_drift_from_numpys_mean(shape, memory_format):
    """Values of very different size: what was added and taken away again would leave its rounding behind."""
    generator, last = torch.Generator().manual_seed(0), 7
    module = nn.Module()
    start = torch.zeros(shape)
    module.weight = nn.Parameter(start.to(memory_format=memory_format) if memory_format else start)
    latest, seen = LatestShadow(module, last=last), []
    for number in range(1000):
        with torch.no_grad():
            module.weight.copy_(torch.randn(shape, generator=generator) * 10.0 ** (number % 9 - 4))
        seen.append(module.weight.detach().numpy().copy())
        latest.update()
        expected = np.mean(np.stack(seen[-last:]).astype(np.float64), axis=0).astype(np.float32)
        np.testing.assert_array_equal(latest.collect("average")["weight"].numpy(), expected)
    snapshots = latest.collect_snapshots()
    assert len(snapshots) == last
    assert all(np.array_equal(one["weight"].numpy(), two) for one, two in zip(snapshots, seen[-last:], strict=True))


def test_tensors_of_all_sizes_and_ages_have_their_own_means_bit_for_bit():
    """Large ones come in pieces, small ones together; those of a parameter that joined later have fewer snapshots."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(7, 3), (3 * 2**17 + 5,), (0,), (2**17 - 2,), (), (11,), (500, 300), (9,)]
    histories = [
        [torch.randn(size, generator=generator) for _ in range(2 if number in (5, 6) else 5)]
        for number, size in enumerate(sizes)
    ]
    histories[0] = [snapshot.t() for snapshot in histories[0]]
    targets = [torch.full_like(history[0], torch.nan) for history in histories]
    means_into(targets, histories, torch.device("cpu"))
    for target, history in zip(targets, histories, strict=True):
        expected = np.mean([snapshot.numpy().astype(np.float64) for snapshot in history], axis=0).astype(np.float32)
        assert np.array_equal(target.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_snapshots_are_exact_and_the_mean_is_never_rounded_to_half_precision(dtype):
    """A tensor of more than one piece."""
    module = nn.Linear(1025, 1024, bias=False).to(dtype)
    latest, seen = LatestShadow(module, last=2), []
    for _ in range(3):
        with torch.no_grad():
            module.weight.add_(torch.randn(1024, 1025).to(dtype))
        seen.append(module.weight.detach().clone())
        latest.update()
    assert all(torch.equal(one["weight"], two) for one, two in zip(latest.collect_snapshots(), seen[1:], strict=True))
    expected = (seen[1].double() + seen[2].double()) / 2
    mean = latest.collect("average")["weight"]
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(mean, expected.to(mean.dtype))
    latest.swap_in()
    assert torch.equal(module.weight, expected.to(dtype))
    with pytest.raises(RuntimeError, match="snapshot cannot be taken while the module holds the average"):
        latest.update()
    latest.swap_out()
    assert torch.equal(module.weight, seen[2])


def test_memory_is_that_of_the_snapshots_and_one_mean():
    module = nn.Linear(100, 100, bias=False).bfloat16()
    latest = LatestShadow(module, last=3)
    for _ in range(10):
        latest.update()
    assert sum(one.nbytes for history in latest._histories for one in history) == 3 * 2 * 100 * 100
    assert sum(shadow.nbytes for shadow in latest._shadows) == 4 * 100 * 100


# -- when


@pytest.mark.parametrize(("every", "steps"), [(2, 2), ("20%", 2), (0.2, 2), ("1ep", 10), ("1%", 1), (7, 7)])
def test_snapshots_are_taken_at_an_interval_that_is_a_duration(every, steps):
    average = LatestWeightAveraging(4, every=every)
    trainer(average, max_epochs=2).fit(Scripted(), numbers(5 if every != "1ep" else 10))
    taken = [(THETA * 2)[step - 1] for step in range(steps, 11 if every != "1ep" else 21, steps)][-4:]
    assert weight_of(average) == pytest.approx(np.mean(taken), rel=1e-6)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning says so once in a process
def test_the_interval_is_in_applied_steps():
    class Sparse(Scripted):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    average = LatestWeightAveraging(2, every=2)
    trainer(average).fit(Sparse(), numbers(12))  # the steps of batches 0, 2, ... 10
    assert average.state_dict()["last_update"] == 6
    assert weight_of(average) == pytest.approx((THETA[3] + THETA[5]) / 2)


def test_everything_is_raw_before_the_first_snapshot(tmp_path):
    module, average = Scripted(), LatestWeightAveraging(every=20)
    trainer(average, Save(tmp_path / "early.ckpt", 5)).fit(module, numbers(10), numbers(1))
    assert module.weight.item() == module.seen[-1] == THETA[9]
    assert extract_weights(tmp_path / "early.ckpt", "raw")["weight"].item() == THETA[4]


def test_a_share_of_an_unknown_length_is_refused():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.ones(100, 1, 1))

    with pytest.raises(MisconfigurationException, match=r"`every` is '1%' of the run.* state it in steps"):
        trainer(LatestWeightAveraging()).fit(Scripted(), Endless())


# -- files and resuming


def run(*callbacks, last=3, every=2, epochs=4, ckpt_path=None, **settings):
    """Fit scripted weights, in epochs of six steps; batches are alike, so a resume may begin in their middle."""
    average = LatestWeightAveraging(last, every=every)
    trainer(average, *callbacks, max_epochs=epochs, **settings).fit(
        Scripted(), numbers(6), numbers(1), ckpt_path=ckpt_path
    )
    return average


@pytest.mark.parametrize(("step", "every"), [(1, 2), (3, 2), (14, 2), (15, 2), (14, "10%"), (13, "1ep")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, step, every):
    whole = run(Save(tmp_path / "cut.ckpt", step), every=every)
    resumed = run(every=every, ckpt_path=tmp_path / "cut.ckpt")
    assert same(resumed.average_state_dict(), whole.average_state_dict())
    assert resumed.state_dict() == whole.state_dict()
    ours, theirs = (average._shadows[0].collect_snapshots() for average in (resumed, whole))
    assert len(ours) == 3
    assert all(same(one, two) for one, two in zip(ours, theirs, strict=True))


def test_a_network_is_resumed_bit_for_bit_too(tmp_path):
    def fit(*callbacks, **options):
        torch.manual_seed(0)
        average = LatestWeightAveraging(4, every=3, buffers="average")
        trainer(average, *callbacks, max_epochs=3).fit(module := Net(), regression(), regression(8), **options)
        return average, module

    whole, module = fit(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    resumed, again = fit(ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(resumed.average_state_dict(), whole.average_state_dict())
    assert same(resumed.raw_state_dict(), whole.raw_state_dict())
    assert same(clone_state(again), clone_state(module))
    assert not same(clone_state(module), whole.raw_state_dict())


def test_other_numbers_of_snapshots_go_on_from_those_there_are(tmp_path):
    run(Save(tmp_path / "cut.ckpt", 12), last=3, every=1)
    fewer, more = (run(last=last, every=1, epochs=3, ckpt_path=tmp_path / "cut.ckpt") for last in (2, 20))
    assert weight_of(fewer) == pytest.approx(np.mean([THETA[6], THETA[7]]))  # steps 17 and 18
    theta = THETA * 2
    assert weight_of(more) == pytest.approx(np.mean(theta[9:18]))  # those of steps 10 to 12 were in the file


def test_files_hold_both_sets_and_the_snapshots(tmp_path):
    module, average = Net(), LatestWeightAveraging(3, every=2)
    full = ModelCheckpoint(tmp_path / "full")
    light = ModelCheckpoint(tmp_path / "light", save_weights_only=True, every_n_epochs=2)
    trainer(average, full, light, max_epochs=2).fit(module, regression(), regression(8))
    path = full.best_model_path
    assert same(extract_weights(path, name="lawa"), average.average_state_dict())
    assert same(extract_weights(path, "raw"), average.raw_state_dict())
    assert same(clone_state(Net.load_from_checkpoint(path)), average.average_state_dict())
    assert same(extract_weights(light.best_model_path, name="lawa"), average.average_state_dict())
    with pytest.raises(ValueError, match="it is a weights-only file"):
        extract_weights(light.best_model_path, "raw")
    with pytest.raises(ValueError, match=r"`name` must be that of an average in .*, got 'ema'; it has 'lawa'"):
        extract_weights(path)
    parameters = sum(4 * parameter.numel() for parameter in module.parameters())
    described = describe_checkpoint(path)
    assert described["state_dict"]["weights"] == "average of LatestWeightAveraging 'lawa'"
    assert described["beside"] == {"raw weights": parameters, "LatestWeightAveraging(name='lawa')": 3 * parameters}
    assert describe_checkpoint(light.best_model_path)["state_dict"]["weights"] == described["state_dict"]["weights"]
    torch.load(path, weights_only=True)


def test_beside_an_ema_each_keeps_its_own(tmp_path):
    def make():
        return EMA(ConstantDecay(0.5)), LatestWeightAveraging(3, every=1, **RAW)

    def fit(pair, *callbacks, **options):
        trainer(*pair, *callbacks, max_epochs=2).fit(module := Scripted(), numbers(5), numbers(1), **options)
        return module

    pair, again = make(), make()
    module = fit(pair, Save(tmp_path / "cut.ckpt", 7))
    assert module.seen[-1] == module.weight.item() == weight_of(pair[0])
    assert weight_of(pair[1]) == pytest.approx(MEANS[9], abs=1e-6)
    assert extract_weights(tmp_path / "cut.ckpt", name="lawa")["weight"].item() == pytest.approx(MEANS[6], abs=1e-6)
    fit(again, ckpt_path=tmp_path / "cut.ckpt")
    assert [same(one.average_state_dict(), two.average_state_dict()) for one, two in zip(pair, again, strict=True)]
    with pytest.raises(MisconfigurationException, match="`evaluate` must be 'average' for at most one"):
        trainer(EMA(), LatestWeightAveraging(every=1)).fit(Scripted(), numbers(1))


def test_what_a_checkpoint_says_is_checked(tmp_path):
    run(Save(tmp_path / "cut.ckpt", 12))
    saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    [key] = saved[checkpoint_keys.POSTHOC_EMA]
    for found, message in [
        ({}, "average 'lawa' must come with the snapshots that it is made of"),
        ({key: 3}, "must be snapshots of named tensors for LatestWeightAveraging 'lawa', got 3"),
        ({key: [{"weight": 1.0}]}, "must be snapshots of named tensors"),
        (
            {key: [{"weight": torch.ones(2)}]},
            "snapshots of LatestWeightAveraging 'lawa' must have the names and",
        ),
        ([], "must be sets of weights by callback"),
    ]:
        torch.save({**saved, checkpoint_keys.POSTHOC_EMA: found}, tmp_path / "damaged.ckpt")
        with pytest.raises(MisconfigurationException, match=message):
            run(ckpt_path=tmp_path / "damaged.ckpt")


def test_it_joins_a_resumed_run_and_leaves_one(tmp_path):
    trainer(Save(tmp_path / "plain.ckpt", 5)).fit(Scripted(), numbers(10))
    average = LatestWeightAveraging(3, every=1)
    trainer(average).fit(Scripted(), numbers(10), ckpt_path=tmp_path / "plain.ckpt")
    assert weight_of(average) == pytest.approx(np.mean(THETA[7:]))
    run(Save(tmp_path / "cut.ckpt", 12))
    trainer(max_epochs=4).fit(module := Scripted(), numbers(6), ckpt_path=tmp_path / "cut.ckpt")
    assert module.weight.item() == THETA[3]


def test_weights_that_are_loaded_in_mid_fit_bring_their_snapshots(tmp_path):
    """The weights stay scripted: after step 12 the file of step 6 is loaded, so steps 13 and 14 are its 7 and 8."""

    class Load(unified.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 12:
                trainer.strategy.load_model_state_dict(torch.load(tmp_path / "cut.ckpt", weights_only=True))
                snapshots = average._shadows[0].collect_snapshots()
                seen.append((pl_module.weight.item(), [snapshot["weight"].item() for snapshot in snapshots]))

    seen = []
    average = LatestWeightAveraging(3, every=2)
    save, load = Save(tmp_path / "cut.ckpt", 6), Load()
    trainer(average, save, load, max_epochs=1).fit(Scripted(), numbers(14))
    assert seen == [(THETA[5], [THETA[1], THETA[3], THETA[5]])]
    assert average.state_dict()["last_update"] == 8
    assert weight_of(average) == pytest.approx(np.mean([THETA[3], THETA[5], (THETA * 2)[13]]))


def test_a_mean_of_its_files_has_one_set(tmp_path):
    run(Save(tmp_path / "1.ckpt", 12))
    run(Save(tmp_path / "2.ckpt", 18))
    paths = [tmp_path / "1.ckpt", tmp_path / "2.ckpt"]
    average_checkpoints(paths, tmp_path / "mean.ckpt")
    sets = [extract_weights(path, name="lawa")["weight"].item() for path in paths]
    assert extract_weights(tmp_path / "mean.ckpt", name="lawa")["weight"].item() == pytest.approx(np.mean(sets))
    assert checkpoint_keys.POSTHOC_EMA not in torch.load(tmp_path / "mean.ckpt", weights_only=True)


def test_copies_go_their_own_ways():
    module, average = Net(), LatestWeightAveraging(3, every=1)
    trainer(average).fit(module, regression())
    for twin_module, twin in (copy.deepcopy((module, average)), pickle.loads(pickle.dumps((module, average)))):
        assert same(twin.average_state_dict(), average.average_state_dict())
        trainer(twin).fit(twin_module, regression())
        assert not same(twin.average_state_dict(), average.average_state_dict())


# -- a module that changes


def test_a_replaced_weight_has_the_mean_of_its_own_snapshots():
    module = nn.Linear(2, 2)
    latest = LatestShadow(module, last=3)
    bias = []
    for value in range(6):
        with torch.no_grad():
            module.weight.fill_(value)
            module.bias.fill_(10 * value)
        if value == 4:
            module.weight = nn.Parameter(torch.full((2, 2), 100.0))
        latest.update()
        bias.append(10.0 * value)
        if value == 4:
            assert latest.collect("average")["weight"].unique().item() == 100
    found = latest.collect("average")
    assert found["weight"].unique().item() == (100 + 5) / 2
    assert found["bias"].unique().item() == np.mean(bias[-3:])
    # older snapshots do not have it
    assert ["weight" in snapshot for snapshot in latest.collect_snapshots()] == [False, True, True]
    again = LatestShadow(module, last=3, snapshots=latest.collect_snapshots())
    assert same(again.collect("average"), found)


def test_snapshots_that_are_not_finite_begin_anew():
    module = nn.Linear(2, 1, bias=False)
    latest = LatestShadow(module, last=3)
    for value in (1.0, float("nan"), 3.0):
        with torch.no_grad():
            module.weight.fill_(value)
        latest.update()
    assert latest.collect("average")["weight"].unique().item() == 3.0
    assert latest.changes.losses
    with torch.no_grad():
        module.weight.fill_(6.0)
    latest.update()
    assert latest.collect("average")["weight"].unique().item() == 4.0


def test_pruning_that_is_made_permanent_prunes_the_snapshots():
    from torch.nn.utils import prune

    module = nn.Linear(2, 1, bias=False)
    prune.custom_from_mask(module, "weight", torch.tensor([[1.0, 0.0]]))
    latest = LatestShadow(module, last=2)
    latest.update()
    prune.remove(module, "weight")
    latest.update()
    assert latest.collect("average")["weight"][0, 1].item() == 0
    assert all(snapshot["weight"][0, 1].item() == 0 for snapshot in latest.collect_snapshots())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"last": 0}, ValueError, "`last` must be at least 1 snapshot, got 0"),
        ({"last": 1.5}, TypeError, "`last` must be a whole number of snapshots, got 1.5"),
        ({"every": 0}, ValueError, "`every` must be at least 1 step, got 0"),
        ({"every": "often"}, ValueError, "`every` must be a duration, got 'often'"),
        ({"evaluate": "both"}, ValueError, "`evaluate` must be one of 'average', 'raw', got 'both'"),
        ({"name": ""}, ValueError, "`name` must be a word, got ''"),
    ],
)
def test_wrong_arguments_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        LatestWeightAveraging(**arguments)
