"""What the Studio offers, and what it makes of a choice: data, nets and methods from the lab's shelves.

PyTorch is imported on first use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlab.widgets import preview
from qlab.widgets.records import pack_histogram
from qlab.widgets.settings import Settings, control, parse_value

from qlab.data import DATA
from qlab.errors import InputError
from qlab.methods.catalog import CATALOG
from qlab.models import MODELS

__all__ = ["build", "controls", "examples", "load", "shelves"]

_OWN_CONTROLS = ("seed",)  # hyperparameters of every method for which the Studio has a control of its own


def shelves() -> dict[str, Any]:
    """Return names and titles of all there is, without importing any of it."""
    return {
        "data": [
            {"name": d.name, "title": d.title, "net": d.net, "kind": d.kind, "source": d.source}
            for d in DATA.values()
            if d.kind != "text"  # the Studio shows pictures and points
        ],
        "nets": [{"name": m.name, "title": f"{m.name}: {m.title}"} for m in MODELS.values() if m.takes == "floats"],
        "methods": [m.row() for m in CATALOG.values()],
    }


def controls(method: str) -> dict[str, Any]:
    """Return a control for each hyperparameter of a method that a view can show."""
    from qlab.methods import Method, hyperparameters

    common = {h.name for h in hyperparameters(Method)}
    items = [
        control(h) | {"common": h.name in common}
        for h in hyperparameters(CATALOG.load(method))
        if h.kind != "other" and h.name not in _OWN_CONTROLS
    ]
    return {"method": method, "items": items}


def load(settings: Settings) -> Any:
    """Return the data module of the settings, its set read."""
    import qlab.data

    options: dict[str, Any] = {"batch_size": settings.batch_size, "seed": settings.seed}
    if settings.folder and settings.data == "image_folder":
        options["root"] = settings.folder
    data = qlab.data.load(settings.data, **options)
    data.input_shape  # noqa: B018  # reads the set now, so that a missing file is told before the run starts
    return data


def build(settings: Settings, data: Any) -> Any:
    """Return the method of the settings with its net for the data."""
    from qlab.methods import create, hyperparameters
    from qlab.models import build

    known = {h.name: h for h in hyperparameters(CATALOG.load(settings.method))}
    values = {
        name: parse_value(known[name], raw) if name in known and known[name].kind != "other" else raw
        for name, raw in settings.hyper.items()
    }
    if "seed" in known:
        values.setdefault("seed", settings.seed)
    net = build(settings.net, data.input_shape, data.num_classes, seed=settings.seed)
    return create(settings.method, net, **values)


def examples(settings: Settings, data: Any) -> dict[str, Any]:
    """Return what is shown of a choice before it is trained: examples, the nets that fit, the weights that training starts from."""
    from qlab.live import weight_histogram

    seen = preview.examples(data, settings.data)
    seen["nets"] = _fitting_nets(data)
    if settings.net in seen["nets"]:
        seen["histogram"] = pack_histogram(weight_histogram(build(replace(settings, hyper={}), data)))
    return seen


def _fitting_nets(data: Any) -> list[str]:
    """Return the nets that can be built for the data; nothing is allocated for them."""
    import torch

    from qlab.models import build

    fitting = []
    for name in (m.name for m in MODELS.values() if m.takes == "floats"):
        try:
            with torch.device("meta"):
                build(name, data.input_shape, data.num_classes)
        except InputError:
            continue
        fitting.append(name)
    return fitting
