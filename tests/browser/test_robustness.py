"""RobustnessLab in a real JupyterLab: a guess comes first, curves and panels come in, an example is opened from the keyboard."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.browser import pages
from tests.browser.conftest import Lab
from tests.browser.pages import WAIT_MS, keep

pytestmark = pytest.mark.browser

picture = partial(pages.picture, view=".ql-robustness")

VIEW = ".ql-robustness[data-painted=true]"
READY = "from qlab.widgets import RobustnessLab\nimport torch, sklearn.datasets, qlab.attacks.suite"
SHOW = "v = RobustnessLab()\nv"
SMALL = """from qlab.attacks import FGSM, PGD
v = RobustnessLab(samples=30, eps=[0.05, 0.1, 0.2], attacks={"FGSM": FGSM(), "PGD": PGD(10)})
v"""


def trained(page: Any) -> None:
    """Wait for the clean accuracies of both nets."""
    page.wait_for_function(
        """() => document.querySelector('.ql-robustness').dataset.phase === 'idle'
            && document.querySelectorAll('.ql-robustness [data-net][data-points]').length === 2""",
        timeout=WAIT_MS,
    )


def run(page: Any) -> None:
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_function("() => document.querySelector('.ql-robustness').dataset.phase === 'running'")


def complete(page: Any) -> None:
    page.wait_for_selector(".ql-robustness[data-complete=true][data-phase=idle]", timeout=WAIT_MS)


def test_a_guess_comes_before_curves_and_panels(page: Any, lab: Lab, theme: str) -> None:
    first = pages.show(
        page, lab, f"robustness-{theme}.ipynb", VIEW, READY, SHOW, "print('in Python', v.answer['right'])"
    )
    page.wait_for_selector(".ql-robustness [data-net=float]", timeout=WAIT_MS)
    clean = page.evaluate("performance.now()")
    trained(page)
    keep(
        f"robustness-first-paint-{theme}.json",
        {"first_paint_s": first, "trained_after_s": (page.evaluate("performance.now()") - clean) / 1000},
    )
    root = page.locator(".ql-robustness")
    assert root.locator(".ql-question").inner_text().endswith("?")
    assert pages.is_theme(page, theme)
    assert root.locator(".ql-check:visible").count() == 0
    assert "obust accuracy" not in root.locator(".ql-caption").inner_text()
    picture(page, f"robustness-guess-{theme}.png")
    run(page)
    page.get_by_role("radio", name="binary").check()
    page.wait_for_function("() => document.querySelector('.ql-robustness [data-net=float]').dataset.points > 2")
    if root.get_attribute("data-complete") == "false":
        assert "No robust accuracy is stated" in root.locator(".ql-caption").inner_text()
    picture(page, f"robustness-running-{theme}.png")
    complete(page)
    assert root.locator(".ql-result").inner_text().startswith("You guessed wrong. At eps 0.1: float keeps at most ")
    assert root.locator(".ql-panels section").count() == 2
    for net in ("float", "binary"):
        panel = root.locator(f".ql-panels section[data-net={net}]")
        assert panel.locator(".ql-check").count() == 17
        states = panel.locator(".ql-state").all_inner_texts()
        assert all(state.split()[1].strip(",") in ("pass", "warn", "fail", "skipped") for state in states)
    assert "masking: vanishing" in root.locator(".ql-panels section[data-net=binary] h4").inner_text()
    assert pages.colours(page, ".ql-robustness .ql-strip-box button canvas") > 3
    check = root.locator(".ql-panels section[data-net=binary] .ql-check[data-check='10']")
    check.locator("summary").click()
    check.locator("svg").wait_for()
    assert "Evidence: " in check.inner_text()
    assert "Repair: " in check.inner_text()
    picture(page, f"robustness-told-{theme}.png")
    pages.picture(page, f"robustness-examples-{theme}.png", ".ql-robustness section:has(.ql-strip-box)")
    page.locator(".jp-CodeCell .cm-content").nth(2).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".jp-OutputArea-output:has-text(\"in Python ['float']\")")


def test_nets_attacks_checks_and_examples_are_chosen_from_the_keyboard(page: Any, lab: Lab) -> None:
    pages.show(page, lab, "robustness-keys.ipynb", VIEW, READY, SMALL)
    trained(page)
    root = page.locator(".ql-robustness")
    root.get_by_role("radio", name="float").focus()
    page.keyboard.press("Space")
    assert root.get_attribute("data-told") == "true"
    root.get_by_role("checkbox", name="FGSM").focus()
    page.keyboard.press("Space")
    page.wait_for_selector('.ql-robustness :text("The choice has changed: run again.")')
    root.get_by_role("checkbox", name="PGD", exact=True).focus()
    page.keyboard.press("Space")  # the last one stays
    assert root.get_by_role("checkbox", name="PGD", exact=True).is_checked()
    root.get_by_role("checkbox", name="float").focus()
    page.keyboard.press("Space")
    page.wait_for_function("() => !document.querySelector('.ql-robustness input[value=float][type=checkbox]').checked")
    root.get_by_role("button", name="Run", exact=True).focus()
    page.keyboard.press("Enter")
    complete(page)
    assert root.locator(".ql-panels section").count() == 1
    assert root.locator(".ql-broken tbody th").all_inner_texts() == ["PGD"]
    root.locator(".ql-check summary").first.focus()
    page.keyboard.press("Enter")
    assert root.locator(".ql-check").first.get_attribute("open") is not None
    root.locator(".ql-column[data-example='3']").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".ql-robustness .ql-column.ql-chosen[data-example='3']")
    assert "Example 3, label" in root.locator(".ql-detail-box h4").first.inner_text()
    assert page.evaluate("document.activeElement.dataset.example") == "3"
    root.get_by_role("button", name="later examples").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".ql-robustness .ql-column.ql-chosen[data-example='8']")
    root.get_by_label("Radius ε on view").select_option("0.05")
    page.wait_for_selector(".ql-robustness .ql-detail .ql-now th:text-is('0.05')")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.ql-robustness :is(input, select)')]
            .filter((e) => !e.labels?.length && !e.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0
    assert page.evaluate("() => document.querySelector('.ql-robustness .ql-error').hidden")


def test_a_stopped_run_states_nothing(page: Any, lab: Lab) -> None:
    pages.show(page, lab, "robustness-stop.ipynb", VIEW, READY, SHOW)
    trained(page)
    root = page.locator(".ql-robustness")
    root.get_by_role("radio", name="float").check()
    run(page)
    page.wait_for_function("() => document.querySelector('.ql-robustness [data-net=float]').dataset.points > 1")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.wait_for_selector(".ql-robustness[data-phase=idle]", timeout=WAIT_MS)
    assert root.get_attribute("data-complete") == "false"
    assert "Stopped" in root.locator(".ql-status").inner_text()
    assert "No robust accuracy is stated" in root.locator(".ql-caption").inner_text()
    assert "not finished" in root.locator(".ql-legend").inner_text()
    label = root.locator(".ql-chart-box svg").get_attribute("aria-label")
    assert "at most" not in label.split("binary:")[1]
