"""VanishingMicroscope in a real JupyterLab: first a guess, then the slider redraws at once, in light and dark."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.browser import pages
from tests.browser.conftest import Lab
from tests.browser.pages import WAIT_MS, keep

pytestmark = pytest.mark.browser

picture = partial(pages.picture, view=".ql-vanishing")

PAINTED = ".ql-vanishing[data-painted=true]"
NET = """import torch, qlab
import torch.nn.functional as F
from qlab.quantizers import Sign
torch.manual_seed(0)
data = qlab.data.load("digits")
train, test = data.split("train"), data.split("test")
net = qlab.quantize(qlab.build("mlp", data.input_shape, 10, hidden=(128, 128), affine=False, seed=0), Sign, Sign)
x, optimizer = data.transform(train.x), torch.optim.Adam(net.parameters(), 1e-2)
for i in torch.randint(0, len(x), (150, 64)):
    optimizer.zero_grad()
    F.cross_entropy(net(x[i]), train.y[i]).backward()
    optimizer.step()
    for p in net.parameters():
        p.data.clamp_(-1, 1)
net.eval()"""
SHOW = """from qlab.widgets.vanishing import VanishingMicroscope
m = VanishingMicroscope(net, data.transform(test.x), test.y)
m"""


def show(page: Any, lab: Lab, name: str, *more: str) -> None:
    """Open a notebook that trains a binary net, and run the cell that shows its microscope."""
    pages.show(page, lab, name, PAINTED, NET, SHOW, *more)


def finished(page: Any) -> None:
    page.wait_for_function(
        "() => { const e = document.querySelector('.ql-vanishing'); return e.dataset.phase === 'idle'"
        " && document.querySelectorAll('.ql-vanishing select option[disabled]').length === 0; }",
        timeout=WAIT_MS,
    )


def test_a_guess_comes_first_and_the_slider_wakes_the_gradient_up(page: Any, lab: Lab, theme: str) -> None:
    show(page, lab, f"vanishing-{theme}.ipynb", "print('in Python', m.beta, m.dtype)")
    keep("vanishing-first-paint.json", {"first_paint_s": page.evaluate("window.painted") / 1000, "budget_s": 1.0})
    assert page.locator(".ql-vanishing .ql-question").inner_text().endswith("?")
    assert page.locator(".ql-part-gaps .ql-bin").count() > 3  # something real before the guess
    assert page.locator(".ql-part-norms").is_hidden()
    slider = page.get_by_label("Factor β on the logits", exact=False)
    assert slider.is_disabled()
    finished(page)
    picture(page, f"vanishing-guess-{theme}.png")
    page.get_by_label("in the wrong direction").check()
    page.wait_for_selector(".ql-part-norms svg")
    assert "You guessed" in page.locator(".ql-vanishing .ql-result").inner_text()
    assert page.locator(".ql-part-norms path[data-series]").count() == 3  # back-propagated, smoothed, mean field
    assert page.locator(".ql-part-lost path[data-series]").count() == 4  # dtypes
    picture(page, f"vanishing-one-{theme}.png")

    slider.focus()
    page.evaluate(
        """() => { window.moved = undefined; const root = document.querySelector('.ql-vanishing'); const was = root.dataset.index;
            addEventListener('keydown', () => { window.began = performance.now(); }, { once: true, capture: true });
            const look = () => root.dataset.index !== was ? (window.moved = performance.now() - window.began)
                : requestAnimationFrame(look); look(); }"""
    )
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("window.moved !== undefined")
    keep("vanishing-redraw.json", {"slider_s": page.evaluate("window.moved") / 1000, "budget_s": 0.1})
    for _ in range(19):
        page.keyboard.press("ArrowLeft")
    page.get_by_label("Computed in").select_option("float16")
    page.wait_for_function("() => document.querySelector('.ql-caption').textContent.includes('in float16')")
    picture(page, f"vanishing-half-{theme}.png")
    page.locator(".jp-CodeCell .cm-content").nth(2).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector('.jp-OutputArea-output:has-text("in Python")')
    told = page.locator(".jp-OutputArea-output", has_text="in Python").inner_text().split()
    assert told[3] == "float16"
    assert float(told[2]) == pytest.approx(10 ** (-20 / 12), rel=1e-6)


def test_everything_has_a_name_and_nothing_sticks_out(page: Any, lab: Lab) -> None:
    show(page, lab, "vanishing-names.ipynb")
    finished(page)
    page.get_by_label("exactly zero").focus()
    page.keyboard.press("Space")
    page.wait_for_selector(".ql-part-norms svg")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.ql-vanishing :is(input, select)')]
            .filter((e) => !e.labels?.length && !e.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0
    silent = page.evaluate(
        """() => [...document.querySelectorAll('.ql-vanishing svg:not([aria-hidden])')]
            .filter((e) => !e.getAttribute('aria-label')).length"""
    )
    assert silent == 0
    page.set_viewport_size({"width": 520, "height": 2400})
    picture(page, "vanishing-narrow.png")
    wide = page.evaluate(
        "() => { const e = document.querySelector('.ql-vanishing'); return e.scrollWidth - e.clientWidth; }"
    )
    assert wide <= 0
