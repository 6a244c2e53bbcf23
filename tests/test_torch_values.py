"""Values that are known while a model is traced, and those that are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Call
from torch import Tensor, nn

from gsgd.torch import GSGD, SymmetryError, trace, verify


def model_of(op: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> nn.Module:
    """`op` between two layers, on 12 units."""
    torch.manual_seed(0)
    return Call(
        lambda m, x, *rest: m.b(op(m, torch.relu(m.a(x)), *rest)), a=nn.Linear(8, 12), b=nn.Linear(12, 3), **more
    )


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([True, False, True, True, False, True])


def check(model: nn.Module, inputs: Any, units: int, warned: str | None = None) -> None:
    """Traced and verified, with these warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        net = trace(model, inputs)
    messages = [str(w.message) for w in said if "real values" in str(w.message)]
    assert len(messages) == (warned is not None), messages
    if warned is not None:
        assert warned in messages[0]
    assert net.num_units == units, str(net)
    verify(model, net, inputs)


def extended(m: Any, h: Tensor, mask: Tensor) -> Tensor:
    """As the masks of transformers are made: skipped if nothing is masked, else added."""
    if mask.all():
        return h
    bias = (1 - mask[:, None].to(h.dtype)) * torch.finfo(h.dtype).min
    return F.softmax(torch.zeros(6, 6, device=h.device) + bias.mT, -1) @ h


def by_lengths(m: Any, h: Tensor, lengths: Tensor) -> Tensor:
    return torch.stack([part.sum(0) for part in h.split(lengths.tolist())])


def in_place_mask(m: Any, h: Tensor) -> Tensor:
    mask = torch.ones(len(h), dtype=torch.bool, device=h.device)
    mask[torch.arange(len(h), device=h.device) > 3] = False
    return h[mask]


def positions(m: Any, h: Tensor, ids: Tensor) -> Tensor:
    """Packed sequences are found by their position ids."""
    assert ids.max() < 4
    return h[(ids == 0).nonzero().squeeze(1)]


KNOWN: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], int]] = {
    "mask of constants over samples": (lambda m, h: h[torch.tensor([True] * 5 + [False])], (), 12),
    "mask over samples": (lambda m, h, mask: h[mask], (MASK,), 12),
    "mask over samples and positions": (lambda m, h, mask: h.view(2, 3, 12)[mask], (MASK.view(2, 3),), 12),
    "mask over channels, an input": (lambda m, h, mask: h[:, mask.repeat(2)].repeat(1, 2)[:, :12], (MASK,), 0),
    "mask over channels, a constant": (lambda m, h: F.pad(h[:, torch.arange(12) % 2 == 0], (0, 6)), (), 6),
    "branch on a mask": (extended, (MASK.long(),), 12),
    "branch on a mask of ones": (extended, (torch.ones(6, dtype=torch.int64),), 12),
    "lengths": (by_lengths, (torch.tensor([1, 3, 2]),), 12),
    "mask that is written": (in_place_mask, (), 12),
    "position ids": (positions, (torch.tensor([0, 1, 2, 0, 1, 0]),), 12),
    "indices of channels, an input": (lambda m, h, i: h[:, i], (torch.arange(12),), 0),
    "indices of channels, a constant": (lambda m, h: h[:, torch.arange(12, device=h.device).flip(0)], (), 12),
    "indices that are computed": (lambda m, h, x: h[x.sum(1).argsort()[:3]], (X,), 12),
    "channels that are computed": (lambda m, h, x: h[:, x.sum(0).argsort()].repeat(1, 2)[:, :12], (X,), 0),
    "gather": (lambda m, h, i: h.gather(0, i[:, None].expand(-1, 12)), (torch.tensor([0, 5, 2]),), 12),
    "gather of channels": (lambda m, h, i: h.gather(1, i.expand(6, -1)), (torch.randint(12, (1, 12)),), 1),
    "zeros of its shape": (lambda m, h: h + torch.zeros_like(h) + h.new_zeros(12), (), 12),
    "zeros": (lambda m, h: torch.maximum(h, torch.zeros(12, device=h.device)), (), 12),
    "zeros that are an input": (lambda m, h, z: torch.maximum(h, z.to(h.dtype)), (torch.zeros(12, dtype=int),), 0),
    "a number in a tensor": (lambda m, h: F.leaky_relu(F.dropout(h, m.c, m.training), m.c), (), 12),
    "clamp by tensors": (lambda m, h: torch.clamp(h, min=torch.zeros(1)), (), 12),
    "clamp by a parameter": (lambda m, h: torch.clamp(h, min=torch.zeros(1), max=m.p), (), 0),
    "minimum of a parameter": (lambda m, h: torch.minimum(h, m.p), (), 0),
    "mask of values": (lambda m, h: h[(h > 0.1).any(1)], (), 0),
    "masked_select": (lambda m, h, mask: h.masked_select(mask[:, None]).view(-1, 12), (MASK,), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_values(name: str) -> None:
    op, more, units = KNOWN[name]
    model = model_of(op)
    model.c, model.p = torch.tensor(0.1), nn.Parameter(torch.tensor([6.0]))
    check(model, (X, *more), units)


def scattered(m: Any, h: Tensor, edges: Tensor) -> Tensor:
    """A mean over neighbours."""
    source, target = edges
    index = target[:, None].expand_as(h[source])
    total = h.new_zeros(len(h), 12).scatter_add_(0, index, h.index_select(0, source))
    count = h.new_zeros(len(h)).scatter_add_(0, target, h.new_ones(len(target)))
    return h + total / count.clamp(min=1)[:, None]


def with_a_view(m: Any, h: Tensor, edges: Tensor) -> Tensor:
    zeros = torch.zeros(6, 12)
    view = zeros[:, :6]
    zeros.scatter_add_(0, edges[0, :6, None].expand(-1, 12), h)
    return torch.cat([view, h[:, :6]], 1)


@pytest.mark.parametrize(
    ("op", "units"),
    [
        (scattered, 12),
        (with_a_view, 0),
        (lambda m, h, e: torch.zeros(9, 12)[3:].scatter_add_(0, e[0, :6, None].expand(-1, 12), h), 0),
        (lambda m, h, e: h.new_zeros(6, 12).index_add_(0, e[0], h[e[1]]), 12),
        (lambda m, h, e: torch.zeros(6, 12).scatter_reduce_(0, e[0, :, None].expand(-1, 12), h[e[1]], "amax"), 12),
        (lambda m, h, e: torch.zeros(6, 12).scatter_reduce_(0, e[0, :, None].expand(-1, 12), h[e[1]], "prod"), 0),
        (lambda m, h, e: torch.ones(6, 12).scatter_add(0, e[0, :, None].expand(-1, 12), h[e[1]]), 0),
        (lambda m, h, e: h.scatter_add(1, e[:1, :12].expand(6, -1), h), 1),
        (lambda m, h, e: h[e[0, torch.randperm(20)]], 12),
    ],
)
def test_edges_of_graphs(op: Callable[..., Tensor], units: int) -> None:
    edges = torch.randint(0, 6, (2, 20), generator=torch.Generator().manual_seed(0))
    check(model_of(op), (X, edges), units)


def branching(m: Any, h: Tensor) -> Tensor:
    return h if h.mean() > -1 else torch.tanh(h)


def logged(m: Any, h: Tensor) -> Tensor:
    m.log = {"mean": float(h.detach().mean()), "active": (h > 0).sum().item(), "list": h.mean(0).tolist()[:0]}
    return h


def logged_number(m: Any, h: Tensor) -> Tensor:
    m.log = float(h.detach().mean())
    return h


ASKED: dict[str, tuple[Callable[..., Tensor], int]] = {
    "a branch": (branching, 12),
    "a check": (lambda m, h: h if torch.isfinite(h).all() else 0 * h, 12),
    "a number of samples": (lambda m, h: h[torch.where(h.detach().sum(1) > 0)[0]], 0),
    "a log": (logged_number, 12),
    "numbers that may be used": (logged, 0),
    "a number that is used": (lambda m, h: h / float(h.max()), 0),
    "a number in a tensor": (lambda m, h: h * torch.full((12,), h.max().item()), 0),
    "a number that chooses a number": (lambda m, h: h * round(1e3 * h.max().item()), 0),
    "an array": (lambda m, h: h * torch.from_numpy(np.sqrt(h.detach().numpy())), 0),
    "a number that chooses a power": (lambda m, h: h * 2 ** int(np.log2(h.max().item())), 0),
    "a number for a shape": (lambda m, h: h[: int((h > 0).sum(1).argmax()) + 1], 12),
    "a list": (lambda m, h: h * max(h.max(1)[0].tolist()), 0),
}


@pytest.mark.parametrize("name", ASKED)
def test_real_values_that_are_asked_for(name: str) -> None:
    op, units = ASKED[name]
    check(model_of(op), X, units, "test_torch_values.py:")


def test_without_values_there_is_no_answer() -> None:
    for model, x in ((model_of(branching).to("meta"), X), (model_of(branching), X.to("meta"))):
        with pytest.raises(ValueError, match=r"test_torch_values.py:\d+: .* trace a part .*prefix='a\.'"):
            trace(model, x)
    assert trace(model_of(lambda m, h: h[MASK]).to("meta"), X.to("meta")).num_units == 12  # the mask has its values


def test_a_branch_that_goes_the_other_way_is_found_by_verify() -> None:
    model = model_of(lambda m, h: h if len(h) > 5 else torch.tanh(h))
    net = trace(model, X)
    verify(model, net, X)
    with pytest.raises(SymmetryError):
        verify(model, net, X[:4])


STATISTICS: list[Callable[[Any, Tensor], Any]] = [
    lambda m, h: str(h.mean()),
    lambda m, h: h.mean(),
    lambda m, h: h.detach().std(0),
    lambda m, h: m.a.weight.norm() + m.b.weight.t()[0].sum(),
    lambda m, h: (h @ torch.eye(12)).clone().add_(1),
    lambda m, h: torch.zeros(12).copy_(h.mean(0)),
    lambda m, h: F.linear(h, m.b.weight, m.b.bias).softmax(1),
]


@pytest.mark.parametrize("which", range(len(STATISTICS)))
def test_statistics_that_reach_no_output_cost_nothing(which: int) -> None:
    def op(m: Any, h: Tensor) -> Tensor:
        STATISTICS[which](m, h)
        return h

    check(model_of(op), X, 12)


def test_statistics_that_are_kept_are_pinned() -> None:
    def op(m: Any, h: Tensor) -> Tensor:
        m.mean.mul_(0.9).add_(h.detach().mean(0))
        return h

    def read(m: Any, h: Tensor) -> Tensor:
        return op(m, h) * m.mean

    for function in (op, read):
        model = model_of(function)
        model.register_buffer("mean", torch.ones(12))
        before = model.mean.clone()
        assert trace(model, X).num_units == 0
        assert torch.equal(model.mean, before)


def test_what_is_written_to_a_known_tensor_is_not_known() -> None:
    """Its old zeros would make a sum of it."""

    def op(m: Any, h: Tensor, x: Tensor) -> Tensor:
        table = torch.zeros(6, 12)
        table[:3] = torch.sigmoid(x[:3, :1])
        return h + 2 * table

    def by_a_view(m: Any, h: Tensor, x: Tensor) -> Tensor:
        table = torch.zeros(6, 12)
        view = table[:, :12]
        table.add_(torch.sigmoid(x[:, :1]))
        return h + view

    check(model_of(op), (X, X), 0)
    check(model_of(by_a_view), (X, X), 0)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.a, self.b = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.b(torch.relu(self.a(out)))


def test_packed_sequences() -> None:
    torch.manual_seed(0)
    model, inputs = Packed(), (torch.randn(3, 5, 8), torch.tensor([2, 5, 4]))
    check(model, inputs, 12)
    assert "not described, plain steps: rnn.weight_ih_l0, rnn.weight_hh_l0" in str(trace(model, inputs))
    assert "(lstm in rnn)" in str(trace(model, inputs))


def test_devices_are_the_models_own_affair() -> None:
    """All of a run is on the CPU, whatever a model asks for."""

    def op(m: Any, h: Tensor) -> Tensor:
        assert h.device.type == "cpu"
        assert not h.is_meta
        table = torch.ones(12, device=torch.device("cuda")).to("cuda:1", torch.float64).cuda()
        table = table * torch.empty(12).to(torch.device("cuda")).new_ones(12, device=torch.device("cuda"))
        table = table + torch.Tensor.new_zeros(table, (12,), device="cuda") + torch.zeros(12).type_as(table)
        with torch.device("cuda"):
            table = table * torch.ones(12)
        return (h.to(table) * table).to(device="cuda", dtype=torch.float32).cpu()

    net = trace(model_of(op), X)
    assert net.num_units == 12


class Data:
    """Inputs in an object, such as a batch of graphs."""

    def __init__(self, x: Tensor, edges: Tensor) -> None:
        self.x, self.edges, self.extra = x, edges, [x]


def test_inputs_in_objects_are_copied() -> None:
    def forward(m: Any, data: Data) -> Tensor:
        data.x = torch.relu(m.a(data.x))
        data.extra.append(data.x)
        return m.b(data.x[data.edges])

    model, data = Call(forward, a=nn.Linear(8, 12), b=nn.Linear(12, 3)), Data(X, torch.tensor([0, 3]))
    net = trace(model, (data,))
    assert net.num_units == 12
    assert "network input" in net.pins.values()
    verify(model, net, (data,))
    assert data.x is X
    assert len(data.extra) == 1


class Cache:
    """What decoders return: keys and values in lists of an object."""

    def __init__(self) -> None:
        self.layers: list[SimpleNamespace] = []


def test_outputs_in_objects_are_pinned() -> None:
    def forward(m: Any, x: Tensor, use_cache: bool = True) -> Any:
        h, cache = torch.relu(m.a(x)), Cache()
        cache.layers.append(SimpleNamespace(keys=h[:, :4]))
        return {"logits": m.b(h), "cache": cache} if use_cache else m.b(h)

    model = Call(forward, a=nn.Linear(8, 12), b=nn.Linear(12, 3))
    check(model, X, 8)
    assert {"network output logits", "network output cache"} <= set(trace(model, X).pins.values())
    check(model, {"x": X, "use_cache": False}, 12)
    assert GSGD(model, lr=0.1, example_inputs=X).network.num_units == 8
