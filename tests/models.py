"""Networks of the kinds that people train, written plainly: what `gsgd.torch.trace` has to understand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(widths: Sequence[int], bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for read, write in pairwise(widths):
        layers += [nn.Linear(read, write, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class LeNet(nn.Module):
    """Functional style: pooling, flattening by `view`, no module for what has no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), (2, 2))
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        return self.fc3(x)


class Vgg16(nn.Module):
    def __init__(self, width: int = 8, batch_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        read = 3
        for stage, depth in zip((1, 2, 4, 8, 8), (2, 2, 3, 3, 3), strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(read, stage * width, 3, padding=1))
                layers += [nn.BatchNorm2d(stage * width)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                read = stage * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(read * 49, 8 * width),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(8 * width, 8 * width),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(8 * width, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; `shortcut` is "projection", "padding" (He et al.'s option A) or "none" (a plain net)."""

    expansion = 1

    def __init__(self, read: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(read, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.stride, self.grow, self.shortcut = stride, width - read, shortcut
        self.downsample = None
        if shortcut == "projection" and (stride > 1 or read != width):
            self.downsample = nn.Sequential(nn.Conv2d(read, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.shortcut == "none":
            return self.relu(out)
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.grow:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.grow // 2, self.grow - self.grow // 2))
        out += x
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, read: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        out = width * self.expansion
        self.body = nn.Sequential(
            nn.Conv2d(read, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or read != out:
            self.downsample = nn.Sequential(nn.Conv2d(read, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        width: int,
        shortcut: str = "projection",
        cifar: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False) if cifar else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        read, stages = width, []
        for i, depth in enumerate(depths):
            stage = []
            for j in range(depth):
                stage.append(block(read, width << i, 2 if i and not j else 1, shortcut))
                read = (width << i) * block.expansion
            stages.append(nn.Sequential(*stage))
        self.layers = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(read, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))


def plain34(width: int = 16) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), width, "none", cifar=True)


def resnet34(width: int = 16) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), width, cifar=True)


def resnet110(width: int = 16) -> ResNet:
    return ResNet(BasicBlock, (18, 18, 18), width, "padding", cifar=True)


def resnet18(width: int = 64) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), width)


def resnet50(width: int = 64) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), width)


class DenseLayer(nn.Module):
    def __init__(self, read: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(read)
        self.conv1 = nn.Conv2d(read, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, F.dropout(new, 0.1, self.training)], 1)


class DenseNet(nn.Module):
    def __init__(self, growth: int = 4, depths: Sequence[int] = (3, 3, 3)) -> None:
        super().__init__()
        channels = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for i, depth in enumerate(depths):
            for _ in range(depth):
                layers.append(DenseLayer(channels, growth))
                channels += growth
            layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            if i + 1 < len(depths):
                layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
                channels //= 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Inception(nn.Module):
    """GoogLeNet's block: four branches side by side."""

    def __init__(self, read: int, widths: Sequence[int]) -> None:
        super().__init__()
        one, three_in, three, five_in, five, pool = widths
        self.one = self.conv(read, one, 1)
        self.three = nn.Sequential(self.conv(read, three_in, 1), self.conv(three_in, three, 3))
        self.five = nn.Sequential(self.conv(read, five_in, 1), self.conv(five_in, five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), self.conv(read, pool, 1))

    @staticmethod
    def conv(read: int, write: int, kernel: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(read, write, kernel, padding=kernel // 2), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


class GoogLeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Inception.conv(3, 8, 3)
        self.inception1 = Inception(8, (4, 6, 8, 2, 4, 4))
        self.inception2 = Inception(20, (8, 4, 6, 2, 4, 2))
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2)
        x = F.adaptive_max_pool2d(self.inception2(self.inception1(x)), 1)
        return self.fc(x.squeeze(3).squeeze(2))


class Fire(nn.Module):
    def __init__(self, read: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(read, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


class SqueezeNet(nn.Module):
    """It ends in a convolution, a ReLU and the mean over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(16, 4, 8),
            Fire(16, 4, 8),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(16, 6, 12),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(24, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class InvertedResidual(nn.Module):
    def __init__(self, read: int, write: int, stride: int, expand: int, act: type[nn.Module]) -> None:
        super().__init__()
        hidden = read * expand
        self.skip = stride == 1 and read == write
        self.body = nn.Sequential(
            nn.Conv2d(read, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            act(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            act(),
            nn.Conv2d(hidden, write, 1, bias=False),
            nn.BatchNorm2d(write),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


class MobileNetV2(nn.Module):
    def __init__(self, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            act(),
            InvertedResidual(8, 8, 1, 2, act),
            InvertedResidual(8, 12, 2, 3, act),
            InvertedResidual(12, 12, 1, 3, act),
            nn.Conv2d(12, 24, 1, bias=False),
            nn.BatchNorm2d(24),
            act(),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), (1, 1)).reshape(x.shape[0], -1))


def shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


class ShuffleUnit(nn.Module):
    """ShuffleNet-v2's: half of the channels pass by, then the halves are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        passing, through = x.chunk(2, dim=1)
        return shuffle(torch.cat((passing, self.branch(through)), dim=1), 2)


class ShuffleNet(nn.Module):
    """A grouped convolution between shuffles (version 1), then units of version 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.grouped = nn.Conv2d(12, 16, 1, groups=4)
        self.units = nn.Sequential(ShuffleUnit(16), ShuffleUnit(16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(shuffle(F.relu(self.stem(x)), 3)))
        return self.fc(self.units(x).mean([2, 3]))


class UNet(nn.Module):
    def __init__(self, bilinear: bool = False) -> None:
        super().__init__()
        self.down1, self.down2 = self.block(1, 6), self.block(6, 8)
        self.middle = self.block(8, 10)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear") if bilinear else nn.ConvTranspose2d(10, 10, 2, 2)
        self.up1 = nn.Upsample(scale_factor=2) if bilinear else nn.ConvTranspose2d(8, 8, 2, 2)
        self.merge2, self.merge1 = self.block(18, 8), self.block(14, 6)
        self.head = nn.Conv2d(6, 2, 1)

    @staticmethod
    def block(read: int, write: int) -> nn.Sequential:
        convs = (nn.Conv2d(read, write, 3, padding=1), nn.Conv2d(write, write, 3, padding=1))
        return nn.Sequential(convs[0], nn.LeakyReLU(0.1), convs[1], nn.LeakyReLU(0.1))

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.up2(self.middle(F.max_pool2d(two, 2)))
        x = self.up1(self.merge2(torch.cat([two, x], dim=1)))
        return self.head(self.merge1(torch.cat([one, x], dim=1)))


class Encoder(nn.Module):
    """A transformer's encoder block with its embedding and head; the second block's FFN has a GELU."""

    def __init__(self, width: int = 8, heads: int = 2, ffn: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.relu_ffn = nn.Sequential(nn.Linear(width, ffn), nn.ReLU(), nn.Dropout(0.1), nn.Linear(ffn, width))
        self.gelu_ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))
        self.head = nn.Linear(width, 3)

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        x = x + self.attention(self.norm1(x))
        x = x + self.relu_ffn(self.norm2(x))
        x = x + self.gelu_ffn(self.norm3(x))
        return self.head(x.mean(1))


class Call(nn.Module):
    """`forward` is a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)
