"""The numbers that the cards advise are right, and what they tell you to write exists."""

import math
import re

import pytest

import lightning_plugins as lp
from tests.support.cases import PACKAGE, TECHNIQUES
from tests.test_places import sections


def advice(technique):
    """Return the text of the section that says which numbers."""
    found = sections((PACKAGE / technique / "README.md").read_text())
    return next(text for heading, text in found.items() if heading.startswith("Which"))


def test_the_decays_of_a_run_of_n_steps():
    """A span of 1, 5 and 10 % of the run, and the half-life by its definition: d ** h == 1/2."""
    rows = re.findall(r"^\| ([\d,]+) \| (.*) \|$", advice("ema"), re.MULTILINE)
    assert len(rows) == 4
    for steps, cells in rows:
        found = re.findall(r"`EMA\(([\d.]+)\)`, (?:half-life )?([\d.,]+)", cells)
        for share, (decay, half_life) in zip((0.01, 0.05, 0.1), found, strict=True):
            assert 1 / (1 - float(decay)) == pytest.approx(share * int(steps.replace(",", "")))
            written = float(half_life.replace(",", ""))
            assert float(decay) ** written == pytest.approx(0.5, rel=1e-2)
            assert math.log(2) / (1 - float(decay)) == pytest.approx(written, rel=0.06)


def test_the_span_of_the_default_average():
    """A ninth of the steps so far until 0.9999 is reached, after 90,000 steps."""
    decay = lp.WarmupDecay(0.9999)
    for step in (1_000, 10_000, 80_000):
        assert 1 / (1 - decay(step)) == pytest.approx(step / 9, rel=0.02)
    assert decay(89_000) < 0.9999 == decay(90_000)


def test_a_batch_k_times_as_large_takes_the_decay_to_the_power_of_k():
    rule = lp.HalfLife(samples=64_000)
    small, large = rule.for_samples_per_step(32), rule.for_samples_per_step(128)
    assert large(1) == pytest.approx(small(1) ** 4)


def test_the_warm_up_under_adam():
    row = next(line for line in advice("schedules").splitlines() if "beta2" in line)
    for steps, beta2 in re.findall(r"([\d,]+) for (0\.\d+)", row):
        assert int(steps.replace(",", "")) == round(2 / (1 - float(beta2)))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_what_a_card_tells_you_to_write_can_be_written(technique):
    calls = [text for text in re.findall(r"`([^`]+\))`", advice(technique)) if re.match(r"[A-Z]\w+\(", text)]
    foreign = ("ModelCheckpoint",)
    for call in calls:
        if "..." not in call and not call.startswith(foreign):
            eval(call, {name: getattr(lp, name) for name in lp.__all__})  # noqa: S307  # our own document


def test_advice_names_its_sources():
    for technique in ("ema", "schedules", "checkpoints", "accumulation"):
        assert len(re.findall(r"[A-Z][\w-]+(?: et al\.| and [A-Z]\w+) \d{4}", advice(technique))) >= 2, technique
