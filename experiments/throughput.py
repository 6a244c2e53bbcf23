"""Section 11.1, figure 6: time of whole training steps, SGD and AdamW against path space, in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from architectures import CONV_NETS, CharacterModel, ConvNet, mlp
from matplotlib.figure import Figure
from methods import METHODS, Method, modern_lines, optimizer
from report import save
from torch import nn
from tqdm import tqdm
from training import cross_entropy

PAPER_S = {name: METHODS[name] for name in ("SGD, He start", "G-SGD ones (paper)", "G-SGD balanced")}
MODERN = {name: m for name, m in modern_lines("he").items() if m.balance is None and "rule" not in m.options}


@dataclass(frozen=True)
class Steps:
    """What is timed: a model, its input and answers of `classes`, and the number of steps per round."""

    model: Callable[[], nn.Module]
    x: torch.Tensor
    answers: tuple[int, ...]
    classes: int
    repeat: int
    methods: dict[str, Method]


def timed(width: int, batch: int) -> dict[str, Steps]:
    """The paper's networks, and those of `modern` and `transformer` with the batches that they have there."""
    nets = {}
    for name in ("Plain-34", "ResNet-34"):
        blocks, shortcut = CONV_NETS[name]
        model = partial(ConvNet, blocks, width, shortcut, 10)
        nets[f"{name}, {width} maps"] = Steps(model, torch.rand(batch, 3, 32, 32), (batch,), 10, 1, PAPER_S)
    images = torch.rand(batch, 1, 28, 28)
    nets["784-512-512-10"] = Steps(partial(mlp, (784, 512, 512, 10)), images, (batch,), 10, 20, PAPER_S)
    images = torch.rand(64, 1, 28, 28)
    nets["784-64x5-10"] = Steps(partial(mlp, (784, *(64,) * 5, 10), True), images, (64,), 10, 20, MODERN)
    text = torch.randint(0, 90, (16, 32))
    muon = {"Muon": Method("default", "Muon")}
    nets["characters"] = Steps(partial(CharacterModel, 90, 32, 64, 2), text, (16, 32), 90, 5, MODERN | muon)
    return nets


def measure(width: int, batch: int, rounds: int, device: torch.device) -> list[dict[str, str | float]]:
    """One row per network and method: samples per second, the median over rounds, and time relative to SGD or AdamW."""
    rows: list[dict[str, str | float]] = []
    for net, own in timed(width, batch).items():
        x, y = own.x.to(device), torch.randint(0, own.classes, own.answers, device=device)
        steps = {}
        for name, method in own.methods.items():
            torch.manual_seed(0)
            model = own.model().to(device)
            steps[name] = (model, optimizer(model, method, x[:2], 1e-4))
        seconds: dict[str, list[float]] = {name: [] for name in own.methods}
        for number in tqdm(range(rounds + 1), desc=net, unit="round"):
            for name, (model, opt) in steps.items():
                begin = time.perf_counter()
                for _ in range(own.repeat):
                    loss = cross_entropy(model(x), y)
                    opt.zero_grad()
                    loss.backward()
                    opt.step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if number:  # the first is to warm up
                    seconds[name].append((time.perf_counter() - begin) / own.repeat)
        plain = {method.family: name for name, method in reversed(own.methods.items())}  # the first of each family
        for name, method in own.methods.items():
            pairs = zip(seconds[name], seconds[plain[method.family]], strict=True)
            rows.append({"network": net, "method": name,
                         "samples_per_second": round(len(x) / median(seconds[name]), 1),
                         "relative_time": round(median(ours / other for ours, other in pairs), 3)})  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, str | float]]) -> str:
    lines = ["| network | method | samples per second | time of a step relative to SGD, AdamW |", "|---|---|---|---|"]
    lines += [
        f"| {r['network']} | {r['method']} | {r['samples_per_second']:g} | {r['relative_time']:.3f} |" for r in rows
    ]
    return "\n".join(lines)


def figure(rows: Sequence[dict[str, str | float]], path: Path) -> None:
    nets = list(dict.fromkeys(str(r["network"]) for r in rows))
    picture = Figure(figsize=(2.8 * len(nets), 3.4), layout="constrained")
    for panel, net in zip(picture.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        own = [r for r in rows if r["network"] == net]
        labels = [str(r["method"]).removesuffix(", He start").removesuffix(" (paper)") for r in own]
        colours = ["#c1542b", "#0b2f66", "#6fb7b0", "#e0a030", "#777777", "#aaaaaa"]
        panel.bar(labels, [r["samples_per_second"] for r in own], color=colours[: len(own)])
        panel.set(title=net, ylabel="samples per second")
        panel.tick_params(axis="x", labelsize="small", rotation=20)
    save(picture, path)
