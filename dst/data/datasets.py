"""The data sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dst.data.cifar import read_cifar
from dst.data.download import download as fetch
from dst.data.idx import read_idx
from dst.data.loader import stratified_split
from dst.data.module import ImageDataModule, Split
from dst.errors import DataError


class Digits(ImageDataModule):
    """The 1797 handwritten 8x8 digits of scikit-learn, which need no files.

    The test split is a fifth of the data, the same for all seeds. ``root`` and ``download`` have no effect.
    """

    folder = "digits"
    input_shape = (1, 8, 8)
    num_classes = 10
    mean, std, white = (0.3053,), (0.3761,), 16

    def locate(self, *, download: bool) -> None:
        """Return None: the data come with scikit-learn."""

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return uint8 images ``(N, 1, 8, 8)`` in 0..16 and int64 labels ``(N,)``."""
        from sklearn.datasets import load_digits

        images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        labels = labels.long()
        rows = stratified_split(labels, 0.2, seed=0)[split == "test"]
        return images[rows].to(torch.uint8).view(-1, *self.input_shape), labels[rows]


class _Idx(ImageDataModule):
    """A data set of four IDX files: images and labels for training and test."""

    input_shape = (1, 28, 28)
    num_classes = 10
    mirrors: ClassVar[tuple[str, ...]]
    checksums: ClassVar[Mapping[str, str]]
    elsewhere: ClassVar[tuple[Path, ...]] = ()

    @property
    def places(self) -> list[Path]:
        """Folders that are searched, in order. Downloads go to the first."""
        here, torchvision = self.root / self.folder, self.root / type(self).__name__
        return [here, here / "raw", self.root, torchvision / "raw", *self.elsewhere]

    def locate(self, *, download: bool) -> Path:
        """Return the folder of all four files. Missing files are downloaded to ``root/<folder>``."""
        for folder in self.places:
            if all(_present(folder, name) for name in self.checksums):
                return folder
        target = self.places[0]
        missing = [name for name in self.checksums if not _present(target, name)]
        if not download:
            raise _missing(self.folder, target, [f"{self.mirrors[0]}{name}" for name in missing])
        for name in missing:
            fetch([mirror + name for mirror in self.mirrors], target, self.checksums[name])
        return target

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return uint8 images ``(N, 1, 28, 28)`` and int64 labels ``(N,)``."""
        folder = self.locate(download=False)
        stem = "train" if split == "train" else "t10k"
        images, labels = (
            read_idx(_present(folder, f"{stem}-{kind}-ubyte.gz")[0]) for kind in ("images-idx3", "labels-idx1")
        )
        return images.unsqueeze(1), labels.long()


class MNIST(_Idx):
    """MNIST: 28x28 handwritten digits, 60,000 for training and 10,000 for test (LeCun et al. 1998)."""

    folder = "mnist"
    mean, std = (0.1307,), (0.3081,)
    mirrors = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    )
    checksums: ClassVar = {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    }


class FashionMNIST(_Idx):
    """Fashion-MNIST: 28x28 clothing, 60,000 for training and 10,000 for test (Xiao et al. 2017).

    Also finds the files of Debian's ``dataset-fashion-mnist`` package.
    """

    folder = "fashion-mnist"
    mean, std = (0.2860,), (0.3530,)
    mirrors = (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    )
    checksums: ClassVar = {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }
    elsewhere = (Path("/usr/share/datasets/fashion-mnist"),)


class _Cifar(ImageDataModule):
    """CIFAR in either published format, as a folder or as the archive, which is read without extracting it."""

    input_shape = (3, 32, 32)
    num_classes: ClassVar[Literal[10, 100]]
    augmentable = True
    mirrors: ClassVar[tuple[str, ...]] = ("https://www.cs.toronto.edu/~kriz/",)
    extracted: ClassVar[tuple[str, ...]]
    archives: ClassVar[Mapping[str, str]]

    def locate(self, *, download: bool) -> Path:
        """Return the folder or archive, in ``root/<folder>`` or ``root``. Downloads go to the former."""
        target = self.root / self.folder
        for folder in (target, self.root):
            for candidate in (*self.extracted, *self.archives):
                if (folder / candidate).exists():
                    return folder / candidate
        name, md5 = next(iter(self.archives.items()))
        urls = [mirror + name for mirror in self.mirrors]
        if not download:
            raise _missing(self.folder, target, urls)
        return fetch(urls, target, md5)

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return uint8 images ``(N, 3, 32, 32)`` and int64 labels ``(N,)``."""
        return read_cifar(self.locate(download=False), split, self.num_classes)


class CIFAR10(_Cifar):
    """CIFAR-10: 32x32 photographs of 10 classes, 50,000 for training, 10,000 for test (Krizhevsky 2009)."""

    folder = "cifar-10"
    num_classes = 10
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    extracted = ("cifar-10-batches-bin", "cifar-10-batches-py")
    archives: ClassVar = {
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    }


class CIFAR100(_Cifar):
    """CIFAR-100: 32x32 photographs of 100 classes, 50,000 for training, 10,000 for test (Krizhevsky 2009)."""

    folder = "cifar-100"
    num_classes = 100
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    extracted = ("cifar-100-binary", "cifar-100-python")
    archives: ClassVar = {
        "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    }


def _present(folder: Path, name: str) -> list[Path]:
    return [path for path in (folder / name, folder / name.removesuffix(".gz")) if path.is_file()]


def _missing(name: str, folder: Path, urls: list[str]) -> DataError:
    root = folder.parent.absolute()
    state = "" if root.is_dir() else ", which does not exist"
    return DataError(
        f"{name} was not found. The folder of the data sets (`root`) is {root}{state}. "
        f"Set download to true, or put into {root / folder.name}: {', '.join(urls)}"
    )
