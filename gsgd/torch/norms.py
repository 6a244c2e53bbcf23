"""Rules of torch's normalizations (METHOD.md, sections 5 and 9)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gsgd.torch.layers import written
from gsgd.torch.run import Run
from gsgd.trace import rules
from gsgd.trace.nodes import Nodes, NotUnderstood
from gsgd.trace.rules import Operand


def normalization(
    run: Run,
    out: Tensor,
    x: Tensor,
    mean: Any,
    var: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **options: Any,
) -> Nodes:
    channels = run.on.read(run.nodes(x), 1)
    if run.batch_norm != "exact" and not run.on.net.is_written(channels):
        raise NotUnderstood("no layer is right before it")
    pin_computed(run, weight)
    y = run.on.net.batch_norm(channels, run.described(weight), run.described(bias), run.batch_norm)
    return written(run, y, bias, 1, out)


def pin_computed(run: Run, weight: Tensor | None) -> None:
    if weight is not None and run.described(weight) is None:
        run.on.pin(run.nodes(weight), f"{run.current}: as its weight")


def affine(run: Run, out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, dim: int) -> Nodes:
    """What a normalization over more than single channels does to these."""
    pin_computed(run, weight)
    if any(t is not None and t.ndim > 1 for t in (weight, bias)):  # every element has a weight
        nodes = rules.normalize(run.on, run.nodes(x), run.operand(weight))
        return nodes if bias is None else rules.add(run.on, Operand(nodes), run.operand(bias))
    y = run.on.net.norm(run.on.read(run.nodes(x), dim), run.described(weight), run.described(bias))
    return written(run, y, bias, dim, out)


def layer_norm(
    run: Run,
    out: Tensor,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **options: Any,
) -> Nodes:
    return affine(run, out, x, weight, bias, -1)


def rms_norm(
    run: Run, out: Tensor, x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Nodes:
    return affine(run, out, x, weight, None, -1)


def group_norm(
    run: Run,
    out: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **options: Any,
) -> Nodes:
    return affine(run, out, x, weight, bias, 1)


def instance_norm(
    run: Run,
    out: Tensor,
    x: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **options: Any,
) -> Nodes:
    return affine(run, out, x, weight, bias, 1)
