"""Section 11.1, figure 6: images per second of whole training steps, SGD against G-SGD, in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from architectures import CONV_NETS, ConvNet, mlp
from matplotlib.figure import Figure
from methods import METHODS, optimizer
from report import save
from torch import nn
from tqdm import tqdm

COMPARED = ("SGD, He start", "G-SGD ones (paper)", "G-SGD balanced")


def measure(width: int, batch: int, rounds: int, device: torch.device) -> list[dict[str, str | float]]:
    """One row per network and method: images per second, the median over rounds, and relative to SGD."""
    nets: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {}  # model, image, steps per round
    for name in ("Plain-34", "ResNet-34"):
        blocks, shortcut = CONV_NETS[name]
        nets[f"{name}, {width} maps"] = (partial(ConvNet, blocks, width, shortcut, 10), (3, 32, 32), 1)
    nets["784-512-512-10"] = (partial(mlp, (784, 512, 512, 10)), (1, 28, 28), 20)
    rows: list[dict[str, str | float]] = []
    for net, (make, shape, repeat) in nets.items():
        x, y = torch.rand(batch, *shape, device=device), torch.randint(0, 10, (batch,), device=device)
        steps = {}
        for name in COMPARED:
            torch.manual_seed(0)
            model = make().to(device)
            steps[name] = (model, optimizer(model, METHODS[name], x[:2], 1e-4))
        seconds: dict[str, list[float]] = {name: [] for name in COMPARED}
        for number in tqdm(range(rounds + 1), desc=net, unit="round"):
            for name, (model, opt) in steps.items():
                begin = time.perf_counter()
                for _ in range(repeat):
                    loss = F.cross_entropy(model(x), y)
                    opt.zero_grad()
                    loss.backward()
                    opt.step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if number:  # the first is to warm up
                    seconds[name].append((time.perf_counter() - begin) / repeat)
        ratios = {n: median(s / b for s, b in zip(seconds[n], seconds[COMPARED[0]], strict=True)) for n in COMPARED}
        for name in COMPARED:
            per_second = batch / median(seconds[name])
            rows.append({"network": net, "method": name, "images_per_second": round(per_second, 1),
                         "time_relative_to_sgd": round(ratios[name], 3)})  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, str | float]]) -> str:
    lines = ["| network | method | images per second | time of a step relative to SGD |", "|---|---|---|---|"]
    lines += [
        f"| {r['network']} | {r['method']} | {r['images_per_second']:g} | {r['time_relative_to_sgd']:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def figure(rows: Sequence[dict[str, str | float]], path: Path) -> None:
    nets = list(dict.fromkeys(str(r["network"]) for r in rows))
    picture = Figure(figsize=(2.8 * len(nets), 3.4), layout="constrained")
    for panel, net in zip(picture.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        own = [r for r in rows if r["network"] == net]
        labels = [str(r["method"]).split(",")[0].removesuffix(" (paper)") for r in own]
        panel.bar(labels, [r["images_per_second"] for r in own], color=["#c1542b", "#0b2f66", "#6fb7b0"])
        panel.set(title=net, ylabel="images per second")
        panel.tick_params(axis="x", labelsize="small", rotation=20)
    save(picture, path)
