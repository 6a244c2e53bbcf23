"""A step and whole training steps on a GPU: G-SGD and GAdam against torch's own (see README.md beside this file).

All contenders take turns in one process, each with its own copy of the model. Without a GPU nothing is run.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from tables import markdown, write_section
from torch import Tensor, nn
from tqdm import tqdm

import gsgd.torch

LR = 1e-12  # the arithmetic of any other, but no weight drifts away however many steps are taken
STEPS = 20  # of the optimizer, timed as one


class Residual(nn.Module):
    """Layers beside a shortcut, and a ReLU of their sum."""

    def __init__(self, layers: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.layers, self.shortcut = layers, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


def conv(read: int, write: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(read, write, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(write)]


def residual(read: int, width: int, stride: int, bottleneck: bool) -> nn.Module:
    write = 4 * width if bottleneck else width
    if bottleneck:
        first, middle = conv(read, width, 1), conv(width, width, 3, stride)
        layers = [*first, nn.ReLU(), *middle, nn.ReLU(), *conv(width, write, 1)]
    else:
        layers = [*conv(read, width, 3, stride), nn.ReLU(), *conv(width, width, 3)]
    same = stride == 1 and read == write
    return Residual(nn.Sequential(*layers), nn.Identity() if same else nn.Sequential(*conv(read, write, 1, stride)))


def resnet(depths: tuple[int, ...], bottleneck: bool) -> nn.Module:
    """He et al. (2016), for images of 224 x 224; the stride of a bottleneck is in its middle."""
    layers: list[nn.Module] = [*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    read = 64
    for stage, depth in enumerate(depths):
        for i in range(depth):
            width = 64 << stage
            layers.append(residual(read, width, 2 if stage > 0 and i == 0 else 1, bottleneck))
            read = 4 * width if bottleneck else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(read, 1000))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class ViT(nn.Module):
    """Dosovitskiy et al. (2021), B/16, with ReLU for GELU."""

    def __init__(self, depth: int = 12, width: int = 768, heads: int = 12, patch: int = 16, size: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.encoders = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.encoders(x))[:, 0])


def mlp(*widths: int) -> nn.Module:
    layers = [layer for read, write in pairwise(widths) for layer in (nn.Linear(read, write), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


# model and the shape of its inputs
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "784-512-512-10": (partial(mlp, 784, 512, 512, 10), (256, 784)),
    "ResNet-18": (partial(resnet, (2, 2, 2, 2), False), (64, 3, 224, 224)),
    "ResNet-50": (partial(resnet, (3, 4, 6, 3), True), (64, 3, 224, 224)),
    "ViT-B/16": (ViT, (64, 3, 224, 224)),
}
Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[nn.Module, gsgd.Network], Optimizer]] = {
    "SGD, fused": lambda model, _: torch.optim.SGD(model.parameters(), LR, 0.9, fused=True),
    "SGD, foreach": lambda model, _: torch.optim.SGD(model.parameters(), LR, 0.9, foreach=True),
    "G-SGD": lambda model, net: gsgd.torch.GSGD(model.named_parameters(), LR, 0.9, network=net),
    "AdamW, fused": lambda model, _: torch.optim.AdamW(model.parameters(), LR, weight_decay=0, fused=True),
    "GAdam": lambda model, net: gsgd.torch.GAdam(model.named_parameters(), LR, network=net),
}


def milliseconds(run: Callable[[], object]) -> tuple[float, float]:
    """Of the device, and of the host until it has launched everything."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), 1e3 * host


def launches(run: Callable[[], object]) -> int:
    """How many kernels it launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)


def repeated(run: Callable[[], object]) -> None:
    for _ in range(STEPS):
        run()


def replayed(model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
    """The step as a CUDA graph."""
    gradients, graph = [p.grad for p in model.parameters()], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def replay(_: object = gradients) -> None:  # which it reads
        graph.replay()

    return replay


def training_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def rows(name: str, rounds: int, progress: tqdm[None]) -> list[list[str]]:
    """A row per optimizer: the step, and the whole training step; the ratios are medians over rounds, to fused SGD."""
    build, shape = CASES[name]
    torch.manual_seed(0)
    model = build().cuda()
    x, y = torch.rand(shape, device="cuda"), torch.randint(10, shape[:1], device="cuda")
    net = gsgd.torch.trace(model, x[:2])
    train: dict[str, Callable[[], None]] = {}
    step: dict[str, Callable[[], object]] = {}
    for key, make in OPTIMIZERS.items():
        own = copy.deepcopy(model)
        optimizer = make(own, net)
        train[key] = partial(training_step, own, optimizer, x, y)
        for _ in range(3):
            train[key]()
        step[key] = optimizer.step
        if key in ("G-SGD", "GAdam"):
            step[f"{key}, replayed"] = replayed(own, optimizer)
    counts = {key: launches(run) for key, run in step.items() if "replayed" not in key}
    alone: dict[str, list[tuple[float, float]]] = {key: [] for key in step}
    whole: dict[str, list[tuple[float, float]]] = {key: [] for key in train}
    for _ in range(rounds):
        for times, turns in ((alone, {k: partial(repeated, run) for k, run in step.items()}), (whole, train)):
            for key in random.sample(list(turns), len(turns)):
                times[key].append(milliseconds(turns[key]))
        progress.update()
    first = next(iter(OPTIMIZERS))
    found = []
    for key in step:
        device, host = np.median(np.array(alone[key]) / STEPS, axis=0)
        cells = [f"{device:.3f}", f"{host:.3f}", _ratio(alone[key], alone[first]), str(counts.get(key, "1 graph"))]
        if key in whole:
            cells += [f"{np.median(np.array(whole[key])[:, 0]):.2f}", _ratio(whole[key], whole[first])]
        found.append([name, key, *cells, *[""] * (6 - len(cells))])
    return found


def _ratio(times: list[tuple[float, float]], others: list[tuple[float, float]]) -> str:
    return f"{np.median(np.array(times)[:, 0] / np.array(others)[:, 0]):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time steps and training steps on a GPU, all optimizers interleaved.")
    parser.add_argument("--rounds", type=int, default=30, help="default: 30")
    parser.add_argument("--write", action="store_true", help="write the result to README.md beside this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("not run: torch.cuda finds no GPU here")
        return
    found = []
    with tqdm(total=args.rounds * len(CASES)) as progress:
        for name in CASES:
            progress.set_description(name)
            found += rows(name, args.rounds, progress)
    head = ["model", "optimizer", "step, ms", "of the host, ms", "ratio", "launches", "training step, ms", "ratio"]
    about = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, float32, momentum 0.9; ratios to fused SGD."
    text = f"{about}\n\n{markdown(head, found)}"
    print(text)
    if args.write:
        write_section("gpu", text)


if __name__ == "__main__":
    main()
