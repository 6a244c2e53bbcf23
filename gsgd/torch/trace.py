"""From a PyTorch module to `gsgd.Network`.

A copy of the module is run (`gsgd.torch.follow`), while every torch function is observed. Each value carries an integer
array of its own shape: the network's node of every element. Whatever moves elements about (reshape, permute, cat,
slices, channel shuffles) then moves the nodes about in just the same way, and a layer reads its columns' nodes off its
input (`gsgd.trace.nodes`).

Three rules make it safe. An operation that is not known to be positively homogeneous pins every unit that it reads.
A parameter is described only if the whole forward pass reads it once, and a layer does. What a value overwrites in
place becomes one unit with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gsgd.network import BatchNormMode, Network, Residual
from gsgd.torch.follow import OUT_OF_SIGHT, Follow, arguments, name_of, output_tensors, own_tensors, unwrap
from gsgd.torch.record import Recording, record
from gsgd.torch.rules import find_rule
from gsgd.torch.values import Kind, is_continuous, storage_of, tensors_in
from gsgd.trace.names import match, unread
from gsgd.trace.nodes import Algebra, Nodes, NotUnderstood, along, expanded
from gsgd.trace.rules import Operand
from gsgd.trace.weights import weight_view
from gsgd.warn import warn


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    residual: Residual = "tie",
    batch_norm: BatchNormMode = "exact",
    leave_out: str | Iterable[str] = (),
    pin_after: str | Iterable[str] = (),
    prefix: str = "",
) -> Network:
    """Describe `model` as a `gsgd.Network`, with parameters under their ``named_parameters()`` names.

    Neither the model (weights, buffers, training flags) nor the random state changes, nor do lists and the like that
    hooks of its modules fill: everything runs on copies. The forward pass is followed in training mode, without values
    of weights and real inputs as long as that will do; integers, buffers and constants keep theirs. Anything that is
    not understood pins the units that meet it, and ``print(net)`` shows the reason: the operation and the module. It
    also lists the parameters that are not described, with what reads them; they are left out of the network. Frozen
    ones (``requires_grad=False``) are described like others, since the symmetry holds.

    Parameters
    ----------
    model : nn.Module
    example_inputs : tensor, tuple of positional or dict of keyword arguments, optional
        Their real numbers matter only where the model asks for them, to branch, say. Without them, inputs of common
        sizes are tried: ``(2, in_features)`` or ``(2, in_channels, size, ...)``, as the model's first layer reads.
    residual : {"tie", "pin"}
        What additions do to the units they add; see `Network.add`.
    batch_norm : {"exact", "paper", "released"}
        See `Network.batch_norm`.
    leave_out : str or iterable of str
        Names of parameters or of modules whose parameters take plain steps; the units that meet them are pinned. A
        convolution that is left out takes raw gradients whatever `batch_norm` is. A module that is left out may branch
        on real values.
    pin_after : str or iterable of str
        Names of modules whose outputs are pinned: chains end there. With ``("layer1", "layer2")`` every stage of a
        residual network has chains of its own.
    prefix : str
        Of the parameters' names in the network: ``trace(model.backbone, x, prefix="backbone.")`` describes a part of
        a model, for an optimizer of the whole. What is outside takes plain steps.

    Warns
    -----
    UserWarning
        A trainable parameter was not read, and is not in `leave_out`. Or the model asks for real values, to branch
        on them, say: those of a run on the example inputs are taken, and the warning names the lines that asked. Or it
        branches on random numbers of torch.

    Raises
    ------
    ValueError
        `residual` or `batch_norm` is unknown; `leave_out` or `pin_after` names nothing; the model can't be copied, or
        its forward reads the original's parameters (by a closure); or the forward pass can't be followed: it fails on
        the inputs, it asks for values that a model or inputs on the meta device lack, or a value is made out of sight
        (TorchScript, an extension). The message names the operation, the module and the line.
    TypeError
        `model` is not a module, or returns what can't be looked into.

    Notes
    -----
    What is seen is one forward pass: not a penalty on weights in the loss, not values that a hook keeps elsewhere,
    not the other branch of a choice that Python made (by a random number, say). Indices that differ from pass to pass
    (of integer inputs, computed, or drawn by torch) pin what they select, unless they select among samples or
    positions; those of Python and NumPy are taken as fixed.

    A hook on the gradient of a weight is not seen, either. Where it masks entries, the others of its units move: the
    masked ones follow, so that the function depends on them as before. `leave_out` freezes them.
    """
    if residual not in ("tie", "pin"):
        raise ValueError(f"residual {residual!r}: expected 'tie' or 'pin'")
    if batch_norm not in ("exact", "paper", "released"):
        raise ValueError(f"batch_norm {batch_norm!r}: expected 'exact', 'paper' or 'released'")
    inner, names = unwrap(model)
    left_out = match(leave_out, names.values(), "leave_out")
    ends = {pin_after} if isinstance(pin_after, str) else set(pin_after)
    outer = {id(module): name for name, module in model.named_modules()}
    match(ends, outer.values(), "pin_after")
    modules = {name: outer[id(module)] for name, module in inner.named_modules()}
    recording = record(
        inner,
        {name: prefix + own for name, own in names.items()},
        arguments(example_inputs) if example_inputs is not None else None,
        {name for name, own in modules.items() if own and _is_left_out(own, names.values(), left_out)},
    )
    describe = _Describe(recording, residual, batch_norm, {name for name, own in modules.items() if own in ends})
    left_out = [prefix + name for name in left_out]
    net = describe.net.without([name for name in left_out if name in describe.net.shapes], "left out")
    net.add_plain(left_out, "left out")
    alone = {name: i for i, name in recording.parameters.items()}
    for name in (prefix + own for own in names.values()):
        if name not in net.shapes:
            read = describe.reasons.get(name, "not read by the forward pass")
            net.add_plain([name], read if name in alone else "shares its memory with another")
    trained = {prefix + name for name, p in model.named_parameters() if p.requires_grad} - set(left_out)
    not_read = [name for name, i in alone.items() if name in trained and recording.reads[i] == 0]
    if not_read:
        warn(f"{unread(not_read)}, and pass network=. If none does, name them in leave_out, or freeze them")
    return net


def _is_left_out(module: str, names: Iterable[str], left_out: Collection[str]) -> bool:
    """Whether all of its parameters are."""
    own = [name for name in names if name.startswith(f"{module}.")]
    return bool(own) and all(name in left_out for name in own)


class _Describe(Follow):
    """Builds a network by the algebra `on`."""

    def __init__(
        self, recording: Recording, residual: Residual, batch_norm: BatchNormMode, ends: Collection[str]
    ) -> None:
        super().__init__(recording.real)
        self.on, self.batch_norm = Algebra(residual), batch_norm
        self.net = self.on.net
        self.parameters, self.reads, self.live = recording.parameters, recording.reads, recording.live
        self.ends = ends
        self.calls, self.seen = recording.calls, 0
        self.known: dict[int, tuple[Tensor, Nodes]] = {}  # id -> the value, kept alive, and its nodes
        self.values_in: Counter[int] = Counter()  # storage -> how many values that are known lie in it
        self.views: dict[int, Tensor] = {}  # id of a view -> its parameter
        self.reasons: dict[str, str] = {}  # of parameters: what reads them first
        self.follow(recording.ghost, *recording.inputs)

    # values

    def nodes(self, t: Tensor) -> Nodes:
        if id(t) in self.known:
            return self.known[id(t)][1]
        if self.kind(t) is Kind.REAL:
            raise ValueError(OUT_OF_SIGHT)
        self.know(t, self.constant(t))
        return self.known[id(t)][1]

    def constant(self, t: Tensor) -> Nodes:
        """The nodes of a value that depends on no feature."""
        zero = is_continuous(t) and self.kind(t) is Kind.FIXED and not t.is_meta and t.numel() > 0 and not t.any()
        return self.on.zero(t.shape) if zero else self.on.fill(t.shape)

    def operand(self, value: Any) -> Operand:
        """A tensor or a number."""
        if not isinstance(value, Tensor):
            return Operand(self.on.fill(()) if value else self.on.zero(()))
        p = self.views.get(id(value), value)
        name = self.described(p)
        own = None if name is None else weight_view(name, p.shape, p.stride(), value.shape, value.stride())
        return Operand(self.nodes(value), own)

    def moved(self, t: Tensor, views: list[Tensor]) -> None:
        """If `t` is a parameter, so are its views."""
        p = self.views.get(id(t), t)
        if id(p) in self.parameters:
            self.views.update((id(view), p) for view in views if view._base is p)

    def know(self, t: Tensor, nodes: Nodes, anew: bool = False) -> None:
        if id(t) not in self.known:
            self.values_in[storage_of(t)] += 1
        elif not anew:  # made in place: what views of it were taken to be must stay true
            before = self.known[id(t)][1]
            if before.shape == nodes.shape:
                self.on.tie(before, nodes)
        self.known[id(t)] = (t, expanded(nodes))

    def start(self, t: Tensor) -> None:
        super().start(t)
        dim = min(1, t.ndim - 1)
        self.know(t, along(self.net.input(t.shape[dim] if t.ndim else 1).per_feature, dim, t.shape))

    def enter(self, tensors: list[Tensor]) -> None:
        super().enter(tensors)
        for t in tensors:
            self.know(t, self.constant(t))

    def leave(self, name: str, out: Any) -> None:
        super().leave(name, out)
        if name in self.ends:
            for t in output_tensors(out):
                self.on.pin(self.nodes(t), f"output of {name}")

    def finish(self, model: nn.Module, out: Any) -> None:
        for key, value in out.items() if isinstance(out, Mapping) else [("", out)]:
            for t in output_tensors(value):
                self.on.pin(self.nodes(t), f"network output {key}".strip())
        for name, module in model.named_modules():
            for t in own_tensors(module):
                self.on.pin(self.nodes(t), f"kept by {name or 'the model'}")
        self.net.pin_unmet()

    def described(self, t: Any) -> str | None:
        """The name under which a parameter can be described: nothing else may read it."""
        return self.parameters[id(t)] if id(t) in self.parameters and not self.why_not_described(t) else None

    def weight(self, t: Any) -> str:
        name = self.described(t)
        if name is None:
            raise NotUnderstood(self.why_not_described(t) or "its weight is computed, or shares its memory")
        if not t.numel():
            raise NotUnderstood("its weight has no entries")
        return name

    def why_not_described(self, t: Any) -> str:
        """Why a parameter, or a view of one, can't be described; nothing for others and for those that can."""
        p = self.views.get(id(t), t)
        if id(p) not in self.parameters:
            return ""
        what = f"its weight {self.parameters[id(p)]} is"
        if not p.is_floating_point():
            return f"{what} not of real numbers"
        return f"{what} read {self.reads[id(p)]} times" if self.reads[id(p)] != 1 else ""

    # operations

    def is_next_live(self, func: Callable[..., Any]) -> bool:
        """Whether it matters, the next call: that of `func`."""
        self.seen += 1
        if self.calls[self.seen - 1 : self.seen] != [name_of(func)]:
            raise ValueError(
                "two runs call other functions: the model draws random numbers that can't be seeded, or counts its "
                "runs. Switch that off while tracing, and trace with all layers"
            )
        return self.seen - 1 in self.live

    def ask(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
        if self.is_next_live(func):
            for t in tensors_in((args, kwargs)):
                self.on.pin(self.nodes(t), f"{self.current}: its value is used")
        return out

    def see(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        if not self.is_next_live(func):
            return
        reads = [t for t in tensors_in((args, kwargs)) if is_continuous(t)]
        results = [t for t in tensors_in(out) if is_continuous(t)]
        reason = self.current
        # zeros that nothing else views scale as what is written to them
        anew = {id(t) for t in reads if self.on.is_zero(self.nodes(t)) and self.values_in[storage_of(t)] == 1}
        try:
            if not torch.is_grad_enabled():
                raise NotUnderstood("without gradients")
            if kwargs.get("out") is not None:
                raise NotUnderstood("out=")
            made = self.describe(func, args, kwargs, out, reads, results)
            nodes = list(made) if isinstance(made, tuple | list) else [made]
            if [n.shape for n in nodes] != [t.shape for t in results]:
                raise NotUnderstood("an unexpected result")
            for t in filter(is_continuous, self.written):
                if not nodes or nodes[0] is not self.nodes(t):
                    self.on.overwrite(self.nodes(t))
        except NotUnderstood as why:
            reason = f"{self.current}: {why}".removesuffix(": ")
            for t in reads:
                self.on.pin(self.nodes(t), reason)
            node = int(self.net.input(1, reason).per_feature[0]) if reads and results else None
            nodes = [self.on.fill(t.shape, node) for t in results]
        for p in (self.views.get(id(t), t) for t in reads):
            if id(p) in self.parameters and not (results and all(id(t) in self.views for t in results)):
                self.reasons.setdefault(self.parameters[id(p)], reason)
        for t, n in zip(results, nodes, strict=True):
            self.know(t, n, id(t) in anew)
        for t in tensors_in(out):
            self.known.setdefault(id(t), (t, self.on.fill(t.shape)))  # indices and masks

    def describe(
        self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any, reads: list[Tensor], results: list[Tensor]
    ) -> Any:
        """The nodes of what `func` returns (of its real or complex tensors)."""
        memory = {storage_of(t) for t in reads}
        if all(self.kind(t) is Kind.FIXED and storage_of(t) not in memory for t in results) and results:
            return [self.constant(t) for t in results]
        rule = find_rule(name_of(func))
        if rule is None:
            raise NotUnderstood
        return rule(self, func, args, kwargs, out)
