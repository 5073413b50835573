"""The arithmetic of scale against numbers worked out by hand."""

import pytest

from benchmarks import scale, scale_model as model

CLUSTER = model.Cluster(
    copy=1e12,
    efficiency=0.5,
    link=1e9,
    hop=1e-5,
    disk=1e8,
    host_memory=6e11,
    device_memory=8e10,
    flops=1e14,
    tokens=100,
)


def test_a_line_goes_through_both_measurements():
    line = model.solve((2000, 20e6, 0.05), (20, 20e6, 0.03))
    assert line(2000, 20e6) == pytest.approx(0.05)
    assert line(20, 20e6) == pytest.approx(0.03)
    assert line.per_piece == pytest.approx(0.02 / 1980)


def test_sizes_of_one_shape_determine_no_line():
    with pytest.raises(ValueError, match="two sizes of one shape determine no line"):
        model.solve((1, 10, 1.0), (2, 20, 2.0))


def test_a_plane_goes_through_all_three_measurements():
    points = [(2, 80e6, 0.11), (6, 80e6, 0.19), (2, 240e6, 0.30)]
    plane = model.fit_plane(points)
    for files, size, cost in points:
        assert plane(files, size) == pytest.approx(cost)
    assert plane.per_read == pytest.approx(0.08 / (4 * 80e6))


@pytest.mark.parametrize(
    "points",
    [
        [(2, 80.0, 1.0), (2, 80.0, 1.0), (2, 240.0, 1.0)],  # no second number of files
        [(2, 80.0, 1.0), (6, 80.0, 1.0), (2, 80.0, 1.0)],  # no second size
        [(2, 80.0, 1.0), (6, 90.0, 1.0), (2, 240.0, 1.0)],
    ],
)
def test_three_points_that_determine_no_plane_are_refused(points):
    with pytest.raises(ValueError, match="must differ in files alone"):
        model.fit_plane(points)


def test_an_average_takes_four_bytes_of_the_share_and_the_stash_of_half_precision_weights():
    assert model.ema_memory(1e9, 1) == 4e9
    assert model.ema_memory(1e9, 8) == 5e8
    assert model.ema_memory(1e9, 1, weight_bytes=2, swapped=True) == 6e9
    assert model.ema_memory(1e9, 1, weight_bytes=4, swapped=True) == 4e9  # exchanged in place


def test_an_update_reads_weight_and_average_and_writes_the_average():
    assert model.ema_update_bytes(1e9, 1, weight_bytes=4) == 12e9
    assert model.ema_update_seconds(1e9, 10, CLUSTER, weight_bytes=2) == pytest.approx(1e9 / 5e11)


@pytest.mark.parametrize(("ranks", "hops"), [(1, 0), (2, 2), (3, 4), (8, 6), (16_384, 28)])
def test_a_small_collective_is_a_tree_up_and_down(ranks, hops):
    assert model.hops(ranks) == hops
    assert model.accumulation_seconds(ranks, CLUSTER) == pytest.approx(hops * 1e-5)


def test_a_step_is_six_operations_per_parameter_and_token():
    assert model.step_seconds(1e9, CLUSTER) == pytest.approx(6e11 / 1e14)


def test_gathering_moves_what_a_rank_has_not_and_pays_for_every_tensor():
    assert model.gather_seconds(1e9, 1, CLUSTER) == 0
    latency = 2 * 288 * 2 * 1e-5
    assert model.gather_latency(1e9, 2, CLUSTER) == pytest.approx(latency)
    assert model.gather_seconds(1e9, 2, CLUSTER) == pytest.approx(6e9 / 2 / 1e9 + latency)
    assert model.gather_memory(1e9) == 6e9
    assert model.gather_memory(1e9, weight_bytes=4) == 8e9


def test_statistics_add_up_once_for_many_rows():
    assert model.statistics_seconds(1e-4, 100, 8, CLUSTER) == pytest.approx(1e-4 + 6e-5 / 100)


def test_averaging_reads_everything_once_and_writes_one():
    plane = model.Plane(fixed=1.0, per_read=1e-9, per_result=2e-9)
    one = 1 + 5 * 4e9 * 1e-9 + 4e9 * 2e-9 + 5 * 4e9 / 1e8 + 4e9 / 1e8
    assert model.averaging_seconds(plane, 1e9, 5, 1, CLUSTER) == pytest.approx(one)
    four = 1 + (5 * 4 + 2 * 4) / 4 + 5 * 4e9 / 4e8 + 4e9 / 1e8  # one of four writes
    assert model.averaging_seconds(plane, 1e9, 5, 4, CLUSTER) == pytest.approx(four)
    assert model.averaging_memory(1e9, 1, 64e6) == 64e6
    assert model.averaging_memory(1e9, 4, 64e6) == 64e6 + 1e9


def test_what_fits():
    assert model.largest_file(CLUSTER) == pytest.approx(1e11)
    assert model.largest_replica(CLUSTER) == pytest.approx(4e9)


@pytest.mark.parametrize(
    ("predicted", "measured", "holds"),
    [(1.19, 1, True), (1.21, 1, False), (0.81, 1, True), (0.79, 1, False), (1, 0, False)],
)
def test_a_prediction_may_be_a_fifth_off(predicted, measured, holds):
    check = scale.Check("what", "size", predicted, measured, "s")
    assert check.holds is holds
    assert ("WRONG" in scale.table_of_checks([check])) is not holds


@pytest.mark.parametrize(("predicted", "status"), [(2.0, 1), (1.1, 0)])
def test_the_benchmark_fails_when_a_prediction_is_wrong(monkeypatch, predicted, status):
    line, plane, printed = model.Line(1e-6, 1e-9), model.Plane(0.1, 1e-9, 1e-9), []
    check = scale.Check("what", "size", predicted, 1.0, "s")
    monkeypatch.setattr(scale, "check_ema", lambda quick: ({"update": line}, [check]))
    monkeypatch.setattr(scale, "check_averaging", lambda folder, quick: (plane, 64e6, []))
    monkeypatch.setattr(scale, "check_rows", lambda folder, quick: (line, []))
    monkeypatch.setattr(scale, "check_steps", lambda quick: (1e-4, []))
    monkeypatch.setattr(scale, "report", lambda name, tables, data, keep: printed.extend(tables))
    assert scale.main() == status
    text = "\n".join(printed)
    assert ("WRONG" in text) is bool(status)
    assert "at 1 T parameters 6 TB of host memory" in text
    assert "| 1,000 B | 16,384 |" in text
    assert "| 100 B | 8 |" not in text  # the model itself does not fit there
