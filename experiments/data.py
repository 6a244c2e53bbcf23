"""The data sets, whole in memory as tensors, read from the files in which they are published."""

from __future__ import annotations

import argparse
import inspect
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsgd.demo.data import idx_folder

DEFAULT_FOLDER = Path(os.environ.get("GSGD_DATASETS", Path(__file__).parents[2] / "shared" / "data"))

SOURCES = {
    "mnist": "mnist.npz (arrays train_images, train_labels, test_images, test_labels), or a folder mnist with the four "
    "IDX files of http://yann.lecun.com/exdb/mnist",
    "fashion-mnist": "a folder fashion-mnist with its four IDX files, of Debian's and Ubuntu's package "
    "dataset-fashion-mnist or from https://github.com/zalandoresearch/fashion-mnist",
    "cifar-10": "the folder cifar-10-batches-py, from https://www.cs.toronto.edu/~kriz/cifar.html (Python version), or "
    "cifar10_jpeg.tar.xz (the images as train/<class>/*.jpg and test/<class>/*.jpg)",
    "cifar-100": "the folder cifar-100-python, from https://www.cs.toronto.edu/~kriz/cifar.html (Python version)",
}


class Data(NamedTuple):
    """What a network reads, and the classes that it shall answer; the first axis counts samples.

    Images, shapes ``(count, channels, height, width)``, in [0, 1], and their classes, shapes ``(count,)``; or texts,
    shapes ``(count, length)``, and the characters that follow, of the same shapes.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1

    def shrunk(self, factor: int) -> Data:
        """Every image average-pooled by `factor`."""
        if factor == 1:
            return self
        return self._replace(train_x=F.avg_pool2d(self.train_x, factor), test_x=F.avg_pool2d(self.test_x, factor))

    def grey(self) -> Data:
        """One channel, the luminance of ITU-R 601."""
        weights = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)
        grey = [(x * weights).sum(1, keepdim=True) for x in (self.train_x, self.test_x)]
        return self._replace(name=f"grey {self.name}", train_x=grey[0], test_x=grey[1])

    def fewer(self, images: int | None) -> Data:
        """The first `images` training images of a random order that is always the same, and as many test images."""
        parts = []
        for x, y in ((self.train_x, self.train_y), (self.test_x, self.test_y)):
            kept = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:images]
            parts += [x[kept], y[kept]]
        return self if images is None else Data(self.name, *parts)


def _missing(name: str, folder: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{name} is not in {folder}. Expected there (--data names another folder): {SOURCES[name]}"
    )


def _images(pixels: np.ndarray, channels: int, classes: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
    """Bytes ``(count, channels, height, width)`` in any layout of these extents, as a tensor in [0, 1]."""
    size = round((pixels[0].size // channels) ** 0.5)
    x = torch.from_numpy(np.array(pixels)).reshape(len(pixels), channels, size, size)
    return x.float() / 255, torch.tensor(np.asarray(classes), dtype=torch.int64)


def mnist(folder: Path) -> Data:
    path = folder / "mnist.npz"
    if not path.exists():
        return _idx("mnist", [folder / "mnist"], folder)
    with np.load(path) as arrays:
        parts = [_images(arrays[f"{kind}_images"], 1, arrays[f"{kind}_labels"]) for kind in ("train", "test")]
    return Data("MNIST", *parts[0], *parts[1])


def digits() -> Data:
    """scikit-learn's digits, 8 x 8: no files are needed."""
    from gsgd.demo import data

    small = data.digits()
    x = [torch.from_numpy(part).reshape(-1, 1, 8, 8) for part in (small.train_x, small.test_x)]
    return Data("digits", x[0], torch.from_numpy(small.train_y), x[1], torch.from_numpy(small.test_y))


def fashion_mnist(folder: Path) -> Data:
    return _idx("fashion-mnist", [folder / "fashion-mnist", Path("/usr/share/datasets/fashion-mnist")], folder)


def python_topics(length: int) -> Data:
    """The help texts that come with Python, in windows of `length` characters; each tenth is for the test.

    No files are needed. Characters are bytes; those that are rarer than 1 in 10,000 are one symbol.
    """
    return _windows("Python's help", _help(), length)


def python_sources(length: int) -> Data:
    """Modules that come with Python, in windows as `python_topics` has them and in its symbols."""
    return _windows("Python's sources", "\n\n".join(map(inspect.getsource, (argparse, inspect))).encode(), length)


def _help() -> bytes:
    return "\n\n".join(text for _, text in sorted(topics.items())).encode()


def _windows(name: str, text: bytes, length: int) -> Data:
    symbols, counts = np.unique(np.frombuffer(_help(), np.uint8), return_counts=True)
    kept = symbols[counts >= counts.sum() / 10_000]
    number = np.full(256, len(kept))
    number[kept] = np.arange(len(kept))
    codes = torch.from_numpy(number[np.frombuffer(text, np.uint8)])
    windows = codes[: (len(codes) - 1) // length * length].view(-1, length)
    following = codes[1 : windows.numel() + 1].view(-1, length)
    test = torch.arange(len(windows)) // 10 % 10 == 9
    return Data(name, windows[~test], following[~test], windows[test], following[test])


def _idx(name: str, folders: Sequence[Path], named: Path) -> Data:
    for folder in folders:
        if folder.is_dir():
            data = idx_folder(folder)
            size = round(data.train_x.shape[1] ** 0.5)
            x = [torch.from_numpy(part).reshape(-1, 1, size, size) for part in (data.train_x, data.test_x)]
            title = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}[name]
            return Data(title, x[0], torch.from_numpy(data.train_y), x[1], torch.from_numpy(data.test_y))
    raise _missing(name, named)


def cifar10(folder: Path) -> Data:
    batches, tarball = folder / "cifar-10-batches-py", folder / "cifar10_jpeg.tar.xz"
    if batches.is_dir():
        train = [f"data_batch_{i}" for i in range(1, 6)]
        return Data("CIFAR-10", *_batches(batches, train, b"labels"), *_batches(batches, ["test_batch"], b"labels"))
    if tarball.exists():
        return _jpegs(tarball)
    raise _missing("cifar-10", folder)


def cifar100(folder: Path) -> Data:
    batches = folder / "cifar-100-python"
    if not batches.is_dir():
        raise _missing("cifar-100", folder)
    key = b"fine_labels"
    return Data("CIFAR-100", *_batches(batches, ["train"], key), *_batches(batches, ["test"], key))


def _batches(folder: Path, names: Sequence[str], key: bytes) -> tuple[Tensor, Tensor]:
    """CIFAR's own batches. They are pickles, which can run code: read only those that you trust."""
    read = []
    for name in names:
        with open(folder / name, "rb") as file:
            read.append(pickle.load(file, encoding="bytes"))
    return _images(np.concatenate([b[b"data"] for b in read]), 3, np.concatenate([b[key] for b in read]))


def _jpegs(path: Path) -> Data:
    """The images of CIFAR-10 as JPEG files, ``train/<class>/<name>.jpg`` and ``test/<class>/<name>.jpg``."""
    from PIL import Image

    pixels: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "test": []}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".jpg"):
                part, name = member.name.split("/")[-3:-1]
                with Image.open(archive.extractfile(member)) as image:  # type: ignore[arg-type]
                    pixels[part].append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
                names[part].append(name)
    number = {name: i for i, name in enumerate(sorted(set(names["train"])))}
    parts = [_images(np.stack(pixels[k]), 3, [number[n] for n in names[k]]) for k in ("train", "test")]
    return Data("CIFAR-10 (JPEG)", *parts[0], *parts[1])
