"""Schedules as plain JSON values and back: what may be named, and that no code runs unless it is trusted."""

import math
from dataclasses import dataclass

import pytest

from lightning_plugins import Schedule, Shape
from lightning_plugins.schedules.fields import duration


@dataclass(frozen=True)
class Sawtooth(Schedule):
    """A schedule of a user's own."""

    period: int = duration()

    def _factor(self, step):
        return float(step % self.period)


def test_a_schedule_of_your_own():
    saw = Sawtooth(3)
    assert saw.preview(5) == [0, 1, 2, 0, 1]
    assert (saw * 0.5).preview(3) == [0, 0.5, 1]
    data = saw.to_dict()
    with pytest.raises(ValueError, match="needs `trust=True`, because importing it runs its code"):
        Schedule.from_dict(data)
    assert type(Schedule.from_dict(data, trust=True)).__name__ == "Sawtooth"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"class": "Shape", "curve": "os.getcwd", "steps": 1, "start": 0, "end": 1}, "names code, which would run"),
        ({"class": "Segments", "segments": [{"shape": "os.getcwd", "end": 1}]}, "names code, which would run"),
        ({"class": "os.getcwd"}, "a schedule of your own needs `trust=True`"),
        (
            {"class": "Linear", "steps": 1, "start": 0, "stop": 1},
            "`Linear` has no argument `stop`; choose from steps, start, end",
        ),
        ({"end": 1}, "must describe a schedule"),
    ],
)
def test_a_configuration_runs_no_code(data, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_dict(data)


@pytest.mark.parametrize("path", ["nowhere.at_all", "os.getcwd", "math"])
def test_a_trusted_configuration_must_still_name_a_schedule(path):
    with pytest.raises(ValueError, match=f"`class` must name a schedule, got '{path}'"):
        Schedule.from_dict({"class": path}, trust=True)


def test_a_lambda_has_no_import_path():
    with pytest.raises(ValueError, match=r"`curve` has no import path.*define it as a function of a module"):
        Shape(lambda x: x, 10, 0, 1).to_dict()


def test_curves_by_import_path():
    assert Shape("math.sin", 10, 0, 1).preview(11) == Shape(math.sin, 10, 0, 1).preview(11)
    assert Schedule.from_dict(Shape("math.sin", 10, 0, 1).to_dict(), trust=True) == Shape("math.sin", 10, 0, 1)
