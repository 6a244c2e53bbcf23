"""All optimizers behind one interface: methods, and what runs them."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Params

import gsgd
import gsgd.torch


@dataclass(frozen=True)
class Method:
    """An optimizer's name in `gsgd` and `gsgd.torch`, its hyperparameters, and torch's optimizer of plain weights."""

    name: str
    plain: Any
    settings: dict[str, Any]

    def torch(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = self.plain(
            parameters, **{n: x for n, x in self.settings.items() if n != "decoupled"}
        )
        return found


# eps is large enough that gradients which are 0 but for rounding stay small steps
METHODS = {
    "sgd": Method("GSGD", torch.optim.SGD, {"lr": 0.02, "weight_decay": 1e-3}),
    "nesterov": Method("GSGD", torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    "adam": Method("GAdam", torch.optim.Adam, {"lr": 0.01, "eps": 1e-3, "weight_decay": 1e-3, "decoupled": False}),
    "adamw": Method("GAdam", torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 1e-2}),
    "rmsprop": Method("GRMSprop", torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.99, "eps": 1e-3, "weight_decay": 1e-3}),
    "rmsprop, momentum": Method(
        "GRMSprop", torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "momentum": 0.9}
    ),
}


class OnNumpy:
    """`gsgd`'s own."""

    ways = ("state", "pickled state")

    def __init__(self, method: str, params: Params, net: gsgd.Network, backend: str = "c") -> None:
        found = METHODS[method]
        self.made_as = partial(type(self), method, net=net, backend=backend)
        self.params = {name: w.copy() for name, w in params.items()}
        self.opt = getattr(gsgd, found.name)(self.params, net, backend=backend, **found.settings)

    def step(self, grads: Params) -> None:
        self.opt.step(grads)

    def write(self, params: Params) -> None:
        for name, w in params.items():
            self.params[name][...] = w

    def resumed(self, way: str, other: Params) -> OnNumpy:
        """One that was made from other weights, and goes on from this one's weights and state."""
        found = self.made_as(params=other)
        found.write(self.params)
        state = self.opt.state_dict()
        found.opt.load_state_dict(pickle.loads(pickle.dumps(state)) if way == "pickled state" else state)
        return found


class OnTorch:
    """`gsgd.torch`'s, on CPU tensors."""

    ways = ("state", "file", "pickle", "deepcopy")

    def __init__(self, method: str, params: Params, net: gsgd.Network, engine: str) -> None:
        found = METHODS[method]
        self.made_as = partial(type(self), method, net=net, engine=engine)
        self.parameters = {n: torch.nn.Parameter(torch.from_numpy(w.copy())) for n, w in params.items()}
        make = getattr(gsgd.torch, found.name)
        self.opt = make(self.parameters.items(), network=net, engine=engine, **found.settings)

    @property
    def params(self) -> Params:
        return {name: p.detach().numpy() for name, p in self.parameters.items()}

    def step(self, grads: Params) -> None:
        for name, p in self.parameters.items():
            p.grad = torch.from_numpy(np.ascontiguousarray(grads[name]))
        self.opt.step()

    def write(self, params: Params) -> None:
        with torch.no_grad():
            for name, w in params.items():
                self.parameters[name].copy_(torch.from_numpy(w))

    def resumed(self, way: str, other: Params) -> OnTorch:
        found: OnTorch = self.made_as(params=other)
        if way in ("pickle", "deepcopy"):
            both = self.parameters, self.opt
            found.parameters, found.opt = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
            return found
        state = copy.deepcopy(self.opt.state_dict())
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        found.opt.load_state_dict(state)
        found.write(self.params)
        return found


@cache
def _optax(method: str, net: gsgd.Network) -> tuple[Any, Callable[..., Any]]:
    """A transformation and its compiled update."""
    jax, gopt = pytest.importorskip("jax"), pytest.importorskip("gsgd.optax")
    found = METHODS[method]
    renamed = {"lr": "learning_rate", "alpha": "decay"}
    settings = {renamed.get(n, n): x for n, x in found.settings.items()}
    if "betas" in settings:
        settings["b1"], settings["b2"] = settings.pop("betas")
    tx = getattr(gopt, found.name.lower())(network=net, **settings)
    return tx, jax.jit(tx.update)


class OnOptax:
    """`gsgd.optax`'s, compiled, in x64 mode."""

    ways = ("pickle", "flax", "orbax")

    def __init__(self, method: str, params: Params, net: gsgd.Network) -> None:
        self.jax = pytest.importorskip("jax")
        self.made_as = partial(type(self), method, net=net)
        self.tx, self.update = _optax(method, net)
        with self.jax.enable_x64(True):
            self.write(params)
            self.state = self.tx.init(self.weights)

    @property
    def params(self) -> Params:
        return {name: np.array(w) for name, w in self.weights.items()}

    def step(self, grads: Params) -> None:
        with self.jax.enable_x64(True):
            updates, self.state = self.update(grads, self.state, self.weights)
            self.weights = {name: w + updates[name] for name, w in self.weights.items()}

    def write(self, params: Params) -> None:
        with self.jax.enable_x64(True):
            self.weights = {name: self.jax.numpy.array(w) for name, w in params.items()}

    def resumed(self, way: str, other: Params) -> OnOptax:
        found: OnOptax = self.made_as(params=other)
        found.weights = self.weights
        with self.jax.enable_x64(True), tempfile.TemporaryDirectory() as folder:
            found.state = _through(way, self.state, found.state, Path(folder) / "state")
        return found


def _through(way: str, state: Any, template: Any, path: Path) -> Any:
    if way == "pickle":
        return pickle.loads(pickle.dumps(state))
    if way == "flax":
        serialization = pytest.importorskip("flax.serialization", reason="Flax is not installed")
        return serialization.from_bytes(template, serialization.to_bytes(state))
    orbax = pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, template)


FRAMEWORKS: dict[str, Callable[..., Any]] = {
    "NumPy, core": OnNumpy,
    "NumPy, reference": partial(OnNumpy, backend="reference"),
    "PyTorch, core": partial(OnTorch, engine="core"),
    "PyTorch, array": partial(OnTorch, engine="array"),
    "Optax": OnOptax,
}
WAYS = [
    (name, way)
    for name, kind in FRAMEWORKS.items()
    for way in (kind.func if isinstance(kind, partial) else kind).ways  # type: ignore[attr-defined]
]
