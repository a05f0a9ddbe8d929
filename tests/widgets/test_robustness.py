"""RobustnessLab without a browser: messages in, what is shown out."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from qlab.widgets import robustness as module
from qlab.widgets.robustness import RobustnessLab
from qlab.widgets.robustness_payload import PAGE, answer_of, page_of, panel_of, pictures_of
from torch import Tensor, nn

from qlab.attacks import FGSM, PGD, honesty
from qlab.attacks.evaluation import Evaluation
from qlab.attacks.random_search import RandomSearch
from qlab.attacks.samples import samples
from qlab.attacks.suite import evaluate, suite
from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Job

EPS = (0.05, 0.1, 0.3)
ATTACKS: dict[str, Any] = {"FGSM": FGSM(), "PGD": PGD(5)}
N = 23


def linear(seed: int) -> nn.Module:
    net: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.normal_(0, 1, generator=torch.Generator().manual_seed(10 * seed + i))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def setting() -> tuple[dict[str, nn.Module], tuple[Tensor, Tensor]]:
    """Two linear nets on small pictures; the first has all but one example right."""
    nets = {"one": linear(0), "two": linear(1)}
    x = torch.rand(N, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    y = nets["one"](x).argmax(1)
    y[7] = (y[7] + 1) % 3
    return nets, (x, y)


@pytest.fixture
def view(setting: tuple[dict[str, nn.Module], tuple[Tensor, Tensor]]) -> RobustnessLab:
    return RobustnessLab(*setting, eps=EPS, attacks=ATTACKS)


@pytest.fixture(scope="module")
def ran(setting: tuple[dict[str, nn.Module], tuple[Tensor, Tensor]]) -> RobustnessLab:
    """A view whose nets have been evaluated to the end; tests leave it as it is."""
    view = RobustnessLab(*setting, eps=EPS, attacks=ATTACKS)
    finish(view.run())
    return view


@pytest.fixture(scope="module")
def found(setting: tuple[dict[str, nn.Module], tuple[Tensor, Tensor]]) -> dict[str, Evaluation]:
    """What the plain function finds."""
    nets, data = setting
    return {name: evaluate(net, data, EPS, attacks=ATTACKS) for name, net in nets.items()}


def finish(job: Job | None) -> None:
    assert job is not None
    job.result(60)
    assert job.wait(60)


def message(view: RobustnessLab, **content: Any) -> None:
    view._on_message(view, content, [])


def floats(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<f4")


def test_clean_accuracies_are_there_before_anything_is_attacked(view: RobustnessLab) -> None:
    assert view.evaluations["one"].clean.sum() == N - 1
    assert [curve["clean"] for curve in view.curves] == [float(e.clean.mean()) for e in view.evaluations.values()]
    assert all(np.isnan(floats(curve["share"])).all() for curve in view.curves)
    assert [panel["rows"] for panel in view.panels] == [[], []]
    assert view.answer == {}
    assert view.caption.count("No robust accuracy is stated") == 2
    message(view, type="ready")
    assert view._latest.job is None  # nothing is attacked before Run


def test_a_run_finds_what_the_plain_function_finds(ran: RobustnessLab, found: dict[str, Evaluation]) -> None:
    assert list(ran.evaluations) == ["one", "two"]
    for curve in ran.curves:
        e = found[curve["name"]]
        expected = np.array([e.accuracy(eps) for eps in EPS])
        for k, part in enumerate(("share", "low", "high")):
            assert np.allclose(floats(curve[part]), expected[:, k])
        assert curve["complete"]
        broken = {row["attack"]: row["counts"] for row in curve["broken"]}
        assert broken == {attack: [e.alone(attack, eps) for eps in EPS] for attack in e.attacks}
    assert ran.caption == " ".join(f"{name}: {e.summary()}" for name, e in found.items())
    assert ran.status["text"] == "Done."


def test_the_panel_has_seventeen_checks_with_evidence_and_curves(
    ran: RobustnessLab, found: dict[str, Evaluation]
) -> None:
    for panel in ran.panels:
        honest = found[panel["name"]].honesty
        assert honest is not None
        assert [row["number"] for row in panel["rows"]] == list(range(1, 18))
        assert panel["summary"] == honest.summary()
        for row, check in zip(panel["rows"], honest.checks, strict=True):
            assert (row["state"], row["words"], row["condition"]) == (check.state, check.words, check.condition)
            assert (row["curve"] is None) == (check.curve is None)
            if check.curve is not None:
                assert np.allclose(floats(row["curve"]["y"]), check.curve.y, equal_nan=True)


def test_the_answer_is_the_net_that_keeps_the_most_at_the_middle_eps(
    ran: RobustnessLab, found: dict[str, Evaluation]
) -> None:
    kept = {name: int(e.robust(0.1).sum()) for name, e in found.items()}
    assert ran.answer["eps"] == 0.1
    assert ran.answer["right"] == [name for name, n in kept.items() if n == max(kept.values())]
    for e in found.values():
        assert f"{e.accuracy(0.1)[0]:.1%}" in ran.answer["words"]
    assert ran.answer["words"].count("panel: ") == 2


def test_one_net_is_a_question_of_half_its_examples(found: dict[str, Evaluation]) -> None:
    e = found["one"]
    half = "more" if e.accuracy(0.1)[0] >= 0.5 else "less"
    assert answer_of({"one": e})["right"] == [half]


def test_nothing_is_answered_without_attacks_and_panel(found: dict[str, Evaluation]) -> None:
    bare = {name: replace(e, honesty=None) for name, e in found.items()}
    assert answer_of(bare) == {}
    part = dict(found) | {"two": replace(found["two"], done=np.zeros_like(found["two"].done))}
    assert answer_of(part) == {}
    assert panel_of("one", 0, None)["rows"] == []


def test_masking_is_told_in_words(setting: tuple[dict[str, nn.Module], tuple[Tensor, Tensor]]) -> None:
    class Steps(nn.Module):
        """Logits on a staircase: no gradient anywhere."""

        def __init__(self) -> None:
            super().__init__()
            self.net = linear(0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.round(4 * self.net(x))

    _, (x, y) = setting
    panel = panel_of("steps", 0, honesty(Steps().eval(), x, y, 0.1))
    assert panel["masked"]
    assert panel["verdict"] == "masking: shattered gradients"
    failed = [row for row in panel["rows"] if row["masking"]]
    assert failed
    assert all(row["mechanism"] and row["repair"] for row in failed)


def test_a_stopped_run_keeps_what_it_found_and_states_nothing(
    setting: tuple[dict[str, nn.Module], tuple[Tensor, Tensor]],
) -> None:
    view = RobustnessLab(*setting, eps=EPS, attacks=ATTACKS)
    work = view._work(dict(view._place))
    job = Job(work)
    while not any(job.value and e.done.any() for e in (job.value or {}).values()):
        job._take(next(work))
    job.status = "cancelled"
    view._told(job)
    assert floats(view.curves[0]["share"])[0] == pytest.approx(view.evaluations["one"].accuracy(0.05)[0])
    assert np.isnan(floats(view.curves[0]["share"])[1:]).all()
    assert not view.curves[0]["complete"]
    assert view.answer == {}
    assert view.caption.count("No robust accuracy is stated") == 2
    assert view.status["text"].startswith("Stopped")
    bundle = view._repr_mimebundle_()
    assert "image/png" not in (bundle[0] if isinstance(bundle, tuple) else bundle)


def test_stop_ends_a_run(view: RobustnessLab, setting: tuple[dict[str, nn.Module], tuple[Tensor, Tensor]]) -> None:
    view._given = {"long": RandomSearch(10**9)}
    view.choose(nets=["one"])
    job = view.run()
    while job.value is None:
        job.wait(0.01)
    message(view, type="stop")
    assert job.wait(60)
    assert job.status == "cancelled"
    assert list(view.evaluations) == ["one"]
    assert view.status["phase"] == "idle"


def test_chosen_nets_and_attacks_count_from_the_next_run_on(view: RobustnessLab) -> None:
    message(view, type="choose", nets=["two"], attacks=["FGSM"])
    assert view.choices["stale"]
    assert (view.settings["nets"], view.settings["attacks"]) == (["two"], ["FGSM"])
    assert list(view.evaluations) == ["one", "two"]
    finish(view.run())
    assert not view.choices["stale"]
    assert list(view.evaluations) == ["two"]
    assert view.evaluations["two"].attacks == ("FGSM",)
    assert view.curves[0]["slot"] == 1  # a net keeps its colour and mark


def test_a_suite_brings_its_attacks_and_plain_pgd_is_offered_beside_it(
    setting: tuple[dict[str, nn.Module], tuple[Tensor, Tensor]],
) -> None:
    view = RobustnessLab(*setting, eps=0.1, attacks="quick")
    assert view.choices["attacks"] == ["plain PGD", *suite("quick")]
    assert view.settings["attacks"] == list(suite("quick"))
    assert view.evaluations["one"].attacks == tuple(suite("quick"))
    view.choose(suite="search")
    assert view.settings["attacks"] == list(suite("search"))
    view.choose(attacks=["plain PGD"])
    work = view._work(dict(view._place), begin=True)
    assert [update.value for update in work][-1]["one"].attacks == ("plain PGD",)


def test_pictures_are_the_examples_and_the_change_magnified(
    ran: RobustnessLab, setting: tuple[dict[str, nn.Module], tuple[Tensor, Tensor]], found: dict[str, Evaluation]
) -> None:
    nets, (x, _) = setting
    page = pictures_of({n: samples(nets[n], e, range(10, 20)) for n, e in found.items()}, {"one": 0, "two": 1}, row=2)
    e = found["one"]
    after = {n: f.worst[2][10:20].double().numpy() for n, f in found.items()}
    before = x[10:20].double().numpy()
    low = min(before.min(), *(a.min() for a in after.values()))
    width = max(before.max(), *(a.max() for a in after.values())) - low
    clean = np.frombuffer(page["clean"], "u1").reshape(10, 1, 3, 4)
    assert np.allclose(clean, 255 * (before - low) / width, atol=0.51)
    for net in page["nets"]:
        delta = np.frombuffer(net["delta"], "i1").reshape(10, 1, 3, 4)
        expected = 254 * page["factor"] * (after[net["name"]] - before) / width
        assert np.abs(delta).max() <= 127
        assert np.allclose(delta, expected, atol=0.51)
        assert net["broken"] == np.isfinite(found[net["name"]].distance[2, 10:20]).tolist()
        said = nets[net["name"]](found[net["name"]].worst[2][10:20]).argmax(1)
        assert net["worst_said"] == said.tolist()
    assert page["labels"] == e.y[10:20].tolist()


def test_vectors_are_shown_by_their_labels(setting: tuple[dict[str, nn.Module], tuple[Tensor, Tensor]]) -> None:
    nets, (x, y) = setting
    view = RobustnessLab(nets, (x.flatten(1), y), eps=0.1, attacks={"FGSM": FGSM()})
    assert view.pictures["shape"] == []
    assert "clean" not in view.pictures
    assert len(view.pictures["labels"]) == PAGE


def test_an_example_is_told_in_words_and_by_radius(view: RobustnessLab, ran: RobustnessLab) -> None:
    message(view, type="choose", example=7)
    assert view.sample["example"] == 7
    assert view.pictures["first"] == 0
    assert "wrong from the start" in view.sample["nets"][0]["story"]
    e = ran.evaluations["one"]
    table = e.records()
    for row in ran.sample["nets"][0]["rows"]:
        (record,) = table[(table["example"] == 0) & (table["eps"] == row["eps"])].to_dict("records")
        assert row["broken"] == (not record["robust"])
        assert row["distance"] == (record["distance"] if np.isfinite(record["distance"]) else None)
        if record["broken by"] != "a smaller eps":
            assert row["by"] == record["broken by"]


def test_pages_cover_all_examples_and_shrink_for_large_pictures() -> None:
    assert [list(page_of(i, 23, 12, 2)) for i in (0, 7, 8, 22)] == [
        list(range(8)),
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 23)),
    ]
    size = 3 * 64 * 64
    assert len(page_of(0, 100, size, 2)) * size * 5 <= 600_000
    assert len(page_of(3, 100, 10**7, 2)) == 1


def test_messages_stay_below_a_megabyte() -> None:
    nets: dict[str, nn.Module] = {
        name: nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 96, 2)).eval() for name in ("a", "b")
    }
    x = torch.rand(12, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    view = RobustnessLab(nets, (x, torch.zeros(12, dtype=torch.int64)), eps=0.1, attacks={"FGSM": FGSM()})
    sent = [view.pictures["clean"], *(net[k] for net in view.pictures["nets"] for k in ("adversarial", "delta"))]
    assert 0 < sum(len(part) for part in sent) < 1_000_000
    assert view.pictures["shape"] == [3, 96, 96]


def test_the_state_is_small_and_gives_the_same_view(
    view: RobustnessLab, setting: tuple[dict[str, nn.Module], tuple[Tensor, Tensor]]
) -> None:
    view.choose(nets=["two"], attacks=["PGD"], eps=0.3, example=12)
    text = json.dumps(view.state())
    assert len(text) < 1000
    again = RobustnessLab.from_state(text, *setting, eps=EPS, attacks=ATTACKS)
    assert again.state() == view.state()
    assert again.settings == view.settings
    assert again.sample == view.sample
    with pytest.raises(InputError, match="settings"):
        RobustnessLab.from_state({"widget": "RobustnessLab", "version": 1, "settings": {}}, *setting, eps=EPS)


@pytest.mark.parametrize(
    "content",
    [
        {"type": "choose", "nets": []},
        {"type": "choose", "nets": ["three"]},
        {"type": "choose", "attacks": ["nothing"]},
        {"type": "choose", "attacks": "PGD"},
        {"type": "choose", "suite": "quick"},
        {"type": "choose", "eps": 0.2},
        {"type": "choose", "eps": None},
        {"type": "choose", "example": N},
        {"type": "choose", "example": True},
        {"type": "choose", "colour": 1},
        {"type": "dance"},
        "nothing",
    ],
)
def test_what_is_wrong_with_a_message_is_shown_and_changes_nothing(view: RobustnessLab, content: Any) -> None:
    before = view.state()
    view._on_message(view, content, [])
    assert view.status["error"]
    assert view.state() == before


def test_what_cannot_be_evaluated_is_refused_at_once(
    setting: tuple[dict[str, nn.Module], tuple[Tensor, Tensor]],
) -> None:
    nets, data = setting
    with pytest.raises(InputError, match="nets and data together"):
        RobustnessLab(nets)
    with pytest.raises(InputError, match="give eps"):
        RobustnessLab(nets, data)
    with pytest.raises(InputError, match="positive"):
        RobustnessLab(nets, data, eps=-1)
    with pytest.raises(InputError, match="no option 'panel'"):
        RobustnessLab(nets, data, eps=EPS, panel=False)
    with pytest.raises(InputError, match="by name"):
        RobustnessLab([nets["one"]], data, eps=EPS)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError):
        RobustnessLab(nets, data, eps=EPS, attacks="quickest")
    with pytest.raises(InputError):
        RobustnessLab({"in training": nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Dropout())}, data, eps=EPS)


def test_the_picture_and_its_words_carry_the_panel(ran: RobustnessLab) -> None:
    data, metadata = ran._repr_mimebundle_()
    assert base64.b64decode(data["image/png"])[:4] == b"\x89PNG"
    assert len(data["image/png"]) < 200_000
    assert metadata["image/png"]["alt"].count("Honesty panel") == 2
    assert data["text/plain"] == f"RobustnessLab. {ran.caption}"


def test_a_failed_run_says_why(view: RobustnessLab) -> None:
    class Broken(FGSM):
        def search(self, *_: Any) -> Any:
            raise InputError("it does not work")
            yield

    view._given = {"broken": Broken()}
    job = view.run()
    assert job.wait(60)
    assert view.status["error"] == "it does not work"
    assert view.status["phase"] == "idle"


def test_the_nets_of_the_lab_are_trained_once_asked_for() -> None:
    from qlab.attacks import robustness_examples

    assert (module._NETS, module._EPS) == (robustness_examples.NETS, robustness_examples.EPS)
    view = RobustnessLab(samples=20, attacks={"FGSM": FGSM()}, eps=0.1)
    assert view.evaluations == {}
    assert view.choices["nets"] == ["float", "binary"]
    message(view, type="ready")
    finish(view._latest.job)
    assert list(view.evaluations) == ["float", "binary"]
    assert all(e.clean.mean() > 0.7 for e in view.evaluations.values())
    assert view.choices["examples"] == 20
    assert view.pictures["shape"] == [1, 8, 8]
    message(view, type="ready")  # a second page of the same view
    assert view.status["text"] == "Ready."
