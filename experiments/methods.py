"""What is compared: a start and an optimizer each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import gsgd
import gsgd.torch

StartName = Literal["default", "he", "ones", "signs"]
PAPER = {"residual": "pin", "batch_norm": "paper"}


@dataclass(frozen=True)
class Method:
    """`start`: "default" is PyTorch's, "he" He et al. (2015); "ones" that with skeleton weights 1, "signs" with +-1.

    `lr_factor` multiplies the grid of learning rates, which is made for SGD.
    """

    start: StartName
    optimizer: Literal["SGD", "G-SGD", "AdamW", "Path-SGD"]
    options: Mapping[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0


METHODS = {
    "SGD, default start": Method("default", "SGD"),
    "SGD, He start": Method("he", "SGD"),
    "SGD, ones start": Method("ones", "SGD"),
    "G-SGD ones (paper)": Method("he", "G-SGD", {"scale": "ones", **PAPER}),
    "G-SGD initial": Method("he", "G-SGD", {"scale": "initial"}),
    "G-SGD balanced": Method("he", "G-SGD", {"scale": "balanced"}),
    "AdamW": Method("he", "AdamW", lr_factor=0.1),
}
PATH_SGD = {"Path-SGD": Method("he", "Path-SGD")}


class PathSGD(torch.optim.Optimizer):
    """`gsgd.PathSGD` on the memory of a model's CPU tensors."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model.parameters(), {"lr": lr})
        self.named = dict(model.named_parameters())
        arrays = {name: p.detach().numpy() for name, p in self.named.items()}
        self.path_sgd = gsgd.PathSGD(arrays, gsgd.torch.trace(model), lr)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.path_sgd.lr = self.param_groups[0]["lr"]
        self.path_sgd.step({name: p.grad.numpy() for name, p in self.named.items() if p.grad is not None})


def start(model: nn.Module, name: StartName, seed: int, rescaled: float = 0.0) -> None:
    """Set the weights of a new model, which has PyTorch's own, on the CPU.

    `rescaled` = k rescales every unit by a number log-uniform in [10^-k, 10^k], before skeleton weights are set.
    """
    torch.manual_seed(seed)
    if name != "default":
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.kaiming_normal_(p, nonlinearity="relu")
    rng = np.random.default_rng(seed)
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    if rescaled:
        net = gsgd.torch.trace(model)
        gsgd.rescale(arrays, net, 10 ** rng.uniform(-rescaled, rescaled, net.num_units))
    if name in ("ones", "signs"):
        skeleton = gsgd.Skeleton(gsgd.torch.trace(model, residual="pin", batch_norm="paper"), arrays)
        for edge in dict.fromkeys((*skeleton.in_edges, *skeleton.out_edges)):
            if edge is not None:
                arrays[edge[0]][edge[1]] = rng.choice([-1, 1]) if name == "signs" else 1


def optimizer(model: nn.Module, method: Method, lr: float) -> torch.optim.Optimizer:
    options = dict(method.options)
    if method.optimizer == "G-SGD":
        return gsgd.torch.GSGD(model, lr, **options)
    if method.optimizer == "Path-SGD":
        return PathSGD(model, lr)
    kind = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[method.optimizer]
    return kind(model.parameters(), lr, **options)
