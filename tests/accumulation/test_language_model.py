"""The bug of 2024: a language model on padded sequences must learn the same from 1 x 32 as from 8 x 4."""

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_plugins import GradientAccumulation, MicroBatching, Tokens
from tests.support.accumulation_runs import fit

VOCABULARY, SEQUENCES = 12, 96


class LanguageModel(pl.LightningModule):
    """Predicts the next token from the current one and the mean of those before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 16)
        self.head = torch.nn.Linear(32, VOCABULARY)
        self.double()

    def forward(self, tokens):
        embedded = self.embedding(tokens)
        places = torch.arange(1, tokens.shape[1] + 1, dtype=embedded.dtype)[:, None]
        return self.head(torch.cat([embedded, embedded.cumsum(1) / places], -1))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.03)


def sequences():
    """Sequences of 2 to 24 tokens, each a walk through the vocabulary with its own step."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 25, (SEQUENCES,), generator=generator).tolist()
    starts = torch.randint(VOCABULARY, (SEQUENCES,), generator=generator).tolist()
    steps = torch.randint(1, 4, (SEQUENCES,), generator=generator).tolist()
    return [
        (torch.arange(length + 1) * step + start) % VOCABULARY
        for length, start, step in zip(lengths, starts, steps, strict=True)
    ]


def padded(walks):
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([walk[:-1] for walk in walks], batch_first=True)
    return {"tokens": tokens, "labels": pad([walk[1:] for walk in walks], batch_first=True, padding_value=-100)}


class Curve(pl.Callback):
    """The loss over all sequences after every step, by the weights alone."""

    def __init__(self):
        self.losses = []
        self.all = padded(sequences())

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        with torch.no_grad():
            self.losses.append(float(pl_module.training_step(self.all, 0)))


def curve(batch_size, callbacks, **settings):
    curve, data = Curve(), DataLoader(sequences(), batch_size=batch_size, collate_fn=padded)
    fit(LanguageModel(), [*callbacks, curve], data, epochs=4, **settings)
    return curve.losses


@pytest.fixture(scope="module")
def truth():
    losses = curve(32, [])
    assert losses[-1] < 0.8 * losses[0]  # it learns, so that the curves have something to differ in
    return losses


@pytest.mark.parametrize(
    ("batch_size", "callbacks"),
    [
        (4, [GradientAccumulation(8, count=Tokens("labels"))]),
        (4, [GradientAccumulation(effective_batch_size=32, count=Tokens("labels"))]),
        (32, [MicroBatching(4, count=Tokens("labels"))]),
        (16, [MicroBatching(4, count=Tokens("labels")), GradientAccumulation(2, count=Tokens("labels"))]),
    ],
    ids=["8 x 4", "effective batch size 32", "32 in pieces of 4", "2 x 16 in pieces of 4"],
)
def test_curves_are_the_same(truth, batch_size, callbacks):
    assert curve(batch_size, callbacks) == pytest.approx(truth, rel=1e-9)


def test_stock_curves_are_not(truth):
    differences = [abs(a - b) for a, b in zip(curve(4, [], accumulate_grad_batches=8), truth, strict=True)]
    assert max(differences) > 1e-3


def test_counting_samples_instead_of_tokens_is_not_enough(truth):
    differences = [abs(a - b) for a, b in zip(curve(4, [GradientAccumulation(8)]), truth, strict=True)]
    assert max(differences) > 1e-3
