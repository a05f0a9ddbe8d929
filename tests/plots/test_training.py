"""Static pictures of training runs."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from qlab.errors import InputError
from qlab.live import Histogram, Snapshot
from qlab.plots.training import COLOURS, curves, history_figure, history_text


def snapshot(seed: int = 0) -> Snapshot:
    random = np.random.default_rng(seed)
    steps = np.arange(1.0, 21.0)
    history = {m: (steps, random.random(20)) for m in ("val/acc", "val/acc_latent", "train/loss", "quant/flip_ratio")}
    counts, edges = np.histogram(random.normal(size=500), bins=20)
    return Snapshot(20, 4.0, history, Histogram(edges, counts, np.array([-1.0, 1.0])))


def test_figure_draws_every_curve_of_every_run() -> None:
    runs = [snapshot(0), snapshot(1)]
    accuracy, loss, flips, weights = history_figure(runs, chance=0.1).axes
    labels = [line.get_label() for line in accuracy.get_lines()]
    assert {"A deployed", "A latent", "B deployed", "B latent"} <= set(labels)
    drawn = {line.get_label(): line for line in accuracy.get_lines()}
    np.testing.assert_array_equal(drawn["B latent"].get_ydata(), runs[1].history["val/acc_latent"][1])
    assert drawn["A deployed"].get_linestyle() != drawn["A latent"].get_linestyle()
    assert len(loss.get_lines()) == len(flips.get_lines()) == 2
    assert flips.get_yscale() == "log"
    assert len(weights.patches) == 2


def test_figure_is_a_picture_of_moderate_size_and_leaves_pyplot_alone() -> None:
    import matplotlib._pylab_helpers

    before = len(matplotlib._pylab_helpers.Gcf.figs)
    buffer = io.BytesIO()
    history_figure([snapshot()]).savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    assert len(buffer.getvalue()) < 100_000
    assert len(matplotlib._pylab_helpers.Gcf.figs) == before


def test_text_names_the_last_values() -> None:
    run = snapshot()
    text = history_text([run], ["mine"])
    assert text.startswith("Run mine: ")
    assert f"{run.history['val/acc'][1][-1]:.1%} at step 20" in text
    assert f"{run.history['train/loss'][1][-1]:.3g}" in text


def test_a_run_without_history_says_so() -> None:
    assert history_text([Snapshot(0, 0.0, {})]) == "Run A: nothing recorded yet."
    assert len(history_figure([Snapshot(0, 0.0, {})]).axes) == 4


def test_a_tidy_frame_becomes_curves() -> None:
    class Run:
        history = pd.DataFrame(
            {"step": [1, 2, 2], "epoch": [0, 0, 0], "metric": ["a", "a", "b"], "value": [0.5, 0.25, 3.0]}
        )

    found = curves(Run())
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["a"], [[1.0, 2.0], [0.5, 0.25]])


def test_more_runs_than_colours_are_refused() -> None:
    with pytest.raises(InputError, match="at most 6"):
        history_figure([snapshot()] * (len(COLOURS) + 1))


def test_labels_that_do_not_match_are_refused() -> None:
    with pytest.raises(InputError, match="2 labels for 1 runs"):
        history_text([snapshot()], ["a", "b"])


def test_something_that_is_no_run_is_refused() -> None:
    with pytest.raises(InputError, match="expected runs"):
        history_figure([3])
