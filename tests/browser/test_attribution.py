"""AttributionGuard in a real JupyterLab: the input is painted at once, a guess is made, ranks and verdicts come after it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.browser import pages
from tests.browser.conftest import Lab
from tests.browser.pages import WAIT_MS, keep

pytestmark = pytest.mark.browser

picture = partial(pages.picture, view=".ql-attribution")

VIEW = ".ql-attribution[data-painted=true]"
NET = """import torch, qlab
from torch import nn
from sklearn.datasets import load_digits
from qlab.quantizers import Sign
X, y = load_digits(return_X_y=True)
X = torch.tensor(X / 16, dtype=torch.float32).reshape(-1, 1, 8, 8); y = torch.tensor(y)
def trained(net):
    g = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(net.train().parameters(), 3e-3)
    for _ in range(60):
        i = torch.randint(0, 1400, (64,), generator=g)
        adam.zero_grad(); nn.functional.cross_entropy(net(X[i]), y[i]).backward(); adam.step()
    return net.eval()
def fresh():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
                         nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
a, b = trained(fresh()), trained(qlab.quantize(fresh(), Sign, Sign, keep=("first",)))"""
SHOW = (
    "from qlab.widgets.attribution import AttributionGuard\nv = AttributionGuard(a, b, X[1400:1412], y[1400:1412])\nv"
)


def show(page: Any, lab: Lab, name: str, *more: str) -> None:
    """Open a notebook that trains two nets, and run the cell that shows the view."""
    pages.show(page, lab, name, f"{VIEW} canvas[role=img]", NET, SHOW, *more)


def done(page: Any) -> None:
    page.wait_for_function(
        """() => document.querySelector('.ql-attribution').dataset.phase === 'idle'
            && document.querySelectorAll('.ql-attribution .ql-maps canvas').length === 12""",
        timeout=WAIT_MS,
    )


def test_a_guess_comes_before_ranks_and_verdicts(page: Any, lab: Lab, theme: str) -> None:
    show(page, lab, f"guard-{theme}.ipynb", "print('in Python', v.twins.quantized_net.best(v.settings['example']))")
    keep(f"attribution-first-paint-{theme}.json", {"first_paint_s": page.evaluate("window.painted") / 1000})
    done(page)
    root = page.locator(".ql-attribution")
    assert root.locator(".ql-question").inner_text().endswith("?")
    assert "rank " not in root.locator(".ql-sheet-maps").inner_text()
    assert root.locator(".ql-ranks tr").count() == 0
    labels = root.locator(".ql-maps").nth(1).locator(".ql-label-net").all_inner_texts()
    assert labels == ["deployed net", "SURROGATE", "SURROGATE", "deployed net", "SURROGATE"]
    assert "SURROGATE" not in root.locator(".ql-maps").nth(0).inner_text()
    assert "misses" in root.locator(".ql-maps").nth(1).inner_text()
    picture(page, f"attribution-guess-{theme}.png")
    page.get_by_label("DeepLift", exact=True).check()
    assert "you guessed DeepLift" in root.locator(".ql-result").inner_text()
    assert root.locator(".ql-ranks tr").count() == 5
    assert "rank " in root.locator(".ql-sheet-maps").inner_text()
    assert "SURROGATE" in root.locator(".ql-caption").inner_text()
    picture(page, f"attribution-told-{theme}.png")
    page.locator(".jp-CodeCell .cm-content").nth(2).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector('.jp-OutputArea-output:has-text("in Python")')
    best = page.locator(".jp-OutputArea-output", has_text="in Python").last.inner_text().split()[2]
    titles = {"saliency": "Saliency", "integrated_gradients": "Integrated gradients", "deeplift": "DeepLift"}
    assert root.get_by_text("★").inner_text() == f"★ {titles.get(best, 'Grad-CAM')}"


def test_examples_are_chosen_from_the_keyboard_and_ask_again(page: Any, lab: Lab) -> None:
    show(page, lab, "guard-keys.ipynb")
    done(page)
    page.get_by_label("Saliency", exact=True).focus()
    page.keyboard.press("Space")
    assert page.locator(".ql-attribution").get_attribute("data-told") == "true"
    page.get_by_label("Example", exact=True).focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "() => document.querySelector('.ql-attribution canvas[role=img]').getAttribute('aria-label').includes('example 1')"
    )
    assert page.locator(".ql-attribution").get_attribute("data-told") == "false"
    page.get_by_label("A feature is", exact=True).select_option("4")
    page.wait_for_function("() => document.querySelector('.ql-attribution').dataset.phase === 'running'")
    done(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.ql-attribution :is(input, select)')]
            .filter((e) => !e.labels?.length && !e.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0
    assert page.evaluate("() => document.querySelector('.ql-attribution .ql-error').hidden")
