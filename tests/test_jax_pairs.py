"""The same architectures in PyTorch and in JAX have the same units: what one tracer finds, the other finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gsgd.torch

jax = pytest.importorskip("jax", reason="JAX is not installed")
gjax = pytest.importorskip("gsgd.jax")
jnp, lax = jax.numpy, jax.lax

Params = dict[str, Any]


class Own(nn.Module):
    """Parameters by name, and a function of them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.of = forward
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, x)


def norm(x: Any, p: Params, name: str) -> Any:
    x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def dense(x: Any, p: Params, name: str) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


class Encoder(nn.Module):
    """A pre-norm block with fused attention, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(5, 8), nn.Linear(8, 3)
        self.n1, self.n2, self.n3 = (nn.LayerNorm(8) for _ in range(3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.w1, self.w2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        h = self.n1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return self.o(self.n3(x + self.w2(F.relu(self.w1(self.n2(x))))))


def encoder(p: Params, x: Any) -> Any:
    x = dense(x, p, "i")
    qkv = norm(x, p, "n1") @ p["attention.in_proj_weight"].T + p["attention.in_proj_bias"]
    q, k, v = (y.reshape(*y.shape[:2], 2, 4) for y in jnp.split(qkv, 3, -1))
    x = x + dense(jax.nn.dot_product_attention(q, k, v).reshape(x.shape), p, "attention.out_proj")
    return dense(norm(x + dense(jax.nn.relu(dense(norm(x, p, "n2"), p, "w1")), p, "w2"), p, "n3"), p, "o")


class Residual(nn.Module):
    """Group normalization, a residual stream, a depthwise convolution, maps that are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.n, self.d = nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.o = nn.Linear(6 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        h = F.max_pool2d(h + F.relu(self.n(self.b(h))), 2)
        return self.o(self.d(h).flatten(1))


def conv(x: Any, p: Params, name: str, groups: int = 1) -> Any:
    layout = ("NCHW", "OIHW", "NCHW")
    w, b = p[f"{name}.weight"], p[f"{name}.bias"]
    y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups)
    return y + b[:, None, None]


def residual(p: Params, x: Any) -> Any:
    h = jax.nn.relu(conv(x, p, "a"))
    groups = conv(h, p, "b").reshape(-1, 2, 3, 4, 4)
    groups = (groups - groups.mean((2, 3, 4), keepdims=True)) * lax.rsqrt(groups.var((2, 3, 4), keepdims=True) + 1e-5)
    r = groups.reshape(h.shape) * p["n.weight"][:, None, None] + p["n.bias"][:, None, None]
    h = lax.reduce_window(h + jax.nn.relu(r), -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return dense(conv(h, p, "d", groups=6).reshape(-1, 24), p, "o")


def own(torch_s: Callable[[Any, Tensor], Tensor], jax_s: Callable[[Params, Any], Any], **shapes: Any) -> Any:
    return lambda: Own(torch_s, **shapes), jax_s, (4, 5)


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[Params, Any], Any], tuple[int, ...]]] = {
    "encoder": (Encoder, encoder, (2, 3, 5)),
    "residual": (Residual, residual, (2, 3, 4, 4)),
    "low rank": own(
        lambda m, x: F.relu(x @ m.i + x @ m.a @ m.b) @ m.o,
        lambda p, x: jax.nn.relu(x @ p["i"] + x @ p["a"] @ p["b"]) @ p["o"],
        i=(5, 6),
        a=(5, 2),
        b=(2, 6),
        o=(6, 3),
    ),
    "gated": own(
        lambda m, x: (F.silu(x @ m.g) * (x @ m.u)) @ m.o,
        lambda p, x: (jax.nn.silu(x @ p["g"]) * (x @ p["u"])) @ p["o"],
        g=(5, 6),
        u=(5, 6),
        o=(6, 3),
    ),
    "heads": own(
        lambda m, x: torch.einsum("bhe,heo->bo", F.relu(torch.einsum("bi,hie->bhe", x, m.i)), m.o),
        lambda p, x: jnp.einsum("bhe,heo->bo", jax.nn.relu(jnp.einsum("bi,hie->bhe", x, p["i"])), p["o"]),
        i=(2, 5, 3),
        o=(2, 3, 4),
    ),
    "scaled": own(
        lambda m, x: (torch.where(x @ m.i > 0, x @ m.i, 0) * m.s + m.b) @ m.o,
        lambda p, x: (jnp.where(x @ p["i"] > 0, x @ p["i"], 0) * p["s"] + p["b"]) @ p["o"],
        i=(5, 6),
        s=(6,),
        b=(6,),
        o=(6, 3),
    ),
    "cut and joined": own(
        lambda m, x: torch.cat([F.relu(h) for h in (x @ m.i).chunk(2, -1)][::-1], -1) @ m.o,
        lambda p, x: jnp.concatenate([jax.nn.relu(h) for h in jnp.split(x @ p["i"], 2, -1)][::-1], -1) @ p["o"],
        i=(5, 6),
        o=(6, 3),
    ),
    "masked": own(
        lambda m, x: (lambda h: (h * (h > 0) - h.abs()) @ m.o)(x @ m.i),
        lambda p, x: (lambda h: (h * (h > 0) - jnp.abs(h)) @ p["o"])(x @ p["i"]),
        i=(5, 6),
        o=(6, 3),
    ),
}


def edges(net: gsgd.Network) -> dict[str, int]:
    """How many entries of every parameter meet a unit."""
    found: dict[str, int] = {}
    for b in net.blocks:
        rows, cols = (ids.reshape(b.extents[0], -1) >= 0 for ids in (b.rows, b.cols))
        met = (rows[:, :, None] | cols[:, None, :]).sum() * np.prod(b.extents[3:], dtype=int)
        found[b.name] = found.get(b.name, 0) + int(met)
    return {name: n for name, n in found.items() if n}


@pytest.mark.parametrize("pair", PAIRS)
def test_both_find_the_same(pair: str) -> None:
    make, apply, shape = PAIRS[pair]
    torch.manual_seed(0)
    model = make()
    params = {name: jax.ShapeDtypeStruct(p.shape, jnp.float32) for name, p in model.named_parameters()}
    one = gsgd.torch.trace(model, torch.randn(shape))
    other = gjax.trace(apply, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert one.num_units == other.num_units > 0
    assert edges(one) == edges(other)
