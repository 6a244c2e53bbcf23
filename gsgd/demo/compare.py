"""SGD and G-SGD, each from a start and from a randomly rescaled copy of that start.

A positive rescaling of the hidden units changes the weights and not the function. SGD does not know that;
G-SGD steps on path values, which both starts have in common (theorem 4.1 of the paper).
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import gsgd
from gsgd.demo import mlp
from gsgd.demo.data import Data, digits, idx_folder

HIDDEN = (64, 64, 64, 64)
BATCH = 64
METHODS = ("SGD", "G-SGD")
STARTS = ("own", "rescaled")


@dataclass(frozen=True)
class Run:
    """One training. `losses` are over the whole training set, before the first epoch and after each.

    They end with NaN where training diverged.
    """

    losses: list[float]
    test_error: float

    @property
    def diverged(self) -> bool:
        return math.isnan(self.losses[-1])


Runs = dict[tuple[float, str, str], Run]  # by learning rate, method and start


def starts(data: Data, seed: int) -> dict[str, mlp.Params]:
    """A start, and the same function with every hidden unit rescaled by a number log-uniform in [0.1, 10]."""
    rng = np.random.default_rng(seed)
    own = mlp.initial((data.train_x.shape[1], *HIDDEN, 10), rng)
    rescaled = {name: array.copy() for name, array in own.items()}
    net = gsgd.Network.sequential(rescaled)
    gsgd.rescale(rescaled, net, 10 ** rng.uniform(-1, 1, net.num_units))
    return {"own": own, "rescaled": rescaled}


def sgd_step(params: mlp.Params, lr: float, grads: mlp.Params) -> None:
    if not all(np.isfinite(grad).all() for grad in grads.values()):
        raise FloatingPointError("a gradient is not finite")
    for name, grad in grads.items():
        params[name] -= lr * grad


def train(data: Data, start: mlp.Params, method: str, lr: float, epochs: int, progress: tqdm[None]) -> Run:
    """Train a copy of `start`, on the same batches whatever the method and the start."""
    params = {name: array.copy() for name, array in start.items()}
    if method == "G-SGD":
        step = gsgd.GSGD(params, gsgd.Network.sequential(params), lr=lr).step
    else:
        step = partial(sgd_step, params, lr)
    rng = np.random.default_rng(0)
    losses = [mlp.evaluate(params, data.train_x, data.train_y)[0]]
    for _ in range(epochs):
        order = rng.permutation(len(data.train_y))
        for batch in np.split(order, range(BATCH, len(order), BATCH)):
            grads = mlp.gradients(params, data.train_x[batch], data.train_y[batch])
            try:
                step(grads)
            except FloatingPointError:
                return Run([*losses, math.nan], math.nan)
        losses.append(mlp.evaluate(params, data.train_x, data.train_y)[0])
        progress.update()
    return Run(losses, mlp.evaluate(params, data.test_x, data.test_y)[1])


def compare(data: Data, learning_rates: Sequence[float], epochs: int, seed: int) -> Runs:
    """Every learning rate, method and start."""
    begin = starts(data, seed)
    runs: Runs = {}
    keys = list(product(sorted(learning_rates, reverse=True), METHODS, STARTS))
    with tqdm(total=len(keys) * epochs, unit="epoch") as progress, np.errstate(over="ignore", invalid="ignore"):
        for done, (lr, method, start) in enumerate(keys, start=1):
            progress.set_description(f"{method}, learning rate {lr:g}, {start} start")
            runs[lr, method, start] = train(data, begin[start], method, lr, epochs, progress)
            progress.update(done * epochs - progress.n)  # the epochs that a diverged run left out
    return runs


def gap(runs: Runs, lr: float, method: str) -> float:
    """The largest difference of the two starts' training losses, relative to the loss; inf if one alone diverged."""
    own, rescaled = (np.array(runs[lr, method, start].losses) for start in STARTS)
    if len(own) != len(rescaled) or np.isnan(own[-1]) != np.isnan(rescaled[-1]):
        return math.inf
    return float(np.nanmax(np.abs(own - rescaled) / own))


def report(runs: Runs) -> str:
    """The table, and what it shows."""

    def cells(run: Run) -> str:
        return f"{'diverged':>10}{'':12}" if run.diverged else f"{run.losses[-1]:10.4f}{run.test_error:12.1%}"

    rates = list(dict.fromkeys(lr for lr, _, _ in runs))
    lines = [
        f"{'':20}{'own start':>22}{'rescaled start':>22}{'largest relative':>23}",
        f"{'learning rate':20}" + 2 * f"{'loss':>10}{'test error':>12}" + f"{'difference of loss':>23}",
    ]
    for lr, method in product(rates, METHODS):
        own, rescaled = (cells(runs[lr, method, start]) for start in STARTS)
        lines.append(f"{lr:<15g}{method:5}{own}{rescaled}{gap(runs, lr, method):23.1e}")
    lines += [
        "",
        "loss: cross-entropy over the training set after the last epoch. test error: wrong answers.",
        "difference: between the training losses from the two starts, at any epoch; inf: one diverged, or did earlier.",
    ]
    for method, choose, bound, meaning in (
        ("G-SGD", max, "at most", ": rounding, which unstable training amplifies"),
        ("SGD", min, "at least", ", though both starts are the same function"),
    ):
        trained = [lr for lr in rates if not all(runs[lr, method, start].diverged for start in STARTS)]
        if trained:
            value, lr = choose((gap(runs, lr, method), lr) for lr in trained)
            size = "one start alone diverged" if math.isinf(value) else f"{bound} {value:.1e}"
            lines.append(f"{method}: {size} (learning rate {lr:g}){meaning}.")
    return "\n".join(lines)


def plot(runs: Runs, title: str, path: Path) -> None:
    """The loss curves as a picture: one panel for each learning rate."""
    rates = list(dict.fromkeys(lr for lr, _, _ in runs))
    figure = Figure(figsize=(2.6 * len(rates) + 0.8, 4), layout="constrained")
    panels = figure.subplots(1, len(rates), sharex=True, sharey=True, squeeze=False)[0]
    red, blue = "#c1542b", "#1f5fa8"
    for lr, panel in zip(rates, panels, strict=True):
        curves = {key[1:]: run.losses for key, run in runs.items() if key[0] == lr}
        panel.plot(curves["SGD", "own"], color=red, label="SGD")
        panel.plot(curves["SGD", "rescaled"], "--", color=red, label="SGD, rescaled start")
        panel.plot(curves["G-SGD", "own"], color=blue, label="G-SGD")
        every = max(1, len(curves["G-SGD", "own"]) // 12)
        panel.plot(
            curves["G-SGD", "rescaled"], "o", color=blue, mfc="none", markevery=every, label="G-SGD, rescaled start"
        )
        diverged = [f"{method}, {start} start" for (method, start), losses in curves.items() if math.isnan(losses[-1])]
        if diverged:
            text = "diverged:\n" + "\n".join(diverged)
            panel.text(0.04, 0.04, text, transform=panel.transAxes, fontsize="small")
        panel.set(title=f"learning rate {lr:g}", xlabel="epoch", yscale="log")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("training loss (cross-entropy, nats)")
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return integer


def learning_rate(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text}")
    return float(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gsgd.demo", description=__doc__)
    parser.add_argument("--data", choices=["digits", "fashion"], default="digits", help="default: %(default)s")
    parser.add_argument(
        "--path",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the IDX files, for --data fashion (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rates",
        type=learning_rate,
        nargs="+",
        default=[0.3, 0.1, 0.03, 0.01],
        metavar="LR",
        help="default: %(default)s",
    )
    parser.add_argument("--epochs", type=at_least(1), help="default: 40 for digits, 3 for fashion")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of the start and its rescaling (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="the loss curves (default: gsgd-demo-DATA.png)")
    options = parser.parse_args(arguments)
    output = options.output or Path(f"gsgd-demo-{options.data}.png")
    folder = output.parent
    if output.is_dir() or not folder.is_dir() or not os.access(output if output.exists() else folder, os.W_OK):
        parser.error(f"--output {output}: expected a file in a folder that can be written to")
    if output.suffix[1:] not in (formats := Figure().canvas.get_supported_filetypes()):
        parser.error(f"--output {output}: expected a name that ends in one of {', '.join(formats)}")
    try:
        data = digits() if options.data == "digits" else idx_folder(options.path)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    epochs = options.epochs or {"digits": 40, "fashion": 3}[options.data]
    widths = "-".join(map(str, (data.train_x.shape[1], *HIDDEN, 10)))
    title = f"{data.name}: ReLU network {widths}, batches of {BATCH}, {epochs} epochs, seed {options.seed}"
    print(title)
    runs = compare(data, options.learning_rates, epochs, options.seed)
    print(f"\n{report(runs)}\n")
    plot(runs, title, output)
    print(f"Loss curves: {output.resolve()}")
