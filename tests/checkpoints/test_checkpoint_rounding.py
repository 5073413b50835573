"""The mean is rounded once: against exact fractions, rounded to the nearest number with ties to the even one."""

from __future__ import annotations

import threading
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lightning_plugins import average_checkpoints
from lightning_plugins.checkpoints import streaming_mean
from lightning_plugins.checkpoints.formats import open_checkpoint
from lightning_plugins.checkpoints.streaming_mean import CheckpointMean, _round_into

# explicit bits of the mantissa and the smallest exponent of a normal number
FORMATS = {
    torch.float32: (23, -126),
    torch.bfloat16: (7, -126),
    torch.float16: (10, -14),
    torch.float8_e5m2: (2, -14),
}


def nearest(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The nearest number of a format, by arithmetic on fractions; the numbers here stay below its largest."""
    if value == 0:
        return value
    bits, smallest = FORMATS[dtype]
    exponent = max(value.numerator.bit_length() - value.denominator.bit_length() - 2, smallest - 3)
    while abs(value) >= Fraction(2) ** (exponent + 1) or exponent < smallest:
        exponent += 1
    unit = Fraction(2) ** (exponent - bits)
    # Python rounds halves to the even number, as IEEE 754 does
    return round(value / unit) * unit


def write(folder, rows, dtype):
    paths = []
    for number, row in enumerate(rows):
        paths.append(folder / f"{number}.pt")
        torch.save({"w": torch.tensor(row, dtype=torch.float64).to(dtype)}, paths[-1])
    return paths


def assert_rounded_once(folder, rows, dtype, weights=None):
    paths = write(folder, rows, dtype)
    stored = [torch.load(path)["w"].double().tolist() for path in paths]
    shares = [Fraction(weight) for weight in (weights or [1] * len(rows))]
    found = average_checkpoints(paths, weights=weights)["w"]
    assert found.dtype == dtype
    for column, mean in zip(zip(*stored, strict=True), found.double().tolist(), strict=True):
        exact = sum((Fraction(x) * share for x, share in zip(column, shares, strict=True)), Fraction(0)) / sum(shares)
        assert Fraction(mean) == nearest(exact, dtype), (column, mean)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("count", [2, 3, 5, 7, 10, 48])
def test_any_number_of_files_is_rounded_once(tmp_path, dtype, count):
    """Values near 1000, whose sums lose bits in float32; in narrow types many means are exact ties."""
    generator = torch.Generator().manual_seed(count)
    rows = (1000 + 30 * torch.randn(count, 200, generator=generator, dtype=torch.float64)).tolist()
    assert_rounded_once(tmp_path, rows, dtype)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("weights", [[1, 2, 3], [0.5, 0.25, 0.25], [3, 0, 1], [7, 7, 7], [1e300, 1e300, 2e300]])
def test_weighted_means_are_rounded_once(tmp_path, dtype, weights):
    generator = torch.Generator().manual_seed(3)
    assert_rounded_once(
        tmp_path, torch.randn(3, 100, generator=generator, dtype=torch.float64).tolist(), dtype, weights
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_numbers_of_any_size_are_rounded_once(data, tmp_path_factory):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    count = data.draw(st.integers(2, 9))
    # apart by less than the 29 bits that float64 has more than float32
    number = st.builds(lambda m, e: m * 2.0**e, st.integers(-255, 255), st.integers(-6, 6))
    rows = data.draw(st.lists(st.lists(number, min_size=4, max_size=4), min_size=count, max_size=count))
    assert_rounded_once(tmp_path_factory.mktemp("files"), rows, dtype)


def test_a_number_just_above_a_half_is_not_taken_for_a_tie():
    """torch goes to bfloat16 by way of float32, where 1 + 2^-8 + 2^-40 becomes the half between two neighbors."""
    values = torch.tensor(
        [1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 2**-8 - 2**-40, -(1 + 2**-8 + 2**-40)], dtype=torch.float64
    )
    assert values.to(torch.bfloat16).tolist() == [1.0, 1.0, 1.0, -1.0]
    target = torch.empty(4, dtype=torch.bfloat16)
    _round_into(target, values)
    assert target.tolist() == [1 + 2**-7, 1.0, 1.0, -(1 + 2**-7)]


def test_infinity_nan_and_the_largest_numbers_pass_the_rounding():
    values = [float("inf"), -float("inf"), float("nan"), 65504.0, 1e-320, -0.0]
    target = torch.empty(6, dtype=torch.float16)
    _round_into(target, torch.tensor(values, dtype=torch.float64))
    np.testing.assert_array_equal(target.double().numpy(), [*values[:4], 0.0, 0.0])


@pytest.mark.parametrize("total", [*range(1, 130), 0.75])
def test_dividing_by_a_reciprocal_breaks_no_tie(total):
    """Sums that are a number of bfloat16 and a half, as often as there are files."""
    divide = streaming_mean._division_by(float(total))
    halves = torch.arange(257, 511, 2, dtype=torch.float64) / 256
    sums = halves * total
    exact = [Fraction(value) / Fraction(float(total)) for value in sums.tolist()]
    target = torch.empty(len(halves), dtype=torch.bfloat16)
    _round_into(target, divide(sums.clone()))
    assert [Fraction(value) for value in target.double().tolist()] == [
        nearest(value, torch.bfloat16) for value in exact
    ]


def test_a_division_is_a_product_where_that_rounds_alike():
    """The reciprocal of 49 is off by more than that allows."""
    products = SimpleNamespace(mul_=lambda factor: ("product", factor), div_=lambda total: ("quotient", total))
    assert streaming_mean._division_by(4.0)(products) == ("product", 0.25)
    assert streaming_mean._division_by(3.0)(products) == ("product", 1 / 3)
    assert streaming_mean._division_by(49.0)(products) == ("quotient", 49.0)


def test_float32_sums_are_still_there_for_the_asking(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = (1000 + torch.randn(48, 500, generator=generator, dtype=torch.float64)).tolist()
    paths = write(tmp_path, rows, torch.float32)
    once = average_checkpoints(paths)["w"]
    narrow = average_checkpoints(paths, dtype=torch.float32)["w"]
    assert not torch.equal(once, narrow)
    assert torch.allclose(once, narrow, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_wide_numbers_are_averaged_without_overflow_and_equal_ones_kept(tmp_path, dtype):
    huge = torch.finfo(torch.float64).max
    rows = [[huge, 0.1, 1.0], [huge, 0.1, 2.0], [huge, 0.1, 6.0]]
    assert average_checkpoints(write(tmp_path, rows, dtype))["w"].tolist() == [huge, 0.1, 3.0]


@pytest.mark.parametrize("weights", [[0, 1, 1], [0, 0, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_files_that_weigh_nothing_count_nothing(tmp_path, weights, dtype):
    rows = [[9.0], [1.0], [3.0]]
    expected = sum(w * row[0] for w, row in zip(weights, rows, strict=True)) / sum(weights)
    assert average_checkpoints(write(tmp_path, rows, dtype), weights=weights)["w"].item() == expected


def test_two_threads_make_the_same_bits_as_one(tmp_path, monkeypatch):
    """The tests have one thread; here the ranges are shared out, and several threads take part."""
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        state = {
            "long": torch.randn((1 << 12) + 3, generator=generator),
            "half": torch.randn(3000, generator=generator).bfloat16(),
            "wide": torch.randn(2999, generator=generator, dtype=torch.float64),
        }
        torch.save(state, tmp_path / f"{number}.pt")
    monkeypatch.setattr(streaming_mean, "_CHUNK", 100)
    paths = sorted(tmp_path.glob("*.pt"))
    one = average_checkpoints(paths)
    before, names = torch.get_num_threads(), set()
    fill = CheckpointMean._fill

    def watched(*args):
        names.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1
        fill(*args)

    monkeypatch.setattr(CheckpointMean, "_fill", watched)
    try:
        torch.set_num_threads(2)
        mean = CheckpointMean([open_checkpoint(path, trust=False) for path in paths])
        two = mean.state_dict()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert all(name.startswith("averaging") for name in names)
    assert all(torch.equal(one[name], two[name]) for name in one)


def mean_of_two(folder):
    for number in range(2):
        torch.save({"w": torch.arange(10.0) + number, "n": torch.tensor([number, number])}, folder / f"{number}.pt")
    return CheckpointMean([open_checkpoint(folder / f"{number}.pt", trust=False) for number in range(2)])


def test_a_part_is_as_long_as_asked_for(tmp_path):
    mean = mean_of_two(tmp_path)
    assert mean.part("w", 3, 7).tolist() == [3.5, 4.5, 5.5, 6.5]
    assert mean.part("w", 4, 4).tolist() == []
    assert mean.part("n", 1, 2).tolist() == [1]


def test_one_block_of_memory_takes_each_tensor_in_turn(tmp_path):
    mean = mean_of_two(tmp_path)
    scratch = mean.scratch()
    assert scratch.nbytes == 40
    for name, expected in (("w", [0.5 + number for number in range(10)]), ("n", [1, 1])):
        found = mean.tensor(name, None, scratch)
        assert (found.tolist(), found.data_ptr()) == (expected, scratch.data_ptr())
