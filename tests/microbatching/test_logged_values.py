"""What a module logs in pieces is what it would have logged of the whole batch, whatever it does over batches."""

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_plugins import MicroBatching, Tokens
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.microbatching.merging import way_of
from tests.support.accumulation_runs import Probe, batches, fit

SIZES = (8, 7, 2, 5, 3)

# name -> what it is of a batch, what is done with it over batches
LOGGED = {
    "loss": (None, "mean"),
    "worst": ("mean", "max"),
    "best": ("mean", "min"),
    "summed": ("mean", "sum"),
    "largest": ("max", "max"),
    "smallest": ("min", "min"),
    "largest, averaged": ("max", "mean"),
    "tokens": ("sum", "sum"),
    "most tokens": ("sum", "max"),
    "tokens, averaged": ("sum", "mean"),
    "long": ("sample_mean", "mean"),
    "longest": ("sample_mean", "max"),
    "epoch": ("last", "mean"),
}
WAYS = {name: way for name, (way, reduction) in LOGGED.items() if way not in (None, reduction)}


class Logs(Probe):
    def training_step(self, batch, batch_idx):
        logits, labels = self.net(batch["inputs"]).flatten(0, 1), batch["labels"]
        loss, known = cross_entropy(logits, labels.flatten()), labels != -100
        values = {
            None: loss,
            "mean": loss,
            "max": batch["inputs"].max(),
            "min": batch["inputs"].min(),
            "sum": known.sum(),
            "last": torch.tensor(7 + self.current_epoch),
            "sample_mean": (known.sum(1) > 2).double().mean(),
        }
        for name, (way, reduction) in LOGGED.items():
            value = values[way] if way != "sum" or "averaged" in name else values[way].double()
            self.log(name, value, on_step=True, on_epoch=True, reduce_fx=reduction)
        # a number of its own, the same for each batch
        self.log("weighed alike", loss, on_epoch=True, on_step=False, batch_size=10)
        return loss

    def on_after_backward(self):
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.parameters()])
        self.log("norm", norm, on_step=True, on_epoch=True)
        self.log("largest norm", norm, on_step=True, on_epoch=True, reduce_fx="max")


class Reads(pl.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.filterwarnings("ignore:You called `self.log")  # Lightning wants fractions
@pytest.mark.parametrize("size", [3, 1, "auto"])
def test_a_batch_in_pieces_logs_what_the_whole_batch_logs(size):
    """Against a run of whole batches without the callback; labels that do not count make tokens unlike samples."""
    data = [batch for batch in batches(SIZES, dtype=torch.float64, tokens=True) if (batch["labels"] != -100).any()]
    whole, pieces = Reads(), Reads()
    expected = fit(Logs(torch.float64, lr=0.0), [whole], data).callback_metrics
    callback = MicroBatching(size, count=Tokens("labels"), logged=WAYS)
    found = fit(Logs(torch.float64, lr=0.0), [callback, pieces], data).callback_metrics
    for row, expected_row in zip(pieces.rows, whole.rows, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-6)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-6
    )


class One(Probe):
    """Logs one value in one way."""

    def __init__(self, value, **arguments):
        super().__init__()
        self.value, self.arguments = value, arguments

    def training_step(self, batch, batch_idx):
        self.log("it", self.value, **self.arguments)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("size", [2, "auto"], ids=["in pieces", "whole, for now"])
def test_a_whole_number_that_is_averaged_is_refused_in_the_first_batch(size):
    with pytest.raises(
        ValueError, match="`logged` must tell what 'it' is of a batch, got nothing: it is logged as a wh"
    ):
        fit(One(torch.tensor(3)), [MicroBatching(size)], batches((4, 4), dtype=torch.float32, tokens=False))


class InHook(Probe):
    def on_before_backward(self, loss):
        self.log("it", loss)


def test_a_piece_of_the_loss_is_no_loss_of_the_batch():
    """Whole batches log it; of pieces the hook is given shares of the loss, which add up."""
    data = batches((4, 3), dtype=torch.float32, tokens=False)
    whole = fit(InHook(lr=0.0), [MicroBatching()], data).callback_metrics["it"]
    with pytest.raises(ValueError, match="it is logged in on_before_backward, which is given each piece's share"):
        fit(InHook(), [MicroBatching(2)], data)
    told = fit(InHook(lr=0.0), [MicroBatching(2, logged={"it": "sum"})], data).callback_metrics["it"]
    assert float(told) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("reduction", ["max", min], ids=str)
def test_a_value_that_is_taken_for_a_bound_is_named_once(caplog, reduction):
    with caplog.at_level("INFO"):
        fit(One(1.5, reduce_fx=reduction), [MicroBatching(2)], batches((4, 4), dtype=torch.float32, tokens=False))
    assert caplog.text.count("MicroBatching(logged={'it': 'mean'})") == 1


def test_a_name_that_nothing_is_logged_under_is_named_at_the_end():
    with pytest.warns(
        LightningPluginsWarning, match="`logged` of MicroBatching names 'that', but nothing of that name"
    ):
        fit(
            One(1.5),
            [MicroBatching(2, logged={"it": "max", "that": "sum"})],
            batches((4,), dtype=torch.float32, tokens=False),
        )


@pytest.mark.parametrize(
    ("logged", "error", "message"),
    [
        (["it"], TypeError, r"`logged` must map names that are logged to words, got \['it'\]\."),
        ({1: "sum"}, TypeError, r"`logged` must map names that are logged to words, got \{1: 'sum'\}\."),
        ({"it": "median"}, ValueError, r"`logged\['it'\]` must be one of .*'sample_mean'.*, got 'median'"),
    ],
)
def test_words_that_there_are_not(logged, error, message):
    with pytest.raises(error, match=message):
        MicroBatching(logged=logged)


def test_the_way_over_batches_is_that_within_one_unless_told():
    assert [way_of("it", None, way, [torch.tensor(3)]) for way in ("sum", "max", "min")] == ["sum", "max", "min"]
    assert way_of("it", None, "mean", [torch.tensor(0.5)]) == "mean"
    assert way_of("it", "max", "mean", [torch.tensor(0.5)]) == "max"
