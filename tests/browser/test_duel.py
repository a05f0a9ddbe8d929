"""MethodDuel in a real JupyterLab: a guess, a duel whose curves move, decisions over the plane, a stop that keeps what there is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.browser import pages
from tests.browser.conftest import Lab
from tests.browser.pages import WAIT_MS, colours, is_theme, keep

pytestmark = pytest.mark.browser

picture = partial(pages.picture, view=".ql-duel")

DUEL = ".ql-duel[data-painted=true]"
READY = "import qlab.duel, qlab.methods.base"
SHOW = """from qlab.widgets import MethodDuel
fight = MethodDuel({})
fight"""


def show(page: Any, lab: Lab, name: str, *more: str, options: str = "") -> float:
    """Open a notebook and run the cell that shows a duel; return seconds until it has painted."""
    return pages.show(page, lab, name, DUEL, READY, SHOW.format(options), *more)


def test_a_duel_is_guessed_about_and_fought(page: Any, lab: Lab, theme: str) -> None:
    seconds = show(page, lab, f"duel-{theme}.ipynb", "print('in Python', f'{100 * fight.duel.apart[-1]:.1f}')")
    assert is_theme(page, theme)
    assert page.locator(".ql-duel .ql-question").inner_text().endswith("?")
    start = page.get_by_role("button", name="Start the duel")
    assert start.is_disabled()  # first the guess
    picture(page, f"duel-start-{theme}.png")
    page.get_by_label("10 to 30 %", exact=True).check()
    page.evaluate(
        """() => { const root = document.querySelector('.ql-duel');
            new MutationObserver((_, observer) => { if (root.dataset.looks !== '0') {
                window.first = performance.now() - began; observer.disconnect(); } })
              .observe(root, { attributes: true, attributeFilter: ['data-looks'] });
            const began = performance.now();
            [...root.querySelectorAll('button')].find((b) => b.textContent === 'Start the duel').click(); }"""
    )
    page.wait_for_function("window.first !== undefined", timeout=WAIT_MS)
    keep(
        f"duel-{theme}.json",
        {"first_paint_s": seconds, "first_result_s": page.evaluate("window.first") / 1000, "budget_s": 1.0},
    )
    page.wait_for_function(
        "() => document.querySelector('.ql-duel .ql-result').textContent.includes('You guessed')", timeout=WAIT_MS
    )
    for k in range(3):
        assert colours(page, f".ql-duel .ql-plane:nth-child({k + 1}) canvas") >= 3
    assert page.locator(".ql-duel .ql-right tr").count() == 5
    picture(page, f"duel-done-{theme}.png")
    page.locator(".jp-CodeCell .cm-content").nth(2).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector('.jp-OutputArea-output:has-text("in Python")')
    share = page.locator(".jp-OutputArea-output", has_text="in Python").inner_text().split()[2]
    assert page.locator(".ql-duel .ql-result").inner_text().startswith(f"{share} %")


def test_a_duel_is_stopped_from_the_keyboard_and_another_choice_begins_anew(page: Any, lab: Lab) -> None:
    show(page, lab, "duel-stop.ipynb", options="epochs=400")
    page.get_by_label("over 45 %", exact=True).focus()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Start the duel").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => Number(document.querySelector('.ql-duel').dataset.looks) > 2", timeout=WAIT_MS)
    page.get_by_role("button", name="Stop", exact=True).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.ql-duel .ql-status').textContent === 'Stopped.'")
    assert "of 3600 steps" in page.locator(".ql-duel .ql-caption").inner_text()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.ql-duel :is(input, select)')]
            .filter((e) => !e.labels?.length && !e.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0
    page.get_by_label("Data", exact=True).select_option("digits")
    page.wait_for_function("() => document.querySelector('.ql-duel').dataset.looks === '0'")
    page.get_by_label("Epochs", exact=True).fill("0")
    page.get_by_label("Epochs", exact=True).press("Enter")
    page.wait_for_function("() => document.querySelector('.ql-duel .ql-error').textContent.includes('from 1 to 500')")
    page.get_by_label("Epochs", exact=True).fill("3")
    page.get_by_label("Epochs", exact=True).press("Enter")
    page.wait_for_function("() => document.querySelector('.ql-duel .ql-error').hidden")
    page.get_by_label("under 10 %", exact=True).check()
    page.get_by_role("button", name="Start the duel").click()
    page.wait_for_function(
        "() => document.querySelector('.ql-duel .ql-status').textContent === 'Done.'", timeout=WAIT_MS
    )
    assert page.locator(".ql-duel .ql-planes").is_hidden()
    page.set_viewport_size({"width": 480, "height": 2000})
    picture(page, "duel-narrow.png")
    wide = page.evaluate(
        "() => { const e = document.querySelector('.ql-duel'); return e.scrollWidth - e.clientWidth; }"
    )
    assert wide <= 0
