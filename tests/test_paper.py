"""The paper's own method where its path ratios become negative: Plain-34 at the paper's learning rate."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import gsgd
import gsgd.torch

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
LR, BATCH, STEPS = 1.0, 128, 14


@pytest.fixture
def plain_34(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """8 feature maps, float64, from PyTorch's own start."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from architectures import ConvNet

    torch.manual_seed(0)
    return ConvNet((3, 4, 6, 3), 8, "none", 10).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The digits, 16 x 16, in three channels."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))[: STEPS * BATCH]
    x = torch.from_numpy(digits.images[order] / 16).repeat_interleave(2, 1).repeat_interleave(2, 2)
    x = x[:, None].expand(-1, 3, -1, -1)
    return list(zip(x.split(BATCH), torch.from_numpy(digits.target[order]).split(BATCH), strict=True))


def test_plain_34_at_the_papers_rate(plain_34: torch.nn.Module) -> None:
    """It trains, through negative ratios; and takes the steps of the inverse chain rule and weight allocation alone."""
    opt = gsgd.torch.GSGD.paper(plain_34, LR)
    named = dict(plain_34.named_parameters())
    params = {name: p.detach().numpy().copy() for name, p in named.items()}
    skeleton = gsgd.Skeleton(opt.network, params)
    losses, negative = [], 0
    for x, y in batches():
        opt.zero_grad()
        loss = F.cross_entropy(plain_34(x), y)
        loss.backward()
        losses.append(loss.item())
        grads = {name: p.grad.numpy() for name, p in named.items() if p.grad is not None}
        described = {name: params[name] for name in opt.network.shapes}
        values = skeleton.path_values(params)
        slopes = skeleton.path_gradients(params, grads)
        ratios = {
            name: np.where(np.isnan(v), 1, 1 - LR * slopes[name] / v) for name, v in values.items() if name in described
        }
        negative += sum(ratios[name][at] < 0 for name, at in set(skeleton.in_edges) - set(skeleton.out_edges))
        plain = {name: np.ones_like(w) for name, w in params.items() if name not in described}
        allocated = skeleton.allocate(params, {**plain, **ratios})
        for name in plain:
            allocated[name] = params[name] - LR * grads[name]
        opt.step()
        params = allocated
        for name, p in named.items():
            largest = np.abs(params[name]).max()
            np.testing.assert_allclose(p.detach().numpy(), params[name], rtol=1e-7, atol=1e-7 * largest)
            params[name] = p.detach().numpy().copy()
    assert negative > 0
    assert opt.stats.clamped == 0
    assert max(losses) < 4, losses
