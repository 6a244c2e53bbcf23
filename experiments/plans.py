"""Every experiment: what it trains, at the paper's scale and at one that a laptop's CPU does in minutes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from architectures import CONV_NETS, CharacterModel, ConvNet, cnn, mlp
from data import Data, cifar10, cifar100, fashion_mnist, mnist, python_sources, python_topics
from methods import (
    METHODS,
    PAPER,
    PATH_SGD,
    Method,
    StartName,
    conditioned_lines,
    lora_lines,
    modern_lines,
    paper_lines,
)
from training import Run, Task, Training

import gsgd.torch

SGD_GRID = (0.1, 0.03, 0.01)
MODERN_GRID = (0.1, 0.03, 0.01, 0.003, 0.001)
TRANSFORMER_GRID = (0.1, 0.03, 0.01, 0.003)
CONV_SETS = {"cifar-10": cifar10, "cifar-100": cifar100}
DENSE_SETS = {"mnist": mnist, "fashion-mnist": fashion_mnist}

Tasks = dict[str, tuple[Task, Mapping[str, Method]]]


@dataclass(frozen=True)
class Scale:
    """`images` limits the training images of dense networks, `conv_images` those of networks of convolutions.

    The latter, of the data sets `sets`, are average-pooled by `shrink` for the networks `nets`. Every unit of a start
    is rescaled by up to 10^k either way, for k in `rescaled`. `conv_batch` is also that of character models, of
    `depth`, `context` and `feed_forward`. `families` are the optimizers that are compared with their variants.
    """

    epochs: int
    seeds: int
    widths: tuple[int, ...]
    rates: tuple[float, ...]
    images: int | None = None
    conv_images: int | None = None
    shrink: int = 1
    nets: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    conv_batch: int = 128
    lambdas: tuple[float, ...] = ()
    rescaled: tuple[int, ...] = ()
    depth: int = 2
    context: int = 64
    feed_forward: tuple[str, ...] = ()
    families: tuple[str, ...] = ("SGD", "AdamW")
    leaves_out: str = "nothing"


@dataclass(frozen=True)
class Plan:
    """`tasks`: a task and its methods per setting.

    The figure is drawn against epochs, against the settings' numbers where they have an `x_label`, or `by_rate`.
    """

    what: str
    paper: Scale
    laptop: Scale
    tasks: Callable[[Scale, Path], Tasks]
    x_label: str | None = None
    by_rate: bool = False

    def runs(self, scale: Scale, folder: Path) -> list[Run]:
        return [
            Run(setting, name, float(f"{lr * method.lr_factor:.6g}"), seed, task, method)
            for setting, (task, methods) in self.tasks(scale, folder).items()
            for name, method in methods.items()
            for lr, seed in product(scale.rates, range(scale.seeds))
        ]


def mlp_task(data: Data, hidden: Sequence[int], **options: Any) -> Task:
    return Task(data, partial(mlp, (data.train_x[0].numel(), *hidden, data.classes)), **options)


def pooled_fashion(scale: Scale, folder: Path) -> Data:
    """Fashion-MNIST average-pooled to 7 x 7 (section 11.6)."""
    return fashion_mnist(folder).fewer(scale.images).shrunk(4)


def conv_tasks(scale: Scale, folder: Path) -> dict[str, Task]:
    """Every network on every data set; `widths` are the feature maps of the first stage."""
    tasks = {}
    sets = [CONV_SETS[name](folder).fewer(scale.conv_images).shrunk(scale.shrink) for name in scale.sets]
    for data, net, width in product(sets, scale.nets, scale.widths):
        blocks, shortcut = CONV_NETS[net]
        # ResNet-110 has 16, 32 and 64 maps where the others have 64 to 512
        maps = max(1, width // 4) if net == "ResNet-110" else width
        model = partial(ConvNet, blocks, maps, shortcut, data.classes)
        name = f"{data.name}, {net}, {maps} maps"
        tasks[name] = Task(data, model, scale.conv_batch, schedule="steps", augment=True)
    return tasks


def fewer_maps(scale: Scale) -> Scale:
    """For networks of convolutions beside dense ones of `widths`."""
    return replace(scale, widths=tuple(max(1, width // 8) for width in scale.widths))


def each(tasks: Mapping[str, Task], methods: Mapping[str, Method]) -> Tasks:
    return {setting: (task, methods) for setting, task in tasks.items()}


def invariance(scale: Scale, folder: Path) -> Tasks:
    data = pooled_fashion(scale, folder)
    return {f"h = {h}": (mlp_task(data, (h, h)), METHODS) for h in scale.widths}


def rescaled(scale: Scale, folder: Path) -> Tasks:
    data = pooled_fashion(scale, folder)
    methods = METHODS | PATH_SGD
    return {
        f"k = {k}": (mlp_task(data, (h, h, h), rescaled=k), methods) for h, k in product(scale.widths, (0, 1, 2, 3))
    }


def basis(scale: Scale, folder: Path) -> Tasks:
    reference = {name: METHODS[name] for name in ("SGD, He start", "SGD, ones start")}
    scales, rules = ("balanced", "initial", "ones"), ("modulo", "largest")
    choices = {f"G-SGD {s}, {r}": Method("he", "G-SGD", {"scale": s, "rule": r}) for s, r in product(scales, rules)}
    momentum = {"momentum": 0.9}
    moving = {
        "SGD, He start": Method("he", "SGD", momentum, 0.1),
        "SGD, ones start": Method("he", "SGD", momentum, 0.1, "ones", PAPER),
        **{f"G-SGD {s}": Method("he", "G-SGD", {"scale": s, **momentum}, 0.1) for s in scales},
    }
    normalized = {
        **{
            f"G-SGD {s}, BN {bn}": Method("he", "G-SGD", {"scale": s}, trace={"batch_norm": bn})
            for s, bn in product(("initial", "ones"), ("exact", "paper", "released"))
        },
        "G-SGD balanced, BN exact": Method("he", "G-SGD", {"scale": "balanced"}, trace={"batch_norm": "exact"}),
    }
    data = pooled_fashion(scale, folder)
    dense: Tasks = {}
    for h in scale.widths:
        task = mlp_task(data, (h, h, h))
        dense |= {f"49-{h}x3-10": (task, reference | choices), f"49-{h}x3-10, momentum 0.9": (task, moving)}
    return dense | each(conv_tasks(fewer_maps(scale), folder), reference | normalized)


def signs(scale: Scale, folder: Path) -> Tasks:
    # with skeleton weights of +-1, the scale of the weights themselves gives the paper's rule
    methods = {
        "SGD, ones start": METHODS["SGD, ones start"],
        "SGD, random signs": Method("he", "SGD", skeleton="signs", trace=PAPER),
        "G-SGD ones (paper)": METHODS["G-SGD ones (paper)"],
        "G-SGD random signs": Method("he", "G-SGD", {"scale": "initial", "max_ratio": None}, 1.0, "signs", PAPER),
    }
    data = pooled_fashion(scale, folder)
    dense: Tasks = {f"49-{h}-{h}-10": (mlp_task(data, (h, h)), methods) for h in scale.widths}
    return dense | each(conv_tasks(fewer_maps(scale), folder), methods)


def path_sgd(scale: Scale, folder: Path) -> Tasks:
    methods = METHODS | PATH_SGD
    sets = (mnist(folder).fewer(scale.images), cifar10(folder).fewer(scale.images).grey())
    return {f"{d.name}, 5 x {h}": (mlp_task(d, (h,) * 5), methods) for d, h in product(sets, scale.widths)}


def regularization(scale: Scale, folder: Path) -> Tasks:
    """SGD with weight decay against G-SGD with basis-path regularization; the best lambda is read from the table."""
    tasks: Tasks = {}
    nets = conv_tasks(scale, folder)
    for x in scale.lambdas:
        decay = {"weight_decay": x}
        methods = {
            "SGD, default start": Method("default", "SGD", decay),
            "SGD, ones start": Method("he", "SGD", decay, 1.0, "ones", PAPER),
            "G-SGD ones (paper)": Method("he", "G-SGD", {"scale": "ones", **decay}, trace=PAPER),
            "G-SGD balanced": Method("he", "G-SGD", {"scale": "balanced", **decay}),
        }
        tasks |= each({f"{name}, lambda = {x:g}": task for name, task in nets.items()}, methods)
    return tasks


def limited(starts: Sequence[StartName], momentum: float = 0.0) -> dict[str, Method]:
    """SGD and G-SGD with limits on path ratios, from several starts."""
    named: dict[StartName, str] = {"he": "He", "default": "PyTorch's"}
    moving = {"momentum": momentum}
    methods = {f"SGD, {named[s]} start": Method(s, "SGD", moving) for s in starts}
    for s, kind, r in product(starts, ("balanced", "ones"), (1.5, 2.0, 4.0, None)):
        options = {"scale": kind, "max_ratio": r, **moving}
        methods[f"G-SGD {kind}, {named[s]} start, limit {r}"] = Method(s, "G-SGD", options)
    return methods


def robust(scale: Scale, folder: Path) -> Tasks:
    data = mnist(folder).fewer(scale.images)
    tasks: Tasks = {}
    for h, momentum in product(scale.widths, (0.0, 0.9)):
        task = Task(data, partial(mlp, (data.train_x[0].numel(), *(h,) * 5, data.classes), True), schedule="steps")
        tasks[f"784-{h}x5-10, biases, momentum {momentum:g}"] = (task, limited(("he", "default"), momentum))
    return tasks


def robust_cnn(scale: Scale, folder: Path) -> Tasks:
    tasks = conv_tasks(scale, folder)
    for name, width in product(scale.sets, scale.widths):
        data = CONV_SETS[name](folder).fewer(scale.conv_images).shrunk(scale.shrink)
        model = partial(cnn, width, data.classes)
        setting = f"{data.name}, CNN without BN, {width} maps"
        tasks[setting] = Task(data, model, scale.conv_batch, schedule="steps", augment=True)
    return each(tasks, limited(("default",)))


def cifar(scale: Scale, folder: Path) -> Tasks:
    return each(conv_tasks(scale, folder), METHODS)


def paper_5_1(scale: Scale, folder: Path) -> Tasks:
    tasks: Tasks = {}
    for net in scale.nets:
        own = conv_tasks(replace(scale, nets=(net,)), folder)
        measured = {name: replace(task, measured=5_000) for name, task in own.items()}
        tasks |= each(measured, paper_lines(*CONV_NETS[net]))
    return tasks


def from_starts(name: str, task: Task, scale: Scale, lines: Mapping[str, Method]) -> Tasks:
    """A start; and rescaled copies of it for what depends on the scale and, as a check, for what is said not to."""
    plain = {n: m for n, m in lines.items() if not m.balance and "rule" not in m.options}
    copies = {f"{name}; rescaled by up to {10**k}": (replace(task, rescaled=k), plain) for k in scale.rescaled}
    return {f"{name}; own start": (task, lines), **copies}


def modern(scale: Scale, folder: Path) -> Tasks:
    tasks: Tasks = {}
    for name, h in product(scale.sets, scale.widths):
        data = DENSE_SETS[name](folder).fewer(scale.images)
        model = partial(mlp, (data.train_x[0].numel(), *(h,) * 5, data.classes), True)
        task = Task(data, model, schedule="cosine")
        lines = modern_lines("he", scale.families) | conditioned_lines("he", scale.families)
        tasks |= from_starts(f"{data.name}, 784-{h}x5-10", task, scale, lines)
    return tasks


def modern_cnn(scale: Scale, folder: Path) -> Tasks:
    tasks = conv_tasks(scale, folder)
    for name, width, normalized in product(scale.sets, scale.widths, (False, True)):
        data = CONV_SETS[name](folder).fewer(scale.conv_images).shrunk(scale.shrink)
        model = partial(cnn, width, data.classes, normalized)
        setting = f"{data.name}, CNN {'with' if normalized else 'without'} BN, {width} maps"
        tasks[setting] = Task(data, model, scale.conv_batch, augment=True)
    both: Tasks = {}
    for setting, task in tasks.items():
        both |= from_starts(setting, replace(task, schedule="cosine"), scale, modern_lines("he", scale.families))
    return both


def transformer(scale: Scale, folder: Path) -> Tasks:
    data = python_topics(scale.context).fewer(scale.images)
    lines = {n: m for n, m in modern_lines("default", scale.families).items() if not m.balance}
    if "AdamW" in scale.families:
        lines["Muon"] = Method("default", "Muon", lr_factor=0.3)
        lines["Muon, balanced once"] = Method("default", "Muon", lr_factor=0.3, balance=0)
    tasks: Tasks = {}
    for width, feed_forward in product(scale.widths, scale.feed_forward):
        model = partial(CharacterModel, data.classes, scale.context, width, scale.depth, feed_forward == "SwiGLU")
        name = f"{data.name}, {scale.depth} layers of {width}, {feed_forward}"
        tasks |= from_starts(name, Task(data, model, scale.conv_batch, "cosine", measured=2_000), scale, lines)
    return tasks


def lora(scale: Scale, folder: Path) -> Tasks:
    """A character model that has read Python's help, for two epochs by AdamW, reads Python's sources by adapters."""
    texts, code = (of(scale.context).fewer(scale.images) for of in (python_topics, python_sources))
    tasks: Tasks = {}
    for width in scale.widths:
        model = partial(CharacterModel, texts.classes, scale.context, width, scale.depth)
        task = Task(texts, model, scale.conv_batch, "cosine")
        base = Training(Run("", "AdamW", 0.003, 0, task, Method("default", "AdamW")), 2, torch.device("cpu"))
        for epoch in (1, 2):
            base.epoch(epoch)
        task = Task(code, partial(base.model.adapted, 4), scale.conv_batch, "cosine", measured=2_000)
        name = f"{code.name}, rank 4 on {scale.depth} layers of {width}"
        tasks |= from_starts(name, task, scale, lora_lines())
    return tasks


NETS, SETS = ("Plain-34", "ResNet-34", "ResNet-110"), ("cifar-10", "cifar-100")
LAMBDAS = (0.0, *(float(f"{f}e-{a}") for a in (6, 5, 4, 3) for f in (0.1, 0.2, 0.5)))
ONE_CONV: dict[str, Any] = {"nets": ("Plain-34",), "sets": ("cifar-10",)}
SMALL_CONV: dict[str, Any] = {"conv_images": 2_000, "shrink": 2, "conv_batch": 32, "sets": ("cifar-10",)}
CUT = "feature maps 9 to 64 of the first stage; images beyond 2,000, pooled to 16 x 16; batches of 128 (here 32)"
SHORT = f"24 of 34 layers; {CUT}; two thirds of Fashion-MNIST; epochs 7 to 100; three of five seeds"

PLANS = {
    "invariance": Plan(
        "section 5.2, table 6, figure 4: 49-h-h-10 on Fashion-MNIST pooled to 7 x 7",
        Scale(100, 5, (8, 16, 32, 64, 128, 256, 512, 1024), SGD_GRID),
        Scale(5, 3, (8, 16, 32, 64, 128), SGD_GRID, leaves_out="h = 256 to 1024; epochs 6 to 100; two of five seeds"),
        invariance,
        "hidden units per layer, h",
    ),
    "rescaled": Plan(
        "ours: 49-64-64-64-10 from a start of which every unit is rescaled by up to 10^k",
        Scale(100, 5, (64,), (*SGD_GRID, 1e-3, 1e-4)),
        Scale(
            3,
            2,
            (64,),
            (*SGD_GRID, 1e-3, 1e-4),
            20_000,
            leaves_out="two thirds of the images; epochs 4 to 100; three of five seeds",
        ),
        rescaled,
        "k: units are rescaled by numbers in [10^-k, 10^k]",
    ),
    "basis": Plan(
        "ours: rule, scale, momentum and treatment of batch normalization",
        Scale(100, 5, (64,), (1.0, 0.3, 0.1, 0.03, 0.01), **ONE_CONV),
        Scale(6, 2, (64,), (0.3, 0.1), 20_000, nets=("Plain-10",), **SMALL_CONV, leaves_out=SHORT),
        basis,
    ),
    "signs": Plan(
        "section 11.2: random signs of the skeleton weights",
        Scale(100, 5, (64,), (1.0, 0.3, 0.1, 0.03, 0.01), **ONE_CONV),
        Scale(6, 2, (64,), (0.3, 0.1), 20_000, nets=("Plain-10",), **SMALL_CONV, leaves_out=SHORT),
        signs,
    ),
    "robust": Plan(
        "ours: the limit on path ratios against rate, scale and start, 784-64x5-10 with biases on MNIST",
        Scale(20, 5, (64,), (1.0, 0.5, 0.3, 0.1, 0.03)),
        Scale(
            3,
            3,
            (64,),
            (1.0, 0.5, 0.3, 0.1, 0.03),
            15_000,
            leaves_out="three quarters of the images; epochs 4 to 20; two of five seeds",
        ),
        robust,
    ),
    "robust_cnn": Plan(
        "ours: the limit on path ratios, networks of convolutions with and without batch normalization",
        Scale(164, 5, (64,), (1.0, 0.3, 0.1), nets=("Plain-34", "ResNet-34"), sets=("cifar-10",)),
        Scale(
            4,
            2,
            (8,),
            (1.0, 0.3, 0.1),
            nets=("Plain-10", "ResNet-10"),
            **SMALL_CONV,
            leaves_out=f"24 of 34 layers; {CUT}; epochs 5 to 164; three of five seeds; He's start",
        ),
        robust_cnn,
    ),
    "path_sgd": Plan(
        "section 5.3, figure 5: 5 hidden layers of 64, MNIST and grey CIFAR-10",
        Scale(500, 5, (64,), tuple(10.0**-a for a in range(11))),
        Scale(
            3,
            2,
            (64,),
            (1.0, 0.1, 0.01, 0.001),
            20_000,
            leaves_out="learning rates 1e-4 to 1e-10; images beyond 20,000; epochs 4 to 500; three of five seeds",
        ),
        path_sgd,
    ),
    "regularization": Plan(
        "section 11.5, figures 8 and 9: weight decay against basis-path regularization",
        Scale(164, 5, (64,), (1.0,), nets=NETS[:2], sets=SETS, lambdas=LAMBDAS),
        Scale(
            8,
            2,
            (8,),
            (1.0,),
            nets=("ResNet-10",),
            lambdas=LAMBDAS,
            **SMALL_CONV,
            leaves_out=f"Plain-34; 24 of 34 layers; CIFAR-100; {CUT}; epochs 9 to 164; three of five seeds",
        ),
        regularization,
        "lambda",
    ),
    "cifar": Plan(
        "sections 5.1 and 11.3, tables 1 and 5, figures 3 and 7: Plain-34, ResNet-34 and ResNet-110",
        Scale(164, 5, (64,), (1.0,), nets=NETS, sets=SETS),
        Scale(
            8,
            2,
            (8,),
            (1.0, 0.1),
            nets=NETS,
            **SMALL_CONV,
            leaves_out=f"CIFAR-100; {CUT}; epochs 9 to 164; three of five seeds",
        ),
        cifar,
    ),
    "paper_5_1": Plan(
        "section 5.1, tables 1 and 4, figure 3, from PyTorch's default start; the text and the released code",
        Scale(164, 5, (64,), (1.0,), nets=NETS[:2], sets=("cifar-10",)),
        Scale(
            10,
            3,
            (8,),
            (1.0,),
            conv_images=20_000,
            nets=("Plain-34",),
            sets=("cifar-10",),
            leaves_out="feature maps 9 to 64 of the first stage; images beyond 20,000; ResNet-34; epochs 11 to 164; "
            "two of five seeds",
        ),
        paper_5_1,
    ),
    "modern": Plan(
        "ours: SGD with momentum, AdamW and RMSprop, balanced or not, against GSGD, GAdam and GRMSprop; perceptrons",
        Scale(
            20,
            5,
            (64,),
            MODERN_GRID,
            rescaled=(1, 2),
            sets=tuple(DENSE_SETS),
            families=("SGD", "AdamW", "RMSprop"),
        ),
        Scale(
            5,
            3,
            (64,),
            MODERN_GRID,
            20_000,
            rescaled=(1, 2),
            sets=tuple(DENSE_SETS),
            leaves_out="RMSprop and GRMSprop; two thirds of the images; epochs 6 to 20; two of five seeds",
        ),
        modern,
        by_rate=True,
    ),
    "modern_cnn": Plan(
        "ours: the same optimizers, networks of convolutions with and without batch normalization",
        Scale(100, 5, (64,), MODERN_GRID, rescaled=(1, 2), nets=("ResNet-10",), sets=("cifar-10",)),
        Scale(
            5,
            2,
            (8,),
            MODERN_GRID,
            conv_images=8_000,
            shrink=2,
            conv_batch=32,
            rescaled=(1,),
            sets=("cifar-10",),
            leaves_out="ResNet-10; feature maps 9 to 64; images beyond 8,000, pooled to 16 x 16; batches of "
            "128 (here 32); epochs 6 to 100; starts rescaled by up to 100; three of five seeds",
        ),
        modern_cnn,
        by_rate=True,
    ),
    "transformer": Plan(
        "ours: the same optimizers and Muon, a character model on the help texts that come with Python",
        Scale(
            60,
            5,
            (128,),
            TRANSFORMER_GRID,
            rescaled=(1, 2),
            depth=4,
            context=128,
            conv_batch=64,
            feed_forward=("ReLU", "SwiGLU"),
        ),
        Scale(
            2,
            2,
            (64,),
            (0.1, 0.03, 0.01),
            rescaled=(1,),
            context=32,
            conv_batch=16,
            feed_forward=("ReLU",),
            families=("AdamW",),
            leaves_out="SGD and G-SGD; SwiGLU; layers 3 and 4; width 128; contexts of 128 characters (here 32); "
            "batches of 64 (here 16); epochs 3 to 60; starts rescaled by up to 100; three of five seeds",
        ),
        transformer,
        by_rate=True,
    ),
    "lora": Plan(
        "ours: AdamW, GAdam and LoRA-RITE, adapters of rank 4 on a character model, from sources that come with Python",
        Scale(20, 5, (128,), TRANSFORMER_GRID, rescaled=(1, 2), depth=4, context=128, conv_batch=64),
        Scale(
            1,
            3,
            (64,),
            TRANSFORMER_GRID[:3],
            rescaled=(1,),
            context=32,
            conv_batch=16,
            leaves_out="layers 3 and 4; width 128; contexts of 128 characters (here 32); batches of 64 (here 16); "
            "epochs 2 to 20; starts rescaled by up to 100; two of five seeds",
        ),
        lora,
        by_rate=True,
    ),
}


def counts(widths: Sequence[int]) -> str:
    """Table 6: weights, units and invariant ratio of 49-h-h-10."""
    lines = ["| h | weights m | units H | invariant ratio H/m |", "|---|---|---|---|"]
    for h in widths:
        net = gsgd.torch.trace(mlp((49, h, h, 10)))
        lines.append(f"| {h} | {net.num_weights} | {net.num_units} | {net.invariant_ratio:.2e} |")
    return "\n".join(lines)
