"""One table says which strategies each technique supports; what a user of another one reads names the nearest."""

import importlib.util
from importlib.machinery import SourceFileLoader
from types import SimpleNamespace

import lightning.pytorch.strategies as stock
import pytest
import pytorch_lightning.strategies as classic

from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.strategies import (
    DEEPSPEED,
    FSDP2,
    STRATEGIES,
    SUPPORTED,
    TENSOR,
    XLA,
    check_strategy,
    forwards_are_collective,
    known_as,
    nearest,
    refusal,
)
from tests.support.snippets import ROOT


class Dimension:
    """A dimension of a device mesh."""

    def __init__(self, size):
        self.size = lambda: size


def trainer_of(base, name="Mine", *, tensor_parallel=1, **attributes):
    """A Trainer whose strategy is of a subclass; nothing of it is set up."""
    methods = dict.fromkeys(getattr(base, "__abstractmethods__", ()))
    kind = type(name, (base,), {**methods, "_device_mesh": {"tensor_parallel": Dimension(tensor_parallel)}})
    for key, value in attributes.items():
        setattr(kind, key, value)
    return SimpleNamespace(strategy=kind.__new__(kind), world_size=2)


def trainer_under(strategy, package=stock, stage=3):
    """The same for a name of the table."""
    base = getattr(package, FSDP2 if strategy == TENSOR else strategy)
    # a mesh says nothing of strategies that are not made for one
    return trainer_of(
        base, tensor_parallel=1 if strategy == FSDP2 else 2, config={"zero_optimization": {"stage": stage}}
    )


@pytest.mark.parametrize("package", [stock, classic], ids=["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("technique", SUPPORTED)
def test_a_subclass_is_treated_as_the_strategy_that_it_is(technique, strategy, package):
    """Every cell of the table: what was tested passes, what is refused reads the text of the table."""
    trainer = trainer_under(strategy, package)
    if strategy in SUPPORTED[technique].tested or not SUPPORTED[technique].refuses:
        check_strategy(trainer, technique)
        return
    with pytest.raises(MisconfigurationException) as caught:
        check_strategy(trainer, technique)
    said = str(caught.value)
    assert said == refusal(technique, strategy, "Mine")
    named = TENSOR if strategy == TENSOR else "Mine"
    assert f"under {named}" in said
    assert said.endswith(f"The nearest to {named} is {nearest(technique, strategy)}.")


def test_what_comes_nearest_works():
    for technique, support in SUPPORTED.items():
        assert support.tested.keys() | support.instead.keys() <= STRATEGIES.keys()
        for strategy in STRATEGIES:
            if refusal(technique, strategy):
                near = nearest(technique, strategy)
                other = next((name for name in SUPPORTED if near.startswith(name)), technique)
                assert not refusal(other, near if other == technique else strategy), (technique, strategy)


@pytest.fixture(scope="module")
def page():
    path = ROOT / "docs" / "strategies" / "make"
    loader = SourceFileLoader("strategies_make", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def test_the_page_has_the_table_that_the_callbacks_ask(page):
    text = page.PAGE.read_text()
    assert page.page(text) == text
    for technique in SUPPORTED:
        for strategy in STRATEGIES:
            assert f"`{technique}`" in text
            assert refusal(technique, strategy) in text


NEAREST = {
    # both are subclasses of DDPStrategy, and keep parameters elsewhere
    ("MicroBatching(size)", DEEPSPEED): "ModelParallelStrategy",
    ("GradientAccumulation", XLA): "DDPStrategy",
    ("EMA", XLA): "DDPStrategy",
    ("CheckpointAveraging", XLA): "DDPStrategy",
}


@pytest.mark.parametrize(("technique", "strategy"), NEAREST)
def test_others_are_refused_with_the_nearest_that_works(technique, strategy):
    with pytest.raises(MisconfigurationException, match=rf"The nearest to Mine is {NEAREST[technique, strategy]}\.$"):
        check_strategy(trainer_under(strategy), technique)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_may_have_any_stage_of_zero(stage):
    check_strategy(trainer_under(DEEPSPEED, stage=stage), "GradientAccumulation")


@pytest.mark.parametrize(
    "config",
    [{"zero_optimization": {"stage": 0}}, {"zero_optimization": {}}, {}, None],
    ids=["0", "none", "empty", "no"],
)
def test_deepspeed_without_zero_is_refused(config):
    trainer = trainer_of(stock.DeepSpeedStrategy, config=config)
    with pytest.raises(MisconfigurationException, match="Mine needs ZeRO of stage 1, 2 or 3, got 0"):
        check_strategy(trainer, "GradientAccumulation")
    # a technique that works under every strategy works under this one
    for technique in (name for name, support in SUPPORTED.items() if not support.refuses):
        check_strategy(trainer, technique)


def test_a_strategy_of_its_own_is_refused():
    message = r"EMA was not tested under Mine; .* nearest to Mine is DDPStrategy\."
    with pytest.raises(MisconfigurationException, match=message):
        check_strategy(trainer_of(stock.ParallelStrategy), "EMA")


@pytest.mark.parametrize("technique", ["GradientAccumulation", "MicroBatching(size)", "Cancelling"])
def test_a_strategy_that_accumulates_by_itself_is_refused(technique):
    trainer = trainer_of(stock.SingleDeviceStrategy, handles_gradient_accumulation=True)
    message = "does not work under Mine, which accumulates gradients by itself"
    with pytest.raises(MisconfigurationException, match=message):
        check_strategy(trainer, technique)
    check_strategy(trainer, "EMA")


def test_before_its_mesh_is_made_a_strategy_is_taken_for_one_without_tensor_parallelism():
    trainer = trainer_of(stock.ModelParallelStrategy, _device_mesh=None)
    assert known_as(trainer.strategy) == FSDP2
    assert forwards_are_collective(trainer.strategy)
    assert not forwards_are_collective(trainer_of(stock.DDPStrategy).strategy)
    assert known_as(object()) == ""
