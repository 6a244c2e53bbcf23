"""Random small networks: a description, weights, and the torch function that the description is of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import gsgd

Array = NDArray[Any]
Params = dict[str, Array]

CONV = (None, F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
MAX_POOL = (None, F.max_pool1d, F.max_pool2d, F.max_pool3d)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": lambda h: F.leaky_relu(h, 0.2),
    "abs": torch.abs,
    "identity": lambda h: h,
}


@dataclass(frozen=True)
class Value:
    """What a layer returns: the described features, the place on the tape, the spatial extents."""

    features: gsgd.network.Features
    place: int
    spatial: tuple[int, ...] = ()


class Model:
    """A network built twice at once: as a `gsgd.Network` and as a tape of torch functions."""

    def __init__(self, seed: int, channels: int, spatial: tuple[int, ...] = (), batch: int = 6) -> None:
        self.net = gsgd.Network()
        self.rng = np.random.default_rng(seed)
        self.params: Params = {}
        self.inputs = torch.from_numpy(self.rng.standard_normal((batch, channels, *spatial)))
        self.targets = torch.zeros(0)
        self.loss_scale = 1.0
        self._tape: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []
        self.x = Value(self.net.input(channels), 0, spatial)

    def _parameter(self, shape: tuple[int, ...], kind: str) -> str:
        name = f"{kind}{len(self.params)}"
        self.params[name] = self.rng.uniform(0.5, 1.2, shape) * self.rng.choice([-1.0, 1.0], shape)
        return name

    def _do(
        self, function: Callable[..., Tensor], features: gsgd.network.Features, *xs: Value, spatial: tuple[int, ...]
    ) -> Value:
        self._tape.append((function, tuple(x.place for x in xs)))
        return Value(features, len(self._tape), spatial)

    def dense(self, x: Value, width: int, bias: bool = True, layout: str = "oi") -> Value:
        read = x.features.count
        w = self._parameter((width, read) if layout == "oi" else (read, width), "dense")
        b = self._parameter((width,), "bias") if bias else None
        features = self.net.dense(w, x.features, width, bias=b, layout=layout)
        return self._do(
            lambda p, h: F.linear(h, p[w] if layout == "oi" else p[w].T, p[b] if b else None), features, x, spatial=()
        )

    def conv(
        self, x: Value, width: int, kernel: tuple[int, ...], groups: int = 1, bias: bool = True, layout: str = "oihw"
    ) -> Value:
        """Odd kernels, padded by zero, so that the spatial extents stay."""
        n, read = len(kernel), x.features.count
        shape = {
            "oihw": (width, read // groups, *kernel),
            "hwio": (*kernel, read // groups, width),
            "iohw": (read, width // groups, *kernel),
        }[layout]
        w = self._parameter(shape, "conv")
        b = self._parameter((width,), "bias") if bias else None
        features = self.net.conv(w, x.features, width, kernel, groups=groups, bias=b, layout=layout)
        convolve = (TRANSPOSED if layout == "iohw" else CONV)[n]
        order = (n + 1, n, *range(n)) if layout == "hwio" else tuple(range(n + 2))
        padding = tuple(k // 2 for k in kernel)

        def forward(p: Mapping[str, Tensor], h: Tensor) -> Tensor:
            return convolve(h, p[w].permute(order), p[b] if b else None, padding=padding, groups=groups)

        return self._do(forward, features, x, spatial=x.spatial)

    def activation(self, x: Value, name: str) -> Value:
        return self._do(lambda p, h: ACTIVATIONS[name](h), getattr(self.net, name)(x.features), x, spatial=x.spatial)

    def max_pool(self, x: Value) -> Value:
        size = tuple(min(2, s) for s in x.spatial)
        spatial = tuple(s // k for s, k in zip(x.spatial, size, strict=True))
        pool = MAX_POOL[len(size)]
        return self._do(lambda p, h: pool(h, size), self.net.max_pool(x.features), x, spatial=spatial)

    def mean(self, x: Value) -> Value:
        return self._do(lambda p, h: h.flatten(2).mean(2), self.net.avg_pool(x.features), x, spatial=())

    def sigmoid(self, x: Value) -> Value:
        features = self.net.pin(x.features, "sigmoid is not homogeneous")
        return self._do(lambda p, h: torch.sigmoid(h), self.net.input(features.count, "sigmoid"), x, spatial=x.spatial)

    def add(self, x: Value, y: Value, residual: str) -> Value:
        features = self.net.add(x.features, y.features, residual=residual)
        return self._do(lambda p, h, k: h + k, features, x, y, spatial=x.spatial)

    def concat(self, x: Value, y: Value) -> Value:
        features = self.net.concat(x.features, y.features)
        return self._do(lambda p, h, k: torch.cat((h, k), 1), features, x, y, spatial=x.spatial)

    def take(self, x: Value, features: slice | list[int]) -> Value:
        return self._do(lambda p, h: h[:, features], self.net.take(x.features, features), x, spatial=x.spatial)

    def batch_norm(self, x: Value, weight: bool = True, bias: bool = True, mode: str = "exact") -> Value:
        channels = x.features.count
        w = self._parameter((channels,), "gamma") if weight else None
        b = self._parameter((channels,), "beta") if bias else None
        features = self.net.batch_norm(x.features, w, b, mode)

        def forward(p: Mapping[str, Tensor], h: Tensor) -> Tensor:
            return F.batch_norm(h, None, None, p[w] if w else None, p[b] if b else None, training=True)

        return self._do(forward, features, x, spatial=x.spatial)

    def flatten(self, x: Value, order: str) -> Value:
        features = self.net.flatten(x.features, math.prod(x.spatial), order)

        def forward(p: Mapping[str, Tensor], h: Tensor) -> Tensor:
            return (h if order == "channels_first" else h.movedim(1, -1)).flatten(1)

        return self._do(forward, features, x, spatial=())

    def output(self, x: Value) -> Model:
        """Finish: the network returns `x`."""
        self.net.output(x.features)
        shape = self.forward(self.params).shape
        self.targets = torch.from_numpy(self.rng.standard_normal(shape))
        steepest = max(np.abs(g).max() for g in self.gradients(self.params).values())
        self.loss_scale = 1 / steepest if steepest > 0 else 1.0
        return self

    def forward(self, params: Mapping[str, Any]) -> Tensor:
        """The network's outputs."""
        p = {name: torch.as_tensor(value) for name, value in params.items()}
        values = [self.inputs]
        for function, places in self._tape:
            values.append(function(p, *(values[i] for i in places)))
        return values[-1]

    def loss(self, params: Mapping[str, Any]) -> Tensor:
        """Half the squared error, scaled so that the first gradient's largest entry is 1."""
        return 0.5 * self.loss_scale * ((self.forward(params) - self.targets) ** 2).mean()

    def gradients(self, params: Mapping[str, Array]) -> Params:
        leaves = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
        grads = torch.autograd.grad(self.loss(leaves), list(leaves.values()), allow_unused=True)
        return {n: np.zeros(leaves[n].shape) if g is None else g.numpy() for n, g in zip(leaves, grads, strict=True)}

    def copy(self) -> Params:
        """The weights as they were drawn."""
        return {name: value.copy() for name, value in self.params.items()}


def mlp(*widths: int, seed: int = 0, bias: bool = True, activation: str = "relu") -> Model:
    """A multilayer perceptron whose layers have these widths."""
    model = Model(seed, widths[0])
    x = model.x
    for i, width in enumerate(widths[1:], 2):
        x = model.dense(x, width, bias)
        if i < len(widths):
            x = model.activation(x, activation)
    return model.output(x)


def everything() -> Model:
    """hwio and grouped kernels, a tied residual, batch normalization, flattened maps channels last, an io layer."""
    model = Model(3, 2, (4, 3))
    h = model.activation(model.conv(model.x, 4, (3, 3), layout="hwio"), "relu")
    r = model.activation(model.batch_norm(model.conv(h, 4, (3, 1), groups=2, bias=False, layout="hwio")), "relu")
    x = model.flatten(model.add(h, r, "tie"), "channels_last")
    return model.output(model.dense(model.activation(model.dense(x, 6, layout="io"), "abs"), 3, layout="io"))


SPATIAL = {
    0: [()],
    1: [(4,), (3,)],
    2: [(2, 3), (4, 2)],
    3: [(2, 1, 3)],
}
KERNELS = {
    1: [(1,), (3,)],
    2: [(1, 1), (3, 1), (1, 3), (3, 3)],
    3: [(1, 1, 1), (3, 1, 1), (1, 1, 3), (1, 3, 3)],
}
PARTS = ["layer", "layer", "residual", "concat", "shuffle", "chunk", "batch_norm", "sigmoid", "max_pool"]


@st.composite
def models(draw: st.DrawFn, parts: list[str] = PARTS, zeros: bool = True, max_parts: int = 4) -> Model:
    """A random network of dense layers or of convolutions, with everything that a description can say.

    Parameters
    ----------
    parts : list of str
        What it may be made of.
    zeros : bool
        Whether some weights may be exactly zero.
    """
    n = draw(st.sampled_from([0, 0, 1, 2, 3]))
    spatial = draw(st.sampled_from(SPATIAL[n]))
    model = Model(draw(st.integers(0, 2**16)), draw(st.integers(1, 4)), spatial)

    def layer(x: Value, width: int | None = None) -> Value:
        bias = draw(st.booleans())
        if not x.spatial:
            return model.dense(x, width or draw(st.integers(1, 5)), bias, draw(st.sampled_from(["oi", "io"])))
        read = x.features.count
        groups = draw(st.sampled_from([g for g in range(1, 5) if read % g == 0 and (width or g) % g == 0]))
        width = width or groups * draw(st.integers(1, max(1, 4 // groups)))
        kernel = draw(st.sampled_from(KERNELS[n]))
        return model.conv(x, width, kernel, groups, bias, draw(st.sampled_from(["oihw", "hwio", "iohw"])))

    def activation(x: Value) -> Value:
        return model.activation(x, draw(st.sampled_from(["relu", "relu", "leaky_relu", "abs", "identity"])))

    x = activation(layer(model.x))
    for part in draw(st.lists(st.sampled_from(parts), min_size=1, max_size=max_parts)):
        channels = x.features.count
        if part == "layer":
            x = activation(layer(x))
        elif part == "residual":
            x = activation(model.add(x, layer(x, channels), draw(st.sampled_from(["tie", "tie", "pin"]))))
        elif part == "concat" and channels <= 4:
            x = model.concat(x, activation(layer(x)))
        elif part == "shuffle":
            x = model.take(x, draw(st.permutations(range(channels))))
        elif part == "chunk" and channels > 1:
            half = channels // 2
            x = model.concat(activation(layer(model.take(x, slice(0, half)))), model.take(x, slice(half, None)))
        elif part == "batch_norm":
            x = activation(model.batch_norm(layer(x), draw(st.sampled_from([True, True, False])), draw(st.booleans())))
        elif part == "sigmoid":
            x = model.sigmoid(x)
        elif part == "max_pool" and x.spatial:
            x = model.max_pool(x)
    if x.spatial:
        if draw(st.booleans()):
            x = model.mean(x)
        else:
            x = model.flatten(x, draw(st.sampled_from(["channels_first", "channels_last"])))
    model.output(model.dense(x, draw(st.integers(1, 3)), draw(st.booleans()), draw(st.sampled_from(["oi", "io"]))))
    if zeros and draw(st.sampled_from([False, False, True])):
        for value in model.params.values():
            value[model.rng.random(value.shape) < 0.2] = 0.0
    return model
