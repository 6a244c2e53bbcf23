"""Architectures that people train, each small: what to build, and what to call it with."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import models
import torch
import torch.nn.functional as F
from models import Call, mlp
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Inputs = tuple[Any, ...] | dict[str, Any]
Case = Callable[[], tuple[nn.Module, Inputs]]


def images(size: int, channels: int = 3, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, channels, size, size),)


def vectors(*shape: int) -> Tensor:
    return torch.randn(4, *shape)


def tokens(most: int, *shape: int) -> Tensor:
    return torch.randint(most, (4, *shape))


def conv(read: int, write: int, kernel: int = 3, stride: int = 1, **more: Any) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    layer = nn.Conv2d(read, write, kernel, stride, kernel // 2, bias=False, **more)
    return nn.Sequential(layer, nn.BatchNorm2d(write), nn.ReLU(inplace=True))


# images


def cifar(block: Any, depths: tuple[int, ...], width: int = 4) -> Case:
    return lambda: (models.ResNet(block, depths, width, cifar=True), images(8))


class SqueezeAndExcite(nn.Module):
    """A residual block whose channels are gated by a sigmoid of their means."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.body = conv(3, width), nn.Sequential(conv(width, width), nn.Conv2d(width, width, 3, padding=1))
        self.gate = nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, width), nn.Sigmoid())
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        y = y * self.gate(y.mean((2, 3)))[:, :, None, None]
        return self.head(F.relu(x + y).mean((2, 3)))


def feature_pyramid() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, x: Tensor) -> list[Tensor]:
        found = []
        for stage in m.bottom_up:
            x = stage(x)
            found.append(x)
        top, outputs = None, []
        for lateral, smooth, x in zip(m.lateral, m.smooth, reversed(found), strict=True):
            x = lateral(x)
            top = x if top is None else x + F.interpolate(top, scale_factor=2, mode="nearest")
            outputs.append(smooth(top))
        return outputs

    widths = (6, 8, 10)
    model = Call(
        forward,
        bottom_up=nn.ModuleList(conv(*pair, stride=2) for pair in zip((3, 6, 8), widths, strict=True)),
        lateral=nn.ModuleList(nn.Conv2d(w, 8, 1) for w in reversed(widths)),
        smooth=nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in widths),
    )
    return model, images(16)


def fully_convolutional() -> tuple[nn.Module, Inputs]:
    """FCN: scores at two resolutions are up-sampled and added."""

    def forward(m: Any, x: Tensor) -> Tensor:
        fine = m.fine(x)
        coarse = m.score_coarse(m.coarse(fine))
        scores = m.score_fine(fine) + F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
        return m.up(scores)

    model = Call(
        forward,
        fine=nn.Sequential(conv(3, 8), nn.MaxPool2d(2)),
        coarse=nn.Sequential(conv(8, 12), nn.MaxPool2d(2), nn.Dropout2d(0.1)),
        score_fine=nn.Conv2d(8, 4, 1),
        score_coarse=nn.Conv2d(12, 4, 1),
        up=nn.ConvTranspose2d(4, 4, 4, 2, 1, bias=False),
    )
    return model, images(16)


def atrous_pyramid() -> tuple[nn.Module, Inputs]:
    """DeepLab's: branches of several dilations and of the mean, concatenated."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.backbone(x)
        pooled = m.pooled(h.mean((2, 3), keepdim=True))
        found = [branch(h) for branch in m.branches] + [F.interpolate(pooled, h.shape[2:], mode="bilinear")]
        return F.interpolate(m.head(torch.cat(found, 1)), x.shape[2:], mode="bilinear")

    branches = [nn.Sequential(nn.Conv2d(8, 6, 3, padding=d, dilation=d), nn.ReLU()) for d in (1, 2, 4)]
    model = Call(
        forward,
        backbone=conv(3, 8, stride=2),
        branches=nn.ModuleList(branches),
        pooled=nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU()),
        head=nn.Sequential(conv(24, 8), nn.Conv2d(8, 4, 1)),
    )
    return model, images(16)


def mixer() -> tuple[nn.Module, Inputs]:
    """MLP-Mixer with ReLU: one perceptron over positions, one over channels."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = x + m.positions(m.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + m.channels(m.norm2(x))
        return m.head(m.norm3(x).mean(1))

    norms = {f"norm{i}": nn.LayerNorm(8) for i in (1, 2, 3)}
    perceptrons = {"positions": mlp((16, 24, 16)), "channels": mlp((8, 32, 8))}
    return Call(forward, patches=nn.Conv2d(3, 8, 4, 4), **norms, **perceptrons, head=nn.Linear(8, 5)), images(16)


def gated_mlp() -> tuple[nn.Module, Inputs]:
    """gMLP: half of the channels, mixed over positions, multiply the other half."""

    def forward(m: Any, x: Tensor) -> Tensor:
        u, v = F.gelu(m.inner(m.norm(x))).chunk(2, -1)
        return m.head(x + m.outer(u * m.spatial(m.gate_norm(v).transpose(1, 2)).transpose(1, 2)))

    layers = {"inner": nn.Linear(8, 24), "outer": nn.Linear(12, 8), "spatial": nn.Linear(6, 6), "head": nn.Linear(8, 5)}
    return Call(forward, norm=nn.LayerNorm(8), gate_norm=nn.LayerNorm(12), **layers), (vectors(6, 8),)


def pool_former() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.patches(x)
        y = m.norm1(x)
        x = x + m.scale1[:, None, None] * (F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y)
        x = x + m.scale2[:, None, None] * m.channels(m.norm2(x))
        return m.head(x.mean((2, 3)))

    norms = {f"norm{i}": nn.GroupNorm(1, 8) for i in (1, 2)}
    channels = nn.Sequential(nn.Conv2d(8, 24, 1), nn.ReLU(), nn.Conv2d(24, 8, 1))
    model = Call(forward, patches=nn.Conv2d(3, 8, 4, 4), channels=channels, **norms, head=nn.Linear(8, 5))
    model.scale1, model.scale2 = nn.Parameter(0.1 * torch.ones(8)), nn.Parameter(0.1 * torch.ones(8))
    return model, images(16)


class VisionTransformer(nn.Module):
    """Patches, a class token, positions; pre-norm blocks of `nn.MultiheadAttention` and a ReLU perceptron."""

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.blocks(x)[:, 0])


# what generates images, or compares them


def autoencoder() -> tuple[nn.Module, Inputs]:
    down = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.Flatten())
    up = nn.Sequential(
        nn.Linear(6, 12 * 16),
        nn.ReLU(),
        nn.Unflatten(1, (12, 4, 4)),
        nn.ConvTranspose2d(12, 8, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1),
        nn.Sigmoid(),
    )
    return nn.Sequential(down, nn.Linear(12 * 16, 6), up), images(16, 1)


def variational_autoencoder() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(m.encoder(x.flatten(1)))
        mean, log_var = m.mean(h), m.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        return torch.sigmoid(m.decoder(z)), mean, log_var

    heads = {"mean": nn.Linear(20, 4), "log_var": nn.Linear(20, 4)}
    return Call(forward, encoder=nn.Linear(64, 20), decoder=mlp((4, 20, 64)), **heads), images(8, 1)


def generator() -> tuple[nn.Module, Inputs]:
    """DCGAN's."""
    layers: list[nn.Module] = []
    for read, write, stride, pad in ((6, 16, 1, 0), (16, 8, 2, 1)):
        layers += [nn.ConvTranspose2d(read, write, 4, stride, pad, bias=False), nn.BatchNorm2d(write), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False), nn.Tanh()), (vectors(6, 1, 1),)


def discriminator() -> tuple[nn.Module, Inputs]:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    layers += [nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(16, 1, 4, bias=False), nn.Sigmoid(), nn.Flatten()), images(16)


def critic() -> tuple[nn.Module, Inputs]:
    """Of a GAN with spectral normalization: all of its weights are computed."""
    spectral = nn.utils.parametrizations.spectral_norm
    layers = [spectral(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.1), spectral(nn.Conv2d(8, 8, 4, 2, 1))]
    return nn.Sequential(*layers, nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(128, 1)), images(16)


def siamese() -> tuple[nn.Module, Inputs]:
    """One tower, called twice: its weights are shared."""
    model = Call(lambda m, a, b: m.head(torch.abs(m.tower(a) - m.tower(b))), tower=mlp((8, 16, 6)), head=mlp((6, 8, 1)))
    return model, (vectors(8), vectors(8))


class DiffusionUNet(nn.Module):
    """A noise predictor: residual blocks of group norm and ReLU that add an embedding of the time."""

    class Block(nn.Module):
        def __init__(self, read: int, write: int) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.GroupNorm(4, read), nn.Conv2d(read, write, 3, padding=1)
            self.norm2, self.conv2 = nn.GroupNorm(4, write), nn.Conv2d(write, write, 3, padding=1)
            self.time = nn.Linear(16, write)
            self.skip = nn.Identity() if read == write else nn.Conv2d(read, write, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = self.conv1(F.relu(self.norm1(x))) + self.time(t)[:, :, None, None]
            return self.skip(x) + self.conv2(F.relu(self.norm2(h)))

    def __init__(self) -> None:
        super().__init__()
        self.time, self.first = mlp((8, 16, 16)), nn.Conv2d(1, 8, 3, padding=1)
        self.down, self.middle, self.up = self.Block(8, 12), self.Block(12, 12), self.Block(20, 8)
        self.shrink, self.grow = nn.Conv2d(12, 12, 3, 2, 1), nn.Upsample(scale_factor=2)
        self.norm, self.last = nn.GroupNorm(4, 8), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-math.log(1e4) * torch.arange(4) / 4)
        t = F.relu(self.time(torch.cat([angles.sin(), angles.cos()], -1)))
        first = self.first(x)
        h = self.grow(self.middle(self.shrink(self.down(first, t)), t))
        h = self.up(torch.cat([h, first], 1), t)
        return self.last(F.relu(self.norm(h)))


# decisions, physics, sets


def deep_q() -> tuple[nn.Module, Inputs]:
    layers = [nn.Conv2d(4, 8, 8, 4), nn.ReLU(), nn.Conv2d(8, 12, 4, 2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(12 * 9, 32), nn.ReLU(), nn.Linear(32, 6)), images(36, 4)


def dueling() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.body(x)
        advantage = m.advantage(h)
        return m.value(h) + advantage - advantage.mean(1, keepdim=True)

    body = nn.Sequential(nn.Linear(8, 24), nn.ReLU())
    return Call(forward, body=body, value=mlp((24, 16, 1)), advantage=mlp((24, 16, 4))), (vectors(8),)


def actor_critic() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.body(x)
        return torch.distributions.Categorical(logits=m.actor(h), validate_args=False).logits, m.critic(h).squeeze(-1)

    body = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
    return Call(forward, body=body, actor=nn.Linear(24, 4), critic=nn.Linear(24, 1)), (vectors(8),)


def gaussian_policy() -> tuple[nn.Module, Inputs]:
    """Soft actor-critic's: a sample, and its log-density."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = m.body(x).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
        z = normal.rsample()
        action = torch.tanh(z)
        return action, (normal.log_prob(z) - torch.log(1 - action.square() + 1e-6)).sum(-1)

    return Call(forward, body=mlp((8, 24, 24, 4))), (vectors(8),)


def physics_informed() -> tuple[nn.Module, Inputs]:
    """The residual of an equation: its forward pass differentiates."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        u = m.body(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.cat([u, du[:, :1] + u * du[:, 1:]], 1)

    layers = (nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    return Call(forward, body=nn.Sequential(*layers)), (vectors(2),)


class RadianceField(nn.Module):
    """NeRF: positions and directions in sines and cosines, and a second way in for the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp((24, 32, 32)), nn.Linear(32 + 24, 32)
        self.density, self.feature = nn.Linear(32, 1), nn.Linear(32, 16)
        self.color = mlp((16 + 24, 16, 3))
        self.register_buffer("frequencies", 2.0 ** torch.arange(4))

    def encode(self, x: Tensor) -> Tensor:
        angles = (x[..., None] * self.frequencies).flatten(-2)
        return torch.cat([torch.sin(angles), torch.cos(angles)], -1)

    def forward(self, position: Tensor, direction: Tensor) -> Tensor:
        at = self.encode(position)
        h = F.relu(self.first(at))
        h = F.relu(self.second(torch.cat([h, at], -1)))
        color = torch.sigmoid(self.color(torch.cat([self.feature(h), self.encode(direction)], -1)))
        return torch.cat([color, F.relu(self.density(h))], -1)


def deep_operator() -> tuple[nn.Module, Inputs]:
    """DeepONet: the inner product of what a branch makes of a function and a trunk of places."""

    def forward(m: Any, u: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bp,np->bn", m.branch(u), F.relu(m.trunk(y))) + m.offset

    model = Call(forward, branch=mlp((10, 24, 12)), trunk=mlp((2, 24, 12)))
    model.offset = nn.Parameter(torch.zeros(1))
    return model, (vectors(10), torch.randn(7, 2))


def deep_sets() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.rho((m.phi(x) * mask[..., None]).sum(1))

    return Call(forward, phi=mlp((3, 16, 16)), rho=mlp((16, 16, 2))), (vectors(5, 3), tokens(2, 5).bool())


def point_net() -> tuple[nn.Module, Inputs]:
    """Convolutions over points, and a transformation of the points that a part of them computes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        turn = m.turn_head(m.turn(x).amax(2)).view(-1, 3, 3) + torch.eye(3)
        return m.head(m.points(torch.bmm(turn, x)).amax(2))

    def points(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for read, write in pairwise(widths):
            layers += [nn.Conv1d(read, write, 1), nn.BatchNorm1d(write), nn.ReLU()]
        return nn.Sequential(*layers)

    heads = {"turn_head": mlp((16, 12, 9)), "head": mlp((24, 16, 5))}
    return Call(forward, turn=points(3, 8, 16), points=points(3, 8, 24), **heads), (vectors(3, 10),)


# sequences


def recurrent(cell: type[nn.RNNBase]) -> Case:
    """An embedding, a recurrent layer, and a perceptron on its last output."""

    def build() -> tuple[nn.Module, Inputs]:
        model = Call(
            lambda m, x: m.head(m.cell(m.embed(x))[0][:, -1]),
            embed=nn.Embedding(20, 8),
            cell=cell(8, 12, num_layers=2, batch_first=True, bidirectional=True),
            head=mlp((24, 16, 3)),
        )
        return model, (tokens(20, 6),)

    return build


def packed() -> tuple[nn.Module, Inputs]:
    """A perceptron on vectors, a GRU on packed sequences of several lengths, and a perceptron on every output."""

    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        run, _ = m.cell(pack_padded_sequence(F.relu(m.first(x)), lengths, batch_first=True, enforce_sorted=False))
        return m.head(pad_packed_sequence(run, batch_first=True)[0])

    model = Call(forward, first=nn.Linear(5, 8), cell=nn.GRU(8, 12, batch_first=True), head=mlp((12, 16, 3)))
    return model, (vectors(6, 5), torch.tensor([6, 3, 5, 2]))


def wave_net() -> tuple[nn.Module, Inputs]:
    """Dilated causal convolutions with gates; the skips are added, then ReLU and two convolutions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x, skips = m.first(x), 0
        for filter_, gate, skip, residual, d in zip(m.filter, m.gate, m.skip, m.residual, (1, 2, 4), strict=True):
            padded = F.pad(x, (d, 0))
            y = torch.tanh(filter_(padded)) * torch.sigmoid(gate(padded))
            skips = skips + skip(y)
            x = x + residual(y)
        return m.last(F.relu(m.middle(F.relu(skips))))

    def dilated() -> nn.ModuleList:
        return nn.ModuleList(nn.Conv1d(8, 8, 2, dilation=d) for d in (1, 2, 4))

    def single() -> nn.ModuleList:
        return nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3))

    layers = {"filter": dilated(), "gate": dilated(), "skip": single(), "residual": single()}
    ends = {"first": nn.Conv1d(1, 8, 1), "middle": nn.Conv1d(8, 16, 1), "last": nn.Conv1d(16, 4, 1)}
    return Call(forward, **layers, **ends), (vectors(1, 20),)


class TemporalBlock(nn.Module):
    """TCN's: two causal convolutions with weight normalization or without, and a shortcut."""

    def __init__(self, read: int, write: int, dilation: int, normalize: bool) -> None:
        super().__init__()
        wrap: Callable[[nn.Module], nn.Module]
        wrap = nn.utils.parametrizations.weight_norm if normalize else lambda layer: layer
        self.conv1 = wrap(nn.Conv1d(read, write, 3, dilation=dilation))
        self.conv2 = wrap(nn.Conv1d(write, write, 3, dilation=dilation))
        self.shortcut = nn.Conv1d(read, write, 1) if read != write else nn.Identity()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in (self.conv1, self.conv2):
            y = F.dropout(F.relu(layer(F.pad(y, (2 * self.dilation, 0)))), 0.1, self.training)
        return F.relu(y + self.shortcut(x))


def temporal(normalize: bool) -> Case:
    def build() -> tuple[nn.Module, Inputs]:
        blocks = nn.Sequential(TemporalBlock(3, 8, 1, normalize), TemporalBlock(8, 8, 2, normalize))
        return Call(lambda m, x: m.head(m.blocks(x)[:, :, -1]), blocks=blocks, head=nn.Linear(8, 4)), (vectors(3, 12),)

    return build


def text_cnn() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x).transpose(1, 2)
        return m.head(torch.cat([F.relu(branch(x)).amax(2) for branch in m.branches], 1))

    branches = nn.ModuleList(nn.Conv1d(8, 6, kernel) for kernel in (2, 3, 4))
    return Call(forward, embed=nn.Embedding(20, 8, padding_idx=0), branches=branches, head=nn.Linear(18, 3)), (
        tokens(20, 9),
    )


def speech() -> tuple[nn.Module, Inputs]:
    """Deep Speech 2: convolutions over time and frequency, a recurrent layer, log-probabilities."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.convs(x)
        h = h.permute(3, 0, 1, 2).flatten(2)
        return F.log_softmax(m.head(m.cell(h)[0]), -1)

    layers = {"convs": nn.Sequential(conv(1, 4, 3, 2), conv(4, 4, 3, 2)), "cell": nn.GRU(16, 12)}
    return Call(forward, **layers, head=nn.Linear(12, 7)), images(16, 1)


def encoder_decoder(norm_first: bool) -> Case:
    """`nn.Transformer`, with a causal mask and padding."""

    def build() -> tuple[nn.Module, Inputs]:
        def forward(m: Any, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
            causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
            x, y = m.embed(source) * 4, m.embed_target(target) * 4
            return m.head(m.body(x, y, tgt_mask=causal, src_key_padding_mask=padding, tgt_is_causal=True))

        body = nn.Transformer(16, 4, 2, 2, 32, batch_first=True, norm_first=norm_first)
        padding = torch.tensor([[False] * (6 - i) + [True] * i for i in range(4)])
        embeddings = {"embed": nn.Embedding(20, 16), "embed_target": nn.Embedding(20, 16)}
        return Call(forward, **embeddings, body=body, head=nn.Linear(16, 20)), (tokens(20, 6), tokens(20, 5), padding)

    return build


def decoder_only() -> tuple[nn.Module, Inputs]:
    """`nn.TransformerEncoderLayer` with a causal mask and squared ReLU; head and embedding share a weight."""

    def forward(m: Any, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return F.linear(m.body(m.embed(x), mask=mask, is_causal=True), m.embed.weight)

    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, lambda x: F.relu(x).square(), batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    return Call(forward, embed=nn.Embedding(20, 16), body=body), (tokens(20, 6),)


def perceiver() -> tuple[nn.Module, Inputs]:
    """Latent vectors of its own attend to the inputs, then to each other."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.read(x)
        z = m.latents.expand(len(x), -1, -1)
        z = z + m.cross(m.norm1(z), x, x, need_weights=False)[0]
        z = z + m.ffn(m.norm2(z))
        y = m.norm3(z)
        z = z + m.own(y, y, y, need_weights=False)[0]
        return m.head(m.norm4(z).mean(1))

    attention = {name: nn.MultiheadAttention(16, 4, batch_first=True) for name in ("cross", "own")}
    norms = {f"norm{i}": nn.LayerNorm(16) for i in range(1, 5)}
    model = Call(forward, read=nn.Linear(5, 16), **attention, **norms, ffn=mlp((16, 32, 16)), head=nn.Linear(16, 3))
    model.latents = nn.Parameter(torch.randn(1, 4, 16))
    return model, (vectors(9, 5),)


def contrastive() -> tuple[nn.Module, Inputs]:
    """CLIP: two towers, normalized, compared at a temperature."""

    def forward(m: Any, image: Tensor, text: Tensor) -> Tensor:
        a = F.normalize(m.image(image), dim=-1)
        b = m.text(text)
        b = b / b.norm(dim=-1, keepdim=True)
        return m.logit_scale.exp() * a @ b.t()

    image = nn.Sequential(conv(3, 8), conv(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 6))
    text = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
    model = Call(forward, image=image, text=text)
    model.logit_scale = nn.Parameter(torch.tensor(2.6))
    return model, (*images(8, batch=4), tokens(20, 5))


# tables and recommendation


def deep_recommendation() -> tuple[nn.Module, Inputs]:
    """DLRM: inner products of embeddings and of what a perceptron makes of the numbers."""

    def forward(m: Any, dense: Tensor, sparse: Tensor) -> Tensor:
        x = F.relu(m.bottom(dense))
        z = torch.stack([x, *(table(sparse[:, i]) for i, table in enumerate(m.tables))], 1)
        products = torch.bmm(z, z.transpose(1, 2))
        i, j = torch.tril_indices(4, 4, -1)
        return torch.sigmoid(m.top(torch.cat([x, products[:, i, j]], 1)))

    tables = nn.ModuleList(nn.Embedding(10, 8) for _ in range(3))
    return Call(forward, bottom=mlp((5, 16, 8)), tables=tables, top=mlp((14, 16, 1))), (vectors(5), tokens(10, 3))


def wide_and_deep() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, dense: Tensor, sparse: Tensor) -> Tensor:
        deep = m.deep(torch.cat([dense, m.embed(sparse).flatten(1)], 1))
        return deep + m.wide(F.one_hot(sparse, 10).flatten(1).float())

    layers = {"embed": nn.Embedding(10, 4), "deep": mlp((5 + 12, 16, 12, 1)), "wide": nn.Linear(30, 1)}
    return Call(forward, **layers), (vectors(5), tokens(10, 3))


def two_towers() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, user: Tensor, item: Tensor) -> Tensor:
        return (m.user(m.users(user)) * m.item(m.items(item))).sum(-1)

    embeddings = {"users": nn.Embedding(9, 8), "items": nn.Embedding(11, 8)}
    return Call(forward, **embeddings, user=mlp((8, 16, 6)), item=mlp((8, 16, 6))), (tokens(9), tokens(11))


def collaborative() -> tuple[nn.Module, Inputs]:
    """NCF: a product of embeddings beside a perceptron on two others."""

    def forward(m: Any, user: Tensor, item: Tensor) -> Tensor:
        deep = F.relu(m.deep(torch.cat([m.users(user), m.items(item)], -1)))
        return m.head(torch.cat([m.users_product(user) * m.items_product(item), deep], -1))

    rows = {"users": 9, "items": 11, "users_product": 9, "items_product": 11}
    embeddings = {name: nn.Embedding(n, 8) for name, n in rows.items()}
    return Call(forward, **embeddings, deep=mlp((16, 16, 8)), head=nn.Linear(16, 1)), (tokens(9), tokens(11))


def tabular_resnet() -> tuple[nn.Module, Inputs]:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm1d(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(F.relu(self.a(self.norm(x))), 0.1, self.training)
            return x + F.dropout(self.b(y), 0.1, self.training)

    return nn.Sequential(nn.Linear(6, 8), Block(), Block(), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)), (
        vectors(6),
    )


class FeatureTokens(nn.Module):
    """FT-Transformer: every number has a weight and a bias vector, every category an embedding."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, width)), nn.Parameter(torch.randn(5, width))
        self.embed, self.token = nn.Embedding(10, width), nn.Parameter(torch.randn(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 32, 0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = torch.cat([dense[..., None] * self.weight + self.bias, self.embed(sparse)], 1)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.blocks(x)[:, 0])


# parts that are put into others


class LoRA(nn.Module):
    """A frozen layer with an update of low rank."""

    def __init__(self, inner: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a, self.b = nn.Linear(inner.in_features, rank, bias=False), nn.Linear(rank, inner.out_features, bias=False)
        nn.init.normal_(self.b.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.5 * self.b(F.dropout(self.a(x), 0.1, self.training))


def low_rank() -> tuple[nn.Module, Inputs]:
    return nn.Sequential(LoRA(nn.Linear(8, 16)), nn.ReLU(), LoRA(nn.Linear(16, 5))), (vectors(8),)


def experts(sparse: bool) -> Case:
    """A mixture: every expert sees all samples; the weights of all but the two likeliest are dropped, or of none."""

    def build() -> tuple[nn.Module, Inputs]:
        def forward(m: Any, x: Tensor) -> Tensor:
            weights = torch.softmax(m.gate(x), -1)
            if sparse:
                best, chosen = weights.topk(2, -1)
                weights = torch.zeros_like(weights).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
            return torch.einsum("be,beo->bo", weights, torch.stack([expert(x) for expert in m.experts], 1))

        experts = nn.ModuleList(mlp((8, 12, 5)) for _ in range(4))
        return Call(forward, gate=nn.Linear(8, 4), experts=experts), (vectors(8),)

    return build


def highway() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.first(x))
        gate = torch.sigmoid(m.gate(x))
        return m.last(gate * F.relu(m.inner(x)) + (1 - gate) * x)

    layers = {"gate": nn.Linear(8, 8), "inner": nn.Linear(8, 8), "last": nn.Linear(8, 3)}
    return Call(forward, first=nn.Linear(5, 8), **layers), (vectors(5),)


def maxout() -> tuple[nn.Module, Inputs]:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(m.first(x).unflatten(-1, (8, 3)).amax(-1))

    return Call(forward, first=nn.Linear(5, 24), last=nn.Linear(8, 3)), (vectors(5),)


def hyper_network() -> tuple[nn.Module, Inputs]:
    """The weights of a layer are what another network makes of a condition."""

    def forward(m: Any, x: Tensor, condition: Tensor) -> Tensor:
        w = m.hyper(condition).view(-1, 6, 8)
        return m.last(F.relu(torch.bmm(w, F.relu(m.first(x))[..., None])[..., 0]))

    model = Call(forward, first=nn.Linear(5, 8), hyper=mlp((3, 12, 48)), last=nn.Linear(6, 2))
    return model, (vectors(5), vectors(3))


def modulated() -> tuple[nn.Module, Inputs]:
    """FiLM: channels are scaled and shifted by what another network makes of a condition."""

    def forward(m: Any, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = m.film(condition)[:, :, None, None].chunk(2, 1)
        return m.head(F.relu(gamma * m.second(F.relu(m.first(x))) + beta).mean((2, 3)))

    convs = {"first": nn.Conv2d(3, 8, 3, padding=1), "second": nn.Conv2d(8, 8, 3, padding=1)}
    return Call(forward, **convs, film=mlp((4, 16, 16)), head=nn.Linear(8, 3)), (*images(6, batch=4), vectors(4))


def graph_convolution() -> tuple[nn.Module, Inputs]:
    """A dense adjacency, normalized by degrees, between two layers."""

    def forward(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        a = adjacency + torch.eye(len(adjacency))
        a = a / a.sum(1, keepdim=True)
        return m.last(a @ F.dropout(F.relu(m.first(a @ x)), 0.1, m.training))

    return Call(forward, first=nn.Linear(5, 12), last=nn.Linear(12, 3)), (torch.randn(6, 5), torch.rand(6, 6).round())


def quantized() -> tuple[nn.Module, Inputs]:
    """VQ-VAE: the nearest of the codes takes the value's place, and its gradient passes straight through."""

    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.encoder(x)
        code = m.codes(torch.cdist(z, m.codes.weight).argmin(-1))
        return m.decoder(z + (code - z).detach())

    return Call(forward, encoder=mlp((8, 16, 4)), codes=nn.Embedding(6, 4), decoder=mlp((4, 16, 8))), (vectors(8),)


ARCHITECTURES: dict[str, Case] = {
    "perceptron": lambda: (mlp((7, 16, 16, 4)), (vectors(7),)),
    "LeNet": lambda: (models.LeNet(), images(28, 1)),
    "VGG-16": lambda: (models.Vgg16(2), images(32)),
    "VGG-16 with batch norm": lambda: (models.Vgg16(2, True), images(32)),
    "ResNet, basic blocks": cifar(models.BasicBlock, (1, 1)),
    "ResNet, bottlenecks": cifar(models.Bottleneck, (1, 1)),
    "DenseNet": lambda: (models.DenseNet(), images(8)),
    "GoogLeNet": lambda: (models.GoogLeNet(), images(16)),
    "SqueezeNet": lambda: (models.SqueezeNet(), images(32)),
    "MobileNet-v2": lambda: (models.MobileNetV2(), images(16)),
    "MobileNet-v2 with ReLU": lambda: (models.MobileNetV2(nn.ReLU), images(16)),
    "ShuffleNet": lambda: (models.ShuffleNet(), images(8)),
    "squeeze and excite": lambda: (SqueezeAndExcite(), images(8)),
    "U-Net": lambda: (models.UNet(), images(16, 1)),
    "feature pyramid": feature_pyramid,
    "FCN": fully_convolutional,
    "DeepLab": atrous_pyramid,
    "MLP-Mixer with ReLU": mixer,
    "gMLP": gated_mlp,
    "PoolFormer with ReLU": pool_former,
    "ViT with ReLU": lambda: (VisionTransformer(), images(16)),
    "autoencoder": autoencoder,
    "variational autoencoder": variational_autoencoder,
    "VQ-VAE": quantized,
    "GAN generator": generator,
    "GAN discriminator": discriminator,
    "GAN critic, spectral norm": critic,
    "diffusion U-Net with ReLU": lambda: (DiffusionUNet(), (*images(8, 1), torch.rand(2))),
    "siamese": siamese,
    "CLIP": contrastive,
    "DQN": deep_q,
    "dueling DQN": dueling,
    "actor-critic": actor_critic,
    "Gaussian policy": gaussian_policy,
    "PINN": physics_informed,
    "NeRF": lambda: (RadianceField(), (vectors(3), vectors(3))),
    "DeepONet": deep_operator,
    "deep sets": deep_sets,
    "PointNet": point_net,
    "graph convolution, dense": graph_convolution,
    "LSTM": recurrent(nn.LSTM),
    "GRU": recurrent(nn.GRU),
    "GRU on packed sequences": packed,
    "speech recognition": speech,
    "WaveNet": wave_net,
    "TCN": temporal(False),
    "TCN, weight norm": temporal(True),
    "text CNN": text_cnn,
    "encoder block": lambda: (models.Encoder(), (torch.randint(11, (2, 5)),)),
    "transformer, pre-norm": encoder_decoder(True),
    "transformer, post-norm": encoder_decoder(False),
    "decoder with squared ReLU": decoder_only,
    "Perceiver": perceiver,
    "DLRM": deep_recommendation,
    "wide and deep": wide_and_deep,
    "two towers": two_towers,
    "NCF": collaborative,
    "tabular ResNet": tabular_resnet,
    "FT-Transformer": lambda: (FeatureTokens(), (vectors(5), tokens(10, 3))),
    "LoRA": low_rank,
    "mixture of experts": experts(False),
    "mixture of experts, top two": experts(True),
    "highway": highway,
    "maxout": maxout,
    "hyper-network": hyper_network,
    "FiLM": modulated,
}
