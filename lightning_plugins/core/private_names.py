"""Every name of Lightning, torch and torchmetrics that is private or replaced here, with the reason.

A release that renames one of them is noticed in two places: the tests look each name up in what is installed, and every
callback looks up those of its own technique at setup. A missing name is one clear error and never a wrong result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_plugins.core.patching import check_exists, read


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


def _of(technique: str, *rows: tuple[str, str, str]) -> tuple[ForeignName, ...]:
    """Return the entries of a technique: (owner, its attributes, what for)."""
    return tuple(
        ForeignName(owner, name, (technique,), reason) for owner, names, reason in rows for name in names.split()
    )


_FIT, _EPOCH = "trainer.fit_loop", "trainer.fit_loop.epoch_loop"
_AUTOMATIC, _MANUAL = f"{_EPOCH}.automatic_optimization", f"{_EPOCH}.manual_optimization"
_VALIDATION = f"{_EPOCH}.val_loop"
_ZERO = "deepspeed.runtime.zero"

FOREIGN_NAMES: tuple[ForeignName, ...] = (
    *_of(
        "core",
        ("trainer", "callbacks", "ours are put in order"),
        ("trainer.profiler", "profile", "a Trainer without a profiler enters an empty context cheaply"),
        (_FIT, "run", "a fit with nothing left to train calls no hook"),
        (_EPOCH, "advance", "a callback that was taken out of the Trainer ends before the next batch"),
        (_VALIDATION, "run", "or before the next validation"),
        ("trainer.strategy", "teardown", "or with the run"),
        (
            "torch.nn.Module()",
            "_parameters _buffers _non_persistent_buffers_set",
            "tensors by their owner, with no copy",
        ),
        ("torch.Tensor", "grad", "gradients are kept, put back and dropped"),
        ("lightning.pytorch.utilities.compile", "_orig_mod", "the module that was compiled, under its own names"),
        ("torch.optim.Optimizer", "step", "the steps of an optimizer that fires no hooks"),
        ("torchmetrics.MeanMetric()", "_update_count", "how many updates a copied metric holds"),
        ("torchmetrics.MeanMetric()", "_computed", "the value that was computed from its states"),
        ("torchmetrics.MeanMetric()", "_forward_cache", "the value of the last batch"),
        ("torchmetrics.MeanMetric()", "_cache _is_synced", "a metric's own states while it is synced"),
        (
            "trainer.strategy",
            "save_checkpoint load_checkpoint",
            "what lies beside a distributed checkpoint is written before it, and one that was cut off is refused",
        ),
        ("torch.distributed.checkpoint", "save", "every rank marks what it writes into a distributed checkpoint"),
        ("lightning.pytorch.strategies.ModelParallelStrategy", "_device_mesh", "ranks that see different data"),
        (
            "deepspeed.runtime.engine.DeepSpeedEngine",
            "optimizer global_steps skipped_steps gradient_accumulation_steps",
            "the steps that DeepSpeed counts and skips, and what it divides losses by",
        ),
        (
            "deepspeed.runtime.engine.DeepSpeedEngine",
            "is_gradient_accumulation_boundary set_gradient_accumulation_boundary",
            "its windows are Lightning's",
        ),
        (f"{_ZERO}.stage_1_and_2.DeepSpeedZeroOptimizer", "cpu_offload", "where gradients are"),
        (f"{_ZERO}.stage_1_and_2.DeepSpeedZeroOptimizer", "averaged_gradients", "this rank's part of the gradients"),
        (f"{_ZERO}.stage_1_and_2.DeepSpeedZeroOptimizer", "update_lp_params", "weights out of their masters"),
        (
            f"{_ZERO}.stage3.DeepSpeedZeroOptimizer_Stage3",
            "averaged_gradients offload_optimizer",
            "this rank's part of the gradients, and where they are",
        ),
        (
            f"{_ZERO}.stage3.DeepSpeedZeroOptimizer_Stage3",
            "grad_position get_param_id fp32_partitioned_groups_flat",
            "where the master weights of a parameter are",
        ),
        (
            f"{_ZERO}.stage3.DeepSpeedZeroOptimizer_Stage3",
            "fp16_groups _partition_all_parameters _reassign_or_swap_out_partitioned_parameters",
            "weights out of their masters, as after a step; there is no public call for all",
        ),
        (
            f"{_ZERO}.stage3.DeepSpeedZeroOptimizer_Stage3",
            "persistent_parameters invalidate_secondary_tensor",
            "the rest of that",
        ),
        (
            f"{_ZERO}.partition_parameters",
            "ds_id ds_shape ds_numel ds_tensor ds_process_group partition_numel",
            "this rank's part of a parameter",
        ),
        ("deepspeed.utils.mixed_precision_linkage", "_hp_mapping", "the master weights of a parameter"),
        ("deepspeed.utils.tensor_fragment", "lp_fragment_address hp_fragment", "they, and their place in it"),
        ("torch.distributed.fsdp.FullyShardedDataParallel", "_handle", "what FSDP1 has joined, by no tensor shown"),
        (
            "torch.distributed.fsdp._flat_param.FlatParamHandle",
            "_params _shapes _shard_param_infos uses_sharded_strategy",
            "which elements of a parameter lie on this rank, and its own shape",
        ),
        (
            "torch.distributed.fsdp._flat_param.FlatParamHandle",
            "_unpadded_unsharded_size _saved_grad_shard",
            "the gradients of an open window, of which some are whole and some in shards",
        ),
        (
            "torch.distributed.fsdp._flat_param.FlatParamHandle",
            "_local_shard reshard post_reshard",
            "what a forward without gradients leaves gathered is freed before the weights are exchanged",
        ),
    ),
    *_of(
        "accumulation",
        ("trainer", "accumulate_grad_batches", "Lightning steps after so many batches"),
        (_FIT, "setup_data", "an effective batch size needs the loader in `configure_optimizers`"),
        (_FIT, "_skip_backward", "an epoch that only refreshes statistics (SWA) has no windows"),
        (_EPOCH, "_should_accumulate", "a carried window does not end with an epoch"),
        (_EPOCH, "_num_ready_batches_reached", "the last window ends with the run"),
        (_AUTOMATIC, "_make_zero_grad_fn", "nor does it begin with one"),
        (_AUTOMATIC, "_optimizer_step", "every way of stepping runs the closure that it is given"),
        ("torch.Tensor", "_version", "whether a gradient was zeroed"),
        (f"{_EPOCH}.batch_progress.total", "started", "batches that have a place in a window"),
        ("torch", "_foreach_mul_", "one kernel scales all gradients"),
    ),
    *_of(
        "checkpoints",
        ("trainer", "loggers validating", "a validation of its own is logged nowhere"),
        ("trainer.state", "stage", "the stage before a validation of its own is put back"),
        ("trainer", "_logger_connector", "the validation's values, and those of the run kept apart"),
        (
            "trainer._logger_connector",
            "_callback_metrics _logged_metrics _progress_bar_metrics",
            "the validation's values, and those of the run kept apart",
        ),
        ("trainer._logger_connector", "update_eval_epoch_metrics", "each rank's sums, before the loop empties them"),
        ("trainer.strategy", "save_checkpoint", "every file that the run writes is noted, and gets the run's name"),
        (
            "lightning.pytorch.loops.training_epoch_loop",
            "_last_val_time",
            "a validation of its own does not count as the run's",
        ),
        (_FIT, "_combined_loader", "the training data, for the statistics of batch normalization"),
        (_VALIDATION, "batch_progress _restarting", "a validation of its own begins at its first batch"),
        (_VALIDATION, "_results", "its sums are its own"),
        (
            "lightning.pytorch.trainer.connectors.logger_connector.result",
            "_forked_name valid_items cumulated_batch_size",
            "each rank's sums, by the names that they are logged under",
        ),
        ("lightning.pytorch.LightningModule", "log log_dict", "`self.log` does nothing outside its loop"),
        ("lightning.pytorch.LightningModule", "validation_step", "the losses that it returns are the score"),
        ("lightning.pytorch.LightningModule", "_on_before_batch_transfer", "the module's hooks of a batch"),
        ("torch.nn.BatchNorm1d()", "momentum training", "statistics as a plain mean over batches"),
        ("torch.nn.Module", "_metadata", "the versions of layers in a state dict"),
        ("torch.TypedStorage", "_pickle_storage_type", "the name of a storage's type in a file"),
        ("zipfile.ZipFile", "fp", "a file that failed gets no directory at its end"),
        ("zipfile.ZipInfo", "extra", "tensors begin at multiples of 64 bytes"),
    ),
    *_of(
        "cli",
        ("argparse", "_SubParsersAction", "the type of what `add_subparsers` returns"),
    ),
    *_of(
        "ema",
        (
            "torch",
            "_foreach_add_ _foreach_copy_ _foreach_div_ _foreach_lerp_",
            "one kernel updates all tensors",
        ),
        ("torch.Tensor", "_version", "whether a tensor was written to since"),
        ("torch.nn.Module()", "_modules", "whether a part that has averaged tensors was exchanged"),
        (
            "trainer.strategy",
            "lightning_module_state_dict save_checkpoint load_checkpoint load_model_state_dict",
            "what files hold, and which are loaded, in mid-fit too; no callback is asked for either",
        ),
        ("trainer.strategy", "teardown", "after it no file of the run is written any more"),
    ),
    *_of(
        "events",
        ("trainer", "should_stop", "CancelFit ends the fit after this epoch"),
        (_FIT, "_can_stop_early", "whether a stop that was asked for ends the training"),
        (_FIT, "min_epochs", "CancelFit ends the fit although it asks for more"),
        (_EPOCH, "min_steps", "CancelFit ends the fit although it asks for more"),
        (_EPOCH, "_is_training_done", "whether the batch at hand is the epoch's last"),
        (_EPOCH, "_num_ready_batches_reached", "whether an epoch ends without a cancel"),
        (_EPOCH, "_should_accumulate", "a batch that is left out takes no step"),
        (_EPOCH, "_should_check_val_epoch", "whether the epoch has a validation"),
        (_EPOCH, "_should_check_val_fx", "a cancelled training is validated, an epoch not"),
        (_EPOCH, "update_lr_schedulers", "an epoch that was left has its scheduler step"),
        (f"{_EPOCH}.batch_progress", "is_last_batch", "the batch at hand becomes the epoch's last"),
        (_AUTOMATIC, "run", "a cancelled batch has no training step"),
        (_AUTOMATIC, "_make_zero_grad_fn", "its window begins anyway"),
        (_AUTOMATIC, "_optimizer_step", "its step is still attempted"),
        (_MANUAL, "run", "a cancelled batch has no training step"),
        (_VALIDATION, "_has_run", "a validation that was left counts as one that ran"),
        (f"{_VALIDATION}.batch_progress", "is_last_batch", "the batch at hand becomes the validation's last"),
        ("trainer.strategy", "training_step", "the loss is known before the update"),
        ("trainer.strategy", "validation_step", "a validation batch that is cancelled ends within its step"),
        ("torch.distributed.fsdp.FSDPModule", "_get_fsdp_state", "gradients of an open window are dropped"),
        ("torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState", "_fsdp_param_groups", "those of a module"),
        (
            "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState",
            "_fsdp_param_group",
            "the one, in older versions",
        ),
        (
            "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam",
            "unsharded_accumulated_grad _unsharded_param",
            "those that are kept outside of the parameters",
        ),
    ),
    *_of(
        "microbatching",
        (_AUTOMATIC, "_make_closure", "a batch that runs in pieces"),
        (_AUTOMATIC, "_make_zero_grad_fn", "zeroes once for all pieces"),
        (_AUTOMATIC, "_make_backward_fn", "the backward of a piece"),
        (_AUTOMATIC, "_training_step", "the forward of a piece"),
        (_AUTOMATIC, "output_result_cls", "the result of the whole batch"),
        ("lightning.pytorch.loops.optimization.automatic.ClosureResult", "closure_loss loss extra", "its parts"),
        (_EPOCH, "_results", "what is logged"),
        (f"{_EPOCH}._results", "update_metrics batch batch_size", "what a piece logs is collected"),
        ("torchmetrics.MeanMetric()", "_to_sync", "a value of one rank's batch, without the other ranks"),
        ("torchmetrics.MeanMetric()", "_reduce_states", "merges states where there is no `merge_state` yet"),
        ("torch.nn.modules.batchnorm", "_BatchNorm", "every batch normalization, to warn of its pieces"),
        ("torch.nn.parallel.DistributedDataParallel", "require_forward_param_sync", "a trial is each rank's own"),
        ("builtins.Exception", "args", "an error of memory names its remedy"),
    ),
    *_of(
        "schedules",
        ("torch.optim.lr_scheduler.LRScheduler", "_initial_step", "the first rates, written by torch's constructor"),
        ("torch.optim.lr_scheduler.LRScheduler", "_update_lr", "how torch's SequentialLR sets a position"),
        ("torch.optim.lr_scheduler.LRScheduler", "_last_lr _step_count", "what `get_last_lr` and torch's checks read"),
        ("torch.Tensor", "_version", "whether a rate that is a tensor was written elsewhere"),
        ("torch.optim.lr_scheduler.ChainedScheduler", "_schedulers", "whether a part of it rewrites base rates"),
    ),
    *_of(
        "statistics",
        ("trainer", "_results", "what the module logs, batch by batch"),
        (_EPOCH, "_results", "likewise, in training"),
        (
            "lightning.pytorch.trainer.connectors.logger_connector.result._ResultCollection",
            "_get_cache _forked_name",
            "the value of a logged name, of a batch or a phase, and the name that loggers get",
        ),
        ("lightning.pytorch.callbacks.TQDMProgressBar()", "_should_update", "the bar is updated as often as it shows"),
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
            check_exists(owner, entry.name)
