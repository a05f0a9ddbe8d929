"""TimeTravel in a real JupyterLab: the film runs under the arrow keys, a prediction is guessed about, its flips are found."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.browser import pages
from tests.browser.conftest import Lab
from tests.browser.pages import WAIT_MS, colours, is_theme, keep

pytestmark = pytest.mark.browser

picture = partial(pages.picture, view=".ql-travel")

TRAVEL = ".ql-travel[data-painted=true]"
NET = """import qlab
from qlab.callbacks import BitHistory
from qlab.diagnose.course import course
bits = BitHistory()
run = qlab.fit("ste", "digits", epochs=12, callbacks=[bits], progress=False)
net, x = run.deployed, run.data.transform(run.data.split("test").x[:60])
turned = [i for i in range(60) if course(bits.history, net, x[i:i + 1]).turns]"""
SHOW = """from qlab.widgets.time_travel import TimeTravel
travel = TimeTravel(bits.history, net, x, example=turned[0])
travel"""


def show(page: Any, lab: Lab, name: str, *more: str) -> None:
    """Open a notebook that trains a net, and run the cell that shows its TimeTravel."""
    pages.show(page, lab, name, TRAVEL, NET, SHOW, *more)


def ready(page: Any) -> None:
    """Wait until the prediction has been followed."""
    page.wait_for_function(
        "() => document.querySelector('.ql-area-ask').textContent.includes('The prediction changed')", timeout=WAIT_MS
    )


def test_the_film_is_painted_at_once_and_runs_under_the_arrow_keys(page: Any, lab: Lab) -> None:
    show(page, lab, "travel-film.ipynb")
    assert colours(page, ".ql-travel canvas.ql-picture") >= 2
    assert page.locator(".ql-travel .ql-question").inner_text().endswith("?")
    seconds = page.evaluate("window.painted") / 1000
    assert seconds < 3.0  # the budget of 1 s is for an idle machine, which a test's is not
    canvas = page.locator(".ql-travel canvas.ql-picture")
    before = canvas.get_attribute("aria-label")
    slider = page.get_by_label("Step of the training")
    slider.focus()
    page.evaluate(
        """() => { window.began = performance.now(); const c = document.querySelector('.ql-travel canvas.ql-picture');
            const said = c.getAttribute('aria-label'); const look = () => c.getAttribute('aria-label') !== said
            ? (window.redrawn = performance.now() - window.began) : requestAnimationFrame(look); look(); }"""
    )
    page.keyboard.press("ArrowLeft")  # JupyterLab would leave the cell
    page.wait_for_function("window.redrawn !== undefined")
    assert canvas.get_attribute("aria-label") != before
    keep(
        "time-travel.json",
        {"first_paint_s": seconds, "budget_s": 1.0, "slider_s": page.evaluate("window.redrawn") / 1000},
    )
    page.keyboard.press("Home")
    assert page.locator(".ql-now-step").inner_text() == "step 0"
    assert "0 flips in this step" in page.locator(".ql-named").inner_text()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator(".ql-now-step").inner_text() == "step 3"
    page.get_by_label("how often each flipped").check()
    assert "how often each of" in canvas.get_attribute("aria-label")


def test_a_prediction_is_guessed_about_and_its_flips_are_found(page: Any, lab: Lab, theme: str) -> None:
    show(page, lab, f"travel-{theme}.ipynb", "print('in Python', len(travel.answer.minimal), len(travel.answer.steps))")
    assert is_theme(page, theme)
    ready(page)
    find = page.get_by_role("button", name="Find the flips")
    assert find.is_disabled()  # first the guess
    picture(page, f"time-travel-start-{theme}.png")
    page.get_by_label("2 to 5", exact=True).check()
    find.click()
    page.wait_for_function(
        "() => document.querySelector('.ql-result').textContent.includes('You guessed')", timeout=WAIT_MS
    )
    result = page.locator(".ql-travel .ql-result").inner_text()
    assert page.locator(".ql-flips tr").count() >= 2
    assert page.locator(".ql-flips").inner_text().count("turns it") <= 1
    picture(page, f"time-travel-found-{theme}.png")
    page.locator(".jp-CodeCell .cm-content").nth(2).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector('.jp-OutputArea-output:has-text("in Python")')
    _, _, minimal, total = page.locator(".jp-OutputArea-output", has_text="in Python").inner_text().split()
    assert result.startswith(f"{minimal} of {total} ")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.ql-travel :is(input, select)')]
            .filter((e) => !e.labels?.length && !e.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0


def test_wrong_steps_are_answered_in_the_view_and_nothing_sticks_out(page: Any, lab: Lab) -> None:
    show(page, lab, "travel-wrong.ipynb")
    ready(page)
    page.get_by_label("to step", exact=True).fill("99999")
    page.get_by_label("to step", exact=True).press("Enter")
    page.wait_for_function("() => document.querySelector('.ql-travel .ql-error').textContent.includes('not recorded')")
    page.get_by_label("Layer", exact=True).focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function("() => document.querySelector('.ql-travel .ql-error').hidden")
    page.set_viewport_size({"width": 480, "height": 1900})
    picture(page, "time-travel-narrow.png")
    wide = page.evaluate(
        "() => { const e = document.querySelector('.ql-travel'); return e.scrollWidth - e.clientWidth; }"
    )
    assert wide <= 0
