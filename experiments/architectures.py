"""The paper's networks, and those that we compare optimizers on."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(widths: Sequence[int], bias: bool = False) -> nn.Sequential:
    """Dense layers (table 6 counts no biases) and ReLU, on flattened images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for read, write in pairwise(widths):
        layers += [nn.Linear(read, write, bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(width: int, classes: int, batch_norm: bool = False) -> nn.Sequential:
    """Seven layers: six 3x3 convolutions, every second of which strides, and a dense one."""
    layers: list[nn.Module] = []
    read = 3
    for stage in range(3):
        for stride in (1, 2):
            layers.append(nn.Conv2d(read, width << stage, 3, stride, 1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(width << stage)] * batch_norm + [nn.ReLU()]
            read = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(read, classes))


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalization; `shortcut`: "none" (a plain network), "projection", "padding"."""

    def __init__(self, read: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(read, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.grow, self.shortcut = stride, width - read, shortcut
        self.downsample = None
        if shortcut == "projection" and (stride > 1 or read != width):
            self.downsample = nn.Sequential(nn.Conv2d(read, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut == "none":
            return F.relu(out)
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.grow:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow))
        return F.relu(out + x)


class ConvNet(nn.Module):
    """He et al. (2016a), for CIFAR: a 3x3 stem, stages of blocks of which each doubles the maps, mean, one dense layer.

    Parameters
    ----------
    blocks : blocks of every stage; (3, 4, 6, 3) has 34 layers, (18, 18, 18) has 110
    width : feature maps of the first stage
    """

    def __init__(self, blocks: Sequence[int], width: int, shortcut: str, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        read = width
        for stage, depth in enumerate(blocks):
            for i in range(depth):
                layers.append(Block(read, width << stage, 2 if stage and not i else 1, shortcut))
                read = width << stage
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(read, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


# name: (blocks, shortcut); those of 10 layers are not the paper's
CONV_NETS = {
    "Plain-10": ((1, 1, 1, 1), "none"),
    "ResNet-10": ((1, 1, 1, 1), "projection"),
    "Plain-34": ((3, 4, 6, 3), "none"),
    "ResNet-34": ((3, 4, 6, 3), "projection"),
    "ResNet-110": ((18, 18, 18), "padding"),
}


class TransformerBlock(nn.Module):
    """Pre-norm: causal self-attention with heads of 16 channels, then a network of 4 (gated: 8/3) times the width."""

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        hidden = 8 * width // 3 if gated else 4 * width
        self.gate = nn.Linear(width, hidden) if gated else None
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        q, k, v = (t.view(samples, length, -1, 16).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(samples, length, width))
        h = self.norm2(x)
        return x + self.down(F.relu(self.up(h)) if self.gate is None else F.silu(self.gate(h)) * self.up(h))


class LoRA(nn.Module):
    """A layer that is frozen and an adapter of low rank beside it (Hu et al., 2022); B is small, but not zero.

    From zero, as usual, no path of non-zero weights would pass the units of the rank, and they would begin pinned.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.b.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))


class CharacterModel(nn.Module):
    """A decoder-only transformer on characters: logits, shape ``(samples, length, symbols)``."""

    def __init__(self, symbols: int, context: int, width: int, depth: int, gated: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, gated) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def adapted(self, rank: int) -> CharacterModel:
        """A copy whose weights are frozen, but for an adapter of every matrix in the blocks."""
        copy = deepcopy(self).requires_grad_(False)
        for block in copy.blocks:
            for name, layer in list(block.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(block, name, LoRA(layer, rank))
        return copy

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(h)))
