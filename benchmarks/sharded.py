"""A step on sharded weights, against AdamW on the same shards: ``sharded.py``, which starts 1, 2 and 4 processes.

The model is a perceptron of layers of equal width; every process has one thread. Times are medians over steps of the
slowest process, and only their ratios are told, with what is sent and what every process holds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import gsgd.torch

WIDTH, LAYERS, STEPS = 1024, 8, 9


def median(step: Callable[[], Any]) -> float:
    """Seconds of a step, of the slowest process."""
    times = []
    for _ in range(STEPS):
        dist.barrier()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(times))
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def tensors(x: Any) -> Iterator[Tensor]:
    """All tensors in tables."""
    if isinstance(x, Tensor):
        yield x
    elif is_dataclass(x):
        yield from tensors([getattr(x, f.name) for f in fields(x)])
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from tensors(y)


def work(meet: str, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    torch.manual_seed(0)
    layers = [m for _ in range(LAYERS) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    network = gsgd.torch.trace(model, torch.zeros(2, WIDTH))
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    model(torch.rand(8, WIDTH)).square().mean().backward()
    ours = gsgd.torch.GAdam(model, lr=1e-6, network=network)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for opt in (ours, theirs):
        opt.step()
    engine = ours._engine  # the tables' size is no part of the interface
    engine.shards.all_reduces = engine.shards.bytes_reduced = 0
    ours.step()
    sent = engine.shards.bytes_reduced
    vector = torch.zeros(sent // 8, dtype=torch.float64)
    alone = median(lambda: dist.all_reduce(vector))
    pairs = [(median(ours.step), median(theirs.step)) for _ in range(3)]
    held = {t.data_ptr(): t.numel() * t.element_size() for t in tensors([engine.whole, engine.here, engine.counted])}
    shard = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    if rank == 0:
        g = pairs[1][0]
        ratios = sorted(a / b for a, b in pairs)
        print(
            f"| {world} | {network.num_units} | {sent / network.num_units:.0f} | "
            f"{sum(held.values()) / network.num_units:.0f} | {sum(held.values()) / (12 * shard):.3f} | "
            f"{ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {alone / g:.3f} |",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    print(
        "| processes | units | bytes reduced per unit | table bytes per unit | tables / (weights and moments here) "
        "| GAdam / AdamW | share of the all-reduce |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for world in (1, 2, 4):
        meet = str(Path(tempfile.mkdtemp()) / "meet")
        command = [sys.executable, "-W", "ignore", __file__, meet]
        runs = [subprocess.Popen([*command, str(rank), str(world)]) for rank in range(world)]
        for run in runs:
            if run.wait():
                raise SystemExit(run.returncode)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
