"""The honesty panel: masked nets are found, with what masks them; honest nets are not accused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from qlab.attacks import PGD
from qlab.attacks.checks import Check
from qlab.attacks.checks_runs import Budget
from qlab.attacks.honesty import CHECKS, Honesty, examining, honesty
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Job
from qlab.plots.honesty import curve_figure, honesty_figure
from tests.attacks.masked_nets import Blocked, Noisy, Rippled, Rounded, Scaled, SigmoidOut, batch, trained

EPS = 0.1
SMALL = Budget(steps=10, restarts=5, queries=300, points=500, looked=16, traced=32)

MASKED: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "huge scale": ("V", lambda seed: Scaled(trained(seed=seed), 1000.0)),
    "large scale": ("V", lambda seed: Scaled(trained(seed=seed), 30.0)),
    "saturated sigmoid": ("V", lambda seed: SigmoidOut(trained(seed=seed), 1.0)),
    "saturated sigmoid, scaled": ("V", lambda seed: Scaled(SigmoidOut(trained(seed=seed), 1.0), 20.0)),
    "quantized input": ("S", lambda seed: Rounded(trained(seed=seed), 4.0)),
    "finely quantized input": ("S", lambda seed: Rounded(trained(seed=seed), 16.0)),
    "shattered": ("S", lambda seed: Rippled(trained(seed=seed), 0.02)),
    "blocked": ("S", lambda seed: Blocked(trained(seed=seed), 1.0)),
    "straight-through": ("S", lambda seed: trained("both", seed)),
    "noise": ("R", lambda seed: Noisy(trained(seed=seed), 0.1)),
}

HONEST: dict[str, Callable[[int], nn.Module]] = {
    "float": lambda seed: trained("relu", seed),
    "adversarially trained": lambda seed: trained("relu", seed, 0.1),
    "smooth": lambda seed: trained("tanh", seed),
    "smooth, adversarially trained": lambda seed: trained("tanh", seed, 0.1),
}

FAST = ("huge scale", "saturated sigmoid", "quantized input", "shattered", "noise", "float", "adversarially trained")


def named(nets: Mapping[str, object]) -> list[object]:
    """Return names as parameters; one net of each kind is examined always, all of them by `pytest -m slow`."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in nets]


@cache
def panel_of(name: str) -> Honesty:
    """Return the panel of a net of seed 0 by its name."""
    return examined((MASKED[name][1] if name in MASKED else HONEST[name])(0))


def examined(net: nn.Module, n: int = 100, **settings: object) -> Honesty:
    x, y = batch(n)
    return honesty(net.eval(), x, y, EPS, **({"budget": SMALL, "twin": trained(seed=9)} | settings))


# The planted nets


@pytest.mark.parametrize("name", named(MASKED))
def test_a_masked_net_is_found_with_what_masks_it(name: str) -> None:
    mechanism, panel = MASKED[name][0], panel_of(name)
    assert panel.masked
    assert panel.mechanisms == (mechanism,)
    assert panel.summary().startswith("Masking: found by check")


@pytest.mark.parametrize("name", named(HONEST))
def test_an_honest_net_is_not_accused(name: str) -> None:
    panel = panel_of(name)
    assert not panel.masked, panel.summary()
    assert panel.summary().startswith("No sign of masking found")
    assert panel.complete
    assert [c.number for c in panel.checks] == list(range(1, 18))


def test_a_logit_scale_fails_the_checks_that_name_it_and_they_show_how_far_accuracy_falls() -> None:
    honest, masked = panel_of("float"), panel_of("huge scale")
    for number in (3, 10, 12):
        assert honest[number].state == "pass"
        assert masked[number].state == "fail"
    # The same net with other logits: what the margin finds is the same, what cross-entropy finds is not.
    for loss in ("margin", "DLR"):
        assert masked[11].evidence[f"A({loss})"] == pytest.approx(honest[11].evidence[f"A({loss})"], abs=0.02)
    assert masked.plain > honest.plain + 0.3
    assert masked.worst == pytest.approx(honest.worst, abs=0.02)


@pytest.mark.slow
def test_a_steep_net_is_found() -> None:
    # Sigmoids so steep are steps: their gradient is right in a place too small to attack from, and both words fit.
    panel = examined(trained("steep"))
    assert panel.masked
    assert set(panel.mechanisms) <= {"S", "V or S"}


def test_a_net_with_a_generator_of_its_own_is_found_random() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.noise = trained(), torch.Generator().manual_seed(0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x + 0.1 * torch.randn(x.shape, generator=self.noise))

    panel = examined(Own())
    assert panel.mechanisms == ("R",)
    assert "no attack can average" in panel[16].words
    assert np.isnan(panel.plain)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_all_planted_nets_and_honest_nets_of_other_seeds(seed: int) -> None:
    x, y = batch(100)
    for name, (mechanism, make) in MASKED.items():
        for eps in (0.1, 0.2):
            panel = honesty(make(seed).eval(), x, y, eps, twin=trained(seed=9), budget="quick")
            assert panel.mechanisms == (mechanism,), (name, eps, panel.summary())
    x, y = batch(540)
    for name, make in HONEST.items():
        for eps in (0.1, 0.2):
            panel = honesty(make(seed), x, y, eps, twin=trained(seed=9))
            assert not panel.masked, (name, eps, panel.summary())


# The panel


@pytest.fixture(scope="module")
def panel() -> Honesty:
    return examined(Scaled(trained(), 100.0), n=60)


def test_the_worst_case_is_no_higher_than_any_attack_that_was_tried(panel: Honesty) -> None:
    ours = [
        v for c in panel.checks for k, v in c.evidence.items() if k.startswith("A(") and c.number in (1, 10, 11, 14)
    ]
    assert len(ours) > 10
    assert panel.worst <= min(ours) + 1e-12
    assert panel.plain == panel[1].evidence["A(PGD)"]


def test_plain_is_what_the_attack_itself_leaves(panel: Honesty) -> None:
    x, y = batch(60)
    assert panel.plain == PGD(steps=SMALL.steps)(Scaled(trained(), 100.0).eval(), x, y, EPS).accuracy


def test_the_same_seed_gives_the_same_panel_and_no_global_randomness_is_used(panel: Honesty) -> None:
    state = torch.random.get_rng_state()
    again = examined(Scaled(trained(), 100.0), n=60)
    assert torch.equal(state, torch.random.get_rng_state())
    assert again.frame().equals(panel.frame())


def test_the_frame_has_a_row_for_each_check(panel: Honesty) -> None:
    frame = panel.frame()
    assert frame.number.tolist() == list(range(1, 18))
    assert set(frame.state) <= {"pass", "warn", "fail", "skipped"}
    failed = frame[frame.state == "fail"]
    assert (failed.repair != "").all()
    assert (frame[frame.state == "pass"].mechanism == "").all()


def test_the_figure_shows_states_by_marks_and_colours(panel: Honesty) -> None:
    figure = honesty_figure(panel)
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert sum(t == "✗ fail" for t in texts) == sum(c.state == "fail" for c in panel.checks)
    assert sum(t == "✓ pass" for t in texts) == sum(c.state == "pass" for c in panel.checks)
    assert figure.get_label() == panel.summary()
    figure.canvas.draw()


def test_each_curve_can_be_drawn_and_names_its_axes(panel: Honesty) -> None:
    with_curve = [c.number for c in panel.checks if c.curve is not None]
    assert set(with_curve) >= {4, 6, 7, 9, 10, 12, 13, 14}
    for number in with_curve:
        curve = panel[number].curve
        assert curve is not None
        assert len(curve.x) == len(curve.y) > 1
        axes = curve_figure(panel[number]).axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == (curve.x_name, curve.y_name)
    with pytest.raises(InputError, match="no curve"):
        curve_figure(panel[17])


def test_a_check_that_is_not_there_is_said_to_be(panel: Honesty) -> None:
    with pytest.raises(InputError, match="no check 18"):
        panel[18]


def test_what_tells_mechanisms_apart() -> None:
    from qlab.attacks.honesty import _told_apart

    def check(number: int, mechanism: str, state: str = "fail", share: float = 0.05) -> Check:
        examples = np.arange(100) < 100 * share
        return Check(number, "", "", state, mechanism, "", "", examples=examples)  # type: ignore[arg-type]

    def told(*checks: Check) -> str:
        return _told_apart([check(2, "V or S"), *checks])[0].mechanism

    sound = check(13, "S", "pass")
    assert told(check(13, "S")) == "S"
    assert told(check(12, "S")) == "S"
    assert told(check(9, "V"), sound) == "V"
    assert told(check(9, "V"), check(13, "S")) == "V or S"
    assert told(sound) == "tuning"
    assert told(check(10, "tuning"), sound) == "tuning"
    assert told(check(3, "V or S", share=0.2), sound) == "V"
    assert told(check(3, "V or S", share=0.2)) == "V or S"
    assert told(check(3, "V or S", "pass", share=0.2), sound) == "tuning"


# The work


def test_work_reports_partial_panels_and_never_goes_back() -> None:
    x, y = batch(20)
    budget = Budget(steps=3, restarts=2, queries=20, points=20, looked=4, traced=8)
    updates = list(examining(trained(), x, y, EPS, budget=budget))
    fractions = [u.fraction for u in updates]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    panels = [u.value for u in updates if u.value is not None]
    assert [len(p.checks) for p in panels[:-1]] == list(range(1, len(CHECKS) + 1))
    assert [p.complete for p in panels] == [False] * len(CHECKS) + [True]
    assert "Not all checks" in panels[3].summary()
    panels[0].frame()
    honesty_figure(panels[0])


def test_cancelled_work_leaves_the_panel_so_far() -> None:
    x, y = batch(20)
    job = Job(examining(trained(), x, y, EPS, budget=SMALL), on_update=lambda job: job.value and job.cancel())
    job.start().wait(60)
    assert job.status == "cancelled"
    assert len(job.value.checks) >= 1
    assert not job.value.complete


# Other settings


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("l1", 2.0)])
def test_other_norms(norm: str, eps: float) -> None:
    x, y = batch(30)
    honest = honesty(trained(), x, y, eps, norm=norm, budget=SMALL, twin=trained(seed=9))  # type: ignore[arg-type]
    assert not honest.masked, honest.summary()
    assert honest[3].evidence["eps"] == pytest.approx({"l2": 8.0, "l1": 64.0}[norm])
    masked = honesty(Scaled(trained(), 1000.0).eval(), x, y, eps, norm=norm, budget=SMALL)  # type: ignore[arg-type]
    assert masked.mechanisms == ("V",)


def test_other_ranges_give_the_same_panel() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(trained())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net((x + 2) / 4)

    x, y = batch(40)
    x = x.double()
    here = honesty(copy.deepcopy(trained()).double(), x, y, EPS, budget=SMALL)
    there = honesty(Shifted().double().eval(), 4 * x - 2, y, 4 * EPS, low=-2.0, high=2.0, budget=SMALL)
    assert [c.state for c in here.checks] == [c.state for c in there.checks]
    assert here.plain == there.plain
    assert there[3].evidence["eps"] == 4


def test_a_packed_net_answers_in_the_net_s_place() -> None:
    x, y = batch(20)
    asked = []

    def fast(points: torch.Tensor) -> torch.Tensor:
        asked.append(len(points))
        return trained()(points)

    budget = Budget(steps=3, restarts=2, queries=20, points=20, looked=4, traced=8)
    panel = honesty(trained(), x, y, EPS, fast=fast, budget=budget)
    assert sum(asked) > 0
    transfer = [i for i in panel.indicators if i.name == "transfer failure"]
    assert [i.value for i in transfer] == [0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps": 0.0}, "eps"),
        ({"eps": float("inf")}, "eps"),
        ({"low": 0.5}, "outside the stated range"),
        ({"y": torch.full((20,), 10)}, "labels"),
        ({"net": nn.Dropout()}, "training mode"),
        ({"net": nn.Linear(3, 10).eval()}, "does not take inputs"),
    ],
)
def test_what_cannot_be_examined_is_said(change: dict[str, object], words: str) -> None:
    x, y = batch(20)
    given = {"net": trained(), "x": x, "y": y, "eps": EPS} | change
    with pytest.raises(InputError, match=words):
        honesty(**given)  # type: ignore[arg-type]


def test_unknown_names_are_said() -> None:
    x, y = batch(20)
    with pytest.raises(UnknownNameError, match="linf"):
        honesty(trained(), x, y, EPS, norm="l3")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="standard"):
        honesty(trained(), x, y, EPS, budget="huge")
