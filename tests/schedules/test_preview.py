"""A look at a whole callback before training: the values of every group, those of the training that follows."""

import copy

import lightning.pytorch as unified
import pytest
import torch
from torch import nn

from lightning_plugins import Constant, Cosine, LearningRateScheduler, Linear, ScheduleLR, WarmupCosine, WarmupLinear
from lightning_plugins.cli import main
from tests.support.training import loader, make_module, make_trainer

STEPS = 12


def optimizer_of(module, **options):
    groups = [
        {"params": [module.layer.weight], "name": "backbone", "lr": 0.1},
        {"params": [module.layer.bias], "name": "head", "lr": 0.02, "weight_decay": 0.0, "lr_scale": 0.5},
    ]
    return torch.optim.AdamW(groups, **{"weight_decay": 0.5, "betas": (0.8, 0.99), **options})


def trained(path, callback):
    """Train and return what each step had in each group, read inside the step."""
    module, seen = make_module(), {"backbone": [], "head": []}
    module.configure_optimizers = lambda: optimizer_of(module)

    class Note(unified.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for group in optimizer.param_groups:
                value = group[callback.parameter]
                seen[group["name"]].append(value[0] if isinstance(value, tuple) else value)

    make_trainer(path, callbacks=[callback, Note()], max_epochs=3).fit(module, loader(4))
    return seen


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (WarmupCosine("25%"), {}),
        (WarmupCosine("1ep", hold=2), {"min_lr": 0.015}),
        (WarmupLinear(2), {"base_lr": 0.3}),
        (WarmupLinear(2), {"base_lr": [0.3, 0.4], "min_lr": 1e-3}),
        ({"backbone": WarmupCosine("25%"), 1: Linear(None, 1, 0)}, {}),
        ({"head": Linear("2ep", 1, 0.5)}, {}),
        (Cosine(None, 0.04, 0.4), {"parameter": "weight_decay", "base_lr": 1.0, "min_lr": 0.1}),
        (Linear(None, 1, 0), {"parameter": "betas"}),
        ({0: Linear(None, 1, 2)}, {"parameter": "eps"}),
    ],
)
def test_a_preview_is_the_training_that_follows(tmp_path, schedule, options):
    optimizer = optimizer_of(make_module())
    before = copy.deepcopy(optimizer.state_dict())
    values = LearningRateScheduler(schedule, **options).preview(optimizer, STEPS, steps_per_epoch=4)
    assert values == trained(tmp_path, LearningRateScheduler(schedule, **options))
    assert optimizer.state_dict() == before
    assert not optimizer._optimizer_step_post_hooks


def test_groups_without_a_name_have_their_index_and_tensors_stay():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))], "lr": rate}, {"params": [nn.Parameter(torch.ones(1))]}], lr=0.1
    )
    values = LearningRateScheduler(Linear(None, 1, 0)).preview(optimizer, 2)
    assert values == {0: [0.5, 0.25], 1: [0.1, 0.05]}
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.5


def test_base_rates_that_an_earlier_scheduler_left_are_kept_as_in_training():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.4)
    scheduler = ScheduleLR(optimizer, Linear(4, 1, 0))
    scheduler.seek(2)
    assert LearningRateScheduler(Constant()).preview(optimizer, 1) == {0: [0.4]}


def test_over_time_each_step_is_an_equal_part():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    assert LearningRateScheduler(Linear(None, 1, 0), clock="time").preview(optimizer, 4) == {0: [1, 0.75, 0.5, 0.25]}
    many = LearningRateScheduler(Linear(None, 1, 0), clock="time").preview(optimizer, 3000)
    assert many == {0: pytest.approx([1 - step / 3000 for step in range(3000)], abs=1e-12)}
    with pytest.raises(ValueError, match="`warmup` must be a share of the time"):
        LearningRateScheduler(WarmupCosine(2), clock="time").preview(optimizer, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("AdamW", 10), TypeError, "`optimizer` must be a torch optimizer, got 'AdamW'"),
        ((None, -1), ValueError, "`total_steps` must be at least 0 steps, got -1"),
        ((None, 10, 0), ValueError, "`steps_per_epoch` must be above 0, got 0"),
        ((None, 1), ValueError, r"got 2 \+ 0 > 1 steps"),
    ],
)
def test_what_cannot_be_previewed(arguments, error, message):
    optimizer = arguments[0] or optimizer_of(make_module())
    with pytest.raises(error, match=message):
        LearningRateScheduler(WarmupCosine(2)).preview(optimizer, *arguments[1:])
    with pytest.raises(ValueError, match=r"got 'trunk'; there are 0 \('backbone'\)"):
        LearningRateScheduler({"trunk": Constant()}).preview(optimizer_of(make_module()), 3)


# -- pictures


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: axis, label and values of every line."""
    from matplotlib.axes import Axes

    lines, original, titled = [], Axes.plot, Axes.set_ylabel

    def note(self, steps, values, label):
        lines.append((self, label, list(steps), list(values)))
        return original(self, steps, values, label=label)

    titles = {}
    monkeypatch.setattr(Axes, "plot", note)
    monkeypatch.setattr(Axes, "set_ylabel", lambda self, text: titles.update({self: text}) or titled(self, text))
    return lambda: [(titles[axes], label, steps, values) for axes, label, steps, values in lines]


def test_a_picture_of_several_callbacks_has_a_panel_for_each_parameter(tmp_path, drawn):
    optimizer = optimizer_of(make_module())
    rates = LearningRateScheduler({"backbone": WarmupCosine("25%"), "head": Linear(None, 1, 0)})
    decay = LearningRateScheduler(Cosine(None, 1, 2), parameter="weight_decay")
    path = rates.plot(optimizer, STEPS, tmp_path / "new" / "run.svg", beside=[decay])
    expected = [("lr", rates), ("weight_decay", decay)]
    assert drawn() == [
        (title, name, list(range(STEPS)), values)
        for title, callback in expected
        for name, values in callback.preview(optimizer, STEPS).items()
    ]
    for text in ("backbone", "head", "weight_decay", "optimizer step"):
        assert f"<!-- {text} -->" in path.read_text()


def test_the_command_draws_parameters_and_groups_on_one_picture(tmp_path, drawn, capsys):
    arguments = [
        "lr/backbone=WarmupCosine('25%')",
        "lr/head = Linear(None, 1, 0)",
        "weight_decay=Cosine(None, 0.04, 0.4)",
    ]
    command = ["schedule", *arguments, "--total", "12", "--base-lr", "0.1", "--output", str(tmp_path / "run.png")]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.png'}\n"
    steps, decay = list(range(STEPS)), Cosine(12, 0.04, 0.4)
    assert drawn() == [
        ("lr", "backbone", steps, [0.1 * WarmupCosine(3, total=12)(step) for step in steps]),
        ("lr", "head", steps, [0.1 * Linear(12, 1, 0)(step) for step in steps]),
        ("weight_decay", "Cosine(None, 0.04, 0.4)", steps, [decay(step) for step in steps]),
    ]


def test_the_command_sketches_them_one_after_another(capsys):
    assert (
        main(["schedule", "lr=Linear(None, 1, 0)", "momentum=Linear(None, 0, 1)", "--total", "9", "--base-lr", "3"])
        == 0
    )
    first, second = capsys.readouterr().out.split("momentum=Linear(None, 0, 1)\n")
    assert first.startswith("lr=Linear(None, 1, 0)\n")
    assert "step 0  3\n" in first
    assert "step 8  0.888889\n" in second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["lr=Linear(2, 0, 1)", "lr=Linear(2, 0, 1)"],
            "`lr` must have one schedule for 'Linear(2, 0, 1)', got another",
        ),
        (["lr/a=Linear(2, 0, 1)", "lr/a=Constant()"], "`lr` must have one schedule for 'a', got another"),
        (["=Linear(2, 0, 1)"], "is not an expression"),
        (["lr="], "is not an expression"),
        (["lr/=Constant()"], "is not an expression"),
        (["a b=Constant()"], "is not an expression"),
        (["lr==Constant()"], "is not an expression"),
    ],
)
def test_labels_that_cannot_be_read_are_one_line(arguments, message, capsys):
    assert main(["schedule", *arguments, "--total", "10"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err
