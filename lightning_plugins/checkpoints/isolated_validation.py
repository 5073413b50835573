"""Runs a module in a Trainer whose training has ended, such that nothing else notices.

The averaged weights have to be validated by the fit's own validation loop, on its own data, devices and precision:
anything else would give another number. That loop reports to callbacks, loggers, progress counters and metrics, which
still belong to the training. Here they are put away for the time of a block and put back however it ends.

Nothing of Lightning is imported, so that Trainers of both namespaces are served.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.checkpoints.batch_norm import batch_norms, estimating, statistics
from lightning_plugins.checkpoints.formats.base import Checkpoint
from lightning_plugins.core import flat_shards
from lightning_plugins.core.metric_state import MetricState, metrics_in
from lightning_plugins.core.module_state import clean_name, is_opaque, load_named, misfits
from lightning_plugins.core.patching import Patches, read
from lightning_plugins.core.random_state import RandomState
from lightning_plugins.core.sharding import is_sharded, local, reshard

UNSIZED_BATCHES = 200
"""Batches that batch-normalization statistics are estimated from when the training data have no length."""


@contextmanager
def isolated(trainer: Any, pl_module: nn.Module) -> Iterator[None]:
    """Take callbacks and loggers away, and put everything back as it was, whatever happens in the block."""
    with ExitStack() as undo:
        for keep in (_weights_kept, _modes_kept, _metrics_kept):
            undo.enter_context(keep(pl_module))
        undo.enter_context(_trainer_kept(trainer))
        random = RandomState()
        undo.callback(random.restore)
        patches = Patches()
        undo.callback(patches.undo)
        _silence(trainer, patches)
        yield


class SilentLogger:
    """Stands in for what a module would log to: every attribute of it can be called and does nothing."""

    def __getattr__(self, name: str) -> SilentLogger:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> SilentLogger:
        """Do nothing."""
        return self


def _silence(trainer: Any, patches: Patches) -> None:
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    # Lightning asks `trainer.callbacks` at every hook, so that an empty list is enough for none to be called.
    patches.replace(trainer, "callbacks", [])
    # as many as before: a module may index them
    patches.replace(trainer, "loggers", [SilentLogger() for _ in trainer.loggers])
    # The connector adds what is logged to these, where EarlyStopping, ModelCheckpoint and the user look.
    for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics"):
        patches.replace(connector, name, {})
    # The loop counts its batches over all validations of a fit, and its counters are saved.
    patches.replace(loop, "batch_progress", copy.deepcopy(loop.batch_progress))
    # Sums of the last validation that were not yet read would be mixed with those of this one.
    patches.replace(loop, "_results", type(loop._results)(training=False))
    # After a resume the loop would begin at the batch at which the checkpoint's own validation stood.
    patches.replace(loop, "_restarting", False)


@contextmanager
def _trainer_kept(trainer: Any) -> Iterator[None]:
    """Keep what the loop itself changes: its fields, the connector's, the stage, the time of the last validation."""
    connector, loop = read(trainer, "_logger_connector"), trainer.fit_loop.epoch_loop.val_loop
    stage = trainer.state.stage
    # The attribute is made by the first validation. A run without one has none, and an interval of validations in
    # minutes would begin with ours.
    time = {name: value for name, value in vars(trainer).items() if name == "_last_val_time"}
    kept = [(part, vars(part).copy()) for part in (connector, loop)]
    try:
        yield
    finally:
        trainer.state.stage = stage
        vars(trainer).pop("_last_val_time", None)
        vars(trainer).update(time)
        for part, fields in kept:
            vars(part).update(fields)


@contextmanager
def _weights_kept(module: nn.Module) -> Iterator[None]:
    """Keep the weights in host memory: on the device there may be no room for a second set."""
    reshard(module)
    kept = {name: local(tensor.detach()).to("cpu", copy=True) for name, tensor in _dense_tensors(module)}
    try:
        yield
    finally:
        # a forward pass in eval mode leaves FSDP2 with whole parameters, which take no local parts
        reshard(module)
        with torch.no_grad():
            for name, tensor in _dense_tensors(module):
                if name in kept:
                    local(tensor.detach()).copy_(kept[name])


def _dense_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that are exchanged: quantized ones are frozen, the same in every file, and stay as they are."""
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if not is_opaque(tensor):
            yield name, tensor


@contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    """Keep each part's mode: the loop puts all into eval and back by what it saw, frozen layers may differ."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    kept = [(metric, MetricState(metric)) for metric in metrics_in(module)]
    try:
        yield
    finally:
        for metric, state in kept:
            state.restore(metric)


def load_weights(trainer: Any, pl_module: nn.Module, checkpoint: Checkpoint | None) -> None:
    """Load a checkpoint's weights, mapped from the file, inside :func:`isolated`.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        checkpoint: The open checkpoint; of a sharded module on rank zero alone, from where its parts are spread.
    """
    state: dict[str, Any] = {}
    if checkpoint is not None:
        state = {name: checkpoint.flat(name, 0, spec.numel).view(spec.shape) for name, spec in checkpoint.specs.items()}
        state |= checkpoint.extras
    reshard(pl_module)
    strict = getattr(pl_module, "strict_loading", True)
    if flat_shards.are_in(pl_module):
        _load_flat(pl_module, state, strict=strict)
        return
    if is_sharded(pl_module):
        _load_sharded(pl_module, state if trainer.is_global_zero else {}, strict=strict)
        return
    opaque = {name for name, value in pl_module.state_dict().items() if isinstance(value, Tensor) and is_opaque(value)}
    if not opaque:
        pl_module.load_state_dict(state, strict=strict)
        return
    # Not every such kind can be copied into. What is left out is in the module already: see `_dense_tensors`.
    found = pl_module.load_state_dict({n: value for n, value in state.items() if n not in opaque}, strict=False)
    wrong = (set(found.missing_keys) - opaque) | set(found.unexpected_keys)
    if strict and wrong:
        raise RuntimeError(f"The checkpoint's weights are not the module's: {', '.join(sorted(wrong)[:10])}.")


def _load_flat(pl_module: nn.Module, state: dict[str, Any], *, strict: bool) -> None:
    tensors = {clean_name(name): value for name, value in state.items() if isinstance(value, Tensor)}
    wrong = misfits(pl_module, tensors)
    if strict and wrong:
        raise RuntimeError(f"The checkpoint's weights are not the module's: {'; '.join(wrong)}.")
    load_named(pl_module, tensors)


def _load_sharded(pl_module: nn.Module, state: dict[str, Any], *, strict: bool) -> None:
    # absent from builds without distributed support
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # noqa: PLC0415

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
    set_model_state_dict(pl_module, state, options=options)


def refreshed_statistics(trainer: Any, pl_module: Any) -> dict[str, Tensor]:
    """Run the training data through ``training_step`` without gradients, inside :func:`isolated`.

    Returns:
        The batch-normalization statistics of the module's present weights, by name; the mean over all processes.
    """
    layers = batch_norms(pl_module)
    patches = Patches()
    # outside its loop `self.log` has nowhere to go, and says so by an error
    for name in ("log", "log_dict"):
        patches.replace(pl_module, name, SilentLogger())
    try:
        with estimating(layers), torch.no_grad(), trainer.precision_plugin.train_step_context():
            for number, batch in enumerate(_training_batches(trainer)):
                pl_module.training_step(*((batch, number) if _takes_index(pl_module) else (batch,)))
            return statistics(layers, lambda value: trainer.strategy.reduce(value, reduce_op="mean"))
    finally:
        patches.undo()


def set_order_of_last_epoch(trainer: Any) -> None:
    """Put samplers that shuffle by the epoch in the order of the last one, as the end of training finds them."""
    for loader in trainer.fit_loop._combined_loader.flattened:
        for batches in (loader, getattr(loader, "batch_sampler", None)):
            set_epoch = getattr(getattr(batches, "sampler", None), "set_epoch", None)
            if callable(set_epoch):
                set_epoch(trainer.current_epoch - 1)


def can_refresh(pl_module: Any) -> bool:
    """Return whether ``training_step`` may be called for its forward pass alone."""
    takes_iterator = "dataloader_iter" in inspect.signature(pl_module.training_step).parameters
    return bool(pl_module.automatic_optimization) and not takes_iterator


def _takes_index(pl_module: Any) -> bool:
    parameters = inspect.signature(pl_module.training_step).parameters
    return "batch_idx" in parameters or len(parameters) > 1


def _training_batches(trainer: Any) -> Iterator[Any]:
    """Yield the training batches as the training loop hands them to ``training_step``."""
    batches = trainer.num_training_batches
    limit = UNSIZED_BATCHES if math.isinf(batches) else int(batches)
    for batch, _, _ in itertools.islice(trainer.fit_loop._combined_loader, limit):
        moved = trainer.precision_plugin.convert_input(batch)
        moved = trainer.lightning_module._on_before_batch_transfer(moved, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(moved, dataloader_idx=0)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return those of ``metrics`` that are one number."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    }
