"""The kernels of Triton against the C core: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import Model, Params, mlp, models
from torch import Tensor, nn
from torch_models import assert_breaks_at_step_only

import gsgd.torch
from gsgd.layout import network_layout, part
from gsgd.optimizer import Stats
from gsgd.torch import GSGD, GAdam, GRMSprop

pytest.importorskip("triton", reason="Triton is not installed")
from triton.runtime import interpreter

from gsgd.torch.engines import triton as engine
from gsgd.torch.engines.base import Step
from gsgd.torch.engines.triton_part import TritonPart

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# of each method, with and without moments and decay; eps so large that rounding does not decide on a direction
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (GSGD, {}),
    "nesterov": (GSGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adamw": (GAdam, {"weight_decay": 0.01, "eps": 1e-2}),
    "adam": (GAdam, {"weight_decay": 0.01, "eps": 1e-2, "decoupled": False}),
    "rmsprop": (GRMSprop, {"eps": 1e-2, "weight_decay": 0.01}),
    "rmsprop with momentum": (GRMSprop, {"eps": 1e-2, "momentum": 0.9}),
}
SMALL = engine.Tiling(lines=8, positions=16, fewest=1, most=2, runs=3, units=8, parts=2, programs=3)


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """It prepares Triton's language anew wherever a kernel calls a function; once for each module will do."""
    call, prepared = interpreter.InterpretedFunction.__call__, {engine.kernels.__name__}

    def quick(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.fn.__module__ in prepared:
            return self.rewrite()(*arguments, **options)
        prepared.add(self.fn.__module__)
        return call(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", quick)
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that the smallest networks have several of each kind."""
    monkeypatch.setattr(engine, "Tiling", lambda: SMALL)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels that are launched."""
    seen: list[str] = []
    launch = engine.TritonEngine.launch

    def counted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        seen.append(kernel.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(engine.TritonEngine, "launch", staticmethod(counted))
    return seen


def stored(value: Any, order: list[int], dtype: torch.dtype, device: str) -> Tensor:
    """A tensor whose axes lie in memory in this order."""
    back = [order.index(i) for i in range(len(order))]
    return torch.tensor(value, dtype=dtype, device=device).permute(order).contiguous().permute(back)


class Pair:
    """The same parameters twice, on the C core and on Triton."""

    def __init__(
        self,
        model: Model,
        method: str = "nesterov",
        lr: float = 0.02,
        orders: dict[str, list[int]] | None = None,
        groups: list[dict[str, Any]] | None = None,
        dtype: torch.dtype = torch.float64,
        dtypes: dict[str, torch.dtype] | None = None,
        plain: Params | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        kind, hyper = METHODS[method]
        values = {**model.params, **(plain or {})}
        orders = orders or {name: list(range(value.ndim)) for name, value in values.items()}
        self.orders = {**{name: list(range(value.ndim)) for name, value in values.items()}, **orders}
        self.both = []
        for name_of_engine, device in (("core", "cpu"), ("triton", DEVICE)):
            of = (dtypes or {}) if name_of_engine == "triton" else {}
            params = {n: nn.Parameter(stored(v, self.orders[n], of.get(n, dtype), device)) for n, v in values.items()}
            more = groups or [{}]
            named = [
                {"params": [(n, p) for i, (n, p) in enumerate(params.items()) if i % len(more) == k], **extra}
                for k, extra in enumerate(more)
            ]
            opt = kind([g for g in named if g["params"]], lr=lr, network=model.net, engine=name_of_engine,
                       **{**hyper, **options})  # fmt: skip
            assert opt.engine == name_of_engine
            self.both.append((params, opt))

    @property
    def core(self) -> tuple[dict[str, nn.Parameter], Any]:
        return self.both[0]

    @property
    def triton(self) -> tuple[dict[str, nn.Parameter], Any]:
        return self.both[1]

    def gradients(self, without: str | None = None, strided: bool = False) -> None:
        """Set the gradients of the core's parameters on both."""
        params = {n: p.detach().double().numpy() for n, p in self.core[0].items() if n in self.model.params}
        grads = self.model.gradients(params)
        for own, _ in self.both:
            for n, p in own.items():
                g = grads[n] if n in grads else np.cos(np.arange(p.numel())).reshape(p.shape)
                order = list(range(p.dim())) if strided else self.orders[n]
                p.grad = None if n == without else stored(g, order, p.dtype, str(p.device))

    def step(self) -> None:
        """A step of each; the core's may find that it is not finite."""
        try:
            self.core[1].step()
        except FloatingPointError:
            before = copy.deepcopy(self.triton[0]), self.triton[1].stats
            self.triton[1].step()
            assert self.triton[1].stats == replace(before[1], skipped=before[1].skipped + 1)
            assert all(map(torch.equal, before[0].values(), self.triton[0].values()))
        else:
            self.triton[1].step()

    def check(self, tolerance: float) -> None:
        """Weights and moments are equal, relative to the largest of their array."""
        for (name, p), q in zip(self.core[0].items(), self.triton[0].values(), strict=True):
            states = self.core[1].state[p], self.triton[1].state[q]
            assert states[0].keys() == states[1].keys()
            for what in ("weight", *states[0]):
                a, b = (p, q) if what == "weight" else (states[0][what], states[1][what])
                a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double().cpu()
                if a.numel():
                    assert (a - b).abs().max() <= tolerance * a.abs().max(), (name, what)
        assert replace(self.core[1].stats, skipped=self.triton[1].stats.skipped) == self.triton[1].stats


def draw_pair(data: st.DataObject, **options: Any) -> Pair:
    """Any network, method, memory format and groups of hyperparameters."""
    model = data.draw(models(max_parts=3))
    orders = {n: data.draw(st.permutations(range(v.ndim))) for n, v in model.params.items()}
    groups = data.draw(st.sampled_from([None, [{"lr": 0.01}, {"weight_decay": 0.0}]]))
    limits = {
        "max_ratio": data.draw(st.sampled_from([None, 1.0003, 4.0])),
        "clip_norm": data.draw(st.sampled_from([None, None, 0.1])),
    }
    plain = {"plain": np.arange(11.0), "scalar": np.array(2.0), "empty": np.zeros((0, 3))}
    method = data.draw(st.sampled_from(list(METHODS)))
    return Pair(model, method, orders=orders, groups=groups, plain=plain, **limits, **options)


@settings(max_examples=8, phases=[Phase.generate])
@given(data=st.data())
@pytest.mark.usefixtures("small_tiles")
def test_steps_are_the_core_s(data: st.DataObject) -> None:
    pair = draw_pair(data)
    for i in range(2):
        without = data.draw(st.sampled_from([None, *pair.model.params])) if i == 0 else None
        pair.gradients(without, strided=i == 1)
        pair.step()
        pair.check(1e-12)


def residual() -> Model:
    """Convolutions with groups, taps, ties and a flattening, of several tiles each."""
    model = Model(3, 3, (2, 3))
    x = model.activation(model.conv(model.x, 8, (3, 3), layout="hwio"), "relu")
    x = model.activation(model.add(x, model.conv(x, 8, (3, 1), groups=2, bias=False), "tie"), "relu")
    x = model.activation(model.conv(x, 6, (1, 3), layout="iohw"), "relu")
    return model.output(model.dense(model.flatten(x, "channels_last"), 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["nesterov", "adamw"])
def test_shorter_types_differ_from_the_core_by_their_rounding(dtype: torch.dtype, method: str) -> None:
    model = residual()
    model.params = {n: torch.tensor(v).to(dtype).double().numpy() for n, v in model.params.items()}
    pair = Pair(model, method, dtypes=dict.fromkeys(model.params, dtype))
    pair.gradients()
    for p in pair.core[0].values():
        p.grad = p.grad.to(dtype).double()
    for own in pair.triton[0].values():
        own.grad = own.grad.to(dtype)
    pair.step()
    eps = torch.finfo(dtype).eps
    for p, q in zip(pair.core[0].values(), pair.triton[0].values(), strict=True):
        assert ((p - q.double().cpu()).abs() <= eps * p.abs() + 10 * eps * 2e-2 * p.abs().max()).all()
    assert any(
        (q.double().cpu() != torch.tensor(v)).any()
        for q, v in zip(pair.triton[0].values(), model.params.values(), strict=True)
    )


def test_types_may_be_mixed_and_each_has_its_launches(launches: list[str]) -> None:
    model = residual()
    dtypes = {n: torch.float64 if "bias" in n else torch.float32 for n in model.params}
    pair = Pair(model, dtypes=dtypes)
    pair.gradients()
    for p, q in zip(*(side[0].values() for side in pair.both), strict=True):
        q.grad = p.grad.to(q)
    pair.step()
    pair.check(1e-6)
    assert launches == ["gather", "gather", "solve", "apply", "apply"]


def test_a_step_is_three_launches_and_five_with_clip_norm(launches: list[str]) -> None:
    plain = {"plain": np.arange(5.0)}
    for clip_norm, expected in (
        (None, ["gather", "solve", "apply"]),
        (1.0, ["solve", "gather", "solve", "solve", "apply"]),
    ):
        pair = Pair(mlp(4, 5, 3), clip_norm=clip_norm, plain=plain)
        pair.gradients()
        del launches[:]
        pair.triton[1].step()
        assert launches == expected


def test_tables_are_of_the_order_of_units_lines_and_positions() -> None:
    sizes = []
    for width in (64, 512):
        model = mlp(width, width, width, 4, bias=False)
        opt = Pair(model).triton[1]
        lines_and_positions = sum(sum(v.shape) for v in model.params.values())
        sizes.append(opt._engine.tables.nbytes / (model.net.num_units + lines_and_positions))
    assert sizes[1] < 1.1 * sizes[0]
    assert sizes[1] < 64


def test_addresses_are_uploaded_when_one_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    copy = Tensor.copy_

    def counted(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        written.append(self.numel())
        return copy(self, *arguments, **options)

    pair = Pair(mlp(3, 4, 2))
    pair.gradients()
    opt = pair.triton[1]
    opt.step()
    monkeypatch.setattr(Tensor, "copy_", counted)
    opt.step()
    assert not written
    for p in pair.triton[0].values():
        p.grad = p.grad.clone()
    opt.step()
    assert set(written) == {7 * len(pair.triton[0])}


@pytest.mark.parametrize(("value", "clip_norm"), [(float("nan"), 0.5), (float("inf"), None)])
def test_a_step_that_is_not_finite_changes_nothing(value: float, clip_norm: float | None) -> None:
    model = mlp(3, 4, 2)
    pair = Pair(model, "adamw", clip_norm=clip_norm)
    params, opt = pair.triton
    pair.gradients()
    opt.step()
    skipped = 0
    for p in params.values():  # ordinary edges, chains and free ones, in blocks of pinned sources too
        for i in range(0, p.numel(), 3):
            kept = p.grad.clone()
            p.grad.view(-1)[i] = value
            before = [x.clone() for q in params.values() for x in (q, *opt.state[q].values())]
            opt.step()
            p.grad.copy_(kept)
            skipped += 1
            assert all(map(torch.equal, before, [x for q in params.values() for x in (q, *opt.state[q].values())]))
    assert opt.stats.skipped == skipped
    pair.core[1].step()
    pair.step()
    pair.check(1e-12)


def test_a_tree_weight_of_zero_is_not_finite() -> None:
    pair = Pair(mlp(3, 4, 2))
    pair.gradients()
    pair.step()
    with torch.no_grad():
        for own, _ in pair.both:
            own["dense2"].zero_()
    pair.step()  # compares what is left out
    assert pair.triton[1].stats.skipped == 1


def test_bits_depend_neither_on_the_run_nor_on_the_number_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for programs in (1, 3, 1000):
        monkeypatch.setattr(engine, "Tiling", lambda n=programs: replace(SMALL, programs=n))
        pair = Pair(residual(), clip_norm=0.5)
        pair.gradients()
        pair.triton[1].step()
        results.append([p.detach().clone() for p in pair.triton[0].values()])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_learning_rates_on_the_device() -> None:
    pair = Pair(mlp(3, 4, 2), "adamw")
    pair.gradients()
    lr = torch.tensor(0.02, dtype=torch.float64, device=DEVICE)
    pair.triton[1].param_groups[0]["lr"] = lr
    for x in (0.02, 0.005):
        lr.fill_(x)
        pair.core[1].param_groups[0]["lr"] = x
        pair.step()
        pair.check(1e-12)


def test_states_go_from_one_engine_to_the_other() -> None:
    pair = Pair(residual(), "adamw")
    pair.gradients("bias1")
    pair.step()
    states = [copy.deepcopy(opt.state_dict()) for _, opt in pair.both]
    for (_, opt), state in zip(pair.both, reversed(states), strict=True):
        opt.load_state_dict(state)
    assert pair.triton[1].stats == pair.core[1].stats
    pair.gradients()
    pair.step()
    pair.check(1e-12)


@pytest.mark.parametrize(("method", "clip_norm"), [("nesterov", None), ("adamw", 0.1)])
def test_parts_of_the_arrays_take_the_step_of_the_whole(method: str, clip_norm: float | None) -> None:
    """Two parts, cut along any axis, some empty, biases in both; added up as processes would."""
    model = residual()
    params, opt = Pair(model, method, clip_norm=clip_norm).core
    net, coordinates, kind = opt.network, opt._coordinates, opt._method(opt.param_groups[0])
    layout = network_layout(net, {n: tuple(p.shape) for n, p in params.items()}, *coordinates.edges)
    parts, held = [], []
    for rank in range(2):
        here = []
        for i, p in enumerate(params.values()):
            index = [np.arange(n) for n in p.shape]
            if p.dim() > 1:
                index[i % p.dim()] = np.array_split(index[i % p.dim()], 2)[rank]
            here.append(tuple(index))
        tensors = {
            n: p.detach()[np.ix_(*index)].clone().to(DEVICE) for (n, p), index in zip(params.items(), here, strict=True)
        }
        counts = [rank == 0 or p.dim() > 1 for p in params.values()]
        held.append(here)
        parts.append(TritonPart(net, coordinates, tensors, layout, part(layout, here), counts))
    moments = [
        [[torch.zeros_like(p) if has else None for p in own.aliases] for has in (kind.has_m, kind.has_v)]
        for own in parts
    ]
    limits, stats = (2.0, math.inf if clip_norm is None else clip_norm), [Stats() for _ in parts]

    def sum_up(tensors: list[Tensor]) -> None:
        total = torch.stack(tensors).sum(0)
        for x in tensors:
            x.copy_(total)

    opt._options = replace(opt._options, max_ratio=limits[0])
    for without in ("bias1", None):
        gradients = model.gradients({n: p.detach().numpy() for n, p in params.items()})
        for n, p in params.items():
            p.grad = None if n == without else torch.tensor(gradients[n])
        steps = []
        for own, here, kept, counted in zip(parts, held, moments, stats, strict=True):
            cut = [
                None if p.grad is None else p.grad[np.ix_(*index)].to(DEVICE)
                for p, index in zip(params.values(), here, strict=True)
            ]
            steps.append(own.begin(Step(cut, kept, [kind], [0] * len(cut), *limits, 1, counted)))
        sum_up([own.gather(step) for own, step in zip(parts, steps, strict=True)])
        if clip_norm is not None:
            sum_up([own.squares(step) for own, step in zip(parts, steps, strict=True)])
        for own, step in zip(parts, steps, strict=True):
            own.solve(step)
            own.apply(step)
        opt.step()
        for own, here, counted in zip(parts, held, stats, strict=True):
            for p, q, index in zip(params.values(), own.aliases, here, strict=True):
                torch.testing.assert_close(q.cpu(), p.detach()[np.ix_(*index)], rtol=1e-12, atol=1e-13)
            assert [int(n) for n in vars(counted).values()] == list(vars(opt.stats).values())


def test_gradients_that_lie_elsewhere_than_they_should() -> None:
    """Transposed, expanded, negated lazily, or in the memory of a weight."""
    pair = Pair(mlp(3, 4, 4, 2, bias=False))
    for own, _ in pair.both:
        first, middle, last = own.values()
        first.grad = torch.full((1, 1), 0.1, dtype=torch.float64, device=first.device).expand(4, 3)
        middle.grad = middle.detach().t()  # the C core asks for a copy
        last.grad = torch._neg_view(last.detach().clone())
    pair.core[0]["dense1"].grad = pair.core[0]["dense1"].grad.clone()
    pair.step()
    pair.check(1e-12)


def test_what_it_cannot_take() -> None:
    net = gsgd.Network()
    h = net.relu(net.batch_norm(net.conv("conv", net.input(2), 3, (1, 1)), "gamma", "beta", mode="paper"))
    net.output(net.dense("fc", net.avg_pool(h), 2))
    params = [(n, nn.Parameter(torch.rand(shape, device=DEVICE) + 1)) for n, shape in net.shapes.items()]
    with pytest.raises(ValueError, match="engine 'triton': batch_norm 'paper'"):
        GSGD(params, network=net, engine="triton")
    if DEVICE == "cuda":
        opt = GSGD(params, network=net)
        assert opt.engine == "array"
        assert "batch_norm 'paper'" in repr(opt)


def test_sheets_are_cut_where_int32_ends() -> None:
    sheet = engine.kernels.Sheet(0, 0, 300_000, 20_000, 20_000, line_rows=5, position_cols=7)
    pieces = list(engine._pieces(sheet))
    assert sum(p.lines for p in pieces) == sheet.lines
    assert all(p.lines * p.stride < 2**31 for p in pieces)
    for before, after in pairwise(pieces):
        assert after.start == before.start + before.lines * before.stride
        assert after.line_rows == before.line_rows + before.lines
        assert after.position_cols == 7


def test_a_compiled_training_step_breaks_at_step_only() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).to(DEVICE)
    opt = GSGD(model, lr=0.01, momentum=0.9, engine="triton")
    assert_breaks_at_step_only(model, opt, torch.ones(4, 5, device=DEVICE))


def test_all_kernels_compile_for_two_generations_of_devices() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("triton_compile.py")
    printed = subprocess.run(
        [sys.executable, str(program)], env=environment, check=True, text=True, capture_output=True
    )
    built = {tuple(line.split()[:2]) for line in printed.stdout.splitlines()}
    assert built >= {
        (target, kernel) for target in ("sm_80", "sm_90") for kernel in ("gather", "collect", "solve", "apply")
    }


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["nesterov", "adamw"])
def test_replayed_steps_are_those_that_are_not_captured(method: str) -> None:
    """Step counts of the bias corrections, the learning rate and what is not finite are the device's."""
    sides = [Pair(residual(), method, clip_norm=0.5).triton for _ in range(2)]
    lr = torch.tensor(0.02, dtype=torch.float64, device=DEVICE)
    for params, opt in sides:
        opt.param_groups[0]["lr"] = lr
        for p in params.values():
            p.grad = 0.1 * p.detach().cos()
        opt.step()
    (params, opt), (others, captured) = sides
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for rate, factor in ((0.02, 1.0), (0.01, 0.5), (0.01, math.nan), (0.04, 0.25)):
        lr.fill_(rate)
        for p, q in zip(params.values(), others.values(), strict=True):
            p.grad = 0.1 * factor * p.detach().sin()
            q.grad.copy_(p.grad)
        opt.step()
        graph.replay()
        for p, q in zip(params.values(), others.values(), strict=True):
            assert torch.equal(p, q)
            assert all(map(torch.equal, opt.state[p].values(), captured.state[q].values()))
        assert opt.stats == captured.stats
    assert (opt.stats.steps, opt.stats.skipped) == (4, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("method", list(METHODS))
def test_no_step_waits_for_the_device(method: str) -> None:
    pair = Pair(residual(), method, clip_norm=0.5)
    params, opt = pair.triton
    pair.gradients()
    opt.step()
    opt.param_groups[0]["lr"] = 0.01
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p in params.values():
            p.grad = p.grad.clone()
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.stats.steps == 2
