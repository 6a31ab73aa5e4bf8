"""Small models: plain modules.

Image classifiers are built from ``input_shape`` (C, H, W) and ``num_classes``, models of text from ``vocab_size`` and ``context``.
All take a ``width_factor``, which multiplies their hidden widths; `narrow` finds the one that matches a density.
"""

from dst.models.convnet import ConvNet
from dst.models.gpt import GPT
from dst.models.gru import GRUCharModel, GRUClassifier
from dst.models.mlp import MLP, LeNet300100
from dst.models.narrowing import Narrowed, narrow
from dst.models.resnet import ResNet20
from dst.models.vit import ViTTiny
from dst.models.wide_resnet import WRN22_2, WideResNet

__all__ = [
    "GPT",
    "MLP",
    "WRN22_2",
    "ConvNet",
    "GRUCharModel",
    "GRUClassifier",
    "LeNet300100",
    "Narrowed",
    "ResNet20",
    "ViTTiny",
    "WideResNet",
    "narrow",
]
