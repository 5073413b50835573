"""One table says which strategies each technique supports; what a user of another one reads names the nearest."""

from types import SimpleNamespace

import lightning.pytorch.strategies as stock
import pytest
import pytorch_lightning.strategies as classic

from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.strategies import SUPPORTED, check_strategy


def trainer_of(base, name="Mine", **attributes):
    """A Trainer whose strategy is of a subclass; nothing of it is set up."""
    methods = dict.fromkeys(getattr(base, "__abstractmethods__", ()))
    kind = type(name, (base,), {**methods, "handles_gradient_accumulation": False, **attributes})
    return SimpleNamespace(strategy=kind.__new__(kind), world_size=2)


@pytest.mark.parametrize("package", [stock, classic], ids=["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("technique", SUPPORTED)
def test_subclasses_of_what_is_supported_are_too(technique, package):
    for name in SUPPORTED[technique]:
        check_strategy(trainer_of(getattr(package, name), _device_mesh=None), technique)


REFUSED = {
    # both are subclasses of DDPStrategy, and keep parameters elsewhere
    ("EMA", "DeepSpeedStrategy"): "ModelParallelStrategy",
    ("CheckpointAveraging", "DeepSpeedStrategy"): "ModelParallelStrategy",
    ("MicroBatching", "DeepSpeedStrategy"): "DDPStrategy",
    ("GradientAccumulation", "XLAStrategy"): "DDPStrategy",
    ("EMA", "XLAStrategy"): "DDPStrategy",
    ("EMA", "FSDPStrategy"): "ModelParallelStrategy",
    ("MicroBatching", "FSDPStrategy"): "DDPStrategy",
    ("MicroBatching", "ModelParallelStrategy"): "DDPStrategy",
    ("GradientAccumulation(carry=True)", "ModelParallelStrategy"): "DDPStrategy",
}


@pytest.mark.parametrize(("technique", "strategy"), REFUSED)
def test_others_are_refused_with_the_nearest_that_works(technique, strategy):
    if strategy in SUPPORTED[technique]:
        pytest.skip("supported by now")
    nearest = REFUSED[technique, strategy]
    message = (
        rf"^{technique} was not tested under Mine; it works under .*DDPStrategy.* The nearest to Mine is {nearest}\."
    )
    with pytest.raises(MisconfigurationException, match=message.replace("(carry=True)", r"\(carry=True\)")):
        check_strategy(trainer_of(getattr(stock, strategy)), technique)


def test_a_strategy_of_its_own_is_refused():
    message = r"EMA was not tested under Mine; .* nearest to Mine is DDPStrategy\."
    with pytest.raises(MisconfigurationException, match=message):
        check_strategy(trainer_of(stock.ParallelStrategy), "EMA")


@pytest.mark.parametrize("technique", ["GradientAccumulation", "MicroBatching"])
def test_a_strategy_that_accumulates_by_itself_is_refused(technique):
    trainer = trainer_of(stock.SingleDeviceStrategy, handles_gradient_accumulation=True)
    message = "does not work under Mine, which accumulates gradients by itself"
    with pytest.raises(MisconfigurationException, match=message):
        check_strategy(trainer, technique)
    check_strategy(trainer, "EMA")
