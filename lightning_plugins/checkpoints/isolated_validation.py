"""Tries weights in a run that has ended, and leaves no trace of it.

Everything here reaches into a Trainer at ``on_train_end`` and imports nothing of Lightning, so that it serves the
Trainers of both namespaces. No callback and no logger hears of it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.checkpoints.batch_norm import batch_norms, estimating, statistics
from lightning_plugins.checkpoints.formats import open_checkpoint

UNSIZED_BATCHES = 200
"""Batches that batch-normalisation statistics are estimated from when the training data have no length."""


@contextmanager
def no_trace(trainer: Any, pl_module: nn.Module) -> Iterator[None]:
    """Take callbacks and loggers away, and put everything back as it was, whatever happens in the block."""
    with ExitStack() as undo:
        for keep in (_weights_kept, _modes_kept, _metrics_kept):
            undo.enter_context(keep(pl_module))
        undo.enter_context(_trainer_kept(trainer))
        undo.enter_context(_random_state_kept())
        trainer.callbacks = []
        trainer.loggers = [SilentLogger() for _ in trainer.loggers]
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


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: all of it unless it is sharded."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if callable(to_local) else tensor


def gather_nothing(module: nn.Module) -> None:
    """Let FSDP2 put whole parameters away that the last forward pass left; a module without it has none."""
    for part in module.modules():
        reshard = getattr(part, "reshard", None)
        if callable(reshard):
            reshard()


@contextmanager
def _weights_kept(module: nn.Module) -> Iterator[None]:
    gather_nothing(module)
    kept = {name: local(tensor.detach()).to("cpu", copy=True) for name, tensor in _tensors(module)}
    try:
        yield
    finally:
        gather_nothing(module)
        with torch.no_grad():
            for name, tensor in _tensors(module):
                if name in kept:
                    local(tensor.detach()).copy_(kept[name])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


@contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    """Keep what the metrics (of torchmetrics) in the module have gathered."""
    metrics = [vars(part) for part in module.modules() if hasattr(part, "metric_state") and hasattr(part, "_defaults")]
    names = ("_update_count", "_computed", "_cache")
    kept = [
        {name: copy.deepcopy(metric[name]) for name in [*metric["_defaults"], *names] if name in metric}
        for metric in metrics
    ]
    try:
        yield
    finally:
        for metric, state in zip(metrics, kept, strict=True):
            metric.update(state)


@contextmanager
def _trainer_kept(trainer: Any) -> Iterator[None]:
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    callbacks, loggers, stage = trainer.callbacks, trainer.loggers, trainer.state.stage
    time = {name: value for name, value in vars(trainer).items() if name == "_last_val_time"}  # of the last validation
    logged, running = vars(connector).copy(), vars(loop).copy()
    try:
        for name, value in logged.items():
            if isinstance(value, dict):
                setattr(connector, name, {})
        loop.batch_progress = copy.deepcopy(loop.batch_progress)
        loop._results = type(loop._results)(training=False)
        loop._restarting = False  # after a resume it would go on where the checkpoint's validation was
        yield
    finally:
        trainer.callbacks, trainer.loggers, trainer.state.stage = callbacks, loggers, stage
        vars(trainer).pop("_last_val_time", None)  # it had none if nothing was validated
        vars(trainer).update(time)
        vars(connector).update(logged)
        vars(loop).update(running)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    python, array = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(array)


def load_weights(trainer: Any, pl_module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load full weights into the module; when it is sharded, rank zero's are spread over the ranks."""
    gather_nothing(pl_module)
    strict = getattr(pl_module, "strict_loading", True)
    if not is_sharded_module(pl_module):
        pl_module.load_state_dict(state_dict, strict=strict)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # noqa: PLC0415

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
    weights = dict(state_dict) if trainer.is_global_zero else {}
    set_model_state_dict(pl_module, weights, options=options)


def load_checkpoint(trainer: Any, pl_module: nn.Module, path: Path) -> None:
    """Load a checkpoint's weights, mapped from the file, which is trusted; of a sharded module only rank zero reads."""
    state: dict[str, Any] = {}
    if trainer.is_global_zero or not is_sharded_module(pl_module):
        checkpoint = open_checkpoint(path, trust=True)
        whole = {name: checkpoint.flat(name, 0, spec.numel).view(spec.shape) for name, spec in checkpoint.specs.items()}
        state = {**whole, **checkpoint.extras}
    load_weights(trainer, pl_module, state)


def is_sharded_module(module: nn.Module) -> bool:
    """Return whether parameters are spread over processes (FSDP2, tensor parallel)."""
    return any(hasattr(parameter, "to_local") for parameter in module.parameters())


def validate(trainer: Any) -> dict[str, float]:
    """Run the fit's own validation loop, inside :func:`no_trace`, and return the numbers that it logged.

    ``"returned loss"`` is among them if ``validation_step`` returns a loss: the mean over its batches.
    """
    connector = trainer._logger_connector
    connector._callback_metrics = {}
    trainer.validating = True
    with _returned_losses(trainer.lightning_module) as losses:
        trainer.fit_loop.epoch_loop.val_loop.run()
    returned = {"returned loss": torch.stack(losses).mean()} if losses else {}
    return numbers({**returned, **connector._callback_metrics})


@contextmanager
def _returned_losses(pl_module: Any) -> Iterator[list[Tensor]]:
    """Collect the losses that ``validation_step`` returns, alone or under ``"loss"``."""
    step, losses = pl_module.validation_step, []
    replaced = "validation_step" in vars(pl_module)

    @functools.wraps(step)
    def collecting(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor) and loss.numel() == 1:
            losses.append(loss.detach().float().reshape(()))
        return output

    object.__setattr__(pl_module, "validation_step", collecting)
    try:
        yield losses
    finally:
        object.__delattr__(pl_module, "validation_step")
        if replaced:
            object.__setattr__(pl_module, "validation_step", step)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return those of ``metrics`` that are one number."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def refreshed_statistics(trainer: Any, pl_module: Any) -> dict[str, Tensor]:
    """Run the training data through ``training_step`` without gradients, inside :func:`no_trace`.

    Returns:
        The batch-normalisation statistics of the module's present weights, by name; the mean over all processes.
    """
    layers = batch_norms(pl_module)
    with estimating(layers), _silenced(pl_module), torch.no_grad(), trainer.precision_plugin.train_step_context():
        for number, batch in enumerate(_training_batches(trainer)):
            pl_module.training_step(*((batch, number) if _takes_index(pl_module) else (batch,)))
        return statistics(layers, lambda value: trainer.strategy.reduce(value, reduce_op="mean"))


def last_order(trainer: Any) -> None:
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
    batches = trainer.num_training_batches
    limit = UNSIZED_BATCHES if math.isinf(batches) else int(batches)
    for batch, _, _ in itertools.islice(trainer.fit_loop._combined_loader, limit):
        moved = trainer.precision_plugin.convert_input(batch)
        moved = trainer.lightning_module._on_before_batch_transfer(moved, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(moved, dataloader_idx=0)


@contextmanager
def _silenced(pl_module: nn.Module) -> Iterator[None]:
    """Let ``self.log`` do nothing: outside its loop it has nowhere to go."""
    names = [name for name in ("log", "log_dict") if name not in vars(pl_module)]
    for name in names:
        object.__setattr__(pl_module, name, SilentLogger())
    try:
        yield
    finally:
        for name in names:
            object.__delattr__(pl_module, name)
