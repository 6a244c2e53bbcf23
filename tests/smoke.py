"""A first look at an installed gsgd, with NumPy alone: `python -I tests/smoke.py`. Run by `make wheel`."""

import numpy as np

import gsgd

rng = np.random.default_rng(0)
x, y = rng.normal(size=(256, 8)), rng.normal(size=(256, 1))
start = {"w1": rng.normal(size=(32, 8)) / 2, "w2": rng.normal(size=(1, 32)) / 4}
net = gsgd.Network.sequential(start)


def losses(scale: float) -> list[float]:
    """Of a training from the start with all units rescaled."""
    params = {name: w.copy() for name, w in start.items()}
    gsgd.rescale(params, net, np.full(net.num_units, scale))
    optimizer = gsgd.GSGD(params, net, lr=0.1, momentum=0.9)
    found = []
    for _ in range(100):
        h = np.maximum(x @ params["w1"].T, 0)
        error = h @ params["w2"].T - y
        found.append(float((error**2).mean()))
        error /= len(x)
        optimizer.step({"w1": (error @ params["w2"] * (h > 0)).T @ x, "w2": error.T @ h})
    return found


own, rescaled = losses(1.0), losses(10.0)
assert own[-1] < own[0]
assert np.allclose(own, rescaled, rtol=1e-6)
print(f"gsgd {gsgd.__version__}, NumPy {np.__version__}: loss {own[0]:.3f}, then {own[-1]:.3f}, from both starts")
