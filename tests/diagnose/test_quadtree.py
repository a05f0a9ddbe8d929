"""Progressive landscapes: complete at once, exact where evaluated, the same however they were interrupted."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from qlab.diagnose.directions import random_direction
from qlab.diagnose.landscape import Landscape, landscape, load_landscape
from qlab.diagnose.quadtree import landscaping
from qlab.errors import DataFileError, InputError
from qlab.jobs import Job
from tests.diagnose.nets import batch, trained

POINTS = (23, 18)


def problem(**options: Any) -> dict[str, Any]:
    net, (x, y) = trained("both"), batch(40)
    d1, d2 = (random_direction(net, s) for s in (0, 1))
    return {"net": net, "x": x, "y": y, "d1": d1, "d2": d2, "points": POINTS, "batches": 2} | options


def same(one: Landscape, other: Landscape) -> None:
    np.testing.assert_array_equal(one.evaluated, other.evaluated)
    for key in ("loss", "accuracy", "noise"):
        for f in one.functions:
            np.testing.assert_array_equal(getattr(one, key)[f], getattr(other, key)[f])
    np.testing.assert_array_equal(one.flipped, other.flipped)


@pytest.mark.parametrize("change", [{}, {"d2": None, "points": 37}, {"points": 3}, {"points": (2, 9)}])
def test_refined_to_the_end_it_is_the_plain_landscape(change: dict[str, Any]) -> None:
    options = problem(**change)
    plain = landscape(**options)
    *_, last = landscaping(**options)
    land = last.value
    assert last.fraction == 1
    assert land.evaluated.all()
    for f in plain.functions:
        np.testing.assert_allclose(land.loss[f], plain.loss[f], rtol=1e-12)
        np.testing.assert_allclose(land.noise[f], plain.noise[f], rtol=1e-9)
        np.testing.assert_array_equal(land.accuracy[f], plain.accuracy[f])
    np.testing.assert_array_equal(land.flipped, plain.flipped)


def test_the_first_picture_has_five_points_a_side_and_all_pictures_are_complete() -> None:
    plain = landscape(**problem())
    before = np.zeros(POINTS, bool)
    fractions = []
    for i, update in enumerate(landscaping(**problem())):
        land = update.value
        if i == 0:
            assert land.evaluated.sum() == 25
            assert land.evaluated[[0, 0, -1, -1], [0, -1, 0, -1]].all()
        assert (land.evaluated >= before).all()
        before = land.evaluated
        fractions.append(update.fraction)
        assert np.isfinite(land.flipped).all()
        for f in land.functions:
            assert np.isfinite(land.loss[f]).all()
            at = land.evaluated
            np.testing.assert_allclose(land.loss[f][at], plain.loss[f][at], rtol=1e-12)
            assert land.loss[f].min() >= land.loss[f][at].min() - 1e-12  # interpolated: never outside what was measured
            assert land.loss[f].max() <= land.loss[f][at].max() + 1e-12
    assert fractions == sorted(fractions)
    assert len(fractions) > 5


def test_a_bilinear_function_is_interpolated_exactly() -> None:
    """With a linear net and a linear loss, the loss is linear on the plane: 25 points tell all of it."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3)).double().eval()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (9,), generator=g)
    d1, d2 = ({"0.weight": torch.randn(3, 4, generator=g, dtype=torch.float64)} for _ in range(2))
    options: dict[str, Any] = {"net": net, "x": x, "y": y, "d1": d1, "d2": d2, "points": 31}
    options["loss"] = lambda z, y: z.gather(-1, y[:, None])[:, 0]
    first = next(landscaping(**options)).value
    np.testing.assert_allclose(first.loss["deployed"], landscape(**options).loss["deployed"], atol=1e-12)


def test_it_is_refined_first_where_it_varies() -> None:
    """A loss that is flat but for one corner."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 2)).double().eval()
    x, y = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([0, 1])
    one = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    options: dict[str, Any] = {
        "net": net,
        "x": x,
        "y": y,
        "points": 65,
        "d1": {"0.weight": one},
        "d2": {"0.weight": one.flip(0)},
    }
    options["loss"] = lambda z, y: (z - 0.8).clamp(min=0).prod(-1)
    for update in landscaping(**options):
        known = update.value.evaluated
        if known.sum() > 300:
            break
    assert known[48:, 48:].mean() > 3 * known[:48, :48].mean()


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path: Any) -> None:
    *_, whole = landscaping(**problem())
    file = tmp_path / "land.npz"
    work = landscaping(**problem(), file=file)
    for _ in range(4):
        cut = next(work).value
    work.close()
    same(load_landscape(file), cut)
    again = list(landscaping(**problem(), file=file))
    same(again[3].value, cut)
    same(again[-1].value, whole.value)
    same(load_landscape(file), whole.value)


def test_what_is_in_the_file_is_not_evaluated_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlab.diagnose.views import Views

    file = tmp_path / "land.npz"
    list(landscaping(**problem(), file=file))
    monkeypatch.setattr(Views, "at", lambda *_: pytest.fail("evaluated again"))
    *_, last = landscaping(**problem(), file=file)
    assert last.fraction == 1


def test_a_file_of_something_else_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "land.npz"
    next(iter(landscaping(**problem(), file=file)))
    list(landscaping(**problem(points=5), file=tmp_path / "five.npz"))
    for change in ({"points": 6}, {"sharpness": 7.0}, {"x": batch(40)[0] * 0.5}, {"span": 0.9}):
        with pytest.raises(InputError, match="another landscape"):
            next(landscaping(**problem(**({"points": 5} | change)), file=tmp_path / "five.npz"))
    (tmp_path / "five.npz").write_bytes(b"PK")
    with pytest.raises(DataFileError, match="corrupt"):
        next(landscaping(**problem(points=5), file=tmp_path / "five.npz"))
    assert (tmp_path / "five.npz").read_bytes() == b"PK"  # what could not be read is not written over
    with pytest.raises(InputError, match="seconds"):
        next(landscaping(**problem(), seconds=0))


def test_a_net_of_other_maps_and_another_loss_of_the_same_name_are_other_landscapes(tmp_path: Any) -> None:
    net, (x, y) = trained("float"), batch(40)
    other = copy.deepcopy(net)
    other[2] = torch.nn.Tanh().eval()
    d, file = random_direction(net, 0), tmp_path / "land.npz"
    list(landscaping(net, x, y, d, points=5, loss=lambda z, y: z[..., 0], file=file))
    for change in ({"net": other}, {"loss": lambda z, y: z[..., 1]}):
        options: dict[str, Any] = {"net": net, "loss": lambda z, y: z[..., 0]} | change
        with pytest.raises(InputError, match="another landscape"):
            next(landscaping(x=x, y=y, d1=d, points=5, file=file, **options))
    *_, last = landscaping(net, x, y, d, points=5, loss=lambda z, y: z[..., 0], file=file)
    assert last.value.evaluated.all()


def test_a_folder_that_is_not_there_is_told_before_anything_is_evaluated(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="folder does not exist"):
        next(landscaping(**problem(), file=tmp_path / "nowhere" / "land.npz"))
    with pytest.raises(InputError, match="cannot save"):
        landscape(**problem(points=3)).save(tmp_path / "nowhere" / "land.npz")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    land, file = landscape(**problem(points=3)), tmp_path / "land.npz"
    land.save(file)
    before = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="No space left"):
        land.save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_cancelled_job_keeps_its_picture_and_saves_it(tmp_path: Any) -> None:
    file = tmp_path / "land.npz"

    def stop(job: Job) -> None:
        if job.value is not None:
            job.cancel()

    job = Job(lambda: landscaping(**problem(), file=file), stop).start()
    assert job.wait(60)
    assert job.status == "cancelled"
    assert 25 <= job.value.evaluated.sum() < job.value.evaluated.size
    assert "interpolated" in job.value.summary()
    same(load_landscape(file), job.value)


def test_time_that_is_up_ends_the_rounds_after_a_complete_picture() -> None:
    updates = list(landscaping(**problem(), seconds=1e-9))
    assert len(updates) == 1
    assert np.isfinite(updates[0].value.loss["deployed"]).all()
