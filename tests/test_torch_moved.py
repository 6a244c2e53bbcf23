"""What others do to the parameters between steps."""

import copy
from collections.abc import Callable

import pytest
import torch
from models import mlp
from torch import nn
from torch_models import Net, assert_close, assert_same, backward, make, momenta, train

from gsgd.torch import GSGD


def unchanged(model: nn.Module) -> None:
    pass


def replaced(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)
    assert not model.body.layers[1][0].conv1.weight.is_contiguous()


def columns_first(model: nn.Module) -> None:
    p = model.body.fc.weight
    p.data = p.data.t().contiguous().t()


def to_and_fro(model: nn.Module) -> None:
    model.bfloat16()
    model.double()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({n: t.bfloat16() for n, t in model.state_dict().items()})


@pytest.mark.parametrize(
    ("mutate", "like"),
    [
        (replaced, unchanged),
        (channels_last, unchanged),
        (columns_first, unchanged),
        (to_and_fro, loaded),
    ],
)
def test_parameters_may_move_between_steps(
    engine: str, mutate: Callable[[nn.Module], None], like: Callable[[nn.Module], None]
) -> None:
    moved, other = Net(), Net()
    optimizers = [make(moved), make(other)]
    for step in range(4):
        if step == 2:
            mutate(moved)
            like(other)
        backward(other, step)
        for p, q in zip(moved.parameters(), other.parameters(), strict=True):
            p.grad = q.grad.clone()
        for opt in optimizers:
            opt.step()
    assert_close(moved, other, rtol=1e-12, atol=1e-12)
    if engine == "core":
        assert_same(moved, other)


def test_a_model_may_change_its_dtype() -> None:
    model, double = Net(torch.float32), Net()
    double.load_state_dict(model.state_dict())
    optimizers = [make(model), make(double)]
    train(model, optimizers[0], range(2))
    train(double, optimizers[1], range(2))
    model.double()
    train(model, optimizers[0], range(2, 4))
    train(double, optimizers[1], range(2, 4))
    assert_close(model, double, rtol=1e-3, atol=1e-4)
    assert all(m.dtype == torch.float64 for m in momenta(optimizers[0]))


def test_other_strides_at_the_same_address() -> None:
    """A square weight is transposed in place, another one cut."""
    torch.manual_seed(0)
    model = mlp((5, 5, 3)).double()
    other = copy.deepcopy(model)
    optimizers = [GSGD(m, lr=0.1) for m in (model, other)]
    model[0].weight.data = model[0].weight.data.t()
    other[0].weight.data = other[0].weight.data.t().contiguous()
    x = torch.randn(8, 5, dtype=torch.float64)
    for m, opt in zip((model, other), optimizers, strict=True):
        m(x).square().mean().backward()
        opt.step()
    assert_same(model, other)
    model[0].weight.data = model[0].weight.data[:4]
    model[0].weight.grad = torch.ones(4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"parameter '0.weight': expected shape \(5, 5\), got \(4, 5\)"):
        optimizers[0].step()


def load(opt: GSGD, model: nn.Module, source: nn.Module) -> None:
    model.load_state_dict(source.state_dict())


def load_after_a_round_trip(opt: GSGD, model: nn.Module, source: nn.Module) -> None:
    opt.load_state_dict(opt.state_dict())
    model.load_state_dict(source.state_dict())


def write_unseen(opt: GSGD, model: nn.Module, source: nn.Module) -> None:
    """As `torch.distributed.broadcast(p.data)` does: versions and addresses stay."""
    for p, q in zip(model.parameters(), source.parameters(), strict=True):
        p.data.copy_(q)


@pytest.mark.parametrize("way", [load, load_after_a_round_trip, write_unseen])
@pytest.mark.parametrize("scale", ["balanced", "initial"])
def test_weights_that_are_replaced_before_the_first_step_set_the_scale(
    engine: str, scale: str, way: Callable[[GSGD, nn.Module, nn.Module], None]
) -> None:
    torch.manual_seed(0)
    one, other = (mlp([5, 9, 7, 3]).double() for _ in range(2))
    opt = GSGD(other, lr=0.05, momentum=0.9, scale=scale, rule="largest")
    way(opt, other, one)
    made_then = GSGD(one, lr=0.05, momentum=0.9, scale=scale, rule="largest")
    x = torch.randn(8, 5, dtype=torch.float64)
    for _ in range(4):
        for model, o in ((one, made_then), (other, opt)):
            o.zero_grad()
            model(x).square().mean().backward()
            o.step()
    assert all(map(torch.equal, one.parameters(), other.parameters()))
