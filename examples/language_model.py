"""Train a small GPT on the pages of Python's own `help()`, byte by byte, and let it write one.

    python examples/language_model.py
    python examples/language_model.py --text book.txt --epochs 10
    python examples/language_model.py --width 512 --layers 8 --context 512 --precision bf16-mixed --accelerator gpu

An ordinary Lightning program. What `lightning_plugins` adds to it stands in the list of callbacks in `main`. Paragraphs
have different lengths, so batches hold different numbers of bytes, and each byte weighs the same nonetheless. The pages
come with every Python; nothing is downloaded.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from pydoc_data.topics import topics

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from _common import CommandLine, make, trainer_options, unused_folder
from lightning_plugins import (
    EMA,
    CSVStatisticsLogger,
    GradientAccumulation,
    LearningRateScheduler,
    Noam,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    Tokens,
)
from lightning_plugins.statistics import plot_log

HEADS = 4
IGNORED = -100  # the target behind a sequence's end
Batch = dict[str, Tensor]  # "bytes" and "targets", the bytes that follow them

# --- the network and its task ----------------------------------------------------------------------------------------


class GPT(LightningModule):
    """A decoder with normalization before each part and the same table for bytes that come in and go out."""

    def __init__(self, width: int = 64, layers: int = 3, context: int = 96, lr: float = 0.4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        for embedding in (self.bytes, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits of the byte that follows each byte; padding comes last, so it is never seen."""
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        states = self.layers(self.bytes(text) + self.places.weight[:length], mask, is_causal=True)
        return functional.linear(states, self.bytes.weight)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch's bytes."""
        logits, targets = self(batch["bytes"]), batch["targets"]
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Measure on text that is not learned from, every byte alike."""
        loss = self.training_step(batch, batch_idx)
        count = int((batch["targets"] != IGNORED).sum())
        self.log("nats_per_byte", loss, batch_size=count, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; the schedule multiplies its rate."""
        return torch.optim.AdamW(self.parameters(), self.hparams["lr"], betas=(0.9, 0.98))

    @torch.no_grad()
    def write(self, start: bytes, length: int, temperature: float = 0.7) -> str:
        """Go on with a text, a byte at a time, to the paragraph's end or the length."""
        text = torch.tensor([list(start)])
        while text.shape[1] < length:
            logits = self(text[:, -self.places.num_embeddings :])[:, -1]
            following = torch.multinomial((logits / temperature).softmax(1), 1)
            if following == 0:
                break
            text = torch.cat([text, following], 1)
        return bytes(text[0].tolist()).strip(b"\0").decode(errors="replace")


# --- the data: paragraphs as bytes between two zeros, in sequences of `context` bytes at most and the one that follows


def help_pages() -> bytes:
    """The language reference behind `help()`: 79 topics, 0.5 MB."""
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def split(text: bytes) -> tuple[list[bytes], list[bytes]]:
    """Take the last tenth of the paragraphs out to validate with; what is there twice counts once."""
    paragraphs = list(dict.fromkeys(part.strip() for part in re.split(rb"\n\s*\n", text) if len(part.strip()) > 20))
    if len(paragraphs) < 20:
        raise ValueError(f"--text needs at least 20 paragraphs with blank lines between them, got {len(paragraphs)}")
    cut = len(paragraphs) * 9 // 10
    return paragraphs[:cut], paragraphs[cut:]


def sequences(paragraphs: list[bytes], context: int) -> list[Tensor]:
    """Cut paragraphs into sequences; the last byte of one is the first of the next, so that none is left out."""
    closed = [b"\0" + paragraph + b"\0" for paragraph in paragraphs]
    return [
        torch.tensor(list(text[start : start + context + 1]))
        for text in closed
        for start in range(0, len(text) - 1, context)
    ]


def collate(batch: list[Tensor]) -> Batch:
    """Make sequences of different lengths a batch."""
    return {
        "bytes": pad_sequence([sequence[:-1] for sequence in batch], batch_first=True),
        "targets": pad_sequence([sequence[1:] for sequence in batch], batch_first=True, padding_value=IGNORED),
    }


def loader(examples: list[Tensor], batch_size: int, *, shuffle: bool) -> DataLoader[Tensor]:
    """Return the batches of some sequences."""
    return DataLoader(examples, batch_size, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]  # a list does


def baselines(train: list[Tensor], validation: list[Tensor]) -> dict[str, float]:
    """Return the perplexity on the validation's bytes of what needs no network."""
    pairs = torch.zeros(256, 256)
    for sequence in train:
        pairs.index_put_((sequence[:-1], sequence[1:]), torch.ones(len(sequence) - 1), accumulate=True)
    single = (pairs.sum(0) + 1) / (pairs.sum() + 256)  # one more of each: no byte is impossible
    double = (pairs + 10 * single) / (pairs.sum(1, keepdim=True) + 10)
    before, after = (torch.cat([sequence[end] for sequence in validation]) for end in (slice(-1), slice(1, None)))
    return {
        "any byte": 256.0,
        "bytes by frequency": math.exp(-single.log()[after].mean()),
        "pairs of bytes by frequency": math.exp(-double.log()[before, after].mean()),
    }


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Train, validate the trained and the averaged weights, and write something."""
    command = CommandLine(__doc__, epochs=3, batch_size=4, lr=0.4)
    add = command.add_argument
    add("--text", type=Path, help="a file to learn instead of the help pages")
    add("--context", type=int, default=96, help="bytes that are seen at once (%(default)s)")
    add("--width", type=int, default=64, help="of the Transformer, a multiple of 4 (%(default)s)")
    add("--layers", type=int, default=3, help="of the Transformer (%(default)s)")
    add("--effective-batch-size", type=int, default=8, help="sequences of a step, over several batches (%(default)s)")
    add("--ema-decay", type=float, default=0.99, help="of the average of the weights (%(default)s)")
    options = command.options()
    if options.width % HEADS:
        command.error(f"--width must be a multiple of {HEADS}, the number of heads, got {options.width}")
    torch.set_num_threads(1)  # as small as this, threads wait for each other longer than they work
    with command.refusing(OSError, RuntimeError, TypeError, ValueError):
        seed_everything(options.seed, verbose=False)
        parts = [
            sequences(part, options.context)
            for part in split(options.text.read_bytes() if options.text else help_pages())
        ]
        folder = unused_folder(options.output)
        ema = EMA(options.ema_decay)
        trainer = Trainer(
            **trainer_options(options),
            callbacks=[
                GradientAccumulation(effective_batch_size=options.effective_batch_size, count=Tokens("targets")),
                LearningRateScheduler(Noam(options.width, warmup="10%")),  # peak: lr / sqrt(width * warm-up steps)
                ema,
                StatisticsRecorder(["perplexity"]),
                CSVStatisticsLogger(folder / "log.csv"),
                TensorBoardStatisticsLogger(folder / "tensorboard"),
                ModelCheckpoint(folder, "last"),
                TQDMProgressBar(refresh_rate=10),
            ],
            gradient_clip_val=1.0,
            logger=False,
            enable_model_summary=False,
        )
        make(folder)

    train, validation = (loader(part, options.batch_size, shuffle=part is parts[0]) for part in parts)
    module = GPT(options.width, options.layers, options.context, options.lr)
    with command.refusing():
        trainer.fit(module, train, validation)
    perplexity = baselines(*parts)
    for name, state in {"raw weights": ema.raw_state_dict(), "EMA": ema.average_state_dict()}.items():
        tested = GPT(**module.hparams)
        tested.load_state_dict(state)
        perplexity[name] = math.exp(trainer.validate(tested, validation, verbose=False)[0]["nats_per_byte"])
    if trainer.is_global_zero:
        print("\nperplexity of a byte")
        for name, value in perplexity.items():
            print(f"{name:<30}{value:8.2f}")
        print("\nIt writes:\n", tested.cpu().eval().write(b"\0The ", 300), sep="\n")
        print(f"\nOpen {plot_log(folder / 'log.csv', folder / 'curves.png')} for perplexity and rate.")
        print(f"\n{trainer.global_step} steps. Written:", *sorted(folder.iterdir()), sep="\n  ")


if __name__ == "__main__":
    main()
