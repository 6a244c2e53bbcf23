"""One step of G-SGD against other optimizers' steps: time, ratios and memory (see README.md beside this file).

pyperf gives every benchmark processes of its own, one after the other. Here all contenders take turns in one process,
so that whatever else the machine does meets them alike; hence `time.perf_counter`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import math
import multiprocessing
import os
import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tables import markdown, write_section
from tqdm import tqdm

import gsgd
import gsgd.torch

TURN = 0.01  # seconds that a contender is called for, when its turn comes
MIN_ROUNDS = 5
LR = 1e-12  # the arithmetic of any other, but no weight drifts away however many steps are taken
MOMENTUM = 0.9

Step = Callable[[], object]


# networks


def mlp(*widths: int, layout: Literal["oi", "io"] = "oi") -> gsgd.Network:
    """Dense layers without biases, laid out as PyTorch's ("oi") or as those of JAX and Keras ("io")."""
    shapes = [(out, read) if layout == "oi" else (read, out) for read, out in pairwise(widths)]
    return gsgd.Network.sequential(shapes, layout=layout)


def residual(width: int, depths: Sequence[int], *, stem: int, shortcuts: bool) -> gsgd.Network:
    """He et al.'s stages of two-convolution blocks with batch normalization; without shortcuts a plain network."""
    net = gsgd.Network()

    def conv(name: str, x: gsgd.Features, features: int, kernel: int) -> gsgd.Features:
        x = net.conv(f"{name}.weight", x, features, (kernel, kernel))
        return net.batch_norm(x, f"{name}.gamma", f"{name}.beta")

    x = net.relu(conv("stem", net.input(3), width, stem))
    for i, depth in enumerate(depths):
        for j in range(depth):
            y = net.relu(conv(f"stage{i}.{j}.1", x, width << i, 3))
            y = conv(f"stage{i}.{j}.2", y, width << i, 3)
            if shortcuts:
                y = net.add(y, conv(f"stage{i}.{j}.shortcut", x, width << i, 1) if i and not j else x)
            x = net.relu(y)
    net.output(net.dense("fc.weight", x, 10, bias="fc.bias"))
    return net


def vgg16() -> gsgd.Network:
    """Simonyan & Zisserman's 16 layers, for images of 32 x 32."""
    net = gsgd.Network()
    x = net.input(3)
    for i, width in enumerate((64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)):
        x = net.relu(net.conv(f"conv{i}.weight", x, width, (3, 3), bias=f"conv{i}.bias"))
    for i in range(2):
        x = net.relu(net.dense(f"fc{i}.weight", x, 512, bias=f"fc{i}.bias"))
    net.output(net.dense("fc2.weight", x, 10, bias="fc2.bias"))
    return net


NETWORKS: dict[str, Callable[[], gsgd.Network]] = {
    "784-64x5-10": partial(mlp, 784, *5 * [64], 10),
    "784-512-512-10": partial(mlp, 784, 512, 512, 10),
    "784-1024x3-10": partial(mlp, 784, *3 * [1024], 10),
    "784-512-512-10, io": partial(mlp, 784, 512, 512, 10, layout="io"),
    "784-1024x3-10, io": partial(mlp, 784, *3 * [1024], 10, layout="io"),
    "4096x4096x4": partial(mlp, *5 * [4096]),
    "Plain-34": partial(residual, 16, (3, 4, 6, 3), stem=3, shortcuts=False),
    "ResNet-18": partial(residual, 64, (2, 2, 2, 2), stem=7, shortcuts=True),
    "VGG-16": vgg16,
}


def normal(net: gsgd.Network, dtype: str, seed: int) -> dict[str, NDArray[Any]]:
    """An array of normal deviates for every parameter, of variance 2 / fan-in (io: 2 / fan-out), aligned as torch's."""
    rng = np.random.default_rng(seed)
    arrays = {name: torch.empty(shape, dtype=getattr(torch, dtype)).numpy() for name, shape in net.shapes.items()}
    for a in arrays.values():
        rng.standard_normal(dtype=a.dtype, out=a)
        a *= math.sqrt(2 / math.prod(a.shape[1:]))
    return arrays


# contenders

TORCH: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=LR),
    "SGD foreach": partial(torch.optim.SGD, lr=LR, foreach=True),
    "SGD fused": partial(torch.optim.SGD, lr=LR, fused=True),
    "SGD m": partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM),
    "SGD m fused": partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM, fused=True),
    "Adam": partial(torch.optim.Adam, lr=LR),
    "Adam fused": partial(torch.optim.Adam, lr=LR, fused=True),
}
FLOORS = {"floor": "SGD fused", "floor m": "SGD m fused"}  # a pass that reads what is summed, and this
OTHERS = ("NumPy SGD", "optax SGD", "copy", "read")
COLUMNS = ("G-SGD", "G-SGD torch", "G-SGD m", *FLOORS, *(name for name in TORCH if name != "SGD"), *OTHERS)


def optional_module(name: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


jax, optax = optional_module("jax"), optional_module("optax")


def numpy_step(weights: dict[str, NDArray[Any]], gradients: dict[str, NDArray[Any]]) -> None:
    for name, w in weights.items():
        w -= LR * gradients[name]


def optax_step(weights: dict[str, NDArray[Any]], gradients: dict[str, NDArray[Any]]) -> Step:
    """A jitted step that gives its buffers to the next."""
    jax.config.update("jax_enable_x64", True)
    optimizer = optax.sgd(LR)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(update, donate_argnums=(0, 1))
    grads = jax.tree.map(jax.numpy.array, gradients)
    params = jax.tree.map(jax.numpy.array, weights)
    now = [params, optimizer.init(params)]

    def step() -> None:
        now[:] = jax.block_until_ready(jitted(*now, grads))

    return step


def floor_step(tensors: Sequence[torch.Tensor], step: Step) -> None:
    """The least that a step of G-SGD can be: it needs sums over all weights and gradients before it can write any."""
    for p in tensors:
        torch.dot(p.detach().view(-1), p.grad.view(-1))  # type: ignore[union-attr]
    step()


def contenders(net: gsgd.Network, dtype: str) -> tuple[dict[str, Step], Callable[[int], None]]:
    """What is timed, by name, all on the same weights and gradients; and how to set the number of threads."""
    weights, gradients = normal(net, dtype, 0), normal(net, dtype, 1)
    tensors = [torch.nn.Parameter(torch.from_numpy(w)) for w in weights.values()]
    for tensor, g in zip(tensors, gradients.values(), strict=True):
        tensor.grad = torch.from_numpy(g)
    optimizers = [gsgd.GSGD(weights, net, lr=LR, momentum=momentum) for momentum in (0.0, MOMENTUM)]
    source, target = torch.ones(2, net.num_weights, dtype=tensors[0].dtype)
    steps: dict[str, Step] = {
        "G-SGD": partial(optimizers[0].step, gradients),
        "G-SGD torch": gsgd.torch.GSGD(zip(weights, tensors, strict=True), lr=LR, network=net).step,
        "G-SGD m": partial(optimizers[1].step, gradients),
        **{name: optimizer(tensors).step for name, optimizer in TORCH.items()},
        "NumPy SGD": partial(numpy_step, weights, gradients),
        "copy": partial(target.copy_, source),
        "read": partial(torch.dot, source, target),
    }
    for name, after in FLOORS.items():
        steps[name] = partial(floor_step, tensors, steps[after])
    if jax and optax:
        steps["optax SGD"] = optax_step(weights, gradients)

    def set_threads(count: int) -> None:
        torch.set_num_threads(count)
        for optimizer in optimizers:
            optimizer.threads = count

    return steps, set_threads


# time


@dataclass(frozen=True)
class Timing:
    """Seconds per step: by number of threads and contender, one value per round."""

    network: str
    dtype: str
    weights: int
    seconds: dict[tuple[int, str], list[float]]

    def median(self, threads: int, name: str) -> float:
        return float(np.median(self.seconds[threads, name]))

    def spread(self, threads: int, name: str) -> float:
        """Half of the interquartile range, relative to the median."""
        low, high = np.percentile(self.seconds[threads, name], (25, 75))
        return float(high - low) / 2 / self.median(threads, name)

    def ratio(self, over: tuple[int, str], under: tuple[int, str]) -> float:
        """The median over the rounds of a ratio."""
        return float(np.median(np.divide(self.seconds[over], self.seconds[under])))


def take_turn(step: Step) -> float:
    """The median time of a call. The first of many, which fetches data and wakes threads, is left out."""
    times: list[float] = []
    begin = before = time.perf_counter()
    while before - begin < TURN:
        step()
        now = time.perf_counter()
        times.append(now - before)
        before = now
    return float(np.median(times[1:] or times))


def measure(network: str, dtype: str, threads: Sequence[int], seconds: float, progress: tqdm[None]) -> Timing:
    """Rounds in which all take turns, in a new order each time."""
    net = NETWORKS[network]()
    steps, set_threads = contenders(net, dtype)
    for step in steps.values():
        step()
    times: dict[tuple[int, str], list[float]] = {(n, name): [] for n in threads for name in steps}
    order, rng = list(steps), random.Random(0)
    done, rounds, begin = progress.n, 0, time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while rounds < MIN_ROUNDS or time.perf_counter() - begin < seconds:
            for n in threads:
                set_threads(n)
                rng.shuffle(order)
                for name in order:
                    times[n, name].append(take_turn(steps[name]))
            rounds += 1
            elapsed = time.perf_counter() - begin
            progress.n = done + min(1.0, elapsed / seconds, rounds / MIN_ROUNDS)
            progress.refresh()
    finally:
        gc.enable()
    return Timing(network, dtype, net.num_weights, times)


# memory


def status(key: str) -> int:
    """Bytes, from a line of Linux's /proc/self/status."""
    found = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def give_back() -> None:
    """What was freed, to the system: it is resident until then."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def memory(network: str) -> tuple[int, int]:
    """Resident bytes that a description and its GSGD add to float32 weights, and the most while they are made.

    To be called in a fresh process: one that has freed memory before would reuse it unseen.
    """
    small = mlp(4, 4, 4)
    first = gsgd.GSGD(normal(small, "float32", 0), small)  # loads what is loaded once
    weights = normal(NETWORKS[network](), "float32", 0)
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    anonymous, resident = status("RssAnon"), status("VmRSS")
    optimizer = gsgd.GSGD(weights, NETWORKS[network](), lr=LR)
    give_back()
    held, peak = status("RssAnon") - anonymous, status("VmHWM") - resident
    del first, optimizer
    return held, peak


# report


def time_table(timings: Sequence[Timing], threads: Sequence[int]) -> str:
    """The median microseconds of torch's plain SGD, and all others' time relative to it."""
    columns = [name for name in COLUMNS if any((n, name) in t.seconds for t in timings for n in threads)]
    rows = []
    for n in threads:
        for t in timings:
            base = f"{t.median(n, 'SGD') * 1e6:,.0f} ± {t.spread(n, 'SGD'):.0%}"
            ratios = [f"{t.ratio((n, name), (n, 'SGD')):.2f}" for name in columns]
            rows.append([t.network, t.dtype, str(n), base, *ratios])
    return markdown(["network", "dtype", "threads", "SGD, us", *columns], rows)


def traffic_table(timings: Sequence[Timing], threads: Sequence[int]) -> str:
    """Bytes that a copy moves in the time of a step, per weight; and what further threads give.

    A copy reads its source, and fetches and writes its destination.
    """
    one, *more = threads
    rows = []
    for t in timings:
        moved = 3 * np.dtype(t.dtype).itemsize
        rows.append([t.network, t.dtype, f"{t.weights:,}"])
        rows[-1].append(f"{moved * t.weights / t.median(one, 'copy') / 1e9:.1f}")
        rows[-1] += [f"{moved * t.ratio((one, x), (one, 'copy')):.0f}" for x in ("SGD", "G-SGD", "SGD m", "G-SGD m")]
        rows[-1] += [f"{t.ratio((one, x), (n, x)):.2f}" for n in more for x in ("SGD", "G-SGD")]
    head = ["network", "dtype", "weights", "copy, GB/s", "SGD", "G-SGD", "SGD m", "G-SGD m"]
    return markdown([*head, *(f"{x}, {n} threads" for n in more for x in ("SGD", "G-SGD"))], rows)


def memory_table(networks: Sequence[str]) -> str:
    """Bytes beside the weights, in total and per weight."""
    rows = []
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for name, (held, peak) in zip(networks, pool.map(memory, networks), strict=True):
            net = NETWORKS[name]()
            m, units = net.num_weights, net.num_units
            row = [f"{m:,}", f"{units:,}", f"{held / 1e3:,.0f}", f"{held / m:.2f}", f"{peak / m:.2f}"]
            rows.append([name, *row])
    return markdown(["network", "weights", "units", "held, kB", "held / weight", "peak / weight"], rows)


def report(timings: Sequence[Timing], threads: Sequence[int], load: float) -> str:
    """All tables, with what they were measured with."""
    versions = f"torch {torch.__version__}, NumPy {np.__version__}, Python {platform.python_version()}"
    if jax and optax:
        versions += f", optax {optax.__version__}, jax {jax.__version__}"
    else:
        versions += "; optax not installed"
    rounds = [len(next(iter(t.seconds.values()))) for t in timings]
    sections = [
        f"{versions}. {min(rounds)} to {max(rounds)} rounds. "
        f"Load average before: {load:.1f} on {os.cpu_count()} processors.",
        "Time relative to torch's plain SGD with as many threads (m: momentum):",
        time_table(timings, threads),
        f"Bytes per weight that a copy moves in the time of a step (threads: {threads[0]}); "
        "where a column names more threads, how many times faster a step is with them:",
        traffic_table(timings, threads),
    ]
    if platform.libc_ver()[0] == "glibc":
        table = memory_table(list(dict.fromkeys(t.network for t in timings)))
        sections += ["Bytes that description and optimizer add to float32 weights, without momentum:", table]
    return "\n\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a step of G-SGD and of other optimizers, interleaved.")
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=list(NETWORKS),
        metavar="NAME",
        help=f"default: all of {', '.join(NETWORKS)}",
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "float64"), default=["float32", "float64"])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each network and dtype; default: 4")
    parser.add_argument("--write", action="store_true", help="write the result to README.md beside this file")
    args = parser.parse_args()
    cases = [(network, dtype) for dtype in args.dtype for network in args.networks]
    timings, load = [], os.getloadavg()[0]
    with tqdm(total=len(cases), bar_format="{desc}{percentage:3.0f}% |{bar}| {elapsed} < {remaining}") as progress:
        for network, dtype in cases:
            progress.set_description(f"{network}, {dtype}")
            timings.append(measure(network, dtype, args.threads, args.seconds, progress))
    text = report(timings, args.threads, load)
    print(text)
    if args.write:
        write_section("results", text)


if __name__ == "__main__":
    main()
