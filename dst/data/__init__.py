"""Small real data sets of images and text, as Lightning data modules in memory."""

from __future__ import annotations

from dst.data.datasets import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST
from dst.data.loader import Loader, TensorLoader
from dst.data.module import ImageDataModule, Task
from dst.data.text import Text, TextLoader

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "Loader",
    "Task",
    "TensorLoader",
    "Text",
    "TextLoader",
]
