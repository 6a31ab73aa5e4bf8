from __future__ import annotations

import pytest

from dst import kernels
from dst.kernels import Engine, TorchKernels
from dst.nn import operators, sparse_linear


def use_engine(monkeypatch: pytest.MonkeyPatch, chosen: Engine) -> None:
    """Let new sparse layers and the operators compute with an engine."""
    for module in (sparse_linear, operators):
        monkeypatch.setattr(module, "engine", lambda: chosen)


@pytest.fixture(params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Each of the two engines, for layers that are built in the test."""
    chosen = kernels.load() if request.param == "compiled" else TorchKernels()
    if chosen is None:
        pytest.skip("no compiler on this machine")
    use_engine(monkeypatch, chosen)
    return chosen
