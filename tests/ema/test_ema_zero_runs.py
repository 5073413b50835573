"""Whole runs under what stands for DeepSpeed's ZeRO on one process: what is saved, resumed, evaluated and refused."""

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_plugins as lp
from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.ema import zero_saves
from lightning_plugins.ema.zero_files import files_of
from tests.support.ema_runs import clone_state, same, trainer
from tests.support.zero_stand_ins import OneRank

RAW = {"evaluate": "raw", "checkpoint": "raw", "after_fit": "raw"}
SIGMAS = (0.05, 0.10)
OTHERS = [(0.05, (0.05,)), (0.2, (0.05, 0.2))]
NAMES = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """What one rank adds up is what it has."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)


class Half(lightning.LightningModule):
    """Weights that compute in 16 bits, one of them frozen, and a buffer."""

    def __init__(self, width=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1)).bfloat16()
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("shift", torch.tensor([0.25]))
        self.seen = []

    def training_step(self, batch, batch_idx):
        return (self.layers(batch[0].bfloat16()) - self.shift).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append(clone_state(self))

    def configure_optimizers(self):
        return torch.optim.SGD([value for value in self.parameters() if value.requires_grad], lr=1e-3)


class Masters(lightning.Callback):
    """The masters before the first step and after each, in float64."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self.seen.append(trainer.strategy.engine.optimizer.flat.double().numpy())

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(trainer.strategy.engine.optimizer.flat.double().numpy())


class Save(lightning.Callback):
    """Saves after a step, while the average is in the module, or at the end of the epoch."""

    def __init__(self, path, step=None):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_validation_batch_start(self, trainer, *_):
        if self.step is None:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, *_):
        if self.step == "last":
            trainer.save_checkpoint(self.path)


def data(n=8):
    """Batches that are alike, so that a resume may begin in their middle."""
    return DataLoader(TensorDataset(torch.tensor([[0.5, -1.0]]).expand(n, 2)))


def averages(folder):
    return (
        lp.EMA(lp.ConstantDecay(0.75)),
        lp.LatestWeightAveraging(3, every=2, **RAW),
        lp.PostHocEMA(SIGMAS, every_n_steps=5, dirpath=folder),
    )


def fit(*callbacks, module=None, ckpt_path=None, **settings):
    module = module or Half()
    run = trainer(*callbacks, strategy=OneRank(), **settings)
    run.fit(module, data(), data(1), ckpt_path=ckpt_path)
    return run, module


def recursion(masters, decays):
    average = masters[0]
    for values, decay in zip(masters[1:], decays, strict=True):
        average = decay * average + (1 - decay) * values
    return average


def flat(state):
    return np.concatenate([state[name].double().numpy().reshape(-1) for name in NAMES])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is saved after step 5, in its validation after step 8, and when that is over."""
    folder, way = tmp_path_factory.mktemp("zero"), Masters()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
        callbacks = averages(folder / "snapshots")
        saves = [Save(folder / "five", 5), Save(folder / "mid"), Save(folder / "last", "last")]
        run, module = fit(*callbacks, way, *saves)
        run.save_checkpoint(folder / "end")
        states = [average.average_state_dict() for average in callbacks[:2]]
        return folder, way.seen, module, states, callbacks[0].raw_state_dict()


def test_averages_are_those_of_the_masters(whole):
    folder, masters, module, (ema, latest), raw = whole
    assert np.array_equal(flat(raw), masters[8])
    expected = recursion(masters, [0.75] * 8)
    np.testing.assert_allclose(flat(ema), expected, rtol=0, atol=1e-7)
    assert np.array_equal(flat(latest), np.mean([masters[4], masters[6], masters[8]], axis=0).astype(np.float32))
    for sigma in SIGMAS:
        expected = recursion(masters, [lp.PowerDecay(sigma)(n) for n in range(1, 9)])
        np.testing.assert_allclose(flat(lp.synthesize_ema(folder / "snapshots", sigma)), expected, rtol=0, atol=1e-6)
    [seen] = module.seen
    for name in NAMES:
        assert torch.equal(seen[name], ema[name].bfloat16())
        assert torch.equal(module.state_dict()[name], seen[name])
    assert (ema["frozen"], ema["shift"]) == (1, 0.25)


@pytest.mark.parametrize("name", ["mid", "end"])
def test_a_directory_that_is_saved_while_the_module_holds_the_average_has_the_masters_and_both_averages(whole, name):
    folder, masters, _, (ema, latest), _ = whole
    saved = torch.load(folder / name / "checkpoint" / "mp_rank_00_model_states.pt")
    assert np.array_equal(saved["masters"].double().numpy(), masters[8])
    assert saved["rest"].keys().isdisjoint({checkpoint_keys.EMA, checkpoint_keys.POSTHOC_EMA})
    post = [f"post-hoc {sigma} " for sigma in SIGMAS]
    names = sorted(files_of(folder / name))
    assert [*names[:2], *(found[: len(prefix)] for found, prefix in zip(names[2:], post, strict=True))] == [
        "ema",
        "lawa",
        *post,
    ]
    assert same(lp.extract_weights(folder / name), ema)
    assert same(lp.extract_weights(folder / name, name="lawa"), latest)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(whole, tmp_path):
    folder, masters, _, states, raw = whole
    again, way = averages(tmp_path), Masters()
    fit(*again, way, ckpt_path=folder / "five")
    assert np.array_equal(way.seen[-1], masters[8])
    assert all(same(one.average_state_dict(), two) for one, two in zip(again[:2], states, strict=True))
    assert same(again[0].raw_state_dict(), raw)
    for sigma in SIGMAS:
        assert same(lp.synthesize_ema(tmp_path, sigma), lp.synthesize_ema(folder / "snapshots", sigma))


def test_a_run_that_finds_nothing_left_to_train_ends_as_the_one_did_that_was_killed_while_it_ended(whole, tmp_path):
    folder, _, module, states, raw = whole
    again, way = averages(tmp_path), Masters()
    _, ended = fit(*again, way, ckpt_path=folder / "last")
    # the training has not begun
    assert way.seen == []
    assert all(same(one.average_state_dict(), two) for one, two in zip(again[:2], states, strict=True))
    assert same(again[0].raw_state_dict(), raw)
    assert same(clone_state(ended), clone_state(module))
    for sigma in SIGMAS:
        assert same(lp.synthesize_ema(tmp_path, sigma), lp.synthesize_ema(folder / "snapshots", sigma))


def test_a_directory_is_evaluated_with_the_average_of_the_callback_that_evaluates(whole):
    folder, _, _, (ema, latest), raw = whole
    cases = [
        (lp.EMA(), ema),
        (lp.LatestWeightAveraging(), latest),
        (lp.EMA(evaluate="raw"), raw),
        (lp.EMA(name="other"), raw),
    ]
    for average, expected in cases:
        module = Half()
        trainer(average, strategy=OneRank()).validate(module, data(1), ckpt_path=folder / "end", verbose=False)
        assert all(torch.equal(module.seen[0][name], expected[name].bfloat16()) for name in NAMES)
    assert len({str(flat(state)) for state in (ema, latest, raw)}) == 3


def test_an_average_that_the_directory_lacks_begins_anew(whole, tmp_path):
    folder, masters, *_ = whole
    new = lp.EMA(lp.ConstantDecay(0.5), name="new", **RAW)
    # the directory has 0.05, too, of a callback of other widths
    others = {width: lp.PostHocEMA(widths, every_n_steps=4, dirpath=tmp_path / str(width)) for width, widths in OTHERS}
    fit(new, *others.values(), ckpt_path=folder / "five")
    np.testing.assert_allclose(
        flat(new.average_state_dict()), recursion(masters[5:], [0.5] * 3), rtol=0, atol=1e-7
    )  # fmt: skip
    for width in others:
        expected = recursion(masters[5:], [lp.PowerDecay(width)(n) for n in range(1, 4)])
        np.testing.assert_allclose(flat(lp.synthesize_ema(tmp_path / str(width), width)), expected, rtol=0, atol=1e-6)


def test_two_of_overlapping_widths_have_files_of_their_own(whole, tmp_path):
    """The one begins where the run is resumed, so that 0.05 has two averages; each goes on from its own."""
    first, second = SIGMAS, (0.05, 0.2)

    def callbacks(place):
        for widths in (first, second):
            yield lp.PostHocEMA(widths, every_n_steps=4, dirpath=tmp_path / place / str(widths))

    fit(*callbacks("whole"), Save(tmp_path / "six", 6), ckpt_path=whole[0] / "five")
    fit(*callbacks("resumed"), ckpt_path=tmp_path / "six")
    for widths in (first, second):
        found = [lp.synthesize_ema(tmp_path / place / str(widths), 0.05) for place in ("whole", "resumed")]
        assert same(*found)
    assert len(files_of(tmp_path / "six")) == 4


def test_a_part_that_cannot_be_written_ends_the_save(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    run, _ = fit(lp.EMA())
    monkeypatch.setattr(zero_saves, "write_part", full)
    with pytest.raises(OSError, match="no space left"):
        run.save_checkpoint(tmp_path / "end")
    assert not (tmp_path / "end").exists()


@pytest.mark.parametrize(
    ("average", "module", "message"),
    [
        (lp.EMA(lp.ConstantDecay(0.75)), Half(4), "average 'ema' in .* must be cut as the weights of this run are"),
        (
            lp.PostHocEMA(SIGMAS, dirpath="nowhere"),
            Half(4),
            "average 'post-hoc 0.05 .*' in .* must be cut as",
        ),
        (lp.LatestWeightAveraging(name="ema"), Half(), "average 'ema' must come with the snapshots"),
    ],
    ids=["EMA", "PostHocEMA", "LatestWeightAveraging"],
)
def test_what_does_not_fit_is_refused(whole, monkeypatch, average, module, message):
    def loaded(strategy, path, **options):
        found = torch.load(path / "checkpoint" / "mp_rank_00_model_states.pt")
        strategy.engine.global_steps = found["global_steps"]
        return found["rest"]

    monkeypatch.setattr(OneRank, "load_checkpoint", loaded)
    with pytest.raises(MisconfigurationException, match=message):
        fit(average, module=module, ckpt_path=whole[0] / "five")


def test_a_file_that_holds_an_average_is_no_directory_to_resume_from(tmp_path):
    trainer(lp.EMA(), Save(tmp_path / "file.ckpt", 5)).fit(Half(), data())
    with pytest.raises(MisconfigurationException, match="must resume from a directory of DeepSpeed, got a file"):
        fit(lp.EMA(), ckpt_path=tmp_path / "file.ckpt")


def test_what_is_frozen_is_left_out_where_deepspeed_leaves_it_out(tmp_path):
    run, _ = fit(lp.EMA(), Save(tmp_path / "all", 8))
    run.strategy.exclude_frozen_parameters = True
    run.save_checkpoint(tmp_path / "some")
    assert lp.extract_weights(tmp_path / "all").keys() - lp.extract_weights(tmp_path / "some").keys() == {"frozen"}


def test_the_strategy_of_an_earlier_fit_saves_nothing_of_a_later_one(tmp_path):
    ema = lp.EMA()
    run, _ = fit(ema)
    trainer(ema).fit(Half(), data())
    run.save_checkpoint(tmp_path / "earlier")
    assert files_of(tmp_path / "earlier") == {}
    assert (tmp_path / "earlier" / "latest").is_file()
