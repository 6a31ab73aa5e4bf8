"""Small models for images and text, as plain modules.

Image classifiers take ``input_shape`` (C, H, W) and ``num_classes``; models of text take ``vocab_size`` and ``context``. All take
a ``width_factor``, which multiplies their hidden widths. `narrow` finds the factor that matches a density.
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
