"""The first runs of a model that is traced: on which inputs it runs, and which of its calls matter to the outputs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gsgd.torch.follow import Follow, copy_model, name_of, own_tensors
from gsgd.torch.memory import held_tensors, shared_parameters
from gsgd.torch.values import SELECTING, Kind, is_continuous, storage_of, tensors_in
from gsgd.warn import warn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword

_TRIED_SIZES = (224, 32, 28, 64, 96, 128, 256, 299, 16, 8)  # spatial extents, when no example inputs are given
_NUDGES = (1e-6, 1.0)  # a number that is asked for is changed by so much of it, to see whether it is used


@dataclass(frozen=True)
class Recording:
    """What is known of a model before it is described.

    Attributes
    ----------
    ghost : nn.Module
        A copy in training mode, without values of its weights unless `real`.
    parameters : dict
        Names of its parameters, by identity, that share their memory with none.
    inputs : tuple
        Positional and keyword arguments on which it runs.
    calls : list of str
        The functions that it calls.
    live : set of int
        Those of the calls on which outputs depend, or what the model keeps.
    reads : Counter
        How often live calls read every tensor, by identity.
    """

    ghost: nn.Module
    real: bool
    parameters: dict[int, str]
    inputs: Arguments
    calls: list[str]
    live: set[int]
    reads: Counter[int]


def record(model: nn.Module, names: Mapping[str, str], given: Arguments | None, left_out: Collection[str]) -> Recording:
    """Run a copy of `model`: without values if that is enough, with those of the example otherwise.

    Parameters
    ----------
    names : mapping
        Names of parameters in `model` -> those that they are given.
    given : tuple
        Arguments; None: inputs of common sizes are tried.
    left_out : collection of str
        Modules that may ask for real values as they like.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"module {name!r}" if name else "the model"
            raise ValueError(f"{where} is compiled by TorchScript, and can't be seen into")
    originals = {id(p) for p in model.parameters()}
    real = False
    while True:
        ghost = _copy(model, real)
        run = partial(_Run, real, originals, ghost)
        try:
            inputs, first = _first(ghost, run, given)
            break
        except ValueError as error:
            asked = _asks_for_values(error.__cause__)
            if real or not (asked or given) or any(t.is_meta for t in held_tensors((model, given))):
                raise _explained(error, model) from error.__cause__
            real = True
    asks = {i: call for i, call in enumerate(first.calls) if call.asks}
    outside = {i: call for i, call in asks.items() if not _lies_in(call.module, left_out)}
    used = {i for i, call in asks.items() if call.asks == "data" or i not in outside}
    numbers = {i for i, call in asks.items() if call.asks == "number"}
    if numbers - used and any(_differ(first, run(inputs, nudge=nudge)) for nudge in _NUDGES):
        used |= numbers
    if outside:
        _warn_of_choices(model, outside.values())
    live = _live(first, used)
    reads = Counter(t for i in live for t in first.calls[i].counted)
    shared = shared_parameters(model)
    parameters = {id(p): names[name] for name, p in ghost.named_parameters() if name not in shared}
    return Recording(ghost, real, parameters, inputs, first.names, live, reads)


def _copy(model: nn.Module, real: bool) -> nn.Module:
    """In training mode; only of weights the values are missing, unless it is `real`."""
    weights = {storage_of(p) for p in model.parameters() if is_continuous(p)}

    def convert(t: Tensor) -> Tensor:
        return t.detach().to("meta" if t.is_meta or (not real and storage_of(t) in weights) else "cpu", copy=True)

    ghost = copy_model(model, convert).train()
    for module in ghost.modules():  # nothing goes backward here
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return ghost


def _first(ghost: nn.Module, run: Callable[[Arguments], _Run], given: Arguments | None) -> tuple[Arguments, _Run]:
    """Arguments on which the model runs, and that run."""
    if given is not None:
        return given, run(given)
    failure: ValueError | None = None
    first: tuple[Arguments, _Run] | None = None
    for inputs in _guesses(ghost):
        try:
            found = run(inputs)
        except ValueError as error:
            if _asks_for_values(error.__cause__) or _lacks_forward(error.__cause__):  # other inputs would not help
                raise
            failure = failure or error
            continue
        if first is None:
            first = inputs, found
            continue
        if found.names != first[1].names:
            one, other = (tuple(x[0][0].shape) for x in (first[0], inputs))
            warn(
                f"the model calls other functions on inputs of shape {one}, with which it was traced, than on those of "
                f"{other}: pass example_inputs of the shape that it is trained on",
            )
        break
    if first is None:
        reason = f" (the first that was tried: {failure})" if failure else ""
        raise ValueError(f"no input was found on which the model runs: pass example_inputs{reason}") from failure
    return first


def _guesses(model: nn.Module) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shapes = [(2, module.in_features), (2, 16, module.in_features)]
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            shapes = [(2, module.in_channels, *(size,) * len(module.kernel_size)) for size in _TRIED_SIZES]
        else:
            continue
        for shape in shapes:
            yield (torch.randn(shape, generator=generator).to(module.weight.dtype),), {}
        return


def _asks_for_values(error: BaseException | None) -> bool:
    return re.search(r"(?<![a-z])meta(?![a-z])", str(error), re.IGNORECASE) is not None


def _lacks_forward(error: BaseException | None) -> bool:
    return isinstance(error, NotImplementedError) and 'required "forward"' in str(error)


def _explained(error: ValueError, model: nn.Module) -> ValueError:
    """The error with what to do about it."""
    if _lacks_forward(error.__cause__):
        such = "".join(f": trace what it calls, as by GSGD(self.{part})" for part in _parts(model)[:1])
        return ValueError(f"{type(model).__name__} has no forward{such}")
    if _asks_for_values(error.__cause__):
        return ValueError(
            f"{error} (a tensor's values are asked for; {_trace_a_part(model)}describe such a network by hand, and "
            "pass network=)"
        )
    return error


def _parts(model: nn.Module) -> list[str]:
    """Its children that have parameters."""
    return [name for name, child in model.named_children() if next(child.parameters(), None) is not None]


def _trace_a_part(model: nn.Module, but: Collection[str] = ()) -> str:
    parts = [part for part in _parts(model) if part not in but][:1]
    return "".join(f"trace a part that does not, as by trace(model.{p}, ..., prefix='{p}.'), or " for p in parts)


def _warn_of_choices(model: nn.Module, asks: Collection[_Call]) -> None:
    lines = dict.fromkeys(call.line or call.name for call in asks)
    choosing = [part for part in _parts(model) if any(call.module.partition(".")[0] == part for call in asks)]
    leave_out = "".join(f"pass leave_out={part!r}, or " for part in choosing[:1])
    warn(
        f"the model asks for real values, at {', '.join(lines)}: they were those of a run on the example, and the "
        "network holds while what depends on them is chosen alike. If it is not: "
        f"{leave_out}{_trace_a_part(model, choosing)}pass network=. What is left out or outside takes plain steps",
    )


def _lies_in(module: str, modules: Collection[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in modules)


@dataclass(frozen=True)
class _Call:
    """Tensors and storages by identity.

    `numbers` are arguments. `asks`: "number" or "choice" of a real value, or more "data" of it; "" for other calls.
    """

    name: str
    module: str
    line: str
    reads: list[int]
    counted: list[int]  # what is read, if only by a view of it; taking a view is no reading
    read_storages: set[int]
    results: set[int]
    written: set[int]
    numbers: list[object]
    asks: str = ""


class _Run(Follow):
    """Records the calls of one pass, and what must be known in the end."""

    def __init__(
        self, real: bool, originals: set[int], ghost: nn.Module, inputs: Arguments, nudge: float = 0.0
    ) -> None:
        super().__init__(real)
        self.originals, self.nudge = originals, nudge
        self.calls: list[_Call] = []
        self.alive: list[Tensor] = []  # identities stay those of these tensors
        self.ends: list[Tensor] = []
        self.follow(ghost, *inputs)

    @property
    def names(self) -> list[str]:
        return [call.name for call in self.calls]

    def see(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        name = name_of(func)
        selects = name in SELECTING or (name == "where" and len(args) + len(kwargs) == 1)
        asks = selects and self.kind(tensors_in((args, kwargs))[-1]) is Kind.REAL  # the mask is the last
        self.add(name, (args, kwargs), out, "choice" if asks else "")

    def ask(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> Any:
        asks = "choice" if isinstance(out, bool) else "number" if isinstance(out, float) else "data"
        self.add(name_of(func), (args, kwargs), None, asks)
        return out + self.nudge * (out or 1.0) if isinstance(out, float) else out

    def add(self, name: str, given: Any, out: Any, asks: str = "") -> None:
        reads, results = tensors_in(given), tensors_in(out)
        if name.endswith("="):  # a property is set
            results += reads[:1]
        if not self.originals.isdisjoint(map(id, reads)):
            raise ValueError("forward refers to the original model, by a closure: it must read parameters through self")
        self.alive += reads + results
        viewed = {id(_base(t)) for t in results}
        views = viewed if len(viewed) == 1 and all(t._base is not None for t in results) else set()
        call = _Call(
            name,
            self.path[-1] if self.path else "",
            self.line,
            list(map(id, reads)),
            [id(_base(t)) for t in reads if id(_base(t)) not in views],
            set(map(storage_of, reads)),
            set(map(id, results)),
            set(map(storage_of, self.written)),
            [x for x in tree_leaves(given) if isinstance(x, bool | int | float | complex | np.generic)],
            asks,
        )
        self.calls.append(call)

    def finish(self, model: nn.Module, outputs: list[Tensor]) -> None:
        self.ends = outputs + [t for module in model.modules() for t in own_tensors(module)]


def _base(t: Tensor) -> Tensor:
    """What `t` is a view of, or `t`."""
    return t if t._base is None else t._base


def _differ(run: _Run, nudged: _Run) -> bool:
    """Whether numbers that are asked for go into the calls that follow. Other calls are another choice."""
    same = run.names == nudged.names
    return same and [call.numbers for call in run.calls] != [call.numbers for call in nudged.calls]


def _live(run: _Run, used: Collection[int]) -> set[int]:
    """The calls that outputs depend on, or these: they made what is read later, or wrote its memory."""
    tensors, storages = set(map(id, run.ends)), set(map(storage_of, run.ends))
    live = set()
    for i in reversed(range(len(run.calls))):
        call = run.calls[i]
        if i in used or not tensors.isdisjoint(call.results) or not storages.isdisjoint(call.written):
            live.add(i)
            tensors.update(call.reads)
            storages.update(call.read_storages)
    return live
