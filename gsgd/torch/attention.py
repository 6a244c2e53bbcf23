"""Rules of torch's attention: sums of values over positions, whose weights are pinned (METHOD.md, section 9)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from gsgd.blocks import Dim, Part
from gsgd.torch.run import Run
from gsgd.trace import rules
from gsgd.trace.nodes import Nodes, NotUnderstood, along
from gsgd.trace.rules import Operand


def attention(
    run: Run,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *_: Any,
    enable_gqa: bool = False,
    **options: Any,
) -> Nodes:
    """Sums of values over positions, whose weights are pinned."""
    for t in (query, key, attn_mask):
        if t is not None:
            run.on.pin(run.nodes(t), f"{run.current}: as its weights")
    nodes = run.on.equal_along(run.nodes(value), [value.ndim - 2])
    if enable_gqa:
        nodes = np.repeat(nodes, query.shape[-3] // value.shape[-3], axis=-3)
    return np.broadcast_to(nodes, out.shape)


def multi_head_attention(
    run: Run,
    out: tuple[Tensor, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    *_: Any,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    attn_mask: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    **options: Any,
) -> list[Nodes]:
    """Three projections by one matrix or three, sums of values over positions, and a fourth projection."""
    on, net, width = run.on, run.on.net, embed_dim_to_check
    biases = [bias for bias in (in_proj_bias, bias_v, out_proj_bias) if bias is not None]
    if static_k is not None or static_v is not None or not all(map(run.described, biases)):
        raise NotUnderstood("of this form")
    own = [q_proj_weight, k_proj_weight, v_proj_weight] if in_proj_weight is None else [in_proj_weight]
    names, last = [run.weight(w) for w in own], run.weight(out_proj_weight)
    read = [on.read(run.nodes(t), -1) for t in (query, key, value)]
    if in_proj_weight is None:
        projected = [net.dense(name, x, width).per_feature for name, x in zip(names, read, strict=True)]
    else:
        projected = np.split(net.nodes.new(3 * width, names[0]), 3)
        none, dims = Dim(), (Dim(width, 0, 1), Dim(in_proj_weight.shape[1], 1, 1))
        parts = [
            Part((none, *dims, none, none, none), (0, i * width), rows, x.per_feature)
            for i, (rows, x) in enumerate(zip(projected, read, strict=True))
        ]
        net.edges(names[0], "dense", tuple(in_proj_weight.shape), *parts)
    if in_proj_bias is not None:
        net.bias(run.weight(in_proj_bias), net.features(np.concatenate(projected)))
    reason, values = f"{run.current}: as its weights", projected[2]
    on.pin(np.concatenate(projected[:2]), reason)
    if attn_mask is not None:
        on.pin(run.nodes(attn_mask), reason)
    if bias_v is not None:  # the value of one more position
        values = rules.add(on, Operand(values), run.operand(bias_v)).reshape(-1)
    y = net.dense(last, net.features(values), width, bias=run.described(out_proj_bias))
    weights = [] if out[1] is None else [on.fill(out[1].shape, int(projected[0][0]))]
    return [along(y.per_feature, -1, out[0].shape), *weights]
