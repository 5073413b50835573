"""A run with every technique is killed again and again; what it leaves is true, and what it ends as is what it would
have been.

The counts at the end of the test run say how often; ``make torture`` does it a thousand times, from a seed of its own
(``SEED=...`` repeats one) and with the clock among what decides when.
"""

import shutil

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from lightning_plugins import EMA
from lightning_plugins.statistics.event_file import EventFile
from tests.support import conditions, counts
from tests.support.survival_chain import Chain, Chronicle, Place, chains, died_of, in_child, uninterrupted
from tests.support.survival_evidence import check_dead, compare, look, quietly
from tests.support.survival_faults import KINDS, Fault
from tests.support.survival_run import PLANS, Plan, train

pytestmark = pytest.mark.slow


def whole_run(folder, plan):
    place = Place(folder / "disk", folder / "aside", is_small=False)
    place.aside.mkdir()
    return place, uninterrupted(place, plan)


@pytest.mark.parametrize("name", PLANS)
def test_a_run_that_is_killed_at_any_moment_is_the_uninterrupted_one_in_the_end(tmp_path, name, record_property):
    kills, seed = counts.wanted(9, 170), counts.seed()
    found, disk = chains([PLANS[name]], tmp_path, kills=kills, seed=seed, timed=counts.TORTURE)
    counts.record(record_property, "kills", found, f"SEED={seed}, a disk is {disk}")
    assert sum(found.values()) >= kills
    assert set(found) == set(KINDS)


class InterruptedLoader(DataLoader):
    def __iter__(self):
        raise KeyboardInterrupt


def test_an_interrupt_before_the_first_batch_is_a_death_though_lightning_fails_to_clean_up(tmp_path):
    def work():
        trainer = pl.Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
        trainer.fit(BoringModel(), InterruptedLoader(RandomDataset(32, 8)))

    assert died_of(Fault("SIGINT", "call", 0.0), in_child(work, tmp_path / "answer.json"))


def test_an_error_of_ours_after_an_interrupt_is_not_its_death(tmp_path):
    def work():
        try:
            iter(InterruptedLoader(RandomDataset(32, 8)))
        except KeyboardInterrupt:
            EMA(2.0)

    with pytest.raises(AssertionError, match="`decay` must be"):
        died_of(Fault("SIGINT", "call", 0.0), in_child(work, tmp_path / "answer.json"))


@pytest.fixture(scope="module")
def dying(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("dying"), DYING)


@conditions.save_on_exception
@pytest.mark.parametrize(
    "fault",
    [
        Fault("exception in a batch", "training", 0.3),
        Fault("exception in validation", "validation", 0.4),
        Fault("exception in the writer", "append", 0.35),
        Fault("exception in the writer", "append", 0.6),
        Fault("SIGTERM", "training", 0.8),
    ],
    ids=lambda fault: f"{fault.kind} {fault.share}",
)
def test_a_checkpoint_that_lightning_cuts_as_a_run_dies_is_true(dying, fault):
    """It is in the middle of everything, so plain Lightning cannot go on from it; the weights in it are the run's."""
    chain = Chain(dying[0], DYING, dying[1])
    assert chain.step(fault)
    assert [name for name in chain.found.checkpoints if name.startswith("checkpoints/epoch")]


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("ending"), PLANS["each epoch"])


@pytest.mark.parametrize(
    ("moment", "share"), [("validation", 0.8), ("validation", 0.95), ("file", 0.95), ("file", 0.99)]
)
def test_a_run_that_is_killed_while_it_ends_does_end(ending, moment, share, record_property):
    """Its last checkpoint is cut by then, so Lightning finds nothing left to train."""
    place, truth = ending
    chain = Chain(place, PLANS["each epoch"], truth)
    assert chain.step(Fault("SIGKILL", moment, share))
    assert chain.found.checkpoints["checkpoints/last.ckpt"]["global_step"] == truth.result["checkpoint"]["global_step"]
    assert not chain.step(None)
    assert place.result()["rates"] == []  # no step was taken
    assert compare(chain.found, place.result(), truth) == []
    counts.record(record_property, "kills", chain.counts)


DYING = Plan(
    "on an exception",
    {"save_top_k": -1, "every_n_epochs": 9, "save_on_exception": True},
    accumulation={"batches": 4, "carry": True},
    stateful=True,
)


# what a resume that restores nothing of one technique would look like

CONTROL = Plan(
    "control",
    {"save_top_k": 1, "save_last": True, "monitor": "val_loss"},
    accumulation={"batches": 4, "carry": True},
    averaging={"best": 2},
    stateful=True,
)
CUT = 15  # batches: in the third epoch, in the middle of a window
TECHNIQUES = (
    "GradientAccumulation",
    "LearningRateScheduler",
    "EMA",
    "LatestWeightAveraging",
    "PostHocEMA",
    "StatisticsRecorder",
    "CSVStatisticsLogger",
    "TensorBoardStatisticsLogger",
    "CheckpointAveraging",
)


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """The truth, and a run that was killed some batches after its checkpoint."""
    folder = tmp_path_factory.mktemp("control")
    place, truth = whole_run(folder, CONTROL)
    chain = Chain(place, CONTROL, truth)
    cut = place.aside / "cut"
    cut.mkdir()
    assert chain.step(Fault("exception in a batch", "training", 0.7), extra=[Chronicle(cut)])
    shutil.copytree(place.run, folder / "left")
    return place, truth, folder / "left", cut / f"{CUT}.ckpt"


def resumed(dead, forgotten):
    """Go on from the checkpoint without what it says of one technique; return where the run is another one then."""
    place, truth, left, cut = dead
    place.clear()
    shutil.copytree(left, place.run, dirs_exist_ok=True)
    checkpoint = torch.load(cut, weights_only=True)
    # a record of the averages serves both
    together = ("EMA", "LatestWeightAveraging") if forgotten == "EMA" else (forgotten,)
    names = [key for key in checkpoint["callbacks"] if key.partition("(")[0] in together]
    for key in names:
        del checkpoint["callbacks"][key]
        checkpoint["lightning_plugins_posthoc_ema"].pop(key, None)
    if forgotten == "EMA":
        del checkpoint["lightning_plugins_ema"]
    if forgotten == "LatestWeightAveraging":
        del checkpoint["lightning_plugins_ema"]["averages"]["lawa"]
    assert names or not forgotten
    torch.save(checkpoint, place.aside / "edited.ckpt")

    def work():
        result = train(place.run, CONTROL, place.final, ckpt_path=place.aside / "edited.ckpt")
        torch.save(result, place.aside / "result.pt")

    ended = in_child(work, place.aside / "answer.json")
    assert ended["code"] == 0, ended["text"]
    return compare(quietly(look, place.run), place.result(), truth)


def test_a_run_that_forgets_nothing_is_the_uninterrupted_one(dead):
    assert resumed(dead, "") == []


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_run_that_forgets_one_technique_is_told_from_the_uninterrupted_one(dead, technique):
    assert resumed(dead, technique) != []


def test_a_file_that_cannot_be_written_changes_nothing_but_what_is_warned_of(dead):
    """A snapshot, a file of the pool, the average; a fault in Lightning's own files ends the run, and it goes on."""
    place, truth, _, _ = dead
    every, lost = int(truth.totals["file"]), []
    for number in range(every // 2, every, 2):
        chain = Chain(place, CONTROL, truth)
        if chain.step(Fault("exception in the writer", "file", (number + 0.5) / every)):
            chain.step(None)
        assert chain.differences() == [], chain.history
        lost.append(chain.lost)
    assert any(losses.snapshots for losses in lost)
    assert any(losses.average for losses in lost)
    assert not all(losses.snapshots or losses.average or losses.pool for losses in lost)


# what a lie on disk would look like


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_weights(path):
    checkpoint = torch.load(path, weights_only=True)
    weight = checkpoint["state_dict"]["first.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1.0))
    torch.save(checkpoint, path)


def change_step(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["global_step"] += 1
    torch.save(checkpoint, path)


def change_snapshot(path):
    snapshot = torch.load(path, weights_only=True)
    snapshot["averages"][0]["last.bias"][0] += 1
    torch.save(snapshot, path)


def lose_a_row(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))


def add_an_event(folder):
    file = EventFile(folder)
    file.add([(99, 0.0, {"batch_loss": 1.0})])
    file.close()


LIES = {
    "a checkpoint that is cut off": ("checkpoints/last.ckpt", cut_off),
    "a checkpoint with another weight": ("checkpoints/last.ckpt", change_weights),
    "a checkpoint of another step": ("checkpoints/last.ckpt", change_step),
    "an average with another weight": ("checkpoints/averaged.ckpt", change_weights),
    "a pool with another weight": ("checkpoints/averaged_pool/*.ckpt", change_weights),
    "a snapshot that is cut off": ("posthoc/step=*.pt", cut_off),
    "a snapshot with another weight": ("posthoc/step=*.pt", change_snapshot),
    "a row with another number": (
        "log.csv",
        lambda path: path.write_text(path.read_text().replace(",train,", ",x,", 1)),
    ),
    "a row that is missing": ("epochs.csv", lose_a_row),
    "an event too many": ("tensorboard/*/train", add_an_event),
    "a file that nobody has documented": ("log.csv", lambda path: path.with_name("log.tmp").touch()),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("finished"), CONTROL)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_on_disk_is_noticed(finished, tmp_path, lie):
    place, truth = finished
    where, tell = LIES[lie]
    shutil.copytree(place.run, tmp_path / "run")
    check_dead(quietly(look, tmp_path / "run"), truth)
    tell(min((tmp_path / "run").glob(where)))
    with pytest.raises(AssertionError):
        check_dead(quietly(look, tmp_path / "run"), truth)
