"""Every name of Lightning, torch and torchmetrics that is private or replaced here, with the reason.

A release that renames one of them is noticed in two places: the tests look each name up in what is installed, and every
callback looks up those of its own technique at setup. A missing name is one clear error and never a wrong result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_plugins.core.patching import read


@dataclass(frozen=True)
class ForeignName:
    """One attribute of another library that the package relies on.

    Args:
        owner: Where it is found: a path that begins at ``trainer``, or the import path of a class or module, with
            ``()`` behind it for what ``__init__`` gives an instance.
        name: The attribute.
        used_by: The techniques (folder names) that need it, ``core`` for all.
        reason: What for, and why nothing public serves.
    """

    owner: str
    name: str
    used_by: tuple[str, ...]
    reason: str


FOREIGN_NAMES: tuple[ForeignName, ...] = (
    # core
    ForeignName(
        "trainer.profiler", "profile", ("core",), "a Trainer without a profiler enters an empty context cheaply"
    ),
    ForeignName("trainer.fit_loop", "run", ("core",), "a fit with nothing left to train calls no hook"),
    ForeignName("torchmetrics.MeanMetric()", "_update_count", ("core",), "how many updates a copied metric holds"),
    ForeignName("torchmetrics.MeanMetric()", "_computed", ("core",), "the value that was computed from its states"),
    ForeignName("torchmetrics.MeanMetric()", "_forward_cache", ("core",), "the value of the last batch"),
    ForeignName("torchmetrics.MeanMetric()", "_cache", ("core",), "a metric's own states while it is synced"),
    ForeignName("torchmetrics.MeanMetric()", "_is_synced", ("core",), "whether it is"),
    # events
    *(
        ForeignName(owner, name, ("events",), reason)
        for owner, name, reason in (
            ("trainer.fit_loop", "_can_stop_early", "whether a stop that was asked for ends the training"),
            ("trainer.fit_loop", "min_epochs", "CancelFit ends the fit although it asks for more"),
            ("trainer.fit_loop.epoch_loop", "min_steps", "CancelFit ends the fit although it asks for more"),
            ("trainer.fit_loop.epoch_loop", "_is_training_done", "whether the batch at hand is the epoch's last"),
            ("trainer.fit_loop.epoch_loop", "_num_ready_batches_reached", "whether an epoch ends without a cancel"),
            ("trainer.fit_loop.epoch_loop", "_should_accumulate", "a batch that is left out takes no step"),
            ("trainer.fit_loop.epoch_loop", "_should_check_val_epoch", "whether the epoch has a validation"),
            ("trainer.fit_loop.epoch_loop", "_should_check_val_fx", "a cancelled training is validated, an epoch not"),
            ("trainer.fit_loop.epoch_loop", "update_lr_schedulers", "an epoch that was left has its scheduler step"),
            ("trainer.fit_loop.epoch_loop.automatic_optimization", "run", "a cancelled batch has no training step"),
            ("trainer.fit_loop.epoch_loop.automatic_optimization", "_make_zero_grad_fn", "its window begins anyway"),
            ("trainer.fit_loop.epoch_loop.automatic_optimization", "_optimizer_step", "its step is still attempted"),
            ("trainer.fit_loop.epoch_loop.manual_optimization", "run", "a cancelled batch has no training step"),
            ("trainer.fit_loop.epoch_loop.val_loop", "_has_run", "a validation that was left counts as one that ran"),
            ("trainer.strategy", "training_step", "the loss is known before the update"),
            ("trainer.strategy", "validation_step", "a validation batch that is cancelled ends within its step"),
            ("torch.distributed.fsdp.FSDPModule", "_get_fsdp_state", "its gradients of an open window are dropped"),
        )
    ),
    # accumulation
    *(
        ForeignName(owner, name, ("accumulation",), reason)
        for owner, name, reason in (
            ("trainer.fit_loop", "setup_data", "an effective batch size needs the loader in `configure_optimizers`"),
            ("trainer.fit_loop", "_skip_backward", "an epoch that only refreshes statistics (SWA) has no windows"),
            ("trainer.fit_loop.epoch_loop", "_should_accumulate", "a carried window does not end with an epoch"),
            ("trainer.fit_loop.epoch_loop", "_num_ready_batches_reached", "the last window ends with the run"),
            ("trainer.fit_loop.epoch_loop.automatic_optimization", "_make_zero_grad_fn", "nor does it begin with one"),
            ("trainer.fit_loop.epoch_loop.batch_progress.total", "started", "batches that have a place in a window"),
        )
    ),
    # microbatching
    *(
        ForeignName(owner, name, ("microbatching",), reason)
        for owner, name, reason in (
            ("trainer.fit_loop.epoch_loop.automatic_optimization", "_make_closure", "a batch that runs in pieces"),
            ("trainer.fit_loop.epoch_loop.automatic_optimization", "_make_zero_grad_fn", "zeroes once for all pieces"),
            ("trainer.fit_loop.epoch_loop.automatic_optimization", "_make_backward_fn", "the backward of a piece"),
            ("trainer.fit_loop.epoch_loop.automatic_optimization", "_training_step", "the forward of a piece"),
            (
                "trainer.fit_loop.epoch_loop.automatic_optimization",
                "output_result_cls",
                "the result of the whole batch",
            ),
            ("trainer.fit_loop.epoch_loop", "_results", "what is logged"),
            ("trainer.fit_loop.epoch_loop._results", "update_metrics", "what a piece logs is collected"),
            ("torchmetrics.MeanMetric()", "_to_sync", "a value of one rank's batch, without the other ranks"),
            ("torch.nn.modules.batchnorm", "_BatchNorm", "every batch normalization, to warn of its pieces"),
        )
    ),
)


def check_names(trainer: Any, technique: str) -> None:
    """Look up the names that a technique needs of a Trainer.

    Args:
        trainer: The Trainer, at setup.
        technique: The folder's name.

    Raises:
        MissingNameError: If one is missing.
    """
    for entry in FOREIGN_NAMES:
        root, *path = entry.owner.split(".")
        if root == "trainer" and ("core" in entry.used_by or technique in entry.used_by):
            owner = trainer
            for part in path:
                owner = read(owner, part)
            read(owner, entry.name)
