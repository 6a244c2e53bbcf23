"""Draw the documentation's pictures into docs/pictures: `python docs/figures.py`.

Every number in them is computed here, by gsgd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

import gsgd
import gsgd.torch
from gsgd.demo.compare import compare
from gsgd.demo.data import Data, digits

FOLDER = Path(__file__).parent / "pictures"
RED, BLUE, GREEN, GREY = "#c1542b", "#1f5fa8", "#2d7d46", "#8a8f98"
Weights = dict[str, NDArray[np.float64]]
Place = tuple[float, float]

mpl.rcParams["svg.hashsalt"] = "gsgd"  # the same file every time
mpl.rcParams["svg.fonttype"] = "path"


def save(figure: Figure, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, facecolor="white")


@dataclass(frozen=True)
class Edge:
    """One weight `name[index]` between two places of a drawing."""

    name: str
    index: tuple[int, int]
    begin: Place
    end: Place


class Drawing:
    """A perceptron: a column of circles for every layer, from left to right."""

    def __init__(self, axes: Axes, widths: list[int], labels: list[str], size: float = 10) -> None:
        self.axes, self.widths = axes, widths
        self.places = [[(1.6 * k, (n - 1) / 2 - i) for i in range(n)] for k, n in enumerate(widths)]
        names = iter(labels)
        for k, column in enumerate(self.places):
            for x, y in column:
                hidden = 0 < k < len(widths) - 1
                face = "white" if hidden else "#eceef1"
                axes.plot(x, y, "o", ms=3.2 * size, mfc=face, mec="black", zorder=3, clip_on=False)
                axes.text(x, y, next(names), ha="center", va="center", fontsize=size, zorder=4)
        axes.margins(0.06, 0.2)
        axes.axis("off")

    def edges(self) -> Iterator[Edge]:
        for k, (reads, writes) in enumerate(zip(self.places, self.places[1:], strict=False), start=1):
            for i, end in enumerate(writes):
                for j, begin in enumerate(reads):
                    yield Edge(f"w{k}", (i, j), begin, end)

    def draw(self, edge: Edge, color: str, width: float = 1.8, style: str = "-", text: str = "") -> None:
        (x0, y0), (x1, y1) = edge.begin, edge.end
        self.axes.plot([x0, x1], [y0, y1], style, color=color, lw=width, zorder=1)
        if text:
            near = 0.36  # where crossing edges do not cover each other's numbers
            self.axes.text(
                x0 + near * (x1 - x0),
                y0 + near * (y1 - y0),
                text,
                ha="center",
                va="center",
                fontsize=8.5,
                color=color,
                zorder=2,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )


def two_starts() -> None:
    """SGD and G-SGD on the digits, from a start and from a rescaled copy of it."""
    rates = [0.03, 0.01]
    runs = compare(digits(), rates, epochs=40, seed=0)
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for lr, panel in zip(rates, panels, strict=True):
        for method, color in (("SGD", RED), ("G-SGD", BLUE)):
            own, other = runs[lr, method, "own"].losses, runs[lr, method, "rescaled"].losses
            panel.plot(own, color=color, lw=5, alpha=0.35, label=f"{method}, own start")
            panel.plot(other, "--", color=color, lw=1.8, label=f"{method}, rescaled start")
        panel.set(title=f"learning rate {lr:g}", xlabel="epoch", yscale="log")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("training loss")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, "two-starts")


def unit() -> None:
    """One unit, as it is and with its knob turned to 2."""
    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    incoming, outgoing = [0.5, -1.0, 0.8], [0.6, -0.4]
    for panel, c in zip(figure.subplots(1, 2), (1, 2), strict=True):
        drawing = Drawing(panel, [3, 1, 2], ["", "", "", "ReLU", "", ""], size=9)
        weights = [w * c for w in incoming] + [w / c for w in outgoing]
        for edge, w in zip(drawing.edges(), weights, strict=True):
            drawing.draw(edge, BLUE if edge.name == "w1" else GREEN, text=f"{w:g}")
        turned = r"incoming $\times$ 2, outgoing $\div$ 2: the same function"
        panel.set_title("a unit" if c == 1 else turned, fontsize=10.5)
    save(figure, "unit")


def small() -> tuple[Weights, gsgd.Network]:
    """Three units: two that read two inputs, one that reads these, one output."""
    params = {
        "w1": np.array([[1.0, 0.5], [-0.5, 1.5]]),
        "w2": np.array([[0.8, 1.2]]),
        "w3": np.array([[1.0]]),
    }
    return params, gsgd.Network.sequential(params)


LABELS = ["$x_1$", "$x_2$", "$a$", "$b$", "$c$", "$y$"]


def edge_colors(params: Mapping[str, NDArray[np.float64]], net: gsgd.Network) -> dict[tuple[str, tuple[int, ...]], str]:
    """Green for the weights that stay, blue for the other in-edges."""
    skeleton = gsgd.Skeleton(net, params)
    colors = {edge: BLUE for edge in skeleton.in_edges if edge is not None}
    return colors | {edge: GREEN for edge in skeleton.out_edges if edge is not None}


def skeleton() -> None:
    """The skeleton of the small network, and the path that every other weight owns."""
    params, net = small()
    colors = edge_colors(params, net)
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.9, 1))
    drawing = Drawing(top.subplots(), [2, 2, 1, 1], LABELS)
    for edge in drawing.edges():
        color = colors.get((edge.name, edge.index), GREY)
        drawing.draw(edge, color, 3 if color != GREY else 1.5, text=f"{params[edge.name][edge.index]:g}")
    for color, label in (
        (GREEN, "out-edges: one for each unit; they never move"),
        (BLUE, "in-edges (that of $c$ is $a$'s out-edge)"),
        (GREY, "all other weights"),
    ):
        drawing.axes.plot([], [], color=color, lw=3, label=label)
    top.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    values = gsgd.Skeleton(net, params).path_values(params)
    for panel, (i, j) in zip(bottom.subplots(1, 4), np.ndindex(2, 2), strict=True):
        path = Drawing(panel, [2, 2, 1, 1], LABELS, size=6)
        on_path = {("w1", (i, j)), ("w2", (0, i)), ("w3", (0, 0))}
        for edge in path.edges():
            owner = edge.name == "w1" and edge.index == (i, j)
            color = colors.get((edge.name, edge.index), GREY) if (edge.name, edge.index) in on_path else "#e3e5e8"
            path.draw(edge, color, 4.5 if owner else 2)
        factors = [params["w1"][i, j], params["w2"][0, i], params["w3"][0, 0]]
        product = r" $\times$ ".join(f"{w:g}" for w in factors)
        panel.set_title(f"{product} = {values['w1'][i, j]:.3g}", fontsize=8.5)
    save(figure, "skeleton")


def gradients(params: Weights) -> Weights:
    """Of half the squared error of the output at one sample."""
    x, target = np.array([1.0, 0.6]), 0.5
    h1 = np.maximum(params["w1"] @ x, 0)
    h2 = np.maximum(params["w2"] @ h1, 0)
    error = params["w3"] @ h2 - target
    back2 = params["w3"].T @ error * (h2 > 0)
    back1 = params["w2"].T @ back2 * (h1 > 0)
    return {"w1": np.outer(back1, x), "w2": np.outer(back2, h1), "w3": np.outer(error, h2)}


def one_step() -> None:
    """The path values of two rescalings of one network: before a step, after SGD's and after G-SGD's."""
    lr = 0.1
    params, net = small()
    rescaled = {name: w.copy() for name, w in params.items()}
    gsgd.rescale(rescaled, net, [2.0, 1.0, 0.5])
    colors = edge_colors(params, net)
    figure = Figure(figsize=(8.4, 5.8), layout="constrained")
    panels = figure.subplots(2, 2, height_ratios=(1, 1.2))
    names = ["$x_1ac\\,y$", "$x_2ac\\,y$", "$x_1bc\\,y$", "$x_2bc\\,y$"]
    for title, weights, (top, bottom) in zip(
        ("the weights as they are", "the same function: $a$ rescaled by 2, $c$ by ½"),
        (params, rescaled),
        panels.T,
        strict=True,
    ):
        drawing = Drawing(top, [2, 2, 1, 1], LABELS)
        for edge in drawing.edges():
            color = colors.get((edge.name, edge.index), GREY)
            drawing.draw(edge, color, 2.5, text=f"{weights[edge.name][edge.index]:.3g}")
        top.set_title(title, fontsize=10.5)

        def paths(w: Weights) -> NDArray[np.float64]:
            return (w["w3"] * w["w2"]).T * w["w1"]

        grads = gradients(weights)
        sgd = {name: w - lr * grads[name] for name, w in weights.items()}
        stepped = {name: w.copy() for name, w in weights.items()}
        gsgd.GSGD(stepped, net, lr=lr).step(grads)
        for k, (label, color, w) in enumerate(
            (("before", "#c9ccd1", weights), ("after a step of SGD", RED, sgd), ("of G-SGD", BLUE, stepped))
        ):
            bars = bottom.bar(np.arange(4) + 0.27 * (k - 1), paths(w).ravel(), 0.25, color=color, label=label)
            bottom.bar_label(bars, fmt="%.2f", fontsize=6.5, padding=1)
        bottom.set_xticks(range(4), names)
        bottom.axhline(0, color="black", lw=0.8)
        bottom.set_ylim(-1.5, 2.1)
        for side in ("top", "right"):
            bottom.spines[side].set_visible(False)
    panels[1, 0].set_ylabel("path value")
    figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, "one-step")


def trained_cnn(data: Data) -> nn.Sequential:
    """Convolutions with a residual block, trained on the digits."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), Residual(body), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64), nn.ReLU()),
        nn.Linear(64, 10),
    )
    x, y = images(data.train_x), torch.from_numpy(data.train_y)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def images(x: NDArray[np.floating[Any]]) -> torch.Tensor:
    return torch.from_numpy(x).reshape(-1, 1, 8, 8)


def in_int8(model: nn.Module) -> nn.Module:
    """A copy whose weights are multiples of one step per tensor, 127 either way; biases are not rounded."""
    rounded = deepcopy(model)
    with torch.no_grad():
        for p in rounded.parameters():
            if p.ndim > 1:
                step = p.abs().max() / 127
                p.copy_((p / step).round() * step)
    return rounded


def int8() -> None:
    """Rounding a trained and rescaled network's weights to 8 bits, before and after equalizing them."""
    data = digits()
    x, y = images(data.test_x), torch.from_numpy(data.test_y)
    model = trained_cnn(data)
    net = gsgd.torch.trace(model, x[:1])
    exact = model(x).detach()
    spreads, seeds = [0, 0.5, 1, 1.5, 2], range(5)  # powers of ten either way
    lines: dict[str, Callable[[nn.Module], None]] = {
        "as it is": lambda model: None,
        "balance(model)": lambda model: gsgd.torch.balance(model, net),
        'balance(model, norm="max")': lambda model: gsgd.torch.balance(model, net, "max"),
    }
    found = np.zeros((2, len(lines), len(spreads), len(seeds)))  # error of the outputs, wrong classes
    for i, spread in enumerate(spreads):
        for j, seed in enumerate(seeds):
            exponents = np.random.default_rng(seed).uniform(-spread, spread, net.num_units)
            for k, prepare in enumerate(lines.values()):
                rescaled = deepcopy(model)
                gsgd.torch.rescale(rescaled, net, 10**exponents)
                prepare(rescaled)
                with torch.no_grad():
                    outputs = in_int8(rescaled)(x)
                found[:, k, i, j] = (outputs - exact).norm() / exact.norm(), (outputs.argmax(1) != y).float().mean()
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, values, label in zip(panels, (100 * found[0], 100 * found[1]), ("outputs", "classes"), strict=True):
        for k, (name, color) in enumerate(zip(lines, (RED, GREY, BLUE), strict=True)):
            panel.plot(spreads, values[k].mean(1), "o-", color=color, label=name)
            panel.fill_between(spreads, values[k].min(1), values[k].max(1), color=color, alpha=0.2, lw=0)
        panel.set(xlabel=r"$r$, units rescaled by $10^{-r}$ to $10^{r}$", xticks=spreads)
        panel.grid(alpha=0.25)
        print(label, *(f"{name}: {values[k].mean(1).round(2)}" for k, name in enumerate(lines)), sep="\n  ")
    panels[0].set(ylabel="relative error of outputs, %", yscale="log")
    panels[1].set(ylabel="test images classified wrongly, %")
    panels[1].axhline(
        100 * float((exact.argmax(1) != y).float().mean()), color="black", lw=0.8, ls=":", label="float32"
    )
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, "int8")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in (unit, skeleton, one_step, two_starts, int8):
        draw()
