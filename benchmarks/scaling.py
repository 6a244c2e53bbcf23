"""How cost grows with the number of weights: construction and step, from 10 thousand to 100 million weights.

Two families: four square layers that get wider, and layers of 256 by 256 that get more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from step import LR, mlp, normal, take_turn
from tables import README, markdown, write_section
from tqdm import tqdm

import gsgd

FAMILIES = {
    "4 layers": [[width] * 5 for width in (50, 158, 500, 1581, 5000)],
    "layers of 256 x 256": [[256] * (depth + 1) for depth in (4, 15, 50, 153, 500)],
}
STAGES = ("describe", "construct", "check", "step")
TURNS = 5


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(widths: list[int]) -> tuple[int, int, dict[str, float]]:
    """Weights, units, and the seconds of each stage; for a step the median of several turns, torch's SGD in between."""
    times: dict[str, float] = {}
    begin = time.perf_counter()
    net = mlp(*widths)
    units = net.num_units
    times["describe"] = time.perf_counter() - begin
    weights, gradients = normal(net, "float32", 0), normal(net, "float32", 1)
    begin = time.perf_counter()
    optimizer = gsgd.GSGD(weights, net, lr=LR, threads=1)
    times["construct"] = time.perf_counter() - begin
    times["check"] = seconds(lambda: gsgd.symmetry_residual(weights, gradients, net))
    tensors = [torch.from_numpy(w) for w in weights.values()]
    for tensor, g in zip(tensors, gradients.values(), strict=True):
        tensor.grad = torch.from_numpy(g)
    sgd = torch.optim.SGD(tensors, lr=LR)
    turns = [(take_turn(lambda: optimizer.step(gradients)), take_turn(sgd.step)) for _ in range(TURNS)]
    times["step"], times["SGD step"] = np.median(turns, axis=0).tolist()
    return net.num_weights, units, times


def main() -> None:
    parser = argparse.ArgumentParser(description="Time construction and step of networks of growing size.")
    parser.add_argument("--write", action="store_true", help="write the table to README.md and draw scaling.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure([4] * 5)  # loads what is loaded once
    found = {name: [measure(w) for w in tqdm(family, name)] for name, family in FAMILIES.items()}
    rows = [
        [name, f"{m:,}", f"{units:,}", *(f"{t[s] * 1e3:,.3g}" for s in STAGES), f"{t['step'] / t['SGD step']:.2f}"]
        for name, points in found.items()
        for m, units, t in points
    ]
    head = ["network", "weights", "units", *(f"{s}, ms" for s in STAGES), "step / SGD step"]
    text = markdown(head, rows)
    print(text)
    if args.write:
        write_section("scaling", text)
        draw(found)


def draw(found: dict[str, list[tuple[int, int, dict[str, float]]]]) -> None:
    """Seconds against weights, both logarithmic; slope 1 is linear."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    panels = (("describe", "construct", "check"), ("step", "SGD step"))
    for ax, stages, title in zip(axes, panels, ("before training", "one step"), strict=True):
        for color, stage in zip(("C0", "C1", "C2"), stages, strict=False):
            for style, (name, points) in zip(("-o", "--s"), found.items(), strict=True):
                m, t = [p[0] for p in points], [p[2][stage] for p in points]
                ax.loglog(m, t, style, color=color, markersize=4, label=f"{stage}, {name}")
        low, high = 1e4, 1e8
        base = 1e-8 if title == "before training" else 1e-9
        ax.loglog([low, high], np.array([low, high]) * base, ":", color="gray", label="linear")
        ax.set(title=title, xlabel="weights", ylabel="seconds (one thread)")
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(README.with_name("scaling.png"), dpi=110)


if __name__ == "__main__":
    main()
