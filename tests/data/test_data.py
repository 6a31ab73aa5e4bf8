"""The data modules: files, splits, order, sharding and exact resumption."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import pickle
import re
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

import dst.data.download
import dst.data.loader
from dst.data import CIFAR10, CIFAR100, MNIST, Digits, FashionMNIST, ImageDataModule, TensorLoader
from dst.data.augment import crop_and_flip
from dst.data.cifar import read_cifar
from dst.data.download import download
from dst.data.idx import read_idx
from dst.data.loader import epoch_order, stratified_split
from dst.errors import ConfigurationError, DataError, StateError
from tests.sampling import rotated

# --- IDX ---------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, kind, array.ndim]) + shape + array.tobytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3)])
def test_idx_round_trip(tmp_path: Path, shape: tuple[int, ...], pack: Callable[[bytes], bytes]) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    (tmp_path / "file").write_bytes(pack(idx(array)))
    read = read_idx(tmp_path / "file")
    assert read.dtype == torch.uint8
    assert torch.equal(read, torch.from_numpy(array))


GOOD = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"PK\x03\x04" + GOOD, "not an IDX file"),
        (bytes([0, 0, 0x0D, 1]) + GOOD[4:], "IDX type 0x0d"),
        (GOOD[:7], "header of 2 dimensions is cut off"),
        (GOOD[:-1], "announces 6 bytes, 5"),
        (GOOD + b"\0", "announces 6 bytes, 7"),
        (gzip.compress(GOOD, mtime=0)[:-9], "Cannot read"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"garbage!", "Cannot read"),
        (None, "Cannot read"),
    ],
)
def test_idx_damage_names_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "damaged-idx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)


# --- CIFAR -------------------------------------------------------------------------------------------------------

CIFAR_FILES = {10: [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], 100: ["train", "test"]}
PER_FILE = 4


def cifar_part(number: int, classes: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (PER_FILE, 3072), np.uint8), rng.integers(0, classes, PER_FILE).tolist()


def write_cifar(folder: Path, classes: int, form: str) -> None:
    folder.mkdir(parents=True)
    for number, stem in enumerate(CIFAR_FILES[classes]):
        data, labels = cifar_part(number, classes)
        if form == "binary":
            coarse = [] if classes == 10 else [np.full((PER_FILE, 1), 99, np.uint8)]
            records = np.hstack([*coarse, np.array(labels, np.uint8)[:, None], data])
            (folder / f"{stem}.bin").write_bytes(records.tobytes())
        else:
            array = np.asfortranarray(data) if form == "fortran" else data
            content = {"data": array, "labels" if classes == 10 else "fine_labels": labels, "batch_label": stem}
            protocol = 4 if form == "protocol 4" else 2
            (folder / stem).write_bytes(pickle.dumps(content, protocol=protocol))


def archive(folder: Path, target: Path) -> None:
    with tarfile.open(target, "w:gz") as tar:
        tar.add(folder, folder.name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["binary", "protocol 2", "protocol 4", "fortran"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_formats_agree(tmp_path: Path, classes: int, form: str, packed: bool) -> None:
    path = tmp_path / "cifar"
    write_cifar(path, classes, form)
    if packed:
        archive(path, path := tmp_path / "cifar.tar.gz")
    parts = [cifar_part(number, classes) for number in range(len(CIFAR_FILES[classes]))]
    for split, expected in (("train", parts[:-1]), ("test", parts[-1:])):
        images, labels = read_cifar(path, split, classes)  # type: ignore[arg-type]
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(images, torch.from_numpy(np.vstack([d for d, _ in expected])).view(-1, 3, 32, 32))
        assert labels.tolist() == [label for _, labels in expected for label in labels]


class Evil:
    """Pickles as a call of ``os.mkdir``."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("place", ["whole", "data", "labels"])
def test_crafted_pickle_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    target = tmp_path / "executed"
    data, labels = cifar_part(0, 10)
    content = {"data": data, "labels": labels}
    crafted = Evil(target) if place == "whole" else {**content, place: Evil(target)}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(crafted, protocol=2))
    with pytest.raises(DataError, match=rf"{tmp_path}/test_batch.*mkdir"):
        read_cifar(tmp_path, "test", 10)
    assert not target.exists()
    pickle.loads((tmp_path / "test_batch").read_bytes())
    assert target.exists()  # an ordinary unpickler would have run it


def test_pickle_cannot_make_any_numpy_object(tmp_path: Path) -> None:
    data, labels = cifar_part(0, 10)
    for wrong in (
        data.astype(np.int16),
        data.astype(object),
        data.view(np.int8),
        data[:, :-1],
        data.ravel(),
        np.float64(1),
        "text",
    ):
        (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": wrong, "labels": labels}, protocol=2))
        with pytest.raises(DataError, match="not a CIFAR-10 file"):
            read_cifar(tmp_path, "test", 10)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test_batch.bin": b"\0" * 3074}, "3074 bytes are not whole records of 3073"),
        ({"test_batch.bin": b""}, "0 bytes are not whole records"),
        ({"test_batch.bin": b"\x0a" + b"\0" * 3072}, r"outside 0\.\.9"),
        ({"test_batch": pickle.dumps({"data": cifar_part(0, 10)[0], "labels": [1]})}, "4 images, labels of shape"),
        ({"test_batch": pickle.dumps({"labels": [1]})}, "'data'"),
        ({"test_batch": b"not a pickle"}, "not a CIFAR-10 file"),
        ({"test_batch": b""}, "not a CIFAR-10 file"),
        ({}, "needs test_batch.*found none"),
    ],
)
def test_cifar_damage_names_the_file(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_cifar(tmp_path, "test", 10)
    assert str(tmp_path) in str(error.value)


def test_incomplete_cifar_lists_what_is_missing(tmp_path: Path) -> None:
    write_cifar(tmp_path / "c", 10, "binary")
    (tmp_path / "c" / "data_batch_3.bin").unlink()
    with pytest.raises(
        DataError, match=r"needs data_batch_1, .*found data_batch_1\.bin, data_batch_2\.bin, data_batch_4"
    ):
        read_cifar(tmp_path / "c", "train", 10)


def test_damaged_archive(tmp_path: Path) -> None:
    write_cifar(tmp_path / "c", 10, "binary")
    archive(tmp_path / "c", whole := tmp_path / "c.tar.gz")
    for damaged in (whole.read_bytes()[:-2000], b"no archive"):
        whole.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"Cannot read the archive {whole}"):
            read_cifar(whole, "train", 10)


# --- downloads ---------------------------------------------------------------------------------------------------

CONTENT = b"content" * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/absent/"):
                self.send_error(404)
                return
            body = {"damaged": CONTENT[::-1], "cut": CONTENT[:-1]}.get(self.path.split("/")[1], CONTENT)
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("before", [[], ["absent"], ["damaged", "cut"]])
def test_download_takes_the_first_intact_mirror(tmp_path: Path, server: str, before: list[str]) -> None:
    urls = [f"{server}/{kind}/file.gz" for kind in [*before, "intact"]]
    path = download(urls, tmp_path / "new" / "folder", MD5)
    assert path == tmp_path / "new" / "folder" / "file.gz"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_failed_download_leaves_nothing_and_says_what_to_do(tmp_path: Path, server: str) -> None:
    urls = [f"{server}/{kind}/file.gz" for kind in ("absent", "damaged", "cut")]
    (tmp_path / "file.gz").write_bytes(b"older")
    with pytest.raises(DataError) as error:
        download(urls, tmp_path, MD5)
    assert all(text in str(error.value) for text in [*urls, "404", f"not {MD5}", str(tmp_path)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file.gz": b"older"}


def test_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    parts: list[list[Path]] = []

    def interrupt() -> None:
        parts.append(list((tmp_path / "to").iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(dst.data.download, "_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download([(tmp_path / "source").as_uri()], tmp_path / "to", MD5)
    assert [path.suffix for path in parts[0]] == [".part"]
    assert list((tmp_path / "to").iterdir()) == []


# --- data sets ---------------------------------------------------------------------------------------------------


def write_mnist(folder: Path, *, train: int = 40, gz: bool = True) -> dict[str, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    files = {}
    for stem, count in (("train", train), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{stem}-{kind}-ubyte" + ".gz" * gz
            files[name] = gzip.compress(idx(array)) if gz else idx(array)
            (folder / name).write_bytes(files[name])
    return files


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (MNIST, "mnist"),
        (MNIST, "mnist/raw"),
        (MNIST, "."),
        (MNIST, "MNIST/raw"),
        (FashionMNIST, "fashion-mnist"),
        (FashionMNIST, "FashionMNIST/raw"),
    ],
)
def test_mnist_layouts(tmp_path: Path, kind: type[ImageDataModule], place: str, gz: bool) -> None:
    files = write_mnist(tmp_path / place, gz=gz)
    data = kind(tmp_path, batch_size=5, download=False)
    data.prepare_data()
    data.setup()
    images, labels = next(iter(data.test_dataloader()))
    raw = np.frombuffer((gzip.decompress if gz else bytes)(files["t10k-images-idx3-ubyte" + ".gz" * gz]), np.uint8)[16:]
    assert images.shape == (10, 1, 28, 28)
    expected = (raw.reshape(10, 1, 28, 28) / 255 - kind.mean[0]) / kind.std[0]
    torch.testing.assert_close(images, torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)
    assert labels.tolist() == list(range(10))


def test_missing_files_without_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FashionMNIST, "elsewhere", ())
    for data in (MNIST(tmp_path / "none", download=False), FashionMNIST(tmp_path, download=False)):
        target = data.root / data.folder
        for act in (data.prepare_data, data.setup):
            with pytest.raises(DataError, match="download") as error:
                act()
            assert str(target) in str(error.value)
            assert f"{data.mirrors[0]}train-images-idx3-ubyte.gz" in str(error.value)
    with pytest.raises(DataError, match=rf"{tmp_path}/none, which does not exist"):
        MNIST(tmp_path / "none", download=False).prepare_data()
    for kind, url in ((CIFAR10, "kriz/cifar-10-binary.tar.gz"), (CIFAR100, "kriz/cifar-100-binary.tar.gz")):
        with pytest.raises(DataError, match=url):
            kind(tmp_path, download=False).prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_prepare_data_fetches_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_mnist(tmp_path / "mirror")
    monkeypatch.setattr(MNIST, "checksums", {name: hashlib.md5(c).hexdigest() for name, c in files.items()})
    monkeypatch.setattr(MNIST, "mirrors", ("file:///nowhere/", f"{(tmp_path / 'mirror').as_uri()}/"))
    data = MNIST(tmp_path / "root", batch_size=5)
    data.prepare_data()
    data.setup("fit")
    assert {path.name: path.read_bytes() for path in (tmp_path / "root" / "mnist").iterdir()} == files
    monkeypatch.setattr(MNIST, "mirrors", ("file:///nowhere/",))
    data.prepare_data()  # all there: nothing is asked for
    (tmp_path / "root" / "mnist" / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"file:///nowhere/train-labels-idx1-ubyte\.gz"):
        data.prepare_data()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("t10k-labels-idx1-ubyte.gz", np.full(10, 10, np.uint8), "11 classes"),
        ("t10k-labels-idx1-ubyte.gz", np.zeros(9, np.uint8), "9 labels"),
        ("t10k-images-idx3-ubyte.gz", np.zeros((10, 8, 8), np.uint8), r"shape \(10, 1, 8, 8\)"),
    ],
)
def test_files_that_do_not_belong(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / name).write_bytes(gzip.compress(idx(array)))
    with pytest.raises(DataError, match=message):
        MNIST(tmp_path).setup("test")


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_published_files(kind: type[ImageDataModule]) -> None:
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    root = Path(os.environ.get("DST_DATA_ROOT", beside))
    data = kind(root, download=False, validation=0.0, batch_size=60_000)
    try:
        data.prepare_data()
    except DataError as error:
        pytest.skip(f"set DST_DATA_ROOT to a folder with {data.folder}: {error}")
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (60_000, 1, 28, 28)
    assert abs(images.mean().item()) < 1e-3
    assert abs(images.std().item() - 1) < 1e-3
    assert labels.bincount().min() >= 5421  # MNIST's rarest class
    assert data.test_dataloader().samples == 10_000


@pytest.mark.parametrize(("kind", "classes"), [(CIFAR10, 10), (CIFAR100, 100)])
@pytest.mark.parametrize("form", ["binary", "protocol 2", "binary archive", "python archive"])
def test_cifar_module(tmp_path: Path, kind: type[ImageDataModule], classes: int, form: str) -> None:
    extracted = tmp_path / ({10: "cifar-10-batches-", 100: "cifar-100-"}[classes])
    suffix = {10: ("bin", "py"), 100: ("binary", "python")}[classes]["binary" not in form]
    folder = Path(f"{extracted}{suffix}")
    write_cifar(folder, classes, "binary" if "binary" in form else "protocol 2")
    if "archive" in form:
        archive(folder, tmp_path / f"cifar-{classes}-{form.split()[0]}.tar.gz")
        folder.rename(tmp_path / "elsewhere")
    data = kind(tmp_path, batch_size=2, validation=0.0, download=False)
    data.prepare_data()
    data.setup()
    assert data.augment
    assert data.num_classes == classes
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (2, *data.input_shape)
    tests, labels = next(iter(data.test_dataloader()))
    pixels, expected = cifar_part(len(CIFAR_FILES[classes]) - 1, classes)
    raw = torch.from_numpy(pixels).view(-1, 3, 32, 32) / 255
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (data.mean, data.std))
    torch.testing.assert_close(tests, (raw - mean) / std, atol=1e-5, rtol=1e-5)
    assert labels.tolist() == expected


def test_digits() -> None:
    data = Digits(batch_size=64, root="ignored")
    assert (data.input_shape, data.num_classes) == ((1, 8, 8), 10)
    data.setup()
    train, val, test = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert isinstance(val, TensorLoader)
    assert (train.samples, val.samples, test.samples) == (1294, 144, 359)
    images, labels = next(iter(train))
    assert images.shape == (64, 1, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    everything = torch.cat([batch for batch, _ in data.train_dataloader()])
    assert abs(everything.mean()) < 0.02
    assert abs(everything.std() - 1) < 0.02
    raw = everything * 0.3761 + 0.3053
    assert raw.min().abs() < 1e-6
    assert (raw.max() - 1).abs() < 1e-6


def contents(loader: object) -> list[str]:
    assert isinstance(loader, TensorLoader)
    return [hashlib.md5(image.numpy().tobytes()).hexdigest() for images, _ in loader for image in images]


def test_splits_are_disjoint_and_the_test_split_is_fixed() -> None:
    parts = []
    for seed in (0, 1):
        data = Digits(seed=seed, batch_size=1)
        data.setup()
        train, val, test = map(contents, (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()))
        assert len(train) + len(val) + len(test) == 1797
        assert not set(train) & set(val)
        assert not (set(train) | set(val)) & set(test)
        parts.append((train, val, test))
    assert parts[0][2] == parts[1][2]
    assert set(parts[0][1]) != set(parts[1][1])


def test_no_validation() -> None:
    data = Digits(validation=0.0)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert data.train_dataloader().samples == 1438


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"eval_batch_size": -1}, "eval_batch_size"),
        ({"validation": 1.0}, "validation"),
        ({"validation": -0.1}, "validation"),
        ({"seed": -1}, "seed"),
        ({"augment": True}, "Digits has no augmentation"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Digits(**options)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 5),
)
def test_stratified_split(labels: list[int], fraction: float, seed: int) -> None:
    classes = torch.tensor(labels)
    first, second = stratified_split(classes, fraction, seed)
    taken = round(fraction * len(labels))
    assert len(second) == taken
    assert torch.cat([first, second]).sort().values.tolist() == list(range(len(labels)))
    shares = classes.bincount() * (taken / len(labels))
    assert ((classes[second].bincount(minlength=len(shares)) - shares).abs() < 1).all()
    assert all(a < b for part in (first, second) for a, b in pairwise(part.tolist()))


# --- augmentation ------------------------------------------------------------------------------------------------


def test_crop_and_flip_by_hand() -> None:
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).expand(4, 1, 2, 2)
    # Offsets 0, 1 and 2 of a border of 1 are chosen by numbers in thirds.
    uniform = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.4], [0.0, 0.5, 0.9], [0.5, 0.99, 0.0]])
    expected = [[[1, 2], [3, 4]], [[2, 1], [4, 3]], [[0, 0], [1, 2]], [[0, 2], [0, 4]]]
    result = crop_and_flip(image, uniform, padding=1)
    assert result.dtype == torch.uint8
    assert result.squeeze(1).tolist() == expected


def test_crop_and_flip_keeps_channels_and_images_apart() -> None:
    images = torch.arange(2 * 3 * 6 * 5).view(2, 3, 6, 5)
    still = torch.tensor([[0.5, 0.5, 0.9]] * 2)
    assert torch.equal(crop_and_flip(images, still), images)


# --- the loader --------------------------------------------------------------------------------------------------


def loader(samples: int = 20, batch_size: int = 6, **options: Any) -> TensorLoader:
    """A loader whose images hold their own number."""
    images = torch.arange(samples, dtype=torch.uint8).view(-1, 1, 1, 1)
    options = {"shuffle": True, "drop_last": True, "shard": True, **options}
    one = torch.ones(1)
    return TensorLoader(images, torch.arange(samples), batch_size=batch_size, scale=one, shift=0 * one, **options)


def labels_of(batches: object) -> list[list[int]]:
    result = []
    for images, labels in batches:  # type: ignore[attr-defined]
        assert images.flatten().tolist() == labels.tolist()
        result.append(labels.tolist())
    return result


def flat(batches: list[list[int]]) -> list[int]:
    return [label for batch in batches for label in batch]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first = loader(seed=3)
    epochs = [labels_of(first) for _ in range(3)]
    for epoch, batches in enumerate(epochs):
        assert [len(batch) for batch in batches] == [6, 6, 6]
        assert flat(batches) == epoch_order(20, 3, epoch)[:18].tolist()
        again = loader(seed=3)
        again.set_epoch(epoch)
        assert labels_of(again) == batches
    assert epochs[0] != epochs[1] != epochs[2]
    assert labels_of(loader(seed=4)) != epochs[0]


def test_indices_and_ragged_tail() -> None:
    subset = loader(indices=torch.tensor([3, 5, 7, 11, 13]), batch_size=2, drop_last=False)
    assert len(subset) == 3
    assert sorted(flat(labels_of(subset))) == [3, 5, 7, 11, 13]
    assert labels_of(loader(5, 2, shuffle=False, drop_last=False)) == [[0, 1], [2, 3], [4]]


def test_a_broken_off_epoch_starts_over() -> None:
    plain = loader()
    first = next(iter(plain))[1].tolist()
    assert labels_of(plain)[0] == first


def test_too_few_samples() -> None:
    with pytest.raises(ConfigurationError, match="5 samples do not make one batch of 6: lower the batch size"):
        loader(5)
    data = Digits(batch_size=1500)
    data.setup("fit")
    with pytest.raises(ConfigurationError, match=r"1294 samples.*drop_last"):
        data.train_dataloader()


@pytest.mark.parametrize("taken", range(4))
def test_state_continues_after_the_last_batch(taken: int) -> None:
    plain = loader()
    expected = labels_of(plain) + labels_of(plain)
    stopped = loader()
    batches = iter(stopped)
    for _ in range(taken):
        next(batches)
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    iter(resumed)  # an iterator that is never read takes nothing away
    assert (labels_of(resumed) + labels_of(resumed))[: len(expected) - taken] == expected[taken:]


def test_state_of_other_batches_is_refused_within_an_epoch() -> None:
    stopped = loader()
    between = stopped.state_dict()
    next(iter(stopped))
    within = stopped.state_dict()
    settings: list[dict[str, Any]] = [{"batch_size": 5}, {"seed": 1}, {"samples": 21}]
    for options in settings:
        other = loader(**options)
        other.load_state_dict(between)
        with pytest.raises(StateError, match="resume within an epoch"):
            other.load_state_dict(within)


def noise(images: Tensor, uniform: Tensor) -> Tensor:
    return images + (uniform[:, 0, None, None, None] * 200).to(torch.uint8)


@pytest.mark.parametrize(("samples", "drop_last"), [(20, True), (20, False), (21, False), (24, True)])
@pytest.mark.parametrize("augment", [None, noise])
def test_shards_unite_to_the_global_batch(
    monkeypatch: pytest.MonkeyPatch, samples: int, drop_last: bool, augment: Callable[..., Tensor] | None
) -> None:
    world = 2

    def epoch(rank: int, world: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        monkeypatch.setattr(dst.data.loader, "processes", lambda: (rank, world))
        shard = loader(samples, batch_size, drop_last=drop_last, augment=augment)
        batches = list(shard)
        assert len(batches) == len(shard)
        return batches

    whole = epoch(0, 1, 6)
    shards = [epoch(rank, world, 3) for rank in range(world)]
    assert len(shards[0]) == len(shards[1]) == len(whole)
    for together, *parts in zip(whole, *shards, strict=True):
        sizes = {len(labels) for _, labels in parts}
        assert len(sizes) == 1
        for whole_part, parts_of in zip(together, zip(*parts, strict=True), strict=True):
            united = torch.stack(parts_of, 1).flatten(0, 1)
            assert torch.equal(united, whole_part[: len(united)])
            assert len(whole_part) - len(united) < world


def test_evaluation_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Digits(batch_size=64)
    data.setup()
    monkeypatch.setattr(dst.data.loader, "processes", lambda: (1, 2))
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 359
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 144
    assert len(data.train_dataloader()) == 1294 // 128


def test_augmentation_repeats_and_varies(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin", 10, "binary")

    def epochs(**options: Any) -> list[list[Tensor]]:
        data = CIFAR10(tmp_path, batch_size=4, validation=0.0, download=False, **options)
        data.setup("fit")
        train = data.train_dataloader()
        return [[images for images, _ in train] for _ in range(2)]

    first, again, plain = epochs(), epochs(), epochs(augment=False)
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[0], plain[0], strict=True))


def test_every_epoch_and_batch_is_augmented_anew() -> None:
    options: dict[str, Any] = {"shuffle": False, "batch_size": 4, "samples": 8}
    noisy, plain = loader(augment=noise, **options), [images for images, _ in loader(**options)]
    shifts = [
        tuple((images - still).flatten().tolist())
        for _ in range(2)
        for (images, _), still in zip(noisy, plain, strict=True)
    ]
    assert len(set(shifts)) == 4


# --- Lightning ---------------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Remembers the content of every batch that was trained on."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.seen: list[tuple[int, str]] = []
        self.fail_at = fail_at

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.trainer.global_step == self.fail_at:
            raise RuntimeError("a failing step")
        self.seen.append((batch_idx, hashlib.md5(images.numpy().tobytes()).hexdigest()))
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        assert len(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAlways(Callback):
    """Saves after every batch, validation and epoch, and when a step fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: Trainer, kind: str) -> None:
        trainer.save_checkpoint(self.folder / f"{kind}{trainer.fit_loop.total_batch_idx + 1}.ckpt", weights_only=False)

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, *_: object) -> None:
        self.save(trainer, "epoch")

    def on_exception(self, trainer: Trainer, *_: object) -> None:
        self.save(trainer, "failure")


class Peek(Callback):
    """Looks at a batch before training, as an initialisation from gradients does."""

    def on_fit_start(self, trainer: Trainer, *_: object) -> None:
        next(iter(trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]


# Digits make 3 epochs of 5 batches.
def fit(
    save: Path | None = None, resume: Path | None = None, fail_at: int | None = None, peek: bool = False, **options: Any
) -> list[tuple[int, str]]:
    if save is not None:
        save.mkdir(exist_ok=True)
    model = Recorder(fail_at)
    data = Digits(batch_size=256, validation=options.pop("validation", 0.1))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([] if save is None else [SaveAlways(save)]), *[Peek()] * peek],
        **{"max_epochs": 3, **options},
    )
    with nullcontext() if fail_at is None else pytest.raises(RuntimeError, match="a failing step"):
        trainer.fit(model, datamodule=data, ckpt_path=None if resume is None else str(resume))
    return model.seen


def batches_in(checkpoint: str) -> int:
    return int(re.sub(r"\D", "", checkpoint))


@pytest.fixture(scope="module")
def whole_fit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[tuple[int, str]]]]:
    """Fits that nothing stops: the folder of their checkpoints, and the batches they saw."""

    @cache
    def of(**options: Any) -> tuple[Path, list[tuple[int, str]]]:
        folder = tmp_path_factory.mktemp("whole")
        return folder, fit(folder, **options)

    return of


Whole = Callable[..., tuple[Path, list[tuple[int, str]]]]


@pytest.mark.parametrize(
    ("options", "where"),
    rotated(
        [
            {},
            {"validation": 0.0},
            {"accumulate_grad_batches": 2},
            {"max_steps": 13},
            {"max_steps": 13, "max_epochs": -1},
            {"max_steps": 13, "validation": 0.0},
            {"val_check_interval": 3},
        ],
        ["batch3", "batch7", "batch5", "validation5", "epoch5", "epoch10"],
        each=3,
    ),
    ids=str,
)
def test_resumed_training_sees_the_same_batches(whole_fit: Whole, options: dict[str, Any], where: str) -> None:
    if where == "validation5" and options.keys() & {"validation", "val_check_interval"}:
        where = "batch4"  # no validation at that place
    folder, whole = whole_fit(**options)
    assert fit(resume=folder / f"{where}.ckpt", **options) == whole[batches_in(where) :]


@pytest.mark.parametrize(
    ("second", "first", "options"),
    rotated(["batch8", "batch10", "epoch10", "batch12"], ["batch3", "batch5", "epoch5"], [{}, {"max_steps": 13}]),
)
def test_training_resumed_twice_sees_the_same_batches(
    whole_fit: Whole, tmp_path: Path, options: dict[str, Any], first: str, second: str
) -> None:
    folder, whole = whole_fit(**options)
    fit(tmp_path, folder / f"{first}.ckpt", **options)
    assert fit(resume=tmp_path / f"{second}.ckpt", **options) == whole[batches_in(second) :]


@pytest.mark.parametrize("options", [{}, {"max_steps": 13}, {"max_steps": 13, "validation": 0.0}], ids=str)
def test_training_resumed_between_epochs_enters_and_leaves_the_rest_once(
    whole_fit: Whole, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = whole_fit(**options)
    hooks: list[tuple[str, int]] = []
    for hook in ("on_train_epoch_start", "on_train_epoch_end"):
        monkeypatch.setattr(
            Recorder, hook, lambda self, hook=hook: hooks.append((hook[15:], self.trainer.current_epoch)), raising=False
        )
    fit(resume=folder / "epoch5.ckpt", **options)
    assert hooks == [("start", 1), ("end", 1), ("start", 2), ("end", 2)]


@pytest.mark.parametrize("failing", [0, 3, 5, 9])
def test_a_batch_whose_step_failed_is_trained_on_after_resuming(whole_fit: Whole, tmp_path: Path, failing: int) -> None:
    _, whole = whole_fit()
    assert fit(tmp_path, fail_at=failing) == whole[:failing]
    assert fit(resume=tmp_path / f"failure{failing + 1}.ckpt") == whole[failing:]


def test_limited_epochs_resume_too(whole_fit: Whole) -> None:
    options: dict[str, Any] = {"limit_train_batches": 3}
    folder, whole = whole_fit(**options)
    assert len(whole) == 9
    for done in (2, 3, 4):
        assert fit(resume=folder / f"batch{done}.ckpt", **options) == whole[done:]


def test_looking_at_a_batch_disturbs_nothing(whole_fit: Whole, tmp_path: Path) -> None:
    folder, whole = whole_fit()
    assert fit(tmp_path, peek=True) == whole
    for where in ("batch3", "batch8", "epoch5"):
        loops = [torch.load(place / f"{where}.ckpt")["loops"]["fit_loop"] for place in (folder, tmp_path)]
        assert loops[0]["epoch_progress"] == loops[1]["epoch_progress"]
        assert fit(resume=tmp_path / f"{where}.ckpt", peek=True) == whole[batches_in(where) :]


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_repeats_its_batches() -> None:
    seen = fit(overfit_batches=2)
    assert seen[:2] == seen[2:4] == seen[4:]
