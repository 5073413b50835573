"""Where a checkpoint keeps averaged and raw weights, whether they fit a module, and how to get either out of it.

The file's ``state_dict`` is one complete set, so that ``load_from_checkpoint`` needs nothing of ours. Beside it, under
``lightning_plugins_ema``, lies a record of which set that is, and the averaged tensors' values in the other sets:

    version     1; 2 in a distributed checkpoint, whose sets lie in a folder (core/second_sets.py)
    state_dict  "average" or "raw": what the file's state_dict is
    name        whose average it is; None when it is raw
    raw         name -> tensor, when the state_dict is an average; absent from weights-only files
    averages    EMA's name -> {name -> tensor}, for every average that the state_dict is not
    techniques  name of an average -> what made it, where that is no EMA
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plugins.core import checkpoint_keys, torch_file
from lightning_plugins.core.checkpoint_file import refuse_remote
from lightning_plugins.core.module_state import averaged_tensors, clean_name, fill, misfits, named_tensors
from lightning_plugins.core.second_sets import Label, check_whole, listed
from lightning_plugins.core.sharded_directory import is_sharded_checkpoint
from lightning_plugins.core.stand_ins import UnreadableError
from lightning_plugins.core.validation import a_path, one_of, plain_value, shown, true_or_false, whole_number
from lightning_plugins.core.zero_directory import is_deepspeed_directory
from lightning_plugins.ema import zero_files
from lightning_plugins.ema.checkpoint_directory import RAW, STATE_DICT, average_label, read_directory

RECORD_KEY = checkpoint_keys.EMA
RECORD_VERSION = 1
RECORD_VERSION_BESIDE = 2
"""Version of a record whose sets lie in the folder of a distributed checkpoint."""


class NoStateDictError(ValueError):
    """A file that can be read and is no Lightning checkpoint."""


@dataclass
class Contents:
    """The sets of weights that a checkpoint holds.

    Args:
        state_dict: What its ``state_dict`` is: ``"average"`` or ``"raw"``.
        name: The EMA that it is the average of, ``None`` when it is raw or in a file of Lightning's own callback.
        raw: Trained values of the averaged tensors, by clean name; ``None`` when the file has none beside its state
            dict.
        averages: The averages beside the state dict, by the name of their EMA.
        updates: Updates counted by Lightning's own callback, ``None`` in files of ours.
    """

    state_dict: str
    name: str | None
    raw: dict[str, Tensor] | None = None
    averages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    updates: int | None = None

    def owns_state_dict(self, name: str) -> bool:
        """Return whether the state dict is the average of the EMA called ``name``."""
        return self.state_dict == "average" and (self.updates is not None or self.name == name)

    def average(self, name: str, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Return the average of the EMA called ``name`` by clean name, ``None`` when the file lacks it.

        Args:
            name: The EMA's name.
            state_dict: The file's own, ``None`` where a sharded strategy has already consumed it.
        """
        if name in self.averages:
            return self.averages[name]
        if not self.owns_state_dict(name) or state_dict is None:
            return None
        named = {clean_name(key): value for key, value in state_dict.items()}
        return named if self.raw is None else {key: named[key] for key in self.raw if key in named}


def record(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's record, made first if it has none."""
    empty = {"version": RECORD_VERSION, "state_dict": "raw", "name": None, "raw": None, "averages": {}}
    found: dict[str, Any] = checkpoint.setdefault(RECORD_KEY, empty)
    return found


def name_technique(checkpoint: dict[str, Any], name: str, technique: str) -> None:
    """Note in the record that the average called ``name`` is not an EMA."""
    record(checkpoint).setdefault("techniques", {})[name] = technique


def technique_of(checkpoint: Mapping[str, Any], name: str) -> str:
    """Return what made the average called ``name``, as its record says."""
    known = checkpoint.get(RECORD_KEY, {}).get("techniques")
    return str(plain_value(known.get(name, "EMA") if isinstance(known, dict) else "EMA"))


def read_contents(checkpoint: Mapping[str, Any]) -> Contents | None:
    """Return which sets a loaded checkpoint holds, ``None`` when no averaging callback wrote it.

    Files of Lightning's ``EMAWeightAveraging`` are understood as well.

    Raises:
        ValueError: If the record is of a later version or no record at all.
    """
    found = checkpoint.get(RECORD_KEY)
    if found is None:
        return _lightnings(checkpoint)
    if not isinstance(found, dict) or not {"version", "state_dict", "name"} <= found.keys():
        raise ValueError(f"`{RECORD_KEY}` must be a record of averaged weights, got {type(found).__name__}.")
    if type(found["version"]) is not int or found["version"] not in (RECORD_VERSION, RECORD_VERSION_BESIDE):
        raise ValueError(
            f"`{RECORD_KEY}` must be of version {RECORD_VERSION}, got {shown(found['version'])}: the file was written "
            "by another version of lightning_plugins, which can read it."
        )
    raw, averages, name = found.get("raw"), found.get("averages", {}), found["name"]
    if raw is not None:
        _check_tensors("raw", raw)
    if not isinstance(averages, dict) or not all(isinstance(key, str) for key in averages):
        raise ValueError(f"`{RECORD_KEY}` must have averages by name, got {shown(averages)}.")
    for average in averages.values():
        _check_tensors("averages", average)
    if name is not None and not isinstance(name, str):
        raise ValueError(f"`{RECORD_KEY}` must have a text as `name`, got {shown(name)}.")
    return Contents(one_of("state_dict", found["state_dict"], ("average", "raw")), name, raw, dict(averages))


def _check_tensors(what: str, found: Any) -> None:
    if not tensors_by_name(found):
        raise ValueError(f"`{RECORD_KEY}` must have tensors by name as `{what}`, got {type(found).__name__}.")


def tensors_by_name(value: Any) -> bool:
    """Return whether ``value`` is a dict of names and tensors and of nothing else."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


# -- from a file to a module: everything is checked before anything is written


def fitting_average(
    module: nn.Module, contents: Contents, name: str, state_dict: Mapping[str, Tensor] | None, *, strict: bool
) -> dict[str, Tensor] | None:
    """Return the average called ``name`` that a checkpoint holds for ``module``, ``None`` when it holds none.

    Weights that are trainable now and were not when the file was written are not in it; they begin as they are.

    Args:
        module: The module that the average is for.
        contents: What the checkpoint holds.
        name: The EMA's name.
        state_dict: The checkpoint's own, ``None`` where a sharded strategy has already consumed it.
        strict: Whether the module must have every name; otherwise averages without a weight are left out.

    Raises:
        ValueError: If the average or the raw weights beside it do not fit the module.
    """
    average = contents.average(name, state_dict)
    if average is not None and contents.updates is not None:
        # Lightning averages frozen weights and integers, too
        trainable = {known for found in averaged_tensors(module) for known in found.names}
        average = {key: value for key, value in average.items() if key in trainable}
    for what, tensors in (("raw weights", contents.raw), (f"average {name!r}", average)):
        if tensors is not None:
            check_fit(module, what, tensors, strict=strict)
    return average


def check_fit(module: nn.Module, what: str, tensors: dict[str, Tensor], *, strict: bool = True) -> None:
    """Check that ``tensors`` of a checkpoint can be loaded into ``module``.

    Args:
        module: The module.
        what: What they are, for the message.
        tensors: Clean name -> full tensor; without ``strict``, those that the module lacks are taken out.
        strict: Whether the module must have every name.

    Raises:
        ValueError: If they cannot.
    """
    if not strict:
        known = {name for found in named_tensors(module) for name in found.names}
        for key in [key for key in tensors if key not in known]:
            del tensors[key]
    faults = misfits(module, tensors)
    if faults:
        raise ValueError(
            f"The checkpoint's {what} must have the names and shapes of the module's trainable weights; "
            f"{'; '.join(faults)}. Resume with the module that wrote it, or load its weights with `extract_weights`."
        )


def lightning_steps(contents: Contents, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the counters for a file of Lightning's own callback, ``None`` for other files."""
    if contents.updates is None:
        return None
    applied = max(whole_number("global_step", checkpoint.get("global_step", 0)), contents.updates)
    return {"applied_steps": applied, "origin": applied - contents.updates, "last_update": contents.updates}


# -- from a module to a file


def follow_pruning(state: Mapping[str, Any], module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give tensors the names and zeros of a state dict in which Lightning's ModelPruning was made permanent.

    It does so in every file: the entry ``weight_orig`` becomes ``weight``, multiplied by its mask.

    Args:
        state: The file's state dict.
        module: The module, which has the masks.
        tensors: Clean name -> tensor; changed in place.
    """
    names = {clean_name(key) for key in state}
    pruned = [name for name in tensors if name.endswith("_orig") and name not in names]
    masks = {clean_name(key): mask for key, mask in module.named_buffers()} if pruned else {}
    for name in pruned:
        plain = name.removesuffix("_orig")
        mask = masks.get(f"{plain}_mask")
        if plain in names and mask is not None:
            tensor = tensors.pop(name)
            tensors[plain] = tensor * mask.to(tensor)


def replace_raw(state: dict[str, Any], raw: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
    """Put averages into a state dict where it has the raw weights, bit for bit; what else it has stays."""
    for key, value in state.items():
        name = clean_name(key)
        if name in average and torch.equal(value, raw[name].to(value.device)):
            state[key] = average[name]


def extract_weights(
    checkpoint_path: str | Path, which: Literal["average", "raw"] = "average", name: str = "ema", *, trust: bool = False
) -> dict[str, Tensor]:
    """Return one complete set of weights out of a checkpoint, to be given to ``module.load_state_dict``.

    Args:
        checkpoint_path: A checkpoint that was written while an :class:`~lightning_plugins.EMA` was training, or
            Lightning's ``EMAWeightAveraging``: a file, or the directory of a distributed checkpoint.
        which: ``"average"`` or ``"raw"``, the trained weights.
        name: The EMA's name, for ``"average"``.
        trust: Load a file that needs more than tensors and plain values, such as one whose hyper-parameters hold
            objects, which runs code that the file chooses.

    Returns:
        Name -> tensor, on the CPU, with the keys of the file's ``state_dict``. An average is in float32 also where
        the weights are not.

    Raises:
        ValueError: If the file is not a checkpoint, needs trust that it is not given, or lacks the set.
    """
    one_of("which", which, ("average", "raw"))
    if is_deepspeed_directory(Path(a_path("checkpoint_path", checkpoint_path))):
        return zero_files.extract(Path(checkpoint_path), which, name, trust=true_or_false("trust", trust))
    wanted = (STATE_DICT, RAW if which == "raw" else average_label(name))
    checkpoint = load_checkpoint(checkpoint_path, trust=trust, wanted=wanted.__contains__)
    return select_weights(checkpoint, which, name, source=str(checkpoint_path))


def select_weights(checkpoint: Mapping[str, Any], which: str, name: str, *, source: str) -> dict[str, Tensor]:
    """Return one complete set of weights of a loaded checkpoint; ``source`` names it in messages.

    Raises:
        ValueError: If the checkpoint lacks the set.
    """
    manifest = checkpoint_keys.mean_manifest(checkpoint)
    if manifest is not None:
        return _mean(checkpoint, manifest, which, name, source)
    contents = read_contents(checkpoint) or Contents("raw", None)
    state: dict[str, Tensor] = dict(checkpoint["state_dict"])
    if which == "raw":
        if contents.state_dict == "average":
            if contents.raw is None:
                raise ValueError(f"`which` must be 'average' for {source}: {_why_none(checkpoint, RAW)}.")
            fill(state, contents.raw)
        return state
    average = contents.average(name, state)
    if average is None:
        if average_label(name) in _left_behind(checkpoint):
            raise ValueError(f"`name` must be another for {source}: {_why_none(checkpoint, average_label(name))}.")
        there = sorted({*contents.averages, *([contents.name] if contents.name else [])})
        has = f"it has {', '.join(map(repr, there))}" if there else "it has none, only the trained weights"
        raise ValueError(f"`name` must be that of an average in {source}, got {shown(name)}; {has}.")
    fill(state, average)
    return state


def _left_behind(checkpoint: Mapping[str, Any]) -> tuple[Label, ...]:
    """Return the sets that lay in the folder of a directory from which a file was put together."""
    listing = listed(checkpoint)
    return listing.labels if listing else ()


def _why_none(checkpoint: Mapping[str, Any], label: Label) -> str:
    if label in _left_behind(checkpoint):
        return (
            "it was put together from the directory of a distributed checkpoint, in whose folder this set stayed "
            "behind. Pass the directory"
        )
    return "it is a weights-only file and holds nothing else"


def _mean(
    checkpoint: Mapping[str, Any], manifest: Mapping[str, Any], which: str, name: str, source: str
) -> dict[str, Tensor]:
    """Return the weights of a mean of checkpoints, which is an average, and of no single moment of the training."""
    described = checkpoint_keys.mean_described(manifest)
    if which == "raw":
        raise ValueError(
            f"`which` must be 'average' for {source}: it is the {described}, and holds no trained weights."
        )
    there = manifest.get("ema_name")
    if there is not None and there != name:
        raise ValueError(f"`name` must be {shown(there)} for {source}, got {shown(name)}: it is the {described}.")
    return dict(checkpoint["state_dict"])


def load_checkpoint(
    path: str | Path, *, trust: bool = False, wanted: Callable[[Label], bool] = lambda _: True
) -> dict[str, Any]:
    """Return the contents of a checkpoint, its tensors mapped where that is possible, on the CPU.

    Args:
        path: The file, or the directory of a distributed checkpoint.
        trust: Load whatever it names, which runs code that the file chooses.
        wanted: Which sets of a directory are read.

    Raises:
        ValueError: If it is no checkpoint, or needs more than tensors and plain values to load without trust.
    """
    refuse_remote(a_path("checkpoint_path", path))
    path = Path(path)
    true_or_false("trust", trust)
    directory = is_sharded_checkpoint(path)
    if not path.is_file() and not directory:
        raise ValueError(
            f"`checkpoint_path` must be a checkpoint file, got {shown(str(path))}, which is neither one nor the "
            "directory of a distributed checkpoint."
        )
    file = path / "meta.pt" if directory else path
    if not file.is_file():
        check_whole(path)
        raise NoStateDictError(f"`checkpoint_path` must be a Lightning checkpoint, but {path} has no {file.name}.")
    try:
        loaded: dict[str, Any] = torch_file.load(file, trust=trust)
    except torch_file.NeedsTrustError as error:
        raise ValueError(
            f"`checkpoint_path` must hold only tensors and plain values, but {path} does not ({error}). If you trust "
            "its author, pass trust=True (--trust on the command line), which runs that code."
        ) from error
    except UnreadableError as error:
        raise ValueError(f"`checkpoint_path` must be a checkpoint file, but {file} cannot be read: {error}") from error
    if directory and isinstance(loaded, dict):
        loaded = read_directory(path, loaded, wanted)
    has_state = isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), Mapping)
    if not has_state:
        raise NoStateDictError(f"`checkpoint_path` must be a Lightning checkpoint, but {path} has no `state_dict`.")
    _check_names("state_dict", loaded["state_dict"])
    return loaded


def _check_names(what: str, tensors: Mapping[Any, Any]) -> None:
    """Raise unless the names in a set of weights are texts."""
    odd = next((name for name in tensors if not isinstance(name, str)), None)
    if odd is not None or None in tensors:
        raise ValueError(f"`{what}` in a checkpoint must have texts as names, got {shown(odd)}.")


def _lightnings(checkpoint: Mapping[str, Any]) -> Contents | None:
    """Return the contents of a file of Lightning's own averaging callback."""
    if "current_model_state" not in checkpoint or "averaging_state" not in checkpoint:
        return None
    current, averaging = checkpoint["current_model_state"], checkpoint["averaging_state"]
    if not isinstance(current, Mapping) or not isinstance(averaging, Mapping):
        raise TypeError("`current_model_state` and `averaging_state` must be mappings, as Lightning's callback writes.")
    _check_names("current_model_state", current)
    raw = {clean_name(key): value for key, value in current.items() if isinstance(value, Tensor)}
    return Contents("average", None, raw, updates=whole_number("n_averaged", averaging.get("n_averaged")))
