"""Two processes train sparse layers as one does, and as the masked backend does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dst
from dst.allocation import Uniform
from dst.backends import auto, timing
from dst.errors import StateError
from dst.nn import SparseConv2d, SparseLinear
from tests.distributed.processes import run

STEPS, BATCH = 24, 16

METHODS = {
    "rigl": lambda b: dst.methods.rigl(0.2, update_every=3, backend=b),
    "rigl_with_step": lambda b: dst.methods.rigl(0.2, update_every=3, replace_step=False, backend=b),
    "set": lambda b: dst.methods.set_(0.2, update_every=3, backend=b),
}
UNIFORM = {"rigl_uniform": lambda b: dst.methods.rigl(0.2, update_every=3, allocation=Uniform(), backend=b)}


def linear() -> nn.Module:
    """Three linear layers on twelve inputs."""
    return nn.Sequential(nn.Linear(12, 23), nn.ReLU(), nn.Linear(23, 19), nn.ReLU(), nn.Linear(19, 5))


def convolutional() -> nn.Module:
    """Convolutions of two kernels on the same inputs, as images."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 7, (2, 3), stride=(1, 2), padding=1),
        nn.ReLU(), nn.Conv2d(7, 6, 1), nn.Flatten(), nn.Linear(6 * 4 * 2, 5),
    )  # fmt: skip


def train(
    rank: int,
    world: int,
    name: str,
    backend: str,
    micro_batches: int = 1,
    own_seed: bool = False,
    build: Callable[[], nn.Module] = linear,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Train on this rank's share of every batch; returns masks and dense weights."""
    torch.manual_seed(0)
    method = (METHODS | UNIFORM)[name](backend)
    seed = rank if own_seed else 0
    net = dst.prepare(build().double(), method, seed=seed)
    if backend == "csr" and build is convolutional:
        assert sum(isinstance(m, SparseConv2d) for m in net) == 3
    wrapped = DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dst.Sparsifier(wrapped, optimizer, method, total_steps=STEPS, seed=seed)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 12, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (BATCH,), generator=generator)
        optimizer.zero_grad()
        mine = zip(x[rank::world].chunk(micro_batches), y[rank::world].chunk(micro_batches), strict=True)
        for part_x, part_y in mine:
            (nn.functional.cross_entropy(wrapped(part_x), part_y) / micro_batches).backward()
        sparsifier.before_step()
        optimizer.step()
    assert sparsifier.updates == (6 if "rigl" in name else 8)
    layers = [m for m in net if isinstance(m, SparseLinear | nn.Linear | nn.Conv2d)]
    weights = [m.dense_weight() if isinstance(m, SparseLinear) else m.weight.detach() for m in layers]
    return list(sparsifier.masks.values()), weights


@pytest.mark.parametrize("build", [linear, convolutional])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one(name: str, micro_batches: int, build: Callable[[], nn.Module]) -> None:
    expected_masks, expected = train(0, 1, name, "masked", micro_batches, build=build)
    for result in run(train, 2, name, "csr", micro_batches, False, build):
        assert not isinstance(result, Exception), result
        masks, weights = result
        assert all(torch.equal(a, b) for a, b in zip(masks, expected_masks, strict=True))
        for mine, theirs in zip(weights, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_topologies_that_differ_stop_the_training() -> None:
    results: list[Any] = run(train, 2, "rigl", "csr", 1, True)
    assert all(isinstance(r, StateError) for r in results)
    assert "0.weight" in str(results[0])


def train_auto(rank: int, world: int) -> tuple[list[str], list[torch.Tensor], list[torch.Tensor]]:
    """Train with times that differ on the processes: each would choose other layers."""
    asked: list[timing.Case] = []

    def measure(case: timing.Case) -> timing.Timing:
        asked.append(case)
        return timing.Timing(1.0, 0.5 if (case.outputs == 19) == (rank == 0) else 2.0)

    timing.measure = measure  # this process ends with the test
    said: list[str] = []
    auto.print = lambda message, file: said.append(message)  # type: ignore[attr-defined]
    masks, weights = train(rank, world, "rigl_uniform", "auto")
    assert len(said) == (3 if rank == 0 else 0)
    assert bool(asked) == (rank == 0)
    return said, masks, weights


def test_the_first_process_chooses_for_all() -> None:
    expected_masks, expected = train(0, 1, "rigl_uniform", "masked")
    results = run(train_auto, 2)
    for result in results:
        assert not isinstance(result, Exception), result
        _, masks, weights = result
        assert all(torch.equal(a, b) for a, b in zip(masks, expected_masks, strict=True))
        for mine, theirs in zip(weights, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    assert [line.split(" (")[0] for line in results[0][0]] == [
        f"backend=auto: {name}" for name in ("0.weight masked", "2.weight csr", "4.weight masked")
    ]
