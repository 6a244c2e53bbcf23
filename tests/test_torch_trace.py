"""From a PyTorch model to its network, and the check that the network tells the truth."""

from __future__ import annotations

import collections
import copy
import dataclasses
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from models import Call
from torch import Tensor, nn

from gsgd import Network
from gsgd.torch import GSGD, SymmetryError, trace, verify


def images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


def vectors(width: int) -> Tensor:
    return torch.randn(4, width)


# model, inputs, units (H), units with residual="pin"
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int, int]] = {
    "mlp": (lambda: models.mlp((7, 5, 9, 3, 4)), lambda: vectors(7), 17, 17),
    "mlp without bias": (lambda: models.mlp((7, 5, 9, 3, 4), bias=False), lambda: vectors(7), 17, 17),
    "lenet": (models.LeNet, lambda: images(28, 1), 6 + 16 + 120 + 84, 226),
    "vgg16": (lambda: models.Vgg16(4), lambda: images(32), 4 * 66 + 32 + 32, 328),
    "vgg16 with batch norm": (lambda: models.Vgg16(4, True), lambda: images(32), 4 * 66 + 32 + 32, 328),
    # a plain net has no sums: every map after the stem and the 32 convolutions is a unit
    "plain34": (lambda: models.plain34(4), lambda: images(16), 4 * (1 + 6 * 1 + 8 * 2 + 12 * 4 + 6 * 8), 476),
    "resnet34": (lambda: models.resnet34(4), lambda: images(16), 4 * (3 + 8 + 24 + 24) + 4 * 15, 236),
    # a shortcut of zeros ties each stage's stream to the middle channels of the next: one stream of 16
    "resnet110": (lambda: models.resnet110(4), lambda: images(8), 18 * 28 + 16, 18 * 28),
    "resnet18": (models.resnet18, lambda: images(33), 1920 + 960, 1920),
    "resnet50": (lambda: models.resnet50(8), lambda: images(33), 944 + 8 + 32 + 64 + 128 + 256, 944 + 8),
    "densenet": (models.DenseNet, lambda: images(8), 332, 332),
    "googlenet": (models.GoogLeNet, lambda: images(16), 8 + (20 + 8) + (20 + 6), 62),
    "squeezenet": (models.SqueezeNet, lambda: images(32), 16 + 20 + 20 + 30, 86),
    "mobilenet": (models.MobileNetV2, lambda: images(16), 12, 0),  # all but one stream meets a ReLU6
    "mobilenet with relu": (lambda: models.MobileNetV2(nn.ReLU), lambda: images(16), 196, 176),
    "shufflenet": (models.ShuffleNet, lambda: images(8), 12 + 16 + 2 * 24, 76),
    "u-net": (models.UNet, lambda: images(16, 1), 94, 94),
    "u-net with interpolation": (lambda: models.UNet(True), lambda: images(16, 1), 76, 76),
    # the values of attention, the norms, the ReLU FFN
    "encoder": (models.Encoder, lambda: torch.randint(11, (2, 5)), 8 + 3 * 8 + 16, 48),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_is_described_and_verified(name: str) -> None:
    torch.manual_seed(0)
    build, inputs, units, inside = MODELS[name]
    model, x = build(), inputs()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    net = trace(model, x)
    assert net.num_units == units
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert net.shapes == parameters
    if name != "encoder":  # tokens are no guess
        without = trace(model)
        assert (without.units, without.shapes) == (net.units, net.shapes)
    verify(model, net, x)
    pinned = trace(model, x, residual="pin")
    assert pinned.num_units == inside
    verify(model, pinned, x)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_reasons_are_shown() -> None:
    table = str(trace(models.MobileNetV2(), images(16)))
    assert "24 pinned (relu6 in features.8)" in table or "24 pinned (hardtanh in features.8)" in table
    table = str(trace(models.Encoder(), torch.randint(11, (2, 5))))
    for reason in ("gelu in gelu_ffn.1", "matmul in the model: by a feature", "16 units"):
        assert reason in table


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_approximations_of_batch_norm(mode: Any) -> None:
    model = models.resnet34(4)
    net = trace(model, batch_norm=mode)
    assert net.num_units == trace(model).num_units
    assert not any("bn" in name for name in net.shapes)
    with pytest.raises(ValueError, match="exact"):
        verify(model, net, images(16))
    dense = trace(models.DenseNet(), batch_norm=mode)  # some of its batch norms follow a concatenation
    assert dense.num_units > 0


class Between(nn.Module):
    """`op` between two layers of 8 units and a 1x1 head; it may use `self.c`, a convolution 8 -> 8, and tensors."""

    def __init__(self, op: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)
        self.op = op
        self.offset = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("order", torch.randperm(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.op(self, torch.relu(self.a(x)))).mean((2, 3))


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


@torch.library.custom_op("gsgd_test::relu", mutates_args=())
def relu_of_another_library(x: Tensor) -> Tensor:
    return F.relu6(3 * x)


@relu_of_another_library.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


relu_of_another_library.register_autograd(lambda ctx, g: g)


def flatten(x: Tensor) -> Tensor:
    """A function of another module with a name of torch's."""
    if torch.overrides.has_torch_function((x,)):
        return torch.overrides.handle_torch_function(flatten, (x,), x)
    return torch.sigmoid(x)


def written_by_parts(model: Between, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    part = out[:, :4]
    part += x[:, :4]
    return out


def product_in_place(model: Between, x: Tensor) -> Tensor:
    out = torch.ones_like(x)
    part = out[:, :4]
    out *= x
    return torch.cat([part, out[:, :4]], 1)


def without_gradients(model: Between, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def stochastic_depth(m: Between, x: Tensor) -> Tensor:
    return x + m.c(x) * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5)


# what is kept: the operation, and the units (of 8, and 8 more of `self.c`) that remain
UNDERSTOOD: dict[str, tuple[Callable[[Between, Tensor], Tensor], int]] = {
    "permute": (lambda m, x: x.permute(0, 2, 3, 1).reshape(-1, 8).view(2, 6, 6, 8).movedim(-1, 1), 8),
    "index": (lambda m, x: x[:, m.order], 8),
    "chunk": (lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1), 8),
    "split": (lambda m, x: torch.cat(x.split([3, 5], 1)[::-1], 1), 8),
    "unbind": (lambda m, x: torch.stack(x.unbind(1)[::-1], 1), 8),
    "channel shuffle": (lambda m, x: F.channel_shuffle(x, 4), 8),
    "pixel shuffle": (lambda m, x: F.pixel_shuffle(x, 2).repeat(1, 4, 1, 1), 2),
    "concatenate positions": (lambda m, x: torch.cat([x, m.c(x)], 3), 8),
    "mixed up": (lambda m, x: x.reshape(2, 6, 6, 8).permute(0, 3, 1, 2), 1),
    "mean over channels": (lambda m, x: x.mean(1, keepdim=True).expand(-1, 8, -1, -1), 1),
    "max unpool": (lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), 8),
    "lp pool": (lambda m, x: F.lp_pool2d(x, 2, 2), 8),
    "interpolate": (lambda m, x: F.interpolate(x, scale_factor=2, mode="bicubic"), 8),
    "reflect": (lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 8),
    "reflected channels": (
        lambda m, x: F.pad(x.flatten(2).mT, (2, 2), mode="reflect")[..., 4:].mT.reshape(x.shape),
        1,
    ),
    "zeros": (lambda m, x: F.pad(x, (1, -1, 2, 0)), 8),
    "zeros for channels": (lambda m, x: m.c(x) + F.pad(x[:, :4], (0, 0, 0, 0, 2, 2)), 8 + 8 - 4),
    "constant factor": (lambda m, x: -2 * x / 3, 8),
    "learned factor": (lambda m, x: x * m.offset, 16),
    "gate": (lambda m, x: x * torch.sigmoid(m.c(F.adaptive_avg_pool2d(x, 1))), 8),
    "difference": (lambda m, x: torch.sub(x, m.c(x), alpha=2), 8),
    "maximum": (lambda m, x: torch.maximum(x, m.c(x)), 8),
    "clamp": (lambda m, x: (-x).clamp(min=0), 8),
    "largest": (lambda m, x: x.max(2, keepdim=True)[0] + x.amin((2, 3), keepdim=True), 8),
    "largest, by name": (lambda m, x: x.max(dim=3)[0].unsqueeze(-1) + torch.mean(x, axis=2, keepdim=True), 8),
    "maximum, by name": (lambda m, x: torch.max(x, other=m.c(x)), 8),
    "a number": (lambda m, x: x * m.offset[0, 0, 0] * m.offset.mean().reshape(1), 8),
    "leaky": (lambda m, x: F.leaky_relu(F.prelu(-x, m.offset.flatten()), -0.2), 8),
    "dropout": (lambda m, x: F.dropout2d(x, 0.3, m.training), 8),
    "stochastic depth": (stochastic_depth, 8),
    "functional weight": (lambda m, x: F.conv2d(x, m.c.weight), 16),
    "computed bias": (lambda m, x: F.conv2d(x, m.c.weight, 2 * m.c.bias), 8),
    "computed bias of a dense layer": (
        lambda m, x: F.linear(x.movedim(1, -1), m.c.weight.flatten(1), 2 * m.c.bias).movedim(-1, 1),
        8,
    ),
    "unused": (lambda m, x: (m.c(x), x)[1], 8),
    "unfold": (lambda m, x: F.fold(F.unfold(x, 3), (6, 6), 3), 0),
    "python's sum": (lambda m, x: sum([x, m.c(x)]), 8),
    "relu6": (lambda m, x: F.relu6(x), 0),
    "hardtanh": (lambda m, x: F.hardtanh(x), 0),
    "clamp above": (lambda m, x: x.clamp(0, 1), 0),
    "offset": (lambda m, x: x + m.offset, 8),
    "constant": (lambda m, x: x + 1, 0),
    "padding by ones": (lambda m, x: F.pad(x, (1, 1), value=1.0), 0),
    "square": (lambda m, x: x * x, 0),
    "quotient": (lambda m, x: x / m.c(x), 8),
    "quotient and its divisor": (lambda m, x: x / (h := m.c(x)) + h, 0),
    "rounded": (lambda m, x: torch.div(x, 0.3, rounding_mode="floor"), 0),
    "integers": (lambda m, x: x.to(torch.int64).to(x.dtype), 0),
    "mask": (lambda m, x: x * (x > 0.5), 0),
    "detach": (lambda m, x: x.detach(), 0),
    "detached branch": (lambda m, x: x + m.c(x).detach(), 0),
    "no_grad": (without_gradients, 0),
    "autograd.Function": (lambda m, x: Hidden.apply(x), 0),
    "another library's relu": (lambda m, x: torch.ops.gsgd_test.relu(x), 0),
    "another module's flatten": (lambda m, x: flatten(x), 0),
    "called twice": (lambda m, x: m.c(m.c(x)), 0),
    "weight read elsewhere": (lambda m, x: m.c(x) * m.c.weight.norm(), 0),
    "computed weight": (lambda m, x: F.conv2d(x, 2 * m.c.weight, m.c.bias), 0),
    "bias from features": (lambda m, x: F.conv2d(x, m.c.weight, x.mean((0, 2, 3))), 0),
    "slope from features": (lambda m, x: F.prelu(-x, x.mean((0, 2, 3))), 0),
    "written by parts": (written_by_parts, 0),
    "product in place": (product_in_place, 0),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_operation(name: str) -> None:
    op, units = UNDERSTOOD[name]
    torch.manual_seed(1)
    model, x = Between(op), images(6)
    net = trace(model, x)
    assert net.num_units == units
    verify(model, net, x)


UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.relu,
    torch.abs,
    torch.neg,
    lambda x: 3 * x,
    lambda x: x.flip(1),
    lambda x: x.transpose(2, 3),
    lambda x: F.max_pool2d(x, 3, 1, 1),
    lambda x: torch.roll(x, 1, 1),
    lambda x: models.shuffle(x, 2),
    lambda x: x.mean((2, 3), keepdim=True) + 0 * x,
    lambda x: F.pad(x[:, :2], (0, 0, 0, 0, 1, 1)),
    lambda x: x[:, [3, 1, 0, 0]],
    lambda x: x.reshape(2, 2, 2, 3, 3).sum(1).repeat(1, 2, 1, 1),
    torch.sigmoid,
    lambda x: x.softmax(1),
    lambda x: x + 0.5,
    lambda x: x.clone().mul_(0.5),
]
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.maximum,
    lambda x, y: torch.cat([x[:, 2:], y[:, :2]], 1),
    lambda x, y: torch.cat([x, y], 3)[..., 1:4],
    lambda x, y: x.clone().add_(y),
    lambda x, y: x * torch.sigmoid(y),
]


class Random(nn.Module):
    """A program: each line makes a value of 4 channels out of those before it."""

    def __init__(self, lines: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.lines = lines
        kernels, groups = (1, 3), (1, 2, 4)
        convs = [nn.Conv2d(4, 4, k := kernels[i % 2], padding=k // 2, groups=groups[i % 3]) for i in range(len(lines))]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in lines)
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for i, (kind, one, two) in enumerate(self.lines):
            a, b = values[-1 - one % len(values)], values[-1 - two % len(values)]
            kind %= len(UNARY) + len(BINARY) + 25
            if kind < len(UNARY):
                values.append(UNARY[kind](a))
            elif kind < len(UNARY) + len(BINARY):
                values.append(BINARY[kind - len(UNARY)](a, b))
            elif kind % 3:
                values.append(torch.relu(self.convs[i](a)))
            else:
                values.append(self.norms[i](self.convs[i](a)))
        return self.head(values[-1].flatten(1))


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 3), min_size=3, max_size=10), st.sampled_from(["tie", "pin"]))
def test_random_programs_are_never_misdescribed(lines: list[tuple[int, int, int]], residual: Any) -> None:
    torch.manual_seed(2)
    model, x = Random(lines), torch.randn(2, 4, 3, 3)
    verify(model, trace(model, x, residual=residual), x)


@pytest.mark.filterwarnings("ignore:the model asks for real values")
@pytest.mark.parametrize("name", [*UNDERSTOOD, "lenet", "resnet34", "densenet", "u-net", "encoder"])
def test_a_run_on_values_finds_the_same(name: str) -> None:
    """It is what follows where real values are asked for."""
    torch.manual_seed(1)
    inner, x = (Between(UNDERSTOOD[name][0]), images(6)) if name in UNDERSTOOD else (f() for f in MODELS[name][:2])

    def ask(m: Any, x: Tensor) -> Tensor:
        float(next(m.parameters()).detach().mean())
        return m.inner(x)

    blind, real = trace(inner, x, prefix="inner."), trace(Call(ask, inner=inner), x)
    assert (blind.units, blind.shapes, blind.plain.keys()) == (real.units, real.shapes, real.plain.keys())
    assert [(b.name, b.dims) for b in blind.blocks] == [(b.name, b.dims) for b in real.blocks]
    assert all(np.array_equal(b.rows, r.rows) for b, r in zip(blind.blocks, real.blocks, strict=True))
    assert all(np.array_equal(b.cols, r.cols) for b, r in zip(blind.blocks, real.blocks, strict=True))


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), *layers, nn.Linear(6, 2))


def shared_memory() -> nn.Module:
    model = chain(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    model[4].weight.data = model[2].weight.data
    return model


def tied() -> nn.Module:
    layer = nn.Linear(6, 6)
    return chain(layer, nn.ReLU(), layer, nn.ReLU())


def keeps(m: Any, x: Tensor) -> Tensor:
    m.kept = torch.relu(m.i(x))
    return m.o(m.kept)


@pytest.mark.parametrize(
    ("build", "inputs", "units"),
    [
        (lambda: chain(nn.BatchNorm1d(6)), vectors(5), 6),
        (lambda: chain(nn.BatchNorm1d(6, affine=False)), vectors(5), 0),
        (lambda: chain(nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU()), vectors(5), 6),
        (lambda: chain(nn.Linear(6, 6).requires_grad_(False), nn.ReLU()), vectors(5), 12),
        (lambda: chain().bfloat16(), vectors(5).bfloat16(), 6),
        (lambda: chain(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.ReLU()), vectors(5), 0),
        (lambda: chain(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.ReLU()), vectors(5), 0),
        (shared_memory, vectors(5), 0),
        (tied, vectors(5), 0),
        (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(chain(nn.BatchNorm1d(6))), vectors(5), 6),
        (lambda: nn.DataParallel(chain()), vectors(5), 6),
        (lambda: torch.compile(chain()), vectors(5), 6),
        (
            lambda: nn.Sequential(
                nn.Conv1d(3, 6, 3, dilation=2), nn.ReLU(), nn.Conv1d(6, 6, 3, groups=6), nn.ReLU(),
                nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, 2),
            ),
            torch.randn(2, 3, 20),
            12,
        ),
        (
            lambda: nn.Sequential(
                nn.Conv3d(3, 4, 3, stride=2), nn.ReLU(), nn.ConvTranspose3d(4, 6, 2, groups=2), nn.ReLU(),
                nn.MaxPool3d(2), nn.Flatten(), nn.Linear(48, 2),
            ),
            torch.randn(2, 3, 9, 9, 9),
            10,
        ),
        (
            lambda: nn.Sequential(
                nn.ConvTranspose2d(3, 6, 3, 2), nn.PReLU(6), nn.ConvTranspose2d(6, 4, 3, groups=2, dilation=2),
                nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"),
            ),
            images(5),
            10,
        ),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8), 16 + 8),
        (
            lambda: Call(lambda m, x: m.o(m.r(torch.relu(m.i(x)))[0]),
                         i=nn.Linear(5, 6), r=nn.LSTM(6, 6), o=nn.Linear(6, 2)),
            torch.randn(3, 2, 5),
            0,
        ),
        (
            lambda: Call(lambda m, *, x, y: {"z": [m.o(torch.relu(m.i(x) + m.j(y))), 3, None]},
                         i=nn.Linear(5, 6), j=nn.Linear(4, 6), o=nn.Linear(6, 2)),
            {"x": vectors(5), "y": vectors(4)},
            6,
        ),
        (
            lambda: Call(lambda m, x: (h := torch.relu(m.i(x)), m.o(h)), i=nn.Linear(5, 6), o=nn.Linear(6, 2)),
            vectors(5),
            0,
        ),
        (lambda: Call(lambda m, x: m.i(x) - m.i(x.flip(0)), i=nn.Linear(5, 2)), vectors(5), 0),
        (lambda: Call(lambda m, x: m.i(x).detach(), i=nn.Linear(5, 2)), vectors(5), 0),
        (lambda: Call(keeps, i=nn.Linear(5, 6), o=nn.Linear(6, 2)), vectors(5), 0),
        (
            lambda: Call(lambda m, x: m.o(torch.cat([m.i(x).relu().flatten(1), m.j(x)[..., ::2, ::2].flatten(1)], 1)),
                         i=nn.Conv2d(3, 4, 1), j=nn.Conv2d(3, 5, 1), o=nn.Linear(4 * 64 + 5 * 16, 2)),
            images(8),
            9,
        ),
    ],
)  # fmt: skip
def test_module(build: Callable[[], nn.Module], inputs: Any, units: int) -> None:
    torch.manual_seed(0)
    model = build()
    net = trace(model, inputs)
    assert net.num_units == units
    verify(model, net, inputs)


def test_flattened_maps_are_taps_in_both_orders() -> None:
    for dims, order in (((0, 1, 2, 3), "channels_first"), ((0, 2, 3, 1), "channels_last")):
        model = Call(lambda m, x, dims=dims: m.o(torch.relu(m.i(x)).permute(dims).flatten(1)),
                     i=nn.Conv2d(3, 4, 1), o=nn.Linear(36, 2))  # fmt: skip
        net = Network()
        h = net.conv("i.weight", net.input(3), 4, (1, 1), bias="i.bias")
        net.output(net.dense("o.weight", net.flatten(h, 9, order), 2, bias="o.bias"))
        assert [b.dims for b in trace(model, images(3)).blocks] == [b.dims for b in net.blocks]


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x.sigmoid() + 1


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Between(lambda m, x: x * scripted(x)), images(6), "out of sight"),
        (Between(lambda m, x: torch.vmap(torch.sigmoid)(x)), images(6), "out of sight"),
        (nn.Sequential(torch.jit.script(nn.Linear(5, 5))), vectors(5), "'0' is compiled by TorchScript"),
        (nn.Sequential(nn.LazyLinear(5)), vectors(5), "LazyLinear is lazy"),
        (chain(), vectors(4), "linear in 0"),
        (Call(lambda m, x, y: m.i(x) + y, i=nn.Linear(5, 5)), None, "pass example_inputs"),
        (models.Encoder(), None, "pass example_inputs"),
        (torch.jit.script(chain()), None, "the model is compiled by TorchScript"),
        (
            Between(lambda m, x: x if x.sum() > 0 else -x).to("meta"),
            images(6),
            r"bool in the model, .*test_torch_trace.py:\d+: .* values are asked for; trace a part .*prefix='a\.'",
        ),
    ],
)
def test_what_cannot_be_followed(model: nn.Module, inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(model, inputs)


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Any = None


class Named(collections.OrderedDict):
    """A mapping that torch's trees do not know."""


class ToTuple:
    def __init__(self, *values: Any) -> None:
        self.values = values

    def to_tuple(self) -> tuple[Any, ...]:
        return self.values


@pytest.mark.parametrize(
    ("wrap", "hidden"),
    [
        (lambda h, y: Output(y, None), False),
        (lambda h, y: Output(y, Output(h)), True),
        (lambda h, y: [Named(logits=y)], False),
        (lambda h, y: Named(logits=y, hidden=(h, 3)), True),
        (lambda h, y: {"logits": ToTuple(y, "text")}, False),
        (lambda h, y: ToTuple(y, Named(hidden=h)), True),
        (lambda h, y: SimpleNamespace(logits={y}), False),
        (lambda h, y: SimpleNamespace(logits=y, cache=SimpleNamespace(layers=[{h}])), True),
    ],
)
def test_outputs_are_looked_into(wrap: Callable[[Tensor, Tensor], Any], hidden: bool) -> None:
    """Hidden units that are returned are pinned, in whatever they are wrapped."""
    model = Call(lambda m, x: wrap(h := torch.relu(m.i(x)), m.o(h)), i=nn.Linear(5, 6), o=nn.Linear(6, 2))
    net, careless = trace(model), by_hand(5, 6, "i", "o")
    assert net.num_units == (0 if hidden else 6)
    verify(model, net, vectors(5))
    if hidden:
        with pytest.raises(SymmetryError):
            verify(model, careless, vectors(5))


def test_outputs_that_cannot_be_looked_into() -> None:
    model = Call(lambda m, x: (m.o(t) for t in [torch.relu(m.i(x))]), i=nn.Linear(5, 6), o=nn.Linear(6, 2))
    for call in (lambda: trace(model), lambda: verify(model, by_hand(5, 6, "i", "o"), vectors(5))):
        with pytest.raises(TypeError, match=r"returns a generator.* wrap it in a module"):
            call()


def by_hand(read: int, hidden: int, *layers: str, skip: bool = False) -> Network:
    """Linear layers with ReLUs between them, all units free: what a careless person would write."""
    net = Network()
    x = net.input(read)
    for i, name in enumerate(layers):
        y = net.dense(f"{name}.weight", x, 2 if i + 1 == len(layers) else hidden, bias=f"{name}.bias")
        x = net.add(x, y) if skip and 0 < i < len(layers) - 1 else y
    net.output(x)
    return net


def residual_mlp(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.i(x))
    return m.o(h + torch.relu(m.j(h)))


def test_wrong_networks_are_caught() -> None:
    torch.manual_seed(0)
    three = {"i": nn.Linear(5, 6), "j": nn.Linear(6, 6), "o": nn.Linear(6, 2)}

    missed_skip = by_hand(5, 6, "i", "j", "o")
    with pytest.raises(SymmetryError, match=r"written by '(i|j).weight' and read by '(j|o).weight'"):
        verify(Call(residual_mlp, **three), missed_skip, vectors(5))
    verify(Call(residual_mlp, **three), by_hand(5, 6, "i", "j", "o", skip=True), vectors(5))

    untied = Network()
    h = untied.dense("i.weight", untied.input(5), 6, bias="i.bias")
    untied.pin(untied.dense("j.weight", h, 6, bias="j.bias"), "left out of the sum")
    untied.output(untied.dense("o.weight", h, 2, bias="o.bias"))
    with pytest.raises(SymmetryError, match=r"'i.weight'"):
        verify(Call(residual_mlp, **three), untied, vectors(5))

    square = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    right, wrong = Network(), Network()
    for net, layout in ((right, "oi"), (wrong, "io")):
        h = net.dense("0.weight", net.input(6), 6, bias="0.bias")
        h = net.dense("2.weight", h, 6, bias="2.bias", layout=layout)
        net.output(net.dense("4.weight", h, 2, bias="4.bias"))
    verify(square, right, vectors(6))
    with pytest.raises(SymmetryError, match=r"'(0|2).weight'"):
        verify(square, wrong, vectors(6))

    saturating = nn.Sequential(nn.Linear(5, 6), nn.ReLU6(), nn.Linear(6, 2))
    with pytest.raises(SymmetryError, match=r"written by '0.weight' and read by '2.weight'"):
        verify(saturating, by_hand(5, 6, "0", "2"), 20 * vectors(5))
    nn.init.zeros_(saturating[2].weight)  # now nothing reaches the outputs
    with pytest.raises(SymmetryError):
        verify(saturating, by_hand(5, 6, "0", "2"), 20 * vectors(5))

    maps = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    net = Network()
    h = net.conv("0.weight", net.input(3), 4, (1, 1), bias="0.bias")
    net.output(net.dense("3.weight", net.flatten(h, 9, "channels_last"), 2, bias="3.bias"))
    with pytest.raises(SymmetryError, match=r"'0.weight'"):
        verify(maps, net, images(3))

    reused = Call(lambda m, x: m.o(torch.relu(m.j(torch.relu(m.j(torch.relu(m.i(x))))))), **three)
    with pytest.raises(SymmetryError, match=r"'j.weight'"):
        verify(reused, missed_skip, vectors(5))

    only_the_gradient = Call(lambda m, x: m.o(torch.relu(m.j(torch.relu(m.i(x)).detach()))), **three)
    with pytest.raises(SymmetryError, match=r"gradients .* 'i.weight'"):
        verify(only_the_gradient, missed_skip, vectors(5))

    in_training = Call(lambda m, x: m.o(torch.sigmoid(m.i(x)) if m.training else torch.relu(m.i(x))), **three)
    with pytest.raises(SymmetryError, match=r"in training"):
        verify(in_training, by_hand(5, 6, "i", "o"), vectors(5))


def test_verify_names_what_the_model_lacks() -> None:
    model = chain()
    with pytest.raises(ValueError, match=r"fc.weight: .* no such parameter"):
        verify(model, by_hand(5, 6, "0", "fc"), vectors(5))
    with pytest.raises(ValueError, match=r"0.weight: .*\(7, 5\).*\(6, 5\)"):
        verify(model, by_hand(5, 7, "0", "2"), vectors(5))
    with pytest.raises(ValueError, match="not finite"):
        verify(model, by_hand(5, 6, "0", "2"), np.nan * vectors(5))


def asks_for_float32(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.i(x.float())).half().to(torch.float32) @ torch.eye(6, dtype=torch.float32)
    return m.o(torch.cat([h[:, :3], torch.zeros(len(h), 3)], 1) @ torch.ones(6, 6))


def test_verify_runs_models_that_ask_for_a_dtype() -> None:
    model = Call(asks_for_float32, i=nn.Linear(5, 6), o=nn.Linear(6, 2))
    verify(model, trace(model), vectors(5))
    with pytest.raises(SymmetryError, match=r"'i.weight'"):
        verify(model, by_hand(5, 6, "i", "o"), vectors(5))
    assert torch.get_default_dtype() == torch.float32
    half = Call(
        lambda m, x: m.o(torch.from_numpy(m.i(x).detach().numpy().astype("f2"))), **dict(model.named_children())
    )
    with pytest.raises(ValueError, match=r"does not run in float64.* in evaluation \(RuntimeError: .*: give inputs"):
        verify(half, by_hand(5, 6, "i", "o"), vectors(5))
    with pytest.raises(ValueError, match=r"does not run in float64.*shapes cannot be multiplied"):
        verify(model, by_hand(5, 6, "i", "o"), vectors(4))
    with pytest.raises(TypeError, match=r"net: expected a gsgd\.Network"):
        verify(model, model, vectors(5))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        trace(trace(model))


def test_gsgd_does_not_import_torch() -> None:
    code = "import sys, gsgd; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)  # -P: the installed package


def test_choices_by_random_numbers() -> None:
    """Stochastic depth by Python's generator: the trace sees one branch, and verify finds the other."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.relu(m.a(x))
        return m.c(h + torch.relu(m.b(h)) if random.random() < 0.5 else h)

    model = Call(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))
    traced = set()
    for seed in range(4):
        random.seed(seed)
        state = random.getstate()
        net = trace(model)
        assert random.getstate() == state
        both = "b.weight" in net.shapes
        assert both == (random.random() < 0.5)
        traced.add(both)
        for other in range(4):
            if both:
                verify(model, net, vectors(4), seed=other)
            else:
                with pytest.raises(SymmetryError):
                    verify(model, net, vectors(4), seed=other)
    assert traced == {True, False}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    """The reentrant kind runs the forward pass without gradients, in which nothing is taken for granted."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.utils.checkpoint.checkpoint(lambda t: torch.relu(m.a(t)), x, use_reentrant=reentrant))

    model = Call(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    net = trace(model)
    assert net.num_units == (0 if reentrant else 8)
    verify(model, net, vectors(4))


def test_parameters_that_are_not_described_are_listed_with_reasons() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.gain * m.twice(F.relu(m.twice(F.relu(m.a(x)))))
        return m.b(F.linear(m.shared[0](m.shared[1](h)), 2 * m.computed))

    shared = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    shared[1].weight.data = shared[0].weight.data
    layers = {"a": nn.Linear(4, 8), "twice": nn.Linear(8, 8), "b": nn.Linear(8, 3)}
    model = Call(forward, **layers, shared=shared, unused=nn.Linear(2, 2))
    model.gain, model.computed = nn.Parameter(torch.ones(8)), nn.Parameter(torch.eye(8))
    net = trace(model)
    assert str(net).split("(m - H)\n")[1].splitlines() == [
        f"not described, plain steps: {names} ({reason})"
        for names, reason in (
            ("computed", "mul in the model"),
            ("twice.weight, twice.bias", "linear in twice: its weight twice.weight is read 2 times"),
            ("shared.0.weight, shared.1.weight", "shares its memory with another"),
            ("unused.weight, unused.bias", "not read by the forward pass"),
        )
    ]
    model = models.mlp((4, 8, 8, 3))
    model[4].weight.requires_grad_(False)
    assert "not described, plain steps: 4.weight (not trained)" in str(GSGD(model).network)
    assert str(trace(model).without(["4.weight"], "frozen")).endswith("not described, plain steps: 4.weight (frozen)")


@pytest.mark.parametrize(
    ("op", "free"),
    [
        (lambda m, h: h[:, torch.randperm(8)], False),
        (lambda m, h: h[:, torch.rand(8).argsort()[:4]].repeat(1, 2, 1, 1), False),
        (lambda m, h: h.index_select(1, torch.zeros(8, dtype=torch.int64).random_(8)), False),
        (lambda m, h: h.flatten(1)[:, torch.randperm(8 * 25)].view_as(h), False),
        (lambda m, h: h[:, m.order], True),
        (lambda m, h: h + h[torch.randperm(len(h))], True),
        (lambda m, h: h[..., torch.randperm(5), :], True),
        (lambda m, h: h[:, m.order].index_select(-1, torch.randint(5, (3,))), True),
    ],
)
def test_indices_that_are_drawn_select_no_channels(op: Callable[[Any, Tensor], Tensor], free: bool) -> None:
    model = Between(op)
    for batch in (1, 2):
        net = trace(model, torch.randn(batch, 3, 5, 5))
        assert net.num_units == (8 if free else 0)
        assert ("indices that vary" in str(net)) != free


def test_a_forward_that_refers_to_the_original_model_is_refused() -> None:
    model = models.mlp((5, 8, 3))
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)
    with pytest.raises(ValueError, match="forward refers to the original model, by a closure"):
        trace(model)


def test_models_that_can_not_be_copied_are_refused() -> None:
    model = models.mlp((5, 8, 3))
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"can't be copied .*'_thread\.lock'.*network="):
        trace(model)


def test_backward_hooks_are_left_out() -> None:
    model = models.mlp((5, 8, 3))
    model[0].register_full_backward_hook(lambda module, given, returned: None)
    model[2].register_full_backward_pre_hook(lambda module, given: None)
    assert trace(model).num_units == 8
    assert model[0]._backward_hooks
    assert model[2]._backward_pre_hooks


def test_a_model_that_differentiates() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = m.b(torch.tanh(m.a(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    model = Call(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 1))
    net = Network()
    net.output(net.dense("b.weight", net.pin(net.dense("a.weight", net.input(4), 8, bias="a.bias"), "tanh"), 1))
    verify(model, net, vectors(4))


def test_only_a_tuple_is_several_arguments() -> None:
    layer = nn.Linear(4, 3)
    several = Call(lambda m, x, y: m.a(x) + m.a(y), a=layer)
    alone = Call(lambda m, xs: m.a(xs[0]), a=layer)
    assert trace(several, (vectors(4), vectors(4))).plain
    assert trace(alone, [vectors(4), vectors(4)]).shapes
    with pytest.raises(ValueError, match="can't be followed"):
        trace(several, [vectors(4), vectors(4)])


def test_what_is_left_out_takes_plain_steps() -> None:
    """By name or by module: not described, what it meets is pinned, and both are shown."""
    torch.manual_seed(0)
    model = models.mlp((5, 6, 7, 8, 3))
    net, x = trace(model, leave_out=("2.weight", "6")), vectors(5)
    assert net.shapes.keys() == {"0.weight", "0.bias", "2.bias", "4.weight", "4.bias"}
    assert net.num_units == 0
    assert trace(model, leave_out="0.bias").num_units == 7 + 8
    assert trace(model, leave_out=()).num_units == 6 + 7 + 8
    assert str(net).endswith("not described, plain steps: 2.weight, 6.weight, 6.bias (left out)")
    assert set(net.pins.values()) >= {"meets a parameter that is left out"}
    verify(model, net, x)
    unused = Call(lambda m, x: m.i(x), i=nn.Linear(5, 2), j=nn.Linear(5, 2))
    assert trace(unused, leave_out="j").plain == {"j.weight": "left out", "j.bias": "left out"}
    near = Call(lambda m, x: m.i1(m.i(x)), i=nn.Linear(5, 2), i1=nn.Linear(2, 2))
    assert trace(near, leave_out="i").plain == {"i.weight": "left out", "i.bias": "left out"}
    for names, message in (
        ("2.wieght", r"leave_out: nothing is named '2.wieght'.*'2.weight'"),
        (["0", "conv1"], "leave_out: nothing is named 'conv1'"),
    ):
        with pytest.raises(ValueError, match=message):
            trace(model, leave_out=names)
    with pytest.raises(TypeError, match="leave_out: expected names, got 3"):
        trace(model, leave_out=[3])
    with pytest.raises(ValueError, match="pin_after: nothing is named 'stage'"):
        trace(model, pin_after="stage")


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_the_authors_protocol(mode: Any) -> None:
    """Stem, shortcuts and classifier outside, with raw gradients; one chain per stage."""
    model = models.resnet34(4)
    names = [name for name, _ in model.named_parameters()]
    shortcuts = {name.rpartition(".")[0] for name in names if "downsample.0" in name}
    stages = [f"layers.{i}" for i in range(4)]
    net = trace(model, residual="pin", batch_norm=mode, leave_out=("conv1", "fc", *shortcuts), pin_after=stages)
    assert len(shortcuts) == 3
    assert net.shapes.keys() == {name for name in names if name.startswith("layers") and "conv" in name}
    assert {block.batch_norm for block in net.blocks} == {mode}
    assert net.num_units == 4 * (3 + 8 + 24 + 24)  # between the two convolutions of a block
    plain = trace(models.plain34(4), batch_norm=mode, leave_out=("conv1", "fc"), pin_after=stages)
    last = trace(models.plain34(4), batch_norm=mode, leave_out=("conv1", "fc"))
    assert last.num_units - plain.num_units == 4 * (1 + 2 + 4)  # the last stage's end meets the classifier
    assert "output of layers.0" in plain.pins.values()


class Attention(nn.Module):
    """A pre-norm transformer's block: two heads of values for four of queries if `grouped`."""

    def __init__(self, grouped: bool, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        width, self.kv = 8, 4 if grouped else 8
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 2)
        self.norm1, self.norm2, self.norm3 = norm(width), norm(width), norm(width)
        self.q, self.k, self.v = nn.Linear(width, 8), nn.Linear(width, self.kv), nn.Linear(width, self.kv)
        self.out = nn.Linear(8, width)
        self.ffn = nn.Sequential(nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (-1, 2)).transpose(1, 2) for p in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv < 8)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return self.head(self.norm3(x + self.ffn(self.norm2(x))))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_block_of_a_transformer(grouped: bool, norm: Any) -> None:
    """METHOD.md, section 9: the affine parts of the norms, the values (one unit for the heads of a group), the FFN."""
    torch.manual_seed(0)
    model, x = Attention(grouped, norm), torch.randn(2, 3, 5)
    net = trace(model, x)
    assert net.shapes.keys() == {name for name, _ in model.named_parameters()}
    assert net.num_units == 3 * 8 + model.kv + 12
    verify(model, net, x)


@pytest.mark.parametrize(
    ("op", "units"),
    [
        (lambda m, h: m.norm(h), 6),
        (lambda m, h: m.group(h), 6),
        (lambda m, h: F.layer_norm(h, (6,)), 0),
        (lambda m, h: F.layer_norm(h, (6,), 2 * m.norm.weight), 0),
        (lambda m, h: F.layer_norm(h, (6,), m.norm.weight, 2 * m.norm.bias), 0),
        (lambda m, h: torch.relu(h @ m.own), 12),
        (lambda m, h: torch.relu(torch.matmul(h, other=m.own)), 12),
        (lambda m, h: torch.relu(h @ m.own) @ m.own, 0),
        (lambda m, h: h @ m.own.softmax(0), 0),
        (lambda m, h: m.own.softmax(0)[:4, :4] @ h, 6),
        (lambda m, h: (h @ h.mT) @ h, 0),
        (lambda m, h: h.mT.softmax(-1)[:4] @ h @ m.own, 6),
        (lambda m, h: F.scaled_dot_product_attention(h, h, h), 0),
        (lambda m, h: F.scaled_dot_product_attention(m.own[:4], m.own[2:], h), 6),
        (lambda m, h: F.scaled_dot_product_attention(m.own, m.own, h.mT).mT, 0),
        (lambda m, h: F.scaled_dot_product_attention(m.own[:4], m.own[2:], h, h[:, :4]), 2),
    ],
)
def test_norms_and_products(op: Callable[..., Tensor], units: int) -> None:
    torch.manual_seed(0)
    model = Call(lambda m, x: m.o(op(m, torch.relu(m.i(x)))), i=nn.Linear(5, 6), o=nn.Linear(6, 2),
                 norm=nn.LayerNorm(6), group=nn.GroupNorm(2, 6))  # fmt: skip
    model.own = nn.Parameter(torch.randn(6, 6))
    net = trace(model, vectors(5))
    assert net.num_units == units
    verify(model, net, vectors(5))


def test_channels_can_be_scaled_by_a_vector() -> None:
    """`Network.scale`: every entry of the vector is an edge from a unit to a unit."""
    model = Call(lambda m, x: m.o(m.gain * torch.relu(m.i(x))), i=nn.Linear(5, 6), o=nn.Linear(6, 2))
    model.gain = nn.Parameter(torch.randn(6))
    net = Network()
    h = net.scale("gain", net.dense("i.weight", net.input(5), 6, bias="i.bias"))
    net.output(net.dense("o.weight", h, 2, bias="o.bias"))
    assert net.num_units == 12
    assert net.shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    verify(model, net, vectors(5))
    GSGD(model.named_parameters(), lr=0.1, network=net)
