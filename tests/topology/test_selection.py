"""Selection of positions: the order of scores."""

import pytest
import torch

from dst.topology.selection import stable_order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 5000])
def test_order_of_positive_values_is_that_of_a_stable_sort(dtype, size):
    values = torch.rand(size, generator=torch.Generator().manual_seed(0)).mul(50).ceil().to(dtype)  # many ties
    if size > 1:
        values[7], values[11], values[13] = torch.inf, torch.finfo(dtype).smallest_normal, torch.inf
    assert torch.equal(stable_order(values), values.argsort(stable=True))
