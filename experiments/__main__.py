"""The paper's experiments, and ours, one command each: ``python experiments invariance``."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import drift
import report
import throughput
import torch
from architectures import CONV_NETS
from data import DEFAULT_FOLDER
from methods import FAMILIES
from plans import CONV_SETS, DENSE_SETS, PLANS, Plan, Scale, counts
from training import Run, ended, key_of, read_rows, train_all

HERE = Path(__file__).parent


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python experiments", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    about = {name: plan.what for name, plan in PLANS.items()}
    about |= {"throughput": throughput.__doc__, "drift": drift.__doc__}
    for name, what in about.items():
        one = commands.add_parser(name, help=what, description=what)
        one.add_argument("--protocol", choices=["paper", "laptop"], default="laptop", help="default: %(default)s")
        one.add_argument("--out", type=Path, help="default: experiments/results/<command>, -paper for --protocol paper")
        one.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: %(default)s")
        one.add_argument("--threads", type=int, default=1, help="of PyTorch and G-SGD (default: %(default)s)")
        one.add_argument("--width", type=int, nargs="+", help="hidden units, or feature maps of the first stage")
        if name == "throughput":
            one.add_argument("--rounds", type=int, default=15, help="their median is taken (default: %(default)s)")
            one.add_argument("--batch", type=int, default=128, help="images per step (default: %(default)s)")
            continue
        one.add_argument("--epochs", type=int)
        one.add_argument("--seeds", type=int, help="how many: 0, 1, ...")
        one.add_argument("--rates", type=float, nargs="+", help="the grid of learning rates")
        one.add_argument(
            "--only", metavar="TEXT", nargs="+", help="settings and methods whose names contain one of them"
        )
        one.add_argument("--without", metavar="TEXT", nargs="+", help="none of those whose names contain one of them")
        one.add_argument("--trained", action="store_true", help="draw what is trained already, train nothing")
        one.add_argument("--images", type=int, help="training images used")
        one.add_argument(
            "--data", type=Path, default=DEFAULT_FOLDER, help="folder of the data sets (default: %(default)s)"
        )
        plan = PLANS["transformer" if name == "drift" else name]
        if plan.paper.nets:
            one.add_argument("--nets", nargs="+", choices=CONV_NETS, help="networks of convolutions")
        if plan.paper.sets:
            own = CONV_SETS if plan.paper.nets else DENSE_SETS
            one.add_argument("--sets", nargs="+", choices=own, help="data sets")
        if plan.paper.feed_forward:
            one.add_argument("--feed-forward", nargs="+", choices=plan.paper.feed_forward, help="of transformers")
        if plan.by_rate:
            one.add_argument("--families", nargs="+", choices=FAMILIES, help="optimizers, compared with their variants")
    return top


def scale_of(plan: Plan, options: argparse.Namespace) -> Scale:
    """The protocol, with what the command line changes."""
    scale = plan.paper if options.protocol == "paper" else plan.laptop
    given = {"epochs": options.epochs, "seeds": options.seeds, "widths": options.width, "rates": options.rates,
             "images": options.images, "conv_images": options.images, "nets": getattr(options, "nets", None),
             "sets": getattr(options, "sets", None), "families": getattr(options, "families", None),
             "feed_forward": getattr(options, "feed_forward", None)}  # fmt: skip
    changed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    return replace(scale, **changed)


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Results of other settings are not continued; more of what is listed may be added."""
    if path.exists():
        old = json.loads(path.read_text())
        extends = {"seeds", "widths", "rates", "nets", "sets", "lambdas", "rescaled", "feed_forward", "families"}
        extends |= {"data", "leaves_out", "threads", "device"}
        old = asdict(Scale(0, 0, (), ())) | old  # settings that are newer than the file
        differ = [k for k in settings if k not in extends and old[k] != settings[k]]
        if differ:
            names = ", ".join(f"{k} {old[k]} there, {settings[k]} now" for k in differ)
            raise ValueError(f"{path.parent} holds results of other settings ({names}): name another folder with --out")
    path.write_text(json.dumps(settings, indent=1) + "\n")


def chosen(every: Sequence[Run], options: argparse.Namespace) -> list[Run]:
    def named(run: Run, texts: Sequence[str]) -> bool:
        return any(text in f"{run.setting}: {run.name}" for text in texts)

    runs = [run for run in every if named(run, options.only or [""]) and not named(run, options.without or [])]
    if not runs:
        given = f"--only {' '.join(options.only or [])!r}, --without {' '.join(options.without or [])!r}"
        raise ValueError(f"{given}: no setting and no method of {options.command} is left")
    return runs


def train(command: str, options: argparse.Namespace, out: Path) -> str:
    plan = PLANS[command]
    scale = scale_of(plan, options)
    print(f"{command}: {plan.what}\n{scale}", flush=True)
    every = plan.runs(scale, options.data)
    runs = chosen(every, options)
    if options.trained:
        done = {key_of(row) for row in read_rows(out) if ended(row, scale.epochs)}
        runs = [run for run in runs if run.key in done]
    names = sorted({run.task.data.name for run in every})
    settings = {**asdict(scale), "data": names, "threads": options.threads, "device": options.device.type}
    out.mkdir(parents=True, exist_ok=True)
    check_settings(out / "settings.json", json.loads(json.dumps(settings)))
    rows = train_all(runs, scale.epochs, options.device, out)
    sizes = sorted({f"{len(run.task.data.train_y):,} samples of {run.task.data.name}" for run in runs})
    title = f"{', '.join(sizes)}; {scale.epochs} epochs, mean of {scale.seeds} seeds, best learning rate of each method"
    if plan.x_label:
        report.against_setting(rows, plan.x_label, title, out / "figure.png")
    elif plan.by_rate:
        report.against_rate(runs, rows, out / "figure.png")
        report.against_start(runs, rows, out / "starts.png")
    else:
        report.curves(rows, title, out / "figure.png")
    head = f"{title}.\nTraining loss after the last epoch (nats), test error: mean ± standard deviation over seeds."
    own = asdict(plan.paper if options.protocol == "paper" else plan.laptop)
    changed = [f"{name} {value}" for name, value in asdict(scale).items() if value != own[name]]
    left = f"This protocol ({options.protocol}) leaves out: {scale.leaves_out}."
    if changed:
        left += f" Changed here: {', '.join(changed)}."
    best = f"\n\n{report.overview(runs, rows)}\n\n{report.summary(runs, rows)}" if plan.by_rate else ""
    size = f"\n\n{counts(scale.widths)}" if command == "invariance" else ""
    text = f"{head}\n{left}{size}{best}\n\n{report.table(runs, rows)}\n"
    methods = {run.name for run in runs}
    if methods >= {name for pair in report.GAINS.values() for name in pair}:
        text += f"\nGains by start and step, seed by seed (positive: the second is better):\n\n{report.gains(rows)}\n"
    if pairs := {what: pair for what, pair in report.PAPER_GAINS.items() if methods.issuperset(pair)}:
        found = report.gains(rows, pairs, report.interval)
        text += f"\nGains, seed by seed, in training loss and test error, ± Student's 95 % interval:\n\n{found}\n"
    return text


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def measure_drift(command: str, options: argparse.Namespace, out: Path) -> str:
    scale = scale_of(PLANS["transformer"], options)
    names = ("AdamW", "GAdam", "GAdam, largest")
    every = chosen(PLANS["transformer"].runs(scale, options.data), options)
    runs = [run for run in every if run.name in names and not run.task.rescaled]
    rows = list(drift.measure(runs, scale.epochs, options.device))
    write_csv(rows, out / "drift.csv")
    head = (
        "|log10| of the value of a unit's path, over what it was at the start: median, 95 % quantile and maximum over"
    )
    size = f"units, mean of {scale.seeds} seeds, after {scale.epochs} epochs of `transformer`."
    return f"{head}\n{size}\n\n{drift.table(rows)}\n"


def time_steps(command: str, options: argparse.Namespace, out: Path) -> str:
    width = options.width[0] if options.width else {"paper": 64, "laptop": 16}[options.protocol]
    rows = throughput.measure(width, options.batch, options.rounds, options.device)
    write_csv(rows, out / "steps.csv")
    throughput.figure(rows, out / "figure.png")
    where = f"{options.device.type}, {options.threads} threads"
    size = f"Batches of {options.batch}; of 64 for 784-64x5-10, of 16 texts of 32 characters for characters"
    head = f"{size}; {where}, median of {options.rounds} rounds."
    return f"{head}\n\n{throughput.table(rows)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    top = parser()
    options = top.parse_args(arguments)
    torch.set_num_threads(options.threads)
    suffix = "-paper" if options.protocol == "paper" else ""
    out = options.out or HERE / "results" / f"{options.command}{suffix}"
    try:
        run = {"throughput": time_steps, "drift": measure_drift}.get(options.command, train)
        text = run(options.command, options, out)
    except (FileNotFoundError, ValueError) as error:
        top.error(str(error))
    (out / "table.md").write_text(text)
    print(f"\n{text}\nTable, figure and the line of every epoch: {out.resolve()}")


if __name__ == "__main__":
    main()
