"""Drift of the units' paths, A(v) B(v), in training: a character model by AdamW and GAdam, rules modulo and largest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np
import torch
from methods import arrays_of
from numpy.typing import NDArray
from tqdm import tqdm
from training import Run, Training

import gsgd
import gsgd.torch
from gsgd.skeleton import Rule


class Paths:
    """The basis path of every unit's in-edge, whose value is A(v) B(v) (METHOD.md, section 4), since the start."""

    def __init__(self, training: Training, rule: Rule) -> None:
        self.model = training.model
        net = gsgd.torch.trace(self.model, training.run.task.example)
        self.skeleton = gsgd.Skeleton(net, arrays_of(self.model), rule, balanced=True)
        self.start = self.values()

    def values(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Signs and logarithms, a number per unit; in-edges that are free have no path of their own."""
        signs, logs = self.skeleton.log_path_values(arrays_of(self.model))
        free = self.skeleton.free
        edges = [e for e in self.skeleton.in_edges if e is not None and not free[e[0]][e[1]]]
        return tuple(np.array([of[name][index] for name, index in edges]) for of in (signs, logs))

    def drift(self) -> tuple[NDArray[Any], float]:
        """|log10| of values over those at the start, and the fraction of values that changed their sign."""
        (sign, log), (sign_0, log_0) = self.values(), self.start
        return np.abs(log - log_0) / np.log(10), float((sign != sign_0).mean())


def measure(runs: Sequence[Run], epochs: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per run and rule by which its paths are looked at; path-space methods by their own rule alone."""
    for run in tqdm(runs, unit="run"):
        training = Training(run, epochs, device)
        own = run.method.options.get("rule", "modulo")
        seen = {
            rule: Paths(training, rule) for rule in get_args(Rule) if run.method.optimizer == "AdamW" or rule == own
        }
        for epoch in range(1, epochs + 1):
            training.epoch(epoch)
        loss = training.row(epochs)["train_loss"]
        for rule, paths in seen.items():
            drift, changed = paths.drift()
            median, high = np.quantile(drift, (0.5, 0.95))
            yield {"method": run.name, "lr": run.lr, "seed": run.seed, "rule": rule, "train_loss": loss,
                   "median": f"{median:.3g}", "percentile_95": f"{high:.3g}", "largest": f"{drift.max():.3g}",
                   "sign_changes": f"{changed:.3g}"}  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| method | lr | paths by rule | training loss | median | 95 % | largest | sign changed |",
        "|---" * 8 + "|",
    ]
    for key in dict.fromkeys((row["method"], row["lr"], row["rule"]) for row in rows):
        own = [row for row in rows if (row["method"], row["lr"], row["rule"]) == key]
        means = [np.mean([float(row[name]) for row in own]) for name in
                 ("train_loss", "median", "percentile_95", "largest", "sign_changes")]  # fmt: skip
        name, lr, rule = key
        cells = [f"{x:.3f}" for x in means[:-1]] + [f"{100 * means[-1]:.1f} %"]
        lines.append(f"| {name} | {lr:g} | {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)
