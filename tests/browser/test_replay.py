"""AttackReplay in a real JupyterLab: one path before the guess, all of them after it, in light and dark."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.browser import pages
from tests.browser.conftest import Lab
from tests.browser.pages import WAIT_MS, keep

pytestmark = pytest.mark.browser

picture = partial(pages.picture, view=".ql-replay")

PAINTED = ".ql-replay[data-painted=true]"
IMPORT = "import torch, qlab\nimport qlab.attacks.replay"
SHOW = "from qlab.widgets.replay import AttackReplay\nview = AttackReplay()\nview"
FINISHED = """() => { const e = document.querySelector('.ql-replay'); return e.dataset.phase === 'idle'
    && e.querySelectorAll('.ql-guesses input').length > 2; }"""


def finished(page: Any) -> None:
    page.wait_for_function(FINISHED, timeout=WAIT_MS)


def played(page: Any) -> None:
    page.wait_for_function("() => document.querySelector('.ql-replay').dataset.step === '20'", timeout=WAIT_MS)
    page.wait_for_function("() => document.querySelector('.ql-caption').textContent.includes('Margins at step 20')")


def test_a_guess_comes_first_and_then_all_attackers_play(page: Any, lab: Lab, theme: str) -> None:
    pages.show(page, lab, f"replay-{theme}.ipynb", PAINTED, IMPORT, SHOW, "print('in Python', view.settings['step'])")
    assert pages.is_theme(page, theme)
    keep("replay-first-paint.json", {"first_paint_s": page.evaluate("window.painted") / 1000, "budget_s": 1.0})
    assert page.locator(".ql-replay .ql-question").inner_text() == "Which attacker moves?"
    finished(page)
    assert page.locator(".ql-replay [data-path]").count() == 1  # the plain one, stuck
    assert page.locator(".ql-plane-picture .ql-ring").count() == 1
    assert page.locator(".ql-plane-picture .ql-arrow").count() == 0
    assert page.locator(".ql-toggles").is_hidden()
    assert page.locator(".ql-readings").is_hidden()
    picture(page, f"replay-guess-{theme}.png")

    page.locator(".ql-guesses").get_by_label("none of them").check()
    played(page)
    assert "You guessed wrong" in page.locator(".ql-replay .ql-result").inner_text()
    assert page.locator(".ql-replay [data-path]").count() == 5
    assert page.locator(".ql-plane-picture .ql-star").count() == 2  # temperature and Square
    assert page.locator(".ql-plane-picture .ql-ring").count() == 3  # plain, BPDA, NES
    assert page.locator(".ql-plane-picture .ql-arrow").count() == 20  # of the temperature's gradient
    assert page.locator(".ql-readings tbody tr").count() == 5
    picture(page, f"replay-all-{theme}.png")

    slider = page.get_by_label("Step of all attackers")
    slider.focus()
    page.evaluate(
        """() => { window.moved = undefined; const root = document.querySelector('.ql-replay'); const was = root.dataset.step;
            addEventListener('keydown', () => { window.began = performance.now(); }, { once: true, capture: true });
            const look = () => root.dataset.step !== was ? (window.moved = performance.now() - window.began)
                : requestAnimationFrame(look); look(); }"""
    )
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("window.moved !== undefined")
    keep("replay-redraw.json", {"slider_s": page.evaluate("window.moved") / 1000, "budget_s": 0.1})
    for _ in range(7):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('.ql-caption').textContent.includes('Margins at step 12')")
    assert page.locator(".ql-plane-picture .ql-star").count() == 0  # nobody has broken it yet
    for title in ("PGD, plain gradient", "Square"):
        page.locator(".ql-toggles").get_by_label(title).focus()
        page.keyboard.press("Space")
    assert page.locator(".ql-replay [data-path]").count() == 3
    page.locator(".jp-CodeCell .cm-content").nth(2).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector('.jp-OutputArea-output:has-text("in Python")')
    assert page.locator(".jp-OutputArea-output", has_text="in Python").inner_text().split()[-1] == "12"

    page.get_by_label("A binary net for").select_option("moons")
    page.wait_for_function("() => document.querySelector('.ql-replay .ql-result').textContent === ''")
    finished(page)
    page.get_by_label("What is wrong with it").select_option("dead")
    finished(page)
    page.wait_for_function("() => document.querySelector('.ql-axis-title').textContent === 'first input'")
    page.locator(".ql-guesses").get_by_label("BPDA").check()
    played(page)
    assert page.locator(".ql-pictures").is_hidden()
    picture(page, f"replay-moons-{theme}.png")


def test_everything_has_a_name_and_nothing_sticks_out(page: Any, lab: Lab) -> None:
    pages.show(page, lab, "replay-names.ipynb", PAINTED, IMPORT, SHOW)
    finished(page)
    page.locator(".ql-guesses").get_by_label("Square").focus()
    page.keyboard.press("Space")
    played(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.ql-replay :is(input, select)')]
            .filter((e) => !e.labels?.length && !e.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0
    silent = page.evaluate(
        """() => [...document.querySelectorAll('.ql-replay :is(svg, canvas):not([aria-hidden])')]
            .filter((e) => !e.getAttribute('aria-label')).length"""
    )
    assert silent == 0
    page.get_by_label("Example", exact=True).fill("100000")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.ql-replay .ql-error').textContent.includes('example')")
    page.set_viewport_size({"width": 520, "height": 2600})
    picture(page, "replay-narrow.png")
    wide = page.evaluate(
        "() => { const e = document.querySelector('.ql-replay'); return e.scrollWidth - e.clientWidth; }"
    )
    assert wide <= 0
