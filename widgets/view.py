"""What every view of the lab does in one way: state to and fro, messages from the browser, a status line, a static picture."""

from __future__ import annotations

import base64
import io
import time
from abc import abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets
from qlab.widgets.settings import parse_json

from qlab.errors import InputError, QlabError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qlab.jobs import Job, Latest

__all__ = ["Chosen", "View"]


class View(anywidget.AnyWidget):
    """A widget with a status line and a caption. A subclass has its own traits, `figure`, `_kept`, `_pictured` and `_act`."""

    status = traitlets.Dict().tag(sync=True)
    caption = traitlets.Unicode().tag(sync=True)

    @abstractmethod
    def figure(self) -> Figure:
        """Return a static figure of what is on view, its message in words as its label."""

    @abstractmethod
    def _kept(self) -> dict[str, Any]:
        """Return what `state` keeps: primitives."""

    @abstractmethod
    def _pictured(self) -> bool:
        """Return whether there is a picture worth its time: before the first result it would only delay the first paint."""

    @abstractmethod
    def _act(self, kind: object, content: Any) -> bool:
        """Do what a message from the browser asks for; return whether its type is known."""

    def state(self) -> dict[str, Any]:
        """Return the view as a small dictionary of primitives (no arrays); see `from_state`."""
        return {"widget": type(self).__name__, "version": 1, "settings": self._kept()}

    @classmethod
    def _read(cls, state: object, fields: Collection[str] | None = None) -> dict[str, Any]:
        """Return the settings in what `state` wrote, a dictionary or its JSON text; their values are not checked yet.

        Args:
            state: from outside.
            fields: the names that the settings must have; any by default.

        Raises:
            InputError: for anything else.
        """
        state, name = parse_json(state), cls.__name__
        if not isinstance(state, dict) or set(state) != {"widget", "version", "settings"}:
            raise InputError(f"the state is not one of {name}.state(): a dictionary of widget, version and settings.")
        if state["widget"] != name or state["version"] != 1 or isinstance(state["version"], bool):
            raise InputError(
                f"the state is of {state['widget']!r:.40} version {state['version']!r:.20}; expected {name!r} version 1."
            )
        settings = state["settings"]
        if not isinstance(settings, dict) or (fields is not None and set(settings) != set(fields)):
            wanted = f" of {', '.join(fields)}" if fields else ""
            raise InputError(f"the settings are {settings!r:.80}; expected a dictionary{wanted}.")
        return settings

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Add what a reader without the kernel sees: a picture, and its numbers in words."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        data["text/plain"] = f"{type(self).__name__}. {self.caption}"
        if self._pictured():
            buffer = io.BytesIO()
            figure = self.figure()
            figure.savefig(buffer, format="png")
            data["image/png"] = base64.b64encode(buffer.getvalue()).decode()
            metadata["image/png"] = {"alt": str(figure.get_label()) or self.caption}
        return data, metadata

    def _on_message(self, _: Any, content: Any, __: Any) -> None:
        """Act on a message; what is wrong with it is shown, never raised into the kernel's loop."""
        kind = content.get("type") if isinstance(content, dict) else None
        try:
            if not isinstance(content, dict) or not self._act(kind, content):
                raise InputError(f"the view sent an unknown message {kind!r:.40}.")
        except Exception as error:
            self._complain(error, kind if isinstance(kind, str) else "")

    def _status(self, text: str, *, phase: str = "idle", fraction: float | None = None, **more: Any) -> dict[str, Any]:
        kept = self.status.get("fraction", 0.0) if fraction is None else float(fraction)
        return {"phase": phase, "text": text, "fraction": kept, "at": time.time(), **more}

    def _say(self, text: str, *, fraction: float | None = None, **more: Any) -> None:
        """Set the status line; an earlier error goes."""
        self.status = self._status(text, fraction=fraction, **more)

    def _complain(self, error: BaseException, about: str = "") -> None:
        """Show an error: one message for what a user can act on, with its kind for what is a bug.

        Args:
            error: what went wrong.
            about: the type of the message that asked for it.
        """
        told = str(error) if isinstance(error, QlabError) else f"{type(error).__name__}: {error}"
        self.status = {**self.status, "error": told, "about": about, "at": time.time()}

    def _forgive(self) -> None:
        """Take an error off the view: something right was done since."""
        if "error" in self.status:
            self.status = {name: value for name, value in self.status.items() if name != "error"}


class Chosen(View):
    """A view of settings that are chosen and work that is run: by `choose`, `run` and `stop`, from Python and the browser alike.

    A subclass has its settings in `_place`, its work in `_latest`, and says in `_wake` what a page that opens asks for.
    """

    _place: dict[str, Any]
    _latest: Latest

    @abstractmethod
    def choose(self, **changes: Any) -> Job | None:
        """Change what is on view; what is not given stays."""

    @abstractmethod
    def run(self) -> Job:
        """Start the work in the background."""

    @abstractmethod
    def _wake(self) -> None:
        """Do what a page that opens asks for; several may."""

    def stop(self) -> None:
        """Ask the work to stop; what was found so far stays."""
        self._latest.cancel()

    def _kept(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, list) else value for name, value in self._place.items()}

    def _act(self, kind: object, content: Any) -> bool:
        if kind == "ready":
            self._wake()
        elif kind == "choose":
            self.choose(**{name: value for name, value in content.items() if name != "type"})
        elif kind == "run":
            self.run()
        elif kind == "stop":
            self.stop()
        else:
            return False
        return True
