"""Averages under DeepSpeed on CPU processes: what tests/deepspeed/test_zero_average.py runs on every rank."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_plugins import (
    EMA,
    ConstantDecay,
    LatestWeightAveraging,
    PostHocEMA,
    PowerDecay,
    extract_weights,
    synthesize_ema,
)
from lightning_plugins.core.zero import held_part, zero_of
from lightning_plugins.ema.zero_files import files_of
from tests.deepspeed.references import recursion
from tests.deepspeed.zero_runs import RANK, STAGES, Net, even_loader, masters, same, trainer

DECAY = 0.8


class Trajectory(Callback):
    """Keeps the master weights as the training begins and after every step, in full."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self._keep(trainer)

    def on_train_batch_end(self, trainer, *_):
        self._keep(trainer)

    def _keep(self, trainer):
        self.seen.append({name: value.clone() for name, value in masters(trainer).items()})

    @property
    def applied(self):
        """Those after steps that changed something."""
        pairs = zip(self.seen, self.seen[1:], strict=False)
        return [self.seen[0], *(now for before, now in pairs if not same(before, now))]


def computing(fit):
    """Return what this rank has of the weights that compute."""
    return {name: held_part(value)[1].clone() for name, value in fit.lightning_module.named_parameters()}


class Evaluated(Callback):
    """Keeps what the first validation saw, and what this rank held before, in and after it."""

    def __init__(self, directory):
        self.directory = directory
        self.held = {}

    def on_train_batch_end(self, trainer, *_):
        if "after" not in self.held:
            self._hold("before", trainer)

    def on_validation_start(self, trainer, pl_module):
        if "after" not in self.held:
            self._hold("in", trainer)
            self.average = {name: value.clone() for name, value in masters(trainer).items()}
        trainer.save_checkpoint(self.directory)
        if "after" not in self.held:
            self._hold("in again", trainer)

    def on_validation_end(self, trainer, pl_module):
        if "after" not in self.held:
            self._hold("after", trainer)

    def _hold(self, when, trainer):
        parts = zero_of(trainer).masters(trainer.lightning_module)
        self.held[when] = [*computing(trainer).values(), *(part.values.clone() for part in parts)]

    def equal(self, first, second):
        """Whether the rank held the same then, bit for bit."""
        return all(map(torch.equal, self.held[first], self.held[second]))


class Collectives(TorchDispatchMode):
    """Counts the collectives of torch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("c10d"):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def averages(directory):
    """Fit with an average at every stage and precision, save, resume, evaluate, export; return what holds."""
    cases = [(stage, precision) for stage in STAGES for precision in ("bf16-true", "32-true")]
    folder = Path(directory)
    return {f"{stage} {kind}": average(stage, kind, folder / f"{stage}-{kind}") for stage, kind in cases}


def average(stage, precision, directory):
    found = {}
    data, valid = even_loader(number=24, seed=RANK), even_loader(number=8, seed=9)
    ema, way, seen = EMA(ConstantDecay(DECAY)), Trajectory(), Evaluated(str(directory / "evaluating"))
    files = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)
    latest, power = latest_snapshots(), PostHocEMA((0.1,), every_n_steps=4, dirpath=directory / "whole")
    fit = trainer(stage, power, ema, latest, way, seen, files, precision=precision, max_epochs=2)
    module = Net()
    fit.fit(module, data, valid)
    mean = latest.average_state_dict()
    taken = [way.seen[step] for step in (4, 8, 12)]
    found["latest error"] = max(
        float((mean[name].double() - sum(one[name].double() for one in taken) / 3).abs().max()) for name in taken[0]
    )
    meet()
    rule, snapshot = PowerDecay(0.1), synthesize_ema(directory / "whole", 0.1)
    expected = recursion(way.seen, [rule(n) for n in range(1, len(way.seen))])
    found["power error"] = max(float((snapshot[name] - value).abs().max()) for name, value in expected.items())
    found["power complete"] = sorted(snapshot) == sorted(module.state_dict())
    after = ema.average_state_dict()
    raw = ema.raw_state_dict()
    expected = recursion(way.seen, [DECAY] * (len(way.seen) - 1))
    found["steps"] = [len(way.seen) - 1, fit.global_step]
    found["error"] = max(float((after[name].double() - value).abs().max()) for name, value in expected.items())
    found["raw"] = same({name: raw[name] for name in way.seen[-1]}, way.seen[-1])
    found["moved"] = max(float((after[name] - raw[name]).abs().max()) for name in expected)
    found["complete"] = sorted(after) == sorted(module.state_dict())
    found["restored"] = seen.equal("before", "after")
    found["exchanged"] = not seen.equal("before", "in") and seen.equal("in", "in again")
    first = recursion(way.seen[:7], [DECAY] * 6)
    found["shown"] = max(float((seen.average[name].double() - value).abs().max()) for name, value in first.items())
    # files
    fit.save_checkpoint(directory / "after")
    epochs = [directory / f"epoch={epoch}.ckpt" for epoch in range(2)]
    found["extracted"] = same(extract_weights(epochs[1]), after) and same(extract_weights(epochs[1], name="lawa"), mean)
    found["after"] = same(extract_weights(directory / "after"), after)
    masters_in = extract_weights(directory / "after", "raw", trust=True)
    found["after raw"] = max(float((masters_in[name] - value).abs().max()) for name, value in way.seen[-1].items())
    masters_in = extract_weights(directory / "evaluating", "raw", trust=True)
    found["evaluating raw"] = max(float((masters_in[name] - value).abs().max()) for name, value in way.seen[-1].items())
    found["evaluating"] = same(extract_weights(directory / "evaluating"), after)
    # resume
    again, later, latest = EMA(ConstantDecay(DECAY)), Trajectory(), latest_snapshots()
    power = PostHocEMA((0.1,), every_n_steps=4, dirpath=directory / "resumed")
    fit = trainer(stage, again, latest, power, later, precision=precision, max_epochs=2)
    module = Net()
    fit.fit(module, data, valid, ckpt_path=str(epochs[0]))
    found["resumed"] = same(again.average_state_dict(), after)
    meet()
    found["resumed power"] = all(
        snapshots_equal(directory / "whole" / name, directory / "resumed" / name)
        for name in ("step=0000000008.pt", "step=0000000012.pt")
    )
    found["resumed latest"] = same(latest.average_state_dict(), mean)
    found["resumed raw"] = same(later.seen[-1], way.seen[-1])
    # evaluated again, and from the directory; at stage 3 DeepSpeed cannot load one without an optimizer
    kind = module.shift.dtype
    if stage < 3:
        alone = trainer(stage, EMA(ConstantDecay(DECAY)), precision=precision)
        other = Net()
        alone.validate(other, valid, ckpt_path=str(epochs[1]), verbose=False)
        held = computing(alone)
        found["evaluated"] = all(
            torch.equal(held[name].view_as(value), value.to(kind)) for name, value in after.items() if name in held
        )
    last, module.seen = module.seen, None
    fit.validate(module, valid, verbose=False)
    found["evaluated again"] = torch.equal(module.seen, last)
    # what a kill leaves
    meet()
    if RANK == 0:
        for path in files_of(epochs[1])["ema"]:
            shutil.copy(path, epochs[0] / "lightning_plugins_ema" / path.name)
        files_of(epochs[1])["ema"][1].unlink()
    meet()
    found["cut off"] = [told(extract_weights, path) for path in epochs]
    found["not resumed"] = [
        told(trainer(stage, EMA(ConstantDecay(DECAY)), precision=precision).fit, Net(), data, ckpt_path=str(path))
        for path in epochs
    ]
    meet()
    return found


def latest_snapshots():
    """Beside the EMA, which evaluates."""
    return LatestWeightAveraging(3, every=4, evaluate="raw", checkpoint="raw", after_fit="raw")


def snapshots_equal(first, second):
    (one,), (other,) = (torch.load(path, weights_only=True)["averages"] for path in (first, second))
    return same(one, other)


def meet():
    torch.distributed.barrier()


def told(function, *args, **kwargs):
    """Return what the error says."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(*args, **kwargs)
    return f"{type(caught.value).__name__}: {caught.value}"


def beside(directory):
    """Two averages, one of a name that no file has; a run in half precision whose first steps overflow; collectives."""
    found = {}
    data = even_loader(number=24, seed=RANK)
    for stage in STAGES:
        folder = Path(directory) / f"beside-{stage}"
        ema, way = EMA(ConstantDecay(DECAY)), Trajectory()
        other = EMA(
            ConstantDecay(0.5), name="slow/2 %", evaluate="raw", checkpoint="raw", after_fit="raw", start_step=2
        )
        strategy = {"exclude_frozen_parameters": True, "initial_scale_power": 19, "hysteresis": 1}
        counted = Counted(ema)
        fit = trainer(stage, ema, other, way, counted, precision="16-true", strategy=strategy, max_epochs=2)
        module = Net()
        fit.fit(module, data, even_loader(number=8, seed=9))
        fit.save_checkpoint(folder)
        engine = fit.strategy.deepspeed_engine
        expected = recursion(way.applied, [DECAY] * (len(way.applied) - 1))
        after = ema.average_state_dict()
        written = extract_weights(folder)
        slow = extract_weights(folder, name="slow/2 %")
        found[str(stage)] = {
            "steps": [
                engine.global_steps,
                engine.skipped_steps,
                len(way.applied) - 1,
                ema.get_state()["applied_steps"],
            ],
            "error": max(float((after[name].double() - value).abs().max()) for name, value in expected.items()),
            "frozen": sorted(after.keys() - written.keys()),
            "written": all(torch.equal(after[name], value) for name, value in written.items()),
            "slow": all(torch.equal(value, other.average_state_dict()[name]) for name, value in slow.items()),
            "differs": any(not torch.equal(value, written[name]) for name, value in slow.items()),
            "collectives": {what: len(names) for what, names in counted.names.items()},
            "unknown": told(extract_weights, folder, name="none"),
            "untrusted": told(extract_weights, folder, "raw"),
        }
    return found


class Counted(Callback):
    """Notes the collectives of every update of an average, and of every exchange."""

    def __init__(self, ema):
        self.ema = ema
        self.names = {"update": [], "exchange": []}

    def on_train_start(self, trainer, pl_module):
        shadow = self.ema._shadows[0]
        self.count(shadow, "update")
        self.count(shadow, "_swap", "exchange")

    def count(self, shadow, method, name=None):
        original = getattr(shadow, method)

        def counted(*args, **kwargs):
            with Collectives() as found:
                original(*args, **kwargs)
            self.names[name or method] += found.names

        setattr(shadow, method, counted)
