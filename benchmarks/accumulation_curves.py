"""The loss curves of one language model, accumulated as Lightning does and exactly, beside the full batch.

Prints how far each curve is from that of the full batch and draws them into the accumulation card's picture. The
sequences are padded and bucketed by length, as usual: a batch of 4 then holds between 8 and 190 tokens.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from benchmarks.harness import quiet
from lightning_plugins import GradientAccumulation, MicroBatching, Tokens

PICTURE = Path(__file__).parents[1] / "lightning_plugins" / "accumulation" / "pictures" / "loss_curves.png"
VOCABULARY, SEQUENCES, STEP = 16, 256, 32


class LanguageModel(pl.LightningModule):
    """Predicts the next token from the current one and the mean of those before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 24)
        self.head = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.Tanh(), torch.nn.Linear(48, VOCABULARY))

    def training_step(self, batch, batch_idx):
        embedded = self.embedding(batch["tokens"])
        places = torch.arange(1, embedded.shape[1] + 1)[:, None]
        logits = self.head(torch.cat([embedded, embedded.cumsum(1) / places], -1))
        return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def sequences():
    """Return walks through the vocabulary: long ones take steps of their own, short ones are mostly noise."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    walks = []
    for index in range(SEQUENCES):
        length = draw(2, 6) if index % 2 else draw(24, 48)
        noise = torch.randint(VOCABULARY, (length + 1,), generator=generator)
        walk = (torch.arange(length + 1) * draw(1, 4) + draw(0, VOCABULARY)) % VOCABULARY
        walks.append(noise if length < 6 else walk)
    # bucketed: inside every 32 the sequences are sorted by length, so that batches of 4 need little padding
    return [walk for i in range(0, SEQUENCES, STEP) for walk in sorted(walks[i : i + STEP], key=len)]


def padded(walks):
    tokens = pad_sequence([walk[:-1] for walk in walks], batch_first=True)
    return {"tokens": tokens, "labels": pad_sequence([walk[1:] for walk in walks], True, -100)}


class Curve(pl.Callback):
    """Keeps the loss over all sequences at every step, which the weights alone decide."""

    def __init__(self):
        self.losses, self.all = [], padded(sequences())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with torch.no_grad():
            self.losses.append(float(pl_module.training_step(self.all, 0)))


def curve(epochs, batch_size, callbacks=(), **settings):
    data, curve = DataLoader(sequences(), batch_size=batch_size, collate_fn=padded), Curve()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=[*callbacks, curve],
        **quiet,
        **settings,
    )
    trainer.fit(LanguageModel(), data)
    return torch.tensor(curve.losses)


def draw(curves, truth):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(truth, color="0.75", linewidth=5, label="full batch, 1 x 32")
    for (name, losses), style in zip(curves.items(), ("C3-", "C0--", "C2:"), strict=True):
        left.plot(losses, style, label=name)
        right.semilogy((losses - truth).abs().clamp(min=1e-8), style, label=name)
    left.set(xlabel="optimizer step", ylabel="loss", title="Loss over all tokens")
    right.set(xlabel="optimizer step", title="Distance from the full batch")
    left.legend(fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main(*, quick=False):
    quiet()
    torch.set_num_threads(1)
    tokens, epochs = Tokens("labels"), 1 if quick else 6
    truth = curve(epochs, 32)
    curves = {
        "Trainer(accumulate_grad_batches=8), 8 x 4": curve(epochs, 4, accumulate_grad_batches=8),
        "GradientAccumulation(8), 8 x 4": curve(epochs, 4, [GradientAccumulation(8, count=tokens)]),
        "MicroBatching(4), 1 x 32 in pieces": curve(epochs, 32, [MicroBatching(4, count=tokens)]),
    }
    print("# accumulation_curves\n")
    print(f"| {epochs} epochs, {len(truth)} steps | largest distance from the full batch | last loss |")
    print(f"|---|---:|---:|\n| full batch, 1 x 32 | | {truth[-1]:.4f} |")
    for name, losses in curves.items():
        print(f"| {name} | {(losses - truth).abs().max():.1e} | {losses[-1]:.4f} |")
    if quick:
        return
    try:
        draw(curves, truth)
    except ImportError:
        print("matplotlib is not installed: no picture", file=sys.stderr)


if __name__ == "__main__":
    main()
