"""Train every run of an experiment; one line per epoch; continue after an interruption."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import Data
from methods import Method, optimizer, start
from torch import Tensor, nn
from tqdm import tqdm

COLUMNS = ("setting", "method", "lr", "seed", "epoch", "train_loss", "test_error", "clamped")
Row = dict[str, Any]
Key = tuple[str, str, float, int]  # setting, method, lr, seed


@dataclass(frozen=True)
class Task:
    """What a run trains on, apart from method, learning rate and seed.

    `decay`: the learning rate is divided by 10 after half and after three quarters of the epochs. `augment`: random
    crops and flips.
    """

    data: Data
    model: Callable[[], nn.Module]
    batch: int = 64
    decay: bool = False
    augment: bool = False
    rescaled: float = 0.0


@dataclass(frozen=True)
class Run:
    setting: str
    name: str
    lr: float
    seed: int
    task: Task
    method: Method

    @property
    def key(self) -> Key:
        return (self.setting, self.name, self.lr, self.seed)


def read_rows(path: Path) -> list[Row]:
    """The lines of an epochs.csv, numbers as numbers."""
    kinds = dict.fromkeys(COLUMNS, float) | {"setting": str, "method": str, "seed": int, "epoch": int, "clamped": int}
    with open(path, newline="") as file:
        return [{name: kinds[name](value) for name, value in row.items()} for row in csv.DictReader(file)]


def key_of(row: Row) -> Key:
    return (row["setting"], row["method"], row["lr"], row["seed"])


def ended(row: Row, epochs: int) -> bool:
    return row["epoch"] == epochs or math.isnan(row["train_loss"])


def cropped(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops after a padding of 4, flipped at random (section 11.4)."""
    count, channels, size, _ = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    corner = torch.randint(0, 9, (2, count, 1), generator=generator) + torch.arange(size)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    across = torch.where(flip, corner[1].flip(1), corner[1])
    image, row, column = (i.to(x.device) for i in (torch.arange(count)[:, None], corner[0], across))
    channel = torch.arange(channels, device=x.device)[:, None, None]
    return padded[image[:, None, :, None], channel, row[:, None, :, None], column[:, None, None, :]]


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and the fraction of wrong answers, in evaluation mode."""
    model.eval()
    loss, wrong = 0.0, 0
    for xs, ys in zip(x.split(2048), y.split(2048), strict=True):
        logits = model(xs)
        loss += F.cross_entropy(logits, ys, reduction="sum").item()
        wrong += int((logits.argmax(1) != ys).sum())
    return loss / len(y), wrong / len(y)


def one_epoch(model: nn.Module, opt: torch.optim.Optimizer, run: Run, data: Data, epoch: int) -> None:
    """The order of the images depends on seed and epoch alone: the same for every method, and after an interruption."""
    generator = torch.Generator().manual_seed(1000 * run.seed + epoch)
    model.train()
    for batch in torch.randperm(len(data.train_y), generator=generator).split(run.task.batch):
        batch = batch.to(data.train_y.device)
        x = data.train_x[batch]
        loss = F.cross_entropy(model(cropped(x, generator) if run.task.augment else x), data.train_y[batch])
        opt.zero_grad()
        loss.backward()
        opt.step()


def train(run: Run, epochs: int, device: torch.device, checkpoint: Path) -> Iterator[Row]:
    """One row per epoch, after it; the last one has a loss of NaN if training diverged."""
    data = Data(run.task.data.name, *(part.to(device) for part in run.task.data[1:]))
    torch.manual_seed(run.seed)
    model = run.task.model()
    start(model, run.method.start, run.seed, run.task.rescaled)
    model.to(device)
    opt = optimizer(model, run.method, run.lr)
    first = 1
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        if tuple(state["run"]) == run.key:
            model.load_state_dict(state["model"])
            opt.load_state_dict(state["optimizer"])
            first = state["epoch"] + 1
    for epoch in range(first, epochs + 1):
        if run.task.decay:
            for group in opt.param_groups:
                group["lr"] = run.lr * 0.1 ** ((epoch > epochs / 2) + (epoch > 3 * epochs / 4))
        try:
            one_epoch(model, opt, run, data, epoch)
            loss = evaluate(model, data.train_x, data.train_y)[0]
        except FloatingPointError:  # GSGD and PathSGD refuse what is not finite
            loss = math.nan
        if not math.isfinite(loss):
            loss = math.nan
        error = evaluate(model, data.test_x, data.test_y)[1] if math.isfinite(loss) else math.nan
        clamped = opt.stats.clamped if hasattr(opt, "stats") else 0
        values = (*run.key, epoch, float(f"{loss:.5g}"), float(f"{error:.5g}"), clamped)
        yield dict(zip(COLUMNS, values, strict=True))
        if math.isnan(loss):
            return
        state = {"run": run.key, "epoch": epoch, "model": model.state_dict(), "optimizer": opt.state_dict()}
        unfinished = checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(checkpoint)


def unspoilt(rows: Sequence[Row], epochs: int, checkpoint: Path) -> list[Row]:
    """The rows of runs that ended, and those that the checkpoint continues."""
    done = {key_of(row) for row in rows if ended(row, epochs)}
    state = torch.load(checkpoint, weights_only=True, map_location="cpu") if checkpoint.exists() else None
    begun = (tuple(state["run"]), state["epoch"]) if state else (None, 0)
    return [r for r in rows if key_of(r) in done or (key_of(r) == begun[0] and r["epoch"] <= begun[1])]


def train_all(runs: Sequence[Run], epochs: int, device: torch.device, out: Path) -> list[Row]:
    """Train what is not yet in ``out / "epochs.csv"``; all rows of `runs`."""
    path, checkpoint = out / "epochs.csv", out / "checkpoint.pt"
    rows = unspoilt(read_rows(path), epochs, checkpoint) if path.exists() else []
    kept = path.with_suffix(".part")
    with open(kept, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    kept.replace(path)
    with open(path, "a", newline="") as file, tqdm(total=len(runs) * epochs, unit="epoch") as progress:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        done = {key_of(row) for row in rows if ended(row, epochs)}
        for number, run in enumerate(runs, start=1):
            progress.set_description(f"{run.setting}: {run.name}, lr {run.lr:g}, seed {run.seed}")
            if run.key not in done:
                for row in train(run, epochs, device, checkpoint):
                    rows.append(row)
                    writer.writerow(row)
                    file.flush()
                    progress.update()
            progress.update(number * epochs - progress.n)  # epochs of before, and those that a diverged run left out
    checkpoint.unlink(missing_ok=True)
    order = {run.key: number for number, run in enumerate(runs)}
    return sorted((row for row in rows if key_of(row) in order), key=lambda row: order[key_of(row)])
