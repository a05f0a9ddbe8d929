"""qlab: an interactive lab for quantized and binary neural networks.

Every public name is loaded when it is first used (PEP 562): `import qlab` imports neither torch nor Lightning, so that the
command line answers at once and a notebook pays for what it uses.

    import qlab
    run = qlab.fit("adaste", qlab.data.load("digits"), epochs=20)
    run.metrics["test/acc"]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlab import attacks, binary, data, diagnose, experiments, jobs, methods, models, plots, quantizers
    from qlab.methods import load
    from qlab.methods.catalog import CATALOG
    from qlab.models import build
    from qlab.quantizers import harden, quantize
    from qlab.runs import Run, fit

    __version__: str

__all__ = [
    "CATALOG",
    "Run",
    "__version__",
    "attacks",
    "binary",
    "build",
    "data",
    "diagnose",
    "experiments",
    "fit",
    "harden",
    "jobs",
    "load",
    "methods",
    "models",
    "plots",
    "quantize",
    "quantizers",
]

_ROOMS = frozenset(
    {"attacks", "binary", "data", "diagnose", "experiments", "jobs", "methods", "models", "plots", "quantizers"}
)
_HOME = {
    "CATALOG": "qlab.methods.catalog",
    "Run": "qlab.runs",
    "build": "qlab.models",
    "fit": "qlab.runs",
    "harden": "qlab.quantizers",
    "load": "qlab.methods",
    "quantize": "qlab.quantizers",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"qlab.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("qlab")
    else:
        raise AttributeError(f"module 'qlab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
