"""What the browser tests do on a page: open a notebook, show a view and time it, take its picture, keep figures."""

from __future__ import annotations

import json
from typing import Any

from tests.browser.conftest import ARTIFACTS, Lab, write_notebook

WAIT_MS = 180_000  # patience with a busy machine that first has to import PyTorch and compile kernels
COLOURS = """(selector) => { const c = document.querySelector(selector);
    const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; const seen = new Set();
    for (let i = 0; i < d.length; i += 4) seen.add(`${d[i]},${d[i + 1]},${d[i + 2]}`); return seen.size; }"""


def open_notebook(page: Any, lab: Lab, name: str) -> None:
    """Open a notebook and wait for its kernel."""
    page.goto(lab.notebook(name))
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function("() => document.querySelector('#jp-main-statusbar')?.textContent.includes('| Idle')")
    page.keyboard.press("Control+B")  # the file browser goes


def run_first_cell(page: Any) -> None:
    page.locator(".jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Shift+Enter")


def show(page: Any, lab: Lab, name: str, painted: str, *cells: str) -> float:
    """Open a notebook, run its first cell, then the second, which shows a view; return seconds until `painted`.

    Args:
        page, lab: of the test.
        name: of the notebook to write.
        painted: a selector, or a JavaScript expression, that holds once the view has painted; timed in the page itself.
        cells: of the notebook.
    """
    write_notebook(lab.root / name, *cells)
    open_notebook(page, lab, name)
    run_first_cell(page)
    page.wait_for_selector('.jp-InputPrompt:has-text("[1]:")', timeout=WAIT_MS)
    holds = f"document.querySelector({json.dumps(painted)})" if painted.startswith(".") else painted
    page.evaluate(
        f"""() => {{ const began = performance.now(); const look = () => {holds}
            ? (window.painted = performance.now() - began) : requestAnimationFrame(look); look(); }}"""
    )
    page.keyboard.press("Shift+Enter")
    page.wait_for_function("window.painted !== undefined", timeout=WAIT_MS)
    return page.evaluate("window.painted") / 1000


def is_theme(page: Any, theme: str) -> bool:
    """Return whether JupyterLab is in this theme, "light" or "dark"."""
    return page.evaluate("document.body.dataset.jpThemeLight") == str(theme == "light").lower()


def colours(page: Any, canvas: str) -> int:
    """Return how many colours a canvas has; `canvas` is a selector."""
    return page.evaluate(COLOURS, canvas)


def picture(page: Any, name: str, view: str) -> None:
    """Keep a screenshot of a view; `view` is a selector."""
    ARTIFACTS.mkdir(exist_ok=True)
    page.locator(view).screenshot(path=str(ARTIFACTS / name))


def keep(name: str, figures: dict[str, float]) -> None:
    """Keep measured figures beside the screenshots."""
    ARTIFACTS.mkdir(exist_ok=True)
    (ARTIFACTS / name).write_text(json.dumps({key: round(value, 3) for key, value in figures.items()}) + "\n")
    print(name, figures)
