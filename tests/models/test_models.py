"""The models: published sizes, the shapes they accept, what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dst.errors import ConfigurationError
from dst.models import MLP, WRN22_2, ConvNet, GRUClassifier, LeNet300100, ResNet20, WideResNet

MODELS = [LeNet300100, MLP, ConvNet, ResNet20, WRN22_2, GRUClassifier]
CONVOLUTIONAL = [ConvNet, ResNet20, WRN22_2]


def weights(model: nn.Module) -> int:
    """Entries of the matrices and kernels: no norms, no biases."""
    return sum(p.numel() for p in model.parameters() if p.ndim >= 2)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 9, 14)])
def test_maps_a_batch_to_logits_and_trains_every_parameter(build, shape):
    torch.manual_seed(0)
    model = build(shape, 7)
    logits = model(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 6])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_published_sizes():
    # LeCun et al. 1998; RigL's WRN-22-2 (conv and linear weights); He et al. 2016, option A (0.27M).
    assert parameters(LeNet300100((1, 28, 28), 10)) == 266_610
    assert weights(LeNet300100((1, 28, 28), 10)) == 266_200
    assert weights(WRN22_2((3, 32, 32), 10)) == 1_076_912
    assert parameters(ResNet20((3, 32, 32), 10)) == 269_722
    # Zagoruyko & Komodakis 2016, table 4: WRN-28-10 has 36.5M, WRN-40-4 8.9M.
    with torch.device("meta"):
        assert parameters(WideResNet((3, 32, 32), 10, depth=28, widen_factor=10)) == 36_479_194
        assert parameters(WideResNet((3, 32, 32), 10, depth=40, widen_factor=4)) == 8_949_210


def test_small_model_sizes():
    assert weights(MLP((1, 28, 28), 10)) == 784 * 1000 + 2 * 1000 * 1000 + 1000 * 10
    assert weights(MLP((1, 8, 8), 10, width=5, depth=1)) == 64 * 5 + 5 * 10
    assert weights(ConvNet((3, 32, 32), 10)) == 94_304
    assert weights(ConvNet((1, 8, 8), 10)) == weights(ConvNet((1, 16, 16), 10))
    assert weights(ResNet20((3, 32, 32), 10, width=8)) < weights(ResNet20((3, 32, 32), 10)) / 3


def test_wide_resnet_projects_only_where_channels_change():
    model = WRN22_2((3, 32, 32), 10)
    projections = [name for name, m in model.named_modules() if name.endswith("projection") and m is not None]
    assert projections == ["stage1.0.projection", "stage2.0.projection", "stage3.0.projection"]
    # At widen_factor 1 the first stage keeps the stem's 16 channels.
    narrow = WideResNet((3, 32, 32), 10, depth=10, widen_factor=1)
    assert narrow.stage1[0].projection is None
    assert narrow(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_wide_resnet_projects_the_activated_input():
    block = WRN22_2((3, 32, 32), 10).stage1[0].eval()
    nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone
    assert torch.equal(block(-torch.rand(1, 16, 4, 4)), torch.zeros(1, 32, 4, 4))


def test_resnet20_shortcut_subsamples_and_pads_channels_with_zeros():
    block = ResNet20((3, 32, 32), 10, width=2).stage2[0]
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    inputs = torch.rand(1, 2, 4, 4)
    outputs = block(inputs)
    assert torch.equal(outputs[:, 1:3], inputs[:, :, ::2, ::2])
    assert torch.equal(outputs[:, [0, 3]], torch.zeros(1, 2, 2, 2))


def test_he_initialisation():
    torch.manual_seed(0)
    model = MLP((1, 28, 28), 10)
    assert model.hidden[1].weight.std().item() == pytest.approx((2 / 1000) ** 0.5, rel=0.01)
    assert torch.equal(model.hidden[1].bias, torch.zeros(1000))
    kernel = WRN22_2((3, 32, 32), 10).stage3[1].conv1.weight
    assert kernel.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = WideResNet((3, 8, 8), 10, depth=10, widen_factor=1, dropout=0.5)
    images = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ((28, 28), 10, "input_shape must be"),
        (784, 10, "input_shape must be"),
        ((1, 28, 0), 10, "input_shape width"),
        ((1.0, 28, 28), 10, "input_shape channels"),
        ((1, 28, 28), 1, "num_classes must be at least 2"),
        ((1, 28, 28), "10", "num_classes"),
        ((1, 28, 28), True, "num_classes"),
    ],
)
def test_refuses_impossible_tasks(build, shape, classes, message):
    with pytest.raises(ConfigurationError, match=message):
        build(shape, classes)


@pytest.mark.parametrize("build", CONVOLUTIONAL)
def test_refuses_images_that_are_too_small(build):
    with pytest.raises(ConfigurationError, match="too small"):
        build((1, 3, 8), 10)
    assert build((1, 4, 4), 10).eval()(torch.zeros(1, 1, 4, 4)).shape == (1, 10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP((1, 8, 8), 10, width=0), "width must be an integer"),
        (lambda: MLP((1, 8, 8), 10, depth=True), "depth must be an integer"),
        (lambda: MLP((1, 8, 8), 10, depth=0), "depth must be an integer"),
        (lambda: ConvNet((1, 8, 8), 10, width=2.5), "width must be an integer"),
        (lambda: ResNet20((1, 8, 8), 10, width=-1), "width must be an integer"),
        (lambda: WideResNet((1, 8, 8), 10, depth=20), "6n \\+ 4"),
        (lambda: WideResNet((1, 8, 8), 10, depth=4), "6n \\+ 4"),
        (lambda: WideResNet((1, 8, 8), 10, widen_factor=0), "widen_factor must be"),
        (lambda: WideResNet((1, 8, 8), 10, dropout=1.0), "dropout must lie"),
    ],
)
def test_refuses_impossible_architectures(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
