"""Models of the tests of PyTorch's optimizers, and loops that train them."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from models import BasicBlock, ResNet, mlp
from torch import Tensor, nn

import gsgd
import gsgd.torch.engines.core
from gsgd.torch import GSGD, GAdam

Weights = dict[str, Tensor]


class Net(nn.Module):
    """A residual CNN with batch norms, and parameters outside the network: of no dimension, and of no entries."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = ResNet(BasicBlock, (1, 1), 4, cifar=True)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p, std=0.1)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.cat((self.gain[None], self.empty.flatten()))


class Branches(nn.Module):
    """Two heads on one stem; the second is used only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 6)
        self.left, self.right = mlp((6, 5, 3)), mlp((6, 5, 3))
        self.double()

    def forward(self, x: Tensor, both: bool) -> Tensor:
        h = F.relu(self.stem(x))
        return self.left(h) + self.right(h) if both else self.left(h)

    @staticmethod
    def network() -> gsgd.Network:
        net = gsgd.Network()
        h = net.relu(net.dense("stem.weight", net.input(4), 6, bias="stem.bias"))
        for head in ("left", "right"):
            y = net.relu(net.dense(f"{head}.0.weight", h, 5, bias=f"{head}.0.bias"))
            net.output(net.dense(f"{head}.2.weight", y, 3, bias=f"{head}.2.bias"))
        return net


def example(step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    p = next(model.parameters())
    out = model(example(step).to(p.device, p.dtype))
    return F.cross_entropy(out.float() if out.dtype.itemsize < 4 else out, torch.arange(6, device=p.device) + step % 4)


def backward(model: nn.Module, step: int) -> Tensor:
    model.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        opt.step()


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def momenta(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [s["momentum_buffer"].clone() for s in opt.state.values()]


def views(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


def assert_same(one: nn.Module | Weights, other: nn.Module | Weights) -> None:
    """The same bits."""
    a, b = (weights(x) if isinstance(x, nn.Module) else x for x in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close(one: nn.Module, other: nn.Module, **tolerances: float) -> None:
    theirs = weights(other)
    for name, w in weights(one).items():
        torch.testing.assert_close(w, theirs[name], **tolerances, check_dtype=False, check_device=False, msg=name)


def make(model: nn.Module, **settings: Any) -> GSGD:
    return GSGD(model, example_inputs=example(), **{"lr": 0.05, "momentum": 0.9, **settings})


def assert_breaks_at_step_only(model: nn.Module, opt: GSGD | GAdam, x: Tensor) -> None:
    """A compiled training step is the model's graph, and one break at the optimizer's step."""
    from torch._dynamo.utils import counters

    def train() -> None:
        model(x).square().mean().backward()
        opt.step()

    torch.compiler.reset()  # what it has compiled for another optimizer
    counters.clear()
    compiled = torch.compile(train, backend="eager")
    for _ in range(2):
        compiled()
        opt.zero_grad()
    assert opt.stats.steps == 2
    assert counters["stats"]["unique_graphs"] == 1  # the model's
    breaks = [reason for reason in counters["graph_break"] if "Tensor.backward" not in reason]
    assert len(breaks) == 1
    assert "PathOptimizer.step" in breaks[0]
