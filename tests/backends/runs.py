"""Models in training under the masked and the csr backend, and what two of them must have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import dst
from dst import methods, scores
from dst.allocation import ER, Global, Uniform
from dst.backends import auto, timing
from dst.init import Magnitude
from dst.nn import SparseLinear
from dst.topology.layers import dense_name
from dst.topology.optimizer_state import per_weight_state

DENSITY = 0.2
STEPS = 44
EVERY = 2  # 20 updates and more

CLAIMED: dict[str, Callable[[str], dst.Method]] = {
    "rigl": lambda b: methods.rigl(DENSITY, update_every=EVERY, stop=1.0, backend=b),
    "rigl_with_step": lambda b: methods.rigl(DENSITY, update_every=EVERY, stop=1.0, replace_step=False, backend=b),
    "rigl_no_regrowth": lambda b: methods.rigl(DENSITY, update_every=EVERY, stop=1.0, regrow_dropped=False, backend=b),
    "rigl_rescaled": lambda b: methods.rigl(
        DENSITY, update_every=EVERY, stop=1.0, allocation=ER(), rescale_init=True, backend=b
    ),
    "rigl_by_magnitude": lambda b: methods.rigl(
        DENSITY, update_every=EVERY, stop=1.0, init=Magnitude(), allocation=Global(), backend=b
    ),
    "set": lambda b: methods.set_(DENSITY, update_every=EVERY, backend=b),
    "set_no_regrowth": lambda b: methods.set_(DENSITY, update_every=EVERY, regrow_dropped=False, backend=b),
    "set_replacing_steps": lambda b: methods.set_(
        DENSITY, update_every=EVERY, replace_step=True, allocation=Uniform(), backend=b
    ),
    "gradient_drop": lambda b: methods.set_(DENSITY, update_every=EVERY, drop=scores.Gradient(), backend=b),
    "sparse_from_scratch": lambda b: methods.sparse_from_scratch(DENSITY, backend=b),
    "static_from_start": lambda b: methods.static(DENSITY, sparsify_at=0, backend=b),
    "dense": lambda b: methods.dense(backend=b),
}

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


class Net(nn.Module):
    """Three linear layers on 30 inputs, of which four are always zero; the last layer is small."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(30, 40)
        self.second = nn.Linear(40, 25)
        self.head = nn.Linear(25, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


class Mixed(nn.Module):
    """A convolution, attention, tied and untied linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.hidden = nn.Linear(4, 24)
        self.tied_a, self.tied_b = nn.Linear(24, 24), nn.Linear(24, 24)
        self.tied_b.weight = self.tied_a.weight
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        sequence = self.conv(x.view(-1, 1, 5, 6)).flatten(2).transpose(1, 2)
        sequence = sequence + self.attention(sequence, sequence, sequence, need_weights=False)[0]
        hidden = self.hidden(sequence.mean(1)).relu()
        return self.head(self.tied_b(self.tied_a(hidden).relu()).relu())


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight is [inputs, outputs]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Transposed(nn.Module):
    """Layers of transformers between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv1D(40, 30)
        self.second = Conv1D(25, 40)
        self.head = nn.Linear(25, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with a strided shortcut, and kinds of 1×1 that csr does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(3, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.expand = nn.Conv2d(8, 12, 1, padding="same")
        self.shortcut = nn.Conv2d(3, 12, (1, 1), stride=2)
        self.grouped = nn.Conv2d(12, 12, 1, groups=2)
        self.padded = nn.Conv2d(12, 12, 1, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x, x[:, :12]], 1)[:, :27].view(-1, 3, 3, 3)
        y = self.conv(self.norm(self.reduce(x)).relu()).relu()
        y = (self.expand(y) + self.shortcut(x)).relu()
        return self.head(self.padded(self.grouped(y)).relu().mean((2, 3)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 30, generator=generator, dtype=torch.float64)
    x[:, [0, 7, 8, 29]] = 0  # dead inputs: their gradients tie at zero
    return x, torch.randint(4, (16,), generator=generator)


class Run:
    """A model in training under one backend."""

    def __init__(
        self,
        method: dst.Method,
        optimizer: str = "sgd",
        *,
        net: Callable[[], nn.Module] = Net,
        dtype: torch.dtype = torch.float64,
        total: int = STEPS,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(1)
        self.model = dst.prepare(net().to(dtype), method, seed=seed)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.sparsifier = dst.Sparsifier(self.model, self.optimizer, method, total_steps=total, seed=seed)

    def train(self, steps: int, micro_batches: int = 1) -> Run:
        for step in range(self.sparsifier.step, self.sparsifier.step + steps):
            self.optimizer.zero_grad()
            x, y = batch(step)
            for part_x, part_y in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
                parameter = next(self.model.parameters())
                loss = functional.cross_entropy(self.model(part_x.to(parameter.dtype)), part_y) / micro_batches
                loss.backward()
            self.sparsifier.before_step()
            self.optimizer.step()
        return self

    def weights(self) -> dict[str, Tensor]:
        found = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        for name, module in self.model.named_modules():
            if isinstance(module, SparseLinear):
                del found[f"{name}.values"]
                found[dense_name(name, module, "weight")] = module.dense_weight()
                if module.bias is not None:
                    found[dense_name(name, module, "bias")] = found.pop(f"{name}.bias")
        return found

    def state(self) -> dict[str, Tensor]:
        """Optimizer state per weight, dense."""
        names = {p: n for n, p in self.model.named_parameters()}
        modules = dict(self.model.named_modules())
        found = {}
        for parameter in self.optimizer.state:
            for key, value in per_weight_state(self.optimizer, parameter):
                owner, _, attribute = names[parameter].rpartition(".")
                module = modules[owner]
                if attribute == "values":
                    found[f"{dense_name(owner, module, 'weight')}/{key}"] = module.to_dense(value)
                elif isinstance(module, SparseLinear):
                    found[f"{dense_name(owner, module, attribute)}/{key}"] = value.clone()
                else:
                    found[f"{names[parameter]}/{key}"] = value.clone()
        return found


def assert_same(a: Run, b: Run, tolerance: float = 1e-9) -> None:
    masks_a, masks_b = a.sparsifier.masks, b.sparsifier.masks
    assert masks_a.keys() == masks_b.keys()
    for name in masks_a:
        assert torch.equal(masks_a[name], masks_b[name]), name
    for mine, theirs in ((a.weights(), b.weights()), (a.state(), b.state())):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def sparse_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


def saved(run: Run) -> dict[str, Any]:
    return copy.deepcopy(
        {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "dst": run.sparsifier.state_dict()}
    )


def restored(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a state dict of another backend into a model, with the layers that the state was saved from."""
    auto.restore_modules(0, model, state, "")
    model.load_state_dict(state)
    return model


def measured_cases(monkeypatch: pytest.MonkeyPatch) -> list[timing.Case]:
    """Let csr measure twice as fast as dense, and return the list that receives each measured case."""
    cases: list[timing.Case] = []

    def measure(case: timing.Case) -> timing.Timing:
        cases.append(case)
        return timing.Timing(2, 1)

    monkeypatch.setattr(timing, "measure", measure)
    return cases


def check_trains_as_masked(name: str, optimizer: str, net: Callable[[], nn.Module]) -> Run:
    """Train with both backends over several updates, and compare topology, weights and state. Returns the csr run."""
    masked, csr = (Run(CLAIMED[name](backend), optimizer, net=net) for backend in ("masked", "csr"))
    assert_same(masked, csr)
    masked.train(STEPS)
    csr.train(STEPS)
    assert csr.sparsifier.updates == STEPS // EVERY
    assert_same(masked, csr)
    assert masked.sparsifier.layer_table() == csr.sparsifier.layer_table()
    assert masked.sparsifier.exploration_rate == csr.sparsifier.exploration_rate
    return csr


def check_accumulates_as_masked(net: Callable[[], nn.Module]) -> None:
    """Accumulate gradients over micro-batches with both backends, and compare."""
    masked, csr = (Run(CLAIMED["rigl"](b), net=net).train(STEPS // 2, 4) for b in ("masked", "csr"))
    assert_same(masked, csr)


def check_resumes(optimizer: str, net: Callable[[], nn.Module]) -> None:
    """Resume a csr run, and compare it to the bit with one that was not interrupted."""
    whole = Run(CLAIMED["rigl"]("csr"), optimizer, net=net).train(20)
    half = saved(Run(CLAIMED["rigl"]("csr"), optimizer, net=net).train(9))
    rest = Run(CLAIMED["rigl"]("csr"), optimizer, net=net)
    rest.model.load_state_dict(half["model"])
    rest.optimizer.load_state_dict(half["optimizer"])
    rest.sparsifier.load_state_dict(half["dst"])
    assert_same(whole, rest.train(11), tolerance=0)
    assert whole.sparsifier.exploration_rate == rest.sparsifier.exploration_rate


def check_continues_with(before: str, after: str, optimizer: str, net: Callable[[], nn.Module]) -> None:
    """Convert a run of one backend for the other, train both on, and compare."""
    first = Run(CLAIMED["rigl"](before), optimizer, net=net).train(9)
    second = Run(CLAIMED["rigl"](after), optimizer, net=net)
    if after == "csr":
        second.model.load_state_dict(first.model.state_dict())
        second.sparsifier.load_state_dict(saved(first)["dst"])
        state = dst.sparse_optimizer_state(second.model, second.optimizer, first.optimizer.state_dict())
    else:
        weights = dst.dense_state_dict(first.model)
        assert [(n, w.shape) for n, w in weights.items()] == [
            (n, w.shape) for n, w in second.model.state_dict().items()
        ]
        second.model.load_state_dict(weights)
        second.sparsifier.load_state_dict(saved(first)["dst"])
        state = dst.dense_optimizer_state(first.model, first.optimizer)
    second.optimizer.load_state_dict(state)
    assert_same(first, second, tolerance=0)
    assert_same(first.train(10), second.train(10))


def check_copy_becomes_dense(net: Callable[[], nn.Module], again: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Copy a trained csr model, and convert the copy to dense modules. Returns them."""
    csr = Run(CLAIMED["rigl"]("csr"), net=net).train(9)
    x = torch.randn(5, 30, dtype=torch.float64)
    expected, weights = csr.model(x), dst.dense_state_dict(csr.model)
    model = again(csr.model)
    assert torch.equal(model(x), expected)
    model = dst.to_dense(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(weights[n], w) for n, w in model.state_dict().items())
    torch.testing.assert_close(model(x), expected)
    return model
