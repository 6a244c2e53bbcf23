"""GSGD, GAdam and GRMSprop as torch.optim.Optimizers."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor, nn

from gsgd.methods import SGD, Adam, Method, RMSprop
from gsgd.torch.engines import CountingEngine, Engine, Tensors
from gsgd.torch.parameters import Params
from gsgd.torch.path_optimizer import Arguments, PathOptimizer


class GSGD(PathOptimizer):
    """G-SGD (Meng et al., ICLR 2019) as a drop-in for `torch.optim.SGD`.

    Parameters
    ----------
    params : nn.Module, or named parameters, or param groups of named parameters
        A module is traced and all its parameters are trained. Otherwise ``model.named_parameters()``, or dicts with
        "params" (of named parameters) and their own lr, momentum, nesterov, weight_decay, maximize.
    lr, momentum, nesterov, weight_decay, maximize
        As in `torch.optim.SGD`, on the coordinates of METHOD.md, section 4. `lr` may be a tensor of no dimensions.
    network : gsgd.Network, optional
        The network of named parameters. Parameters that it does not mention take plain SGD steps. A parameter that
        it mentions and that is not given, or does not require a gradient now, pins the units that it meets; one that
        a module lacks is an error. ``print(opt.network)`` lists what takes plain steps.
    example_inputs, leave_out, residual, batch_norm
        For tracing a module, see `trace`.
    scale, rule, max_ratio, clip_norm, threads
        See `gsgd.GSGD`. `threads` is torch.get_num_threads() by default.
    engine : {"auto", "core", "array", "triton"}
        What takes the steps: the C core (float32 and float64 on the CPU), array operations (any device), or Triton
        kernels (CUDA). One that can't take the parameters is an error; "auto" is the fastest that can.

    Notes
    -----
    Float32 and float64 tensors on the CPU are updated by the C core in place, without copies, on the strides that
    they have, others on CUDA by Triton's kernels; so is what a process holds of sharded parameters. All else takes the
    same step in array operations on its device. `step` does not wait for a device.

    A complex parameter that is trained takes the plain step, as with torch's optimizer, and pins the units that it
    meets. Parameters of integers and booleans stay as they are.

    The skeleton and the reference scale are those of the weights at the first step. If weights are replaced after
    that, other than by a rescaling, make a new optimizer.

    A parameter whose gradient is None takes no step of its own: its paths keep their values, for which its weights
    may have to follow a unit that is rescaled.

    Raises
    ------
    TypeError
        A parameter is sparse or without values, `network` is not a Network, or a hyperparameter is not a number.
    ValueError
        Parameters are unnamed, given twice, of other shapes than in `network`, on several devices, or overlap in
        memory; `engine` can't take them; a hyperparameter or an option is out of its range; or options of tracing are
        given with ``network=``. Nothing has changed.
    """

    method = SGD
    moments = ("momentum_buffer", "")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = SGD.lr,
        momentum: float = SGD.momentum,
        nesterov: bool = SGD.nesterov,
        weight_decay: float = SGD.weight_decay,
        *,
        maximize: bool = False,
        **options: Unpack[Arguments],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    @classmethod
    def paper(cls, model: nn.Module, lr: float | Tensor = SGD.lr, **options: Any) -> GSGD:
        """The paper's own method: residual "pin", batch_norm "paper", rule "modulo", scale "ones", no limit on ratios.

        For the method of its authors' code give ``batch_norm="released"``, with stem, shortcuts and classifier in
        `leave_out`. `options` are those of the class.

        It overwrites the skeleton weights of `model` by 1 (the paper's section 11.2). The first two settings are for
        tracing: a ``network=`` of your own is taken as it was described.

        Parameters
        ----------
        model : nn.Module
        lr : float
            The learning rate.

        Raises
        ------
        ValueError
            `residual` or `batch_norm` is given with ``network=``, which leaves nothing to trace; or as at construction.
        """
        tracing = {} if options.get("network") is not None else {"residual": "pin", "batch_norm": "paper"}
        return cls(model, lr, **({**tracing, "rule": "modulo", "scale": "ones"} | options))


class GAdam(PathOptimizer):
    """Adam on the values of basis paths, as a drop-in for `torch.optim.AdamW` (and `Adam`).

    Parameters
    ----------
    params, network, example_inputs, leave_out, residual, batch_norm
        See `GSGD`.
    scale, rule, max_ratio, clip_norm, threads, engine, maximize
        See `GSGD`.
    lr, betas, eps, weight_decay
        As in `torch.optim.AdamW`, on the coordinates of METHOD.md, section 4. The weight decay is 0 by default, where
        AdamW's is 0.01.
    decoupled : bool
        Whether weight decay is AdamW's (the default), or added to the gradient as in Adam.

    Notes
    -----
    The bias corrections are of the steps that a parameter has taken.

    Raises
    ------
    TypeError, ValueError
        As in `GSGD`.
    """

    method = Adam
    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = Adam.lr,
        betas: tuple[float, float] = Adam.betas,
        eps: float = Adam.eps,
        weight_decay: float = Adam.weight_decay,
        decoupled: bool = Adam.decoupled,
        *,
        maximize: bool = False,
        **options: Unpack[Arguments],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def _methods(self, engine: Engine, gradients: Tensors) -> tuple[list[Method], list[int]]:
        """The bias corrections are of the number of steps that a parameter itself has taken."""
        if engine.steps_taken is None:
            place: dict[tuple[int, int], int] = {}
            which = []
            for p, g, group in zip(engine.params, gradients, self._group_of, strict=True):
                step = int(self.state[p].get("step", 0)) + (g is not None)
                which.append(place.setdefault((group, max(1, step)), len(place)))
            own = [self._method(g) for g in self.param_groups]
            return [own[group].at(step) for group, step in place], which
        states = [self.state[p] for p in engine.params]
        if any(s.get("step") is not taken for s, taken in zip(states, engine.steps_taken, strict=True)):
            engine.histories = [int(s.get("step", 0)) for s in states]
            for s, taken, steps in zip(states, engine.steps_taken, engine.histories, strict=True):
                s["step"] = taken.fill_(steps)
        if not isinstance(engine, CountingEngine):  # its kernels make the corrections
            return super()._methods(engine, gradients)
        methods: dict[tuple[int, int], Method] = {}
        keys = list(zip(self._group_of, engine.histories, strict=True))
        for key, taken in zip(keys, engine.steps_taken, strict=True):
            if key not in methods:
                methods[key] = self._method(self.param_groups[key[0]]).at(taken + engine.one)
        number = {key: i for i, key in enumerate(methods)}
        return list(methods.values()), [number[key] for key in keys]

    def _count(self, engine: Engine, gradients: Tensors) -> None:
        if engine.steps_taken is not None:
            return
        for p, g in zip(engine.params, gradients, strict=True):
            self.state[p]["step"] = int(self.state[p].get("step", 0)) + (g is not None)


class GRMSprop(PathOptimizer):
    """RMSProp on the values of basis paths, as a drop-in for `torch.optim.RMSprop`.

    Parameters
    ----------
    params, network, example_inputs, leave_out, residual, batch_norm
        See `GSGD`.
    scale, rule, max_ratio, clip_norm, threads, engine, maximize
        See `GSGD`.
    lr, alpha, eps, weight_decay, momentum
        As in `torch.optim.RMSprop`, on the coordinates of METHOD.md, section 4.

    Raises
    ------
    TypeError, ValueError
        As in `GSGD`.
    """

    method = RMSprop
    moments = ("momentum_buffer", "square_avg")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = RMSprop.lr,
        alpha: float = RMSprop.alpha,
        eps: float = RMSprop.eps,
        weight_decay: float = RMSprop.weight_decay,
        momentum: float = RMSprop.momentum,
        *,
        maximize: bool = False,
        **options: Unpack[Arguments],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)
