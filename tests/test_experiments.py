"""The experiments at a tiny scale, on data made here."""

import io
import pickle
import re
import runpy
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
Command = Callable[..., str]


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few random images in the files of MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    grey = {kind: rng.integers(0, 256, (n, 28, 28), np.uint8) for kind, n in (("train", 64), ("test", 20))}
    labels = {kind: (np.arange(len(x)) % 10).astype(np.uint8) for kind, x in grey.items()}
    np.savez(
        folder / "mnist.npz", **{f"{k}_{w}": d[k] for w, d in (("images", grey), ("labels", labels)) for k in grey}
    )
    (folder / "fashion-mnist").mkdir()
    for kind, name in (("train", "train"), ("test", "t10k")):
        (folder / "fashion-mnist" / f"{name}-images-idx3-ubyte").write_bytes(idx(grey[kind]))
        (folder / "fashion-mnist" / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels[kind]))
    for name, batches, key, classes in (
        ("cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], b"labels", 10),
        ("cifar-100-python", ["train", "test"], b"fine_labels", 100),
    ):
        (folder / name).mkdir()
        for batch in batches:
            pixels = rng.integers(0, 256, (100, 3072), np.uint8)
            content = {b"data": pixels, key: [i % classes for i in range(100)]}
            (folder / name / batch).write_bytes(pickle.dumps(content))
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> Command:
    """``python experiments ...`` in this process; what it wrote to table.md."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    threads = torch.get_num_threads()

    def run(name: str, *arguments: str, out: Path = tmp_path / "out", data: Path = folder) -> str:
        given = [] if name == "throughput" else ["--data", str(data)]
        monkeypatch.setattr(sys, "argv", ["experiments", name, *given, "--out", str(out), *arguments])
        runpy.run_path(str(EXPERIMENTS), run_name="__main__")
        return (out / "table.md").read_text()

    yield run
    torch.set_num_threads(threads)


# heads of 16 channels are the smallest
TEXTS = ("--epochs", "1", "--seeds", "1", "--rates", "0.1", "--images", "64", "--width", "16")
TINY = ("--epochs", "1", "--seeds", "1", "--rates", "0.1", "--images", "32", "--width", "4")


# some of what a command trains, where all of it is the same many times over
@pytest.mark.parametrize(
    ("name", "chosen", "settings"),
    [
        ("invariance", [], ["h = 4"]),
        ("rescaled", [], ["k = 0", "k = 3"]),
        ("basis", [], ["49-4x3-10", "49-4x3-10, momentum 0.9", "CIFAR-10, Plain-10, 1 maps"]),
        ("signs", [], ["49-4-4-10", "CIFAR-10, Plain-10, 1 maps"]),
        ("path_sgd", [], ["MNIST, 5 x 4", "grey CIFAR-10, 5 x 4"]),
        ("robust", [], ["784-4x5-10, biases, momentum 0", "784-4x5-10, biases, momentum 0.9"]),
        ("robust_cnn", ["--nets", "Plain-10"], ["CIFAR-10, Plain-10, 4 maps", "CIFAR-10, CNN without BN, 4 maps"]),
        (
            "regularization",
            ["--only", "lambda = 0:", "lambda = 5e-05:"],
            ["CIFAR-10, ResNet-10, 4 maps, lambda = 0", "CIFAR-10, ResNet-10, 4 maps, lambda = 5e-05"],
        ),
        ("cifar", ["--nets", "Plain-10", "ResNet-10"], ["CIFAR-10, Plain-10, 4 maps", "CIFAR-10, ResNet-10, 4 maps"]),
        ("paper_5_1", ["--nets", "Plain-10"], ["CIFAR-10, Plain-10, 4 maps"]),
        (
            "modern",
            ["--without", "Fashion-MNIST, 784-4x5-10; own", "MNIST, 784-4x5-10; rescaled by up to 10:"],
            ["MNIST, 784-4x5-10; own start", "Fashion-MNIST, 784-4x5-10; rescaled by up to 100"],
        ),
        ("transformer", [], ["Python's help, 2 layers of 16, ReLU; own start"]),
        ("lora", [], ["Python's sources, rank 4 on 2 layers of 16; own start"]),
        (
            "modern_cnn",
            ["--families", "AdamW"],
            ["CIFAR-10, CNN without BN, 4 maps; own start", "CIFAR-10, CNN with BN, 4 maps; own start"],
        ),
    ],
)
def test_every_command_trains_every_method(
    command: Command, tmp_path: Path, name: str, chosen: list[str], settings: list[str]
) -> None:
    from training import COLUMNS, read_rows

    text = command(name, *(TEXTS if name in ("transformer", "lora") else TINY), *chosen)
    rows = read_rows(tmp_path / "out")
    assert tuple(rows[0]) == COLUMNS
    assert {row["setting"] for row in rows} >= set(settings)
    for row in rows:
        assert f"**{row['setting']}**" in text
        assert f"| {row['method']} |" in text
        assert row["train_loss"] > 0
        assert row["test_loss"] > 0
        assert 0 <= row["test_error"] <= 1
    compared = {row["method"] for row in rows}
    if name in ("invariance", "rescaled", "path_sgd", "cifar"):
        assert compared >= {"SGD, default start", "SGD, He start", "SGD, ones start", "G-SGD ones (paper)", "AdamW"}
    assert ("Path-SGD" in compared) == (name in ("rescaled", "path_sgd"))
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_released_lines_describe_the_network_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from architectures import CONV_NETS, ConvNet
    from methods import Method, paper_lines, start

    import gsgd.torch

    maps = [2] * 6 + [4] * 8 + [8] * 12 + [16] * 6  # of 32 convolutions
    ends = (5, 13, 25, 31)  # the last ones of each stage
    expected = {
        "Plain-34": [2 + sum(maps), sum(maps[:-1]), sum(maps) - sum(maps[i] for i in ends)],
        "ResNet-34": [sum(maps[::2])] * 3,  # within blocks alone
    }
    for name, units in expected.items():
        blocks, shortcut = CONV_NETS[name]
        traced = {n: m.trace for n, m in paper_lines(blocks, shortcut).items() if n.startswith("G-SGD ones")}
        nets = [gsgd.torch.trace(ConvNet(blocks, 2, shortcut, 10), **trace) for trace in traced.values()]
        assert [net.num_units for net in nets] == units
        for net in nets[1:]:
            assert not {"conv1.weight", "fc.weight"} & set(net.shapes)
        assert not any("downsample" in parameter for parameter in nets[2].shapes)
        starts = []
        for trace in list(traced.values())[1:]:
            torch.manual_seed(0)
            model = ConvNet(blocks, 2, shortcut, 10)
            start(model, Method("default", "SGD", skeleton="ones", trace=trace), torch.zeros(2, 3, 16, 16), 0)
            starts.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(*starts)


@pytest.mark.parametrize("every", [0, 2])
def test_balanced_lines_are_balanced(every: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms in and out of every unit are equal at the start, and after the steps at which it is balanced again."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from plans import PLANS
    from training import Training

    plan = PLANS["modern"]
    scale = replace(plan.laptop, images=64, widths=(4,))
    name = "AdamW, balanced every 100" if every else "AdamW, balanced once"
    run = next(run for run in plan.runs(scale, folder) if run.name == name)
    run = replace(run, method=replace(run.method, balance=every), task=replace(run.task, batch=16, rescaled=1))

    def unbalanced(model: torch.nn.Module) -> float:
        layers = [m for m in model if isinstance(m, torch.nn.Linear)]
        pairs = pairwise(layers)
        norms = [(a.weight.square().sum(1) + a.bias.square(), b.weight.square().sum(0)) for a, b in pairs]
        return max((i / o).log().abs().nan_to_num(0, 0, 0).max().item() for i, o in norms)

    training = Training(run, 1, torch.device("cpu"))
    assert unbalanced(training.model) < 1e-4
    training.epoch(1)  # four steps
    assert (unbalanced(training.model) < 1e-4) == bool(every)


def test_the_cosine_schedule_ends_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from training import Task

    cosine, steps = (Task(None, None, schedule=kind) for kind in ("cosine", "steps"))
    assert [round(cosine.factor(t, 4), 3) for t in (0, 1, 2, 3, 4)] == [1, 0.854, 0.5, 0.146, 0]
    assert [steps.factor(t, 4) for t in (0, 1.9, 2, 2.9, 3)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_the_character_model_sees_no_later_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from architectures import CharacterModel
    from data import python_topics

    import gsgd.torch

    data = python_topics(16)
    assert torch.equal(data.train_x[0, 1:], data.train_y[0, :-1])
    for gated, units in ((False, 5 * 32 + 2 * 32 + 2 * 128), (True, 5 * 32 + 2 * 32 + 2 * 85)):
        model = CharacterModel(data.classes, 16, 32, 2, gated)
        x = data.train_x[:3]
        before = model(x)
        later = x.clone()
        later[:, 9:] = (later[:, 9:] + 1) % data.classes
        torch.testing.assert_close(model(later)[:, :9], before[:, :9])
        assert (model(later)[:, 9:] - before[:, 9:]).abs().max() > 1e-3
        net = gsgd.torch.trace(model, x)
        assert net.num_units == units
        gsgd.torch.verify(model, net, x)


def test_path_conditioning_is_a_minimum_that_rescaling_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from architectures import mlp
    from conditioning import path_condition
    from methods import arrays_of

    import gsgd.torch
    from gsgd.paths import path_kappa

    torch.manual_seed(0)
    model = mlp((5, 7, 6, 3), bias=True).double()
    net, x, rng = gsgd.torch.trace(model), torch.rand(9, 5, dtype=torch.float64), np.random.default_rng(0)
    arrays, function = arrays_of(model), model(x)

    def divergence() -> float:
        kappa = np.concatenate([k.ravel() for k in path_kappa(arrays, net).values()])
        return kappa.size * np.log(kappa.sum()) - np.log(kappa).sum()

    path_condition(arrays, net)
    torch.testing.assert_close(model(x), function)
    kept, least = {name: a.copy() for name, a in arrays.items()}, divergence()
    for _ in range(20):
        gsgd.rescale(arrays, net, 10 ** rng.uniform(-0.1, 0.1, net.num_units))
        assert divergence() > least
    gsgd.rescale(arrays, net, 10 ** rng.uniform(-2, 2, net.num_units))
    path_condition(arrays, net)
    for name, a in arrays.items():
        np.testing.assert_allclose(a, kept[name], rtol=1e-4)


def test_drift_is_of_path_values(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No rescaling moves them; with ten times the first layer's weights they are ten times as large."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from drift import Paths
    from methods import arrays_of
    from plans import PLANS
    from training import Training

    import gsgd.torch

    plan = PLANS["modern"]
    run = next(iter(plan.runs(replace(plan.laptop, images=32, widths=(4,)), folder)))
    training = Training(run, 1, torch.device("cpu"))
    net = gsgd.torch.trace(training.model)
    for rule in ("modulo", "largest"):
        paths = Paths(training, rule)
        gsgd.rescale(arrays_of(training.model), net, 10 ** np.random.default_rng(0).uniform(-1, 1, net.num_units))
        drift, changed = paths.drift()
        assert drift.max() < 1e-5
        assert changed == 0
    with torch.no_grad():
        training.model[1].weight *= -10
    drift, changed = paths.drift()
    np.testing.assert_allclose(drift, 1, rtol=1e-5)
    assert changed == 1


def test_drift_of_each_rule(command: Command) -> None:
    text = command("drift", *TEXTS)
    found = re.findall(r"^\| ([^|]*) \| 0.03 \| (\w+) \|", text, re.MULTILINE)
    assert found == [("AdamW", "modulo"), ("AdamW", "largest"), ("GAdam", "modulo"), ("GAdam, largest", "largest")]


def test_throughput_is_relative_to_sgd(command: Command) -> None:
    text = command("throughput", "--rounds", "1", "--width", "1", "--batch", "2")
    assert text.count("| 1.000 |") >= 3
    assert text.count("G-SGD balanced") == 3
    assert text.count("GAdam") == 2


def test_the_paper_protocol_has_the_paper_s_scale(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from plans import PLANS, counts

    runs = PLANS["cifar"].runs(PLANS["cifar"].paper, folder)
    settings = {run.setting: run.task for run in runs}
    nets = ("Plain-34, 64 maps", "ResNet-34, 64 maps", "ResNet-110, 16 maps")
    assert list(settings) == [f"{d}, {n}" for d in ("CIFAR-10", "CIFAR-100") for n in nets]
    depths = {}
    for setting, task in settings.items():
        kernels = [m for m in task.model().modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
        depths[setting] = len(kernels) + 1
        assert task.schedule == "steps"
        assert task.augment
        assert task.batch == 128
    assert list(depths.values()) == [34, 34, 110] * 2
    table6 = counts(PLANS["invariance"].paper.widths)
    for h, weights in zip(
        (8, 16, 32, 64, 128, 256, 512, 1024), (536, 1200, 2912, 7872, 23936, 80640, 292352, 1108992), strict=True
    ):
        assert f"| {h} | {weights} | {2 * h} |" in table6


def test_an_interrupted_command_continues_to_the_same_lines(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training

    arguments = ("basis", *TINY, "--epochs", "3", "--only", "momentum 0.9", "BN exact")
    whole = command(*arguments, out=tmp_path / "whole")
    own, calls = training.Training.epoch, 0

    def interrupting(*given: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 8 == 0:
            raise KeyboardInterrupt
        own(*given)

    monkeypatch.setattr(training.Training, "epoch", interrupting)
    for _ in range(100):
        try:
            assert command(*arguments, out=tmp_path / "parts") == whole
            break
        except KeyboardInterrupt:
            pass
    assert calls > 20
    lines = [(tmp_path / out / "epochs.csv.gz").read_bytes() for out in ("whole", "parts")]
    assert lines[0] == lines[1]
    assert not list(tmp_path.glob("*/checkpoint*"))


def test_results_of_other_settings_are_not_mixed(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("invariance", *TINY)
    first = command(*arguments)
    assert "Changed here: epochs 1, seeds 1, widths (4,), rates (0.1,), images 32" in first
    assert command(*arguments) == first
    with pytest.raises(SystemExit):
        command(*arguments, "--epochs", "2")
    assert "epochs 1 there, 2 now" in capsys.readouterr().err
    assert command(*arguments, "--seeds", "2", "--trained") == first.replace("seeds 1", "seeds 2").replace(
        "1 seeds", "2 seeds"
    )
    both = command(*arguments, "--seeds", "2")
    assert both.count("|") == first.count("|")
    assert both.count("±") == first.count("±") + 4  # of one seed no interval


def test_networks_and_data_sets_are_chosen(command: Command) -> None:
    arguments = ("cifar", *TINY, "--only", "SGD, He start")
    text = command(*arguments, "--nets", "Plain-34", "--sets", "cifar-100")
    assert "**CIFAR-100, Plain-34, 4 maps**" in text
    text = command(*arguments, "--nets", "Plain-34", "ResNet-10", "--sets", "cifar-100")
    assert text.count("| SGD, He start |") == 2


def test_one_line_alone(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    text = command("path_sgd", *TINY, "--only", "grey CIFAR-10, 5 x 4: Path-SGD")
    assert text.count("| Path-SGD |") == 1
    assert "SGD, He start" not in text
    assert "SGD, He start" in command("path_sgd", *TINY)
    with pytest.raises(SystemExit):
        command("path_sgd", *TINY, "--only", "Adagrad")
    assert "--only 'Adagrad', --without '': no setting" in capsys.readouterr().err
    text = command("path_sgd", *TINY, "--without", "MNIST", "start")
    assert text.count("| Path-SGD |") == 1
    assert "SGD, He start" not in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("path_sgd", "mnist is not in .*mnist.npz.*IDX"),
        ("cifar", "cifar-10 is not in .*cifar-10-batches-py.*cs.toronto.edu"),
    ],
)
def test_missing_data_says_where_to_get_it(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    with pytest.raises(SystemExit):
        command(name, data=tmp_path)
    assert re.search(said, capsys.readouterr().err)


def test_loaders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import data

    digits, clothes = data.mnist(folder), data.fashion_mnist(folder)
    for one, other in zip(digits[1:], clothes[1:], strict=True):
        torch.testing.assert_close(one, other)
    assert digits.shrunk(4).train_x.shape == (64, 1, 7, 7)
    assert digits.shrunk(4).train_x[3, 0, 1, 2].item() == pytest.approx(digits.train_x[3, 0, 4:8, 8:12].mean().item())
    kept = digits.fewer(10)
    at = next(i for i in range(64) if torch.equal(digits.train_x[i], kept.train_x[7]))
    assert digits.train_y[at] == kept.train_y[7]

    cifar = data.cifar10(folder)
    assert cifar.train_x.shape == (500, 3, 32, 32)
    batch = pickle.loads((folder / "cifar-10-batches-py" / "data_batch_2").read_bytes())
    assert cifar.train_x[103, 1, 2, 5].item() == pytest.approx(batch[b"data"][3, 1024 + 2 * 32 + 5] / 255)
    assert data.cifar100(folder).classes == 100
    assert cifar.grey().test_x.shape == (100, 1, 32, 32)

    with tarfile.open(tmp_path / "cifar10_jpeg.tar.xz", "w:xz") as archive:
        for kind in ("train", "test"):
            for name, colour in (("bird", (200, 10, 90)), ("airplane", (0, 120, 255))):
                content = io.BytesIO()
                Image.new("RGB", (32, 32), colour).save(content, "JPEG")
                member = tarfile.TarInfo(f"{kind}/{name}/0000.jpg")
                member.size = content.tell()
                content.seek(0)
                archive.addfile(member, content)
    jpegs = data.cifar10(tmp_path)
    assert "JPEG" in jpegs.name
    assert jpegs.train_y.tolist() == [1, 0]
    np.testing.assert_allclose(jpegs.train_x[0, :, 5, 6] * 255, (200, 10, 90), atol=6)


@pytest.mark.parametrize("net", ["mlp", "Plain-34", "ResNet-34"])
def test_sgd_starts_where_g_sgd_ones_starts(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from architectures import CONV_NETS, ConvNet, mlp
    from methods import METHODS, optimizer, start

    models = {}
    for name in ("SGD, He start", "SGD, ones start", "G-SGD ones (paper)"):
        torch.manual_seed(3)
        model = mlp((6, 4, 5, 3)) if net == "mlp" else ConvNet((1, 1), 2, CONV_NETS[net][1], 10)
        example = torch.zeros(2, 6) if net == "mlp" else torch.zeros(2, 3, 8, 8)
        start(model, METHODS[name], example, 3)
        optimizer(model, METHODS[name], example, 0.1)
        models[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    he, ones, gsgd = models.values()
    assert torch.equal(ones, gsgd)
    assert (ones[ones != he] == 1).all()
    assert (ones != he).sum() >= 4


def test_crops_are_windows_of_the_padded_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from training import cropped

    x = torch.arange(1.0, 1 + 20 * 2 * 64).reshape(20, 2, 8, 8)
    crops = cropped(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    found = set()
    for image, crop in zip(padded, crops, strict=True):
        windows = {(i, j, flip): image[:, i : i + 8, j : j + 8] for i in range(9) for j in range(9) for flip in (0, 1)}
        same = [at for at, w in windows.items() if torch.equal(w.flip(2) if at[2] else w, crop)]
        assert same
        found.add(same[0])
    assert len(found) > 10
    assert {flip for _, _, flip in found} == {0, 1}


def test_diverged_runs_are_reported_and_never_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import report
    from methods import METHODS
    from training import COLUMNS, Run

    losses = {1.0: (0.1, float("nan")), 0.1: (0.3, 0.5), 0.01: (0.9, float("nan"))}
    rows, runs = [], []
    for name, (lr, ends) in product(METHODS, losses.items()):
        for seed, loss in enumerate(ends):
            if name != "G-SGD balanced" or lr != 0.1:  # all that it has diverged
                rows.append(dict(zip(COLUMNS, ("k = 1", name, lr, seed, 1, loss, loss, loss / 2, 0), strict=True)))
                runs.append(Run("k = 1", name, lr, seed, None, replace(METHODS[name], lr_factor=1.0)))
    text = report.table(runs, rows)
    assert "| SGD, He start | diverged | 0.4 ± 0.14 | diverged | 0.1 | 20.00 ± 7.07 % |" in text
    assert "| G-SGD balanced | diverged |  | diverged |  | diverged |" in text
    rows = [row for row in rows if row["method"] != "G-SGD balanced"] + [
        row | {"method": "G-SGD balanced"} for row in rows if row["method"] == "G-SGD initial"
    ]
    assert "| k = 1 | best | 0 ± 0, 0.00 ± 0.00 pt |" in report.gains(rows)
    assert "| k = 1 | 1 | diverged |" in report.gains(rows)
    report.curves(rows, "", tmp_path / "curves.png")
    report.against_setting([r for r in rows if r["lr"] != 0.1], "k", "", tmp_path / "settings.png")
    assert len(list(tmp_path.glob("*.png"))) == 2
