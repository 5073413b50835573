"""What a run leaves behind: every attribute, hook, open file and thread, as a set of lines that can be compared."""

import atexit
import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

import torch

_OURS = ("lightning.", "lightning_fabric.", "pytorch_lightning.")
_SKIPPED = {"callbacks", "_callbacks", "model", "_model", "_lightning_module", "optimizers", "_optimizers"}


def of_module(module):
    """Attributes of the module and of each of its layers, and hooks on them and on every parameter."""
    for path, layer in module.named_modules():
        yield from _attributes(f"module.{path}", layer)
        yield from (f"module.{path}.{key}: {len(hooks)}" for key, hooks in vars(layer).items() if _is_hooks(key, hooks))
    for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
        hooks = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
        yield f"tensor {path}: {sorted(vars(tensor))}, {[len(each or ()) for each in hooks]}, {tensor.requires_grad}"
    yield f"training: {module.training}"


def of_optimizer(optimizer):
    """Attributes of the optimizer, methods that were wrapped included, its hooks, and what its groups hold."""
    yield from _attributes("optimizer", optimizer)
    yield from (f"optimizer.{key}: {len(hooks)}" for key, hooks in vars(optimizer).items() if _is_hooks(key, hooks))
    yield from (f"group {sorted(group)}" for group in optimizer.param_groups)
    yield from (f"state {sorted(state)}" for state in optimizer.state.values())


def of_trainer(trainer):
    """Attributes of the Trainer and of everything of Lightning's that can be reached from it; and its callbacks."""
    seen, waiting = set(), [("trainer", trainer)]
    while waiting:
        path, item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield from _attributes(path, item)
        for key, value in vars(item).items():
            if key not in _SKIPPED and type(value).__module__.startswith(_OURS) and hasattr(value, "__dict__"):
                waiting.append((f"{path}.{key}", value))
    yield from (f"callback {type(callback).__name__} {index}" for index, callback in enumerate(trainer.callbacks))
    names = (
        "accumulate_grad_batches",
        "gradient_clip_val",
        "max_epochs",
        "min_epochs",
        "max_steps",
        "val_check_interval",
    )
    yield from (f"trainer.{name} = {getattr(trainer, name)}" for name in names)


def of_process():
    """What belongs to the process: open files, threads, hooks on everything, handlers, filters, the environment."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own
            yield f"open file {link.readlink()}"
    yield f"threads: {sorted(thread.name for thread in threading.enumerate())}"
    yield f"threads of the system: {len(list(Path('/proc/self/task').iterdir()))}"
    for where in map(importlib.import_module, ("torch.optim.optimizer", "torch.nn.modules.module")):
        yield from (
            f"{where.__name__}.{key}: {len(hooks)}" for key, hooks in vars(where).items() if _is_hooks(key, hooks)
        )
    yield from (f"signal {number}: {signal.getsignal(number)}" for number in signal.valid_signals())
    yield f"warnings: {len(warnings.filters)}, {warnings.showwarning}"
    yield f"hooks: {sys.excepthook}, {threading.excepthook}, {sys.unraisablehook}, {sys.gettrace()}, {sys.displayhook}"
    yield f"exit handlers: {atexit._ncallbacks()}"
    yield f"logging: {[len(logging.getLogger(name).handlers) for name in (None, 'lightning.pytorch', 'torch')]}"
    yield f"torch: {torch.is_grad_enabled()}, {torch.get_default_dtype()}"
    yield from (f"environment {name}={value}" for name, value in os.environ.items())


def _attributes(path, item):
    return (f"{path} has {key}" for key in vars(item))


def _is_hooks(key, value):
    return "hooks" in key and hasattr(value, "__len__")
