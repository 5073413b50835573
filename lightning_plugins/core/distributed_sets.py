"""Sets of tensors in distributed checkpoints: written and read by all ranks, each its shares.

Lightning puts a checkpoint's ``state_dict`` and optimizer states into a directory of ``torch.distributed.checkpoint``
and takes all else from rank 0, whose shares are not the whole. So the sets beside the ``state_dict`` go into a folder
of their own, before Lightning's files: a directory that counts as complete has both. Every rank writes and reads its
own shares, also when there are more or fewer ranks than there were.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.module_state import clean_name, named_tensors
from lightning_plugins.core.patching import Patches
from lightning_plugins.core.save_marks import new_save, write_marked
from lightning_plugins.core.second_sets import (
    Label,
    SecondSets,
    belonging,
    check_whole,
    listed,
    new_listing,
    rest_digest,
    write_listing,
)
from lightning_plugins.core.sharded_directory import ShardedTensors, is_sharded_checkpoint
from lightning_plugins.core.sharding import any_sharded

_FOLDER = checkpoint_keys.SECOND_SETS_FOLDER
# in a checkpoint that is being made: label -> tensors
_WAITING = "lightning_plugins_waiting_sets"


# -- writing


def is_distributed(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint that is being made will be a directory: its weights are sharded still."""
    return any_sharded(checkpoint.get("state_dict", {}).values())


def put_beside(strategy: Any, checkpoint: dict[str, Any], sets: Mapping[Label, Mapping[str, Tensor]]) -> None:
    """Let sharded sets be written beside a distributed ``checkpoint`` that the strategy is about to save, and mark it.

    Nothing happens for a file. Without any set, those of an earlier checkpoint of that name are removed all the same.

    Args:
        strategy: The Trainer's; it is watched for one call.
        checkpoint: What is saved; on every rank alike. Its listing takes the place of the sets.
        sets: Label -> this rank's shares.
    """
    if not _may_be_directory(strategy, checkpoint):
        return
    if _WAITING not in checkpoint:
        patches = Patches()

        def save(original: Callable[..., None], saved: dict[str, Any], path: Any, *rest: Any, **more: Any) -> None:
            patches.undo()
            if saved is not checkpoint:
                original(saved, path, *rest, **more)
                return
            write_beside(strategy, saved, path)
            with marking(strategy, saved):
                original(saved, path, *rest, **more)

        patches.wrap(strategy, "save_checkpoint", save)
    if is_distributed(checkpoint):
        checkpoint.setdefault(_WAITING, {}).update(sets)


def write_beside(strategy: Any, checkpoint: dict[str, Any], filepath: Any) -> None:
    """Write the sets of a distributed checkpoint, which is about to be written, into its folder, once.

    What an earlier checkpoint of that name has there is removed. Every rank must call it; there is no collective but
    that for the path, the first rank's, and those of ``torch.distributed.checkpoint``.
    """
    if checkpoint_keys.SECOND_SETS in checkpoint or not is_distributed(checkpoint):
        return
    sets, first, replaces = checkpoint.pop(_WAITING, {}), strategy.is_global_zero, None
    if first:
        # before all else: what is there must not seem to belong to what comes; and before the others know the path, on
        # which they make the folder anew
        replaces = rest_digest(Path(filepath))
        shutil.rmtree(Path(filepath) / _FOLDER, ignore_errors=True)
    path, save = strategy.broadcast((Path(filepath), new_save()))
    if not sets:
        return
    if path.is_file():
        # as Lightning does with a single file of that name
        path.unlink(missing_ok=True)
    listing = new_listing(save, checkpoint.get("global_step", 0), list(sets))
    # absent from builds without distributed support
    from torch.distributed.checkpoint import state_dict_saver  # noqa: PLC0415

    by_number = {str(number): tensors for number, tensors in enumerate(sets.values())}
    about = {"save": save, "step": listing.step, "rank": strategy.global_rank}
    marks = write_marked(state_dict_saver.save, by_number, path / _FOLDER, **about)
    if first:
        write_listing(path, listing, replaces)
    checkpoint[checkpoint_keys.SECOND_SETS] = {**listing.plain(), "marks": marks}


@contextmanager
def marking(strategy: Any, checkpoint: dict[str, Any]) -> Iterator[None]:
    """Mark the files of a distributed checkpoint while the strategy writes it, once; nothing happens for a file.

    Every rank must enter it; for a directory there is a collective for the mark.

    Args:
        strategy: The Trainer's.
        checkpoint: What is saved; it says which save it is then, in what is written last.
    """
    patches = Patches()

    def save(original: Callable[..., Any], state: Any, *rest: Any, **more: Any) -> Any:
        path = more.get("checkpoint_id")
        if rest or len(more) > 1 or path is None or checkpoint_keys.SAVE in state:
            return original(state, *rest, **more)
        about = {"step": checkpoint.get("global_step", 0), "rank": strategy.global_rank}
        said = write_marked(original, state, Path(path), save=strategy.broadcast(new_save()), **about)
        checkpoint[checkpoint_keys.SAVE] = said
        return None

    if _may_be_directory(strategy, checkpoint):
        # absent from builds without distributed support
        import torch.distributed.checkpoint  # noqa: PLC0415

        patches.wrap(torch.distributed.checkpoint, "save", save)
    try:
        yield
    finally:
        patches.undo()


def _may_be_directory(strategy: Any, checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint may become a directory: under FSDP1 its weights do not show it on a single rank."""
    return is_distributed(checkpoint) or any(kind.__name__ == "FSDPStrategy" for kind in type(strategy).__mro__)


# -- reading


def refuse_cut_off(patches: Patches, strategy: Any) -> None:
    """Let a strategy refuse a directory that was not written completely, before it reads it.

    Every callback that marks directories calls it in ``setup``, where no strategy has read one yet.
    """

    def load(original: Callable[..., Any], path: Any, *rest: Any, **more: Any) -> Any:
        check_whole(path)
        return original(path, *rest, **more)

    patches.wrap(strategy, "load_checkpoint", load)


class DistributedSets:
    """The sets in a distributed checkpoint, for a module whose tensors are spread over ranks.

    Args:
        path: The directory.
        listing: What lies in its folder.
        module: The module; what is read is spread as its tensors are.
    """

    def __init__(self, path: Path, listing: SecondSets, module: nn.Module) -> None:
        self._path, self._listing = path, listing
        self._like = {name: found.tensor for found in named_tensors(module) for name in found.names}

    def __contains__(self, label: Label) -> bool:
        return label in self._listing.labels

    def names(self, label: Label) -> set[str]:
        """Return the names of a set's tensors."""
        root = self._listing.root(*label)
        return set(map(clean_name, ShardedTensors(self._path / _FOLDER, (root,)).specs)) if root else set()

    def read(self, label: Label) -> dict[str, Tensor] | None:
        """Return a set by clean name, ``None`` if there is none of that label; every rank must call it."""
        root = self._listing.root(*label)
        return self._read(self._path / _FOLDER, (root,)) if root else None

    def read_state_dict(self, names: set[str]) -> dict[str, Tensor]:
        """Return those tensors of the ``state_dict`` that have one of the clean ``names``, in the file's precision."""
        return self._read(self._path, checkpoint_keys.STATE_DICT_KEYS, names)

    def _read(self, path: Path, roots: tuple[str, ...], names: set[str] | None = None) -> dict[str, Tensor]:
        """Read tensors that the module has, in place; others are without their elements: they are only named."""
        from torch.distributed.checkpoint import state_dict_loader  # noqa: PLC0415

        found = ((root, ShardedTensors(path, (root,)).specs) for root in roots)
        root, specs = next(((root, specs) for root, specs in found if specs), ("", {}))
        targets: dict[str, Tensor] = {}
        wanted: dict[str, Tensor] = {}
        for key, spec in specs.items():
            name = clean_name(key)
            if names is not None and name not in names:
                continue
            like = self._like.get(name)
            if like is None or like.shape != spec.shape:
                targets[name] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            else:
                targets[name] = wanted[key] = torch.empty_like(like.detach(), dtype=spec.dtype)
        if wanted:
            state_dict_loader.load({root: wanted}, checkpoint_id=path)
        return targets


def open_sets(checkpoint: Mapping[str, Any], path: Any, module: nn.Module) -> DistributedSets | None:
    """Return the sets that lie beside a loaded checkpoint's ``state_dict``, ``None`` for a file or without any.

    Args:
        checkpoint: What Lightning has loaded.
        path: From where.
        module: The module.

    Raises:
        CheckpointError: If the directory is another than the one that was loaded.
    """
    directory = Path(str(path))
    if listed(checkpoint) is None or not is_sharded_checkpoint(directory):
        return None
    listing = belonging(directory, checkpoint)
    return None if listing is None else DistributedSets(directory, listing, module)
