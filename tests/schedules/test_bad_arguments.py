"""Every illegal argument gives one clear error: the argument, the rule, the value and the remedy."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lightning_plugins import (
    Constant,
    CosineRestarts,
    Exponential,
    InverseSqrt,
    Join,
    LearningRateScheduler,
    Linear,
    Noam,
    NoamLR,
    OneCycle,
    PiecewiseConstant,
    Polynomial,
    RNMTPlus,
    ScheduleLR,
    Segment,
    Segments,
    Shape,
    WarmupCosine,
    WarmupCosineLR,
    WarmupStableDecay,
)
from tests.schedules.test_schedule import EXAMPLES


def optimizer(**options):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], **{"lr": 0.1, **options})


def grouped(**entries):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], **entries}]
    return torch.optim.SGD(groups, lr=0.1)


CASES = [
    (lambda: Polynomial(5, 1, 0, power=0), ValueError, r"`power` must be above 0, got 0\."),
    (lambda: WarmupCosine(-3), ValueError, r"`warmup` must be at least 0 steps, got -3\."),
    (lambda: WarmupCosine(1.5), ValueError, r"`warmup` as a float is a share of the run and must lie between 0 and 1"),
    (lambda: WarmupCosine(0.0), ValueError, r"`warmup` as a float .*got 0\.0; give steps \(100\)"),
    (lambda: WarmupCosine(math.nan), ValueError, r"`warmup` as a float .*got nan"),
    (lambda: WarmupCosine("five"), ValueError, r"`warmup` must be a duration, got 'five'; give steps \(100\), a share"),
    (lambda: WarmupCosine("-5%"), ValueError, r"`warmup` must be a duration, got '-5%'"),
    (lambda: WarmupCosine("120%"), ValueError, r"`warmup` must be at most 100% of the run, got '120%'"),
    (lambda: WarmupCosine(True), TypeError, r"`warmup` must be a duration, got True"),
    (lambda: WarmupCosine(None), TypeError, r"`warmup` must be a duration, got None"),
    (lambda: WarmupCosine("rest"), ValueError, r"`warmup` must be a duration, got 'rest'"),
    (lambda: WarmupCosine([1]), TypeError, r"`warmup` must be a duration, got \[1\]"),
    (lambda: WarmupCosine(10, total=5), ValueError, r"`warmup` \+ `hold` must be at most `total`, got 10 \+ 0 > 5"),
    (lambda: WarmupCosine(1, start=-0.1), ValueError, r"`start` must be at least 0, got -0\.1"),
    (lambda: WarmupCosine(1, end=math.inf), ValueError, r"`end` must be finite, got inf"),
    (lambda: WarmupCosine(1, end="0"), TypeError, r"`end` must be a number, got '0'"),
    (lambda: WarmupStableDecay(1, 1, shape="exp"), ValueError, r"`shape` must be one of 'linear', 'cosine', '1-sqrt'"),
    (lambda: OneCycle(peak_at=1.2), ValueError, r"`peak_at` must be at least 0 and at most 1, got 1\.2"),
    (lambda: OneCycle(shape="1-sqrt"), ValueError, r"`shape` must be one of 'cosine', 'linear'"),
    (lambda: Constant(-1), ValueError, r"`value` must be at least 0, got -1"),
    (lambda: Polynomial(1, 1, 0, power=0), ValueError, r"`power` must be above 0, got 0"),
    (lambda: Exponential(1, 1, 0), ValueError, r"`end` must be above 0, got 0"),
    (lambda: InverseSqrt(1, timescale=0), ValueError, r"`timescale` must be at least 1 step, got 0"),
    (lambda: Noam(0, 1), ValueError, r"`model_dim` must be at least 1, got 0"),
    (lambda: Noam(1.5, 1), TypeError, r"`model_dim` must be a whole number, got 1\.5"),
    (lambda: RNMTPlus(0, 1, 1, 1), ValueError, r"`replicas` must be at least 1, got 0"),
    (lambda: RNMTPlus(1, 1, 2, 1), ValueError, r"`end_step` must be at least `start_step`, got 1 < 2"),
    (lambda: PiecewiseConstant([1], [1]), ValueError, r"`boundaries` must be one fewer than `values`, got 1 and 1"),
    (lambda: PiecewiseConstant([2, 1], [1, 2, 3]), ValueError, r"`boundaries` must not descend, got \[2, 1\]"),
    (lambda: PiecewiseConstant([-1], [1, 2]), ValueError, r"`boundaries\[0\]` must be at least 0 steps, got -1"),
    (lambda: PiecewiseConstant([1], [1, -2]), ValueError, r"`values\[1\]` must be at least 0, got -2"),
    (lambda: PiecewiseConstant("12", [1]), TypeError, r"`boundaries` must be a list, got '12'"),
    (lambda: Join([Constant()], [1]), ValueError, r"`boundaries` must be one fewer than `parts`, got 1 and 1"),
    (lambda: Join([], []), TypeError, r"`parts` must be a list of Schedule with at least one, got \(\)"),
    (lambda: Join([1, 2], [1]), TypeError, r"`parts` must be a list of Schedule"),
    (lambda: Join(Constant(), []), TypeError, r"`parts` must be a list of Schedule"),
    (lambda: Segments([]), TypeError, r"`segments` must be a list of Segment with at least one"),
    (lambda: Segments([Segment(end=1)], endpoint="no"), TypeError, r"`endpoint` must be True or False, got 'no'"),
    (lambda: Segments([Constant()]), TypeError, r"`segments` must be a list of Segment"),
    (lambda: Segments([Segment(end=1), Segment(end=0)]), ValueError, r"leave `steps` out of one segment at most"),
    (lambda: Segment("wave", end=1), ValueError, r"`shape` must be one of 'linear', .*cannot be imported"),
    (lambda: Segment(7, end=1), TypeError, r"`shape` must be one of 'linear', .*got 7"),
    (lambda: Segment("math.pi", end=1), TypeError, r"`shape` must be callable, got 3\.14"),
    (lambda: Segment(math.log1p, end=-1), ValueError, r"`end` must be at least 0, got -1"),
    (lambda: Shape(lambda x: 1.0, 5, 0, 1), ValueError, r"`curve` must have different values at 0 and 1"),
    (lambda: Shape(lambda x: math.inf, 5, 0, 1), ValueError, r"`curve` must be finite at 0 and 1"),
    (lambda: Segments([Segment(lambda x: 1.0, end=1, steps=3)]), ValueError, r"`segments\[0\].shape` must have diff"),
    (lambda: CosineRestarts(0), ValueError, r"`first` must be at least 1 step, got 0"),
    (lambda: CosineRestarts(5, multiplier=0.5), ValueError, r"`multiplier` must be at least 1, got 0\.5"),
    (lambda: CosineRestarts(5, decay=1.5), ValueError, r"`decay` must be at least 0 and at most 1, got 1\.5"),
    (lambda: Constant().cycle(5, decay=2), ValueError, r"`decay` must be at least 0 and at most 1, got 2"),
    (lambda: Constant().cycle(0), ValueError, r"`period` must be at least 1 step, got 0"),
    (lambda: Constant().cycle(5, count=0), ValueError, r"`count` must be at least 1 cycle, got 0"),
    (lambda: Constant().cycle("1%").resolve(10), ValueError, r"`period` must be at least 1 step, got 0"),
    (lambda: Constant().hold_every(0), ValueError, r"`steps` must be at least 1 step, got 0"),
    (lambda: Constant().delay(-1), ValueError, r"`steps` must be at least 0 steps, got -1"),
    (lambda: Constant().delay(None), TypeError, r"`steps` must be a duration, got None"),
    (lambda: Constant().floor(-1), ValueError, r"`factor` must be at least 0, got -1"),
    (lambda: Constant() * math.nan, ValueError, r"`factor` must be finite, got nan"),
    (lambda: Constant() * "2", TypeError, r"unsupported operand|can't multiply"),
    (lambda: Linear(5, 0, 1).resolve(-1), ValueError, r"`total_steps` must be at least 0 steps, got -1"),
    (lambda: Linear(5, 0, 1).resolve(2.5), TypeError, r"`total_steps` must be a whole number of steps, got 2\.5"),
    (lambda: Linear(5, 0, 1).resolve(10, 0), ValueError, r"`steps_per_epoch` must be above 0, got 0"),
    (lambda: Linear(5, 0, 1).preview(-1), ValueError, r"`total_steps` must be at least 0 steps, got -1"),
    # the torch schedulers
    (lambda: ScheduleLR("adam", Constant()), TypeError, r"`optimizer` must be a torch optimizer, got 'adam'"),
    (lambda: ScheduleLR(optimizer(), abs), TypeError, r"`schedule` must be a Schedule such as WarmupCosine"),
    (lambda: ScheduleLR(optimizer(), WarmupCosine("5%")), ValueError, r"`schedule` must have every length in steps"),
    (lambda: ScheduleLR(optimizer(), Constant(), min_lr=-1), ValueError, r"`min_lr` must be at least 0, got -1"),
    (lambda: ScheduleLR(optimizer(), Constant(), base_lr=0), ValueError, r"`base_lr` must be above 0, got 0"),
    (
        lambda: ScheduleLR(optimizer(), Constant(), base_lr=[1, 2]),
        ValueError,
        r"one rate for each of the 1 groups, got 2",
    ),
    (lambda: ScheduleLR(optimizer(), Constant(), base_lr=[-1]), ValueError, r"`base_lr\[0\]` must be above 0, got -1"),
    (
        lambda: ScheduleLR(optimizer(), Constant(), clock="wall"),
        ValueError,
        r"`clock` must be one of 'attempted', 'app",
    ),
    (
        lambda: ScheduleLR(optimizer(), Constant(), parameter="beta"),
        ValueError,
        r"`parameter` must be an entry of the optimizer's groups, got 'beta'; there are .*lr",
    ),
    (
        lambda: ScheduleLR(optimizer(nesterov=True, momentum=0.9), Constant(), parameter="nesterov"),
        TypeError,
        r"`parameter` must name a number of the optimizer's groups, got 'nesterov': True",
    ),
    (
        lambda: ScheduleLR(optimizer(), Constant(), parameter="foreach"),
        TypeError,
        r"`parameter` must name a number of the optimizer's groups, got 'foreach': None",
    ),
    (
        lambda: ScheduleLR(grouped(initial_lr=0.1, momentum=0.5, weight_decay=0.1), Constant(), parameter="rate"),
        ValueError,
        r"got 'rate'; there are lr, momentum, weight_decay\.$",
    ),
    (lambda: ScheduleLR(grouped(lr_scale=-0.5), Constant()), ValueError, r"`lr_scale` must be at least 0, got -0\.5"),
    (
        lambda: WarmupCosineLR(optimizer(), 10, 5),
        ValueError,
        r"`total_steps` must be at least 10 steps \(warm-up and hold",
    ),
    (lambda: WarmupCosineLR(optimizer(), -1, 5), ValueError, r"`warmup_steps` must be at least 0 steps, got -1"),
    (lambda: WarmupCosineLR(optimizer(), 1, 5, end_factor=-1), ValueError, r"`end_factor` must be at least 0, got -1"),
    (lambda: WarmupCosineLR(optimizer(), 10), TypeError, r"`total_steps` must be given"),
    (
        lambda: WarmupCosineLR(optimizer(), 1, 5, warmup=1),
        TypeError,
        r"`warmup` and `warmup_steps` are two words for one",
    ),
    (lambda: WarmupCosineLR(optimizer(), warmup=1, total=5, end=-1), ValueError, r"`end` must be at least 0, got -1"),
    (
        lambda: WarmupCosineLR(optimizer(), warmup="5%", total="9%"),
        TypeError,
        r"`total` must be a whole number of steps",
    ),
    (lambda: NoamLR(optimizer(), 4, 5, warmup=5), TypeError, r"`warmup` and `warmup_steps` are two words for one"),
    (lambda: NoamLR(optimizer(), 4), TypeError, r"`warmup_steps` must be given"),
    (lambda: NoamLR(optimizer(), 0, 5), ValueError, r"`model_dim` must be at least 1, got 0"),
    (
        lambda: NoamLR(optimizer(), 4, 5, step_duration=0),
        ValueError,
        r"`step_duration` must be at least 1 step, got 0",
    ),
    # the callback
    (lambda: LearningRateScheduler(abs), TypeError, r"`schedule` must be a Schedule such as WarmupCosine"),
    (lambda: LearningRateScheduler(Constant(), plateau=0.1), TypeError, r"`plateau` must be a Plateau, got 0\.1"),
    (
        lambda: LearningRateScheduler(Constant(), plateau="val_loss"),
        TypeError,
        r"`plateau` must be a Plateau, got 'val_loss'\. Write Plateau\('val_loss'\)\.",
    ),
    (lambda: LearningRateScheduler(Constant(), existing="x"), ValueError, r"`existing` must be one of 'refuse', 'repl"),
    (lambda: LearningRateScheduler(Constant(), optimizer=-1), ValueError, r"`optimizer` must be at least 0, got -1"),
    (
        lambda: LearningRateScheduler(Constant(), clock="x"),
        ValueError,
        r"`clock` must be one of 'attempted', 'applied'",
    ),
    (lambda: LearningRateScheduler(Constant(), base_lr="x"), TypeError, r"`base_lr` must be a number, got 'x'"),
]


@pytest.mark.parametrize(("build", "error", "message"), CASES, ids=[message[:50] for _, _, message in CASES])
def test_is_refused_with_a_message(build, error, message):
    with pytest.raises(error, match=message):
        build()


junk = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 50), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=400)
@given(kind=st.sampled_from(sorted(EXAMPLES)), data=st.data())
def test_junk_is_refused_or_works_but_never_half_accepted(kind, data):
    """Fuzz: a constructor either raises TypeError or ValueError that names something, or gives finite factors."""
    cls = type(EXAMPLES[kind])
    arguments = {field.name: getattr(EXAMPLES[kind], field.name) for field in fields(cls)}
    for name in data.draw(st.lists(st.sampled_from(sorted(arguments)), max_size=2)):
        arguments[name] = data.draw(junk)
    refusal = None
    try:
        schedule = cls(**arguments).resolve(100, 10)
    except (TypeError, ValueError) as error:
        refusal = str(error)
    if refusal is not None:
        assert "`" in refusal
        return
    assert all(math.isfinite(schedule(step)) for step in (0, 1, 50, 99, 100, 10**4))
