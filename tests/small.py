"""What many suites train: a small network with layers of every kind, optimizers, and steps that repeat exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import dst
from tests.methods_list import METHODS, TOTAL_STEPS


class Small(nn.Module):
    """Convolution, normalisation, attention (packed projections) and linear layers on (N, 2, 6, 6) images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(8, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 3)."""
        sequence = self.norm(self.conv(images)).relu().flatten(2).transpose(1, 2)
        sequence = sequence + self.attention(sequence, sequence, sequence, need_weights=False)[0]
        return self.head(self.hidden(sequence.mean(1)).relu())


class Odd(Optimizer):
    """An unusual optimizer.

    It moves every weight at every step, also those with a gradient of zero. Its state holds kinds of values that other
    optimizers do not have: integers and flags per weight, scalars, rows, a flat tensor of another size, a list, a number, None.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.05, drift: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "drift": drift})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Take a step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["trace"] = torch.ones_like(p)
                    state["seen"] = torch.zeros_like(p, dtype=torch.int64)
                    state["touched"] = torch.zeros_like(p, dtype=torch.bool)
                    state["scalar"] = torch.tensor(1.0)
                    state["rows"] = torch.ones(p.shape[0])
                    state["flat"] = torch.ones(p.numel() + 1)
                    state["log"] = [1, 2]
                    state["number"] = 3
                    state["nothing"] = None
                state["trace"].mul_(0.9).add_(p.grad)
                state["seen"].add_(1)
                state["touched"].logical_not_()
                state["scalar"].add_(1)
                state["rows"].add_(p.grad.flatten(1).abs().mean(1) if p.ndim > 1 else p.grad.abs())
                state["flat"].add_(p.grad.sum())
                p.sub_(group["lr"] * state["trace"] / (1 + state["scalar"].sqrt())).sub_(group["drift"])


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "odd": Odd,
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.005, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, initial_accumulator_value=0.1),
}


Trio = tuple[nn.Module, Optimizer, dst.Sparsifier]
"""A model, its optimizer and its sparsifier."""


def sparsified(
    method: dst.Method | str,
    optimizer: Optimizer | str = "sgd",
    *,
    model: nn.Module | None = None,
    total_steps: int = TOTAL_STEPS,
    **options: Any,
) -> Any:
    """Seed torch with 0, and return a trio under a method.

    Args:
        method: A method, or the name of one of ``METHODS``.
        optimizer: An optimizer of the model's parameters, or the name of one of ``OPTIMIZERS``.
        model: The model; a new ``Small`` where it is left out.
        total_steps: Optimizer steps of the training.
        options: What else ``dst.Sparsifier`` takes.

    Returns:
        A ``Trio``. Its type is left open, so that tests may use what their own models have.
    """
    torch.manual_seed(0)
    model = Small() if model is None else model
    optimizer = OPTIMIZERS[optimizer](model.parameters()) if isinstance(optimizer, str) else optimizer
    method = METHODS[method]() if isinstance(method, str) else method
    return model, optimizer, dst.Sparsifier(model, optimizer, method, total_steps=total_steps, **options)


def state_dicts(model: nn.Module, optimizer: Optimizer, sparsifier: dst.Sparsifier) -> dict[str, Any]:
    """The states that a checkpoint holds; they share memory with the trio."""
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sparsifier": sparsifier.state_dict()}


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the batch of a step, which depends on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(12, 2, 6, 6, generator=generator)
    return images, torch.randint(3, (12,), generator=generator)


def backward(model: nn.Module, optimizer: Optimizer, step: int, sparsifier: dst.Sparsifier | None = None) -> None:
    """Compute the gradients of a step; the sparsifier sees the loss."""
    optimizer.zero_grad()
    images, labels = batch(step)
    parameter = next(model.parameters())
    loss = functional.cross_entropy(model(images.to(parameter.dtype)), labels)
    if sparsifier is not None:
        sparsifier.before_backward(loss)
    loss.backward()


def random_gradients(model: nn.Module, step: int) -> None:
    """Set gradients that depend on the step alone and have no ties."""
    generator = torch.Generator().manual_seed(2000 + step)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))


def train(
    model: nn.Module, optimizer: Optimizer, sparsifier: dst.Sparsifier, steps: int, *, first: int | None = None
) -> None:
    """Train for some steps from the sparsifier's step on."""
    start = sparsifier.step if first is None else first
    for step in range(start, start + steps):
        backward(model, optimizer, step, sparsifier)
        sparsifier.before_step()
        optimizer.step()
