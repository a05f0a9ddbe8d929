"""The Temperature view in a real JupyterLab: first a guess, then the slider moves the marks at once, in light and dark."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.browser import pages
from tests.browser.conftest import Lab
from tests.browser.pages import WAIT_MS, keep

pytestmark = pytest.mark.browser

picture = partial(pages.picture, view=".ql-temperature")

PAINTED = ".ql-temperature[data-painted=true]"
NET = """from qlab.attacks.replay_examples import example
from qlab.widgets.temperature import Temperature
e = example("digits", "none")"""
SHOW = """v = Temperature(e.net, e.x, e.y, c=100)
v"""
TELL = "print('in Python', v.settings['beta'], v.settings['dtype'], v.settings['c'], v.settings['example'])"


def complete(page: Any) -> None:
    page.wait_for_selector(".ql-temperature[data-complete=true][data-phase=idle]", timeout=WAIT_MS)


def test_a_guess_comes_first_and_the_slider_wakes_the_gradient_up(page: Any, lab: Lab, theme: str) -> None:
    page.set_viewport_size({"width": 1000, "height": 2100})  # all of the view at once
    pages.show(page, lab, f"temperature-{theme}.ipynb", PAINTED, NET, SHOW, TELL)
    keep("temperature-first-paint.json", {"first_paint_s": page.evaluate("window.painted") / 1000, "budget_s": 1.0})
    view = page.locator(".ql-temperature")
    assert view.locator(".ql-question").inner_text().endswith("?")
    assert view.locator(".ql-plot .ql-bar").count() == 10  # something real before the guess
    assert view.locator("path[data-series]").count() == 4  # norms
    assert view.locator(".ql-part-regimes").is_hidden()
    assert page.get_by_label("Logits of the net times c").is_disabled()
    complete(page)
    picture(page, f"temperature-guess-{theme}.png")
    guess = page.get_by_label("Still right after the attack")
    guess.focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="Show what it does").click()
    page.wait_for_selector(".ql-cell[data-regime]")
    assert "You guessed 30 %" in view.locator(".ql-result").inner_text()
    assert view.locator("path[data-series]").count() == 4 + 3 + 3  # and shares, and dtypes
    assert "prediction of 0 of 200" in view.locator(".ql-same").inner_text()
    assert view.locator('.ql-cells .ql-cell[data-regime="2"]').count() > 150
    picture(page, f"temperature-one-{theme}.png")

    slider = page.get_by_label("Factor β on the logits", exact=False)
    slider.focus()
    page.evaluate(
        """() => { window.moved = undefined; const root = document.querySelector('.ql-temperature'); const was = root.dataset.index;
            addEventListener('keydown', () => { window.began = performance.now(); }, { once: true, capture: true });
            const look = () => root.dataset.index !== was ? (window.moved = performance.now() - window.began)
                : requestAnimationFrame(look); look(); }"""
    )
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("window.moved !== undefined")
    keep("temperature-redraw.json", {"slider_s": page.evaluate("window.moved") / 1000, "budget_s": 0.1})
    for _ in range(19):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "() => document.querySelector('.ql-temperature .ql-caption').textContent.includes('At beta 0.01 in')"
    )
    assert view.locator('.ql-cells .ql-cell[data-regime="2"]').count() == 0
    picture(page, f"temperature-awake-{theme}.png")

    page.get_by_label("Computed in").select_option("float16")
    page.get_by_label("Curves of").select_option("example")
    page.get_by_label("Example", exact=True).fill("7")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.querySelector('.ql-temperature .ql-caption').textContent.includes('Example 7')"
    )
    page.get_by_label("Logits of the net times c").select_option("1")
    page.wait_for_selector(".ql-rows tbody tr:nth-child(6)", timeout=WAIT_MS)  # two factors, three dtypes
    complete(page)
    assert view.locator(".ql-rows .ql-now").inner_text().split()[:3] == ["▸", "1", "float16"]
    picture(page, f"temperature-half-{theme}.png")
    page.locator(".jp-CodeCell .cm-content").nth(2).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector('.jp-OutputArea-output:has-text("in Python")')
    told = page.locator(".jp-OutputArea-output", has_text="in Python").inner_text().split()
    assert float(told[2]) == pytest.approx(0.01)
    assert told[3:] == ["float16", "1.0", "7"]


def test_everything_has_a_name_and_nothing_sticks_out(page: Any, lab: Lab) -> None:
    pages.show(page, lab, "temperature-names.ipynb", PAINTED, NET, SHOW)
    page.get_by_role("button", name="Show what it does").click()
    complete(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.ql-temperature :is(input, select)')]
            .filter((e) => !e.labels?.length && !e.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0
    silent = page.evaluate(
        """() => [...document.querySelectorAll('.ql-temperature :is(svg, canvas):not([aria-hidden])')]
            .filter((e) => !e.getAttribute('aria-label')).length"""
    )
    assert silent == 0
    page.set_viewport_size({"width": 520, "height": 3400})
    picture(page, "temperature-narrow.png")
    wide = page.evaluate(
        "() => { const e = document.querySelector('.ql-temperature'); return e.scrollWidth - e.clientWidth; }"
    )
    assert wide <= 0


def test_the_labs_own_net_is_trained_on_the_way_and_work_can_be_stopped(page: Any, lab: Lab) -> None:
    pages.show(
        page, lab, "temperature-own.ipynb", PAINTED, "from qlab.widgets.temperature import Temperature", "Temperature()"
    )
    # attached, not visible: the bar of a class without probability has no height
    page.wait_for_selector(".ql-temperature .ql-bar", state="attached", timeout=WAIT_MS)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector(".ql-temperature[data-phase=idle]")
    assert page.locator(".ql-plot .ql-bar").count() == 10
    picture(page, "temperature-stopped.png")
    page.get_by_role("button", name="Compute the rest").click()
    complete(page)
