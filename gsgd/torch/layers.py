"""Rules of torch's layers and products: each is told the result, and the arguments as they were given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gsgd.features import Features
from gsgd.torch.run import Run
from gsgd.trace import rules
from gsgd.trace.nodes import Nodes, NotUnderstood, along
from gsgd.trace.rules import Operand
from gsgd.trace.weights import Labels


def contracted(
    run: Run, out: Tensor, a: Tensor, a_labels: Labels, b: Tensor, b_labels: Labels, labels: Labels
) -> Nodes:
    """A sum of products, with dimensions labelled as in einsum."""
    why = [run.why_not_described(t) for t in (a, b)]
    operands = [run.operand(t) for t in (a, b)]
    otherwise = why[1] or why[0] or "by a feature"
    return rules.contract(run.on, operands[0], a_labels, operands[1], b_labels, labels, out.shape, otherwise)


def linear(run: Run, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Nodes:
    batch = range(-x.ndim + 1, 0)
    row = ("row",) * (weight.ndim - 1)
    nodes = contracted(run, out, x, (*batch, "column"), weight, (*row, "column"), (*batch, *row))
    if bias is None:
        return nodes
    name = run.described(bias)
    if name is None:
        return written(run, run.on.read(nodes, -1), bias, -1, out)
    if run.operand(weight).weight is None:
        return rules.add(run.on, Operand(nodes), run.operand(bias))
    return along(run.on.net.bias(name, run.on.read(nodes, -1)).per_feature, -1, out.shape)


def matmul(run: Run, out: Tensor, a: Tensor, other: Tensor) -> Nodes:
    row, column = ("row",) * (a.ndim > 1), ("column",) * (other.ndim > 1)
    batch = [range(-t.ndim + 2, 0) for t in (a, other)]
    labels = (*max(batch, key=len), *row, *column)
    return contracted(run, out, a, (*batch[0], *row, "sum"), other, (*batch[1], "sum", *column), labels)


def add_matmul(run: Run, out: Tensor, x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Nodes:
    return rules.add(run.on, run.operand(x), Operand(matmul(run, out, a, b)))


def einsum(run: Run, out: Tensor, equation: str, *operands: Any) -> Nodes:
    tensors = list(operands[0]) if len(operands) == 1 and not isinstance(operands[0], Tensor) else list(operands)
    if not isinstance(equation, str) or len(tensors) != 2:
        raise NotUnderstood("of this form")
    given, _, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    if "->" not in equation:
        letters = [c for c in sorted(set(given) - set(",.")) if given.count(c) == 1]
        result = "..." * ("..." in given) + "".join(letters)

    def labels(term: str, ndim: int) -> Labels:
        before, dots, after = term.partition("...")
        return (*before, *range(len(before) + len(after) - ndim, 0), *after) if dots else tuple(term)

    (a, b), (x, y) = tensors, terms
    return contracted(run, out, a, labels(x, a.ndim), b, labels(y, b.ndim), labels(result, out.ndim))


def convolution(
    run: Run,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Nodes:
    return convolved(run, out, x, weight, bias, groups, "oidhw")


def transposed_convolution(
    run: Run,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Nodes:
    return convolved(run, out, x, weight, bias, groups, "iodhw")


def convolved(
    run: Run, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, letters: str
) -> Nodes:
    spatial = weight.ndim - 2
    dim = -spatial - 1
    if run.described(weight) is None and bias is None and run.on.is_pinned(run.nodes(weight)):
        why = run.why_not_described(weight) or "by constants"
        return rules.by_constants(run.on, run.nodes(x), dim, groups, dim, out.shape[dim], out.shape, why)
    name = run.weight(weight)
    y = run.on.net.conv(
        name,
        run.on.read(run.nodes(x), dim),
        out.shape[dim],
        tuple(weight.shape[2:]),
        groups=groups,
        bias=run.described(bias),
        layout=letters[:2] + letters[-spatial:],
    )
    return written(run, y, bias, dim, out)


def written(run: Run, y: Features, bias: Tensor | None, dim: int, out: Tensor) -> Nodes:
    if bias is not None and run.described(bias) is None:
        reason = f"{run.current}: its bias is read elsewhere, or computed"
        run.on.pin(run.nodes(bias), reason)
        run.on.net.pin(y, reason)
    return along(y.per_feature, dim, out.shape)
