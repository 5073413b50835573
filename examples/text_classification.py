"""Train a small Transformer to tell sentences from the same sentences with their words in another order.

    python examples/text_classification.py
    python examples/text_classification.py --width 256 --layers 6 --precision bf16-mixed --accelerator gpu

A question of acceptability, as in CoLA, asked of the sentences in the documentation of Python's standard library, which
every Python brings along. Each comes once as it is and once shuffled, so the words alone say nothing. What
`lightning_plugins` adds to ordinary Lightning stands in the list of callbacks in `main`.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from _common import CommandLine, make, trainer_options, unused_folder
from lightning_plugins import (
    ClassificationReport,
    CSVStatisticsLogger,
    LearningRateScheduler,
    Segment,
    Segments,
    StatisticsRecorder,
)
from lightning_plugins.statistics import plot_log

HEADS = 4
LONGEST = 64  # tokens of a sentence that are read
PADDING, UNKNOWN = 0, 1  # what is no word of the vocabulary

# --- the network and its task ----------------------------------------------------------------------------------------


class Classifier(LightningModule):
    """Sentences in, as rows of token numbers; one of two classes out. It logs nothing itself."""

    def __init__(self, tokens: int, width: int = 64, layers: int = 2, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.words = nn.Embedding(tokens, width)
        self.places = nn.Embedding(LONGEST, width)
        layer = nn.TransformerEncoderLayer(width, HEADS, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the mean over a sentence's tokens."""
        padding = tokens == PADDING
        places = torch.arange(tokens.shape[1], device=tokens.device)
        states = self.encoder(self.words(tokens) + self.places(places), src_key_padding_mask=padding)
        mean = states.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)
        return self.head(mean)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss; the recorder sees the logits and knows that `batch[1]` are the classes."""
        tokens, target = batch
        return functional.cross_entropy(self(tokens), target)

    validation_step = test_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer with its peak rate; the callback does the rest."""
        return torch.optim.AdamW(self.parameters(), self.hparams["lr"])


# --- the data: pairs of tokens and class (1 intact, 0 shuffled); no module of the library is in two splits -----------

Examples = list[tuple[list[str], int]]


def acceptability() -> tuple[Examples, Examples, Examples]:
    """Return the examples to train with, to validate and to test; the same ones whatever the seed."""
    draw = random.Random(0)
    seen: set[str] = set()
    modules = []
    for name in sorted(sys.stdlib_module_names):
        examples: Examples = []
        for tokens in map(tokenised, sentences(name)):
            if (key := " ".join(tokens)) not in seen and len(set(tokens)) > 5:
                seen.add(key)
                examples += [(tokens, 1), (shuffled(tokens, draw), 0)]
        modules.append(examples)
    draw.shuffle(modules)
    share = len(modules) // 10
    parts = modules[2 * share :], modules[:share], modules[share : 2 * share]
    train, validation, test = (list(chain.from_iterable(part)) for part in parts)
    return train, validation, test


def sentences(module: str) -> Iterator[str]:
    """Find the sentences of 5 to 18 words in the documentation of a module of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in [*library.glob(f"{module}.py"), *sorted((library / module).rglob("*.py"))]:
        if {"test", "tests"}.intersection(path.relative_to(library).parts):  # some of them are wrong on purpose
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                    found = re.split(r"(?<=[.!?:]) +(?=[A-Z])", " ".join(paragraph.split()))
                    yield from (text for text in found if re.fullmatch(r"[A-Z][^<>=[\]{}|]*\.", text) and fits(text))


def fits(sentence: str) -> bool:
    """Whether a sentence is neither too short to be shuffled nor long."""
    return 5 <= len(sentence.split()) <= 18


def tokenised(sentence: str) -> list[str]:
    """Split into words and punctuation marks; without capitals, which would tell where a word stood."""
    return re.findall(r"\w+|[^\w\s]", sentence.lower())


def shuffled(tokens: list[str], draw: random.Random) -> list[str]:
    """Put the words into another order; the punctuation stays where it is."""
    places = [place for place, token in enumerate(tokens) if token[0].isalnum()]
    result = tokens
    while result == tokens:
        order = draw.sample(places, len(places))
        moved = dict(zip(places, order, strict=True))
        result = [tokens[moved.get(place, place)] for place in range(len(tokens))]
    return result


def vocabulary(examples: Examples) -> dict[str, int]:
    """Number the tokens that come at least four times, intact and shuffled ones counted."""
    counts = Counter(token for tokens, _ in examples for token in tokens)
    return {token: number for number, token in enumerate(sorted(t for t in counts if counts[t] >= 4), UNKNOWN + 1)}


def loader(examples: Examples, numbers: dict[str, int], batch_size: int, *, shuffle: bool) -> DataLoader[Tensor]:
    """Return the batches of some examples, tokens replaced by their numbers."""
    encoded = [
        (torch.tensor([numbers.get(token, UNKNOWN) for token in tokens[:LONGEST]]), label) for tokens, label in examples
    ]
    return DataLoader(encoded, batch_size, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]  # a list does


def collate(batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Make sentences of different lengths a batch."""
    tokens, target = zip(*batch, strict=True)
    return pad_sequence(list(tokens), batch_first=True, padding_value=PADDING), torch.tensor(target)


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Train, test, and say what came out."""
    command = CommandLine(__doc__, epochs=3, batch_size=64, lr=2e-3)
    command.add_argument("--width", type=int, default=64, help="of the Transformer, a multiple of 4 (%(default)s)")
    command.add_argument("--layers", type=int, default=2, help="of the Transformer (%(default)s)")
    options = command.options()
    if options.width % HEADS:
        command.error(f"--width must be a multiple of {HEADS}, the number of heads, got {options.width}")
    torch.set_num_threads(1)  # as small as this, threads wait for each other longer than they work
    with command.refusing(OSError, RuntimeError, TypeError, ValueError):
        seed_everything(options.seed, verbose=False)
        folder = unused_folder(options.output)
        trainer = Trainer(
            **trainer_options(options),
            callbacks=[
                LearningRateScheduler(Segments([Segment(start=0, end=1, steps=10), Segment(end=0)])),
                StatisticsRecorder(["accuracy", "matthews_correlation_coefficient"]),
                CSVStatisticsLogger(folder / "log.csv"),
                ClassificationReport(
                    2, target_names=["shuffled", "intact"], path=[folder / "report.txt", folder / "confusion.png"]
                ),
                ModelCheckpoint(folder, "best", monitor="val_matthews_correlation_coefficient", mode="max"),
                TQDMProgressBar(refresh_rate=10),
            ],
            gradient_clip_val=1.0,
            logger=False,
            enable_model_summary=False,
        )
        make(folder)

    parts = acceptability()
    numbers = vocabulary(parts[0])
    train, validation, test = (loader(part, numbers, options.batch_size, shuffle=part is parts[0]) for part in parts)
    trainer.fit(Classifier(UNKNOWN + 1 + len(numbers), options.width, options.layers, options.lr), train, validation)
    trainer.test(dataloaders=test, ckpt_path="best", verbose=False)
    if trainer.is_global_zero:
        print("\nThe first of the test:", *(f"{label}  {' '.join(tokens)}" for tokens, label in parts[2][:2]), sep="\n")
        report({name: float(value) for name, value in trainer.callback_metrics.items()}, parts[2])
        plot_log(folder / "log.csv", folder / "curves.png")
        print("\nOpen curves.png for loss, accuracy and rate, confusion-test.png for what is taken for what.")
        print(f"\n{trainer.global_step} steps. Written:", *sorted(folder.iterdir()), sep="\n  ")


def report(measured: dict[str, float], test: Examples) -> None:
    """Print the result beside that of a program that says always the same."""
    commonest = max(Counter(label for _, label in test).values()) / len(test)
    correlation = measured["test_matthews_correlation_coefficient"]
    print(f"\n{len(test)} sentences{'accuracy':>25}{'MCC':>10}")
    print(f"{'always the same answer':<30}{commonest:>10.4f}{0:>10.4f}")
    print(f"{'Transformer':<30}{measured['test_accuracy']:>10.4f}{correlation:>10.4f}")


if __name__ == "__main__":
    main()
