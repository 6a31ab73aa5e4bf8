"""Small, real image-classification tasks as Lightning data modules, held in memory."""

from __future__ import annotations

from dst.data.datasets import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST
from dst.data.loader import TensorLoader
from dst.data.module import ImageDataModule

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "Digits", "FashionMNIST", "ImageDataModule", "TensorLoader"]
