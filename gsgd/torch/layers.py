"""Rules of torch's layers and products: each is told the result, and the arguments as they were given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gsgd.features import Features
from gsgd.torch.run import Run
from gsgd.torch.values import is_continuous
from gsgd.trace import rules
from gsgd.trace.nodes import Nodes, NotUnderstood, along
from gsgd.trace.rules import Operand
from gsgd.trace.weights import Labels


def contracted(run: Run, out: Tensor, labels: Labels, *operands: tuple[Tensor, Labels]) -> Nodes:
    """A sum of products, with dimensions labelled as in einsum."""
    why = [run.why_not_described(t) for t, _ in operands]
    otherwise = next(filter(None, reversed(why)), "by a feature")
    return rules.contract(run.on, [(run.operand(t), own) for t, own in operands], labels, out.shape, otherwise)


def linear(run: Run, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Nodes:
    batch = range(-x.ndim + 1, 0)
    row = ("row",) * (weight.ndim - 1)
    nodes = contracted(run, out, (*batch, *row), (x, (*batch, "column")), (weight, (*row, "column")))
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
    return contracted(run, out, labels, (a, (*batch[0], *row, "sum")), (other, (*batch[1], "sum", *column)))


def add_matmul(run: Run, out: Tensor, x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Nodes:
    return rules.add(run.on, run.operand(x), Operand(matmul(run, out, a, b)))


def einsum(run: Run, out: Tensor, equation: str, *operands: Any) -> Nodes:
    tensors = operands if isinstance(operands[0], Tensor) else operands[0]
    if not isinstance(equation, str):
        raise NotUnderstood("of this form")
    given, _, result = equation.replace(" ", "").partition("->")
    if "->" not in equation:
        letters = [c for c in sorted(set(given) - set(",.")) if given.count(c) == 1]
        result = "..." * ("..." in given) + "".join(letters)

    def labels(term: str, ndim: int) -> Labels:
        before, dots, after = term.partition("...")
        return (*before, *range(len(before) + len(after) - ndim, 0), *after) if dots else tuple(term)

    terms = [labels(term, t.ndim) for term, t in zip(given.split(","), tensors, strict=True)]
    return contracted(run, out, labels(result, out.ndim), *zip(tensors, terms, strict=True))


def outer(run: Run, out: Tensor, a: Tensor, b: Tensor) -> Nodes:
    return contracted(run, out, ("row", "column"), (a, ("row",)), (b, ("column",)))


def tensordot(run: Run, out: Tensor, a: Tensor, b: Tensor, dims: Any = 2) -> Nodes:
    summed = (range(-dims, 0), range(dims)) if isinstance(dims, int) else dims
    names: list[list[Any]] = [[(side, d) for d in range(t.ndim)] for side, t in enumerate((a, b))]
    for number, places in enumerate(zip(*summed, strict=True)):
        for own, d in zip(names, places, strict=True):
            own[d] = number
    labels = [label for own in names for label in own if isinstance(label, tuple)]
    return contracted(run, out, labels, (a, names[0]), (b, names[1]))


def bilinear(run: Run, out: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> Nodes:
    batch = tuple(range(-out.ndim + 1, 0))
    nodes = contracted(run, out, (*batch, "row"), (a, (*batch, "a")), (b, (*batch, "b")), (weight, ("row", "a", "b")))
    return nodes if bias is None else rules.add(run.on, Operand(nodes), run.operand(bias))


def embedding(
    run: Run,
    out: Tensor,
    places: Tensor,
    table: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Nodes:
    if padding_idx is not None:
        raise NotUnderstood("gradients skip the row of padding_idx")
    if is_continuous(places) or max_norm is not None or scale_grad_by_freq or sparse:
        raise NotUnderstood("of this form")
    labels = (*range(out.ndim - 1), "channel")
    return rules.look_up(run.on, run.operand(table), ("place", "channel"), labels, out.shape)


def embedding_bag(
    run: Run,
    out: Tensor,
    places: Tensor,
    table: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    *_: Any,
    **options: Any,
) -> Nodes:
    """Sums, means or maxima of entries of a table."""
    if per_sample_weights is not None:
        run.on.pin(run.nodes(per_sample_weights), f"{run.current}: as its weights")
    return embedding(run, out, places, table, None, max_norm, norm_type, scale_grad_by_freq, sparse)


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
