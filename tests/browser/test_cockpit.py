"""AnnealingCockpit in a real JupyterLab: instruments at once, a guess before a branch, a run that is steered from the keyboard."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.browser import pages
from tests.browser.conftest import Lab
from tests.browser.pages import WAIT_MS, is_theme, keep

pytestmark = pytest.mark.browser

picture = partial(pages.picture, view=".ql-cockpit")

INSTRUMENTS = "document.querySelector('.ql-cockpit[data-painted=true][data-rows]')"
IDLE = "() => document.querySelector('.ql-cockpit').dataset.phase === 'idle'"
READY = "import qlab.steering, qlab.methods.base"
SHOW = """from qlab.widgets import AnnealingCockpit
cockpit = AnnealingCockpit({})
cockpit"""


def show(page: Any, lab: Lab, name: str, *more: str, options: str = "") -> float:
    """Open a notebook and run the cell that shows a cockpit; return seconds until its instruments are there."""
    return pages.show(page, lab, name, INSTRUMENTS, READY, SHOW.format(options), *more)


def test_a_branch_is_guessed_about_and_flown(page: Any, lab: Lab, theme: str) -> None:
    cell = "print('in Python', cockpit.comparison.verdict, cockpit.other.step)"
    seconds = show(page, lab, f"cockpit-{theme}.ipynb", cell)
    keep(f"cockpit-{theme}.json", {"first_result_s": seconds, "budget_s": 1.0})
    assert seconds < 4.0  # the budget of 1 s is for an idle machine, which a test's is not
    assert is_theme(page, theme)
    assert page.locator(".ql-cockpit .ql-question").inner_text().endswith("?")
    assert page.locator(".ql-cockpit .ql-instruments polyline").count() >= 5
    run = page.get_by_role("button", name="Run both")
    assert run.is_disabled()  # first the guess
    picture(page, f"cockpit-start-{theme}.png")
    page.get_by_label("larger than planned", exact=True).check()
    run.click()
    page.wait_for_function(
        "() => document.querySelector('.ql-cockpit .ql-result').textContent.includes('You guessed')", timeout=WAIT_MS
    )
    drawn = page.evaluate(
        "[...document.querySelectorAll('.ql-cockpit path[data-points]')].map((p) => p.dataset.series)"
    )
    assert sorted(set(drawn)) == ["as planned", "the branch"]
    assert len(drawn) == 8
    picture(page, f"cockpit-branch-{theme}.png")
    page.locator(".jp-CodeCell .cm-content").nth(2).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector('.jp-OutputArea-output:has-text("in Python")')
    words = page.locator(".jp-OutputArea-output", has_text="in Python").inner_text().split()
    verdict = {"smaller": "smaller than planned", "equal": "about as planned", "larger": "larger than planned"}[
        words[2]
    ]
    assert f"is {verdict}." in page.locator(".ql-cockpit .ql-result").inner_text()


def test_the_run_is_steered_from_the_keyboard(page: Any, lab: Lab) -> None:
    show(page, lab, "cockpit-keys.ipynb", options="'ste', epochs=100")
    slider = page.get_by_label("The moment", exact=True)
    before = page.locator(".ql-cockpit .ql-now").inner_text()
    values = page.locator(".ql-cockpit td.ql-number").all_inner_texts()
    slider.focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")  # JupyterLab would leave the cell
    assert page.locator(".ql-cockpit .ql-now").inner_text() != before
    assert page.locator(".ql-cockpit td.ql-number").all_inner_texts() != values
    now = "() => Number(document.querySelector('.ql-cockpit').dataset.now)"
    page.get_by_role("button", name="Train on").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(f"() => ({now})() > 20", timeout=WAIT_MS)
    page.get_by_role("button", name="Freeze the schedule").click()
    page.wait_for_function("() => document.querySelector('.ql-cockpit').textContent.includes('Release the schedule')")
    page.evaluate(
        """() => { const root = document.querySelector('.ql-cockpit');
            new MutationObserver((_, observer) => { if (root.dataset.phase === 'idle') {
                window.stopped = performance.now() - began; observer.disconnect(); } })
              .observe(root, { attributes: true, attributeFilter: ['data-phase'] });
            const began = performance.now();
            [...root.querySelectorAll('button')].find((b) => b.textContent === 'Stop').click(); }"""
    )
    page.wait_for_function("window.stopped !== undefined")
    assert page.evaluate("window.stopped") < 2000
    page.get_by_role("button", name="Rewind to the moment").click()
    page.wait_for_function("() => document.querySelector('.ql-cockpit .ql-status').textContent === 'Done.'")
    assert page.evaluate(f"({now})()") % 9 == 0
    picture(page, "cockpit-steered.png")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.ql-cockpit :is(input, select)')]
            .filter((e) => !e.labels?.length && !e.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0


def test_wrong_numbers_are_answered_in_the_view_and_nothing_sticks_out(page: Any, lab: Lab) -> None:
    show(page, lab, "cockpit-wrong.ipynb")
    epochs = page.get_by_label("Epochs", exact=True)
    epochs.fill("9999")
    epochs.press("Enter")
    page.wait_for_function(
        "() => document.querySelector('.ql-cockpit .ql-error').textContent.includes('from 1 to 200')"
    )
    page.get_by_label("From the moment on, the branch has").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function("() => document.querySelector('.ql-cockpit .ql-error').hidden")
    page.set_viewport_size({"width": 480, "height": 2000})
    picture(page, "cockpit-narrow.png")
    wide = page.evaluate(
        "() => { const e = document.querySelector('.ql-cockpit'); return e.scrollWidth - e.clientWidth; }"
    )
    assert wide <= 0
