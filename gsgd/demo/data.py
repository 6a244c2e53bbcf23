"""The demo's data: scikit-learn's digits, or MNIST-like images in IDX files."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Data:
    """Images as rows of pixels in [0, 1], shapes ``(count, pixels)``, and their classes, shapes ``(count,)``."""

    name: str
    train_x: NDArray[np.floating[Any]]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.floating[Any]]
    test_y: NDArray[np.int64]


def digits() -> Data:
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels; a random fifth of them is for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        (x / 16).astype(np.float32), y.astype(np.int64), test_size=0.2, random_state=0, stratify=y
    )
    return Data("digits", train_x, train_y, test_x, test_y)


def idx_folder(folder: Path) -> Data:
    """MNIST, Fashion-MNIST and their like: four IDX files, gzipped or not, under their usual names.

    Raises
    ------
    FileNotFoundError
        If one of the four is missing.
    """

    def images(kind: str) -> NDArray[np.floating[Any]]:
        pixels = read_idx(_find(folder, f"{kind}-images-idx3-ubyte"))
        return pixels.reshape(len(pixels), -1).astype(np.float32) / 255

    def classes(kind: str) -> NDArray[np.int64]:
        return read_idx(_find(folder, f"{kind}-labels-idx1-ubyte")).astype(np.int64)

    return Data(folder.name, images("train"), classes("train"), images("t10k"), classes("t10k"))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{folder / name}[.gz] is missing. Fashion-MNIST is in Debian's and Ubuntu's package dataset-fashion-mnist "
        f"(apt install dataset-fashion-mnist, then --path /usr/share/datasets/fashion-mnist) and at "
        f"https://github.com/zalandoresearch/fashion-mnist"
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of bytes: two zeros, the type (8), the number of dimensions, big-endian extents, the entries.

    Raises
    ------
    ValueError
        If the file is not that.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = file.read()
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes")
    first = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:first], dtype=">u4").tolist())
    if len(content) - first != math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} entries of shape {shape}, got {len(content) - first}")
    return np.frombuffer(content, dtype=np.uint8, offset=first).reshape(shape)
