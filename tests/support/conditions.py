"""What not every version in the declared range can do, as marks by name.

A test that needs it is skipped where it is missing, and the reason stands in the row of that version in
docs/compatibility.md. Each asks for the thing itself where that can be seen, for the version only where it cannot.
"""

import inspect
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, callbacks

NEEDS = "needs "
"""How each of these reasons begins."""


def installed(package):
    """Return the version of an installed package as numbers: (2, 6, 0); nothing for one that is not there."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def _needs(what, *, there):
    return pytest.mark.skipif(not there, reason=f"{NEEDS}{what}")


# torch 2.6's `fully_shard` records an event on a stream, which its CPU streams cannot. A test whose name or parameter
# says "fsdp2" has this mark by itself.
HAS_FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
fsdp2_on_cpu = _needs("FSDP2 on CPU", there=HAS_FSDP2_ON_CPU)

# torch 2.6's FSDP1 refuses gradients that wait for a later epoch: "Cannot writeback when the gradient shape changes"
carry_under_fsdp1 = _needs("carried windows under FSDP1", there=installed("torch") >= (2, 7))

HAS_EMA_WEIGHT_AVERAGING = hasattr(callbacks, "EMAWeightAveraging")
ema_weight_averaging = _needs("Lightning's EMAWeightAveraging", there=HAS_EMA_WEIGHT_AVERAGING)

HAS_SAVE_ON_EXCEPTION = "save_on_exception" in inspect.signature(callbacks.ModelCheckpoint).parameters
save_on_exception = _needs("ModelCheckpoint(save_on_exception=True)", there=HAS_SAVE_ON_EXCEPTION)

# Lightning 2.5.0 takes the batches of the search for batches of the run, which ends that much early. 2.6.0 does not.
whole_run_after_a_search = _needs(
    "a whole run after Lightning's LearningRateFinder", there=installed("lightning") >= (2, 6)
)

# Before, the rate that was found is written to the module alone, and the optimizer of a run in progress keeps its own.
rate_of_a_search_in_mid_fit = _needs(
    "a LearningRateFinder that sets the rate of a run in progress", there=installed("lightning") >= (2, 6)
)

# A Trainer of Lightning before 2.6 cannot be told, and loads any object.
HAS_WEIGHTS_ONLY = "weights_only" in inspect.signature(Trainer.fit).parameters
weights_only_fit = _needs("Trainer.fit(weights_only=True)", there=HAS_WEIGHTS_ONLY)
LOAD_ANY_OBJECT = {"weights_only": False} if HAS_WEIGHTS_ONLY else {}

import_linter = _needs("the package import-linter", there=Path(sys.executable).with_name("lint-imports").exists())

# Names that the package uses where they are there: whether the installed version is known to have them.
OF_SOME_VERSIONS = {
    "_last_val_time": installed("lightning") >= (2, 6),
    "_fsdp_param_groups": installed("torch") >= (2, 13),
    "_fsdp_param_group": installed("torch") < (2, 7),
    "_update_lr": installed("torch") >= (2, 13),
}
