"""A step on sharded weights, against AdamW on the same shards: ``sharded.py``, which starts 1, 2 and 4 processes.

The model is a perceptron of layers of equal width; every process has one thread. Times are medians over steps of the
slowest process, and only their ratios are told, with what is sent and what every process holds: its tables, by
malloc's count (glibc's).
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # Triton's tables are made on the CPU, too

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import gsgd.torch
from gsgd.coordinates import NAMES, Coordinates
from gsgd.torch.engines.sharded import ShardedArrayEngine, ShardedCoreEngine, ShardedTritonEngine

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


class Counts(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


def allocated() -> int:
    """Bytes that malloc has given out."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Counts
    counts = libc.mallinfo2()
    return int(counts.field4 + counts.field7)  # hblkhd, uordblks


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
    core, arrays = (gsgd.torch.GAdam(model, lr=1e-6, network=network, engine=e) for e in ("core", "array"))
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for opt in (core, arrays, theirs):
        opt.step()
    engine: Any = arrays._engine  # the tables' size is no part of the interface
    engine.shards.all_reduces = engine.shards.bytes_reduced = 0
    arrays.step()
    sent = engine.shards.bytes_reduced
    vector = torch.zeros(sent // 8, dtype=torch.float64)
    alone = median(lambda: dist.all_reduce(vector))
    times = [[median(opt.step) for opt in (core, arrays, theirs)] for _ in range(3)]
    saved = core.state_dict()["param_groups"][0]["gsgd"]
    coordinates = Coordinates.load({name: saved[name].numpy() for name in NAMES}, network.num_units)
    held = []
    for kind in (ShardedCoreEngine, ShardedArrayEngine, ShardedTritonEngine):
        kind(network, coordinates, dict(model.named_parameters()))  # what is made once is made now
        before = allocated()
        made = kind(network, coordinates, dict(model.named_parameters()))
        held.append((allocated() - before) / network.num_units)
        del made
    shard = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    if rank == 0:
        ratios = [sorted(own[i] / own[2] for own in times) for i in range(2)]
        print(
            f"| {world} | {network.num_units} | {sent / network.num_units:.0f} | "
            f"{held[0]:.0f}, {held[1]:.0f}, {held[2]:.0f} | {12 * shard / network.num_units:.0f} | "
            + "".join(f"{middle:.2f} ({low:.2f} to {high:.2f}) | " for low, middle, high in ratios)
            + f"{alone / times[1][0]:.3f} |",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    print(
        "| processes | units | bytes reduced per unit | of tables: C core, arrays, Triton | of weights and moments "
        "| GAdam / AdamW | in array operations | share of the all-reduce |\n|---|---|---|---|---|---|---|---|",
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
