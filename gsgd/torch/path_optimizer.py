"""What GSGD, GAdam and GRMSprop have in common: coordinates, engines, steps and state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import repeat
from typing import Any, Unpack, overload

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gsgd.coordinates import Coordinates, fingerprint, set_to_one
from gsgd.methods import Method, number
from gsgd.network import BatchNormMode, Network, Residual
from gsgd.optimizer import Stats
from gsgd.options import OptionArguments, Options, limit
from gsgd.skeleton import Skeleton
from gsgd.threads import usable_threads
from gsgd.torch.engines import Engine, EngineName, EngineOption, Step, Tensors, as_real, check_engine, choose
from gsgd.torch.parameters import EXPECTED, Closure, Owner, Params, named_network, refuse_unsupported
from gsgd.torch.shard_coordinates import find_coordinates
from gsgd.torch.shard_coordinates import join as join_shards
from gsgd.torch.shards import Shards, any_sharded, local
from gsgd.torch.state import held_moments, matched, saved_skeleton
from gsgd.waiting import is_due, join
from gsgd.warn import warn


class Arguments(OptionArguments, total=False):
    """The keyword arguments that all optimizers take."""

    network: Network | None
    example_inputs: Any
    leave_out: str | Sequence[str]
    residual: Residual
    batch_norm: BatchNormMode
    engine: EngineOption


class PathOptimizer(torch.optim.Optimizer):
    """What the methods have in common. They differ in the hyperparameters of a group and in the names of moments."""

    method: type[Method]  # a group holds its hyperparameters
    moments: tuple[str, str]  # names of the first and the second moment in the state

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        network: Network | None = None,
        example_inputs: Any = None,
        leave_out: str | Sequence[str] | None = None,
        residual: Residual | None = None,
        batch_norm: BatchNormMode | None = None,
        engine: EngineOption = "auto",
        **options: Unpack[OptionArguments],
    ) -> None:
        self._options, self._engine_option = Options(**options), check_engine(engine)
        self._owner = Owner(params) if isinstance(params, nn.Module) else None
        named, network = named_network(
            params, network, example_inputs, leave_out=leave_out, residual=residual, batch_norm=batch_norm
        )
        self._engine: Engine | None = None
        self._count_of_params = 0
        self._plan: Any = None
        self._seen: tuple[int, ...] = ()
        self._stats, self._calls = Stats(), 0  # what a device counts, and what the host knows without waiting
        super().__init__(named, defaults)
        self._keep_place()
        tensors = self._tensors()
        for name in network.shapes:
            if name in tensors and tuple(tensors[name].shape) != network.shapes[name]:
                expected, got = network.shapes[name], tuple(tensors[name].shape)
                raise ValueError(f"parameter {name!r}: the network expects shape {expected}, got {got}")
        if network.shapes and not network.shapes.keys() & tensors:
            first, other = next(iter(network.shapes)), next(iter(tensors))
            raise ValueError(f"params: expected names of the network, like {first!r}, got names like {other!r}")
        fixed = [n for n in network.shapes if n not in tensors or not tensors[n].requires_grad]
        network = network.without(fixed, "not trained")
        self.network = network.without([n for n in network.shapes if tensors[n].is_complex()], "complex")
        self.network.add_plain(n for n in tensors if n not in network.shapes)
        if not self.network.num_units:
            warn("no unit was found that can be rescaled: every step is a plain one")
        skeleton = self._find_coordinates()  # refuses what makes no trees
        if skeleton is not None:
            skeleton.warn_of_pinned(waiting=True)
        self._current_engine()  # refuses what no step can be taken on
        if self._options.scale == "ones" and skeleton is not None:
            with torch.no_grad():
                set_to_one(skeleton, tensors)

    def _values(self) -> dict[str, NDArray[Any]]:
        """The weights as float32 or float64 arrays; of sharded ones what is here."""
        tensors = {name: as_real(local(p)).cpu() for name, p in self._tensors().items()}
        return {n: (a if a.dtype == torch.float64 else a.float()).numpy() for n, a in tensors.items()}

    def _find_coordinates(self) -> Skeleton | None:
        """Take the coordinates of the weights as they are. Of sharded ones there is no skeleton to look at."""
        values, tensors = self._values(), self._tensors()
        self._seen, self._engine = fingerprint(values), None
        if any_sharded(tensors):
            self._coordinates = find_coordinates(self.network, tensors, self._options.rule, self._options.scale)
            self._plan = None
            return None
        skeleton = Skeleton(self.network, values, self._options.rule, balanced=self._options.scale == "balanced")
        self._coordinates = Coordinates.of(skeleton, values, self._options.scale)
        self._plan = skeleton.plan
        return skeleton

    def _settle(self) -> None:
        """Before the first step: the trees and the scale of the weights as they are now.

        Since construction a checkpoint, or another process (DDP), may have replaced them.
        """
        if self._calls > 0 or self._options.scale == "ones":  # which has made weights of its own
            return
        changed = self._seen != fingerprint(self._values())
        tensors = self._tensors()
        if any_sharded(tensors):
            changed = Shards(tensors).any(changed)
        if changed:
            self._find_coordinates()

    @property
    def stats(self) -> Stats:
        """Counts of steps, of clamped ratios and of steps left out; reading it waits for the device."""
        return Stats(*(int(getattr(self._stats, f.name)) for f in fields(Stats)))

    @property
    def engine(self) -> EngineName:
        """What takes the steps on the parameters as they are now: "core", "array", "triton" or "sharded"."""
        return self._current_engine().name

    def __repr__(self) -> str:
        engine = self._current_engine()
        why = f" ({engine.why})" if engine.why else ""
        text = super().__repr__().replace("\n    gsgd: None", "")
        return text.replace("(", f"(\nengine: {engine.name}{why}", 1)

    # parameters by name

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters. Those that the network did not describe from the start take plain steps.

        Parameters
        ----------
        param_group : dict
            "params" (of named parameters), and the group's own hyperparameters.

        Raises
        ------
        TypeError, ValueError
            As at construction; the group is not added.
        """
        super().add_param_group(param_group)
        self._engine = None
        group = self.param_groups[-1]
        try:
            if "param_names" not in group:
                raise ValueError(EXPECTED)
            self._method(group).known()
            names = Counter(n for g in self.param_groups for n in g["param_names"])
            params = Counter(group["params"])
            for name, p in zip(group["param_names"], group["params"], strict=True):
                refuse_unsupported(name, p)
                if names[name] > 1 or params[p] > 1:
                    raise ValueError(f"parameter {name!r} is given twice")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _tensors(self) -> dict[str, Tensor]:
        """All parameters by name: those of the network in its order, then the others.

        Without integers and booleans: these have no gradients, and stay.
        """
        named = ((n, p) for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True))
        tensors = {n: p for n, p in named if p.is_floating_point() or p.is_complex()}
        known = self.network.shapes if hasattr(self, "network") else {}
        for name in known:
            if name not in tensors:
                raise ValueError(f"parameter {name!r} was removed from its group: make a new optimizer")
        return {n: tensors[n] for n in (*known, *(n for n in tensors if n not in known))}

    def _make_engine(self, coordinates: Coordinates, plan: Any = None) -> Engine:
        """An engine for the parameters as they are now; `plan`, if given, has their trees."""
        return choose(self._engine_option, self.network, coordinates, self._tensors(), plan)

    def _current_engine(self) -> Engine:
        engine = self._engine
        count = sum(len(g["params"]) for g in self.param_groups)
        if engine is None or count != self._count_of_params or not engine.is_current():
            plan, self._plan = self._plan, None
            engine = self._engine = self._make_engine(self._coordinates, plan)
            group_of = {p: i for i, g in enumerate(self.param_groups) for p in g["params"]}
            self._group_of, self._count_of_params = [group_of[p] for p in engine.params], count
            for p in engine.params:
                state = self.state.get(p, {})
                state.update({n: state[n].to(p) for n in self.moments if state.get(n) is not None})
        return engine

    # steps

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Closure) -> Any: ...
    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable imports the compiler at once
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Update the parameters; `closure`, if given, is called first and its loss returned.

        Raises
        ------
        FloatingPointError
            By the C core: a gradient or a path ratio is not finite. Other engines leave such a step out, and count it
            in ``stats.skipped``.
        TypeError, ValueError
            A gradient is sparse, or of another dtype or shape than its parameter; a hyperparameter is out of its range.
            The weights and the state stay as they were after every error.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._owner is not None and self._owner.has_changed():
            self._leave_out(self._owner.lost(self._tensors()))
        if all(p.grad is None for g in self.param_groups for p in g["params"]):
            return loss
        settles = not self._is_rehearsal()
        if settles:
            self._settle()
        engine = self._current_engine()
        gradients = engine.as_reals([p.grad for p in engine.params])
        gradients = self._downhill(gradients)
        methods, which = self._methods(engine, gradients)
        first, second = self.moments
        moments = (
            engine.as_reals(self._moments(engine.params, first, [o.has_m for o in methods], which)),
            engine.as_reals(self._moments(engine.params, second, [o.has_v for o in methods], which)),
        )
        if not settles:
            self._count(engine, [None] * len(gradients))
            return loss
        step = Step(
            gradients,
            moments,
            methods,
            which,
            max_ratio=limit(self._options.max_ratio),
            clip_norm=limit(self._options.clip_norm),
            threads=usable_threads(self._options.threads or torch.get_num_threads()),
            stats=self._stats,
        )
        if step.is_partial:
            self._warn_of_frozen(engine)
        engine.step(step)
        self._calls += 1
        self._count(engine, gradients)
        if is_due(self._calls):
            self._join()
        return loss

    def _join(self) -> None:
        """Give coordinates to units that waited for weights which were 0 at the start."""
        if (self._coordinates.in_edges[:, 0] >= 0).all():
            return
        tensors = self._tensors()
        on_cuda = any(p.is_cuda for p in tensors.values())
        if on_cuda and torch.cuda.is_current_stream_capturing():  # a replay would not come here
            return
        shards = Shards(tensors) if any_sharded(tensors) else None
        if shards is None:
            joined = join(self.network, self._values(), self._coordinates, self._options.rule)
        else:
            joined = join_shards(self.network, tensors, self._coordinates)
        if joined is None:
            return
        self._coordinates, units = joined
        self._engine = None
        number = {name: i for i, name in enumerate(tensors)}
        for name, index in self._coordinates.places(self.network, units):  # their moments were of other coordinates
            at = index if shards is None else shards.place(number[name], index)
            state = self.state.get(tensors[name], {})
            for moment in (state[key] for key in self.moments if at is not None and state.get(key) is not None):
                local(moment)[at] = 0

    def _leave_out(self, lost: list[str]) -> None:
        """Parameters that are no longer the model's take no part any more, nor their units."""
        if not lost:
            return
        warn(
            f"{', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}: no longer a parameter of the model, since a "
            "module or a parameter was replaced. What replaced it is not trained: make a new optimizer",
        )
        self.network = self.network.without(
            [name for name in lost if name in self.network.shapes], "no longer the model's"
        )
        self.network.add_plain(lost)
        self._find_coordinates()

    def _is_rehearsal(self) -> bool:
        """Whether a step makes the state and does nothing else: before there is one, torch's checkpoints take such.

        All learning rates and all gradients are zero.
        """
        if self.state or any(isinstance(g["lr"], Tensor) and g["lr"].device.type != "cpu" for g in self.param_groups):
            return False
        if any(number("lr", g["lr"]) != 0 for g in self.param_groups):
            return False
        given = (p.grad for g in self.param_groups for p in g["params"] if p.grad is not None)
        return not any(local(g).any() for g in given)

    def _warn_of_frozen(self, engine: Engine) -> None:
        """Once per engine: a parameter that was frozen after construction follows the units that it reads."""
        for name, p, follows in zip(engine.names, engine.params, engine.following, strict=True):
            if follows and not p.requires_grad and not engine.has_warned:
                engine.has_warned = True
                warn(
                    f"parameter {name!r} was frozen after the optimizer was made: it keeps its paths' values, not its "
                    "weights. Make a new optimizer to keep it as it is.",
                )

    def _method(self, group: Mapping[str, Any]) -> Method:
        """The method with a group's hyperparameters; ValueError where they are not right."""
        return self.method(**{name: group[name] for name in self.method.names()})

    def _downhill(self, gradients: Tensors) -> Tensors:
        """Gradients with the other sign where a group maximizes: one operation for all of a kind."""
        maximize = [g["maximize"] for g in self.param_groups]
        if not any(maximize):
            return gradients
        by_kind: dict[tuple[type, torch.dtype], dict[int, Tensor]] = {}
        for i, (g, group) in enumerate(zip(gradients, self._group_of, strict=True)):
            if g is not None and maximize[group]:
                by_kind.setdefault((type(g), g.dtype), {})[i] = g
        found = list(gradients)
        for uphill in by_kind.values():
            for i, g in zip(uphill, torch._foreach_neg([*uphill.values()]), strict=True):
                found[i] = g
        return found

    def _methods(self, engine: Engine, gradients: Tensors) -> tuple[list[Method], list[int]]:
        """Hyperparameters, and which of them are those of each parameter."""
        return [self._method(g) for g in self.param_groups], self._group_of

    def _count(self, engine: Engine, gradients: Tensors) -> None:
        """Note that a step was taken."""

    def _moments(self, params: list[Tensor], name: str, has: list[bool], which: list[int]) -> Tensors:
        """A moment of every parameter, zero where it is new; None where its hyperparameters want none."""
        if not any(has):
            return [None] * len(params)
        state = self.state
        states = map(state.get, params, repeat({}))
        moments: Tensors = [s.get(name) if has[i] else None for s, i in zip(states, which, strict=True)]
        if any(x is None for x in moments):
            for k, (p, i) in enumerate(zip(params, which, strict=True)):
                if has[i] and moments[k] is None:
                    moments[k] = state[p][name] = torch.zeros_like(p)
        return moments

    # state

    def state_dict(self) -> dict[str, Any]:
        """That of any optimizer, with the skeleton, the reference scale and counts as "gsgd" in the first param group.

        With H = ``network.num_units``: "in_edges" and "out_edges" of shape (H, 2); "in_weights", "out_weights" and "c"
        of shape (H,), see `gsgd.coordinates.Coordinates`. Moments have the shapes of their parameters.
        """
        coordinates = {name: torch.from_numpy(x) for name, x in self._coordinates.save().items()}
        # in a group, where hooks see it and distributed checkpoints keep it
        self.param_groups[0]["gsgd"] = {**coordinates, **asdict(self.stats)}
        try:
            return super().state_dict()
        finally:
            self._keep_place()

    def _keep_place(self) -> None:
        """Of what `state_dict` puts into the first group: torch restores flattened states by the keys of groups."""
        self.param_groups[0]["gsgd"] = None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. With a state without "gsgd", another optimizer's, the skeleton stays as it is.

        Parameters are matched by name, if the state has their names. If it was saved before the first step, the scale
        is that of the weights at the first step, as in a new optimizer.

        Warns
        -----
        UserWarning
            The state has moments but no "gsgd": these are moments of other coordinates.

        Raises
        ------
        ValueError
            The state is of another method or of other parameters, or its "gsgd" is incomplete or of another network.
            Nothing has changed.
        """
        names = [g["param_names"] for g in self.param_groups]
        found: tuple[Coordinates, Stats | None]

        def take(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            nonlocal found
            found = self._checked(state)
            return matched(state, names)

        def adopt(_: torch.optim.Optimizer) -> None:
            for group, own in zip(self.param_groups, names, strict=True):
                group["param_names"] = own  # those in the state may be of a wrapped model
            (self._coordinates, stats), self._engine = found, None
            self._plan, self._seen = None, ()
            if stats is not None:
                self._stats, self._calls = stats, stats.steps + stats.skipped

        # after what the user's hooks make of the state, and before they look at what was loaded
        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(adopt, prepend=True)
        with before, after:
            super().load_state_dict(dict(state_dict))

    def _checked(self, state_dict: Mapping[str, Any]) -> tuple[Coordinates, Stats | None]:
        """The coordinates to continue with, and the counts that the state has; an error where it does not fit."""
        held = held_moments(state_dict)
        if held and not {self.moments[1]} - {""} <= held <= {*self.moments}:
            raise ValueError(f"state_dict: of another method than {type(self).__name__}: it has {sorted(held)}")
        coordinates, stats = saved_skeleton(state_dict, self.network.num_units) or (self._coordinates, None)
        if stats is None and held and self.network.num_units:
            warn(
                'state_dict has moments but no "gsgd": it is of another optimizer, or was saved without the skeleton, '
                "and its moments are of other coordinates",
            )
        self._make_engine(coordinates)  # refuses what are no trees
        return coordinates, stats

    def __getstate__(self) -> dict[str, Any]:
        kept = ("network", "_coordinates", "_options", "_engine_option", "_calls")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}, "_stats": self.stats}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in (*self.method.names(), "maximize"):  # a state of another optimizer may lack some
                group.setdefault(name, self.defaults[name])
        self._keep_place()
        self._engine, self._plan, self._seen, self._owner = None, None, (), None
