"""What all views share: states from outside read with care, errors shown once and forgiven, pictures that stand in for a view."""

from __future__ import annotations

from typing import Any

import pytest
from qlab.widgets.view import View

from qlab.errors import InputError
from qlab.plots import Figure


class Plain(View):
    shown = 0

    def figure(self) -> Figure:
        figure = Figure(figsize=(1, 1))
        figure.set_label("a square")
        return figure

    def _kept(self) -> dict[str, Any]:
        return {"shown": self.shown}

    def _pictured(self) -> bool:
        return self.shown > 0

    def _act(self, kind: object, content: Any) -> bool:
        if kind == "show":
            self.shown = int(content["shown"])
        elif kind == "break":
            raise InputError("say it otherwise")
        else:
            return False
        return True


def send(view: View, content: object) -> None:
    view._handle_custom_msg(content, [])


@pytest.fixture
def view() -> Plain:
    view = Plain(caption="nothing yet")
    view.on_msg(view._on_message)
    return view


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"type": "jump"}, "unknown message 'jump'"),
        ("jump", "unknown message None"),
        (None, "unknown message None"),
        ({"type": "break"}, "say it otherwise"),
        ({"type": "show"}, "KeyError: 'shown'"),
    ],
)
def test_what_is_wrong_with_a_message_is_shown_and_not_raised(view: Plain, content: object, told: str) -> None:
    send(view, content)
    assert told in view.status["error"]


def test_an_error_stays_until_something_right_is_done(view: Plain) -> None:
    view._say("Ready.", fraction=0.25)
    send(view, {"type": "jump"})
    assert view.status["text"] == "Ready."
    view._forgive()
    assert {k: view.status[k] for k in ("phase", "text", "fraction")} == {
        "phase": "idle",
        "text": "Ready.",
        "fraction": 0.25,
    }
    assert "error" not in view.status


def test_a_picture_with_its_words_stands_in_for_the_view_once_there_is_one(view: Plain) -> None:
    data, _ = view._repr_mimebundle_()
    assert data["text/plain"] == "Plain. nothing yet"
    assert "image/png" not in data
    send(view, {"type": "show", "shown": 2})
    data, metadata = view._repr_mimebundle_()
    assert data["image/png"]
    assert metadata["image/png"] == {"alt": "a square"}


def test_a_state_is_read_only_where_it_is_one(view: Plain) -> None:
    good = view.state()
    assert Plain._read(good) == {"shown": 0}
    assert Plain._read('{"widget": "Plain", "version": 1, "settings": {"shown": 0}}', ("shown",)) == {"shown": 0}
    for wrong in (
        None,
        [],
        "{",
        good | {"more": 1},
        good | {"widget": "Other"},
        good | {"version": True},
        good | {"version": 2},
        good | {"settings": 3},
    ):
        with pytest.raises(InputError):
            Plain._read(wrong)
    with pytest.raises(InputError, match="expected a dictionary of hidden"):
        Plain._read(good, ("hidden",))
