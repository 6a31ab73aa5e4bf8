"""Several processes train one network: same masks everywhere, equal to a single process's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dst
from dst.engine.gradient_compression import SparseAllReduce
from dst.scores import Momentum
from tests.distributed.processes import run
from tests.sampling import rotated

STEPS, UPDATE_EVERY, BATCH = 12, 2, 16

METHODS = {
    "rigl": dst.methods.rigl(0.1, update_every=UPDATE_EVERY),
    "rigl_momentum": dst.methods.rigl(0.1, update_every=UPDATE_EVERY, grow=Momentum()),
    "set": dst.methods.set_(0.1, update_every=UPDATE_EVERY),
    "static": dst.methods.static(0.1),
    "snip": dst.methods.static(0.1, init=dst.init.Snip()),
    "grasp": dst.methods.grasp(0.1),
    "synflow": dst.methods.synflow(0.1, iterations=5),
    "sparse_from_scratch": dst.methods.sparse_from_scratch(0.1),
}

LATENT = {
    "top_kast": dst.methods.top_kast(0.1, update_every=2),
    "movement": dst.methods.movement(0.1, start=4),
    "str": dst.methods.str_(0.1, initial=-4.0),
    "l0": dst.methods.l0(0.1),
}


class Net(nn.Module):
    """A linear layer whose rows do not divide by the processes, attention (a weight in three parts) and a head.

    Attention reads several tokens and a key of zeros. Over one token, or for inputs that all tokens share, gradients of
    queries and keys would be nothing but rounding, and connections would be ranked by what differs between processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 23)
        self.second = nn.Linear(23, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, add_zero_attn=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.second(torch.relu(self.first(x)))
        return self.head((h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


def model() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(BATCH, 3, 12, generator=generator, dtype=torch.float64),
        torch.randint(0, 5, (BATCH,), generator=generator),
    )


def train(rank: int, world: int, name: str, how: str, optimizer: str = "adamw") -> dict[str, Any]:
    """Train on this rank's share of every batch; returns whole masks and weights, and the bytes sent."""
    net = model()
    wrapped: nn.Module = net
    if how in ("ddp", "hook"):
        wrapped = DistributedDataParallel(net)
    elif how == "fsdp2":
        for part in (net.first, net.second, net.head):
            fully_shard(part)
        fully_shard(net)
    if optimizer == "adamw":
        made: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    else:
        made = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dst.Sparsifier(wrapped, made, {**METHODS, **LATENT}[name], total_steps=STEPS)
    communication = SparseAllReduce(sparsifier)
    if how == "hook":
        assert isinstance(wrapped, DistributedDataParallel)
        wrapped.register_comm_hook(communication, SparseAllReduce.reduce)
    for step in range(STEPS):
        images, labels = batch(step)
        made.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(images[rank::world]), labels[rank::world])
        sparsifier.before_backward(loss)
        loss.backward()
        sparsifier.before_step()
        made.step()
        for parameter_name, mask in sparsifier.masks.items():
            parameter = net.get_parameter(parameter_name)
            assert type(mask) is (DTensor if isinstance(parameter, DTensor) else torch.Tensor)
            assert mask.shape == parameter.shape
            weight, active = (t.to_local() if isinstance(t, DTensor) else t for t in (parameter.detach(), mask))
            assert weight[~active].eq(0).all()
    state = sparsifier.state_dict()
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in net.named_parameters()}
    return {
        "masks": state["masks"],
        "layers": state["layers"],
        "exploration": sparsifier.exploration_rate,
        "updates": sparsifier.updates,
        "weights": {n: w.detach().clone() for n, w in whole.items()},
        "sent": communication.bytes_sent,
        "dense": communication.bytes_dense,
    }


def check_equal(one: dict[str, Any], several: list[Any]) -> None:
    for other in several:
        if isinstance(other, Exception):
            raise other
        assert other["layers"] == one["layers"]
        assert other["exploration"] == one["exploration"]
        for name, mask in one["masks"].items():
            assert torch.equal(mask, other["masks"][name]), name
        for name, weight in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *rotated(METHODS, ["ddp", "hook"]),
        *rotated(["rigl_momentum", "set", "snip"], ["fsdp2"]),
        # RigL's is among those of four processes.
        *(pytest.param(n, "fsdp2", marks=pytest.mark.exhaustive) for n in ("rigl", "static", "sparse_from_scratch")),
    ],
)
def test_two_processes_equal_one(name: str, how: str) -> None:
    one = train(0, 1, name, "single")
    several = run(train, 2, name, how)
    check_equal(one, several)
    if METHODS[name].is_dynamic:
        assert one["updates"] > 3


REFUSED_WHERE_SPREAD = {
    "grasp": "first.weight is spread over processes: use DistributedDataParallel",
    "synflow": "first.weight is spread over processes: use DistributedDataParallel",
    "top_kast": "first.weight is sharded, and the latent backend needs whole tensors",
}


@pytest.mark.parametrize("name", REFUSED_WHERE_SPREAD)
def test_what_needs_whole_weights_is_refused_where_they_are_spread(name: str) -> None:
    for outcome in run(train, 2, name, "fsdp2"):
        assert isinstance(outcome, dst.ConfigurationError)
        assert REFUSED_WHERE_SPREAD[name] in str(outcome)


@pytest.mark.parametrize(("name", "how"), rotated(LATENT, ["ddp", "hook"]))
def test_two_processes_with_latent_weights_equal_one(name: str, how: str) -> None:
    check_equal(train(0, 1, name, "single"), run(train, 2, name, how))


def test_four_processes_equal_one() -> None:
    one = train(0, 1, "rigl", "single", "sgd")
    for how in ("ddp", "fsdp2"):
        check_equal(one, run(train, 4, "rigl", how, "sgd"))


def train_wide(rank: int, world: int, how: str) -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    method = dst.methods.rigl(0.1, update_every=100)
    sparsifier = dst.Sparsifier(net, optimizer, method, total_steps=140)
    hook = SparseAllReduce(sparsifier)
    if how == "hook":
        wrapped.register_comm_hook(hook, SparseAllReduce.reduce)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(110):
        loss = wrapped(torch.randn(4, 256, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
    return {"sent": hook.bytes_sent, "dense": hook.bytes_dense, "weights": [p.detach() for p in net.parameters()]}


def test_hook_sends_only_active_gradients_and_changes_nothing() -> None:
    plain, sparse = run(train_wide, 2, "ddp"), run(train_wide, 2, "hook")
    assert plain[0]["dense"] == 0
    for rank in range(2):
        # A sum of two floats does not depend on how they travelled: the results are the same to the bit.
        assert all(torch.equal(a, b) for a, b in zip(plain[rank]["weights"], sparse[rank]["weights"], strict=True))
        assert sparse[rank]["dense"] == 110 * 4 * (256 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10)
        assert 0.1 < sparse[rank]["sent"] / sparse[rank]["dense"] <= 0.12


def train_with_rank_dependent_seed(rank: int, world: int) -> None:
    net = nn.Linear(20, 20)
    dst.Sparsifier(net, torch.optim.SGD(net.parameters(), lr=0.1), dst.methods.rigl(0.1), total_steps=10, seed=rank)


def train_without_reduction(rank: int, world: int) -> int:
    torch.manual_seed(0)
    net = nn.Linear(20, 20)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = dst.Sparsifier(net, optimizer, dst.methods.rigl(0.2, update_every=3, start=3), total_steps=10)
    generator = torch.Generator().manual_seed(rank)
    for step in range(10):
        optimizer.zero_grad()
        net(torch.randn(5, 20, generator=generator)).square().sum().backward()
        try:
            sparsifier.before_step()
        except dst.StateError as error:
            raise dst.StateError(f"{step}: {error}") from None
        optimizer.step()
    return step


def test_masks_that_differ_stop_the_run_on_every_rank() -> None:
    for error in run(train_with_rank_dependent_seed, 2):
        assert isinstance(error, dst.StateError)
        assert "weight differ between rank 0 and ranks [1]" in str(error)
    for error in run(train_without_reduction, 2):
        assert isinstance(error, dst.StateError)
        assert str(error).startswith("3: masks of weight differ")
        assert "DistributedDataParallel" in str(error)


def overflow_on_one_rank(rank: int, world: int) -> tuple[int, int]:
    torch.manual_seed(0)
    net = nn.Linear(20, 20)
    fully_shard(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = dst.Sparsifier(net, optimizer, dst.methods.rigl(0.2, update_every=1), total_steps=10)
    net(torch.randn(5, 20)).sum().backward()
    if rank == 1:
        net.weight.grad.to_local().fill_(float("inf"))  # type: ignore[union-attr]
    sparsifier.before_step()
    return sparsifier.updates, sparsifier.skipped


def test_an_overflow_in_one_shard_leaves_the_update_out_on_all() -> None:
    assert run(overflow_on_one_rank, 2) == [(0, 1), (0, 1)]


def unused_parameters(rank: int, world: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.ModuleDict({"used": nn.Linear(20, 20), "unused": nn.Linear(20, 20)})

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net["used"](x)

    wrapped = DistributedDataParallel(Partly(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    sparsifier = dst.Sparsifier(wrapped, optimizer, dst.methods.rigl(0.2, update_every=2), total_steps=10)
    before = sparsifier.masks
    for step in range(6):
        optimizer.zero_grad()
        wrapped(
            torch.randn(5, 20, generator=torch.Generator().manual_seed(step + 100 * rank))
        ).square().sum().backward()
        sparsifier.before_step()
        optimizer.step()
    after = sparsifier.masks
    return {name: torch.equal(before[name], after[name]) for name in before}


def test_parameters_unused_under_ddp_keep_their_connections() -> None:
    for result in run(unused_parameters, 2):
        assert result == {"net.used.weight": False, "net.unused.weight": True}


def resharded(rank: int, world: int, state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """Load a single process's state into sharded parameters."""
    net = model()
    fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters())
    sparsifier = dst.Sparsifier(net, optimizer, METHODS["rigl"], total_steps=STEPS)
    sparsifier.load_state_dict(state)
    return sparsifier.state_dict()["masks"], sparsifier.step


def test_a_state_moves_between_numbers_of_processes() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    sparsifier = dst.Sparsifier(net, optimizer, METHODS["rigl"], total_steps=STEPS)
    for step in range(6):
        images, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        sparsifier.before_step()
        optimizer.step()
    state = sparsifier.state_dict()
    for masks, step in run(resharded, 2, state):
        assert step == 6
        assert all(torch.equal(masks[name], state["masks"][name]) for name in masks)


def test_wrappers_that_own_the_weights_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands in by name: the real one wants a process group to be built."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapped = FullyShardedDataParallel(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with pytest.raises(dst.ConfigurationError, match="fully_shard"):
        dst.Sparsifier(wrapped, optimizer, dst.methods.rigl(0.5), total_steps=1)
    engine = type("DeepSpeedZeroOptimizer", (torch.optim.SGD,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    net = nn.Linear(4, 4)
    with pytest.raises(dst.ConfigurationError, match="DeepSpeed"):
        dst.Sparsifier(net, engine(net.parameters(), lr=0.1), dst.methods.rigl(0.5), total_steps=1)


def test_distributed_is_not_left_initialised() -> None:
    assert not dist.is_initialized()


def first_mask_of_token_ids(rank: int, world: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    wrapped = DistributedDataParallel(net) if world > 1 else net
    sparsifier = dst.Sparsifier(wrapped, optimizer, dst.methods.synflow(0.3, iterations=3), total_steps=5)
    ids = torch.arange(5) + 20 * rank
    wrapped(ids).square().mean().backward()
    sparsifier.before_step()
    return sparsifier.masks


def test_where_processes_see_other_token_ids_the_first_ones_scores_count() -> None:
    one = first_mask_of_token_ids(0, 1)
    for masks in run(first_mask_of_token_ids, 2):
        if isinstance(masks, Exception):
            raise masks
        assert all(torch.equal(mask, one[name]) for name, mask in masks.items())
