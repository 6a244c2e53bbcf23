"""A training step, forward, backward and optimizer: G-SGD against torch's SGD (see README.md beside this file).

All contenders take turns in one process, each with its own copy of the model, so that whatever else the machine does
meets them alike.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tables import markdown, write_section
from torch import Tensor, nn
from tqdm import tqdm

import gsgd.torch

MOMENTA = (0.0, 0.9)
MIN_ROUNDS = 15
LR = 1e-12  # the arithmetic of any other, but no weight drifts away however many steps are taken

OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda model, momentum: torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum),
    "G-SGD": lambda model, momentum: gsgd.torch.GSGD(model, lr=LR, momentum=momentum),
}


def plain34(width: int = 16) -> nn.Module:
    """Stages of 6, 8, 12 and 6 convolutions with batch normalization, for images of 32 x 32 (the paper's Plain-34)."""
    widths = [width] + [width << stage for stage, depth in enumerate((6, 8, 12, 6)) for _ in range(depth)]
    layers: list[nn.Module] = []
    for read, write in pairwise([3, *widths]):
        stride = 2 if write > read > 3 else 1
        layers += [nn.Conv2d(read, write, 3, stride, 1, bias=False), nn.BatchNorm2d(write), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def mlp(*widths: int, bias: bool = True) -> nn.Module:
    layers = [layer for read, write in pairwise(widths) for layer in (nn.Linear(read, write, bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


# model and the shape of its inputs
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Plain-34, batch 128": (plain34, (128, 3, 32, 32)),
    "784-512-512-10, batch 64": (partial(mlp, 784, 512, 512, 10), (64, 784)),
}
DEPTH = 50  # tensors of 4 x 4, to see what is left when there is nothing to compute

Key = tuple[str, float]  # optimizer, momentum


def contenders(build: Callable[[], nn.Module]) -> dict[Key, tuple[nn.Module, torch.optim.Optimizer]]:
    """Copies of one model, each with its optimizer."""
    torch.manual_seed(0)
    model, found = build(), {}
    for momentum in MOMENTA:
        for name, make in OPTIMIZERS.items():
            own = copy.deepcopy(model)
            found[name, momentum] = own, make(own, momentum)
    return found


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Seconds of forward and backward, and of the optimizer."""
    begin = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    middle = time.perf_counter()
    optimizer.step()
    return middle - begin, time.perf_counter() - middle


def lone_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float]:
    """Seconds of the optimizer, on gradients that are new tensors, as after `zero_grad`."""
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    begin = time.perf_counter()
    optimizer.step()
    return (time.perf_counter() - begin,)


def measure(
    turns: Mapping[Key, Callable[[], tuple[float, ...]]], seconds: float, progress: tqdm[None]
) -> dict[Key, NDArray[np.float64]]:
    """What each returns in rounds in which all take one turn each, in a new order each time; a row per round."""
    for turn in turns.values():
        turn()
    times: dict[Key, list[tuple[float, ...]]] = {key: [] for key in turns}
    order, rng = list(turns), random.Random(0)
    done, rounds, begin = progress.n, 0, time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while rounds < MIN_ROUNDS or time.perf_counter() - begin < seconds:
            rng.shuffle(order)
            for key in order:
                times[key].append(turns[key]())
            rounds += 1
            part = min(1.0, (time.perf_counter() - begin) / seconds, rounds / MIN_ROUNDS)
            progress.update(done + part - progress.n)
    finally:
        gc.enable()
    return {key: np.array(rows) for key, rows in times.items()}


def training_row(name: str, times: dict[Key, NDArray[np.float64]], momentum: float) -> list[str]:
    sgd, ours = (times[optimizer, momentum] for optimizer in OPTIMIZERS)
    ratios = ours.sum(axis=1) / sgd.sum(axis=1)
    margin = 1 / np.sqrt(len(ratios))  # of the rank: the median's 95 % interval
    low, ratio, high = np.quantile(ratios, [max(0, 0.5 - margin), 0.5, min(1, 0.5 + margin)])
    passes = np.median(np.concatenate([sgd[:, 0], ours[:, 0]]))
    one, other = np.median(sgd[:, 1]), np.median(ours[:, 1])
    return [
        name,
        f"{momentum:g}",
        f"{passes * 1e3:.2f}",
        f"{one * 1e3:.3f}",
        f"{other * 1e3:.3f}",
        f"{(passes + other) / (passes + one):.3f}",
        f"{ratio:.3f} ({low:.3f} to {high:.3f})",
        str(len(ratios)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time whole training steps with G-SGD and with SGD, interleaved.")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each model; default: 20")
    parser.add_argument("--write", action="store_true", help="write the result to README.md beside this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, lone_rows = [], []
    with tqdm(
        total=len(CASES) + 1, bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed} < {remaining}"
    ) as progress:
        for name, (build, shape) in CASES.items():
            progress.set_description(name)
            x, y = torch.rand(shape), torch.randint(10, shape[:1])
            turns = {key: partial(training_step, *both, x, y) for key, both in contenders(build).items()}
            times = measure(turns, args.seconds, progress)
            rows += [training_row(name, times, momentum) for momentum in MOMENTA]
        progress.set_description("optimizer alone")
        tiny = contenders(partial(mlp, *[4] * (DEPTH + 1), bias=False))
        lone = {key: partial(lone_step, *both) for key, both in tiny.items()}
        times = measure(lone, args.seconds / 4, progress)
        for momentum in MOMENTA:
            each = [np.median(times[optimizer, momentum]) / DEPTH * 1e6 for optimizer in OPTIMIZERS]
            lone_rows.append([f"{momentum:g}", *(f"{t:.2f}" for t in each)])
    head = ["model", "momentum", "forward + backward, ms", "SGD, ms", "G-SGD, ms", "ratio of medians"]
    text = "\n\n".join(
        [
            f"torch {torch.__version__}, Python {platform.python_version()}, float32, threads: {args.threads}.",
            markdown([*head, "median ratio (95 %)", "rounds"], rows),
            f"The optimizer alone, microseconds per tensor, on {DEPTH} tensors of 4 x 4:",
            markdown(["momentum", *OPTIMIZERS], lone_rows),
        ]
    )
    print(text)
    if args.write:
        write_section("training", text)


if __name__ == "__main__":
    main()
