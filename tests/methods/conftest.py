"""One small net and data set on which every method of the catalog is held to its contract."""

from __future__ import annotations

from typing import Any

import pytest

import qlab
from qlab.methods import CATALOG, Method


@pytest.fixture(params=sorted(CATALOG))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def small_net(seed: int = 1) -> Any:
    return qlab.build("mlp", (2,), 2, hidden=(16, 16), affine=False, final_norm=True, seed=seed)


def moons(seed: int = 0, **options: Any) -> Any:
    return qlab.data.load("two_moons", **{"n": 400, "batch_size": 32, "seed": seed} | options)


def train(name: str, *, epochs: int = 2, seed: int = 0, method: Method | None = None, **options: Any) -> qlab.Run:
    method = method or qlab.methods.create(name, small_net(), seed=seed)
    return qlab.fit(method, moons(seed), epochs=epochs, seed=seed, progress=False, **options)
