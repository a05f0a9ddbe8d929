"""A path in its plane: the net at its coordinates, shares of variance beside their null, checkpoints of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlab
from qlab.diagnose.landscape import landscape
from qlab.diagnose.trajectory import trajectory
from qlab.errors import InputError
from tests.diagnose.nets import batch, trained


def nets() -> list[nn.Module]:
    return [trained("weights", epochs=n) for n in (0, 1, 2, 3)]


def test_the_last_net_is_the_origin_and_points_in_the_plane_are_found_again() -> None:
    path = trajectory(nets(), steps=[0, 12, 24, 36])
    assert (path.a[-1], path.b[-1]) == (0, 0)
    assert path.steps.tolist() == [0, 12, 24, 36]
    first, last = ({n: p.detach() for n, p in net.named_parameters()} for net in (nets()[0], nets()[-1]))
    d1, d2 = path.directions
    for d, coordinate in ((d1, path.a[0]), (d2, path.b[0])):
        inner = sum(float((d[n] * (first[n] - last[n])).sum()) for n in d)
        np.testing.assert_allclose(inner, coordinate, rtol=1e-8)
        assert np.isclose(sum(float(t.square().sum()) for t in d.values()), 1)
    far = sum(float((first[n] - last[n]).square().sum()) for n in d1)
    np.testing.assert_allclose((path.a[0] ** 2 + path.b[0] ** 2) / far, path.inside[0], rtol=1e-8)
    np.testing.assert_allclose(path.explained.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(path.null[:2], 6 / np.pi**2 / np.array([1, 4]))


def test_the_landscape_of_the_plane_holds_the_path(tmp_path: Any) -> None:
    from qlab.plots.landscape import landscape_figure

    path, (x, y) = trajectory(nets()), batch(60)
    (low, high), (bottom, top) = path.span()
    assert low < path.a.min() <= path.a.max() < high
    assert bottom < path.b.min() <= path.b.max() < top
    for points in (5, 8, 51):
        for v, (first, last) in zip((path.a, path.b), path.span(points=points), strict=True):
            assert first < v.min() <= v.max() < last
            assert np.abs(np.linspace(first, last, points)).min() < 1e-9 * (last - first)  # the last net is a point
    net = nets()[-1]
    land = landscape(net, x, y, *path.directions, span=((low, high), (bottom, top)), points=5)
    with torch.no_grad():
        at = landscape(net, x, y, *path.directions, span=0.5, points=3)
        np.testing.assert_allclose(at.loss["deployed"][1, 1], float(F.cross_entropy(net(x), y)), rtol=1e-10)
    landscape_figure(land, path).savefig(tmp_path / "plane.png")
    path.figure().savefig(tmp_path / "path.png")


def test_dictionaries_and_checkpoints_are_taken(tmp_path: Any) -> None:
    by_nets = trajectory(nets())
    by_tensors = trajectory([dict(net.named_parameters()) for net in nets()])
    np.testing.assert_array_equal(by_nets.a, by_tensors.a)
    files = [qlab.fit("ste", "digits", epochs=n, root=tmp_path / str(n), progress=False).checkpoint for n in (1, 2, 3)]
    path = trajectory(files)
    assert len(path.a) == 3
    assert path.weights == 64 * 64 + 64 * 32 + 32 * 10


def test_the_summary_names_the_null_and_the_share_inside() -> None:
    path = trajectory(nets())
    for words in ("A random walk", "60.8%", f"{path.explained[0]:.1%}", f"{path.inside[0]:.1%}"):
        assert words in path.summary()
    assert list(path.frame()["a"]) == list(path.a)
    assert list(path.components()["explained"]) == list(path.explained)
    assert path.figure().get_label() == path.summary()


def test_what_is_no_path_is_refused() -> None:
    with pytest.raises(InputError, match="at least three"):
        trajectory(nets()[:2])
    with pytest.raises(InputError, match="expected a list"):
        trajectory(nets()[0])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="4 whole numbers"):
        trajectory(nets(), steps=[1, 2])
    with pytest.raises(InputError, match="net is a int"):
        trajectory([1, 2, 3])  # type: ignore[list-item]
