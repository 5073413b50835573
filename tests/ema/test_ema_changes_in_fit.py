"""What a fit holds on to may be exchanged while it runs: parameters, their names, the optimizer, the weights."""

import lightning.pytorch as unified
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from torch import nn
from torch.nn.utils import parametrize

from lightning_plugins import EMA, ConstantDecay, PostHocEMA, extract_weights, synthesize_ema
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.ema.snapshots import list_snapshots
from tests.support.ema_runs import THETA, Script, Scripted, clone_state, follow, numbers, regression, same, trainer


class Wide(unified.LightningModule):
    """A backbone and a head, trained by SGD in small steps."""

    def __init__(self, lr=0.01):
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class At(unified.Callback):
    """Calls a function of Trainer and module once, at the start of a batch, or of an epoch."""

    def __init__(self, step, act, *, batch=False):
        self.step, self.act, self.batch, self.done = step, act, batch, False

    def _meet(self, trainer, pl_module):
        if trainer.global_step == self.step and not self.done:
            self.done = True
            self.act(trainer, pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        if not self.batch:
            self._meet(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, *args):
        if self.batch:
            self._meet(trainer, pl_module)


class Weights(unified.Callback):
    """Notes a copy of every parameter after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def averaged(start, seen, name, decay=0.9):
    """The average of a tensor by the formula, in float64."""
    shadow = start.double()
    for weights in seen:
        shadow = decay * shadow + (1 - decay) * weights[name].double()
    return shadow.float()


def new_head(trainer, module):
    """As a user would: another layer, and its parameters in the optimizer."""
    old = {id(parameter) for parameter in module.head.parameters()}
    module.head = nn.Linear(4, 1)
    nn.init.constant_(module.head.weight, 3.0)
    group = trainer.optimizers[0].param_groups[0]
    kept = [parameter for parameter in group["params"] if id(parameter) not in old]
    group["params"] = kept + list(module.head.parameters())


# -- parameters


@pytest.mark.parametrize("batch", [False, True], ids=["at an epoch's beginning", "in mid-epoch"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_replaced_parameter_is_followed_from_its_own_value(tmp_path, caplog, batch, first):
    module, ema, look = Wide(), EMA(ConstantDecay(0.9)), Weights()
    change = At(11 if batch else 16, new_head, batch=batch)
    callbacks = [change, ema, look] if first else [ema, change, look]
    files = ModelCheckpoint(tmp_path, filename="x")
    with caplog.at_level("INFO"):
        trainer(*callbacks, files, max_epochs=4).fit(module, regression(), regression(8))
    after = look.seen[11 if batch else 16 :]
    expected = averaged(torch.full((1, 4), 3.0), after, "head.weight")
    # in mid-epoch the change is noticed when the first step of the new head has been taken
    if batch:
        expected = averaged(after[0]["head.weight"], after[1:], "head.weight")
    average, raw = extract_weights(tmp_path / "x.ckpt"), extract_weights(tmp_path / "x.ckpt", "raw")
    torch.testing.assert_close(average["head.weight"], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(raw["head.weight"], look.seen[-1]["head.weight"])
    assert torch.equal(module.head.weight, average["head.weight"])
    assert caplog.text.count("head.weight, head.bias was replaced: its average begins anew") == 1
    whole = averaged(Wide().backbone[0].weight.detach(), look.seen, "backbone.0.weight")
    torch.testing.assert_close(average["backbone.0.weight"], whole, rtol=1e-5, atol=1e-6)


def test_a_parameter_replaced_in_validation_is_in_the_file_and_trained_on(tmp_path):
    class Replace(unified.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                new_head(trainer, pl_module)

    module, ema, files = Wide(), EMA(0.9), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(ema, Replace(), files, max_epochs=3).fit(module, regression(), regression(8))
    for which in ("raw", "average"):
        found = extract_weights(tmp_path / "epoch=1.ckpt", which)
        assert found["head.weight"].tolist() == [[3.0] * 4], which
    assert not torch.equal(ema.raw_state_dict()["head.weight"], torch.full((1, 4), 3.0))


def test_a_head_of_another_shape_is_followed_too():
    def wider(trainer, module):
        new_head(trainer, module)
        module.head.weight = nn.Parameter(torch.ones(3, 4))
        module.head.bias = nn.Parameter(torch.zeros(3))

    module, ema = Wide(), EMA(0.9)
    with pytest.warns(UserWarning, match="target size"):
        trainer(ema, At(8, wider), max_epochs=2).fit(module, regression(), regression(8))
    assert ema.average_state_dict()["head.weight"].shape == (3, 4)


def test_untied_weights_are_followed_as_two():
    class Tied(Wide):
        def __init__(self):
            super().__init__()
            self.twin = nn.Linear(4, 1)
            self.twin.weight = self.head.weight

        def forward(self, x):
            features = self.backbone(x)
            return self.head(features) + self.twin(features)

    def untie(trainer, module):
        module.twin.weight = nn.Parameter(torch.full((1, 4), 2.0))
        trainer.optimizers[0].param_groups[0]["params"].append(module.twin.weight)

    module, ema, look = Tied(), EMA(ConstantDecay(0.9)), Weights()
    start = module.head.weight.detach().clone()
    trainer(At(8, untie), ema, look, max_epochs=2).fit(module, regression())
    average = ema.average_state_dict()
    expected = averaged(torch.full((1, 4), 2.0), look.seen[8:], "twin.weight")
    torch.testing.assert_close(average["twin.weight"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(average["head.weight"], averaged(start, look.seen, "head.weight"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda _: EMA(0.9), lambda path: PostHocEMA(every_n_steps=4, dirpath=path)])
def test_a_parameter_that_is_taken_out_is_refused_by_name(tmp_path, make):
    def take_out(trainer, module):
        del module.backbone[2]
        module.head = nn.Linear(8, 1)

    with pytest.raises(RuntimeError, match=r"'backbone.2.weight', 'backbone.2.bias' was removed while"):
        trainer(make(tmp_path), At(8, take_out), max_epochs=2).fit(Wide(), regression())


class Scale(nn.Module):
    def forward(self, weight):
        return weight * 1.0


def test_a_parametrized_weight_is_followed_under_its_new_name(caplog):
    def wrap(trainer, module):
        parametrize.register_parametrization(module.head, "weight", Scale())

    module, ema, look = Wide(), EMA(ConstantDecay(0.9)), Weights()
    start = module.head.weight.detach().clone()
    with caplog.at_level("INFO"):
        trainer(At(8, wrap), ema, look, max_epochs=2).fit(module, regression(), regression(8))
    name = "head.parametrizations.weight.original"
    seen = [{name: weights.get(name, weights.get("head.weight"))} for weights in look.seen]
    torch.testing.assert_close(ema.average_state_dict()[name], averaged(start, seen, name), rtol=1e-5, atol=1e-6)
    assert caplog.text.count(f"head.weight is now {name}") == 1


def test_a_parametrization_that_changes_the_value_begins_anew():
    class Exponential(nn.Module):
        def forward(self, weight):
            return weight.exp()

        def right_inverse(self, weight):
            return weight.abs().add(0.1).log()

    def wrap(trainer, module):
        parametrize.register_parametrization(module.head, "weight", Exponential())

    module, ema, look = Wide(), EMA(ConstantDecay(0.9)), Weights()
    begun = []
    note = At(8, lambda _, module: begun.append(module.head.parametrizations.weight.original.detach().clone()))
    trainer(At(8, wrap), note, ema, look, max_epochs=2).fit(module, regression())
    name = "head.parametrizations.weight.original"
    expected = averaged(begun[0], look.seen[8:], name)
    torch.testing.assert_close(ema.average_state_dict()[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_pruned_weights_are_followed_and_files_hold_them_pruned(tmp_path, first):
    module, ema, look = Wide(), EMA(ConstantDecay(0.9)), Weights()
    start = module.head.weight.detach().clone()
    pruning, files = ModelPruning("l1_unstructured", amount=0.5), ModelCheckpoint(tmp_path, filename="x")
    callbacks = [ema, pruning] if first else [pruning, ema]
    trainer(*callbacks, look, files, max_epochs=3).fit(module, regression(), regression(8))
    seen = [{"head.weight": w.get("head.weight", w.get("head.weight_orig"))} for w in look.seen]
    expected = averaged(start, seen, "head.weight")
    for found in (ema.average_state_dict(), extract_weights(tmp_path / "x.ckpt")):
        weight = found["head.weight"]
        kept = weight != 0
        assert 0 < int(kept.sum()) < 4
        torch.testing.assert_close(weight[kept], expected[kept], rtol=1e-5, atol=1e-6)
    raw = extract_weights(tmp_path / "x.ckpt", "raw")["head.weight"]
    assert torch.equal(raw, seen[-1]["head.weight"] * (raw != 0))
    assert 0 < int((module.head.weight != 0).sum()) < 4
    again = EMA(ConstantDecay(0.9))
    trainer(again, max_epochs=3).fit(Wide(), regression(), ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(again.raw_state_dict()["head.weight"], raw)


def test_post_hoc_snapshots_follow_pruned_weights(tmp_path):
    post = PostHocEMA(every_n_steps=4, dirpath=tmp_path / "snapshots")
    files = ModelCheckpoint(tmp_path, filename="x")
    module = Wide()
    trainer(post, ModelPruning("l1_unstructured", amount=0.5), files, max_epochs=3).fit(module, regression())
    assert [snapshot.step for snapshot in list_snapshots(tmp_path / "snapshots")] == [4, 8, 12, 16, 20, 24]
    assert all(torch.isfinite(value).all() for value in synthesize_ema(tmp_path / "snapshots", 0.08).values())
    trainer(PostHocEMA(every_n_steps=4, dirpath=tmp_path / "snapshots"), max_epochs=4).fit(
        Wide(), regression(), ckpt_path=tmp_path / "x.ckpt"
    )


def test_post_hoc_synthesis_uses_a_replaced_parameter_since_it_was_replaced(tmp_path):
    """Two snapshots before the new head and many after: the average of its weights alone."""
    post, look = PostHocEMA((0.1,), every_n_steps=4, dirpath=tmp_path), Weights()
    trainer(post, look, At(8, new_head), max_epochs=3).fit(Wide(), regression())
    found = synthesize_ema(tmp_path, 0.1)["head.weight"]
    shadow = torch.full((1, 4), 3.0, dtype=torch.float64)
    for n, weights in enumerate(look.seen[8:], start=9):
        decay = post.rules[0](n)
        shadow = decay * shadow + (1 - decay) * weights["head.weight"]
    torch.testing.assert_close(found, shadow.float(), rtol=1e-5, atol=1e-6)


# -- weights that become trainable


def frozen_backbone():
    module = Wide()
    module.backbone.requires_grad_(False)
    return module


@pytest.mark.parametrize("checkpoint", ["average", "raw"])
def test_weights_unfrozen_on_resume_join_as_they_are(tmp_path, caplog, checkpoint):
    files = ModelCheckpoint(tmp_path, filename="x")
    trainer(EMA(ConstantDecay(0.9), checkpoint=checkpoint), files, max_epochs=2).fit(frozen_backbone(), regression())
    module, ema, look = Wide(), EMA(ConstantDecay(0.9), checkpoint=checkpoint), Weights()
    start = module.backbone[0].weight.detach().clone()
    with caplog.at_level("INFO"):
        trainer(ema, look, max_epochs=4).fit(module, regression(), ckpt_path=tmp_path / "x.ckpt")
    expected = averaged(start, look.seen, "backbone.0.weight")
    torch.testing.assert_close(ema.average_state_dict()["backbone.0.weight"], expected, rtol=1e-5, atol=1e-6)
    begun = extract_weights(tmp_path / "x.ckpt")["head.weight"]
    expected = averaged(begun, look.seen, "head.weight")
    torch.testing.assert_close(ema.average_state_dict()["head.weight"], expected, rtol=1e-5, atol=1e-6)
    assert caplog.text.count("joined: the average begins at the present value") == 1


def test_post_hoc_weights_unfrozen_on_resume_join(tmp_path):
    def run(module, epochs, **kwargs):
        post = PostHocEMA(every_n_steps=4, dirpath=tmp_path / "snapshots")
        trainer(post, ModelCheckpoint(tmp_path, filename="x"), max_epochs=epochs).fit(module, regression(), **kwargs)

    run(frozen_backbone(), 2)
    run(Wide(), 4, ckpt_path=tmp_path / "x.ckpt")
    state = synthesize_ema(tmp_path / "snapshots", 0.08)
    assert set(state) == set(Wide().state_dict())


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


# -- the optimizer


class NoHooks:
    """A wrapper around an optimizer that is none of torch's and fires no hook, as schedule-free ones are."""

    def __init__(self, base):
        self.base, self.param_groups, self.state, self.defaults = base, base.param_groups, base.state, base.defaults

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])
        return loss

    def zero_grad(self, set_to_none=True):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)


class NoInit(NoHooks, torch.optim.Optimizer):
    """One of torch's without its ``__init__``, as timm's Lookahead is."""


@pytest.mark.parametrize("kind", [NoHooks, NoInit])
def test_optimizers_without_hooks_are_followed(kind):
    class Wrapped(Wide):
        def configure_optimizers(self):
            return kind(torch.optim.SGD(self.parameters(), lr=self.lr))

    module, ema, look = Wrapped(), EMA(ConstantDecay(0.9)), Weights()
    start = module.head.weight.detach().clone()
    fit = trainer(ema, look, max_epochs=2)
    fit.fit(module, regression(), regression(8))
    assert ema.state_dict()["last_update"] == 16
    expected = averaged(start, look.seen, "head.weight")
    torch.testing.assert_close(ema.average_state_dict()["head.weight"], expected, rtol=1e-5, atol=1e-6)
    assert "step" not in vars(fit.optimizers[0])


def test_steps_by_hand_that_the_trainer_counts_are_followed(caplog):
    class ByHand(Wide):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            closure()
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.sub_(parameter.grad, alpha=self.lr)

    module, ema = ByHand(), EMA(0.9)
    with caplog.at_level("INFO"):
        trainer(ema, max_epochs=2).fit(module, regression())
    assert ema.state_dict()["last_update"] == 16
    assert caplog.text.count("SGD does not announce its steps") == 1


def test_steps_that_a_module_leaves_out_do_not_tick():
    class LeavesOut(Wide):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            if batch_idx % 2:
                optimizer.step(closure)
            else:
                closure()

    module, ema = LeavesOut(), EMA(0.9)
    fit = trainer(ema, max_epochs=2)
    fit.fit(module, regression())
    assert fit.global_step == 16
    assert ema.state_dict()["last_update"] == 8


@pytest.mark.parametrize("batch", [False, True], ids=["at an epoch's beginning", "in mid-epoch"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_exchanged_optimizer_is_followed(tmp_path, caplog, batch, first):
    def exchange(trainer, module):
        trainer.strategy.setup_optimizers(trainer)

    module, ema, look = Wide(), EMA(ConstantDecay(0.9)), Weights()
    post = PostHocEMA(every_n_steps=8, dirpath=tmp_path)
    start = module.head.weight.detach().clone()
    change = At(11 if batch else 8, exchange, batch=batch)
    with caplog.at_level("INFO"):
        trainer(*([change, ema, post] if first else [ema, post, change]), look, max_epochs=3).fit(module, regression())
    assert ema.state_dict()["last_update"] == 24
    expected = averaged(start, look.seen, "head.weight")
    torch.testing.assert_close(ema.average_state_dict()["head.weight"], expected, rtol=1e-5, atol=1e-6)
    assert [snapshot.step for snapshot in list_snapshots(tmp_path)] == [8, 16, 24]
    assert caplog.text.count("EMA(name='ema'): another optimizer was set up") == 1


def test_an_optimizer_exchanged_inside_a_batch_loses_no_step():
    class Exchanges(Wide):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 5:
                self.trainer.strategy.setup_optimizers(self.trainer)
            return super().training_step(batch, batch_idx)

    ema = EMA(0.9)
    fit = trainer(ema, max_epochs=2)
    fit.fit(Exchanges(), regression())
    assert ema.state_dict()["last_update"] == fit.global_step


# -- weights that are restored in mid-fit


@pytest.mark.parametrize("checkpoint", ["average", "raw"])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_checkpoint_restored_in_mid_fit_restores_both_sets(tmp_path, checkpoint, where):
    """As finetuning-scheduler does: the strategy loads the weights, no callback is asked."""

    def restore(trainer, module):
        trainer.strategy.load_model_state_dict(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True))

    class InValidation(unified.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            if trainer.current_epoch == 1:
                restore(trainer, pl_module)

    module, ema, look = Wide(), EMA(ConstantDecay(0.9), checkpoint=checkpoint), Weights()
    files = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    restoring = At(16, restore) if where == "training" else InValidation()
    trainer(ema, restoring, look, files, max_epochs=3).fit(module, regression(), regression(8))
    average = extract_weights(tmp_path / "epoch=0.ckpt")["head.weight"]
    expected = averaged(average, look.seen[16:], "head.weight")
    torch.testing.assert_close(ema.average_state_dict()["head.weight"], expected, rtol=1e-5, atol=1e-6)
    raw = extract_weights(tmp_path / "epoch=0.ckpt", "raw")

    twin, again = Wide(), Weights()
    twin.load_state_dict(raw)
    trainer(again).fit(twin, regression())
    assert torch.equal(look.seen[-1]["head.weight"], again.seen[-1]["head.weight"])
    assert ema.state_dict()["last_update"] == 16  # 8 of the file and 8 since


def test_plain_weights_loaded_in_mid_fit_begin_a_new_average(caplog):
    def load(trainer, module):
        ones = {name: torch.ones_like(value) for name, value in module.state_dict().items()}
        trainer.strategy.load_model_state_dict({"state_dict": ones})

    module, ema, look = Wide(lr=1e-5), EMA(ConstantDecay(0.9)), Weights()
    with caplog.at_level("INFO"):
        trainer(ema, At(8, load), look, max_epochs=2).fit(module, regression(), regression(8))
    expected = averaged(torch.ones(1, 4), look.seen[8:], "head.weight")
    torch.testing.assert_close(ema.average_state_dict()["head.weight"], expected)
    assert caplog.text.count("weights without an average were loaded; the average begins anew") == 1


def test_post_hoc_averages_are_restored_in_mid_fit(tmp_path):
    def restore(trainer, module):
        trainer.strategy.load_model_state_dict(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True))

    post = PostHocEMA(every_n_steps=4, dirpath=tmp_path / "snapshots")
    files = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(post, At(16, restore), files, max_epochs=3).fit(Wide(), regression())
    assert [snapshot.step for snapshot in list_snapshots(tmp_path / "snapshots")] == [4, 8, 12, 16]
    assert (tmp_path / "snapshots" / "superseded-1").is_dir()
    assert post.state_dict()["last_update"] == 16


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_learning_rate_search_in_mid_fit_leaves_no_trace(tmp_path, first):
    class AtMilestone(LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    def run(*callbacks):
        module, ema = Wide(), EMA(ConstantDecay(0.9))
        post = PostHocEMA(every_n_steps=8, dirpath=tmp_path / str(len(callbacks)))
        order = [*callbacks, ema, post] if first else [ema, post, *callbacks]
        trainer(*order, max_epochs=3, default_root_dir=tmp_path, enable_checkpointing=True).fit(module, regression())
        return ema, post

    (plain, plain_post), (searched, post) = (
        run(),
        run(AtMilestone(num_training_steps=5, update_attr=False, early_stop_threshold=None)),
    )
    assert searched.state_dict() == plain.state_dict()
    assert same(searched.average_state_dict(), plain.average_state_dict())
    assert same(searched.raw_state_dict(), plain.raw_state_dict())
    steps = [[snapshot.step for snapshot in list_snapshots(found.dirpath)] for found in (plain_post, post)]
    assert steps == [[8, 16, 24]] * 2


# -- writers


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_lightnings_own_averaging_beside_it_is_refused(first):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    for other in (StochasticWeightAveraging(swa_lrs=0.01), EMAWeightAveraging()):
        callbacks = [other, EMA(0.9)] if first else [EMA(0.9), other]
        with pytest.raises(MisconfigurationException, match=f"must be the only callback .* got {type(other).__name__}"):
            trainer(*callbacks).fit(Wide(), regression())


def test_an_optimizer_that_writes_into_the_average_in_evaluation_is_warned_about():
    class ScheduleFree(Wide):
        def on_validation_epoch_start(self):
            with torch.no_grad():
                self.head.weight.add_(1.0)

        def on_validation_epoch_end(self):
            with torch.no_grad():
                self.head.weight.sub_(1.0)

    with pytest.warns(LightningPluginsWarning, match="the average was written into while it was evaluated"):
        trainer(EMA(0.9)).fit(ScheduleFree(), regression(), regression(8))
    trainer(EMA(0.9, evaluate="raw")).fit(ScheduleFree(), regression(), regression(8))


def test_another_average_shown_in_an_evaluation_is_no_write():
    class Look(unified.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            with other.averaged(pl_module):
                pass

    other = EMA(0.5, name="b", evaluate="raw", checkpoint="raw", after_fit="raw")
    trainer(EMA(0.9), other, Look()).fit(Wide(), regression(), regression(8))


def test_scripted_runs_are_what_they_were():
    """A run in which nothing changes: the formula, bit for bit as in float64 rounded at each step."""

    class Double(Scripted):
        def configure_optimizers(self):
            return Script(self.parameters(), THETA)

    module, ema = Double().double(), EMA(ConstantDecay(0.5))
    trainer(ema, precision="64-true").fit(module, numbers(10))
    assert ema.average_state_dict()["weight"].item() == follow(THETA, [0.5] * 10)[-1]
