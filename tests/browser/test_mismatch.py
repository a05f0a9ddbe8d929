"""GradientMismatch in a real JupyterLab: guessed, drawn with the keyboard and the mouse, trained, taken home."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.browser import pages
from tests.browser.conftest import Lab
from tests.browser.pages import WAIT_MS, is_theme, keep

pytestmark = pytest.mark.browser

picture = partial(pages.picture, view=".ql-mismatch")

VIEW = ".ql-mismatch[data-painted=true]"
FIRST = "import torch, qlab, qlab.quantizers.drawn"
SHOW = "from qlab.widgets.mismatch import GradientMismatch\nview = GradientMismatch()\nview"


def show(page: Any, lab: Lab, name: str, *more: str) -> None:
    """Open a notebook and run the cell that shows the view."""
    pages.show(page, lab, name, VIEW, FIRST, SHOW, *more)


def guess(page: Any, layer: str) -> None:
    page.wait_for_selector(".ql-mismatch .ql-guesses input", timeout=WAIT_MS)
    page.wait_for_selector(".ql-mismatch .ql-meter .ql-bar-row", state="attached", timeout=WAIT_MS)
    page.get_by_label(layer, exact=True).check()


def cosine(page: Any) -> str:
    return str(page.locator(".ql-mismatch").get_attribute("data-cosine"))


def test_the_drawing_is_painted_at_once_and_nothing_is_revealed_before_the_guess(page: Any, lab: Lab) -> None:
    show(page, lab, "mismatch-paint.ipynb")
    assert page.locator(".ql-mismatch .ql-question").inner_text().endswith("?")
    assert page.locator(".ql-mismatch .ql-handle").count() == 9
    page.wait_for_selector(".ql-mismatch .ql-guesses input", timeout=WAIT_MS)
    assert page.locator(".ql-mismatch .ql-scatter").is_hidden()
    assert "Cosine" not in page.locator(".ql-mismatch").inner_text()
    seconds = page.evaluate("window.painted") / 1000
    keep("mismatch-first-paint.json", {"first_paint_s": seconds, "budget_s": 1.0})
    assert seconds < 3.0  # the budget of 1 s is for an idle machine, which a test's is not


def test_it_is_guessed_drawn_trained_and_taken_home(page: Any, lab: Lab, theme: str) -> None:
    show(
        page,
        lab,
        f"mismatch-{theme}.ipynb",
        "print('at home', view.quantizer().surrogate.derivative(torch.tensor([0.])))",
    )
    assert is_theme(page, theme)
    guess(page, "fc")
    assert "You guessed" in page.locator(".ql-mismatch .ql-result").inner_text()
    assert page.locator(".ql-mismatch .ql-spot").count() > 30
    picture(page, f"mismatch-guessed-{theme}.png")
    before = cosine(page)
    handle = page.get_by_role("slider", name="derivative at x = 0", exact=True)
    for value in ("1.50", "2.00", "2.50", "3.00"):
        handle.press("PageUp")  # focuses it first: JupyterLab may take the focus back; it would scroll by this key
        assert handle.get_attribute("aria-valuenow") == value
    page.wait_for_function(f"() => document.querySelector('.ql-mismatch').dataset.cosine !== '{before}'")
    assert handle.get_attribute("aria-valuenow") == "3.00"  # no answer to an older drawing has undone it
    page.get_by_role("button", name="Train with this surrogate").click()
    page.wait_for_function("() => document.querySelector('.ql-mismatch').dataset.step === '300'", timeout=WAIT_MS)
    assert "Trained." in page.locator(".ql-mismatch .ql-status").inner_text()
    assert page.locator(".ql-mismatch .ql-region").count() == 1
    page.get_by_text("Take it home").click()
    code = page.locator(".ql-mismatch .ql-code").inner_text()
    assert "class MySign(Sign)" in code
    assert "3" in code
    picture(page, f"mismatch-trained-{theme}.png")
    page.locator(".jp-CodeCell .cm-content").nth(2).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector('.jp-OutputArea-output:has-text("at home tensor([3.])")')


def test_a_point_is_dragged_with_its_mirror_image(page: Any, lab: Lab) -> None:
    show(page, lab, "mismatch-drag.ipynb")
    guess(page, "hidden.3")
    before = cosine(page)
    handle = page.get_by_role("slider", name="derivative at x = 1.5", exact=True)
    box = handle.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 30, steps=5)
    page.mouse.up()
    value = float(str(handle.get_attribute("aria-valuenow")))
    assert value > 0.3
    twin = page.get_by_role("slider", name="derivative at x = -1.5", exact=True)
    assert float(str(twin.get_attribute("aria-valuenow"))) == value
    page.wait_for_function(f"() => document.querySelector('.ql-mismatch').dataset.cosine !== '{before}'")
    page.get_by_label("Start from").select_option("identity")
    page.wait_for_function("() => document.querySelector('.ql-handle').getAttribute('aria-valuenow') === '1.00'")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.ql-mismatch :is(input, select)')]
            .filter((e) => !e.labels?.length && !e.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0


def test_a_run_is_stopped_and_a_narrow_page_shows_everything(page: Any, lab: Lab) -> None:
    show(page, lab, "mismatch-stop.ipynb")
    guess(page, "fc")
    page.get_by_role("button", name="Train with this surrogate").click()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function("() => document.querySelector('.ql-mismatch').dataset.phase === 'idle'", timeout=WAIT_MS)
    assert "ed." in page.locator(".ql-mismatch .ql-status").inner_text()  # stopped, or trained before the click came
    page.set_viewport_size({"width": 480, "height": 2000})
    picture(page, "mismatch-narrow.png")
    wide = page.evaluate(
        "() => { const e = document.querySelector('.ql-mismatch'); return e.scrollWidth - e.clientWidth; }"
    )
    assert wide <= 0  # nothing sticks out
