"""Values that no one should pass, by name: wrong types, numbers out of any range, things that lie about themselves."""

import decimal
import enum
import fractions
import math
from pathlib import Path

import numpy as np
import torch


class Choice(str, enum.Enum):
    A = "average"


class Count(enum.IntEnum):
    THREE = 3


class Liar:
    """Has every number's methods, and none works."""

    def __index__(self):
        raise ZeroDivisionError("no index")

    def __float__(self):
        raise OverflowError("no float")

    def __repr__(self):
        raise AttributeError("no repr")


class Grumpy:
    """Compares with nothing."""

    def __eq__(self, other):
        raise RuntimeError("no comparison")

    __hash__ = None


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def endless():
    value = []
    value.append(value)
    return value


# A name for each, so that a failing test says what it was; a function, because some may be used up or changed.
HOSTILE = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "1": lambda: 1,
    "7": lambda: 7,
    "-1": lambda: -1,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "-2**63": lambda: -(2**63),
    "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5000,
    "-10**5000": lambda: -(10**5000),
    "-0.0": lambda: -0.0,
    "0.5": lambda: 0.5,
    "-0.5": lambda: -0.5,
    "2.5": lambda: 2.5,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "1e308": lambda: 1e308,
    "5e-324": lambda: 5e-324,
    "1 - 2**-53": lambda: 1 - 2**-53,
    "1 + 2**-52": lambda: 1 + 2**-52,
    "1j": lambda: 1j,
    "empty text": lambda: "",
    "text": lambda: "x",
    "5%": lambda: "5%",
    "-5%": lambda: "-5%",
    "101%": lambda: "101%",
    "2ep": lambda: "2ep",
    "endless epochs": lambda: "9" * 400 + "ep",
    "very many epochs": lambda: "9" * 300 + "ep",
    "Arabic share": lambda: "٣%",
    "NUL": lambda: "\0",
    "two lines": lambda: "a\nb",
    "upwards": lambda: "../x",
    "dunder": lambda: "__class__",
    "os.system": lambda: "os.system",
    "surrogate": lambda: "\ud800",
    "long text": lambda: "x" * 100_000,
    "bytes": lambda: b"x",
    "path": lambda: Path("x"),
    "enum of a text": lambda: Choice.A,
    "enum of a number": lambda: Count.THREE,
    "empty list": list,
    "empty tuple": tuple,
    "empty dict": dict,
    "empty set": set,
    "list": lambda: [1, 2],
    "list of texts": lambda: ["a", "b"],
    "list of lists": lambda: [[1], [2]],
    "list of None": lambda: [None],
    "dict": lambda: {"a": 1},
    "dict of steps": lambda: {0: 1, 5: 10**5000},
    "dict of dicts": lambda: {"a": {"b": []}},
    "deep list": lambda: nested(5000),
    "endless list": endless,
    "range": lambda: range(3),
    "generator": lambda: (number for number in (1, 2)),
    "object": object,
    "type": lambda: int,
    "len": lambda: len,
    "Ellipsis": lambda: ...,
    "NotImplemented": lambda: NotImplemented,
    "exception": lambda: ValueError("x"),
    "liar": Liar,
    "grumpy": Grumpy,
    "Decimal": lambda: decimal.Decimal("0.5"),
    "Decimal NaN": lambda: decimal.Decimal("NaN"),
    "Decimal sNaN": lambda: decimal.Decimal("sNaN"),
    "huge Decimal": lambda: decimal.Decimal("1e999999"),
    "Fraction": lambda: fractions.Fraction(1, 2),
    "huge Fraction": lambda: fractions.Fraction(10**400, 3),
    "np.int64": lambda: np.int64(3),
    "np.uint8": lambda: np.uint8(255),
    "np.float32": lambda: np.float32(0.5),
    "np.float64 NaN": lambda: np.float64("nan"),
    "np.longdouble": lambda: np.longdouble("1e4000"),
    "np.bool": lambda: np.True_,
    "np.str": lambda: np.str_("average"),
    "np.array": lambda: np.array([1, 2]),
    "np.array of one": lambda: np.array(3),
    "np.array of objects": lambda: np.array([None, "x"], dtype=object),
    "tensor": lambda: torch.tensor(3),
    "real tensor": lambda: torch.tensor(0.5),
    "NaN tensor": lambda: torch.tensor(math.nan),
    "bool tensor": lambda: torch.tensor(True),
    "vector": lambda: torch.tensor([1.0, 2.0]),
    "empty tensor": lambda: torch.empty(0),
    "meta tensor": lambda: torch.empty((), device="meta"),
    "gradient tensor": lambda: torch.tensor(0.5, requires_grad=True),
    "module": lambda: torch.nn.Linear(1, 1),
}
