"""Every class can be written in a LightningCLI's YAML, printed and read again, under both names of Lightning."""

import enum
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from functools import partial

import lightning.pytorch as unified
import pytest
import pytorch_lightning as classic
import torch
import yaml
from torch.optim.lr_scheduler import LRScheduler

import lightning_plugins
from lightning_plugins import EMA, Cosine, GradientAccumulation, LearningRateScheduler, Linear, WarmupCosine, schedules
from lightning_plugins.core.lightning import CallbackOfBoth
from tests.support.cases import CALLS, import_path, kind_of
from tests.support.snippets import blocks
from tests.support.training import loader, make_module, rates

QUIET = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""

CONFIG = f"""{QUIET}
  callbacks:
    - class_path: lightning_plugins.LearningRateScheduler
      init_args:
        schedule:
          class_path: lightning_plugins.Join
          init_args:
            parts:
              - class_path: lightning_plugins.Linear
                init_args: {{steps: 4, start: 0, end: 1}}
              - class_path: lightning_plugins.Segments
                init_args:
                  segments:
                    - {{shape: cosine, start: 1.0, end: 0.5, steps: "20%"}}
                    - {{end: 0.1}}
                  endpoint: true
            boundaries: [4]
        plateau:
          class_path: lightning_plugins.Plateau
          init_args: {{monitor: val_loss}}
        base_lr: 0.5
"""

# What a class is written inside of, when it is no callback: the callback's argument, and its others.
HOSTS = {
    lightning_plugins.Schedule: (LearningRateScheduler, "schedule", {}),
    lightning_plugins.DecayRule: (EMA, "decay", {}),
    lightning_plugins.Tokens: (GradientAccumulation, "count", {"batches": 8}),
    lightning_plugins.Plateau: (LearningRateScheduler, "plateau", {"schedule": Linear(4, 1, 0)}),
}
ROWS = {name: written for name, calls in CALLS.items() if (written := [call for call in calls if call[0] is not None])}
CASES = [(name, index) for name, rows in ROWS.items() for index in range(len(rows))]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's CLI uses what it deprecates


@pytest.fixture
def _same_moment(monkeypatch):
    """Some objects note when they were made."""
    monkeypatch.setattr("time.monotonic", lambda: 0.0)


def make_cli(namespace, path, config, *arguments, module=None):
    """Write the configuration and let a LightningCLI of ``namespace`` make what it says."""
    cli = __import__(f"{namespace.__name__}.cli", fromlist=["LightningCLI"])
    (path / "config.yaml").write_text(config)
    return cli.LightningCLI(
        type(make_module(namespace)) if module is None else module,
        save_config_callback=None,
        run=False,
        args=["--config", str(path / "config.yaml"), *arguments],
        seed_everything_default=0,
    )


def printed(namespace, path, config, capsys, *arguments):
    """What ``--print_config`` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        make_cli(namespace, path, config, "--print_config", *arguments)
    return capsys.readouterr().out


def ours(cli):
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, CallbackOfBoth)]


def test_the_recipe_in_yaml_is_what_it_says(tmp_path):
    [recipe] = blocks("docs/recipes.md", "yaml")
    merged = {"trainer": {**yaml.safe_load(QUIET)["trainer"], **yaml.safe_load(recipe)["trainer"]}}
    by_group, decay = ours(make_cli(unified, tmp_path, yaml.safe_dump(merged)))
    assert by_group.schedule == {"weights": WarmupCosine("10%"), "biases": Linear(None, 10, 0.01)}
    assert (decay.schedule, decay.parameter, decay.base_lr) == (Cosine(None, 0.04, 0.4), "weight_decay", 1.0)


# --- every class ------------------------------------------------------------------------------------------------------


def writable_classes():
    """Every public class but those that no YAML makes: bases, torch schedulers (their optimizer comes later), enums."""
    names = {name: getattr(lightning_plugins, name) for name in lightning_plugins.__all__}
    names |= {name: getattr(schedules, name) for name in schedules.SCHEDULES}
    return {
        name
        for name, kind in names.items()
        if inspect.isclass(kind)
        and not inspect.isabstract(kind)
        and not issubclass(kind, (LRScheduler, BaseException, enum.Enum))
    }


def test_every_class_has_its_row():
    # a segment stands inside `Segments` and needs no class path; a loop is given, not made
    assert writable_classes() - {"Segment", "TrainingLoop"} == set(ROWS)


def test_annotations_can_be_evaluated():
    """Otherwise a command line takes any value and says nothing about it."""
    for name in writable_classes():
        kind = getattr(lightning_plugins, name, None) or getattr(schedules, name)
        hints = {**typing.get_type_hints(kind), **typing.get_type_hints(kind.__init__)}
        assert set(inspect.signature(kind).parameters) <= set(hints), name


def case(name, index, number=0):
    """A row as an item of ``trainer.callbacks``, and the callback that it stands for; the number keeps many apart."""
    text, arguments = ROWS[name][index]
    item = {"class_path": import_path(name), "init_args": yaml.safe_load(text)}
    made = kind_of(name)(**arguments)
    host = next((host for kind, host in HOSTS.items() if isinstance(made, kind)), None)
    if host is None:
        return item, made
    kind, argument, others = host
    apart = {EMA: {"name": f"ema{number}"}, LearningRateScheduler: {"optimizer": number}}.get(kind, {})
    written = {
        key: {"class_path": "lightning_plugins.Linear", "init_args": {"steps": 4, "start": 1, "end": 0}}
        if isinstance(value, Linear)
        else value
        for key, value in others.items()
    }
    arguments = {argument: item, **written, **apart}
    return {"class_path": import_path(kind.__name__), "init_args": arguments}, kind(
        **{argument: made}, **others, **apart
    )


def with_callbacks(items):
    config = yaml.safe_load(QUIET)
    config["trainer"]["callbacks"] = items
    return yaml.safe_dump(config)


def says(text, written):
    """Whether a printed configuration holds what was written, besides the defaults."""
    if isinstance(written, dict):
        if "class_path" in written and "class_path" not in text:  # a dataclass without subclasses needs none
            written = written["init_args"]
        return all(says(text[key if key in text else str(key)], value) for key, value in written.items())
    if isinstance(written, list):
        return len(text) == len(written) and all(map(says, text, written))
    return text == written


def portrait(thing, above=()):  # noqa: PLR0911
    """Return what an object is made of, as text that compares: by how it is pickled, without addresses."""
    if id(thing) in above:
        return f"what holds it, {len(above) - above.index(id(thing))} up"
    inside = partial(portrait, above=(*above, id(thing)))
    if thing is None or isinstance(thing, (bool, int, float, str, bytes)):
        return repr(thing)
    if isinstance(thing, torch.Tensor):
        return f"tensor {thing.tolist()}"
    if isinstance(thing, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)):
        return f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else thing.__name__
    if isinstance(thing, dict):
        return f"dict {[(inside(key), inside(value)) for key, value in thing.items()]}"
    if isinstance(thing, (list, tuple)):
        return f"{type(thing).__name__} {[inside(part) for part in thing]}"
    if isinstance(thing, (set, frozenset)):
        return f"set {sorted(map(inside, thing))}"
    parts = thing.__reduce_ex__(4)
    return parts if isinstance(parts, str) else f"{type(thing)} {[inside(_listed(part)) for part in parts]}"


def _listed(part):
    return list(part) if isinstance(part, Iterator) else part


@pytest.mark.usefixtures("_same_moment")
def test_portraits_tell_all_rows_apart():
    """Otherwise the comparisons below would mean little."""
    portraits = [portrait(case(*one)[1]) for one in CASES]
    assert len(set(portraits)) == len(portraits)


@pytest.mark.usefixtures("_same_moment")
@pytest.mark.parametrize(("name", "index"), CASES, ids=[f"{name}-{index}" for name, index in CASES])
def test_yaml_makes_the_object_and_print_config_tells_how(name, index, tmp_path, capsys):
    item, expected = case(name, index)
    config = with_callbacks([item])
    [made] = ours(make_cli(unified, tmp_path, config))
    assert portrait(made) == portrait(expected)
    text = printed(unified, tmp_path, config, capsys)
    assert says(yaml.safe_load(text)["trainer"]["callbacks"], [item])
    [again] = ours(make_cli(unified, tmp_path, text))
    assert portrait(again) == portrait(expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_same_moment")
def test_every_class_in_one_file_under_the_other_name(tmp_path, capsys):
    each = [case(name, len(rows) - 1, number) for number, (name, rows) in enumerate(ROWS.items())]
    expected = {callback.state_key: portrait(callback) for _, callback in each}
    assert len(expected) == len(ROWS)
    config = with_callbacks([item for item, _ in each])
    for text in (config, printed(classic, tmp_path, config, capsys)):
        made = ours(make_cli(classic, tmp_path, text))
        assert {callback.state_key: portrait(callback) for callback in made} == expected


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_callback_can_be_added_on_the_command_line(tmp_path, namespace):
    words = ["--trainer.callbacks+=lightning_plugins.EMA", "--trainer.callbacks.decay=0.5"]
    words += ["--trainer.callbacks+=lightning_plugins.GradientAccumulation", "--trainer.callbacks.batches=2"]
    scheduler, average, accumulation = ours(make_cli(namespace, tmp_path, CONFIG, *words))
    assert isinstance(scheduler, LearningRateScheduler)
    assert average.decay == EMA(0.5).decay
    assert accumulation.batches == 2


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"class_path": "lightning_plugins.EMA", "init_args": {"decays": 0.9}}, "decays"),
        ({"class_path": "lightning_plugins.EMA", "init_args": {"evaluate": "both"}}, "both"),
        ({"class_path": "lightning_plugins.GradientAccumulation", "init_args": {"count": "no.such.thing"}}, "no.such"),
        (
            {
                "class_path": "lightning_plugins.LearningRateScheduler",
                "init_args": {
                    "schedule": {
                        "class_path": "lightning_plugins.Linear",
                        "init_args": {"steps": 4, "start": "low", "end": 1},
                    }
                },
            },
            "low",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_refused_by_name_before_anything_runs(tmp_path, capsys, item, message):
    with pytest.raises(SystemExit, match="2"):
        make_cli(unified, tmp_path, with_callbacks([item]))
    assert message in capsys.readouterr().err


# --- a run ------------------------------------------------------------------------------------------------------------


def logging_module(namespace):
    """Return a class of modules that log what the configuration's plateau follows."""

    class Logging(type(make_module(namespace))):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("val_loss", loss.detach())
            return loss

    return Logging


def test_a_yaml_configures_the_schedule(tmp_path, namespace):
    cli = make_cli(namespace, tmp_path, CONFIG, module=logging_module(namespace))
    cli.trainer.fit(cli.model, loader(10))
    [callback] = ours(cli)
    assert rates(cli.model) == pytest.approx([0.5 * callback.resolved(step) for step in range(20)])
    assert rates(cli.model)[:5] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert rates(cli.model)[-1] == pytest.approx(0.05)


def test_the_printed_configuration_gives_the_same_run(tmp_path, namespace, capsys):
    text = printed(namespace, tmp_path, CONFIG, capsys)
    [item] = yaml.safe_load(text)["trainer"]["callbacks"]
    assert item["init_args"]["schedule"]["class_path"] == "lightning_plugins.Join"
    runs = []
    for config in (CONFIG, text):
        cli = make_cli(namespace, tmp_path, config, module=logging_module(namespace))
        cli.trainer.fit(cli.model, loader(10))
        runs.append(rates(cli.model))
    assert runs[0] == runs[1]
    assert len(runs[0]) == 20
