"""Architectures, written here and as other libraries ship them: traced, verified, rescaled, and trained for a step.

`make test` tries a dozen of them. `make test-wild` installs the libraries, tries all, and writes docs/architectures.md.
"""

from __future__ import annotations

import copy
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, Case, Inputs
from shipped import GPT2, IDS, LLAMA, OPT, PADDED, SHIPPED, TEXT, transformers
from torch import Tensor, nn

from gsgd import Network
from gsgd.torch import GSGD, rescale, trace, verify
from gsgd.torch.follow import arguments, output_tensors

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
DOZEN = ("VGG-16 with batch norm", "feature pyramid", "MLP-Mixer with ReLU", "ViT with ReLU", "variational autoencoder",
         "diffusion U-Net with ReLU", "CLIP", "dueling DQN", "NeRF", "GRU on packed sequences", "DLRM",
         "transformer, pre-norm")  # fmt: skip
ALL: dict[tuple[str, str], Case] = {
    (library, name): case
    for library, cases in {"written for this page": ARCHITECTURES, **SHIPPED}.items()
    for name, case in cases.items()
}
IS_WILD = find_spec("timm") is not None
TRIED = {key: case for key, case in ALL.items() if IS_WILD or (key[1] in DOZEN and case is ARCHITECTURES.get(key[1]))}
# reasons that say nothing about an architecture
_USUAL = ("constant", "network input", "network output", "scale lost")
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Row:
    units: int
    share: float  # of the weights that meet a unit
    seconds: float  # of trace, on one core
    pinned: str


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[tuple[str, str], Row]]:
    found: dict[tuple[str, str], Row] = {}
    yield found
    if found.keys() == ALL.keys():
        PAGE.write_text(page(found))


@pytest.mark.parametrize("key", TRIED, ids=" ".join)
def test_architecture(key: tuple[str, str], rows: dict[tuple[str, str], Row]) -> None:
    torch.manual_seed(0)
    model, inputs = TRIED[key]()
    start = time.process_time()
    net = trace(model, inputs)
    seconds = time.process_time() - start
    verify(model, net, inputs)
    rescaled = copy.deepcopy(model)
    # by powers of 2 nothing is rounded
    rescale(rescaled, net, 2.0 ** np.random.default_rng(0).integers(-2, 3, net.num_units))
    before = outputs(model, inputs)
    assert all(torch.equal(y, x) for y, x in zip(outputs(rescaled, inputs), before, strict=True))
    for m in (model, rescaled):
        assert step(m, net, inputs) > 0
    after = outputs(model, inputs)
    change = difference(before, after)
    assert change > 0
    assert difference(outputs(rescaled, inputs), after) < 0.01 * change
    rows[key] = Row(net.num_units, share(net, model), seconds, pinned(net, model))


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """In evaluation."""
    model.eval()
    torch.manual_seed(0)
    args, kwargs = arguments(inputs)
    return [y.detach().clone() for y in output_tensors(model(*args, **kwargs))]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())


def step(model: nn.Module, net: Network, inputs: Inputs) -> float:
    """One step, in training; by how much it lowers the loss."""
    model.train()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    args, kwargs = arguments(inputs)

    def loss() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
        ys = output_tensors(model(*args, **kwargs))
        return sum((y.square().mean() for y in ys if y.requires_grad), torch.zeros(()))

    optimizer = GSGD(model, lr=1e-4, network=net)
    first = loss()
    first.backward()
    optimizer.step()
    return float(first.detach() - loss().detach())


def share(net: Network, model: nn.Module) -> float:
    """Of the weights: how many lead into a unit, or out of one."""
    met = 0
    for block in net.blocks:
        groups, _, _, *taps = block.extents
        rows, cols = (units.reshape(groups, -1) >= 0 for units in (block.rows, block.cols))
        met += int((rows[:, :, None] | cols[:, None, :]).sum()) * math.prod(taps)
    return met / sum(p.numel() for p in model.parameters())


def pinned(net: Network, model: nn.Module) -> str:
    """What is pinned by what, the most frequent first, and what takes plain steps."""
    written = [part.rows for layer in net.layers.values() for part in layer.parts]
    nodes = np.unique(np.concatenate(written)) if written else []
    reasons = [net.nodes.why(int(node)) for node in nodes]
    channels = Counter(cause(why) for why in reasons if why is not None and not why.startswith(_USUAL))
    weights: Counter[str] = Counter()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for name, why in net.plain.items():
        weights[cause(why)] += sizes[name]
    parts = [f"{why} ({n:,} channels)" for why, n in channels.most_common(3)]
    return "; ".join(parts + [f"plain steps: {why} ({n:,} weights)" for why, n in weights.most_common(2)]) or "nothing"


def cause(reason: str) -> str:
    """A reason without the names of its module and its parameter."""
    reason = re.sub(r" in [\w.]+( model)?(?=:|$)", "", reason)
    return re.sub(r"its weight \S+ is", "its weight is", reason)


def page(rows: dict[tuple[str, str], Row]) -> str:
    lines = [PREFACE.format(number=len(rows))]
    for library in dict.fromkeys(library for library, _ in rows):
        lines += [f"\n## {library[0].upper()}{library[1:]}\n" if "_" not in library else f"\n## {library}\n", HEAD]
        for (of, name), row in rows.items():
            if of == library:
                lines.append(f"| {name} | {row.units:,} | {row.share:.0%} | yes | {row.seconds:.1f} s | {row.pinned} |")
    return "\n".join(lines) + "\n"


PREFACE = """# Architectures

What tracing makes of {number} architectures, those of other libraries as these ship them, most of them made small. All
are called as their users call them. Every row is checked: `verify` passes; with random units rescaled by powers of 2,
the model gives the same outputs in every bit; a step of G-SGD lowers the loss, and from the rescaled model it leads to
the same function. `make test-wild` repeats all of this, and writes this page.

- **Units** can be rescaled; of all weights, a share meets one. Every other weight takes plain steps, or is an edge
  between pinned ends, which comes to the same.
- **Trace** is the time that it takes on one core.
- **Pinned, and by what**: operations that are not positively homogeneous, or not known, with the channels that layers
  write for them; and the weights that are not described, with what reads them. Network outputs are always pinned, and
  so is what feeds a batch normalization (the channels behind it are the units); these are not listed."""
HEAD = """| | units | weights that meet one | verified | trace | pinned, and by what |
|---|---|---|---|---|---|"""
