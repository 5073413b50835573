"""What tensors are called in files, which kinds can be averaged, and averages that became NaN."""

import lightning.pytorch as unified
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_plugins import EMA, ConstantDecay, PostHocEMA, extract_weights, synthesize_ema
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.ema_changes import Weights, Wide, averaged
from tests.support.ema_runs import clone_state, regression, same, trainer

# -- names in files


class Renaming(nn.Module):
    """A wrapper whose state-dict hook takes its own name out again, as activation checkpointing does."""

    def __init__(self, inner):
        super().__init__()
        self.wrapped = inner
        self._register_state_dict_hook(self._rename)
        self._register_load_state_dict_pre_hook(self._rename_back)

    @staticmethod
    def _rename(module, state, prefix, metadata):
        for key in [key for key in state if key.startswith(f"{prefix}wrapped.")]:
            state[prefix + key.removeprefix(f"{prefix}wrapped.")] = state.pop(key)

    @staticmethod
    def _rename_back(state, prefix, *args):
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{prefix}wrapped.{key.removeprefix(prefix)}"] = state.pop(key)

    def forward(self, x):
        return self.wrapped(x)


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


@pytest.mark.parametrize("wrap", [Renaming, checkpointed], ids=["a hook", "activation checkpointing"])
def test_files_name_tensors_as_the_state_dict_does(tmp_path, wrap):
    def wrapped():
        module = Wide()
        module.backbone[0] = wrap(module.backbone[0])
        return module

    plain, ema = Wide(), EMA(0.9)
    trainer(ema, ModelCheckpoint(tmp_path / "plain", filename="x"), max_epochs=2).fit(plain, regression())
    module, again = wrapped(), EMA(0.9)
    trainer(again, ModelCheckpoint(tmp_path / "wrapped", filename="x"), max_epochs=2).fit(module, regression())
    for which in ("average", "raw"):
        expected = extract_weights(tmp_path / "plain" / "x.ckpt", which)
        found = extract_weights(tmp_path / "wrapped" / "x.ckpt", which)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])
        assert same(getattr(again, f"{which}_state_dict")(), found)
    resumed = EMA(0.9)
    trainer(resumed, max_epochs=2).fit(wrapped(), regression(), ckpt_path=tmp_path / "wrapped" / "x.ckpt")
    assert same(resumed.average_state_dict(), again.average_state_dict())


def test_an_averaged_tensor_without_a_place_in_the_state_dict_is_refused():
    module = Wide()
    module.head._register_state_dict_hook(lambda _, state, prefix, __: state.pop(f"{prefix}weight"))
    with pytest.raises(
        ValueError, match=r"`Linear.weight` must have a place in the module's state_dict to be averaged"
    ):
        trainer(EMA(0.9)).fit(module, regression())


def test_a_state_dict_of_the_users_own_without_arguments_is_read_by_memory():
    class Own(Wide):
        def state_dict(self):
            return {name: parameter.detach() for name, parameter in self.named_parameters()}

    module, ema = Own(), EMA(0.9)
    trainer(ema).fit(module, regression(), regression(8))
    assert set(ema.average_state_dict()) == {name for name, _ in module.named_parameters()}
    assert not same(ema.average_state_dict(), ema.raw_state_dict())


def test_extra_state_of_a_module_is_passed_on():
    class Counted(nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            pass

    module, ema = Wide(), EMA(0.9)
    module.head = Counted(4, 1)
    trainer(ema).fit(module, regression(), regression(8))
    assert ema.average_state_dict()["head._extra_state"] == {"seen": 3}


# -- kinds of tensors


class Eights(torch.Tensor):
    """A weight in 8 bits that answers every operation with a plain tensor, as torchao's do."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data, scale):
        self.data8, self.scale = data, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Eights(args[0].data8, args[0].scale)

        def plain(x):
            return x.data8.float() * x.scale if isinstance(x, Eights) else x

        return func(*torch.utils._pytree.tree_map(plain, args), **(kwargs or {}))


def quantized(requires_grad=False):
    module = Wide()
    weight = Eights(torch.randint(-100, 100, (8, 4), dtype=torch.int8), 0.01)
    module.backbone[0].weight = nn.Parameter(weight, requires_grad=requires_grad)
    return module


def test_frozen_quantized_weights_are_left_alone():
    module, ema = quantized(), EMA(0.9)
    trainer(ema, max_epochs=2).fit(module, regression(), regression(8))
    assert isinstance(ema.average_state_dict()["backbone.0.weight"], Eights)
    assert "backbone.2.weight" in ema.average_state_dict()


def test_trainable_quantized_and_sparse_weights_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"`backbone.0.weight` must be a dense tensor to be averaged, got Eights"):
        trainer(EMA(0.9)).fit(quantized(requires_grad=True), regression())
    with pytest.raises(MisconfigurationException, match=r"write every weight into a snapshot, but `backbone.0.weight`"):
        trainer(PostHocEMA(dirpath=tmp_path)).fit(quantized(), regression())


# -- the average became NaN


class BadStep(unified.Callback):
    """One step makes every weight NaN, and the weights of before are put back."""

    def __init__(self, kept=(), value=float("inf")):
        self.kept, self.value = kept, value

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4 and not hasattr(self, "before"):
            self.before = clone_state(pl_module)
            batch[1].mul_(self.value)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if not torch.isfinite(pl_module.head.weight).all():
            self.after = {name: value for name, value in self.before.items() if name not in self.kept}
            pl_module.load_state_dict(self.after, strict=False)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_average_that_became_nan_begins_anew_at_the_next_evaluation(value):
    module, ema, look = Wide(), EMA(ConstantDecay(0.9)), Weights()
    scores = []

    class Score(unified.Callback):
        def on_validation_end(self, trainer, pl_module):
            scores.append(float(trainer.callback_metrics["val_loss"]))

    with pytest.warns(LightningPluginsWarning, match=r"average of backbone.0.weight.* begins anew at the weights"):
        trainer(ema, BadStep(value=value), look, Score(), max_epochs=3).fit(module, regression(), regression(8))
    assert all(torch.isfinite(torch.tensor(scores)))
    expected = averaged(look.seen[7]["head.weight"], look.seen[8:], "head.weight")
    torch.testing.assert_close(ema.average_state_dict()["head.weight"], expected, rtol=1e-5, atol=1e-6)


def test_an_average_that_became_nan_begins_anew_in_a_file(tmp_path):
    files = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=6)
    with pytest.warns(LightningPluginsWarning, match="begins anew"):
        trainer(EMA(0.9), BadStep(), files).fit(Wide(), regression())
    assert all(torch.isfinite(value).all() for value in extract_weights(tmp_path / "x.ckpt").values())


def test_a_post_hoc_average_that_became_nan_begins_anew_in_a_snapshot(tmp_path):
    with pytest.warns(LightningPluginsWarning, match="begins anew"):
        trainer(PostHocEMA(every_n_steps=6, dirpath=tmp_path), BadStep()).fit(Wide(), regression())
    assert all(torch.isfinite(value).all() for value in synthesize_ema(tmp_path, 0.08).values())
