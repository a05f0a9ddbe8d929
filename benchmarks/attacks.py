"""Attacks: success and time against foolbox, torchattacks, captum and AutoAttack, on one float net, at one budget.

    pip install --no-deps foolbox eagerpy GitPython gitdb smmap torchattacks pyautoattack
    qlab bench attacks

The peers are not in the lab's constraints: two of them pin old versions of packages that they hardly use. Those that cannot be
imported are left out, and a row says so. Net: LeNet on Fashion-MNIST, three epochs, float, pixels in [0, 1]; all attack the same
test pictures within the same eps with as many steps of the same length, and start at the picture itself where both can. Each
pair gives two rows: the time until one knows which examples are broken (torchattacks and captum return points alone, and their
points are asked about), and what is left of the examples (ours minus theirs at most 0, in per cent of the pictures).

Attacks for the nearest point are compared by the median distance they find; the boundary attacks ask about as many questions.
captum's default loss is meant for probabilities, and its gradients below 1e-6 count as zero; it gets cross-entropy here and keeps
the threshold, which does no harm on a float net.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qlab
from qlab.attacks import evaluate, examples, pixels
from qlab.attacks.apgd import APGD, APGDT
from qlab.attacks.base import Attack, Attacked
from qlab.attacks.boundary import Boundary
from qlab.attacks.carlini_wagner import CarliniWagner
from qlab.attacks.deepfool import DeepFool
from qlab.attacks.fab import FABT
from qlab.attacks.fgsm import FGSM
from qlab.attacks.pgd import PGD
from qlab.attacks.square import Square
from qlab.bench import Comparison

EPS, EPS_L2, STEPS = 0.03, 0.5, 20
LARGE, SMALL, TINY = 512, 128, 64


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a trained float net that takes pixels, and test pictures."""
    data = qlab.data.load("fashion_mnist")
    net = qlab.build("lenet", data.input_shape, data.num_classes, seed=0)
    method = qlab.methods.create("full_precision", net, seed=0)
    qlab.fit(method, data, epochs=3, seed=0, progress=False)
    x, y = examples(data, 1000)
    return pixels(method, data), x, y


def module(name: str) -> Any:
    """Return a peer, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None


class Pair:
    """One attack of ours and one of a peer's, run on the same pictures; what the last runs found is kept for the other row.

    Args:
        name, peer_name: of the attacks.
        ours, peer: run them; ours says which examples are broken.
        figure: of clean and attacked pictures, what is left or how far they are.
        unit: of the figure.
        ask: the peer returns points alone, and this asks which of them are broken.
        rounds: timed runs.
    """

    def __init__(
        self,
        name: str,
        peer_name: str,
        ours: Callable[[], Attacked],
        peer: Callable[[], Tensor],
        figure: Callable[[Tensor, Tensor], float],
        unit: str,
        ask: Callable[[Tensor], object] | None,
        rounds: int,
    ) -> None:
        self.name, self.peer_name, self.ours, self.peer, self.unit = name, peer_name, ours, peer, unit
        self.figure, self.ask, self.rounds = figure, ask, rounds
        self.found: dict[str, Tensor] = {}

    def rows(self, clean: Tensor) -> Iterator[Comparison]:
        """Yield the row of times, then that of what is found in the last timed runs."""

        def run_ours() -> None:
            self.found["ours"] = self.ours().adversarial

        def run_peer() -> None:
            self.found["peer"] = self.peer().detach()
            if self.ask is not None:
                self.ask(self.found["peer"])

        yield Comparison(f"{self.name}, time", run_ours, run_peer, self.peer_name, 1.0, rounds=self.rounds, warmup=1)
        what = "examples left" if self.unit == "%" else "median distance"
        ours, peer = (partial(self.figure, clean, self.found[who]) for who in ("ours", "peer"))
        yield Comparison(
            f"{self.name}, {what}", ours, peer, self.peer_name, 0.0 if self.unit == "%" else 1.0,
            "difference" if self.unit == "%" else "ratio", rounds=1, warmup=0, unit=self.unit,
        )  # fmt: skip


def comparisons() -> Iterator[Comparison]:
    """Yield the comparisons of this benchmark."""
    net, x, y = problem()
    thousand = PGD(40)
    yield Comparison(
        "PGD-40 on 1,000 Fashion-MNIST pictures, LeNet", lambda: thousand(net, x, y, 0.1), lambda: None, "nothing",
        60.0, "seconds", rounds=3, warmup=0,
    )  # fmt: skip

    def left(clean: Tensor, points: Tensor) -> float:
        """Return the per cent of pictures that are right within eps; a point outside counts as none."""
        n = len(points)
        inside = (points.double() - clean.double()).flatten(1).abs().amax(1) <= EPS + 1e-6
        points = torch.where(inside.reshape(-1, 1, 1, 1), points, clean)
        with torch.no_grad():
            return 100 * float((net(points.clamp(0, 1).float()).argmax(1) == y[:n]).double().mean())

    def left_l2(clean: Tensor, points: Tensor) -> float:
        n = len(points)
        inside = (points.double() - clean.double()).flatten(1).norm(dim=1) <= EPS_L2 + 1e-5
        points = torch.where(inside.reshape(-1, 1, 1, 1), points, clean)
        with torch.no_grad():
            return 100 * float((net(points.clamp(0, 1).float()).argmax(1) == y[:n]).double().mean())

    def distance(clean: Tensor, points: Tensor) -> float:
        """Return the median l2 distance of misclassified points, infinite for the others."""
        with torch.no_grad():
            wrong = net(points.float()).argmax(1) != y[: len(points)]
        d = (points.double() - clean.double()).flatten(1).norm(dim=1)
        return float(np.median(torch.where(wrong, d, torch.inf).numpy()))

    def ours(attack: Attack, n: int, eps: float | None, norm: Any = "linf") -> Callable[[], Attacked]:
        return lambda: attack(net, x[:n], y[:n], eps, norm=norm)

    def asked(points: Tensor) -> Tensor:
        with torch.no_grad():
            return net(points).argmax(1)

    pairs: list[tuple[Pair, int]] = []

    def add(
        name: str, peer_name: str, attack: Attack, peer: Callable[[Tensor, Tensor], Tensor], n: int, kind: str
    ) -> None:
        eps, norm, figure, unit = {
            "linf": (EPS, "linf", left, "%"),
            "l2": (EPS_L2, "l2", left_l2, "%"),
            "nearest": (None, "l2", distance, "distance"),
        }[kind]
        a, b = x[:n], y[:n]
        pair = Pair(
            f"{name}, {n} pictures",
            peer_name,
            ours(attack, n, eps, norm),
            lambda: peer(a, b),
            figure,
            unit,
            asked if peer_name in ("torchattacks", "captum") else None,
            5 if n > TINY else 3,
        )
        pairs.append((pair, n))

    foolbox, torchattacks, auto = module("foolbox"), module("torchattacks"), module("pyautoattack")
    step, step_l2 = EPS / 4, 2.5 * EPS_L2 / STEPS
    plain: dict[str, Any] = {"random_start": False}
    if foolbox is not None:
        model, attacks = foolbox.PyTorchModel(net, bounds=(0, 1)), foolbox.attacks

        def fool(attack: Any, eps: float | None) -> Callable[[Tensor, Tensor], Tensor]:
            def run(a: Tensor, b: Tensor) -> Tensor:
                _, points, _ = attack(model, a, b, epsilons=eps)
                return points

            return run

        add("FGSM", "foolbox", FGSM(), fool(attacks.LinfFastGradientAttack(), EPS), LARGE, "linf")
        pgd = attacks.LinfProjectedGradientDescentAttack(abs_stepsize=step, steps=STEPS, **plain)
        add("PGD", "foolbox", PGD(STEPS, **plain), fool(pgd, EPS), LARGE, "linf")
        pgd = attacks.L2ProjectedGradientDescentAttack(abs_stepsize=step_l2, steps=STEPS, **plain)
        add("PGD l2", "foolbox", PGD(STEPS, **plain), fool(pgd, EPS_L2), LARGE, "l2")
        add("DeepFool", "foolbox", DeepFool(50), fool(attacks.L2DeepFoolAttack(steps=50), None), SMALL, "nearest")
        cw = attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=100, stepsize=0.01, initial_const=0.1)
        add("Carlini-Wagner", "foolbox", CarliniWagner(100, 5, 0.1), fool(cw, None), TINY, "nearest")
        boundary = attacks.BoundaryAttack(steps=500, tensorboard=False)
        # foolbox asks once a step and now and then about the sphere, some 600 times in all; ours asks twice a step.
        add("boundary attack", "foolbox", Boundary(300), fool(boundary, None), TINY, "nearest")
    if torchattacks is not None:
        t = torchattacks
        add("FGSM", "torchattacks", FGSM(), lambda a, b: t.FGSM(net, eps=EPS)(a, b), LARGE, "linf")
        pgd = t.PGD(net, eps=EPS, alpha=step, steps=STEPS, **plain)
        add("PGD", "torchattacks", PGD(STEPS, **plain), pgd, LARGE, "linf")
        pgd = t.PGDL2(net, eps=EPS_L2, alpha=step_l2, steps=STEPS, **plain)
        add("PGD l2", "torchattacks", PGD(STEPS, **plain), pgd, LARGE, "l2")
        add("DeepFool", "torchattacks", DeepFool(50), t.DeepFool(net, steps=50), TINY, "nearest")
        add(
            "Carlini-Wagner, c 1",
            "torchattacks",
            CarliniWagner(100, 1, 1.0),
            t.CW(net, c=1, steps=100),
            TINY,
            "nearest",
        )
        add("Square, 500 queries", "torchattacks", Square(500), t.Square(net, eps=EPS, n_queries=500), SMALL, "linf")
    from captum.robust import FGSM as CaptumFGSM
    from captum.robust import PGD as CaptumPGD

    cross = nn.CrossEntropyLoss(reduction="none")
    one = CaptumFGSM(net, loss_func=cross, lower_bound=0, upper_bound=1)
    add("FGSM", "captum", FGSM(), lambda a, b: one.perturb(a, epsilon=EPS, target=b), LARGE, "linf")
    many = CaptumPGD(net, loss_func=cross, lower_bound=0, upper_bound=1)
    add(
        "PGD", "captum", PGD(STEPS, **plain),
        lambda a, b: many.perturb(a, radius=EPS, step_size=step, step_num=STEPS, target=b), LARGE, "linf",
    )  # fmt: skip
    if auto is not None:

        def reference(which: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
            """Return AutoAttack with these of its attacks, each as its standard version runs it."""

            def run(a: Tensor, b: Tensor) -> Tensor:
                suite = auto.AutoAttack(net, norm="Linf", eps=EPS, seed=0)
                suite.attacks_to_run = which
                return suite.run_standard_evaluation(a, b, batch_size=len(a))[0]

            return run

        add("APGD-CE", "AutoAttack", APGD(100), reference(["apgd-ce"]), SMALL, "linf")
        add("APGD-T", "AutoAttack", APGDT(100), reference(["apgd-t"]), TINY, "linf")
        add("FAB-T", "AutoAttack", FABT(), reference(["fab-t"]), TINY, "linf")
        add("Square", "AutoAttack", Square(5000), reference(["square"]), TINY, "linf")
        standard = reference(["apgd-ce", "apgd-t", "fab-t", "square"])
        a, b = x[:TINY], y[:TINY]

        def suite() -> float:
            found = evaluate(net, (a, b), EPS, attacks="standard", panel=False)
            return 100 * found.accuracy(EPS)[0]

        yield Comparison(
            f"standard suite, {TINY} pictures, examples left", suite, lambda: left(a, standard(a, b)), "AutoAttack standard",
            0.0, "difference", rounds=1, warmup=0, unit="%",
        )  # fmt: skip
    for pair, n in pairs:
        yield from pair.rows(x[:n])
