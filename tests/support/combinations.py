"""Random runs with our callbacks, and the same runs as a loop in plain torch, which uses nothing of this package."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import lightning_plugins as lp

LR, DECAY, MOMENTUM = 0.3, 0.02, 0.8


@dataclass(frozen=True)
class Combination:
    """What a run is made of; every field is drawn.

    Args:
        sizes: Samples of each batch of an epoch.
        epochs: Of the run.
        max_steps: Where it ends before, or ``None``.
        window: Batches of a step.
        exact: Whether ``GradientAccumulation`` makes the windows, or Lightning, which divides by their nominal length.
        carry: Whether windows go on in the next epoch.
        clip: Norm of the gradient, or ``None``.
        curves: Of the rates of weights and bias: ``"cosine"``, ``"line"`` or ``"trapezoid"``; alike or by group.
        decay: Whether the weight decay doubles along a cosine.
        average: Decay, update interval and start of EMA.
        ramp: Whether that decay is a warm-up's.
        latest: Snapshots and interval of LAWA, or ``None``.
        pieces: Samples of a piece, or ``None``.
        validates: Whether the averaged weights are validated after every epoch.
        dies_in: The epoch in which the run is killed, to go on from the last epoch's end; ``None``: none.
        shuffled: The order of the callbacks.
    """

    sizes: tuple[int, ...]
    epochs: int
    max_steps: int | None
    window: int
    exact: bool
    carry: bool
    clip: float | None
    curves: tuple[str, str]
    decay: bool
    average: tuple[float, int, int]
    ramp: bool
    latest: tuple[int, int] | None
    pieces: int | None
    validates: bool
    dies_in: int | None
    shuffled: int = field(repr=False)

    @classmethod
    def draw(cls, rng: random.Random) -> Combination:
        epochs, exact, curve = rng.randint(1, 4), rng.random() < 0.7, rng.choice(["cosine", "line", "trapezoid"])
        # beside `max_steps`, plain Lightning does not go on right from an epoch's end
        dies_in = rng.randrange(1, epochs) if epochs > 1 and rng.random() < 0.4 else None
        return cls(
            sizes=tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 7))),
            epochs=epochs,
            max_steps=None if dies_in else rng.choice([None, rng.randint(1, 12)]),
            window=rng.randint(1, 4),
            exact=exact,
            carry=exact and rng.random() < 0.4,
            clip=rng.choice([None, 0.05]),
            curves=(curve, rng.choice([curve, "line"])),
            decay=rng.random() < 0.5,
            average=(rng.choice([0.5, 0.9]), rng.randint(1, 3), rng.choice([0, 0, 2])),
            ramp=rng.random() < 0.5,
            latest=rng.choice([None, (rng.randint(1, 3), rng.randint(1, 3))]),
            pieces=rng.choice([None, None, 1, 2, 3]) if exact else None,
            validates=rng.random() < 0.3,
            dies_in=dies_in,
            shuffled=rng.randrange(10**6),
        )

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the batches of an epoch."""
        generator = torch.Generator().manual_seed(self.shuffled)
        return [
            tuple(torch.randn(size, width, generator=generator, dtype=torch.float64) for width in (3, 2))
            for size in self.sizes
        ]

    def network(self) -> nn.Linear:
        """Return the network as it begins."""
        network = nn.Linear(3, 2).double()
        with torch.no_grad():
            network.weight.copy_(torch.linspace(-1, 1, 6).view(2, 3))
            network.bias.zero_()
        return network


# -- the loop in plain torch


def plain_windows(run: Combination) -> list[list[int]]:
    """Return the batches of each step of the run."""
    windows: list[list[int]] = [[]]
    for epoch in range(run.epochs):
        for batch in range(len(run.sizes)):
            windows[-1].append(batch)
            last = batch == len(run.sizes) - 1
            if run.carry:
                closes = len(windows[-1]) == run.window or (last and epoch == run.epochs - 1)
            else:
                closes = (batch + 1) % run.window == 0 or last
            if closes:
                windows.append([])
    return windows[: run.max_steps] if run.max_steps is not None and run.max_steps < len(windows) else windows[:-1]


def plain_factor(curve: str, step: int, total: int) -> float:
    """Return a curve's factor at a step of a run of so many."""
    if curve == "line":
        return 1 - step / total
    if curve == "cosine":
        warmup = math.floor(0.2 * total + 0.5)
        return step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    warmup, decay = math.floor(0.1 * total + 0.5), math.floor(0.5 * total + 0.5)
    if step < warmup:
        return step / warmup
    past = step - (total - decay)
    return 1 - math.sqrt(past / decay) if past > 0 else 1.0


def plain_loop(run: Combination) -> dict[str, Any]:
    """Train; return the weights, their averages and the rates of each step."""
    network, batches, windows = run.network(), run.batches(), plain_windows(run)
    groups = [{"params": [network.weight]}, {"params": [network.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    total, rates, weights = len(windows), [], [run.network().state_dict()]
    for step, window in enumerate(windows):
        for group, curve in zip(optimizer.param_groups, run.curves, strict=True):
            group["lr"] = LR * plain_factor(curve, step, total)
        if run.decay:
            optimizer.param_groups[0]["weight_decay"] = DECAY * (1 + (1 - math.cos(math.pi * step / total)) / 2)
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        samples = sum(run.sizes[batch] for batch in window)
        optimizer.zero_grad()
        for batch in window:
            weight = run.sizes[batch] / samples if run.exact else 1 / run.window
            (mse_loss(network(batches[batch][0]), batches[batch][1]) * weight).backward()
        if run.clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), run.clip)
        optimizer.step()
        weights.append(copy.deepcopy(network.state_dict()))
    return {
        "raw": weights[-1],
        "average": plain_average(run, weights),
        "latest": plain_latest(run, weights),
        "rates": rates,
    }


def plain_average(run: Combination, weights: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
    """Return the exponential average of the weights after 0, 1, 2, ... steps, or ``None`` before its first update."""
    decay, every, start = run.average
    if len(weights) - 1 < (start or every):
        return None
    average = weights[start]
    for done in range(start + every, len(weights), every):
        kept = 1.0
        for n in range(done - start - every + 1, done - start + 1):
            kept *= min(decay, (1 + n) / (10 + n)) if run.ramp else decay
        average = {name: kept * average[name] + (1 - kept) * weights[done][name] for name in average}
    return average


def plain_latest(run: Combination, weights: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
    """Return the mean of the latest snapshots, or ``None`` where there is none."""
    last, every = run.latest or (1, len(weights))
    found = weights[every::every][-last:]
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]} if found else None


# -- the same with callbacks


class Module(pl.LightningModule):
    """The network, its loss and its optimizer."""

    def __init__(self, run: Combination) -> None:
        super().__init__()
        self.network = run.network()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return mse_loss(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.network(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [self.network.weight], "name": "weight"},
            {"params": [self.network.bias], "name": "bias", "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


class Die(pl.Callback):
    """Ends a run with an error when an epoch begins."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise InterruptedError


def schedule(curve: str) -> lp.Schedule:
    if curve == "cosine":
        return lp.WarmupCosine("20%")
    return lp.Linear(None, 1, 0) if curve == "line" else lp.WarmupStableDecay("10%", "50%")


def callbacks(run: Combination) -> list[Any]:
    decay, every, start = run.average
    weight, bias = map(schedule, run.curves)
    kinds = [
        lp.LearningRateScheduler(weight if weight == bias else {"weight": weight, "bias": bias}, record=True),
        lp.EMA(
            lp.WarmupDecay(decay) if run.ramp else lp.ConstantDecay(decay), update_every_n_steps=every, start_step=start
        ),
    ]
    if run.exact:
        kinds.append(lp.GradientAccumulation(run.window, carry=run.carry))
    if run.decay:
        kinds.append(lp.LearningRateScheduler(lp.Cosine(None, 1, 2), parameter="weight_decay"))
    if run.latest is not None:
        options = {"evaluate": "raw", "checkpoint": "raw", "after_fit": "raw"}
        kinds.append(lp.LatestWeightAveraging(run.latest[0], every=run.latest[1], **options))
    if run.pieces is not None:
        kinds.append(lp.MicroBatching(run.pieces))
    random.Random(run.shuffled).shuffle(kinds)
    return kinds


def with_callbacks(run: Combination, folder: Path) -> dict[str, Any]:
    """Train, with a death and a resume if there is one; return what :func:`plain_loop` does, rates since the resume."""
    if run.dies_in is not None:
        saving = pl.callbacks.ModelCheckpoint(folder, save_top_k=1, save_last=False)
        try:
            return _fit(run, [saving, Die(run.dies_in)])
        except InterruptedError:
            # an epoch that took no step, whose window goes on, leaves no file
            return _fit(run, [], ckpt_path=max(folder.glob("*.ckpt"), default=None))
        finally:
            for path in folder.glob("*.ckpt"):
                path.unlink()
    return _fit(run, [])


def _fit(run: Combination, more: list[Any], ckpt_path: Path | None = None) -> dict[str, Any]:
    module, ours = Module(run), callbacks(run)
    trainer = pl.Trainer(
        max_epochs=run.epochs,
        max_steps=-1 if run.max_steps is None else run.max_steps,
        accumulate_grad_batches=1 if run.exact else run.window,
        gradient_clip_val=run.clip,
        callbacks=[*ours, *more],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=any(isinstance(one, pl.callbacks.ModelCheckpoint) for one in more),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    batches = run.batches()
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(
        module, loader, DataLoader(batches[:1], batch_size=None) if run.validates else None, ckpt_path=ckpt_path
    )
    average = next(one for one in ours if isinstance(one, lp.EMA))
    latest = next((one for one in ours if isinstance(one, lp.LatestWeightAveraging)), None)
    rates = next(one for one in ours if isinstance(one, lp.LearningRateScheduler) and one.record)
    steps, (_, every, start) = trainer.global_step, run.average
    began, has_latest = steps >= (start or every), run.latest is not None and steps >= run.latest[1]
    return {
        "raw": _plain(average.raw_state_dict() if began else module.state_dict()),
        "average": _plain(average.average_state_dict()) if began else None,
        "latest": _plain(latest.average_state_dict()) if has_latest else None,
        "rates": rates.lrs,
    }


def _plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


def kind_of(run: Combination) -> str:
    """Return the sort under which a run is counted."""
    return "resumed" if run.dies_in is not None else "uninterrupted"
