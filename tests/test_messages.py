"""What a mistake is answered with: every line of `messages.txt`, and what only a run can know.

The form is: the argument in backticks, its rule, what it got, and what to do where that is not obvious.
"""

import re
import warnings
from collections.abc import Mapping, Sequence

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_plugins as lp
from lightning_plugins.core.validation import LightningPluginsWarning, takes
from tests.support.snippets import ROOT

TABLE = (ROOT / "tests" / "messages.txt").read_text().strip().split("\n\n")
NO_ARGUMENT = ("has no argument", "has no attribute", "is not a directory")
RULED_OUT = ("must be out of", "somebody", "nobody", "whoever", "whatever")


def answer(code):
    """Return the error of a line as the table writes it: addresses left out."""
    names = {"lp": lp, "torch": torch, "optimizer": torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), 0.1)}
    with pytest.raises(Exception) as caught:  # noqa: PT011  # the table says which
        eval(code, names)  # noqa: S307  # our own table
    return f"{type(caught.value).__name__}: {re.sub(r' at 0x[0-9a-f]+', '', str(caught.value))}"


@pytest.mark.parametrize("row", TABLE, ids=[row.split("\n")[0] for row in TABLE])
def test_a_mistake_is_answered_with_its_argument_the_rule_and_the_value(row):
    code, expected = row.split("\n    ")
    found = answer(code)
    assert found == expected
    assert re.search(r"`[^`]+`.* (must|cannot) .*(, |: )got ", found) or any(words in found for words in NO_ARGUMENT), (
        found
    )
    assert found.endswith((".", "?")) or any(words in found for words in NO_ARGUMENT)
    assert not any(words in found for words in RULED_OUT)


def test_the_table_has_the_mistakes_of_every_technique():
    assert len(TABLE) >= 150
    text = "\n".join(TABLE)
    assert [
        name for name in ("EMA(", "Tokens(", "Micro", "CSV", "TensorBoard", "Report(", "on_events") if name not in text
    ] == []


def test_functions_that_do_not_tell_their_parameters_are_taken():
    assert takes("function", print, "loop", "event") is print
    assert takes("function", min, "loop", "event") is min


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Scheduled(Model):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Manual(Model):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def fit(folder, *callbacks, module=Model, **options):
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(3, (8,))), 4)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {**quiet, "max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder, **options}
    Trainer(callbacks=list(callbacks), **options).fit(module(), data, data)


def refuses(loop, event):
    raise lp.CancelBatch


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([lp.EMA(0.9), lp.EMA(0.99)], {}, "`name` must differ.*got EMA.name='ema'. twice. Give one of them another"),
        ([lp.EMA(0.9), lp.EMA(0.99, name="b")], {}, "at most one EMA.*evaluate='raw'"),
        ([lp.LearningRateScheduler(lp.Constant())], {"module": Scheduled}, "already scheduled.*existing='replace'"),
        ([lp.LearningRateScheduler(lp.WarmupCosine("5%"))], {"module": Manual}, "'5%' of the run.*`max_steps`"),
        ([lp.LearningRateScheduler({"head": lp.Constant()})], {}, "name groups.*, got 'head'; there are 0"),
        ([lp.LearningRateScheduler(lp.Constant(), optimizer=1)], {}, "one of the module's 1 optimizers, got 1"),
        (
            [lp.LearningRateScheduler(lp.Constant(), plateau=lp.Plateau("val_los"))],
            {},
            "got 'val_los', which did not come.*Correct the name",
        ),
        ([lp.StatisticsRecorder(["accuracy"], targets="labels")], {}, "found no targets.*looked for 'labels'"),
        ([lp.GradientAccumulation(2, count=lp.Tokens("labels"))], {}, "got 'labels'.*only places, 0 to 1"),
        ([lp.GradientAccumulation(2, count=lambda batch: "x")], {}, "`count` must return one number, got 'x'"),
        ([lp.GradientAccumulation(2)], {"accumulate_grad_batches": 2}, "Remove it from the Trainer"),
        ([lp.GradientAccumulation(effective_batch_size=10)], {}, "multiple of 4.*got 10. Take 8 or 12"),
        ([lp.GradientAccumulation(2)], {"module": Manual}, "automatic optimization.*Remove GradientAccumulation"),
        ([lp.CheckpointAveraging(best=2)], {"enable_checkpointing": True}, "ModelCheckpoint with `monitor`; or use"),
        ([lp.on_events(lp.Event.FIT_END)(refuses)], {}, "CancelBatch has no meaning at fitEnd. Raise it at"),
        ([lp.EMA(lambda n: 2.0)], {}, "`decay` must be at least 0 and at most 1, got 2.0 at step 1"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_only_a_run_shows_is_answered_in_words_too(tmp_path, monkeypatch, callbacks, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=message):  # Lightning's, ours and Python's
        fit(tmp_path, *callbacks, **options)


@pytest.mark.filterwarnings("ignore")
def test_warnings_name_what_the_user_added(tmp_path):
    """The CSV logger works without a recorder, so no message may speak of one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, lp.CSVStatisticsLogger(str(tmp_path / "log.csv")), lp.LearningRateScheduler(lp.Noam(512, 4000)))
    texts = [str(each.message) for each in caught if issubclass(each.category, LightningPluginsWarning)]
    assert any("ends inside the learning-rate schedule" in text for text in texts)
    assert not any("StatisticsRecorder" in text for text in texts)


class AList(Sequence):
    """A sequence as Hydra's: no list, no tuple."""

    def __init__(self, *values):
        self.values = values

    def __getitem__(self, index):
        return self.values[index]

    def __len__(self):
        return len(self.values)


class AMapping(Mapping):
    """A mapping as Hydra's: no dict."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, key):
        return self.values[key]

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


@pytest.mark.parametrize(
    ("with_theirs", "with_ours"),
    [
        (lambda: lp.GradientAccumulation(schedule=AMapping({0: 1, 9: 4})).schedule, {0: 1, 9: 4}),
        (lambda: lp.LearningRateScheduler(lp.Constant(), base_lr=AList(0.1, 0.2)).base_lr, (0.1, 0.2)),
        (lambda: set(lp.LearningRateScheduler(AMapping({"head": lp.Constant()})).schedule), {"head"}),
        (lambda: lp.StatisticsRecorder(AList("accuracy")).names, ("loss", "accuracy")),
        (lambda: lp.StatisticsRecorder(AList("accuracy"), progress_bar=AList("accuracy")).progress_bar, ("accuracy",)),
        (lambda: list(lp.CSVStatisticsLogger(columns=AList("loss", "lr")).columns), ["epoch", "batch", "loss", "lr"]),
        (lambda: lp.EventCallback(print, events=AList("epochEnd")).events, (lp.Event.EPOCH_END,)),
        (lambda: lp.PostHocEMA(sigma_rels=AList(0.05, 0.1)).sigma_rels, (0.05, 0.1)),
        (lambda: lp.PiecewiseConstant(AList(3), AList(1, 0.1)), lp.PiecewiseConstant([3], [1, 0.1])),
        (lambda: lp.Segments(AList(lp.Segment(end=1))), lp.Segments([lp.Segment(end=1)])),
        (
            lambda: lp.Join(AList(lp.Constant(), lp.Constant(2)), AList(3)),
            lp.Join([lp.Constant(), lp.Constant(2)], [3]),
        ),
        (lambda: list(lp.ClassificationReport(2, target_names=AList("a", "b")).target_names), ["a", "b"]),
        (lambda: list(lp.ClassificationReport(3, labels=AList(0, 2)).labels), [0, 2]),
        (lambda: lp.Schedule.from_dict(AMapping({"class": "Constant", "value": 2})), lp.Constant(2)),
    ],
)
def test_any_sequence_and_any_mapping_is_taken(with_theirs, with_ours):
    assert with_theirs() == with_ours
