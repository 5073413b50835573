"""Parameters that are replaced, moved, pruned, unfrozen or taken out while they are averaged."""

import lightning.pytorch as unified
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn
from torch.nn.utils import parametrize

from lightning_plugins import EMA, ConstantDecay, PostHocEMA, extract_weights, synthesize_ema
from lightning_plugins.ema.checkpoint_format import follow_pruning
from lightning_plugins.ema.snapshots import list_snapshots
from tests.support.ema_changes import At, Weights, Wide, averaged, new_head
from tests.support.ema_runs import regression, trainer


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


def test_what_is_noticed_in_mid_epoch_is_said_at_once(caplog):
    said = []

    class Look(unified.Callback):
        def on_train_batch_end(self, *_):
            said.append("head.weight, head.bias was replaced" in caplog.text)

    with caplog.at_level("INFO"):
        trainer(EMA(0.9), At(3, new_head, batch=True), Look()).fit(Wide(), regression())
    assert said == [False] * 3 + [True] * 5


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


@pytest.mark.parametrize(
    ("kept", "masked", "found"),
    [
        (["head.weight_orig", "head.weight_mask"], True, {"head.weight_orig": [1, 2, 3, 4]}),
        (["head.weight"], True, {"head.weight": [0, 2, 3, 0]}),
        # a file from which the layer was left out, and a weight that is called so without pruning
        ([], True, {"head.weight_orig": [1, 2, 3, 4]}),
        (["head.weight"], False, {"head.weight_orig": [1, 2, 3, 4]}),
    ],
)
def test_an_average_is_pruned_only_where_the_file_is(kept, masked, found):
    module = Wide()
    if masked:
        module.head.register_buffer("weight_mask", torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    tensors = {"head.weight_orig": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
    follow_pruning(dict.fromkeys(kept), module, tensors)
    assert {name: tensor[0].tolist() for name, tensor in tensors.items()} == found


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


def test_post_hoc_synthesis_of_a_replaced_parameter_has_nothing_of_the_old_one(tmp_path):
    """Weights that stand still: whatever the length, the average is the new parameter."""
    trainer(PostHocEMA(every_n_steps=2, dirpath=tmp_path), At(8, new_head), max_epochs=2).fit(
        Wide(lr=0.0), regression()
    )
    for sigma_rel in (0.06, 0.08, 0.15, 0.2):
        found = synthesize_ema(tmp_path, sigma_rel)["head.weight"]
        torch.testing.assert_close(found, torch.full((1, 4), 3.0), rtol=1e-6, atol=1e-6)


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
