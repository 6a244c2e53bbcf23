"""Parts of a model: left out, traced alone, dropped at random, or replaced."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from models import Call, mlp
from torch import Tensor, nn

from gsgd.torch import GSGD, SymmetryError, trace, verify


class Heads(nn.Module):
    """It chooses by real values, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.box = nn.Linear(8, 4)

    def forward(self, h: Tensor) -> Tensor:
        boxes = self.box(h)
        keep = (boxes[:, 0] > boxes.mean()).nonzero().squeeze(1)
        return boxes[keep] if keep.numel() else boxes * boxes.max().item()


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU())
        self.heads, self.score = Heads(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        if x.shape[0] == 0:
            raise ValueError("no images")
        h = self.backbone(x).mean((2, 3))
        if torch.isnan(h).any():
            raise ValueError("not finite")
        return {"boxes": self.heads(h), "scores": self.score(h)}


X = torch.randn(4, 3, 7, 7)


def test_a_module_that_is_left_out_may_choose_by_real_values() -> None:
    torch.manual_seed(0)
    model = Detector()
    with pytest.warns(UserWarning, match=r"real values, at .*test_torch_parts\.py:\d+: .*prefix='backbone\.'") as said:
        net = trace(model, X, leave_out="heads")
    assert len(re.findall(r"test_torch_parts\.py:\d+", str(said[0].message))) == 1  # the check, not the heads
    assert net.num_units == 6
    assert net.plain == {"heads.box.weight": "left out", "heads.box.bias": "left out"}
    verify(model, net, X)


class Choose(nn.Module):
    """It chooses by one value what is done to another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, by: Tensor, h: Tensor) -> Tensor:
        return self.layer(h if by.mean() > 0.1 else 2 * h)


def test_what_a_module_that_is_left_out_chooses_by_is_pinned() -> None:
    torch.manual_seed(0)
    model = Call(
        lambda m, x: (m.choose(h := torch.relu(m.a(x)), m.c(x)), m.b(h)),
        a=nn.Linear(5, 8), b=nn.Linear(8, 2), c=nn.Linear(5, 6), choose=Choose(),
    )  # fmt: skip
    x = torch.randn(4, 5)
    with pytest.warns(UserWarning, match=r"pass leave_out='choose'"):
        assert trace(model, x).num_units == 8 + 6
    net = trace(model, x, leave_out="choose")
    assert net.num_units == 0
    verify(model, net, x)


def test_a_part_is_traced_for_an_optimizer_of_the_whole() -> None:
    torch.manual_seed(0)
    model = Detector()
    net = trace(model.backbone, X, prefix="backbone.", leave_out="2.bias", pin_after="1")
    assert set(net.shapes) == {"backbone.0.weight", "backbone.0.bias", "backbone.2.weight"}
    assert net.plain == {"backbone.2.bias": "left out"}
    assert net.num_units == 0
    net = trace(model.backbone, X, prefix="backbone.")
    assert net.num_units == 6
    verify(model, net, X)
    optimizer = GSGD(model, lr=0.1, network=net)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sum(y.square().sum() for y in model(X).values()).backward()
    optimizer.step()
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters() if not name.startswith("heads"))


def test_the_module_that_chooses_is_named() -> None:
    model = Call(lambda m, x: m.heads(m.stem(x)), stem=nn.Linear(5, 8), heads=Heads())
    with pytest.warns(UserWarning, match=r"pass leave_out='heads', or trace a part .* trace\(model\.stem, "):
        trace(model, torch.randn(4, 5))


class NoForward(nn.Module):
    """As a LightningModule with a training_step only."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.net = nn.CrossEntropyLoss(), mlp((3, 4, 2))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("inputs", [None, torch.randn(2, 3)])
def test_a_module_without_forward(inputs: Any) -> None:
    with pytest.raises(ValueError, match=r"^NoForward has no forward: trace what it calls, as by GSGD\(self\.net\)$"):
        GSGD(NoForward(), example_inputs=inputs)


class LayerDrop(nn.Module):
    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always
        self.a, self.o, self.layers = (
            nn.Linear(5, 6),
            nn.Linear(6, 2),
            nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        for layer in self.layers:
            if (self.training or self.always) and torch.rand(1).item() < 0.5:
                continue
            h = h + torch.relu(layer(h))
        return self.o(h)


@pytest.mark.parametrize("always", [False, True])
def test_layers_that_are_dropped(always: bool) -> None:
    """What was not read is told of, and every seed of verify finds what is missing."""
    x, complete = torch.randn(8, 5), 0
    for seed in range(8):
        model = LayerDrop(always)
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            net = trace(model)
        missing = [name for name in net.plain if name.startswith("layers")]
        assert bool(missing) == any("did not read layers." in str(w.message) for w in said)
        if missing:
            with pytest.raises(SymmetryError):
                verify(model, net, x)
        else:
            complete += 1
            verify(model, net, x)
    assert 0 < complete < 8


def test_a_model_that_goes_another_way_in_every_run() -> None:
    ways = iter([torch.relu, torch.tanh, torch.relu, torch.tanh] * 3)
    model = Call(lambda m, x: m.b(next(ways)(m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 2))
    with pytest.raises(ValueError, match="two runs call other functions: the model draws"):
        trace(model, torch.randn(4, 5))


@pytest.mark.parametrize("data", [False, True])
def test_weights_that_forward_changes(data: bool) -> None:
    class Normalized(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if data:
                self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1.0)
            else:
                with torch.no_grad():
                    self.weight.renorm_(2, 0, 1.0)
            return super().forward(x)

    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(5, 6), nn.ReLU(), Normalized(6, 6), nn.ReLU(), nn.Linear(6, 2)),
        torch.randn(4, 5),
    )
    before = model[2].weight.detach().clone()
    net = trace(model, x)
    verify(model, net, x)
    assert "2.weight" not in net.shapes
    assert net.num_units == 0
    assert torch.equal(model[2].weight, before)
