"""PathSGD as a torch.optim.Optimizer."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from gsgd.methods import non_negative
from gsgd.network import Network, Residual
from gsgd.paths import path_kappa, require_symmetry
from gsgd.torch.parameters import EXPECTED, Closure, Params, named_network


class PathSGD(torch.optim.Optimizer):
    """Path-SGD (Neyshabur et al., 2015): ``w <- w - lr g / kappa`` (METHOD.md, section 8); see `gsgd.PathSGD`.

    Parameters
    ----------
    params, network, example_inputs, residual
        See `GSGD`.
    lr : float
        Learning rate, >= 0.

    Notes
    -----
    A baseline, not made for speed: every step computes kappa on the CPU, in float64.

    Raises
    ------
    TypeError, ValueError
        Parameters are unnamed, `network` is not theirs or an approximation of batch normalization, or `lr` is not a
        finite number >= 0.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.1,
        *,
        network: Network | None = None,
        example_inputs: Any = None,
        residual: Residual | None = None,
    ) -> None:
        named, self.network = named_network(params, network, example_inputs, residual=residual)
        require_symmetry(self.network)
        super().__init__(named, {"lr": lr})
        for group in self.param_groups:
            non_negative("lr", group["lr"])
            if "param_names" not in group:
                raise ValueError(EXPECTED)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Closure) -> Any: ...
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Update the parameters; `closure`, if given, is called first and its loss returned.

        Raises
        ------
        FloatingPointError
            A gradient is not finite. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        named = [(n, p, g["lr"]) for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)]
        for name, p, _ in named:
            if p.grad is not None and not p.grad.isfinite().all():
                raise FloatingPointError(f"gradient of {name!r} is not finite: the weights stay as they were")
        kappa = path_kappa({n: p.detach().cpu().double().numpy() for n, p, _ in named}, self.network)
        for name, p, lr in named:
            if p.grad is None:
                continue
            step = p.grad
            if name in kappa:
                k = torch.from_numpy(kappa[name]).to(p.dtype).to(p.device)
                step = torch.where(k > 0, p.grad / k, 0)
            p.sub_(lr * step)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "network": self.network}
