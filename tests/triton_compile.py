"""Compiles the Triton kernels as they are launched, for devices that need not be here: see test_triton.py.

Run without TRITON_INTERPRET; it prints a line per kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gsgd.layout import network_layout
from gsgd.optimizer import Stats
from gsgd.torch import GSGD, GAdam, GRMSprop
from gsgd.torch.engines import triton as engine
from gsgd.torch.engines.base import Step
from gsgd.torch.engines.triton_part import TritonPart

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
# compute capability, and a step: every kernel for each, every method, and float32 and float64 arithmetic
CASES: list[tuple[int, torch.dtype, Any, dict[str, Any]]] = [
    (80, torch.float32, GSGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (90, torch.bfloat16, GAdam, {"weight_decay": 0.01, "clip_norm": 1.0}),
    (80, torch.float64, GRMSprop, {"momentum": 0.9}),
]


def compile_for(target: GPUTarget, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """A kernel, with the types of these arguments."""
    options = {"num_warps": constants.pop("num_warps"), "enable_fp_fusion": constants.pop("enable_fp_fusion")}
    runtime = dict(zip(kernel.arg_names, arguments, strict=False))
    signature = {n: TYPES[x.dtype] if isinstance(x, torch.Tensor) else "i32" for n, x in runtime.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(runtime.values()) if hasattr(x, "data_ptr")}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): x for n, x in constants.items()}, attributes)
    return triton.compile(source, target=target, options=options)


def launch_parts(opt: Any) -> None:
    """The stages of a step on parts of arrays."""
    tensors = opt._tensors()
    layout = network_layout(opt.network, {n: tuple(p.shape) for n, p in tensors.items()}, *opt._coordinates.edges)
    own = TritonPart(opt.network, opt._coordinates, tensors, layout, layout, [True] * len(tensors))
    moments = [[opt.state[p].get(name) for p in tensors.values()] for name in opt.moments]
    gradients, groups = [p.grad for p in tensors.values()], [0] * len(tensors)
    methods = [opt._method(opt.param_groups[0])]
    begun = own.begin(Step(gradients, moments, methods, groups, 2.0, math.inf, 1, Stats()))
    own.gather(begun)
    own.solve(begun)


def main() -> None:
    engine.runs_on = lambda device: True
    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        """In the place of a kernel: notes its launches."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *arguments, **constants: launched.append((self.kernel, arguments, constants))

    for name in ("gather", "collect", "solve", "apply"):
        setattr(engine.kernels, name, Recorder(getattr(engine.kernels, name)))
    for capability, dtype, method, options in CASES:
        del launched[:]
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
        opt = method(model, engine="triton", **options)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        if dtype != torch.float64:
            launch_parts(opt)
        for kernel, arguments, constants in launched:
            built = compile_for(GPUTarget("cuda", capability, 32), kernel, arguments, constants)
            print(f"sm_{capability}", kernel.__name__, dtype, len(built.asm["cubin"]), flush=True)


if __name__ == "__main__":
    main()
