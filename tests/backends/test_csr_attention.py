"""Attention whose projections store only non-zeros, and a character model of such blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dst.nn import SparseLinear
from tests.backends.runs import CLAIMED, OPTIMIZERS, Run, assert_same, sparse_layers
from tests.sampling import rotated


class Block(nn.Module):
    """Causal self-attention with ``nn.Linear`` projections and a feed-forward part, on (N, T, width)."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        y = self.norm(x)
        q, k, v = (p(y).view(n, t, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, width))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class Characters(nn.Module):
    """Two blocks over embedded symbols; the symbols are the signs of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 12)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        symbols = (x.view(x.shape[0], 10, 3) > 0).long() @ torch.tensor([1, 2, 4])
        return self.head(self.blocks(self.embedding(symbols))).mean(1)


class Packed(nn.Module):
    """torch's own attention module with a weight of its own for each of q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, kdim=5, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 5, 6)
        return self.head(self.attention(x, x[..., :5], x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize(("name", "optimizer"), rotated(["rigl", "rigl_with_step", "set"], OPTIMIZERS))
def test_projections_train_as_masked_ones(name, optimizer):
    masked, csr = (Run(CLAIMED[name](backend), optimizer, net=Characters) for backend in ("masked", "csr"))
    names = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("q", "k", "v", "out", "up", "down")]
    assert set(names) <= set(sparse_layers(csr.model))
    masked.train(24)
    csr.train(24)
    assert csr.sparsifier.updates == 12
    assert_same(masked, csr)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_projections_of_several_sizes_stay_masked_and_train(optimizer):
    masked, csr = (Run(CLAIMED["rigl"](backend), optimizer, net=Packed) for backend in ("masked", "csr"))
    assert "attention.out_proj" not in sparse_layers(csr.model)
    assert csr.sparsifier.mask_of(csr.model.attention.q_proj_weight) is not None
    masked.train(24)
    csr.train(24)
    assert_same(masked, csr)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 1, 3, 7), (7,), (0, 3, 7), (1, 1, 7)])
@pytest.mark.parametrize("strided", [False, True])
def test_inputs_of_any_number_of_dimensions(shape, strided):
    torch.manual_seed(0)
    dense = nn.Linear(7, 5, dtype=torch.float64)
    mask = torch.rand(5, 7) < 0.5
    dense.weight.data.mul_(mask)
    sparse = SparseLinear.from_linear(dense, mask)
    x = torch.randn(*shape[:-1], 14, dtype=torch.float64)[..., ::2] if strided else torch.randn(shape).double()
    a, b = x.clone().requires_grad_(), x.detach().requires_grad_()
    y, z = dense(a), sparse(b)
    torch.testing.assert_close(z, y)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    z.backward(gradient)
    torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(sparse.to_dense(sparse.values.grad), dense.weight.grad * mask)
