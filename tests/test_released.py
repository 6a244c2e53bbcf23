"""The step of the paper's released code, its formulas written out (METHOD.md, section 5)."""

import torch
from torch import Tensor, nn

import gsgd.torch

WIDTH, CENTRE, LR = 3, (1, 1), 0.05


class Stage(nn.Module):
    """A stem, one stage of three convolutions beside a shortcut, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, WIDTH, 3, padding=1)
        self.shortcut = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
        self.stage = nn.Sequential(*layers[:-1])
        self.fc = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        return self.fc(torch.relu(self.stage(h) + self.shortcut(h)).mean((2, 3)))


def own_products(w: Tensor, g: Tensor) -> Tensor:
    """The sum of w g over all that reads channel i but the free weight, (channels,)."""
    products = w * g
    for i in range(WIDTH):
        products[(i, i, *CENTRE)] = 0
    return products.sum((0, 2, 3))


def test_three_steps_of_the_released_code() -> None:
    torch.manual_seed(0)
    model = Stage().double()
    opt = gsgd.torch.GSGD.paper(model, LR, batch_norm="released", leave_out=("stem", "shortcut", "fc"))
    assert opt.network.num_units == 2 * WIDTH
    assert "left out" in str(opt.network)
    names = [f"stage.{i}.weight" for i in (0, 3, 6)]
    diagonal = [(i, i, *CENTRE) for i in range(WIDTH)]
    for name in names:
        assert all(model.get_parameter(name)[at] == 1 for at in diagonal)
    free: set[tuple[str, tuple[int, ...]]] = {(name, at) for name in names[1:] for at in diagonal}
    for _ in range(3):
        old = {n: p.detach().clone() for n, p in model.named_parameters()}
        grads = {n: 0.3 * torch.randn_like(p) for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            p.grad = grads[n].clone()
        opt.step()
        new = {n: w - LR * grads[n] for n, w in old.items()}  # plain
        (w1, w2, w3), (g1, g2, g3) = ([x[n] for n in names] for x in (old, grads))
        n1, n2, n3 = (w.square().sum(1).sqrt() for w in (w1, w2, w3))  # over input channels: (rows, *taps)
        d1, d2, d3 = (torch.stack([w[at] for at in diagonal]) for w in (w1, w2, w3))
        s = own_products(w2, g2) + own_products(w3, g3)  # raw gradients
        q = torch.stack([w1[at] * g1[at] for at in diagonal]) - s
        own_norm = torch.stack([n1[(i, *CENTRE)] for i in range(WIDTH)])
        ratio = 1 - LR * q / (own_norm * (d1 * d2 * d3) ** 2)
        pinned = torch.ones(WIDTH, dtype=torch.float64)
        per_source = (
            (w1, g1, n1, pinned, d2 * d3, pinned),
            (w2, g2, n2, d1, d3, ratio),
            (w3, g3, n3, d1 * d2, pinned, ratio),
        )
        for name, (w, g, n, a, b, rho) in zip(names, per_source, strict=True):
            v = (a[None, :] * b[:, None])[..., None, None]  # of all path but the weight itself
            new[name] = (w - LR * n[:, None] * g / v**2) / rho[None, :, None, None]
        for i, at in enumerate(diagonal):
            new[names[0]][at] = w1[at] * ratio[i]
        for name, at in free:
            new[name][at] = old[name][at]
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), new[n], rtol=1e-11, atol=1e-11, msg=lambda text, n=n: f"{n}: {text}")
