"""Train every run of an experiment; one line per epoch; continue after an interruption."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
import torch.nn.functional as F
from data import Data
from methods import Method, optimizer, start, traced
from torch import Tensor, nn
from tqdm import tqdm

import gsgd.torch

COLUMNS = ("setting", "method", "lr", "seed", "epoch", "train_loss", "test_loss", "test_error", "clamped")
Schedule = Literal["constant", "steps", "cosine"]
Row = dict[str, Any]
Key = tuple[str, str, float, int]  # setting, method, lr, seed


@dataclass(frozen=True)
class Task:
    """What a run trains on, apart from method, learning rate and seed.

    `schedule`: "steps" divides the learning rate by 10 after half and after three quarters of the epochs, "cosine"
    takes it to zero, step by step. `augment`: random crops and flips. `rescaled`: see `start`. `measured`: the number
    of training samples on which the loss is measured.
    """

    data: Data
    model: Callable[[], nn.Module]
    batch: int = 64
    schedule: Schedule = "constant"
    augment: bool = False
    rescaled: float = 0.0
    measured: int | None = None

    @property
    def example(self) -> Tensor:
        """What the model reads, two samples."""
        return self.data.train_x[:2]

    def factor(self, done: float, epochs: int) -> float:
        """Of the learning rate, when `done` of `epochs` have passed."""
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * done / epochs)) / 2
        epoch = math.floor(done) + 1
        return 0.1 ** ((epoch > epochs / 2) + (epoch > 3 * epochs / 4)) if self.schedule == "steps" else 1.0


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


def _read(file: IO[str]) -> list[Row]:
    kinds = dict.fromkeys(COLUMNS, float) | {"setting": str, "method": str, "seed": int, "epoch": int, "clamped": int}
    return [{name: kinds[name](row.get(name) or math.nan) for name in COLUMNS} for row in csv.DictReader(file)]


def read_rows(folder: Path) -> list[Row]:
    """The line of every epoch, numbers as numbers: of epochs.csv.gz, and of epochs.csv while runs are under way."""
    rows: list[Row] = []
    if (folder / "epochs.csv.gz").exists():
        with gzip.open(folder / "epochs.csv.gz", "rt", newline="") as file:
            rows += _read(file)
    if (folder / "epochs.csv").exists():
        with open(folder / "epochs.csv", newline="") as file:
            rows += _read(file)
    return rows


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """All lines, compressed, in place of what was there; the same rows give the same bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    unfinished = folder / "epochs.part"
    unfinished.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    unfinished.replace(folder / "epochs.csv.gz")
    (folder / "epochs.csv").unlink(missing_ok=True)


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


def cross_entropy(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Of one answer per sample, or one per position."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and the fraction of wrong answers, in evaluation mode."""
    model.eval()
    loss, wrong = 0.0, 0
    for xs, ys in zip(x.split(256), y.split(256), strict=True):
        logits = model(xs)
        loss += cross_entropy(logits, ys, "sum").item()
        wrong += int((logits.argmax(-1) != ys).sum())
    return loss / y.numel(), wrong / y.numel()


class Training:
    """A model in the middle of a run.

    The order of the samples depends on seed and epoch alone: the same for every method, and after an interruption.
    """

    def __init__(self, run: Run, epochs: int, device: torch.device) -> None:
        self.run, self.epochs = run, epochs
        self.data = Data(run.task.data.name, *(part.to(device) for part in run.task.data[1:]))
        torch.manual_seed(run.seed)
        self.model = run.task.model()
        start(self.model, run.method, run.task.example, run.seed, run.task.rescaled)
        self.net = traced(self.model, run.task.example) if run.method.balance else None
        self.model.to(device)
        self.optimizer = optimizer(self.model, run.method, self.data.train_x[:2], run.lr)

    def epoch(self, epoch: int) -> None:
        run, data = self.run, self.data
        generator = torch.Generator().manual_seed(1000 * run.seed + epoch)
        self.model.train()
        batches = torch.randperm(len(data.train_y), generator=generator).split(run.task.batch)
        for number, batch in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = run.lr * run.task.factor(epoch - 1 + number / len(batches), self.epochs)
            batch = batch.to(data.train_y.device)
            x = data.train_x[batch]
            loss = cross_entropy(self.model(cropped(x, generator) if run.task.augment else x), data.train_y[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            steps = (epoch - 1) * len(batches) + number + 1
            if self.net is not None and run.method.balance and steps % run.method.balance == 0:
                gsgd.torch.balance(self.model, self.net)

    def row(self, epoch: int) -> Row:
        """The line of an epoch that was trained; a loss of NaN says that it diverged."""
        data = self.data
        few = self.run.task.measured
        loss = evaluate(self.model, data.train_x[:few], data.train_y[:few])[0]
        test = evaluate(self.model, data.test_x, data.test_y) if math.isfinite(loss) else (math.nan, math.nan)
        return self._line(epoch, loss if math.isfinite(loss) else math.nan, *test)

    def diverged(self, epoch: int) -> Row:
        return self._line(epoch, math.nan, math.nan, math.nan)

    def _line(self, epoch: int, loss: float, test_loss: float, error: float) -> Row:
        clamped = self.optimizer.stats.clamped if hasattr(self.optimizer, "stats") else 0
        values = (*self.run.key, epoch, *(float(f"{v:.5g}") for v in (loss, test_loss, error)), clamped)
        return dict(zip(COLUMNS, values, strict=True))

    def save(self, epoch: int, checkpoint: Path) -> None:
        state = {"run": self.run.key, "epoch": epoch, "model": self.model.state_dict(),
                 "optimizer": self.optimizer.state_dict()}  # fmt: skip
        unfinished = checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(checkpoint)

    def load(self, checkpoint: Path) -> int:
        """The epoch that the checkpoint was saved after, 0 if it is of another run."""
        state = torch.load(checkpoint, weights_only=True, map_location=self.data.train_x.device)
        if tuple(state["run"]) != self.run.key:
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["epoch"])


def train(run: Run, epochs: int, device: torch.device, checkpoint: Path) -> Iterator[Row]:
    """One row per epoch, after it; the last one has a loss of NaN if training diverged."""
    training = Training(run, epochs, device)
    first = training.load(checkpoint) + 1 if checkpoint.exists() else 1
    for epoch in range(first, epochs + 1):
        try:
            training.epoch(epoch)
            row = training.row(epoch)
        except FloatingPointError:  # GSGD and PathSGD refuse what is not finite
            row = training.diverged(epoch)
        yield row
        if math.isnan(row["train_loss"]):
            return
        training.save(epoch, checkpoint)


def unspoilt(rows: Sequence[Row], epochs: int, checkpoint: Path) -> list[Row]:
    """The rows of runs that ended, and those that the checkpoint continues."""
    done = {key_of(row) for row in rows if ended(row, epochs)}
    state = torch.load(checkpoint, weights_only=True, map_location="cpu") if checkpoint.exists() else None
    begun = (tuple(state["run"]), state["epoch"]) if state else (None, 0)
    return [r for r in rows if key_of(r) in done or (key_of(r) == begun[0] and r["epoch"] <= begun[1])]


def train_all(runs: Sequence[Run], epochs: int, device: torch.device, out: Path) -> list[Row]:
    """Train what is not yet in the folder `out`; all rows of `runs`."""
    checkpoint = out / "checkpoint.pt"
    rows = unspoilt(read_rows(out), epochs, checkpoint)
    write_rows(out, rows)
    done = {key_of(row) for row in rows if ended(row, epochs)}
    with open(out / "epochs.csv", "w", newline="") as file, tqdm(total=len(runs) * epochs, unit="epoch") as progress:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for number, run in enumerate(runs, start=1):
            progress.set_description(f"{run.setting}: {run.name}, lr {run.lr:g}, seed {run.seed}")
            if run.key not in done:
                for row in train(run, epochs, device, checkpoint):
                    rows.append(row)
                    writer.writerow(row)
                    file.flush()
                    progress.update()
            progress.update(number * epochs - progress.n)  # epochs of before, and those that a diverged run left out
    write_rows(out, rows)
    checkpoint.unlink(missing_ok=True)
    order = {run.key: number for number, run in enumerate(runs)}
    return sorted((row for row in rows if key_of(row) in order), key=lambda row: order[key_of(row)])
