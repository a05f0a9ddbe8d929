"""What is sent to the browser: thinned curves, shares, rows that say how runs differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("anywidget")

from qlab.widgets.records import MAX_POINTS, Record, decimate, label, pack, table
from qlab.widgets.settings import Settings

from qlab.live import Histogram, Snapshot


@given(st.integers(1, 6000), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_thinned_curve_keeps_ends_extremes_order_and_its_own_points(n: int, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=n)
    x = np.arange(n, dtype=float)
    xs, ys = decimate(x, y)
    assert len(xs) <= MAX_POINTS
    assert len(xs) == min(n, len(xs))
    assert (np.diff(xs) > 0).all()
    np.testing.assert_array_equal(y[xs.astype(int)], ys)
    assert (xs[0], xs[-1]) == (x[0], x[-1])
    assert ys.min() == y.min()
    assert ys.max() == y.max()


def test_a_short_curve_is_left_alone() -> None:
    x = np.arange(float(MAX_POINTS))
    xs, ys = decimate(x, -x)
    np.testing.assert_array_equal(xs, x)
    np.testing.assert_array_equal(ys, -x)


def test_a_curve_of_nan_is_thinned_too() -> None:
    x = np.arange(5000.0)
    xs, ys = decimate(x, np.full(5000, np.nan))
    assert len(xs) <= MAX_POINTS
    assert np.isnan(ys).all()


def test_labels_go_on_after_z() -> None:
    assert [label(i) for i in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]


def snapshot(points: int = 5) -> Snapshot:
    x = np.arange(1.0, points + 1)
    metrics = ("train/loss", "val/loss", "val/acc", "val/acc_latent", "quant/flip_ratio", "quant/flip_ratio/fc")
    histogram = Histogram(np.array([-1.0, 0.0, 1.0]), np.array([1, 3]), np.array([-1.0, 1.0]))
    return Snapshot(points, 1.0, dict.fromkeys(metrics, (x, x / points)), histogram)


def test_packed_arrays_are_little_endian_float32() -> None:
    packed = pack(Record("A", Settings(), 0, snapshot=snapshot()))
    series = {s["metric"]: s for s in packed["series"]}
    assert set(series) == {"train/loss", "val/loss", "val/acc", "val/acc_latent", "quant/flip_ratio"}
    np.testing.assert_array_equal(np.frombuffer(series["val/acc"]["y"], "<f4"), np.float32([0.2, 0.4, 0.6, 0.8, 1.0]))
    np.testing.assert_array_equal(np.frombuffer(packed["histogram"]["share"], "<f4"), [0.25, 0.75])


def test_the_largest_packed_run_is_a_twentieth_of_a_message() -> None:
    packed = pack(Record("A", Settings(), 0, snapshot=snapshot(100_000)))
    size = sum(len(s["x"]) + len(s["y"]) for s in packed["series"])
    assert size <= 50_000


def test_rows_name_only_what_differs() -> None:
    a = Record("A", Settings(epochs=5), 0, snapshot=snapshot())
    b = Record("B", Settings(epochs=5, hyper={"lr": 0.1}, name="other", guess=3.0), 1)
    rows = table([a, b])
    assert [r["differs"] for r in rows] == ["", "lr=0.1"]
    assert rows[0]["acc"] == 1.0
    assert rows[1]["acc"] is None
    assert table([a])[0]["differs"] == ""


def test_a_metric_that_is_nan_is_shown_as_missing() -> None:
    x = np.array([1.0])
    assert (
        Record("A", Settings(), snapshot=Snapshot(1, 0.1, {"train/loss": (x, np.array([np.nan]))})).last("train/loss")
        is None
    )
