"""LandscapeExplorer in a real JupyterLab: coarse at once, finer later, cancelled, turned by keyboard."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.browser import pages
from tests.browser.conftest import Lab
from tests.browser.pages import WAIT_MS, colours, keep

pytestmark = pytest.mark.browser

picture = partial(pages.picture, view=".ql-explorer")

NET = """import torch, qlab
from qlab.widgets.landscape import LandscapeExplorer
from qlab.diagnose.trajectory import trajectory
data = qlab.data.load("digits")
method = qlab.methods.create("ste", qlab.build("mlp", data.input_shape, 10, seed=0))
x, y = data.transform(data.split("test").x), data.split("test").y.long()
points, optimizer = [], torch.optim.Adam(method.net.parameters(), lr=0.01)
for step in range(60):
    if step % 6 == 0:
        points.append({n: p.detach().clone() for n, p in method.net.named_parameters()})
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(0.1 * method.net(x), y).backward()
    optimizer.step()
net = method.net.eval()
points.append({n: p.detach().clone() for n, p in net.named_parameters()})"""
SHOW = "view = LandscapeExplorer(net, x, y)\nview"
PAINTED = "Number(document.querySelector('.ql-explorer')?.dataset.points ?? 0) > 0"
POINTS = "() => Number(document.querySelector('.ql-explorer').dataset.points)"
IDLE = "() => document.querySelector('.ql-explorer').dataset.phase === 'idle'"


def show(page: Any, lab: Lab, name: str, cell: str = SHOW) -> None:
    """Open a notebook that trains a net, and run the cell that shows its landscape."""
    pages.show(page, lab, name, PAINTED, NET, cell)


def complete(page: Any) -> None:
    page.wait_for_function(f"() => ({POINTS})() === 51 * 51", timeout=WAIT_MS)
    page.wait_for_function(IDLE, timeout=WAIT_MS)


def test_a_coarse_surface_comes_first_and_grows_to_the_last_point(page: Any, lab: Lab) -> None:
    show(page, lab, "landscape-first.ipynb")
    first = page.evaluate(POINTS)
    seconds = page.evaluate("window.painted") / 1000
    keep("landscape-first-surface.json", {"first_surface_s": seconds, "points": first, "budget_s": 1.0})
    assert seconds < 10.0  # the budget of 1 s is for an idle machine, which a test's is not
    assert colours(page, "[data-function=latent] canvas") > 5
    complete(page)
    assert page.locator(".ql-question").inner_text().endswith("?")


def test_the_deployed_surface_is_shown_after_the_guess(page: Any, lab: Lab, theme: str) -> None:
    show(page, lab, f"landscape-{theme}.ipynb")
    complete(page)
    veil = page.locator("[data-function=deployed] .ql-veil")
    assert veil.inner_text() == "Guess first."
    assert colours(page, "[data-function=deployed] canvas") == 1
    assert "deployed loss" not in page.locator(".ql-readout").inner_text()
    picture(page, f"landscape-guess-{theme}.png")
    page.get_by_label("above the latent loss").focus()
    page.keyboard.press("Space")
    assert veil.is_hidden()
    assert "You guessed" in page.locator(".ql-result").inner_text()
    assert colours(page, "[data-function=deployed] canvas") > 20
    assert "Deployed: loss" in page.locator(".ql-caption").inner_text()
    picture(page, f"landscape-2d-{theme}.png")
    page.get_by_label("View", exact=True).select_option("3d")
    picture(page, f"landscape-3d-{theme}.png")


def test_keyboard_alone_reads_a_point_turns_the_surface_and_moves_the_slider(page: Any, lab: Lab) -> None:
    show(page, lab, "landscape-keys.ipynb")
    complete(page)
    page.get_by_label("above the latent loss").focus()
    page.keyboard.press("Space")
    page.locator("[data-function=latent] canvas").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".ql-readout").inner_text().startswith("At (0.04, 0)")
    page.keyboard.press("Shift+ArrowUp")
    assert page.locator(".ql-readout").inner_text().startswith("At (0.04, 0.2)")
    page.get_by_label("View", exact=True).select_option("3d")
    pixels = "() => document.querySelector('[data-function=latent] canvas').toDataURL()"
    before = page.evaluate(pixels)
    page.locator("[data-function=latent] canvas").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"(before) => ({pixels})() !== before", arg=before)
    slider = page.get_by_label("Sharpness k")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    wanted = page.locator(".ql-k").inner_text()
    page.wait_for_function(
        "(k) => document.querySelector('[data-function=smoothed] figcaption').textContent.endsWith(k)", arg=wanted
    )
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.ql-explorer :is(input, select, canvas)')]
            .filter((e) => !e.labels?.length && !e.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0


def test_cancel_keeps_the_partial_surface_and_refine_completes_it(page: Any, lab: Lab) -> None:
    slow = (
        "class Slow(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.net = net\n"
        "    def forward(self, x):\n        h = x\n        for _ in range(4000):\n            h = h + 0\n"
        "        return self.net(h)\n" + SHOW.replace("(net, x, y)", "(Slow().eval(), x, y)")
    )
    show(page, lab, "landscape-cancel.ipynb", slow)
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_function(IDLE, timeout=WAIT_MS)
    kept = page.evaluate(POINTS)
    assert 25 <= kept < 51 * 51
    assert "stays" in page.locator(".ql-explorer .ql-status").inner_text()
    assert colours(page, "[data-function=latent] canvas") > 5
    picture(page, "landscape-cancelled.png")
    page.get_by_role("button", name="Refine").click()
    page.wait_for_function(f"(kept) => ({POINTS})() > kept", arg=kept, timeout=WAIT_MS)


def test_the_training_path_is_drawn_and_nothing_sticks_out_of_a_narrow_page(page: Any, lab: Lab) -> None:
    cell = SHOW.replace("y)", "y, path=trajectory(points))")
    show(page, lab, "landscape-path.ipynb", cell)
    complete(page)
    page.get_by_label("above the latent loss").check()
    picture(page, "landscape-path.png")
    page.set_viewport_size({"width": 480, "height": 2400})
    picture(page, "landscape-narrow.png")
    wide = page.evaluate(
        "() => { const e = document.querySelector('.ql-explorer'); return e.scrollWidth - e.clientWidth; }"
    )
    assert wide <= 0
