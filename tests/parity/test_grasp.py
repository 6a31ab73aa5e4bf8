"""GraSP (Wang et al. 2020, https://arxiv.org/abs/2002.07376, equation 8 and algorithm 1) against the whole Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dst
from dst.allocation import Global, Uniform
from dst.init import Grasp


def setting(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))


def definition(model: nn.Module, x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """The paper's scores ``S(-w) = -w · (H g)`` of all weights, with H written out."""
    names = ["0.weight", "2.weight"]
    sizes = [model.get_parameter(n).numel() for n in names]
    fixed = {n: p.detach() for n, p in model.named_parameters() if n not in names}

    def loss(flat: Tensor) -> Tensor:
        parts = dict(zip(names, flat.split(sizes), strict=True))
        weights = {n: part.view(model.get_parameter(n).shape) for n, part in parts.items()}
        return functional.cross_entropy(torch.func.functional_call(model, fixed | weights, x) / temperature, y)

    flat = torch.cat([model.get_parameter(n).detach().flatten() for n in names])
    hessian = torch.autograd.functional.hessian(loss, flat)
    (gradient,) = torch.autograd.functional.jacobian(loss, (flat,))
    return -flat * (hessian @ gradient)


def first_mask(model: nn.Module, x: Tensor, y: Tensor, method: dst.Method, scale: float = 1.0) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    loss = functional.cross_entropy(model(x), y) * scale
    sparsifier.before_backward(loss)
    loss.backward()
    sparsifier.before_step()
    optimizer.step()
    return torch.cat([mask.flatten() for mask in sparsifier.masks.values()])


@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_highest_scores_are_removed_over_the_network(seed: int, temperature: float) -> None:
    model, x, y = setting(seed)
    scores = definition(model, x, y, temperature)
    kept = first_mask(model, x, y, dst.methods.grasp(0.3, temperature=temperature))
    assert int((~kept).sum()) == 29  # of 42; 30 would be more than seven tenths
    assert torch.equal(scores.argsort(descending=True)[:29].sort().values, (~kept).nonzero().squeeze(1))


def test_or_within_every_layer() -> None:
    model, x, y = setting(3)
    scores = definition(model, x, y, 200.0)
    kept = first_mask(model, x, y, dst.methods.grasp(0.5, allocation=Uniform()))
    for part in (slice(0, 24), slice(24, 42)):
        assert int(kept[part].sum()) == len(scores[part]) // 2
        assert scores[part][kept[part]].max() < scores[part][~kept[part]].min()


def test_removing_a_weight_of_low_score_lowers_the_norm_of_the_gradient() -> None:
    """The meaning of the sign: to first order the squared norm of the gradient changes by twice the paper's score."""
    model, x, y = setting(4)
    scores = definition(model, x, y, 1.0)

    def norm() -> float:
        weights = [model[0].weight, model[2].weight]
        gradients = torch.autograd.grad(functional.cross_entropy(model(x), y), weights)
        return sum(float(g.square().sum()) for g in gradients)

    flat = torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()])
    before, step = norm(), 1e-6
    for position in (int(scores.argmin()), int(scores.argmax())):
        changed = flat.clone()
        changed[position] -= step * flat[position]
        with torch.no_grad():
            model[0].weight.copy_(changed[:24].view(6, 4))
            model[2].weight.copy_(changed[24:].view(3, 6))
        assert (norm() - before) / step == pytest.approx(2 * float(scores[position]), rel=1e-3)


def test_the_scale_of_the_loss_makes_no_difference() -> None:
    """So a loss scaled for mixed precision, or divided by a number of micro-batches, gives the same mask."""
    model, x, y = setting(5)
    initial = {n: p.detach().clone() for n, p in model.named_parameters()}
    one = first_mask(model, x, y, dst.methods.grasp(0.3))
    model.load_state_dict(initial)
    assert torch.equal(first_mask(model, x, y, dst.methods.grasp(0.3), scale=2.0**12), one)


def test_a_dynamic_method_can_start_from_it() -> None:
    model, x, y = setting(6)
    scores = definition(model, x, y, 200.0)
    kept = first_mask(model, x, y, dst.methods.rigl(0.3, init=Grasp(), allocation=Global()))
    assert scores[kept].max() < scores[~kept].min()
