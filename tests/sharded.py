"""One of the processes of test_torch_sharded.py: ``sharded.py DIRECTORY RANK``."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gsgd.torch
from gsgd.torch import GSGD, GAdam, GRMSprop


class Residual(nn.Module):
    """Widths that no number of processes divides, ties, taps, groups, a flattened image and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block, self.down = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 6, 3, 2, 1, groups=2)
        self.dense, self.head = nn.Linear(6 * 4, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + F.relu(self.norm(self.block(x))))
        return self.head(F.relu(self.dense(F.relu(self.down(x)).flatten(1))))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.out = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.mid(F.relu(self.up(x)))))


def whole(p: Tensor) -> Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p.detach()


def batch(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64), torch.randint(3, shape[:1], generator=random)


def difference(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((whole(q) - whole(p)).abs().max() / whole(p).abs().max()) for p, q in pairs)


def train(model: nn.Module, opt: torch.optim.Optimizer, shape: tuple[int, ...], steps: range) -> None:
    for i in steps:
        x, y = batch(shape, i)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


Place = Callable[[nn.Parameter], Shard | None] | None


def rows_or_columns(world: int) -> Place:
    """Columns where they can be cut evenly, which is all that FSDP2 takes."""
    return lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % world == 0 else Shard(0)


def sharded(model: nn.Module, mesh: DeviceMesh, place: Place = None, **options: Any) -> nn.Module:
    shard = copy.deepcopy(model)
    for child in shard.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh, shard_placement_fn=place, **options)
    fully_shard(shard, mesh=mesh, shard_placement_fn=place, **options)
    return shard


METHODS: dict[str, Callable[..., Any]] = {
    "GSGD": lambda params, net, **o: GSGD(params, network=net, lr=0.05, **o),
    "momentum": lambda params, net, **o: GSGD(
        params, network=net, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, **o
    ),
    "GAdam": lambda params, net, **o: GAdam(params, network=net, lr=0.01, weight_decay=0.1, **o),
    "GRMSprop": lambda params, net, **o: GRMSprop(params, network=net, lr=0.01, momentum=0.5, **o),
}


def compare(
    model: nn.Module, shard: nn.Module, shape: tuple[int, ...], make: Callable[..., Any], steps: int = 20
) -> dict[str, Any]:
    """So many steps of the whole model and of the sharded one."""
    net = gsgd.torch.trace(model, batch(shape, 0)[0])
    opts = make(model, net), make(shard, net)
    start = [whole(p).clone() for p in shard.parameters()]
    for m, opt in zip((model, shard), opts, strict=True):
        train(m, opt, shape, range(1))
    shards = opts[1]._engine.shards
    shards.all_reduces = shards.bytes_reduced = 0
    for m, opt in zip((model, shard), opts, strict=True):
        train(m, opt, shape, range(1, steps))
    moved = [float((whole(p) - w).detach().abs().max()) for p, w in zip(shard.parameters(), start, strict=True)]
    state = [x for s in opts[1].state.values() for x in s.values() if isinstance(x, Tensor) and x.ndim]
    return {
        "engine": opts[1].engine,
        "units": net.num_units,
        "difference": difference(model, shard),
        "c": float((opts[1].state_dict()["param_groups"][0]["gsgd"]["c"] / opts[0]._coordinates.c - 1).abs().max()),
        "least moved": min(moved),
        "reduced": (shards.all_reduces / (steps - 1), shards.bytes_reduced / (steps - 1)),
        "state is sharded": all(isinstance(x, DTensor) for x in state),
        "stats": [(o.stats.steps, o.stats.clamped) for o in opts],
    }


def fsdp(
    mesh: DeviceMesh, place: Place = None, methods: Sequence[str] = ("momentum", "GAdam"), **options: Any
) -> dict[str, Any]:
    """Both models."""
    found = {}
    for kind, shape in ((Perceptron, (16, 5)), (Residual, (8, 3, 4, 4))):
        for name in methods:
            make = partial(METHODS[name], **options)
            torch.manual_seed(0)
            model = kind().double()
            found[f"{kind.__name__}, {name}"] = compare(model, sharded(model, mesh, place), shape, make)
    return found


def clipped(mesh: DeviceMesh) -> dict[str, Any]:
    """With clip_norm at work, from the paper's start, with limits that are met."""
    torch.manual_seed(0)
    model = Perceptron().double()
    found = {}
    settings: dict[str, dict[str, Any]] = {
        "clip_norm": {"clip_norm": 0.1},
        "clip_norm, arrays": {"clip_norm": 0.1, "engine": "array"},
        "max_ratio": {"max_ratio": 1.0001},
    }
    for name, options in settings.items():
        one = copy.deepcopy(model)
        make = partial(METHODS["GSGD"], **options)
        found[name] = compare(one, sharded(one, mesh), (16, 5), make)
    one, shape = copy.deepcopy(model), (16, 5)
    shard = sharded(one, mesh)
    net = gsgd.torch.trace(one, batch(shape, 0)[0])
    for m in (one, shard):
        train(m, GSGD(m, network=net, lr=0.05, scale="ones"), shape, range(10))
    return {**found, "ones": {"difference": difference(one, shard)}}


def triton(mesh: DeviceMesh) -> dict[str, Any]:
    """In Triton's interpreter, where there is one, against the C core."""
    found = {}
    for name, options in {"GAdam": {}, "clip_norm, triton": {"clip_norm": 0.1}}.items():
        torch.manual_seed(0)
        model = Perceptron().double()
        if importlib.util.find_spec("triton") is not None:

            def make(m: nn.Module, net: gsgd.Network, options: dict[str, Any] = options) -> Any:
                on = "triton" if any(isinstance(p, DTensor) for p in m.parameters()) else "core"
                return METHODS["GAdam"](m, net, engine=on, **options)

            found[name] = compare(model, sharded(model, mesh), (16, 5), make, steps=3)
    return found


def parallel(mesh: DeviceMesh) -> dict[str, Any]:
    """Tensor parallelism: columns, then rows; the last layer is a plain tensor that all processes hold."""
    found = {}
    for name, make in METHODS.items():
        torch.manual_seed(0)
        model = Perceptron().double()
        shard = parallelize_module(copy.deepcopy(model), mesh, {"up": ColwiseParallel(), "mid": RowwiseParallel()})
        found[name] = compare(model, shard, (16, 5), make)
    return found


def two_dimensions(mesh: DeviceMesh) -> dict[str, Any]:
    """Copies of shards (HSDP), and tensor parallelism cut again by fully_shard."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = Perceptron().double()
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    found = {"HSDP": compare(one, sharded(one, both), (16, 5), METHODS["momentum"])}
    shard = parallelize_module(copy.deepcopy(model), both["tp"], {"up": ColwiseParallel(), "mid": RowwiseParallel()})
    shard = sharded(shard, both["dp"])
    return {**found, "FSDP and TP": compare(two, shard, (16, 5), METHODS["momentum"])}


def zeros(mesh: DeviceMesh) -> dict[str, Any]:
    """Candidates that are zero, units that are dead or wait: the same trees as those of the whole weights."""
    torch.manual_seed(0)
    model = Perceptron().double()
    with torch.no_grad():
        model.up.weight[torch.arange(5), torch.arange(5)] = 0
        model.up.weight[3] = model.up.bias[3] = 0
        model.mid.weight[:, 2] = 0
        model.mid.weight[4, 4] = 0
        model.out.weight[:, 9] = 0
    shard = sharded(model, mesh)
    net = gsgd.torch.trace(model, batch((16, 5), 0)[0])
    opts = [GSGD(m, network=net, lr=0.05, momentum=0.9) for m in (model, shard)]

    def skeletons() -> list[dict[str, Any]]:
        return [opt.state_dict()["param_groups"][0]["gsgd"] for opt in opts]

    def compared() -> dict[str, Any]:
        one, other = skeletons()
        return {
            "pinned": int((one["in_edges"][:, 0] < 0).sum()),
            "same": all(torch.equal(one[k], other[k]) for k in ("in_edges", "out_edges")),
            "scale": max(float((other[k] / one[k] - 1).abs().max()) for k in ("in_weights", "out_weights", "c")),
        }

    found = {"start": compared()}
    for m, opt in zip((model, shard), opts, strict=True):
        train(m, opt, (16, 5), range(6))
    return {**found, "later": compared(), "difference": difference(model, shard)}


def mixed_precision(mesh: DeviceMesh) -> dict[str, Any]:
    """Compute in bfloat16, shards in float32."""
    torch.manual_seed(0)
    model = Perceptron()
    x, y = batch((16, 5), 0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard = sharded(model, mesh, mp_policy=policy)
    opt = GSGD(shard, network=gsgd.torch.trace(model, x.float()), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = F.cross_entropy(shard(x.float()).float(), y)
        loss.backward()
        opt.step()
        losses.append(float(loss))
    return {"first": losses[0], "last": losses[-1], "dtype": str(next(shard.parameters()).dtype)}


def failures(mesh: DeviceMesh) -> dict[str, Any]:
    """What is wrong on one process is known on all, and nobody waits for another."""
    rank = mesh.get_rank()
    torch.manual_seed(0)
    model = Perceptron().double()
    net = gsgd.torch.trace(model, batch((16, 5), 0)[0])
    shard = sharded(model, mesh)
    opt = GSGD(shard, network=net, lr=0.05, momentum=0.9)
    train(shard, opt, (16, 5), range(3))
    before = [p.to_local().clone() for p in shard.parameters()]
    kept = [s["momentum_buffer"].to_local().clone() for s in opt.state.values()]

    def unmoved() -> bool:
        return all(torch.equal(p.to_local(), w) for p, w in zip(shard.parameters(), before, strict=True))

    for p in shard.parameters():
        p.grad = torch.zeros_like(p)
    if rank == 1:
        shard.mid.weight.grad.to_local().fill_(float("nan"))
    opt.step()
    same = [torch.equal(s["momentum_buffer"].to_local(), m) for s, m in zip(opt.state.values(), kept, strict=True)]
    found: dict[str, Any] = {"untouched": unmoved() and all(same), "stats": str(opt.stats)}

    def refused(what: str, make: Callable[[], Any]) -> None:
        try:
            make()
            found[what] = "accepted"
        except (ValueError, TypeError, RuntimeError) as error:
            found[what] = str(error)

    state = opt.state[shard.mid.weight]
    negative = torch._neg_view(-state["momentum_buffer"].to_local())
    state["momentum_buffer"] = DTensor.from_local(negative, mesh, [Shard(0)])
    refused("negative moments", opt.step)
    found["untouched"] &= unmoved()
    refused("largest", lambda: GSGD(shard, network=net, rule="largest"))
    half = sharded(copy.deepcopy(model).bfloat16(), mesh)
    refused("engine", lambda: GSGD(half, network=net, engine="core"))
    refused("no network", lambda: GSGD(shard))
    other = gsgd.torch.trace(model, batch((16, 5), 0)[0], leave_out="out") if rank else net
    refused("networks", lambda: GSGD(shard, network=other))
    with torch.no_grad():
        shard.out.bias.to_local().fill_(float("inf"))
    refused("not finite", lambda: GSGD(shard, network=net))
    plain = parallelize_module(copy.deepcopy(model), mesh, {"up": ColwiseParallel(), "mid": RowwiseParallel()})
    with torch.no_grad():
        plain.out.weight[0, 0] += rank
    refused("copies", lambda: GSGD(plain, network=net))
    return found


def death(mesh: DeviceMesh) -> str:
    """What the others are told when a process ends in the middle of training."""
    torch.manual_seed(0)
    model = Perceptron().double()
    shard = sharded(model, mesh)
    opt = GSGD(shard, network=gsgd.torch.trace(model, batch((16, 5), 0)[0]), lr=0.05)
    train(shard, opt, (16, 5), range(1))
    if mesh.get_rank() == 1:
        os._exit(0)
    before = [p.to_local().clone() for p in shard.parameters()]
    try:
        opt.step()
    except RuntimeError as error:
        same = all(torch.equal(p.to_local(), w) for p, w in zip(shard.parameters(), before, strict=True))
        return str(error) if same else "weights have changed"
    return "it stepped"


def usual_order(mesh: DeviceMesh) -> dict[str, Any]:
    """Trace without weights, shard, materialise, make the optimizer, load: as if the weights had been there."""
    torch.manual_seed(0)
    model = Perceptron().double()
    with torch.device("meta"):
        empty = Perceptron().double()
    net = gsgd.torch.trace(empty, torch.zeros(16, 5, dtype=torch.float64, device="meta"))
    shard = sharded(empty, mesh)
    shard.to_empty(device="cpu")
    with torch.no_grad():
        for p in shard.parameters():
            p.to_local().normal_(generator=torch.Generator().manual_seed(mesh.get_rank()))
    opt = GSGD(shard, network=net, lr=0.05, momentum=0.9)
    set_model_state_dict(shard, get_model_state_dict(sharded(model, mesh)))
    one = GSGD(model, lr=0.05, momentum=0.9)
    train(model, one, (16, 5), range(5))
    train(shard, opt, (16, 5), range(5))
    return {"difference": difference(model, shard), "moved": one.stats.steps}


def save(mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """Five steps, a checkpoint, five more."""
    found = {}
    for name, make in METHODS.items():
        torch.manual_seed(0)
        model = Residual().double()
        shard = sharded(model, mesh)
        opt = make(shard, gsgd.torch.trace(model, batch((8, 3, 4, 4), 0)[0]))
        train(shard, opt, (8, 3, 4, 4), range(5))
        state = {"model": get_model_state_dict(shard), "optim": get_optimizer_state_dict(shard, opt)}
        dcp.save(state, checkpoint_id=folder / name)
        train(shard, opt, (8, 3, 4, 4), range(5, 10))
        found[name] = [whole(p) for p in shard.parameters()]
    return found


def load(mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """The checkpoints of another number of processes, into other weights: five steps."""
    found = {}
    for name, make in METHODS.items():
        torch.manual_seed(1)
        model = Residual().double()
        shard = sharded(model, mesh)
        opt = make(shard, gsgd.torch.trace(model, batch((8, 3, 4, 4), 0)[0]))
        state = {"model": get_model_state_dict(shard), "optim": get_optimizer_state_dict(shard, opt)}
        rehearsed = opt.stats.steps
        dcp.load(state, checkpoint_id=folder / name)
        set_model_state_dict(shard, state["model"])
        set_optimizer_state_dict(shard, opt, state["optim"])
        train(shard, opt, (8, 3, 4, 4), range(5, 10))
        found[name] = {"weights": [whole(p) for p in shard.parameters()], "steps": (rehearsed, opt.stats.steps)}
    return found


SCENARIOS: dict[int, dict[str, Callable[[DeviceMesh, Path], dict[str, Any]]]] = {
    2: {
        "rows": lambda mesh, _: fsdp(mesh, methods=[*METHODS]),
        "columns": lambda mesh, _: fsdp(mesh, rows_or_columns(2)),
        "parallel": lambda mesh, _: parallel(mesh),
        "mixed precision": lambda mesh, _: mixed_precision(mesh),
        "triton": lambda mesh, _: triton(mesh),
        "failures": lambda mesh, _: failures(mesh),
        "save": save,
    },
    3: {
        "rows": lambda mesh, _: fsdp(mesh),
        "arrays": lambda mesh, _: fsdp(mesh, methods=["GAdam"], engine="array"),
        "clipped": lambda mesh, _: clipped(mesh),
        "zeros": lambda mesh, _: zeros(mesh),
        "usual order": lambda mesh, _: usual_order(mesh),
        "load": load,
    },
    4: {"rows": lambda mesh, _: fsdp(mesh), "two dimensions": lambda mesh, _: two_dimensions(mesh)},
}


def group(meet: Path, rank: int, world: int) -> DeviceMesh:
    """The first of the processes, which meet by a new file, as a mesh."""
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    return init_device_mesh("cpu", (world,))


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    for world, scenarios in SCENARIOS.items():
        if rank < world:
            mesh = group(folder / f"meet{world}", rank, world)
            found = {name: scenario(mesh, folder) for name, scenario in scenarios.items()}
            torch.save(found, folder / f"{world}-{rank}.pt")
            dist.destroy_process_group()
    if rank < 2:
        torch.save(death(group(folder / "death", rank, 2)), folder / "death.pt")
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
