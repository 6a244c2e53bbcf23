"""The demo at a tiny scale, and its reader of IDX files."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from gsgd.demo import compare
from gsgd.demo.data import idx_folder, read_idx


def test_rescaling_wrecks_sgd_and_leaves_gsgd_on_its_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "curves.png"
    compare.main(["--learning-rates", "0.1", "--epochs", "2", "--output", str(picture)])
    printed = capsys.readouterr().out
    sgd, g_sgd = (re.search(rf"^0\.1 +{method} .* (\S+)$", printed, re.M) for method in compare.METHODS)
    assert sgd is not None
    assert g_sgd is not None
    assert float(sgd[1]) > 0.1
    assert float(g_sgd[1]) < 1e-9
    assert str(picture) in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        "--epochs 0",
        "--epochs -1",
        "--seed -1",
        "--learning-rates 0.1 -1",
        "--learning-rates inf",
        "--output {}",
        "--output {}/missing/curves.png",
        "--output {}/curves.unknown",
        "--data fashion --path {}",
    ],
)
def test_mistakes_are_told_before_any_training(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit):
        compare.main(arguments.format(tmp_path).split())
    assert re.search(rf"error: (argument )?{arguments.split()[0]}|error: {tmp_path}", capsys.readouterr().err)


def test_the_report_on_divergence() -> None:
    done, diverged = compare.Run([2.0, 1.0], 0.5), compare.Run([2.0, np.nan], np.nan)
    runs = {(lr, method, start): done for lr in (1.0, 0.1) for method in compare.METHODS for start in compare.STARTS}
    for key in (1.0, "SGD", "own"), (1.0, "SGD", "rescaled"), (1.0, "G-SGD", "own"), (0.1, "SGD", "own"):
        runs[key] = diverged
    *_, g_sgd, sgd = compare.report(runs).splitlines()
    assert g_sgd.startswith("G-SGD: one start alone diverged (learning rate 1): rounding")
    assert sgd.startswith("SGD: one start alone diverged (learning rate 0.1), though")


def test_gradients_are_those_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    params = compare.mlp.initial((5, 4, 3, 3), rng)
    x, y = rng.normal(size=(7, 5)), rng.integers(0, 3, 7)
    grads = compare.mlp.gradients(params, x, y)
    for name, weight in params.items():
        for at in np.ndindex(weight.shape):
            losses = []
            for move in (1e-6, -2e-6):
                weight[at] += move
                losses.append(compare.mlp.evaluate(params, x, y)[0])
            weight[at] += 1e-6
            assert grads[name][at] == pytest.approx((losses[0] - losses[1]) / 2e-6, abs=1e-7)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_idx_folder_reads_plain_and_gzipped_files(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 300, dtype=np.uint8).reshape(2, 3, 300)
    labels = np.array([7, 2], np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte.*dataset-fashion-mnist"):
        idx_folder(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:1])))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:1]))
    data = idx_folder(tmp_path)
    np.testing.assert_allclose(data.train_x, images.reshape(2, 900) / 255, rtol=1e-6)
    assert data.train_y.tolist() == [7, 2]
    assert data.test_x.shape == (1, 900)
    assert data.test_y.tolist() == [7]


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x0d\1\0\0\0\0", b"\0\0\x08\2\0\0\0\1", idx(np.zeros(5, np.uint8))[:-1]]
)
def test_what_is_no_idx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken: expected"):
        read_idx(path)
