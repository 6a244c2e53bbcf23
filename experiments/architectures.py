"""The paper's networks."""

from __future__ import annotations

from collections.abc import Sequence
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


def cnn(width: int, classes: int) -> nn.Sequential:
    """Seven layers without normalization: six 3x3 convolutions, every second of which strides, and a dense one."""
    layers: list[nn.Module] = []
    read = 3
    for stage in range(3):
        for stride in (1, 2):
            layers += [nn.Conv2d(read, width << stage, 3, stride, 1), nn.ReLU()]
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
