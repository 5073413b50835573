"""Curves for any hyper-parameter and for each group, and groups by depth; closed forms of DINO, MAE and timm."""

import math

import lightning.pytorch as unified
import pytest
import torch
from torch import nn

from lightning_plugins import (
    Constant,
    Cosine,
    LearningRateScheduler,
    Linear,
    ScheduleLR,
    WarmupCosine,
    WarmupLinear,
    layerwise_decay,
)
from lightning_plugins.core.lightning import MisconfigurationException
from tests.support.training import RecordingSGD, loader, make_module, make_trainer


class Recorder(unified.Callback):
    """Notes an entry of every group inside the step."""

    def __init__(self, *names):
        self.names, self.seen = names, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append([tuple(group[name] for name in self.names) for group in optimizer.param_groups])

    def of(self, group, place=0):
        return [entry[group][place] for entry in self.seen]


def grouped(kind=torch.optim.AdamW, **options):
    """A module with the groups ``backbone`` and ``head``; the head's bias has no weight decay."""
    module = make_module()

    def configure_optimizers():
        groups = [
            {"params": [module.layer.weight], "name": "backbone", "lr": 0.1},
            {"params": [module.layer.bias], "name": "head", "lr": 0.02, "weight_decay": 0.0},
        ]
        module.optimizer = kind(groups, **{"weight_decay": 0.5, **options})
        return module.optimizer

    module.configure_optimizers = configure_optimizers
    return module


def fit(path, *callbacks, module=None, names=("lr", "weight_decay"), ckpt_path=None, save=None, **options):
    recorder, module = Recorder(*names), module or grouped()
    trainer = make_trainer(path, callbacks=[*callbacks, recorder], **{"max_epochs": 3, **options})
    trainer.fit(module, loader(4), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return recorder


# -- any hyper-parameter


def test_dinos_weight_decay_rises_and_a_group_without_keeps_none(tmp_path):
    decay = LearningRateScheduler(Cosine(None, 0.04, 0.4), parameter="weight_decay", base_lr=1.0, min_lr=0.01)
    seen = fit(tmp_path, decay, LearningRateScheduler(WarmupLinear(2)))
    # DINO: final + (base - final) (1 + cos(pi i / N)) / 2
    expected = [0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert seen.of(0, 1) == pytest.approx(expected)
    assert seen.of(1, 1) == [0.0] * 12
    assert seen.of(0) == pytest.approx([0.1 * WarmupLinear(2, total=12)(step) for step in range(12)])


@pytest.mark.parametrize(
    ("parameter", "kind", "options", "start"),
    [
        ("betas", torch.optim.AdamW, {"betas": (0.9, 0.95)}, 0.9),
        ("momentum", torch.optim.SGD, {"momentum": 0.8}, 0.8),
        ("eps", torch.optim.AdamW, {"eps": 1e-6}, 1e-6),
    ],
)
def test_momentum_the_first_beta_and_any_other_number(tmp_path, parameter, kind, options, start):
    callback = LearningRateScheduler(Linear(None, 1, 0.5), parameter=parameter, record=True)
    seen = fit(tmp_path, callback, module=grouped(kind, **options), names=(parameter, "lr"))
    expected = [start * (1 - 0.5 * step / 12) for step in range(12)]
    values = seen.of(0)
    if parameter == "betas":
        assert {value[1] for value in values} == {0.95}
        values = [value[0] for value in values]
    assert values == pytest.approx(expected)
    assert callback.lrs == pytest.approx([pytest.approx((value, value)) for value in expected])
    assert seen.of(0, 1) == [0.1] * 12


def test_a_beta_that_is_a_tensor_is_filled_in_place():
    beta = torch.tensor(0.8)
    optimizer = torch.optim.AdamW(
        [nn.Parameter(torch.ones(2))], lr=torch.tensor(0.1), betas=(beta, torch.tensor(0.9)), foreach=False
    )
    scheduler = ScheduleLR(optimizer, Linear(4, 1, 0), parameter="betas")
    scheduler.step()
    assert optimizer.param_groups[0]["betas"][0] is beta
    assert beta.item() == pytest.approx(0.6)
    beta.fill_(0.4)  # written elsewhere
    scheduler.step()
    assert beta.item() == pytest.approx(0.4 * 0.5 / 0.75)


def test_several_parameters_side_by_side_resume_exactly_in_any_order(tmp_path):
    def callbacks(order=1):
        return [
            LearningRateScheduler(WarmupCosine("20%")),
            LearningRateScheduler(Cosine(None, 1, 0.5), parameter="weight_decay"),
        ][::order]

    whole = fit(tmp_path, *callbacks()).seen
    fit(tmp_path, *callbacks(), max_epochs=2, save=tmp_path / "two.ckpt")
    for order in (1, -1):
        assert fit(tmp_path, *callbacks(order), ckpt_path=tmp_path / "two.ckpt").seen == whole[8:]
    assert len({callback.state_key for callback in callbacks()}) == 2


@pytest.mark.filterwarnings("ignore:.*LearningRateMonitor")
def test_lightnings_monitor_shows_both(tmp_path):
    monitor = unified.callbacks.LearningRateMonitor(log_momentum=False, log_weight_decay=True)
    decay = LearningRateScheduler(Linear(None, 1, 0), parameter="weight_decay")
    logger = unified.loggers.CSVLogger(tmp_path)
    fit(tmp_path, decay, LearningRateScheduler(Constant()), monitor, logger=logger, log_every_n_steps=1)
    table = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "lr-AdamW/backbone-weight_decay" in table.splitlines()[0]
    assert "0.25" in table  # half of 0.5, half way


@pytest.mark.parametrize("parameter", ["lr", "weight_decay"])
def test_two_of_one_parameter_are_refused(tmp_path, parameter):
    two = [LearningRateScheduler(Constant(), parameter=parameter, optimizer=index) for index in (None, 0)]
    with pytest.raises(MisconfigurationException, match=f"`{parameter}` of the AdamW is already scheduled by another"):
        fit(tmp_path, *two)


def test_torchs_cyclic_schedulers_drive_the_momentum_too(tmp_path):
    module = make_module(
        momentum=0.9,
        scheduler=lambda optimizer: {
            "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12),
            "interval": "step",
        },
    )
    with pytest.raises(MisconfigurationException, match="already scheduled, by a OneCycleLR"):
        fit(tmp_path, LearningRateScheduler(Constant(), parameter="momentum"), module=module, names=("lr",))


@pytest.mark.parametrize("parameter", ["", 3, None])
def test_a_parameter_is_a_name(parameter):
    with pytest.raises(TypeError, match="`parameter` must be the name of an entry of the groups"):
        LearningRateScheduler(Constant(), parameter=parameter)


def test_a_parameter_that_the_groups_lack_is_an_error_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"got 'momentum'; there are .*weight_decay"):
        fit(tmp_path, LearningRateScheduler(Constant(), parameter="momentum"))


# -- a curve for each group


@pytest.mark.parametrize("keys", [("backbone", "head"), (0, 1), ("backbone", 1)])
def test_each_group_follows_its_own_curve(tmp_path, keys):
    curves = {keys[0]: WarmupCosine("25%"), keys[1]: Linear(None, 1, 0)}
    callback = LearningRateScheduler(curves, record=True)
    seen = fit(tmp_path, callback)
    assert seen.of(0) == pytest.approx([0.1 * WarmupCosine(3, total=12)(step) for step in range(12)])
    assert seen.of(1) == pytest.approx([0.02 * (1 - step / 12) for step in range(12)])
    assert callback.resolved == {keys[0]: WarmupCosine(3, total=12), keys[1]: Linear(12, 1, 0)}
    assert callback.lrs == [tuple(rate for rate, _ in entry) for entry in seen.seen]


def test_groups_that_are_not_named_keep_their_rate_and_may_be_written(tmp_path):
    class Write(unified.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.optimizers[0].param_groups[1]["lr"] = 0.5 + trainer.current_epoch

    seen = fit(tmp_path, LearningRateScheduler({"backbone": Linear(None, 1, 0)}), Write())
    assert seen.of(0) == pytest.approx([0.1 * (1 - step / 12) for step in range(12)])
    assert seen.of(1) == [0.5] * 4 + [1.5] * 4 + [2.5] * 4


def test_several_callbacks_may_drive_different_groups_and_overlaps_are_refused(tmp_path):
    parts = [LearningRateScheduler({"backbone": Linear(None, 1, 0)}), LearningRateScheduler({1: Linear(None, 1, 0.5)})]
    assert parts[0].state_key != parts[1].state_key
    seen = fit(tmp_path, *parts)
    assert seen.of(0) == pytest.approx([0.1 * (1 - step / 12) for step in range(12)])
    assert seen.of(1) == pytest.approx([0.02 * (1 - 0.5 * step / 12) for step in range(12)])
    for other in (LearningRateScheduler({0: Constant()}), LearningRateScheduler(Constant())):
        with pytest.raises(MisconfigurationException, match="already scheduled by another"):
            fit(tmp_path, LearningRateScheduler({"backbone": Constant()}), other)


def test_groups_with_curves_of_their_own_resume_exactly_and_go_on_when_the_run_changes(tmp_path):
    def ours():
        return LearningRateScheduler({"backbone": WarmupCosine("25%"), "head": Linear(None, 1, 0)})

    whole = fit(tmp_path, ours()).seen
    fit(tmp_path, ours(), max_epochs=2, save=tmp_path / "two.ckpt")
    assert fit(tmp_path, ours(), ckpt_path=tmp_path / "two.ckpt").seen == whole[8:]
    seen = fit(tmp_path, ours(), ckpt_path=tmp_path / "two.ckpt", accumulate_grad_batches=2)
    assert seen.of(1) == pytest.approx([0.02 * (1 / 3) * (1 - step / 2) for step in range(2)])
    assert seen.of(0)[0] == pytest.approx(0.1 * WarmupCosine(3, total=12)(8))


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ({}, ValueError, "`schedule` must name at least one group"),
        ({"backbone": 3}, TypeError, r"`schedule\['backbone'\]` must be a Schedule"),
        ({-1: Constant()}, ValueError, "`schedule: the index of a group` must be at least 0, got -1"),
        ({1.5: Constant()}, TypeError, "`schedule: the index of a group` must be a whole number, got 1.5"),
        ({"trunk": Constant()}, ValueError, r"got 'trunk'; there are 0 \('backbone'\), 1 \('head'\)"),
        ({"head": Constant(), 2: Constant()}, ValueError, "name groups of the optimizer, got 2; there are"),
        ({"head": Constant(), 1: Constant()}, ValueError, "must name each group once, got 1 again"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(tmp_path, schedule, error, message):
    with pytest.raises(error, match=message):
        fit(tmp_path, LearningRateScheduler(schedule))


# -- groups by depth


class Transformer(nn.Module):
    """The parts of a vision transformer, in the order in which timm and MAE define them."""

    def __init__(self, depth=3):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 5, 4))
        self.patch_embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)


def rate_of(module, groups, name):
    weight = module.get_parameter(name)
    [rate] = [group["lr"] for group in groups if any(weight is found for found in group["params"])]
    return rate


@pytest.mark.parametrize("decay", [0.65, 0.9, 1.0])
def test_a_transformers_layers_are_those_of_mae(decay):
    module = Transformer(3)
    groups = layerwise_decay(module, 0.001, decay)
    # MAE: 0 for the embeddings, i + 1 for block i, depth + 1 for the rest; lr_scale = decay^(depth + 1 - layer)
    layers = {"cls_token": 0, "pos_embed": 0, "patch_embed.weight": 0, "norm.bias": 4, "head.weight": 4}
    layers |= {f"blocks.{index}.weight": index + 1 for index in range(3)}
    for name, layer in layers.items():
        assert rate_of(module, groups, name) == pytest.approx(0.001 * decay ** (4 - layer))
    assert [group["name"] for group in groups] == ["input", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    RecordingSGD(groups, lr=1.0)


def test_a_module_inside_another_and_frozen_or_shared_weights():
    class Wrapped(unified.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Transformer(2)
            self.model.patch_embed.requires_grad_(False)
            self.model.head.weight = self.model.norm.weight

    module = Wrapped()
    groups = layerwise_decay(module, 1.0, 0.5)
    assert [group["name"] for group in groups] == ["input", "model.blocks.0", "model.blocks.1", "head"]
    assert [group["lr"] for group in groups] == [0.125, 0.25, 0.5, 1.0]
    assert len(groups[-1]["params"]) == 3


def test_a_given_order_is_followed_by_the_longest_name():
    module = Transformer(2)
    order = ["patch_embed", "cls_token", "pos_embed", "blocks", "blocks.1", "norm", "head"]
    groups = layerwise_decay(module, 1.0, 0.5, order=order)
    assert [group["name"] for group in groups] == order
    assert rate_of(module, groups, "blocks.1.bias") == 0.25
    assert rate_of(module, groups, "blocks.0.bias") == 0.125


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("net", 1, 1), {}, TypeError, "`module` must be a torch module, got 'net'"),
        ((Transformer(), 0, 1), {}, ValueError, "`base_lr` must be above 0, got 0"),
        ((Transformer(), 1, 1.1), {}, ValueError, "`decay` must be above 0 and at most 1, got 1.1"),
        ((Transformer(), 1, 1), {"order": ["head"]}, ValueError, "place for every parameter, got none for 'cls_token'"),
        ((nn.Linear(2, 2), 1, 1), {"order": ["weight", "bias", "x"]}, ValueError, "got 'x', which has none"),
        ((Transformer(), 1, 1), {"order": "head"}, TypeError, "`order` must be a list, got 'head'"),
    ],
)
def test_what_has_no_place_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        layerwise_decay(*arguments, **options)


def test_scales_are_those_of_timm():
    optim = pytest.importorskip("timm.optim")
    module = Transformer(4)
    module.no_weight_decay = set
    module.group_matcher = lambda coarse=False: {
        "stem": r"^cls_token|pos_embed|patch_embed",
        "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
    }
    theirs = optim.param_groups_layer_decay(module, weight_decay=0.0, layer_decay=0.75)
    ours = layerwise_decay(module, 1.0, 0.75)
    for group in theirs:
        for weight in group["params"]:
            [rate] = [mine["lr"] for mine in ours if any(weight is found for found in mine["params"])]
            assert rate == pytest.approx(group["lr_scale"])
