"""LandscapeExplorer without a browser: messages in, surfaces out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from qlab.widgets.landscape import LandscapeExplorer
from torch import nn

from qlab.diagnose.directions import random_direction
from qlab.diagnose.landscape import landscape
from qlab.diagnose.trajectory import trajectory
from qlab.errors import InputError
from tests.diagnose.nets import batch, trained

POINTS = 15


def explorer(**options: Any) -> LandscapeExplorer:
    net, (x, y) = trained("both"), batch(40)
    return LandscapeExplorer(net, x, y, **({"points": POINTS} | options))


def message(view: LandscapeExplorer, **content: Any) -> None:
    view._on_message(view, content, [])


def finished(view: LandscapeExplorer) -> None:
    job = view._job.job
    assert job is not None
    job.result(60)
    assert job.wait(60)


def test_ready_evaluates_and_the_surface_is_that_of_the_plain_function() -> None:
    view = explorer()
    assert view.surface == {}
    message(view, type="ready")
    finished(view)
    net, (x, y) = trained("both"), batch(40)
    plain = landscape(net, x, y, random_direction(net, 0), random_direction(net, 1), points=POINTS)
    assert view.landscape is not None
    for f in ("deployed", "latent", "smoothed"):
        np.testing.assert_allclose(view.landscape.loss[f], plain.loss[f], rtol=1e-12)
    sent = np.frombuffer(view.surface["loss"], "<f4").reshape(3, POINTS, POINTS)
    np.testing.assert_allclose(sent[0], plain.loss["deployed"], rtol=1e-6)
    assert view.surface["complete"]
    assert view.caption == view.landscape.summary()
    assert view.status["phase"] == "idle"


def test_surfaces_come_coarse_first_and_grow() -> None:
    view = explorer(points=33)
    seen: list[int] = []
    view.observe(lambda change: seen.append(sum(change["new"]["evaluated"])), "surface")
    view.refine(wait=True)
    assert seen[0] == 25
    assert seen[-1] == 33 * 33
    assert seen == sorted(seen)
    assert len(view.surface["loss"]) < 2**20


def test_another_sharpness_changes_the_smoothed_surface_alone() -> None:
    view = explorer()
    view.refine(wait=True)
    before = view.landscape
    message(view, type="smooth", sharpness=50)
    finished(view)
    after = view.landscape
    assert before is not None
    assert after is not None
    assert after.sharpness == 50 == view.settings["sharpness"]
    np.testing.assert_array_equal(before.loss["deployed"], after.loss["deployed"])
    net, (x, y) = trained("both"), batch(40)
    plain = landscape(
        net,
        x,
        y,
        random_direction(net, 0),
        random_direction(net, 1),
        points=POINTS,
        functions=["smoothed"],
        sharpness=50,
    )
    np.testing.assert_allclose(after.loss["smoothed"], plain.loss["smoothed"], rtol=1e-12)
    assert np.abs(before.loss["smoothed"] - after.loss["smoothed"]).max() > 0


def test_stopping_keeps_a_whole_picture_and_going_on_completes_it() -> None:
    view = explorer(points=33)
    view.observe(lambda change: message(view, type="stop"), "surface")
    job = view.refine()
    assert job.wait(60)
    assert job.status == "cancelled"
    land = view.landscape
    assert land is not None
    assert 25 <= land.evaluated.sum() < 33 * 33
    assert np.isfinite(land.loss["deployed"]).all()
    view.unobserve_all("surface")
    fractions: list[float] = []
    view.observe(lambda change: fractions.append(sum(change["new"]["evaluated"])), "surface")
    message(view, type="refine")
    finished(view)
    assert min(fractions) >= land.evaluated.sum()  # it does not begin anew
    assert view.landscape is not None
    assert view.landscape.evaluated.all()


def test_batch_norm_is_frozen_or_re_estimated() -> None:
    view = explorer(points=5)
    view.refine(wait=True)
    frozen = view.landscape
    message(view, type="norm", batch_norm="reestimated")
    finished(view)
    assert frozen is not None
    assert view.landscape is not None
    assert view.landscape.batch_norm == "reestimated"
    assert np.abs(frozen.loss["deployed"] - view.landscape.loss["deployed"]).max() > 0
    assert "re-estimated" in view.caption


def test_a_foreign_net_has_one_surface_and_no_controls_that_make_no_sense() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 10)).double().eval()
    view = LandscapeExplorer(net, *batch(30), points=5)
    view.refine(wait=True)
    assert view.surface["functions"] == ["deployed"]
    assert view.settings["modes"] == []
    assert view.settings["smooth"] is False
    assert view.surface["flipped"] == b""


def test_a_path_gives_plane_and_span() -> None:
    nets = [trained("weights", epochs=n) for n in (0, 1, 2, 3)]
    path = trajectory(nets)
    view = LandscapeExplorer(nets[-1], *batch(30), path=path, points=5)
    view.refine(wait=True)
    assert view.landscape is not None
    np.testing.assert_allclose([view.landscape.a[0], view.landscape.a[-1]], path.span(points=5)[0])
    np.testing.assert_allclose(np.frombuffer(view.path["a"], "<f4"), path.a, rtol=1e-6)
    assert "first principal component" in view.landscape.directions[0]


def test_the_static_twin_is_a_picture_with_words() -> None:
    view = explorer(points=9)
    data, _ = view._repr_mimebundle_()
    assert "image/png" not in data
    with pytest.raises(InputError, match="refine"):
        view.figure()
    view.refine(wait=True)
    data, metadata = view._repr_mimebundle_()
    assert len(data["image/png"]) < 400_000
    assert "Deployed" in metadata["image/png"]["alt"]
    assert data["text/plain"].startswith("LandscapeExplorer. Loss")


def test_state_gives_the_same_view_again() -> None:
    view = explorer(points=7)
    view.smooth(20)
    net, (x, y) = trained("both"), batch(40)
    again = LandscapeExplorer.from_state(view.state(), net, x, y)
    assert again.state() == view.state()
    for spoiled in (
        {},
        [],
        {"widget": "BitLab", "version": 1, "settings": {}},
        view.state() | {"version": True},
        view.state() | {"settings": {"sharpness": 1e9, "batch_norm": "frozen", "points": 7}},
        view.state() | {"settings": {"sharpness": 1, "batch_norm": "frozen", "points": 10**9}},
        view.state() | {"settings": {"x": 1}},
    ):
        with pytest.raises(InputError):
            LandscapeExplorer.from_state(spoiled, net, x, y)


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"type": "dance"},
        {"type": "smooth"},
        {"type": "smooth", "sharpness": "5"},
        {"type": "smooth", "sharpness": float("nan")},
        {"type": "smooth", "sharpness": -1},
        {"type": "norm", "batch_norm": ["frozen"]},
    ],
)
def test_messages_that_mean_nothing_are_told_and_never_raised(content: Any) -> None:
    view = explorer(points=5)
    view._on_message(view, content, [])
    assert view.status["error"]
    assert view.state()["settings"]["sharpness"] == 5.0


def test_nets_and_data_that_do_not_fit_are_refused() -> None:
    net, (x, y) = trained("both"), batch(20)
    with pytest.raises(InputError, match="points"):
        LandscapeExplorer(net, x, y, points=2)
    with pytest.raises(InputError, match="labels"):
        LandscapeExplorer(net, x, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="constant"):
        LandscapeExplorer(net, x * 0, y)
