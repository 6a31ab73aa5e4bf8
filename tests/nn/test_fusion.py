"""Models with folded batch normalisation and ReLU against the same models module by module."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import dst
from dst import kernels
from dst.errors import ConfigurationError
from dst.models import GPT, WRN22_2, ResNet20, ViTTiny
from dst.nn import FeedForward, InferenceModel, SparseConv2d, SparseLinear, optimize_for_inference

COMPILED = kernels.load()
IMAGES = (3, 16, 16)


def randomized(model):
    """The model in evaluation mode, with statistics and affine parameters that are not the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, SparseLinear) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def sparse_conv(inputs, outputs, kernel=3, stride=1, density=0.3, **options):
    size = outputs * inputs * kernel**2
    flat = torch.randperm(size)[: max(1, round(density * size))].sort().values
    padding = kernel // 2
    return SparseConv2d(
        inputs,
        outputs,
        flat,
        kernel_size=(kernel, kernel),
        stride=(stride, stride),
        padding=(padding, padding),
        **options,
    )


def check(model, *inputs, **tolerance):
    """The optimized model, after comparing it with the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = optimize_for_inference(model)
    before = copy.deepcopy(model.state_dict())
    assert isinstance(fast, InferenceModel)
    for x in inputs:
        with torch.no_grad():
            torch.testing.assert_close(fast(x.clone()), model(x.clone()), **tolerance)
        with torch.inference_mode():
            torch.testing.assert_close(fast(x.clone()), model(x.clone()), **tolerance)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    return fast


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("build", "folded", "kept", "relus"),
    [
        # The stem stays dense: its normalisation is folded, its ReLU is not.
        (lambda: ResNet20(IMAGES, 10), 19, 0, 9),
        # Pre-activation: the second normalisation of each of nine blocks follows a convolution, and so does the first one of
        # the first block, which the stem precedes. The others read sums.
        (lambda: WRN22_2(IMAGES, 10), 10, 9, 9),
        (lambda: ViTTiny(IMAGES, 10, depth=3), 0, 0, 0),
    ],
)
def test_shipped_models(build, folded, kept, relus):
    torch.manual_seed(0)
    model = dst.prepare(build(), dst.methods.rigl(0.1, backend="csr"), example=torch.randn(2, *IMAGES))
    assert any(isinstance(m, SparseLinear) for m in model.modules())
    fast = check(randomized(model), torch.randn(1, *IMAGES), torch.randn(8, *IMAGES), rtol=1e-4, atol=1e-4)
    assert (len(fast.folded), len(norms(fast)), len(fast.relus)) == (folded, kept, relus)
    assert fast.unfused is None


def test_a_model_that_cannot_be_traced_says_so():
    torch.manual_seed(0)
    model = dst.prepare(
        GPT(65, 32), dst.methods.rigl(0.1, backend="csr"), example=torch.zeros(1, 32, dtype=torch.int64)
    )
    model.eval()
    with pytest.warns(UserWarning, match="nothing is fused in GPT: .*control flow"):
        fast = optimize_for_inference(model)
    assert "control flow" in repr(fast)
    for batch in (1, 8):
        tokens = torch.randint(0, 65, (batch, 32))
        with torch.inference_mode():
            torch.testing.assert_close(fast(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_every_kind_of_layer(dtype, bias, affine):
    torch.manual_seed(0)
    options = {"bias": bias, "dtype": dtype}
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, groups=2, **options),
        nn.BatchNorm2d(6, affine=affine, eps=0.1, dtype=dtype),
        nn.ReLU(inplace=True),
        sparse_conv(6, 8, stride=2, **options),
        nn.Dropout2d(0.9),
        nn.BatchNorm2d(8, affine=affine, dtype=dtype),
        nn.ReLU(),
        nn.Flatten(),
        SparseLinear.random(32, 12, 80, **options),
        nn.BatchNorm1d(12, affine=affine, dtype=dtype),
        nn.Linear(12, 7, **options),
        nn.BatchNorm1d(7, affine=affine, dtype=dtype),
        nn.ReLU(),
        SparseLinear.random(7, 5, 20, **options),
        nn.ReLU(inplace=True),
    )
    fast = check(randomized(model), *(torch.randn(n, 2, 6, 6, dtype=dtype) for n in (1, 8)))
    assert fast.folded == ["1", "5", "9", "11"]
    assert fast.relus == ["3", "13"]
    kinds = [type(m) for m in fast.module.modules()]
    assert nn.Dropout2d not in kinds
    assert not norms(fast)
    assert not any(p.requires_grad for p in fast.parameters())


class Net(nn.Module):
    def __init__(self, bias=False, **options):
        super().__init__()
        self.conv, self.other = sparse_conv(3, 4, bias=bias), sparse_conv(4, 4, **options)
        self.bn, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)


class NormReadsWhatOthersRead(Net):
    def forward(self, x):
        x = self.conv(x)
        return self.bn(x) + self.other(x).relu()


class NormCalledTwice(Net):
    def forward(self, x):
        return self.bn(self.other(self.bn(self.conv(x)).relu()))


class LayerCalledTwice(Net):
    def forward(self, x):
        x = self.bn(self.other(self.conv(x)))
        return self.second(self.other(x)).relu()


class ReluReadsWhatOthersRead(Net):
    def forward(self, x):
        x = self.conv(x)
        return self.other(functional.relu(x)) + x


class WeightRead(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.conv.values.sum()


class ReluBetween(Net):
    def forward(self, x):
        return self.bn(self.conv(x).relu())


class FusedBefore(Net):
    def __init__(self):
        super().__init__(relu=True)

    def forward(self, x):
        return self.bn(self.other(self.conv(x)))


class SumReadTwice(Net):
    def forward(self, x):
        x = self.bn(self.conv(x)) + 0.1
        y = self.other(x) + 0.1
        return x.relu() + x - y.relu()


@pytest.mark.parametrize(
    ("kind", "folded", "relus"),
    [
        (NormReadsWhatOthersRead, [], ["other"]),
        # Both calls are folded: each layer has the statistics of its own.
        (NormCalledTwice, ["bn", "bn"], ["conv"]),
        (LayerCalledTwice, [], []),
        (ReluReadsWhatOthersRead, [], []),
        (WeightRead, [], []),
        (ReluBetween, [], ["conv"]),
        (FusedBefore, [], []),
        (SumReadTwice, ["bn"], []),
    ],
)
def test_folds_only_what_nothing_else_reads(kind, folded, relus):
    torch.manual_seed(0)
    fast = check(randomized(kind()), torch.randn(1, 3, 5, 5), torch.randn(8, 3, 5, 5))
    assert fast.folded == folded
    assert fast.relus == relus


def test_gelu_in_the_pass_of_a_layer_stays():
    block = FeedForward(6, 12)
    block.expand, block.project = SparseLinear.random(6, 12, 40), SparseLinear.random(12, 5, 40)
    x = torch.randn(1, 6), torch.randn(8, 6)
    assert check(block.eval(), *x).relus == []
    block.project = nn.BatchNorm1d(12)
    assert check(randomized(block), *x).folded == []
    block.project = nn.ReLU()
    assert check(block.eval(), *x).relus == []


def test_hooks_patched_layers_and_missing_statistics_stay():
    torch.manual_seed(0)

    def model():
        return randomized(nn.Sequential(sparse_conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), sparse_conv(4, 4), nn.ReLU()))

    x = torch.randn(2, 3, 5, 5)
    hooked = model()
    hooked[0].register_forward_hook(lambda *args: args[2] * 2)
    assert check(hooked, x).folded == []
    norm = model()
    norm[1].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    assert check(norm, x).folded == []
    relu = model()
    relu[4].register_forward_hook(lambda *args: args[2] - 1)
    assert check(relu, x).relus == ["0"]
    batch = model()
    batch[1] = nn.BatchNorm2d(4, track_running_stats=False).eval()
    assert check(batch, x).folded == []
    whole = model()
    whole.register_forward_hook(lambda *args: args[2] * 2)
    with pytest.warns(UserWarning, match="the model has hooks"):
        fast = optimize_for_inference(whole)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), whole(x))


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.bn = sparse_conv(3, 4), nn.BatchNorm2d(4)

    def forward(self, x, scale=None):
        y = self.bn(self.layer(x))
        return y if scale is None else y * scale


def test_optional_arguments_are_not_traced():
    model = randomized(Optional())
    with pytest.warns(UserWarning, match="optional arguments"):
        fast = optimize_for_inference(model)
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        torch.testing.assert_close(fast(x, scale=2), model(x, scale=2))


def test_norm_over_another_dimension_is_an_error():
    model = randomized(nn.Sequential(SparseLinear.random(6, 4, 12), nn.BatchNorm1d(4), nn.Sigmoid()))
    fast = check(model, torch.randn(1, 6), torch.randn(8, 6))
    with torch.no_grad(), pytest.raises(ConfigurationError, match=r"supports \(batch, features\)"):
        fast(torch.randn(2, 4, 6))


def test_is_a_snapshot_without_training():
    torch.manual_seed(0)
    model = randomized(nn.Sequential(sparse_conv(3, 4), nn.BatchNorm2d(4), nn.Sigmoid(), sparse_conv(4, 4)))
    fast, x = check(model, torch.randn(2, 3, 5, 5)), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        y = fast(x)
        for p in model.parameters():
            p.zero_()
        torch.testing.assert_close(fast(x), y, rtol=0, atol=0)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(other(x), y, rtol=0, atol=0)
            assert other.folded == ["1"]
    with pytest.raises(ConfigurationError, match="no_grad"):
        fast(x)
    with pytest.raises(ConfigurationError, match="cannot train"):
        fast.train()
    assert fast.eval() is fast
    model[1].train()
    with pytest.raises(ConfigurationError, match="1 is in training mode"):
        optimize_for_inference(model)


def test_keeps_the_row_order_copy():
    model = randomized(nn.Sequential(sparse_conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), sparse_conv(4, 4)))

    def keys():
        return [layer._rows.key for layer in fast.modules() if isinstance(layer, SparseLinear)]

    with torch.inference_mode():
        fast = optimize_for_inference(model)
        kept = keys()
        for batch in (1, 8):
            fast(torch.randn(batch, 3, 5, 5))
    assert len(kept) == 2
    if COMPILED is not None:
        assert None not in kept
        assert kept == keys()


def test_threads_may_share_a_model():
    first, last = SparseLinear.random(9, 8, 40), SparseLinear.random(8, 5, 20)
    model = randomized(nn.Sequential(first, nn.BatchNorm1d(8), nn.Sigmoid(), last))
    x = torch.randn(4, 9)
    with torch.no_grad():
        wanted = model(x)
    for _ in range(10):
        fast, wrong = optimize_for_inference(model), []

        def work(i, fast=fast, wrong=wrong):
            with torch.inference_mode():
                wrong += [i for _ in range(20) if not torch.allclose(fast(x[i : i + 1])[0], wanted[i], atol=1e-5)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
