"""Studio: choose data, net and method, train live, stop, resume, compare, send the trained run on to the notebook.

    from qlab.widgets import Studio

    studio = Studio()      # as the last line of a cell: shows itself
    studio.run             # the latest run, as from qlab.fit; studio.runs has all by label

Everything the browser can do can be done from Python: `configure`, `train`, `stop`, `resume`, `compare`, `send`. No
mathematics stands here. What is drawn comes from `qlab.live.training`, run by `qlab.jobs`; messages from the browser only
start or stop such jobs, so the kernel is never blocked. PyTorch is imported by the first job, after the widget has painted.
"""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Generator, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

import traitlets
from qlab.widgets import preview, shelves
from qlab.widgets.records import MAX_SHOWN, Record, label, pack, table
from qlab.widgets.settings import Settings, check_variable
from qlab.widgets.view import View

from qlab.data import DATA
from qlab.errors import InputError, QlabError
from qlab.jobs import Job, Latest, Update, background

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qlab.live import Snapshot
    from qlab.runs import Run

__all__ = ["Studio"]

_STATIC = pathlib.Path(__file__).parent / "static"
_READY = "Ready. Choose, predict, then press Train."
_BUSY = ("training", "stopping")


class Studio(View):
    """An interactive bench for training one net after another and comparing them.

    Args:
        data, net, method: names on the lab's shelves; `net` is by default the one that suits the data.
        epochs, batch_size, seed: of a run.
        namespace: where "Send to notebook" puts runs; by default the notebook's variables.
        root: folder that gets a folder per run with its checkpoint, history and settings; by default a checkpoint lives
            as long as its run.
        hyper: hyperparameters of the method.

    Raises:
        InputError: for a setting out of range.
    """

    _esm = _STATIC / "studio.js"
    _css = _STATIC / "studio.css"

    shelves = traitlets.Dict().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)
    controls = traitlets.Dict().tag(sync=True)
    preview = traitlets.Dict().tag(sync=True)
    live = traitlets.Dict().tag(sync=True)
    shown: traitlets.List[Any] = traitlets.List().tag(sync=True)
    rows: traitlets.List[Any] = traitlets.List().tag(sync=True)

    def __init__(
        self,
        data: str = "digits",
        net: str | None = None,
        method: str = "adaste",
        *,
        epochs: int = 20,
        batch_size: int = 128,
        seed: int = 0,
        namespace: MutableMapping[str, Any] | None = None,
        root: str | pathlib.Path | None = None,
        **hyper: Any,
    ) -> None:
        if net is None:
            net = DATA[data].net
        hyper = {k: ", ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in hyper.items()}
        self._settings = Settings(data, net, method, hyper, epochs, batch_size, seed)
        self._namespace = namespace
        self._root = None if root is None else pathlib.Path(root)
        self._records: list[Record] = []
        self._lock = threading.RLock()
        self._data: tuple[object, Any] = (None, None)
        self._said = _READY
        self._peek = Latest(self._peeked)
        super().__init__(
            shelves=shelves.shelves(),
            settings=self._settings.json(),
            preview=preview.digits_at_once(),
            status={"phase": "idle", "text": _READY, "fraction": 0.0},
        )
        self.caption = self._caption()
        self.on_msg(self._on_message)

    # ---- what a user calls --------------------------------------------------------------------------------------------

    @property
    def run(self) -> Run | None:
        """The latest run that has ended or was stopped, None before."""
        runs = self.runs
        return list(runs.values())[-1] if runs else None

    @property
    def runs(self) -> dict[str, Run]:
        """All runs that have ended or were stopped, by label, oldest first."""
        kept = {r.label: r.kept for r in self._records}
        return {
            name: snapshot.run for name, snapshot in kept.items() if snapshot is not None and snapshot.run is not None
        }

    def configure(self, **changes: Any) -> None:
        """Change settings: data, net, method, epochs, batch_size, seed, folder, name, guess, hyper.

        Raises:
            InputError: for a field that there is not, or a value out of range; nothing is changed then.
        """
        before = self._settings
        self._settings = Settings.from_json(before.json() | changes)
        self.settings = self._settings.json()
        if (before.data, before.method, before.net) != (self._settings.data, self._settings.method, self._settings.net):
            self.look()

    def look(self) -> Job:
        """Load the controls of the chosen method and examples of the chosen data, in the background."""
        settings = self._settings
        return self._peek.submit(lambda: self._look(settings))

    def train(self, *, wait: bool = False) -> Job:
        """Start a new run with the present settings.

        Args:
            wait: return when the run has ended; a failure is raised then.

        Raises:
            InputError: while another run is training.
        """
        with self._lock:
            self._refuse_if_busy()
            record = Record(label(len(self._records)), self._settings)
            self._records.append(record)
            job = self._start(record)
        if wait:
            job.result()
        return job

    def stop(self) -> None:
        """Ask the run that is training to stop; it keeps a checkpoint to resume from."""
        with self._lock:
            record = self._active
            if record is not None and record.phase == "training" and record.job is not None:
                record.phase = "stopping"
                self._say("Stopping ...")
                record.job.cancel()

    def resume(self, *, wait: bool = False) -> Job:
        """Go on with the latest run, which was stopped, bit for bit as if it had not been.

        Raises:
            InputError: where there is nothing to resume.
        """
        with self._lock:
            self._refuse_if_busy()
            record = self._active
            if record is None or not self._resumable(record):
                raise InputError("There is no stopped run to resume; press Train.")
            record.snapshot = record.kept
            job = self._start(record)
        if wait:
            job.result()
        return job

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the run has ended, at most `timeout` seconds; returns whether it has."""
        record = self._active
        return record is None or record.job is None or record.job.wait(timeout)

    def compare(self, labels: Iterable[str]) -> None:
        """Show just these runs side by side.

        Raises:
            InputError: for a label that there is not, or more runs than can be told apart.
        """
        chosen = [self._record(name) for name in labels]
        if len(chosen) > MAX_SHOWN:
            raise InputError(f"{len(chosen)} runs were chosen; at most {MAX_SHOWN} can be told apart. Hide one first.")
        with self._lock:
            for record in self._records:
                if record not in chosen:
                    record.slot = None
            for record in chosen:
                self._show(record)
        self._publish()

    def send(self, run: str | None = None, name: str | None = None) -> str:
        """Put a trained run into a variable of the notebook; returns the variable's name.

        Args:
            run: its label; by default the latest.
            name: the variable; by default the one in the settings.

        Raises:
            InputError: where there is no such run, no notebook, or the name cannot be a variable.
        """
        name = self._settings.name if name is None else name
        if not isinstance(name, str):
            raise InputError(f"the variable's name is {name!r}; expected a text such as run.")
        check_variable(name)
        runs = self.runs
        if not runs:
            raise InputError("There is no trained run to send yet; press Train.")
        chosen = list(runs)[-1] if run is None else run
        if not isinstance(chosen, str) or chosen not in runs:
            raise InputError(
                f"Run {chosen!r:.20} has not been trained to an end or a stop; choose one of {', '.join(runs)}."
            )
        namespace = _notebook() if self._namespace is None else self._namespace
        if namespace is None:
            raise InputError("There is no notebook to send to; use studio.run, or give Studio(namespace=...).")
        namespace[name] = runs[chosen]
        self._say(f"Run {chosen} is now the variable {name} in the notebook.", about="send")
        return name

    def figure(self) -> Figure:
        """Return the runs that are shown as a static matplotlib figure."""
        from qlab.plots.training import history_figure

        records = [r for r in self._visible if r.snapshot is not None]
        snapshots: list[Snapshot] = [r.snapshot for r in records if r.snapshot is not None]
        return history_figure(
            snapshots,
            [r.label for r in records],
            histograms=[s.histogram for s in snapshots],
            chance=self.preview.get("chance"),
        )

    def _kept(self) -> dict[str, Any]:
        return self._settings.json()

    @classmethod
    def from_state(cls, state: object, **options: Any) -> Studio:
        """Return a Studio with the settings of `state`, a dictionary or its JSON text.

        Raises:
            InputError: for anything that `state()` does not write.
        """
        settings = Settings.from_json(cls._read(state))
        studio = cls(**options)
        studio.configure(**settings.json())
        return studio

    def _pictured(self) -> bool:
        return any(r.snapshot is not None for r in self._visible)

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _act(self, kind: object, content: Any) -> bool:
        if "settings" in content:
            self.configure(**Settings.from_json(content["settings"]).json())
        if kind == "train":
            self.train()
        elif kind == "stop":
            self.stop()
        elif kind == "resume":
            self.resume()
        elif kind == "compare":
            self.compare(_labels(content.get("labels")))
        elif kind == "send":
            self.send(content.get("run"), content.get("name"))
        elif kind == "ready":
            self.look()
        elif kind == "settings":
            if "error" in self.status:
                self._say(self._said)
        else:
            return False
        return True

    # ---- work -----------------------------------------------------------------------------------------------------------

    def _look(self, settings: Settings) -> Generator[Update, None, None]:
        found = yield from background(lambda: shelves.controls(settings.method), "Loading PyTorch ...")
        yield Update(0.5, "", {"controls": found})
        if (
            DATA[settings.data].source != "files"
        ):  # a set in files may have to be downloaded: only when it is trained on
            seen = yield from background(lambda: self._examples(settings), "Loading the data ...")
            yield Update(1.0, "", {"controls": found, "preview": seen})

    def _peeked(self, job: Job) -> None:
        """Show what a look has found; runs in its thread."""
        if job.error is not None:
            self._complain(job.error)
        for name, value in (job.value or {}).items():
            setattr(self, name, value)
        if "preview" in (job.value or {}):
            self.caption = self._caption()
        record = self._active
        told = "error" in self.status  # an error stays until something is done about it
        if not told and (record is None or record.phase not in _BUSY):
            looking = job.status == "running"
            text = job.text if looking and job.text else self._said
            if (text, looking) != (self.status.get("text"), self.status.get("looking")):
                self.status = self._status(text, looking=looking)

    def _load(self, settings: Settings) -> Any:
        """Return the data module of the settings; the last one is kept, as sets take time to read."""
        key = (settings.data, settings.batch_size, settings.seed, settings.folder)
        if self._data[0] != key:
            self._data = (key, shelves.load(settings))
        return self._data[1]

    def _examples(self, settings: Settings) -> dict[str, Any]:
        return shelves.examples(settings, self._load(settings))

    def _start(self, record: Record) -> Job:
        record.phase = "training"
        self._show(record)
        record.job = Job(lambda: self._work(record), lambda job: self._heard(record, job))
        self._say("Loading PyTorch, the data and the net ...")
        self._publish()
        return record.job.start()

    def _work(self, record: Record) -> Generator[Update, None, None]:
        settings, before = record.settings, record.kept

        def prepare() -> tuple[Any, Any]:
            data = self._load(settings)
            if self.preview.get("data") != settings.data or self.preview.get("nets") is None:
                self.preview = self._examples(settings)
            record.chance = self.preview["chance"]
            return data, shelves.build(settings, data)

        data, method = yield from background(prepare, "Loading PyTorch, the data and the net ...")
        from qlab.live import training

        yield from training(
            method,
            data,
            epochs=settings.epochs,
            seed=settings.seed,
            root=None if self._root is None else self._root / record.label,
            resume=None if before is None else before.run,
            before=before,
        )

    def _heard(self, record: Record, job: Job) -> None:
        """Show what a training has reported; runs in its thread."""
        fresh = job.value is not None and job.value is not record.snapshot
        if job.value is not None:
            record.snapshot = job.value
        if job.status != "running":
            self._ended(record, job)
        elif fresh:
            if record.slot is not None:
                self.live = pack(record)
            self.caption = self._caption()
            self._say(job.text, fraction=job.fraction)
        elif job.text != self._said and record.phase == "training":
            self._say(job.text)

    def _ended(self, record: Record, job: Job) -> None:
        with self._lock:  # so that a Stop that comes now finds the run ended
            if record.snapshot is not None and record.snapshot.run is not None:
                record.kept = record.snapshot
            if job.status == "failed":
                record.phase = "failed"
            elif record.kept is None or record.kept.run is None:
                record.phase = "cancelled"
            else:
                record.phase = "done" if record.kept.run.completed else "stopped"
            self._publish()
            if job.error is not None:
                self._said = "The run failed."
                self._complain(job.error)
            else:
                where = "" if record.kept is None else f": step {record.kept.step}, epoch {record.kept.epoch:.1f}"
                words = {"done": "Done", "stopped": "Stopped", "cancelled": "Stopped before the first step"}
                self._say(f"{words[record.phase]}{where}.", fraction=job.fraction)

    @staticmethod
    def _resumable(record: Record) -> bool:
        return record.kept is not None and record.phase in ("stopped", "failed")

    # ---- state of the view ----------------------------------------------------------------------------------------------

    @property
    def _active(self) -> Record | None:
        return self._records[-1] if self._records else None

    @property
    def _visible(self) -> list[Record]:
        return [r for r in self._records if r.slot is not None]

    def _record(self, name: str) -> Record:
        for record in self._records:
            if record.label == name:
                return record
        known = ", ".join(r.label for r in self._records) or "none yet"
        raise InputError(f"There is no run {name!r:.20}; the runs are: {known}.")

    def _refuse_if_busy(self) -> None:
        record = self._active
        if record is not None and record.phase in _BUSY:
            raise InputError(f"Run {record.label} is still training; stop it first.")

    def _show(self, record: Record) -> None:
        """Give a record a free colour, the one of the oldest shown where all are taken."""
        if record.slot is not None:
            return
        visible = self._visible
        if len(visible) >= MAX_SHOWN:
            record.slot, visible[0].slot = visible[0].slot, None
        else:
            record.slot = min(set(range(MAX_SHOWN)) - {r.slot for r in visible})

    def _publish(self) -> None:
        with self._lock:
            active = self._active
            self.live = pack(active) if active is not None and active.slot is not None else {}
            self.shown = [pack(r) for r in self._visible if r is not active]
            self.rows = table(self._records)
            self.caption = self._caption()

    def _say(self, text: str, *, fraction: float | None = None, **more: Any) -> None:
        self._said = text
        super()._say(text, fraction=fraction, **more)

    def _status(self, text: str, *, fraction: float | None = None, **more: Any) -> dict[str, Any]:
        record = self._active
        more["phase"] = "idle" if record is None else record.phase
        return super()._status(
            text, fraction=fraction, resumable=record is not None and self._resumable(record), **more
        )

    def _complain(self, error: BaseException, about: str = "") -> None:
        """Show an error: one message for what a user can act on, with the traceback for what is a bug."""
        expected = isinstance(error, QlabError)
        self.status = self._status(
            self._said,
            about=about,
            error=str(error) if expected else f"{type(error).__name__}: {error}",
            detail="" if expected else _traceback(error),
        )

    def _caption(self) -> str:
        """Return the caption with the numbers of the latest run."""
        record = self._active
        told = None if record is None else record.summary()
        if told is not None:
            return told
        if self.preview["data"] != self._settings.data:
            return f"What the net makes of {self._settings.data} will stand here."
        return (
            f"Always naming the most frequent class of {self._settings.data} is right in {self.preview['chance']:.0%} "
            "of cases; what the net makes of it will stand here."
        )


def _labels(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise InputError(f"the view sent {value!r:.40} as runs to compare; expected a list of labels.")
    return value


def _notebook() -> MutableMapping[str, Any] | None:
    """Return the variables of the notebook this runs in, or None outside of one."""
    from IPython import get_ipython

    shell = get_ipython()
    return None if shell is None else shell.user_ns


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))[-5000:]
