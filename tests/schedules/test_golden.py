"""Every peer's table is expressed with our schedules and reproduced, up to the end of the peer's schedule.

Past its end a peer may climb, raise or trap; ours holds, which is asserted as well.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_plugins import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    InverseSqrt,
    Join,
    Linear,
    Noam,
    OneCycle,
    OneMinusSqrt,
    PiecewiseConstant,
    Polynomial,
    ReciprocalSqrt,
    RNMTPlus,
    Schedule,
    Segment,
    Segments,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)

FOLDER = Path(__file__).parents[1] / "golden" / "schedules"


@dataclass
class Case:
    schedule: Schedule
    base: float = 1.0
    end: int | None = None  # where the peer's own schedule ends, if it does something else past it than holding
    total: int | None = None  # for schedules that fill the run
    rounded: float = 0.0  # peak of a table that was computed as peak minus something, in float32


def square(x):
    return x * x


def cos_pi(x):
    return math.cos(math.pi * x)


def warm(steps, then, start=0.0):
    """A linear warm-up in front of a schedule that counts from its own beginning."""
    return Join([Linear(steps, start, 1), then], [steps])


CASES = {
    "composer__cosine_warmup__100ba_1dur": Case(WarmupCosine(100, total=1000, end=0.1)),
    "composer__exponential__1ep": Case(Exponential(1000, 1, 0.9**10)),
    "composer__warm_restarts__100ba_x1.5": Case(CosineRestarts(100, multiplier=1.5, end=0.05)),
    "fairseq__inverse_sqrt__w400_init1e-7": Case(InverseSqrt(400, start=1e-7 / 5e-4), base=5e-4),
    "fairseq__polynomial__w100_t1000_p1": Case(WarmupLinear(100, total=1000, end=0.01), base=1e-3),
    "fairseq__tri_stage__100_400_500": Case(
        Join([Linear(100, 0.01, 1), Constant(), Exponential(500, 1, 0.05)], [100, 500]), base=1e-3
    ),
    "hf__constant_with_warmup__w100": Case(Linear(100, 0, 1), base=1e-3),
    "hf__cosine__w0": Case(WarmupCosine(0, total=1000), base=1e-3, end=1000),
    "hf__cosine__w100": Case(WarmupCosine(100, total=1000), base=1e-3, end=1000),
    "hf__cosine_hard_restarts3__w100": Case(warm(100, Cosine(300, 1, 0).cycle(300, count=3)), base=1e-3),
    "hf__cosine_min_lr_rate0.1__w100": Case(WarmupCosine(100, total=1000, end=0.1), base=1e-3, end=1000),
    "hf__inverse_sqrt__w100": Case(InverseSqrt(100), base=1e-3),
    "hf__linear__w100": Case(WarmupLinear(100, total=1000), base=1e-3),
    "hf__polynomial_p2__w100": Case(warm(100, Polynomial(900, 1, 1e-3, power=2)), base=1e-3),
    "hf__wsd_1-sqrt__w100_s600_d300": Case(WarmupStableDecay(100, 300, 1000), base=1e-3),
    "hf__wsd_linear__w100_s600_d300": Case(WarmupStableDecay(100, 300, 1000, shape="linear"), base=1e-3),
    "keras__cosine_warmup__w100_d900": Case(WarmupCosine(100, total=1000, end=0.01), base=1e-3, rounded=1e-3),
    # Keras changes one step after its boundary
    "keras__piecewise_constant__100_200": Case(PiecewiseConstant([101, 201], [1, 0.5, 0.1])),
    "keras__polynomial__400_p2": Case(Polynomial(400, 1, 0.01, power=2), base=0.1),
    "keras_article__tf_schedule_w100_h50_t1000": Case(WarmupCosine(100, 50, 1000), base=1e-3, rounded=1e-3),
    "keras_article__w100_h0_t1000": Case(WarmupCosine(100, 0, 1000), base=1e-3, end=1000),
    "keras_article__w100_h10_t1000": Case(WarmupCosine(100, 10, 1000), base=1e-3, end=1000),
    "megatron__cosine__w100_t1000": Case(WarmupCosine(100, total=1000, end=0.01), base=1e-3),
    "megatron__wsd_linear__w100_t1000_d200": Case(
        WarmupStableDecay(100, 200, 1000, shape="linear", end=0.01), base=1e-3
    ),
    # NeMo's steps 0 and 1 share a value
    "nemo__noam__d512_w400": Case(Noam(512, 400).delay(1), base=2.0),
    # NeMo warms up along (t + 1) / (w + 1), and its minimum is a floor, not the decay's end
    "nemo__warmup_hold_1-sqrt__w100_h500_t1000": Case(
        Join([Linear(101, 0, 1).shift(1), Constant(), OneMinusSqrt(400, 1, 0).floor(0.01)], [100, 600]), base=1e-3
    ),
    "onmt__inv_sqrt__w400": Case(InverseSqrt(400).shift(1), base=5e-4),
    "onmt__noam__article_dim4_scale2_w8000_raw": Case(Noam(4, 8000), base=2.0),
    "onmt__noam__w400": Case(Noam(512, 400), base=2.0),
    "onmt__noam__w400_dur4": Case(Noam(512, 400).hold_every(4), base=2.0),
    "onmt__noam__w400_start500": Case(Noam(512, 400).delay(500), base=2.0),
    "onmt__rnmt_plus__n8_w50_s600_e1200": Case(RNMTPlus(8, 50, 600, 1200), base=1e-4),
    "onmt__rsqrt__w400": Case(ReciprocalSqrt(400), base=2.0),
    "optax__cosine_decay__a0.1": Case(Cosine(400, 1, 0.1), base=0.1),
    "optax__join__wsd_linear_100_600_200": Case(
        Join([Linear(100, 0, 1e-3), Constant(1e-3), Linear(200, 1e-3, 1e-5)], [100, 700])
    ),
    "optax__linear__0_1_200": Case(Linear(200, 0, 1)),
    "optax__polynomial__p2_begin50": Case(Polynomial(300, 1, 0.01, power=2).delay(50)),
    "optax__warmup_cosine_decay__w100_t1000": Case(WarmupCosine(100, total=1000, end=0.01), base=1e-3),
    # S4TF never uses a stated start that differs from the previous end: its first value is one step further
    "s4tf__discontinuity__total300": Case(
        Join([Linear(99, 0, 1), Linear(100, 0.5, 0.1).shift(1), Linear(100, 0.1, 0).shift(1)], [100, 200]),
        rounded=1.0,
    ),
    "s4tf__linear100_hold100_cos__total1000": Case(
        Segments(
            [
                Segment(start=1e-5, end=1e-3, steps=100),
                Segment(square, end=1e-3, steps=101),
                Segment(cos_pi, end=1e-5),
            ],
            endpoint=True,
        ),
        total=1000,
        rounded=1e-3,
    ),
    "s4tf__linear10_linear__total500": Case(
        Segments([Segment(start=0, end=2e-5, steps=10), Segment(end=0)], endpoint=True), total=500, rounded=2e-5
    ),
    "timm__cosine__t500_w50_prefix": Case(warm(50, Cosine(500, 1, 1e-5), start=1e-4), base=0.1),
    "timm__step__d60_r0.97_w10": Case(warm(10, Exponential(9, 1, 0.97**9).hold_every(60), start=1e-4), base=0.1),
    "torch__cosine_warm_restarts__T0_100_mult2_min": Case(CosineRestarts(100, multiplier=2, end=0.01), base=0.1),
    "torch__linear__sf0.1_ef1_100": Case(Linear(100, 0.1, 1), base=0.1),
    "torch__onecycle__cos_default": Case(OneCycle(500), base=1.0),
    "torch__polynomial__t300_p2": Case(Polynomial(300, 1, 0, power=2), base=0.1),
    "torch__sequential_linear_cosine__w50_t500": Case(WarmupCosine(50, total=500, start=0.01), base=0.1, end=500),
}


def tables():
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def test_every_table_has_a_case():
    assert tables() == sorted(CASES)


@pytest.mark.parametrize("name", tables())
def test_reproduces_the_peer(name):
    table, case = json.loads((FOLDER / f"{name}.json").read_text()), CASES[name]
    schedule = case.schedule.resolve(case.total) if case.total else case.schedule
    rel = 1e-9 if table["dtype"] == "float64" else 2e-6
    abs_ = max(2e-7 * case.rounded, 1e-15)  # 1e-15: what a cosine leaves of 0 at the end of a decay
    assert len(table["steps"]) >= 200
    for step, value in zip(table["steps"], table["values"], strict=True):
        if case.end is None or step <= case.end:
            assert case.base * schedule(step) == pytest.approx(value, rel=rel, abs=abs_), step


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.end is not None])
def test_holds_where_the_peer_goes_on(name):
    case = CASES[name]
    held = case.schedule(case.end)
    assert [case.schedule(case.end + ahead) for ahead in (1, 100, 10**6)] == [held] * 3
