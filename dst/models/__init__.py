"""Small image classifiers: plain modules built from ``input_shape`` (C, H, W) and ``num_classes``."""

from dst.models.convnet import ConvNet
from dst.models.mlp import MLP, LeNet300100
from dst.models.resnet import ResNet20
from dst.models.wide_resnet import WRN22_2, WideResNet

__all__ = ["MLP", "WRN22_2", "ConvNet", "LeNet300100", "ResNet20", "WideResNet"]
