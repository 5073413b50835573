"""What a schedule costs: one value, one scheduler step, one Trainer step, one import."""

import subprocess
import sys
import tempfile
import time

import lightning.pytorch as pl
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

from benchmarks.harness import absentees, interleaved, quiet, report, table, why_absent
from lightning_plugins import LearningRateScheduler, ScheduleLR, WarmupCosine

WARMUP, TOTAL = 500, 10_000
MODULES = {"transformers": "transformers", "timm": "timm.scheduler"}


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def torch_pair(target):
    parts = [LinearLR(target, 1e-3, total_iters=WARMUP), CosineAnnealingLR(target, TOTAL - WARMUP)]
    return SequentialLR(target, parts, [WARMUP])


def peers():
    """Return the value functions and the schedulers of the peers that are installed."""
    values, schedulers = {}, {"torch SequentialLR(LinearLR, CosineAnnealingLR)": torch_pair}
    if why_absent(MODULES["transformers"]) is None:
        from transformers import get_cosine_schedule_with_warmup

        values["transformers' lambda"] = get_cosine_schedule_with_warmup(optimizer(), WARMUP, TOTAL).lr_lambdas[0]
        schedulers["transformers LambdaLR"] = lambda target: get_cosine_schedule_with_warmup(target, WARMUP, TOTAL)
    if why_absent(MODULES["timm"]) is None:
        from timm.scheduler import CosineLRScheduler

        timm = CosineLRScheduler(optimizer(), TOTAL, warmup_t=WARMUP, warmup_prefix=True, t_in_epochs=False)
        values["timm's values"] = timm._get_values
    return values, schedulers


class Nothing:
    """A scheduler that does nothing: what the loop itself costs."""

    def step(self):
        pass


def evaluate(function):
    return lambda: [function(step) for step in range(0, TOTAL, 5)]


def run_steps(build, steps):
    def run():
        target = optimizer()
        scheduler = build(target)
        for _ in range(steps):
            target.step()
            scheduler.step()

    return run


def trainer_run(steps, callbacks=(), scheduler=None):
    """Return a function that fits a tiny module; the loop's own cost is in every candidate."""

    class Tiny(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).pow(2).mean()

        def configure_optimizers(self):
            target = torch.optim.SGD(self.parameters(), lr=0.1)
            return target if scheduler is None else {"optimizer": target, "lr_scheduler": scheduler(target)}

    data = torch.utils.data.DataLoader(torch.randn(4 * steps, 8), batch_size=4)

    def fit():
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            enable_model_summary=False,
            default_root_dir=tempfile.gettempdir(),
            callbacks=[make() for make in callbacks],
            **quiet,
        )
        trainer.fit(Tiny(), data)

    return fit


def stock(target):
    return {"scheduler": LambdaLR(target, WarmupCosine(WARMUP, total=TOTAL)), "interval": "step"}


def importing(code):
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def imports():
    """Return what an import takes, in processes of its own."""
    return interleaved(
        {
            "import torch": importing("import torch"),
            "import lightning_plugins.schedules": importing("import lightning_plugins.schedules"),
            "both": importing("import torch, lightning_plugins.schedules"),
        },
        rounds=9,
        clock=time.perf_counter,
    )


def main(*, quick=False):
    torch.set_num_threads(1)
    quiet()
    values, schedulers = peers()
    schedule = WarmupCosine(WARMUP, total=TOTAL)
    steps, fit_steps = (20, 8) if quick else (2000, 600)
    data = {
        "value": interleaved(
            {"WarmupCosine": evaluate(schedule), **{name: evaluate(f) for name, f in values.items()}},
            rounds=2 if quick else 41,
        ),
        "scheduler": interleaved(
            {
                "optimizer alone": run_steps(lambda _: Nothing(), steps),
                "ScheduleLR": run_steps(lambda target: ScheduleLR(target, schedule), steps),
                **{name: run_steps(build, steps) for name, build in schedulers.items()},
            },
            rounds=2 if quick else 15,
        ),
        "trainer": interleaved(
            {
                "bare Trainer": trainer_run(fit_steps),
                "an empty callback": trainer_run(fit_steps, [pl.Callback]),
                "LearningRateScheduler": trainer_run(fit_steps, [lambda: LearningRateScheduler(schedule)]),
                "LambdaLR of the module": trainer_run(fit_steps, scheduler=stock),
            },
            rounds=2 if quick else 15,
        ),
    }
    tables = [
        table("One value", data["value"], base="WarmupCosine", per=TOTAL // 5),
        table("optimizer.step() and scheduler.step()", data["scheduler"], base="ScheduleLR", per=steps),
        table("One Trainer step", data["trainer"], base="bare Trainer", per=fit_steps),
        *absentees(MODULES),
    ]
    if not quick:
        data["import"] = imports()
        tables.insert(3, table("Import, in a fresh process", data["import"], base="import torch", unit="ms"))
    report("schedules", tables, data, keep=not quick)


if __name__ == "__main__":
    main()
