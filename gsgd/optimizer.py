"""Gradient descent on the values of basis paths: GSGD, GAdam, GRMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from gsgd.arrays import as_array, check_gradients, check_names, check_parameters
from gsgd.coordinates import Coordinates, set_to_one
from gsgd.methods import SGD, Adam, Method, RMSprop
from gsgd.network import Network
from gsgd.options import OptionArguments, Options, limit
from gsgd.skeleton import Backend, Skeleton, batch_norm_gradients, explain
from gsgd.threads import default_threads, usable_threads
from gsgd.waiting import is_due, join


@dataclass
class Stats:
    """Counts since construction.

    Attributes
    ----------
    steps : int
        Steps that were taken.
    clamped : int
        Path ratios that `max_ratio` limited.
    skipped : int
        Steps that were left out because something was not finite, where that is not an error.
    """

    steps: int = 0
    clamped: int = 0
    skipped: int = 0


class _PathOptimizer:
    """What the methods have in common: they differ in how the coordinates move, which `method` tells."""

    def __init__(
        self,
        params: Mapping[str, Any],
        net: Network,
        method: Method,
        *,
        backend: Backend = "c",
        **options: Unpack[OptionArguments],
    ) -> None:
        if not isinstance(net, Network):
            raise TypeError(f"net: expected a gsgd.Network, got {type(net).__name__}")
        self._method = method.known()
        chosen = Options(**options)
        self.threads = chosen.threads or default_threads()
        self._set_options(chosen)
        self.stats = Stats()
        self._net = net
        self._approximates = any(b.batch_norm for b in net.blocks)
        self._core_checks = backend == "c" and not self._approximates
        self._arrays = check_parameters(params, net, others=True)
        self._weights = list(self._arrays.values())
        if not self._weights:
            raise ValueError("params: expected at least one parameter")
        self.skeleton = Skeleton(net, self._arrays, chosen.rule, backend=backend, balanced=self.scale == "balanced")
        self.skeleton.warn_of_pinned(waiting=True)
        if self.scale == "ones":
            set_to_one(self.skeleton, self._arrays)
        self._set_coordinates(Coordinates.of(self.skeleton, self._arrays, self.scale))
        self._m, self._v = self._moments(self._method, {})

    def _set_options(self, options: Options) -> None:
        self.scale, self.max_ratio, self.clip_norm = options.scale, options.max_ratio, options.clip_norm

    def _set_coordinates(self, found: Coordinates) -> None:
        self._coordinates = found
        self.skeleton.plan.set_reference(*found.scale)

    def _set(self, name: str, value: Any) -> None:
        self._method = replace(self._method, **{name: value}).known()

    def _moments(self, method: Method, given: Mapping[str, Any]) -> list[list[NDArray[Any] | None]]:
        """First and second moments, as given by name or zero; None where the method has none."""
        found: list[list[NDArray[Any] | None]] = []
        for key, has in (("m", method.has_m), ("v", method.has_v)):
            loaded = given.get(key)
            if loaded is not None and loaded.keys() != self._arrays.keys():
                raise ValueError(f"state_dict: {key!r} is of other parameters")
            moments: list[NDArray[Any] | None] = []
            for name, w in self._arrays.items():
                moment = np.zeros_like(w) if has else None
                if moment is not None and loaded is not None:
                    if np.shape(loaded[name]) != w.shape:
                        raise ValueError(f"state_dict: {key!r} of {name!r}: expected shape {w.shape}")
                    moment[...] = loaded[name]
                moments.append(moment)
            found.append(moments)
        return found

    @property
    def lr(self) -> float:
        """The learning rate of the next step; assign to it for a schedule.

        Raises
        ------
        ValueError, TypeError
            What is assigned is not a finite number >= 0.
        """
        return float(self._method.lr)

    @lr.setter
    def lr(self, value: float) -> None:
        self._set("lr", value)

    @property
    def weight_decay(self) -> float:
        """The coefficient of basis-path regularization (the paper's section 11.5); it can be assigned.

        Raises
        ------
        ValueError, TypeError
            What is assigned is not a finite number >= 0.
        """
        return float(self._method.weight_decay)

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self._set("weight_decay", value)

    def step(self, grads: Mapping[str, Any]) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads : mapping of str to array
            The gradient of every parameter, of its shape and dtype: any framework's CPU arrays, any strides; only read.

        Raises
        ------
        ValueError
            A gradient is missing, of another shape than its parameter, or lies over a parameter in memory.
        TypeError
            A gradient is of another dtype than its parameter, or not an array on the CPU.
        FloatingPointError
            A gradient or a path ratio is not finite; a learning rate so large that ordinary weights overflow is
            noticed at the step after. The weights and the state stay as they were after every error.
        """
        if not isinstance(grads, dict) or grads.keys() != self._arrays.keys():
            check_names(grads, self._arrays)
        gradients: list[NDArray[Any] | None] = [grads[name] for name in self._arrays]
        if not self._core_checks:
            gradients = list(check_gradients(grads, self._arrays).values())
        elif set(map(type, gradients)) != {np.ndarray}:  # the C core checks shapes and dtypes itself
            gradients = [as_array(f"gradient of {name!r}", grads[name]) for name in self._arrays]
        sums: list[NDArray[Any] | None] | None = None
        norm = None
        if self._approximates:
            in_edges = self.skeleton.edge_arrays[0]
            gradients, sums, norm = batch_norm_gradients(self._net, self._arrays, gradients, in_edges)
        row = self._method.at(self.stats.steps + 1).row
        try:
            clamped = self.skeleton.plan.step(
                self._weights,
                gradients,
                sums,
                norm,
                self._m,
                self._v,
                np.array([row] * len(self._weights), dtype=np.float64),
                limit(self.max_ratio),
                limit(self.clip_norm),
                usable_threads(self.threads),
            )
        except FloatingPointError as error:
            reason = explain(self._net, self.skeleton.edge_arrays, self._arrays, gradients, error.args[0])
            raise FloatingPointError(reason) from None
        self.stats.steps += 1
        self.stats.clamped += clamped
        if is_due(self.stats.steps):
            self._join()

    def _join(self) -> None:
        """Give coordinates to units that waited for weights which were 0 at the start."""
        joined = join(self._net, self._arrays, self._coordinates, self.skeleton.rule)
        if joined is None:
            return
        coordinates, units = joined
        self.skeleton.replace_edges(coordinates.edges, self._arrays)
        self._set_coordinates(coordinates)
        moments = dict(zip(self._arrays, zip(self._m, self._v, strict=True), strict=True))
        for name, index in coordinates.places(self._net, units):  # their moments were of other coordinates
            for moment in moments[name]:
                if moment is not None:
                    moment[index] = 0

    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters, skeleton, reference scale and moments: copies, of plain Python and NumPy types.

        With H = ``net.num_units``: "in_edges" and "out_edges" of shape (H, 2); "in_weights", "out_weights" and "c" of
        shape (H,), see `gsgd.coordinates.Coordinates`; "m" and "v", by name, of the parameters' shapes, or None.
        """
        moments = {
            key: None if found[0] is None else {n: np.array(x) for n, x in zip(self._arrays, found, strict=True)}
            for key, found in (("m", self._m), ("v", self._v))
        }
        return {
            "hyperparameters": self._method.hyperparameters,
            "max_ratio": self.max_ratio,
            "clip_norm": self.clip_norm,
            "scale": self.scale,
            "rule": self.skeleton.rule,
            **self._coordinates.save(),
            **moments,
            "steps": self.stats.steps,
            "clamped": self.stats.clamped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`: with the weights of that moment, every further step has the same bits.

        Raises
        ------
        ValueError, TypeError
            `state` is of another method, network or set of parameters, or incomplete. Nothing has changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state).__name__}")
        state = {"clip_norm": None, **state}  # version 0.1 had none
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state_dict: {sorted(missing)[0]!r} is missing")
        hyperparameters = dict(state["hyperparameters"])
        if hyperparameters.keys() != self._method.hyperparameters.keys():
            raise ValueError(f"state_dict: of another method, with {sorted(hyperparameters)}")
        method = type(self._method)(**hyperparameters).known()
        moments = self._moments(method, state)
        coordinates = Coordinates.load(state, self._net.num_units)
        options = Options(**{name: state[name] for name in ("scale", "rule", "max_ratio", "clip_norm")})
        stats = Stats(int(state["steps"]), int(state["clamped"]))
        self.skeleton.replace_edges(coordinates.edges, self._arrays)
        self.skeleton.rule = options.rule
        self._set_coordinates(coordinates)
        self._set_options(options)
        self._method, self.stats = method, stats
        self._m, self._v = moments


class GSGD(_PathOptimizer):
    """G-SGD: stochastic gradient descent in the positively scale-invariant space (Meng et al., ICLR 2019).

    Parameters
    ----------
    params : mapping of str to array
        Writable float32 or float64 arrays of the shapes in ``net.shapes``, or objects that export a writable CPU buffer
        or DLPack. `step` updates them in place. A parameter that `net` does not mention, of any shape, takes plain SGD
        steps with the same hyperparameters.
    net : Network
        Which weight meets which unit.
    lr : float
        Learning rate, >= 0. Assign to it for a schedule.
    momentum : float
        On the coordinates x of METHOD.md, section 4; >= 0.
    nesterov : bool
        Whether the momentum is Nesterov's.
    weight_decay : float
        Acts on ordinary paths only: basis-path regularization (Zheng et al., 2018; the paper's section 11.5).
    scale : {"balanced", "initial", "ones"}
        The scale on which path values are measured. "balanced": that of the rescaling with the least sum of squares, so
        that training does not depend on the scale of the start. "initial": that of the weights as they are. "ones": the
        paper's, which overwrites every skeleton weight by 1 (section 11.2). Only "ones" changes weights here.
    rule : {"modulo", "largest"}
        Which weights make the skeleton, see `Skeleton`. With ``scale="balanced"`` the largest are those of the
        balanced network.
    threads : int, optional
        The largest number of threads that a step may use; by default OMP_NUM_THREADS, or the number of processors.
        Results do not depend on it. Steps are timed, and run on one thread while several would take longer, as when
        other processes keep the cores busy. The child of a fork uses one.
    max_ratio : float or None or "auto"
        Limits the magnitude of path ratios R to ``[1 / max_ratio, max_ratio]``; the sign stays, and 0 counts as
        positive (METHOD.md, section 3). Limited ratios are counted in `stats`. None: no limit, as in the paper. "auto":
        None with ``scale="ones"``, otherwise 4.
    clip_norm : float, optional
        Limits the norm of dl/dx over all coordinates (of parameters that `net` does not mention: of their gradients) as
        `torch.nn.utils.clip_grad_norm_` limits that of gradients. Clipping gradients before the step would make the
        step depend on the weights' scale; this does not.
    backend : {"c", "reference"}
        The C core, or the readable specification.

    Raises
    ------
    TypeError
        A parameter is not a float32 or float64 array on the CPU, `net` is not a Network, or a hyperparameter is not a
        number.
    ValueError
        A parameter is missing, of another shape than in `net`, read-only, not finite, or shares memory with another;
        or a hyperparameter or an option is out of its range. Nothing has changed.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        net: Network,
        lr: float = SGD.lr,
        momentum: float = SGD.momentum,
        nesterov: bool = SGD.nesterov,
        weight_decay: float = SGD.weight_decay,
        *,
        backend: Backend = "c",
        **options: Unpack[OptionArguments],
    ) -> None:
        method = SGD(lr, momentum, nesterov, weight_decay)
        super().__init__(params, net, method, backend=backend, **options)

    @property
    def momentum(self) -> float:
        """The momentum; fixed at construction."""
        return float(self._method.hyperparameters["momentum"])

    @property
    def nesterov(self) -> bool:
        """Whether the momentum is Nesterov's; fixed at construction."""
        return bool(self._method.hyperparameters["nesterov"])


class GAdam(_PathOptimizer):
    """Adam on the values of basis paths: its moments are of dl/dx (METHOD.md, section 4), which no rescaling changes.

    Parameters
    ----------
    params, net, scale, rule, threads, max_ratio, clip_norm, backend
        See `GSGD`.
    lr : float
        Learning rate, >= 0.
    betas : (float, float)
        Decay rates of the first and the second moment, in [0, 1).
    eps : float
        Added to the root of the second moment.
    weight_decay : float
        On ordinary paths only, as in `GSGD`.
    decoupled : bool
        Whether weight decay is AdamW's (the default) or added to the gradient, as in Adam.

    Raises
    ------
    ValueError, TypeError
        As in `GSGD`.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        net: Network,
        lr: float = Adam.lr,
        betas: tuple[float, float] = Adam.betas,
        eps: float = Adam.eps,
        weight_decay: float = Adam.weight_decay,
        decoupled: bool = Adam.decoupled,
        *,
        backend: Backend = "c",
        **options: Unpack[OptionArguments],
    ) -> None:
        method = Adam(lr, betas, eps, weight_decay, decoupled)
        super().__init__(params, net, method, backend=backend, **options)


class GRMSprop(_PathOptimizer):
    """RMSProp on the values of basis paths: its moments are of dl/dx (METHOD.md, section 4), that no rescaling changes.

    Parameters
    ----------
    params, net, scale, rule, threads, max_ratio, clip_norm, backend
        See `GSGD`.
    lr : float
        Learning rate, >= 0.
    alpha : float
        Decay rate of the second moment, in [0, 1).
    eps : float
        Added to the root of the second moment.
    weight_decay : float
        On ordinary paths only, added to the gradient.
    momentum : float
        Of the steps, >= 0.

    Raises
    ------
    ValueError, TypeError
        As in `GSGD`.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        net: Network,
        lr: float = RMSprop.lr,
        alpha: float = RMSprop.alpha,
        eps: float = RMSprop.eps,
        weight_decay: float = RMSprop.weight_decay,
        momentum: float = RMSprop.momentum,
        *,
        backend: Backend = "c",
        **options: Unpack[OptionArguments],
    ) -> None:
        method = RMSprop(lr, alpha, eps, weight_decay, momentum)
        super().__init__(params, net, method, backend=backend, **options)
