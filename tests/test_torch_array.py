"""The array engine: how many operations a step takes, what it allocates, what it counts, and that it compiles."""

import collections
import copy
import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_models import Net, assert_breaks_at_step_only, assert_close, backward, example

import gsgd
from gsgd.torch import GSGD, GAdam, GRMSprop, trace
from gsgd.torch.engines import ArrayEngine
from gsgd.torch.engines.base import to_device

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh", "is_set_to"}
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda model, net, **more: GSGD(model, lr=1e-2, network=net, **more),
    "momentum": lambda model, net, **more: GSGD(model, lr=1e-2, momentum=0.9, network=net, **more),
    "Adam": lambda model, net, **more: GAdam(model, eps=1e-2, network=net, **more),
    "RMSprop": lambda model, net, **more: GRMSprop(model, eps=1e-2, momentum=0.5, network=net, **more),
}


class Count(TorchDispatchMode):
    """Counts operations that a device would run as kernels, and the bytes that new storages hold at most, and still."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.bytes = self.most_bytes = 0
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        is_view = any(
            r.alias_info and not r.alias_info.is_write for r in (*func._schema.returns, *func._schema.arguments)
        )
        if not is_view and name not in NO_KERNEL and not name.startswith("_record_function"):
            self.kernels[name] += 1
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            key = storage._cdata
            if not is_view and key not in given | self.held.keys():
                self.held[key] = storage.nbytes()
                self.bytes += storage.nbytes()
                self.most_bytes = max(self.most_bytes, self.bytes)
                weakref.finalize(storage, self.free, key)
        return out

    def free(self, key: int) -> None:
        self.bytes -= self.held.pop(key, 0)


class Block(nn.Module):
    def __init__(self, n: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(n, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.down = nn.Sequential()
        if n != width:
            self.down = nn.Sequential(nn.Conv2d(n, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class ResNet18(nn.Sequential):
    """ResNet-18, narrow: as many tensors, and operations."""

    def __init__(self) -> None:
        widths = [4, 4, 4, 8, 8, 12, 12, 16, 16]
        blocks = [Block(n, m, 1 + (n != m)) for n, m in itertools.pairwise(widths)]
        stem = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))


MODELS = {"perceptron": (perceptron, (2, 300)), "ResNet-18": (ResNet18, (2, 3, 16, 16))}
# a quarter of what a step took when every tensor took its own
MOST = {
    ("perceptron", "SGD"): 245 // 4,
    ("perceptron", "momentum"): 292 // 4,
    ("perceptron", "Adam"): 394 // 4,
    ("ResNet-18", "SGD"): 1625 // 4,
    ("ResNet-18", "momentum"): 2074 // 4,
    ("ResNet-18", "Adam"): 2074 // 4,
}


def counted_step(name: str, optimizer: str) -> tuple[nn.Module, Any, Count]:
    """A model and its optimizer after three steps, the last of which is counted."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make()
    opt = OPTIMIZERS[optimizer](model, trace(model, torch.zeros(shape)), engine="array")
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    opt.step()
    opt.step()
    with Count() as count:
        opt.step()
    assert opt.stats == gsgd.optimizer.Stats(3, 0, 0)
    return model, opt, count


@pytest.mark.parametrize(("name", "optimizer"), MOST)
def test_a_step_is_few_operations(name: str, optimizer: str) -> None:
    _, _, count = counted_step(name, optimizer)
    assert sum(count.kernels.values()) <= MOST[name, optimizer], count.kernels
    assert not count.kernels.keys() & {"_local_scalar_dense", "nonzero", "masked_select", "equal"}  # these would wait


def test_gradients_are_negated_at_once() -> None:
    """Where a group maximizes: those of a dtype, however many there are."""
    model = perceptron()
    model[2].double()
    named = list(model.named_parameters())
    groups = [{"params": named[:3], "maximize": True}, {"params": named[3:], "maximize": True}]
    opt = GSGD(groups, network=gsgd.Network(), engine="array")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    with Count() as count:
        opt.step()
    assert count.kernels["_foreach_neg"] == 2
    assert not count.kernels["neg"]
    assert all((p > old).all() for p, old in zip(model.parameters(), before, strict=True))


class Uploads(TorchDispatchMode):
    """Tables that are made by `asarray`, until an operation other than a view is given them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Any, Tensor]] = {}  # by identity, with what has it
        self.unread: set[int] = set()

    def asarray(self, x: Any) -> Tensor:
        if id(x) not in self.made:
            t = to_device(torch.device("cpu"))(x).clone()
            self.made[id(x)] = x, t
            self.unread |= {t.untyped_storage()._cdata} if t.numel() else set()
        return self.made[id(x)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            given = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            self.unread -= {x.untyped_storage()._cdata for x in given}
        return func(*args, **(kwargs or {}))


def test_no_table_is_uploaded_in_vain() -> None:
    """Steps read them all, if parameters without a gradient are among them."""
    model = ResNet18()
    opt = OPTIMIZERS["Adam"](model, trace(model, torch.zeros(2, 3, 16, 16)), engine="array", clip_norm=1.0)
    for p in list(model.parameters())[1:]:
        p.grad = 1e-3 * torch.randn_like(p)
    with Uploads() as uploads:
        opt._current_engine().asarray = uploads.asarray
        opt.step()
    assert opt.stats.steps == 1
    assert len(uploads.made) > 10
    assert not [tuple(t.shape) for _, t in uploads.made.values() if t.untyped_storage()._cdata in uploads.unread]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_holds_two_temporaries_and_keeps_none(optimizer: str) -> None:
    """Besides tables over units, of which the perceptron has 400."""
    model, _, count = counted_step("perceptron", optimizer)
    size = sum(p.nbytes for p in model.parameters())
    assert 1.9 * size < count.most_bytes < 2 * size + 300 * 400
    assert count.bytes == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_is_left_out_changes_and_counts_nothing(optimizer: str) -> None:
    """The bias corrections of Adam included; some parameters have gradients only now and then."""
    core, array = Net(), Net().to(memory_format=torch.channels_last)
    net = trace(core, example())
    optimizers = [OPTIMIZERS[optimizer](model, net, engine=e) for model, e in ((core, "core"), (array, "array"))]
    for step in range(6):
        backward(core, step)
        for i, (p, q) in enumerate(zip(core.parameters(), array.parameters(), strict=True)):
            if (step + i) % 5 == 0 or (step < 2 and i % 3 == 0):
                p.grad = None
            q.grad = None if p.grad is None else p.grad.clone()
        if step in (1, 4):
            before = copy.deepcopy((array.state_dict(), optimizers[1].state_dict()["state"]))
            given = next(q.grad for q in array.parameters() if q.grad is not None and q.numel() > 8)
            value = given.flatten()[0].clone()
            given[(0,) * given.dim()] = float("nan") if step == 1 else float("inf")
            optimizers[1].step()
            after = array.state_dict(), optimizers[1].state_dict()["state"]
            if step > 1:  # when there is one
                torch.testing.assert_close(after, before, rtol=0, atol=0)
            given[(0,) * given.dim()] = value
        for opt in optimizers:
            opt.step()
    assert_close(array, core, rtol=1e-10, atol=1e-12)
    assert optimizers[1].stats == gsgd.optimizer.Stats(6, optimizers[0].stats.clamped, 2)
    for p, q in zip(core.parameters(), array.parameters(), strict=True):
        own, other = optimizers[0].state[p], optimizers[1].state[q]
        torch.testing.assert_close({k: torch.as_tensor(x) for k, x in own.items()}, dict(other), rtol=1e-10, atol=1e-12)


def test_moments_stay_where_they_are() -> None:
    """Those in the state are views of what steps write to, also when they were loaded, and are saved by themselves."""
    model, opt, _ = counted_step("perceptron", "Adam")
    first = model[0].weight
    moment = opt.state[first]["exp_avg"]
    address, before = moment.data_ptr(), moment.clone()
    opt.step()
    assert opt.state[first]["exp_avg"] is moment
    assert moment.data_ptr() == address
    assert not torch.equal(moment, before)
    other = copy.deepcopy(model)
    loaded = OPTIMIZERS["Adam"](other, opt.network, engine="array")
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    opt.step()
    loaded.step()
    assert_close(other, model, rtol=0, atol=0)
    assert loaded.stats == opt.stats


def test_array_operations_compile() -> None:
    """As one graph: the step of the engine, that is, what a step does to tensors."""
    models = [perceptron() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    net = trace(models[0], torch.zeros(2, 300))
    optimizers = [OPTIMIZERS["momentum"](model, net, engine="array") for model in models]
    for opt in optimizers:
        for i in range(3):
            torch.manual_seed(i)
            for p in opt._current_engine().params:
                p.grad = 1e-3 * torch.randn_like(p)
            opt.step()
            if opt is optimizers[1]:  # from the second step on
                opt._engine.step = torch.compile(ArrayEngine.step, backend="eager", fullgraph=True).__get__(opt._engine)
    assert_close(*models, rtol=1e-6, atol=1e-8)
    assert optimizers[0].stats == optimizers[1].stats


def test_a_compiled_training_step_breaks_at_step_only() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    assert_breaks_at_step_only(model, GAdam(model, engine="array"), torch.ones(4, 5))


@gpu
@pytest.mark.parametrize("engine", ["array", "triton"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_captured_step_replays(engine: str, optimizer: str) -> None:
    """With other learning rates and gradients, one of which is not finite."""
    models = [Net(torch.float32).cuda() for _ in range(2)]
    net = trace(Net(torch.float32), example(dtype=torch.float32))
    optimizers = [OPTIMIZERS[optimizer](model, net, engine=engine) for model in models]
    for model, opt in zip(models, optimizers, strict=True):
        opt.param_groups[0]["lr"] = torch.tensor(1e-2, device="cuda")
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for step in range(4):
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            p.grad.copy_(1e-2 * torch.randn_like(p))
            q.grad.copy_(p.grad.fill_(torch.nan) if step == 1 else p.grad)
        for opt in optimizers:
            opt.param_groups[0]["lr"].fill_(1e-2 / (1 + step))
        graph.replay()
        optimizers[1].step()
    assert_close(*models, rtol=1e-5, atol=1e-7)
    assert optimizers[0].stats == optimizers[1].stats == gsgd.optimizer.Stats(4, optimizers[0].stats.clamped, 1)
