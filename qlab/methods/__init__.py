"""Training methods: one file each, in folders by family; `CATALOG` lists them without importing torch.

net = qlab.build("mlp", input_shape=(1, 8, 8), num_classes=10)
method = qlab.methods.create("adaste", net, tol=1e-2)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlab.lazy import lazy_names
from qlab.methods.catalog import CATALOG, PAPERS, MethodInfo

if TYPE_CHECKING:
    from qlab.methods.base import Method
    from qlab.methods.checkpoints import load
    from qlab.methods.signature import Hyperparameter, hyperparameters

__all__ = ["CATALOG", "PAPERS", "Hyperparameter", "Method", "MethodInfo", "create", "hyperparameters", "load"]

_HOME = {
    "Hyperparameter": "qlab.methods.signature",
    "Method": "qlab.methods.base",
    "hyperparameters": "qlab.methods.signature",
    "load": "qlab.methods.checkpoints",
}


def create(name: str, net: Any, **options: Any) -> Method:
    """Return the method `name` around a plain net (or the spec of one).

    Raises:
        UnknownNameError: for a method, or a hyperparameter, that there is not.
    """
    from qlab.errors import UnknownNameError
    from qlab.methods.signature import hyperparameters

    cls = CATALOG.load(name)
    known = [h.name for h in hyperparameters(cls)]
    for option in options:
        if option not in known:
            raise UnknownNameError(f"hyperparameter of {name}", option, known)
    return cls(net, **options)


__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
