"""What is compared: a start and an optimizer each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from conditioning import path_condition
from numpy.typing import NDArray
from torch import Tensor, nn

import gsgd
import gsgd.torch

StartName = Literal["default", "he"]
OptimizerName = Literal["SGD", "G-SGD", "AdamW", "GAdam", "RMSprop", "GRMSprop", "Muon", "LoRA-RITE", "Path-SGD"]
Options = Mapping[str, Any]
PATH_SPACE = {"G-SGD": gsgd.torch.GSGD, "GAdam": gsgd.torch.GAdam, "GRMSprop": gsgd.torch.GRMSprop}
PAPER = {"residual": "pin", "batch_norm": "paper"}


@dataclass(frozen=True)
class Method:
    """A start and an optimizer.

    Parameters
    ----------
    start : "default" is PyTorch's, "he" He et al. (2015)
    optimizer, options : its name and its options
    lr_factor : multiplies the grid of learning rates, which is made for SGD
    skeleton : what its weights are overwritten with at the start: 1, or +-1 at random
    trace : how the model is described, see `gsgd.torch.trace`
    balance : None: never; 0: `gsgd.balance` once, before the first step; n: also after every n steps
    conditioned : rescale the start by `path_condition`
    """

    start: StartName
    optimizer: OptimizerName
    options: Options = field(default_factory=dict)
    lr_factor: float = 1.0
    skeleton: Literal["own", "ones", "signs"] = "own"
    trace: Options = field(default_factory=dict)
    balance: int | None = None
    conditioned: bool = False

    @property
    def family(self) -> str:
        """The optimizer of which this is a variant."""
        variants = {"G-SGD": "SGD", "GAdam": "AdamW", "Muon": "AdamW", "LoRA-RITE": "AdamW", "GRMSprop": "RMSprop"}
        return variants.get(self.optimizer, self.optimizer)


METHODS = {
    "SGD, default start": Method("default", "SGD"),
    "SGD, He start": Method("he", "SGD"),
    "SGD, ones start": Method("he", "SGD", skeleton="ones", trace=PAPER),
    "G-SGD ones (paper)": Method("he", "G-SGD", {"scale": "ones"}, trace=PAPER),
    "G-SGD initial": Method("he", "G-SGD", {"scale": "initial"}),
    "G-SGD balanced": Method("he", "G-SGD", {"scale": "balanced"}),
    "AdamW": Method("he", "AdamW", lr_factor=0.1),
}
FAMILIES: dict[str, tuple[OptimizerName, OptimizerName, Options, float]] = {
    "SGD": ("SGD", "G-SGD", {"momentum": 0.9}, 1.0),
    "AdamW": ("AdamW", "GAdam", {"weight_decay": 0.01}, 0.3),
    "RMSprop": ("RMSprop", "GRMSprop", {}, 0.1),
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


class MuonAndAdamW:
    """Muon (Jordan et al., 2024) for the matrices of hidden layers; AdamW for all else, at the same learning rate.

    Hidden matrices are those of modules ``blocks``. Muon's steps are scaled to the size of AdamW's (Liu et al., 2025).
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.01) -> None:
        hidden = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
        chosen = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        muon = torch.optim.Muon(hidden, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, torch.optim.AdamW(rest, lr, weight_decay=weight_decay))
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def modern_lines(start: StartName, families: Sequence[str] = ("SGD", "AdamW")) -> dict[str, Method]:
    """What people use; the same after `gsgd.balance`; and the same on path values."""
    methods = {}
    for name in families:
        plain, path_space, options, factor = FAMILIES[name]
        methods |= {
            name: Method(start, plain, options, factor),
            f"{name}, balanced once": Method(start, plain, options, factor, balance=0),
            f"{name}, balanced every 100": Method(start, plain, options, factor, balance=100),
            path_space: Method(start, path_space, options, factor),
        }
        if name == "AdamW":
            methods["GAdam, largest"] = Method(start, "GAdam", {**options, "rule": "largest"}, factor)
    return methods


def conditioned_lines(start: StartName, families: Sequence[str]) -> dict[str, Method]:
    """What people use, after the rescaling of Lebeurrier, Vayer and Gribonval (2026)."""
    chosen = {name: FAMILIES[name] for name in families}
    return {
        f"{name}, path-conditioned": Method(start, plain, options, factor, conditioned=True)
        for name, (plain, _, options, factor) in chosen.items()
    }


def lora_lines() -> dict[str, Method]:
    """The lines of AdamW for adapters; and LoRA-RITE (Yen et al., 2025), where the package pytorch-optimizer is."""
    methods = {name: m for name, m in modern_lines("default", ["AdamW"]).items() if not m.balance}
    if find_spec("pytorch_optimizer"):
        methods["LoRA-RITE"] = Method("default", "LoRA-RITE", {"weight_decay": 0.01}, 0.3)
    return methods


def paper_lines(blocks: Sequence[int], shortcut: str) -> dict[str, Method]:
    """Section 5.1 from PyTorch's default start (section 11.4): the text, and the authors' released code.

    "text" has chains across all layers, "inner" leaves stem and classifier out; "released" has chains of each stage,
    its stem, shortcuts and classifier take plain steps.
    """
    firsts = list(accumulate(blocks))[:-1]  # blocks that begin a stage
    shortcuts = [f"blocks.{i}.downsample" for i in firsts if shortcut == "projection"]
    traces: dict[str, Options] = {
        "text": PAPER,
        "inner": {**PAPER, "leave_out": ("conv1", "fc")},
        "released": {
            "residual": "pin",
            "batch_norm": "released",
            "leave_out": ("conv1", "fc", *shortcuts),
            "pin_after": tuple(f"blocks.{i - 1}" for i in firsts),
        },
    }
    methods = {"SGD, default start": Method("default", "SGD")}
    for name, trace in traces.items():
        if name != "released":  # which begins with the weights of "inner"
            methods[f"SGD, ones start, {name}"] = Method("default", "SGD", skeleton="ones", trace=trace)
        methods[f"G-SGD ones, {name}"] = Method("default", "G-SGD", {"scale": "ones"}, trace=trace)
    return methods | {
        f"G-SGD {scale}": Method("default", "G-SGD", {"scale": scale}) for scale in ("balanced", "initial")
    }


def arrays_of(model: nn.Module) -> dict[str, NDArray[Any]]:
    """The parameters: their own memory on the CPU, copies of it elsewhere."""
    return {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}


def traced(model: nn.Module, images: Tensor, **options: Any) -> gsgd.Network:
    """The network of the weights that train."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    return gsgd.torch.trace(model, images, **options | {"leave_out": (*options.get("leave_out", ()), *frozen)})


def start(model: nn.Module, method: Method, images: Tensor, seed: int, rescaled: float = 0.0) -> None:
    """Set the weights of a new model, which has PyTorch's own, on the CPU.

    `rescaled` = k rescales every unit by a number log-uniform in [10^-k, 10^k], before skeleton weights are set.
    `images` are an example of what the model reads.
    """
    torch.manual_seed(seed)
    if method.start != "default":
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.kaiming_normal_(p, nonlinearity="relu")
    rng = np.random.default_rng(seed)
    arrays = arrays_of(model)
    if rescaled:
        net = traced(model, images)
        gsgd.rescale(arrays, net, 10 ** rng.uniform(-rescaled, rescaled, net.num_units))
    if method.skeleton != "own":
        skeleton = gsgd.Skeleton(traced(model, images, **method.trace), arrays)
        for edge in dict.fromkeys((*skeleton.in_edges, *skeleton.out_edges)):
            if edge is not None:
                arrays[edge[0]][edge[1]] = rng.choice([-1, 1]) if method.skeleton == "signs" else 1
    if method.balance is not None:
        gsgd.balance(arrays, traced(model, images))
    if method.conditioned:
        path_condition(arrays, traced(model, images))


def optimizer(model: nn.Module, method: Method, images: Tensor, lr: float) -> torch.optim.Optimizer | MuonAndAdamW:
    if method.optimizer == "Path-SGD":
        return PathSGD(model, lr)
    if method.optimizer == "Muon":
        return MuonAndAdamW(model, lr, **method.options)
    if method.optimizer == "LoRA-RITE":
        from pytorch_optimizer import LoRARite

        return LoRARite([p for p in model.parameters() if p.requires_grad], lr, **method.options)  # A, B, A, B, ...
    if method.optimizer in PATH_SPACE:
        net = traced(model, images, **method.trace)
        return PATH_SPACE[method.optimizer](model.named_parameters(), lr, network=net, **method.options)
    plain = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW, "RMSprop": torch.optim.RMSprop}
    return plain[method.optimizer](model.parameters(), lr, **method.options)
