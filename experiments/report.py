"""The tables and figures of what was trained."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from training import Row, Run

Final = dict[
    tuple[str, str], dict[float, list[Row]]
]  # the last rows, by setting and method, by learning rate, of all seeds


def final_rows(rows: Sequence[Row]) -> Final:
    last: dict[tuple[str, str, float, int], Row] = {}
    for row in rows:
        last[row["setting"], row["method"], row["lr"], row["seed"]] = row
    final: Final = {}
    for row in last.values():
        final.setdefault((row["setting"], row["method"]), {}).setdefault(row["lr"], []).append(row)
    return final


def loss_of(rows: Sequence[Row]) -> float:
    """The mean training loss over seeds; infinite if a seed diverged."""
    loss = mean(row["train_loss"] for row in rows)
    return math.inf if math.isnan(loss) else loss


def best(by_rate: dict[float, list[Row]]) -> float:
    """The learning rate of least final training loss; the test data has no say."""
    return min(by_rate, key=lambda lr: loss_of(by_rate[lr]))


def deviation(values: Sequence[float]) -> float:
    """The standard deviation over seeds; NaN if one diverged."""
    if any(math.isnan(v) for v in values):
        return math.nan
    return stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float], unit: str = "") -> str:
    """Mean and standard deviation over seeds."""
    if any(math.isnan(v) for v in values):
        return "diverged"
    around = deviation(values)
    return f"{mean(values):.2f} ± {around:.2f}{unit}" if unit else f"{mean(values):.4g} ± {around:.2g}"


def table(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    """Markdown: per setting and method the final training loss at every learning rate; the best one's test error."""
    final = final_rows(rows)
    rates = sorted({float(f"{run.lr / run.method.lr_factor:.6g}") for run in runs}, reverse=True)
    factors = {(run.setting, run.name): run.method.lr_factor for run in runs}
    lines = []
    for setting in dict.fromkeys(run.setting for run in runs):
        lines += ["", f"**{setting}**", ""]
        lines.append("| method | " + "".join(f"loss, lr {lr:g} | " for lr in rates) + "best lr | its test error |")
        lines.append("|---" * (len(rates) + 3) + "|")
        for name in dict.fromkeys(run.name for run in runs if run.setting == setting):
            by_rate = final[setting, name]
            cells = []
            for lr in rates:
                at = [rows for own, rows in by_rate.items() if math.isclose(own, lr * factors[setting, name])]
                cells.append(spread([row["train_loss"] for row in at[0]]) if at else "")
            lr = best(by_rate)
            ends = spread([100 * row["test_error"] for row in by_rate[lr]], " %")
            cells += [f"{lr:g}" if ends != "diverged" else "", ends]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        scaled: dict[float, list[str]] = {}
        for (own, name), factor in factors.items():
            if own == setting and factor != 1:
                scaled.setdefault(factor, []).append(name)
        lines += [
            f"\n{'; '.join(names)}: {factor:g} times the learning rate above." for factor, names in scaled.items()
        ]
    return "\n".join(lines).strip()


# what a column of `gains` compares: the first method's result minus the second's
GAINS = {
    "paper: SGD He - G-SGD ones": ("SGD, He start", "G-SGD ones (paper)"),
    "start: SGD He - SGD ones": ("SGD, He start", "SGD, ones start"),
    "step: SGD ones - G-SGD ones": ("SGD, ones start", "G-SGD ones (paper)"),
    "SGD He - G-SGD initial": ("SGD, He start", "G-SGD initial"),
    "SGD He - G-SGD balanced": ("SGD, He start", "G-SGD balanced"),
}
PAPER_GAINS = {  # of `paper_5_1`, where some may be left out
    "start, inner": ("SGD, default start", "SGD, ones start, inner"),
    "step, inner": ("SGD, ones start, inner", "G-SGD ones, inner"),
    "step, released": ("SGD, ones start, inner", "G-SGD ones, released"),
    "start, text": ("SGD, default start", "SGD, ones start, text"),
    "step, text": ("SGD, ones start, text", "G-SGD ones, text"),
    "balanced": ("SGD, default start", "G-SGD balanced"),
    "initial": ("SGD, default start", "G-SGD initial"),
}


def gains(rows: Sequence[Row], pairs: Mapping[str, tuple[str, str]] = GAINS, shown: Callable[..., str] = spread) -> str:
    """Markdown: what the start and the step gain, in training loss and in points of test error, seed by seed.

    At one learning rate the paper's comparison, in the first column of `GAINS`, is the sum of the next two. Of pairs of
    methods the seeds are compared that both have.
    """
    final = final_rows(rows)
    lines = [f"| setting | lr | {' | '.join(pairs)} |", "|---" * (len(pairs) + 2) + "|"]
    for setting in dict.fromkeys(setting for setting, _ in final):
        rates = sorted(final[setting, next(iter(pairs.values()))[0]], reverse=True)
        for lr in [*rates, None] if len(rates) > 1 else rates:
            cells = []
            for pair in pairs.values():
                ends = [final[setting, name] for name in pair]
                first, second = ({r["seed"]: r for r in end[best(end) if lr is None else lr]} for end in ends)
                both = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
                loss = shown([one["train_loss"] - two["train_loss"] for one, two in both])
                error = shown([100 * (one["test_error"] - two["test_error"]) for one, two in both], " pt")
                cells.append("diverged" if loss == "diverged" else f"{loss}, {error}")
            lines.append(f"| {setting} | {'best' if lr is None else format(lr, 'g')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_seeds(by_rate: dict[float, list[Row]], run: Run) -> list[list[float]]:
    """Final training losses by learning rate, upwards, and by seed; a run that diverged counts as guessing."""
    guessing = math.log(run.task.data.classes)
    ends = [sorted(by_rate[lr], key=lambda row: row["seed"]) for lr in sorted(by_rate)]
    return [[guessing if math.isnan(x := row["train_loss"]) else min(x, guessing) for row in end] for end in ends]


def interval(values: Sequence[float], unit: str = "", sign: str = "+") -> str:
    """Mean and Student's 95 % interval over seeds, of one seed the number alone."""
    if any(math.isnan(v) for v in values):
        return "diverged"
    digits = 1 if unit else 3
    around = f" ± {half_width(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{around}{unit}"


def best_and_grid(by_rate: dict[float, list[Row]], run: Run) -> tuple[list[float], list[float]]:
    """Seed by seed the loss at the best learning rate, and its mean over all rates."""
    losses = over_seeds(by_rate, run)
    return losses[sorted(by_rate).index(best(by_rate))], [mean(seed) for seed in zip(*losses, strict=True)]


def half_width(values: Sequence[float]) -> float:
    """Of Student's 95 % interval over two seeds or more."""
    quantiles = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
    return quantiles[len(values)] * stdev(values) / len(values) ** 0.5


def overview(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    """Markdown: settings against methods, the training loss at the best learning rate."""
    final = final_rows(rows)
    names = list(dict.fromkeys(run.name for run in runs))
    lines = [
        "Training loss at the best learning rate, mean ± Student's 95 % interval over seeds.\n",
        f"| start | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for setting in dict.fromkeys(run.setting for run in runs):
        cells = []
        for name in names:
            end = (
                [row["train_loss"] for row in final[setting, name][best(final[setting, name])]]
                if (setting, name) in final
                else []
            )
            cells.append(interval(end, sign="") if end else "")
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    """Markdown: the best of the grid and the mean over the grid, and differences from the plain optimizer's."""
    final = final_rows(rows)
    chosen = {(run.setting, run.name): run for run in runs}
    lines = [
        "*best*: the training loss at the learning rate where it is least. *grid*: the mean over all rates, where a "
        "run that\ndiverged, or is worse than guessing, counts as guessing. Differences are from SGD, AdamW or RMSprop "
        "as they are, seed by\nseed, with Student's 95 % intervals; negative is better.\n*limited*"
        " counts the path ratios that `max_ratio` limited."
    ]
    for setting in dict.fromkeys(run.setting for run in runs):
        lines += ["", f"**{setting}**", ""]
        lines.append("| method | best | difference | grid | difference | lr | test error | test loss | limited |")
        lines.append("|---" * 9 + "|")
        for name in dict.fromkeys(run.name for run in runs if run.setting == setting):
            run, own = chosen[setting, name], final[setting, name]
            ours = best_and_grid(own, run)
            differences = ["", ""]
            if name != run.method.family and (setting, run.method.family) in final:
                plain = best_and_grid(final[setting, run.method.family], run)
                pairs = [list(zip(*pair, strict=True)) for pair in zip(ours, plain, strict=True)]
                differences = [interval([a - b for a, b in pair]) for pair in pairs]
            end = own[best(own)]
            diverged = loss_of(end) == math.inf
            cells = ["diverged" if diverged else spread(ours[0]), differences[0], spread(ours[1]), differences[1]]
            cells.append("" if diverged else f"{best(own):g}")
            cells += [spread([100 * row["test_error"] for row in end], " %"), spread([r["test_loss"] for r in end])]
            cells.append(f"{mean(row['clamped'] for row in end):g}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plain_numbers(panel: Axes) -> None:
    """On logarithmic axes: the rates, and powers of 10, or more where fewer than two of these are in sight."""
    panel.set_xticks(sorted({rate for line in panel.lines for rate in line.get_xdata()}))
    panel.set_xticks([], minor=True)
    panel.xaxis.set_major_formatter("{x:g}")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("" if high > 10 * low else "{x:.2g}" if high > 1.5 * low else "{x:.3g}")


def against_rate(runs: Sequence[Run], rows: Sequence[Row], path: Path) -> None:
    """Final training loss against the learning rate: mean and range over seeds, a row of panels per family."""
    final = final_rows(rows)
    chosen = {(run.setting, run.name): run for run in runs}
    settings = list(dict.fromkeys(setting for setting, _ in final))
    families = list(dict.fromkeys(run.method.family for run in runs))
    figure = Figure(figsize=(3.4 * len(settings) + 0.6, 2.9 * len(families) + 0.8), layout="constrained")
    panels = figure.subplots(len(families), len(settings), sharey=True, squeeze=False)
    for (row, family), (column, setting) in product(enumerate(families), enumerate(settings)):
        panel = panels[row, column]
        for name in (n for at, n in final if at == setting and chosen[at, n].method.family == family):
            losses = over_seeds(final[setting, name], chosen[setting, name])
            style = _role(name, chosen[setting, name])
            rates = sorted(final[setting, name])
            panel.plot(rates, [mean(x) for x in losses], label=name, markersize=4, **style)
            low, high = ([of(x) for x in losses] for of in (min, max))
            panel.fill_between(rates, low, high, color=style["color"], alpha=0.15, linewidth=0)
        panel.set(xscale="log", yscale="log", xlabel="learning rate")
        panel.grid(alpha=0.25, which="both")
        plain_numbers(panel)
        if column == 0:
            panel.set_ylabel("training loss (nats)")
            panel.legend(frameon=False, fontsize="x-small")
        if row == 0:
            panel.set_title(setting.replace("; ", "\n"), fontsize="small")
    save(figure, path)


def against_start(runs: Sequence[Run], rows: Sequence[Row], path: Path) -> None:
    """What one function is trained to from its own weights and from rescaled ones; mean and range over seeds."""
    final = final_rows(rows)
    chosen = {(run.setting, run.name): run for run in runs}
    tasks = list(dict.fromkeys(run.setting.split("; ")[0] for run in runs))
    families = list(dict.fromkeys(run.method.family for run in runs))
    figure = Figure(figsize=(4.6 * len(families), 3.4 * len(tasks) + 0.6), layout="constrained")
    panels = figure.subplots(len(tasks), len(families), squeeze=False, sharey="row")
    looks = {0.0: ("-", 1.5), 1.0: ("--", 2.5), 2.0: (":", 3.5)}
    for (setting, name), run in chosen.items():
        if run.method.balance is not None or run.method.conditioned or "rule" in run.method.options:
            continue
        task, start = setting.split("; ")
        panel = panels[tasks.index(task), families.index(run.method.family)]
        losses, rates = over_seeds(final[setting, name], run), sorted(final[setting, name])
        style, width = looks[run.task.rescaled]
        colour = _role(name, run)["color"]
        line, label = [mean(x) for x in losses], f"{name}, {start}"
        panel.plot(rates, line, style, marker=".", color=colour, linewidth=width, label=label)
        low, high = ([of(x) for x in losses] for of in (min, max))
        panel.fill_between(rates, low, high, color=colour, alpha=0.1, linewidth=0)
        panel.set(xscale="log", yscale="log", xlabel="learning rate", title=task)
        plain_numbers(panel)
        panel.grid(alpha=0.25)
    for panel in panels[:, 0]:
        panel.set_ylabel("training loss (nats)")
    for panel in panels[-1]:
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, fontsize="small")
    save(figure, path)


def _role(name: str, run: Run) -> dict[str, Any]:
    """What plain, balanced and path-space lines look like, whatever their family."""
    if name == run.method.family:
        return {"color": "#d62728", "marker": "o"}
    if run.method.optimizer in ("Muon", "LoRA-RITE"):
        return (
            {"color": "#777777", "marker": "x"} if run.method.balance is None else {"color": "#aaaaaa", "marker": "+"}
        )
    if run.method.balance is not None:
        return {"color": "#ff9e1b", "marker": "s"} if run.method.balance == 0 else {"color": "#8c6d31", "marker": "D"}
    if run.method.conditioned:
        return {"color": "#b0419f", "marker": "P"}
    rule = run.method.options.get("rule", "modulo")
    return {"color": "#1f4e9c", "marker": "v"} if rule == "modulo" else {"color": "#3aa6a0", "marker": "^"}


def curves(rows: Sequence[Row], title: str, path: Path) -> None:
    """Training loss and test error over epochs, at the best learning rate of every method; mean over seeds."""
    final = final_rows(rows)
    settings = list(dict.fromkeys(setting for setting, _ in final))
    figure = Figure(figsize=(max(9, 3.6 * len(settings) + 0.6), 6.4), layout="constrained")
    panels = figure.subplots(2, len(settings), sharex=True, squeeze=False)
    colours = _colours(final)
    for column, setting in enumerate(settings):
        for name in (name for at, name in final if at == setting):
            lr = best(final[setting, name])
            chosen = [r for r in rows if (r["setting"], r["method"], r["lr"]) == (setting, name, lr)]
            epochs = sorted({r["epoch"] for r in chosen})
            for panel, quantity, factor in zip(panels[:, column], ("train_loss", "test_error"), (1, 100), strict=True):
                y = [factor * mean(r[quantity] for r in chosen if r["epoch"] == epoch) for epoch in epochs]
                panel.plot(epochs, y, **colours[name], markersize=3, label=name)
        panels[0, column].set_title(setting, fontsize="medium")
        panels[0, column].set_yscale("log")
        panels[1, column].set(xlabel="epoch")
    _finish(figure, panels, title, path)


def wide(values: Iterable[float]) -> bool:
    """Whether an axis of these numbers should be logarithmic."""
    finite = [v for v in values if math.isfinite(v)]
    return min(finite) > 0 and max(finite) > 8 * min(finite)


def against_setting(rows: Sequence[Row], x_label: str, title: str, path: Path) -> None:
    """Final training loss and test error of every method at its best learning rate, against the number of a setting.

    A setting is called "h = 8", or "network, h = 8": every network has its panels.
    """
    final = final_rows(rows)
    x = {setting: float(setting.split(" = ")[1]) for setting, _ in final}
    network = {setting: setting.split(" = ")[0].rpartition(", ")[0] for setting in x}
    networks = list(dict.fromkeys(network.values()))
    figure = Figure(figsize=(9, 1 + 3.6 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), 2, squeeze=False)
    colours = _colours(final)
    for (row, own), name in product(enumerate(networks), colours):
        at = sorted((s for s, method in final if method == name and network[s] == own), key=x.__getitem__)
        ends = [final[setting, name][best(final[setting, name])] for setting in at]
        for panel, quantity, factor in zip(panels[row], ("train_loss", "test_error"), (1, 100), strict=True):
            values = [[factor * row[quantity] for row in end] for end in ends]
            deviations = [deviation(v) for v in values]
            positions = [x[setting] for setting in at]
            panel.errorbar(positions, [mean(v) for v in values], deviations, **colours[name], markersize=3, label=name)
    losses = [row["train_loss"] for by_rate in final.values() for row in by_rate[best(by_rate)]]
    ticks = sorted(set(x.values()))
    positive = [v for v in ticks if v > 0]
    for own, (loss, error) in zip(networks, panels, strict=True):
        loss.set_yscale("log" if wide(losses) else "linear")
        for panel in (loss, error):
            panel.set(xlabel=x_label, title=own)
            if wide(positive):
                panel.set_xscale("symlog", linthresh=positive[0])  # 0 has its place
            panel.set_xticks(ticks, [f"{v:g}" for v in ticks], rotation=60 if len(ticks) > 8 else 0)
            panel.minorticks_off()
    _finish(figure, panels.T, title, path)


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 64 colours: a quarter of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    Image.open(buffer).quantize(64).save(path, optimize=True)


def _colours(final: Final) -> dict[str, dict[str, Any]]:
    """A line per method: SGD in reds to yellows, G-SGD in blues to greens, the others grey."""
    names = list(dict.fromkeys(name for _, name in final))
    kinds = {
        "autumn": [n for n in names if n.startswith("SGD")],
        "viridis": [n for n in names if n.startswith("G-SGD")],
        "Greys_r": [n for n in names if not n.startswith(("SGD", "G-SGD"))],
    }
    colour = {n: colormaps[kind](0.8 * i / len(own)) for kind, own in kinds.items() for i, n in enumerate(own)}
    return {n: {"color": colour[n], "marker": marker} for n, marker in zip(names, cycle("osv^D<>XP*dph"), strict=False)}


def _finish(figure: Figure, panels: NDArray[Any], title: str, path: Path) -> None:
    for row, label in zip(panels, ("training loss (nats)", "test error (%)"), strict=True):
        row[0].set_ylabel(label)
    for panel in panels.flat:
        panel.grid(alpha=0.25)
    figure.suptitle(title, fontsize="medium", wrap=True)
    unique = {
        label: line for panel in panels.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    save(figure, path)
