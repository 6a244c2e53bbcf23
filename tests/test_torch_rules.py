"""Rules of PyTorch's functions beyond layers and ReLUs: products, norms, attention, masks (METHOD.md, section 9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import Call
from torch import Tensor, nn

import gsgd
from gsgd.torch import SymmetryError, rules, trace, verify
from gsgd.torch.values import tensors_in
from gsgd.trace.nodes import Algebra

Op = Callable[[Any, Tensor], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:the traced forward pass did not read")


def between(op: Op, **own: tuple[int, ...]) -> nn.Module:
    """`op` between a layer of 6 units and a head; `own` are shapes of parameters of its own."""
    torch.manual_seed(0)
    layers = {"i": nn.Linear(5, 6), "j": nn.Linear(6, 6), "o": nn.Linear(6, 2)}
    model = Call(lambda m, x: m.o(op(m, torch.relu(m.i(x)))), **layers)
    for name, shape in own.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return model


def heads(h: Tensor) -> Tensor:
    """(4, 6) -> two heads of three channels, first the head."""
    return h.view(4, 2, 3).transpose(0, 1)


def joined(h: Tensor) -> Tensor:
    return h.transpose(0, 1).flatten(1)


def zeroed(h: Tensor) -> Tensor:
    h = 2 * h - h
    h[h < 0] = 0
    return h


def filled(h: Tensor, zeros: Tensor, other: Tensor) -> Tensor:
    """What was 0 is overwritten through a view."""
    part = zeros[:, :3]
    part += h[:, :3]
    return torch.where(h > 0, zeros, other)


NONE: set[str] = set()
# the operation, parameters of its own, units (6 before it), which of its parameters are not described
PRODUCTS: dict[str, tuple[Op, dict[str, tuple[int, ...]], int, set[str]]] = {
    "einsum into heads": (lambda m, h: torch.einsum("bd,hde->bhe", h, m.w).flatten(1), {"w": (2, 6, 3)}, 12, NONE),
    "einsum from heads": (lambda m, h: torch.einsum("bhe,hed->bd", h.view(4, 2, 3), m.w), {"w": (2, 3, 6)}, 12, NONE),
    "einsum without a result": (lambda m, h: torch.einsum("bd, df", h, m.w), {"w": (6, 6)}, 12, NONE),
    "einsum with dots": (lambda m, h: torch.einsum("fd, ...d -> ...f", [m.w, h[None]])[0], {"w": (6, 6)}, 12, NONE),
    "einsum of a diagonal": (lambda m, h: torch.einsum("bd,dd->bd", h, m.w), {"w": (6, 6)}, 0, {"w"}),
    "linear": (lambda m, h: F.linear(h, m.w.t(), m.b).relu(), {"w": (6, 6), "b": (6,)}, 12, NONE),
    "addmm": (lambda m, h: torch.addmm(m.b, h, m.w).relu(), {"w": (6, 6), "b": (6,)}, 12, NONE),
    "bmm": (lambda m, h: joined(torch.bmm(heads(h), m.w).relu()), {"w": (2, 3, 3)}, 12, NONE),
    "baddbmm": (
        lambda m, h: joined(torch.baddbmm(m.b, heads(h), m.w).relu()),
        {"w": (2, 3, 3), "b": (2, 1, 3)},
        12,
        NONE,
    ),
    "a vector": (lambda m, h: torch.matmul(m.w, h[0]).expand(4, -1), {"w": (6, 6)}, 12, NONE),
    "axes split": (lambda m, h: torch.einsum("bd,hed->bhe", h, m.w.view(2, 3, 6)).flatten(1), {"w": (6, 6)}, 12, NONE),
    "axes joined": (lambda m, h: h @ m.w.permute(2, 0, 1).flatten(1), {"w": (2, 3, 6)}, 12, NONE),
    "a part": (lambda m, h: h @ m.w[:6], {"w": (7, 6)}, 0, {"w"}),
    "detached": (lambda m, h: F.linear(h, m.w.t().detach()), {"w": (6, 6)}, 0, {"w"}),
    "read twice": (lambda m, h: h @ m.w.t() + h @ m.w.t(), {"w": (6, 6)}, 0, {"w"}),
    "low rank": (lambda m, h: h @ m.w + h @ m.a @ m.b, {"w": (6, 6), "a": (6, 2), "b": (2, 6)}, 14, NONE),
    "a bias": (lambda m, h: (h + m.b[None]).relu(), {"b": (6,)}, 6, NONE),
    "a bias of two axes": (lambda m, h: joined((heads(h) + m.b).relu()), {"b": (2, 1, 3)}, 6, NONE),
    "a bias per position": (lambda m, h: (h[..., None] + m.b).relu().mean(-1), {"b": (6, 5)}, 6, NONE),
    "a bias of all heads": (lambda m, h: joined((heads(h) + m.b).relu()), {"b": (3,)}, 3, NONE),
    "einsum with two parameters": (
        lambda m, h: torch.einsum("i,io,bi->bo", m.b, m.w, h), {"w": (6, 6), "b": (6,)}, 0, {"w", "b"}
    ),
    "einsum with two features": (
        lambda m, h: torch.einsum("bk,kio,bi->bo", h @ m.v, m.w, h), {"w": (2, 6, 6), "v": (6, 2)}, 12, NONE
    ),
    "experts": (
        lambda m, h: torch.einsum("bk,kio,bi->bo", torch.softmax(m.v[None], 1).expand(4, 2), m.w, h),
        {"w": (2, 6, 6), "v": (2,)},
        12,
        {"v"},
    ),
    "bilinear": (lambda m, h: F.bilinear(torch.ones(4, 3), h, m.w, m.b).relu(), {"w": (6, 3, 6), "b": (6,)}, 12, NONE),
    "tensordot": (lambda m, h: torch.tensordot(h, m.w, 1), {"w": (6, 6)}, 12, NONE),
    "tensordot of two": (
        lambda m, h: torch.tensordot(m.w, h.view(4, 2, 3), dims=([1, -1], [1, 2])).T,
        {"w": (6, 2, 3)},
        12,
        NONE,
    ),
    "mv": (lambda m, h: torch.addmv(m.b, m.w, h[0]).relu().expand(4, -1), {"w": (6, 6), "b": (6,)}, 12, NONE),
    "outer": (lambda m, h: torch.outer(m.w, h[0].mean(0, True)[0].expand(1)).T.expand(4, 6), {"w": (6,)}, 7, NONE),
    "cumulated": (lambda m, h: h.cumsum(0) + h.cummax(0)[0] + h.sort(0).values + h.topk(1, 0)[0], {}, 6, NONE),
    "cumulated channels": (lambda m, h: h.cumsum(1), {}, 1, NONE),
    "lower half": (lambda m, h: h.tril(1).rot90(2), {}, 6, NONE),
    "a norm of two axes": (
        lambda m, h: F.layer_norm(heads(h), (4, 3), m.g, m.b).relu().transpose(0, 1).flatten(1),
        {"g": (4, 3), "b": (4, 3)},
        3,
        NONE,
    ),
    "looked up": (lambda m, h: h + F.embedding(torch.tensor([3, 1, 0, 3]), m.w), {"w": (5, 6)}, 6, NONE),
    "looked up, of norm 1": (
        lambda m, h: h + F.embedding(torch.tensor([3, 1, 0, 3]), m.w, max_norm=1.0),
        {"w": (5, 6)},
        0,
        {"w"},
    ),
    "looked up, with padding": (
        lambda m, h: h + F.embedding(torch.tensor([3, 1, 0, 3]), m.w, padding_idx=0),
        {"w": (5, 6)},
        0,
        {"w"},
    ),
    "bags": (
        lambda m, h: h * F.embedding_bag(torch.arange(8).view(4, 2) % 5, m.w, mode="max").sigmoid()
        + F.embedding_bag(torch.arange(8), m.v, torch.arange(0, 8, 2), per_sample_weights=torch.ones(8), mode="sum"),
        {"w": (5, 6), "v": (8, 6)},
        6,
        NONE,
    ),
    "a gain": (lambda m, h: m.g * h, {"g": (6,)}, 12, NONE),
    "a gain per head": (lambda m, h: joined(heads(h) * m.g), {"g": (2, 1, 1)}, 6, {"g"}),
    "layer scale": (lambda m, h: h + m.g * torch.relu(m.j(h)), {"g": (6,)}, 12, NONE),
    "weights of norm 1": (lambda m, h: F.linear(h, m.g * F.normalize(m.w)), {"w": (6, 6), "g": (6, 1)}, 6, {"w"}),
    "gated": (lambda m, h: F.silu(h @ m.v) * (h @ m.w), {"w": (6, 6), "v": (6, 6)}, 12, NONE),
    "gated by a ReLU": (lambda m, h: (h @ m.v).relu() * (h @ m.w), {"w": (6, 6), "v": (6, 6)}, 12, NONE),
    "gated by one unit": (lambda m, h: (h @ m.v).relu() * h, {"v": (6, 1)}, 6, NONE),
    "divided by features": (lambda m, h: h / (h @ m.w).exp(), {"w": (6, 6)}, 6, NONE),
    "divided by its mean": (lambda m, h: h / (h.mean(0) + 1), {}, 0, NONE),
    "gated by a half": (lambda m, h: F.glu(h @ m.w, 1), {"w": (6, 12)}, 12, NONE),
    "masked by a product": (lambda m, h: -h * (h > 0), {}, 6, NONE),
    "a sum with some zeros": (
        lambda m, h: (h @ m.w).relu() + torch.cat((h[:, :3], h.new_zeros(4, 3)), 1),
        {"w": (6, 6)},
        9,
        NONE,
    ),
    "one of two": (
        lambda m, h: torch.where(h[:, :1] > 0, h @ m.v, h @ m.w),
        {"w": (6, 6), "v": (6, 6)},
        12,
        NONE,
    ),
    "masked by where": (lambda m, h: torch.where(-h > 0, h, torch.zeros_like(h)), {}, 6, NONE),
    "masked by a number": (lambda m, h: (-h).masked_fill(h <= 0, 0), {}, 6, NONE),
    "masked in place": (lambda m, h: zeroed(h), {}, 6, NONE),
    "masked above its mean": (lambda m, h: h * (h > h.mean(1, keepdim=True)), {}, 1, NONE),
    "masked above a half": (lambda m, h: h * (h > 0.5), {}, 0, NONE),
    "a threshold": (lambda m, h: F.threshold(-h, 0, 0), {}, 6, NONE),
    "a threshold to a number": (lambda m, h: F.threshold(-h, 0, 0.5), {}, 0, NONE),
    "a norm with a computed weight": (
        lambda m, h: torch.cat((F.layer_norm(h, (6,), (u := h @ m.w).mean(0))[:, :3], u[:, :3]), 1),
        {"w": (6, 6)},
        0,
        NONE,
    ),
    "attention to positions": (
        lambda m, h: F.scaled_dot_product_attention(*[(h @ m.v).expand(2, 4, 6)] * 2, (h @ m.w).expand(2, 4, 6))[0],
        {"w": (6, 6), "v": (6, 6)},
        12,
        NONE,
    ),
    "signs": (lambda m, h: h * torch.sign(-h), {}, 6, NONE),
    "the larger of it and 0": (lambda m, h: torch.maximum(h, h.new_zeros(4, 6)), {}, 6, NONE),
    "zeros no more": (lambda m, h: filled(h, torch.zeros_like(h), m.j(h)), {}, 3, NONE),
    "constants no more": (lambda m, h: filled(h, torch.zeros(4, 6), m.j(h)), {}, 3, NONE),
}  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_and_masks(case: str) -> None:
    op, own, units, left = PRODUCTS[case]
    model, x = between(op, **own), torch.randn(4, 5)
    if case not in ("layer scale", "zeros no more", "constants no more"):
        del model.j
    net = trace(model, x)
    assert net.num_units == units
    assert net.shapes.keys() == {name for name, _ in model.named_parameters()} - left
    verify(model, net, x)
    same_steps(model, net)


def same_steps(model: nn.Module, net: gsgd.Network) -> None:
    """The C core and the specification move these blocks alike."""
    rng, found = np.random.default_rng(0), []
    start = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    grads = {name: 0.01 * rng.standard_normal(p.shape) for name, p in start.items()}
    for backend in ("c", "reference"):
        params = {name: p.copy() for name, p in start.items()}
        opt = gsgd.GSGD(params, net, lr=0.01, momentum=0.9, backend=backend)
        for _ in range(2):
            opt.step(grads)
        found.append(params)
    for name, p in found[0].items():
        np.testing.assert_allclose(p, found[1][name], rtol=1e-12, atol=1e-12)


WIDTH, FFN = 8, 12


def between_tokens(op: Op, **modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Call(lambda m, x: m.o(op(m, m.i(x))), i=nn.Linear(5, WIDTH), o=nn.Linear(WIDTH, 2), **modules)


def block(attend: Op) -> nn.Module:
    """A pre-norm transformer of one block, with queries, keys and values by one matrix."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + m.p(attend(m, m.qkv(m.n1(x))).flatten(2))
        return m.n3(x + m.w2(torch.relu(m.w1(m.n2(x)))))

    layers = {"qkv": nn.Linear(WIDTH, 3 * WIDTH), "p": nn.Linear(WIDTH, WIDTH)}
    layers |= {"w1": nn.Linear(WIDTH, FFN), "w2": nn.Linear(FFN, WIDTH)}
    return between_tokens(forward, **layers, **{f"n{i}": nn.LayerNorm(WIDTH) for i in (1, 2, 3)})


def by_matmul(m: Any, h: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in h.chunk(3, -1))
    scores = (q @ k.mT / 2).masked_fill(torch.ones(3, 3).tril() == 0, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def by_einsum(m: Any, h: Tensor) -> Tensor:
    q, k, v = h.unflatten(-1, (3, 2, -1)).unbind(2)
    weights = torch.einsum("bqhe,bkhe->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhe->bqhe", weights, v)


def linear_attention(m: Any, h: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in h.chunk(3, -1))
    return (q @ (k.mT @ v) / (1 + q.square() @ k.square().mT.sum(-1, keepdim=True))).transpose(1, 2)


def attention(**options: Any) -> nn.Module:
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)
    return between_tokens(lambda m, x: m.a(y := m.n(x), y, y)[0], n=nn.LayerNorm(WIDTH), a=layer)


def cross_attention(keys: int, values: int) -> nn.Module:
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True, kdim=keys, vdim=values)
    read = {"k": nn.Linear(WIDTH, keys), "v": nn.Linear(WIDTH, values)}
    return between_tokens(lambda m, x: m.a(m.n(x), m.k(x).relu(), m.v(x).relu(), need_weights=False)[0],
                          n=nn.LayerNorm(WIDTH), a=layer, **read)  # fmt: skip


def encoder(layers: int, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, FFN, 0.0, batch_first=True, norm_first=norm_first)
    stack = nn.TransformerEncoder(layer, layers, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    return between_tokens(lambda m, x: m.t(x), t=stack)


def decoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDTH, 2, FFN, 0.0, batch_first=True, norm_first=norm_first)
    return between_tokens(lambda m, x: m.n(m.t(x, torch.relu(m.j(x)))), t=layer, j=nn.Linear(WIDTH, WIDTH),
                          n=nn.LayerNorm(WIDTH))  # fmt: skip


def blurred() -> nn.Module:
    """Filters that are no parameters, one per channel."""
    model = Call(lambda m, x: m.o(F.conv2d(F.pad(torch.relu(m.i(x)), (1, 1, 1, 1), "reflect"), m.f, stride=2, groups=6)
                                  .mean((2, 3))), i=nn.Conv2d(3, 6, 3), o=nn.Linear(6, 2))  # fmt: skip
    model.register_buffer("f", torch.rand(6, 1, 3, 3))
    return model


class ByHand(nn.Module):
    """RMS norm in primitives, rotated queries and keys, values repeated for a group of queries, a gated FFN."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"i": (5, 8), "q": (8, 16), "k": (8, 8), "v": (8, 8), "p": (16, 8), "u": (8, 12), "g": (8, 12)}
        shapes |= {"w": (12, 8), "o": (8, 2)}
        self.layers = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(WIDTH)) for _ in range(3))

    def normed(self, x: Tensor, which: int) -> Tensor:
        return self.gains[which] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def heads(self, name: str, h: Tensor) -> Tensor:
        return self.layers[name](h).view(2, 3, -1, 4).transpose(1, 2)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers["i"](x)
        h = self.normed(x, 0)
        q, k, v = (self.heads(name, h) for name in "qkv")
        angles = torch.arange(3)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        q, k = (t * angles.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angles.sin() for t in (q, k))
        k, v = (t[:, :, None].expand(2, 2, 2, 3, 4).reshape(2, 4, 3, 4) for t in (k, v))
        scores = q @ k.transpose(2, 3) + torch.full((3, 3), -1e9).triu(1)
        x = x + self.layers["p"]((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 3, -1))
        h = self.normed(x, 1)
        x = x + self.layers["w"](F.silu(self.layers["g"](h)) * self.layers["u"](h))
        return self.layers["o"](self.normed(x, 2))  # type: ignore[no-any-return]


BLOCK = 3 * WIDTH + FFN  # two norms, the values, the hidden layer
TOKENS = (2, 3, 5)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear attention": (lambda: block(linear_attention), TOKENS, BLOCK + WIDTH),
    "attention by matmul": (lambda: block(by_matmul), TOKENS, BLOCK + WIDTH),
    "attention by einsum": (lambda: block(by_einsum), TOKENS, BLOCK + WIDTH),
    # the norm, the values, what is projected
    "nn.MultiheadAttention": (attention, TOKENS, 3 * WIDTH),
    "without biases": (lambda: attention(bias=False), TOKENS, 3 * WIDTH),
    "with a key and a value more": (lambda: attention(add_bias_kv=True, add_zero_attn=True), TOKENS, 3 * WIDTH),
    "of other values": (lambda: cross_attention(8, 8), TOKENS, 3 * WIDTH + 8 + 8),
    "of other widths": (lambda: cross_attention(4, 6), TOKENS, 3 * WIDTH + 4 + 6),
    "encoder, norms first": (lambda: encoder(2, True), TOKENS, 2 * BLOCK + WIDTH),
    # norms end the stream: the first of a layer is one with the sum that the second reads
    "encoder, norms last": (lambda: encoder(2, False), TOKENS, 2 * (WIDTH + FFN) + WIDTH),
    "decoder, norms first": (lambda: decoder(True), TOKENS, 5 * WIDTH + FFN + 2 * WIDTH),
    "decoder, norms last": (lambda: decoder(False), TOKENS, 2 * WIDTH + FFN + 2 * WIDTH),
    "grouped queries and gates, by hand": (ByHand, TOKENS, BLOCK + WIDTH),
    "instance norm": (
        lambda: Call(lambda m, x: m.o(m.n(m.i(x.mT)).relu().mean(-1)),
                     i=nn.Conv1d(5, WIDTH, 1), n=nn.InstanceNorm1d(WIDTH, affine=True), o=nn.Linear(WIDTH, 2)),
        TOKENS,
        WIDTH,
    ),
    "filters that stay": (blurred, (2, 3, 9, 9), 6),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_transformers_and_norms(name: str) -> None:
    build, shape, units = MODELS[name]
    model, x = build(), torch.randn(shape)
    net = trace(model, x)
    assert {n for n, _ in model.named_parameters()} - net.shapes.keys() <= {"a.bias_k"}
    verify(model, net, x)
    assert net.num_units == units
    same_steps(model, net)


UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.relu,
    lambda x: x * (x > 0),
    lambda x: torch.where(x < 0, torch.zeros_like(x), x),
    lambda x: x.masked_fill(x.abs() < 0.5, 0.0),
    lambda x: x * torch.sign(x).detach(),
    lambda x: x.softmax(-1),
    lambda x: F.layer_norm(x, (6,)),
    lambda x: x / x.square().mean(-1, keepdim=True).add(1).sqrt(),
    lambda x: x.unflatten(-1, (2, 3)).transpose(2, 3).flatten(2),
    lambda x: x.mean(1, keepdim=True).expand_as(x),
    lambda x: x.cumsum(1),
]
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.mul,
    lambda x, y: torch.where(y > 0, x, y),
    lambda x, y: x * (y > 0),
    lambda x, y: x * (y > x),
    lambda x, y: (x @ y.mT).softmax(-1) @ y,
    lambda x, y: torch.einsum("bij,bjd->bid", torch.tanh(x @ y.mT), x),
    lambda x, y: F.scaled_dot_product_attention(x, y, x + y),
    lambda x, y: torch.tanh(y @ y.mT) @ x,
    lambda x, y: x / (1 + y.square()),
    lambda x, y: torch.relu(x) * y.mean(1, keepdim=True),
    lambda x, y: y @ (x.mT @ y) / (1 + y.square().sum(1, keepdim=True)),
]
# of a value and of parameters of its own
LEARNED: list[tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = [
    (lambda x, w: x @ w, ((6, 6),)),
    (lambda x, w, b: F.linear(x, w.t(), b), ((6, 6), (6,))),
    (lambda x, w: torch.einsum("bnd,hde->bnhe", x, w).flatten(2), ((2, 6, 3),)),
    (lambda x, w: torch.einsum("bnhe,hed->bnd", x.unflatten(-1, (2, 3)), w), ((2, 3, 6),)),
    (lambda x, w: torch.einsum("bnge,gef->bngf", x.unflatten(-1, (2, 3)), w).flatten(2), ((2, 3, 3),)),
    (lambda x, w: torch.einsum("nm,bmd->bnd", w, x), ((4, 4),)),
    (lambda x, g: x * g, ((6,),)),
    (lambda x, g: x * g, ((4, 1),)),
    (lambda x, b: x + b, ((6,),)),
    (lambda x, b: x + b, ((4, 6),)),
    (lambda x, w: x + F.embedding(torch.tensor([2, 0, 0, 1]), w), ((3, 6),)),
    (lambda x, w: F.bilinear(x.sigmoid(), x, w), ((6, 6, 6),)),
    (lambda x, w: torch.tensordot(x, w, 1), ((6, 6),)),
    (lambda x, g, b: F.layer_norm(x, (4, 6), g, b), ((4, 6), (4, 6))),
    (lambda x, g, b: F.layer_norm(x, (6,), g, b), ((6,), (6,))),
    (lambda x, g: F.rms_norm(x, (6,), g), ((6,),)),
    (lambda x, g, b: F.group_norm(x.mT, 2, g, b).mT, ((6,), (6,))),
    (lambda x, g, b: F.instance_norm(x.mT, weight=g, bias=b).mT, ((6,), (6,))),
]


class Random(nn.Module):
    """A program: each line makes a value of 4 positions and 6 channels out of those before it."""

    def __init__(self, lines: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.lines = lines
        self.own = nn.ModuleList()
        for kind, _, _ in lines:
            shapes = LEARNED[kind % len(LEARNED)][1]
            self.own.append(nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes))
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.stem(x)]
        for (kind, one, two), own in zip(self.lines, self.own, strict=True):
            a, b = values[-1 - one % len(values)], values[-1 - two % len(values)]
            which = kind // len(LEARNED) % (len(UNARY) + len(BINARY) + 15)
            if which < len(UNARY):
                values.append(UNARY[which](a))
            elif which < len(UNARY) + len(BINARY):
                values.append(BINARY[which - len(UNARY)](a, b))
            else:
                values.append(LEARNED[kind % len(LEARNED)][0](a, *own))
        return self.head(values[-1]).mean(1)


@given(st.lists(st.tuples(*[st.integers(0, 10_000)] * 3), min_size=3, max_size=10), st.sampled_from(["tie", "pin"]))
def test_random_programs_are_never_misdescribed(lines: list[tuple[int, int, int]], residual: Any) -> None:
    torch.manual_seed(3)
    model, x = Random(lines), torch.randn(2, 4, 3)
    verify(model, trace(model, x, residual=residual), x)


# rules that say too little, and what finds them


Rule = Callable[..., Any]


def passed(rule: Rule) -> Rule:
    """As if the function did nothing."""

    def mutant(run: Any, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        x = next(t for t in args if isinstance(t, Tensor) and t.is_floating_point())
        return [np.broadcast_to(run.nodes(x), t.shape) for t in tensors_in(out) if t.is_floating_point()]

    return mutant


def rolled(dim: int) -> Callable[[Rule], Rule]:
    """Channels are taken for their neighbours."""

    def of(rule: Rule) -> Rule:
        def mutant(*call: Any) -> Any:
            made = rule(*call)
            found = [np.roll(n, 1, dim) for n in (made if isinstance(made, list | tuple) else [made])]
            return found if isinstance(made, list | tuple) else found[0]

        return mutant

    return of


def of_first(rule: Rule) -> Rule:
    """What is taken together is what comes first."""
    return lambda run, func, args, kwargs, out: np.broadcast_to(run.nodes(args[0])[:, :1], out.shape)


def without_options(rule: Rule) -> Rule:
    return lambda run, func, args, kwargs, out: rule(run, func, args[:2], {}, out)


def maps(op: Op) -> Op:
    """`op` on maps of 2 x 2."""
    return lambda m, h: op(m, h[..., None, None].expand(4, 6, 2, 2)).mean((2, 3))


def set_to_one(h: Tensor) -> Tensor:
    h = 1 * h
    h[h <= 0] = 1
    return h


PLACES = torch.tensor([3, 1, 0, 3])
BACKWARD = torch.arange(5, -1, -1).expand(4, 6)
# a function of each rule, the mutant, a model that finds it
MUTANTS: dict[str, tuple[Callable[[Rule], Rule], Op]] = {
    "abs": (rolled(1), lambda m, h: torch.abs(h)),
    "add": (passed, lambda m, h: h + m.j(h)),
    "addmm": (rolled(1), lambda m, h: torch.addmm(h, h, m.j.weight)),
    "batch_norm": (passed, lambda m, h: F.batch_norm(h, None, None, training=True)),
    "bilinear": (rolled(1), lambda m, h: F.bilinear(h, torch.ones(4, 6), m.w)),
    "clamp": (passed, lambda m, h: (10 * h).clamp(0, 1)),
    "conv2d": (rolled(1), maps(lambda m, h: F.conv2d(h, m.c))),
    "conv_transpose2d": (rolled(1), maps(lambda m, h: F.conv_transpose2d(h, m.c))),
    "cumsum": (passed, lambda m, h: h.cumsum(1)),
    "div": (passed, lambda m, h: h / (m.j(h).abs() + h)),
    "einsum": (rolled(1), lambda m, h: torch.einsum("bi,oi->bo", h, m.j.weight)),
    "embedding": (rolled(1), lambda m, h: F.embedding(PLACES, m.j.weight)),
    "embedding_bag": (rolled(1), lambda m, h: F.embedding_bag(PLACES[:, None], m.j.weight)),
    "flip": (rolled(1), lambda m, h: h.flip(1)),
    "gather": (passed, lambda m, h: h.gather(1, BACKWARD)),
    "grid_sample": (rolled(1), maps(lambda m, h: F.grid_sample(h, torch.zeros(4, 2, 2, 2), align_corners=True))),
    "group_norm": (passed, lambda m, h: F.group_norm(h, 2)),
    "glu": (
        lambda rule: lambda run, func, args, kwargs, out: run.nodes(args[0])[:, :6],
        lambda m, h: F.glu(torch.cat([h[:, :1].expand(4, 6), h], 1), 1),
    ),
    "gt": (passed, lambda m, h: h * (h > 0.5)),
    "instance_norm": (passed, maps(lambda m, h: F.instance_norm(h * torch.arange(1.0, 5).view(2, 2)).relu())),
    "interpolate": (rolled(1), maps(lambda m, h: F.interpolate(h, scale_factor=2))),
    "layer_norm": (passed, lambda m, h: F.layer_norm(h, (6,))),
    "linear": (rolled(1), lambda m, h: m.j(h)),
    "masked_fill": (passed, lambda m, h: h.masked_fill(h <= 0, 1.0)),
    "matmul": (rolled(1), lambda m, h: h @ m.j.weight),
    "max_pool2d": (rolled(1), maps(lambda m, h: F.max_pool2d(h, 2))),
    "maximum": (passed, lambda m, h: torch.maximum(h, m.j(h))),
    "mean": (of_first, lambda m, h: h.mean(1, keepdim=True).expand(4, 6)),
    "mul": (passed, lambda m, h: h * h),
    "multi_head_attention_forward": (rolled(2), lambda m, h: m.a(*[h[None]] * 3)[0][0]),
    "outer": (rolled(1), lambda m, h: torch.outer(torch.ones(4), h[0])),
    "pad": (without_options, lambda m, h: F.pad(h[..., None], (1, 1), value=1.0).mean(2)),
    "prelu": (rolled(1), lambda m, h: F.prelu(h, torch.ones(1))),
    "rand_like": (passed, lambda m, h: h + torch.rand_like(h)),
    "rms_norm": (passed, lambda m, h: F.rms_norm(h, (6,))),
    "scaled_dot_product_attention": (rolled(1), lambda m, h: F.scaled_dot_product_attention(h, h, m.j(h))),
    "scatter_add": (passed, lambda m, h: h.scatter_add(1, BACKWARD, m.j(h))),
    "scatter_reduce": (passed, lambda m, h: h.scatter_reduce(1, BACKWARD, m.j(h), "amax")),
    "__setitem__": (passed, lambda m, h: set_to_one(h)),
    "sign": (passed, lambda m, h: torch.sign(h - 2 * m.j(h))),
    "tensordot": (rolled(1), lambda m, h: torch.tensordot(h, m.j.weight, 1)),
    "topk": (passed, lambda m, h: h.topk(6, 1)[0]),
    "threshold": (passed, lambda m, h: F.threshold(h, 0.5, 0.0)),
    "where": (passed, lambda m, h: torch.where(h > 0, h, 1.0)),
}
TABLES = (rules.RULES, rules.ELEMENTWISE)


def family(rule: Rule) -> object:
    return rule.__qualname__ if "_pooled" in rule.__qualname__ else rule


def test_every_rule_has_a_mutant() -> None:
    all_rules = {family(rule) for table in TABLES for rule in table.values()}
    assert all_rules == {family(rules.find_rule(name)) for name in MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_verify_finds_rules_that_say_too_little(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, op = MUTANTS[name]
    model, x = between(op, c=(6, 6, 1, 1), w=(6, 6, 6)), torch.randn(4, 5)
    model.a = nn.MultiheadAttention(6, 2)
    verify(model, trace(model, x), x)
    for table in TABLES:
        for known, rule in list(table.items()):
            if family(rule) == family(rules.find_rule(name)):
                monkeypatch.setitem(table, known, mutant(rule))
    wrong = trace(model, x)
    with pytest.raises(SymmetryError):
        verify(model, wrong, x)


def test_verify_finds_zeros_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Algebra, "overwrite", lambda *_: None)
    model, x = between(lambda m, h: filled(h, torch.zeros_like(h), m.j(h))), torch.randn(4, 5)
    wrong = trace(model, x)
    with pytest.raises(SymmetryError):
        verify(model, wrong, x)
