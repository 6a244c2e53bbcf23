"""Architectures, written here and as other libraries ship them: traced, verified, rescaled, and trained for a step.

`make test` tries a dozen of them. `make test-wild` installs the libraries, tries all, and writes docs/architectures.md.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from shipped import LARGE, SHIPPED
from torch import Tensor, nn
from written import ARCHITECTURES, Case, Inputs

from gsgd import Network
from gsgd.torch import GSGD, rescale, trace, verify
from gsgd.torch.follow import arguments, output_tensors

Key = tuple[str, str]  # where it is from, and its name

HERE = "Written for this test"
DOZEN = (
    "VGG-16 with batch norm", "feature pyramid", "MLP-Mixer with ReLU", "ViT with ReLU", "variational autoencoder",
    "diffusion U-Net with ReLU", "CLIP", "dueling DQN", "NeRF", "GRU on packed sequences", "DLRM",
    "transformer, pre-norm",
)  # fmt: skip
ALL: dict[Key, Case] = {
    (origin, name): case for origin, cases in {HERE: ARCHITECTURES, **SHIPPED}.items() for name, case in cases.items()
}
LR = 1e-4
IS_WILD = find_spec("timm") is not None
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Row:
    units: int
    share: float  # of the weights that meet a unit
    seconds: float  # of trace
    pinned: str


@dataclass(frozen=True)
class Found:
    rows: dict[Key, Row] = field(default_factory=dict)
    large: dict[str, float] = field(default_factory=dict)  # seconds


@pytest.fixture(scope="module")
def found() -> Iterator[Found]:
    found = Found()
    yield found
    if found.rows.keys() == ALL.keys() and found.large.keys() == LARGE.keys():
        PAGE.write_text(page(found))


@pytest.mark.parametrize("key", ALL if IS_WILD else [(HERE, name) for name in DOZEN], ids=": ".join)
def test_architecture(key: Key, found: Found) -> None:
    torch.manual_seed(0)
    model, inputs = ALL[key]()
    for p in model.parameters():  # zeros would hide what is wrong
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.1)
    net, seconds = timed_trace(model, inputs)
    assert net.num_units >= units_on_page().get(key, 0)
    verify(model, net, inputs)
    same = rescaled(model, net)
    other = rescaled(model, GSGD(model, lr=LR, network=net).network)  # in which units of frozen weights are pinned
    before = outputs(model, inputs)
    assert all(torch.equal(y, x) for y, x in zip(outputs(same, inputs), before, strict=True))
    for m in (model, other):
        assert step(m, net, inputs) < 0
    after = outputs(model, inputs)
    assert 0 <= difference(outputs(other, inputs), after) < 0.01 * difference(before, after)
    found.rows[key] = Row(net.num_units, share(net, model), seconds, pinned(net, model))


@pytest.mark.parametrize("name", LARGE if IS_WILD else ())
def test_large_models_are_traced(name: str, found: Found) -> None:
    net, found.large[name] = timed_trace(*LARGE[name]())
    assert net.num_units > 0


def timed_trace(model: nn.Module, inputs: Inputs) -> tuple[Network, float]:
    start = time.process_time()
    return trace(model, inputs), time.process_time() - start


def rescaled(model: nn.Module, net: Network) -> nn.Module:
    """A copy, by random powers of 2, which round nothing."""
    copied = copy.deepcopy(model)
    rescale(copied, net, 2.0 ** np.random.default_rng(0).integers(-2, 3, net.num_units))
    return copied


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """In evaluation."""
    model.eval()
    torch.manual_seed(0)
    args, kwargs = arguments(inputs)
    return [y.detach().clone() for y in output_tensors(model(*args, **kwargs))]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())


def step(model: nn.Module, net: Network, inputs: Inputs) -> float:
    """Take a step, in training; how much it raises the loss, to first order."""
    model.train()
    optimizer = GSGD(model, lr=LR, network=net)
    torch.manual_seed(0)
    args, kwargs = arguments(inputs)
    ys = [y for y in output_tensors(model(*args, **kwargs)) if y.requires_grad]
    torch.stack([(y - 1).square().mean() for y in ys]).sum().backward()  # outputs may be 0 at the start
    moved = {p: p.detach().clone() for p in model.parameters() if p.grad is not None}
    optimizer.step()
    return sum(float((p.grad * (p.detach() - before)).sum()) for p, before in moved.items())


def share(net: Network, model: nn.Module) -> float:
    """Of all weights, those that lead into a unit or out of one."""
    met = 0
    for block in net.blocks:
        groups, _, _, *taps = block.extents
        rows, cols = (units.reshape(groups, -1) >= 0 for units in (block.rows, block.cols))
        met += int((rows[:, :, None] | cols[:, None, :]).sum()) * math.prod(taps)
    return met / sum(p.numel() for p in model.parameters())


def pinned(net: Network, model: nn.Module) -> str:
    """What pins the channels that layers write, and what reads weights that are not described: the most frequent."""
    written = [part.rows for layer in net.layers.values() for part in layer.parts]
    nodes = np.unique(np.concatenate(written)).tolist() if written else []
    usual = ("constant", "network input", "network output", "scale lost")  # they tell nothing of an architecture
    channels = Counter(cause(why) for why in map(net.nodes.why, nodes) if why and not why.startswith(usual))
    weights: Counter[str] = Counter()
    for name, why in net.plain.items():
        weights[cause(why)] += model.get_parameter(name).numel()
    parts = [f"{why} ({n:,} channels)" for why, n in channels.most_common(3)]
    return "; ".join(parts + [f"{why} ({n:,} weights)" for why, n in weights.most_common(2)])


def cause(reason: str) -> str:
    """A reason without the names of its module and its parameter."""
    reason = re.sub(r" in (the model|[\w.]+)(?=:|$)", "", reason)
    return re.sub(r"its weight \S+ is", "its weight is", reason)


def page(found: Found) -> str:
    large = " and ".join(f"{name} takes {seconds:.1f} s" for name, seconds in found.large.items())
    lines = [PREFACE.format(number=len(found.rows), large=large)]
    for origin in dict.fromkeys(origin for origin, _ in found.rows):
        lines.append(HEAD.format(origin=origin))
        lines += [
            f"| {name} | {row.units:,} | {row.share:.1%} | yes | {row.seconds:.2f} s | {row.pinned} |"
            for (of, name), row in found.rows.items()
            if of == origin
        ]
    return "\n".join(lines) + "\n"


def units_on_page() -> dict[Key, int]:
    """What the page says now: no architecture may come to have fewer."""
    said, origin = {}, ""
    for line in PAGE.read_text().splitlines() if PAGE.exists() else ():
        origin = line.removeprefix("## ") if line.startswith("## ") else origin
        if row := re.match(r"\| (.+?) \| ([\d,]+) \|", line):
            said[origin, row[1]] = int(row[2].replace(",", ""))
    return said


PREFACE = """# Architectures

What tracing makes of {number} architectures: written plainly, or as other libraries ship them, most of them made small,
and called as their users call them. `make test-wild` tries all of them, and writes this page. Parameters that start at
zero, which would hide faults, get random values. Then each is traced and verified. Its units are rescaled by random
powers of 2: its outputs stay the same in every bit. A step of G-SGD goes down the gradient, and a step from the
rescaled model leads to the same function.

- **Units** can be rescaled. **Weights that meet one** lead into it or out of it; all others take plain steps.
- **Trace** is what it takes on one core. At the sizes that people train, on images
  of 224 x 224, {large}.
- **Pinned, and by what**: the operations that are not positively homogeneous, or not known, with the channels that
  layers write for them, and what reads weights that are not described. Not listed is what every network has: its
  outputs, and what a normalization reads (what it writes can be units)."""
HEAD = """
## {origin}

| | units | weights that meet one | verified | trace | pinned, and by what |
|---|---|---|---|---|---|"""
