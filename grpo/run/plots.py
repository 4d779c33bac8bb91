"""Plots from metrics.jsonl: training_curves.png of one run, or a comparison of several runs.

python -m grpo.run.plots checkpoints                          redraws checkpoints/training_curves.png
python -m grpo.run.plots run_a run_b --output comparison.png  one colour per run
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grpo.errors import InputError, RunError, errors_explained, unreadable
from grpo.files import read_jsonl

Rows = Sequence[dict[str, Any]]

# The colours of Okabe and Ito are distinguishable with every common colour blindness (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
)  # fmt: skip
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)

STYLES = ("-", "--", ":", "-.")  # distinguish runs when colours repeat


def draw_curves(rows: Rows, path: Path) -> None:
    """Draw the training curves of one run from its rows."""
    figure, axes = _grid()
    reward, length, divergence, loss, signal, answers = axes

    _name(reward, "Reward and held-out accuracy", "reward, share right")
    _line(reward, rows, "reward", BLUE, "samples")
    _accuracy(reward, rows, VERMILLION, "held-out, 95 % interval")

    _name(length, "Completion length", "tokens")
    _line(length, rows, "completions/mean_length", BLUE, "samples")
    _line(length, rows, "eval/mean_length", VERMILLION, "held-out, greedy", marker=".")
    length.set_ylim(bottom=0)

    _name(divergence, "KL and entropy", "nats a token")
    _line(divergence, rows, "kl", VERMILLION, "KL to the reference")
    _line(divergence, rows, "entropy", BLUE, "entropy")
    divergence.set_ylim(bottom=min(0, divergence.get_ylim()[0]))  # the k1 estimate may be negative

    _name(loss, "Loss and gradient norm", "loss")
    _line(loss, rows, "loss", BLUE, "loss")
    norm = loss.twinx()
    norm.spines.top.set_visible(False)
    _line(norm, rows, "grad_norm", ORANGE, "gradient norm, right axis")
    norm.set_ylim(bottom=0)

    if any("value_loss" in row for row in rows):  # PPO has a critic and no groups (examples/train_ppo.py)
        _name(signal, "The critic", "value loss, share of variance")
        _line(signal, rows, "value_loss", BLUE, "value loss")
        _line(signal, rows, "value/explained_variance", VERMILLION, "explained variance")
    else:
        _name(signal, "Groups with signal: rewards differ", "share of groups")
        informative = [
            row | {"signal": 1 - row["frac_reward_zero_std"]} for row in rows if "frac_reward_zero_std" in row
        ]
        _line(signal, informative, "signal", BLUE)
        signal.set_ylim(-0.03, 1.03)

    _name(answers, "How sampled answers end", "share of completions")
    outcomes = {"right": GREEN, "wrong": VERMILLION, "none": SKY, "truncated": BLACK}
    shared = [row for row in rows if "answers/right" in row]
    answers.stackplot(
        [row["step"] for row in shared],
        [[row[f"answers/{name}"] for row in shared] for name in outcomes],
        labels=["right", "wrong", "no answer", "truncated"],
        colors=list(outcomes.values()),
        alpha=0.75,
        linewidth=0,
    )
    answers.set_ylim(0, 1)

    for axis in axes:
        _legend(axis, *([norm] if axis is loss else []))
    _save(figure, path)


def draw_comparison(runs: Mapping[str, Rows], path: Path) -> None:
    """Draw several runs in one figure. `runs`: name -> rows."""
    figure, axes = _grid()
    panels = [
        ("Reward of the samples", "reward", "reward"),
        ("Held-out accuracy, 95 % interval", "share right", "eval/accuracy"),
        ("Completion length", "tokens", "completions/mean_length"),
        ("KL to the reference", "nats a token", "kl"),
        ("Entropy", "nats a token", "entropy"),
        ("Gradient norm", "gradient norm", "grad_norm"),
    ]
    for axis, (title, unit, metric) in zip(axes, panels, strict=True):
        _name(axis, title, unit)
        for number, (name, rows) in enumerate(runs.items()):
            colour, style = CYCLE[number % len(CYCLE)], STYLES[number // len(CYCLE) % len(STYLES)]
            if metric == "eval/accuracy":
                _accuracy(axis, rows, colour, name, linestyle=style)
            else:
                _line(axis, rows, metric, colour, name, linestyle=style)
        _legend(axis)
    _save(figure, path)


def _grid() -> tuple[Figure, list[Axes]]:
    """2 x 3 empty panels, at a size that is legible at the width of a README."""
    figure = Figure(figsize=(11, 7), dpi=100)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.955, bottom=0.13, wspace=0.36, hspace=0.5)
    axes = list(figure.subplots(2, 3).flat)
    for axis in axes:
        axis.set_xlabel("step", labelpad=1)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.02)
    return figure, axes


def _name(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_ylabel(unit, labelpad=2)


def _series(rows: Rows, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the metric; NaN (null in the file) leaves a gap."""
    found = [(row["step"], math.nan if row[metric] is None else row[metric]) for row in rows if metric in row]
    return [step for step, _ in found], [value for _, value in found]


def _line(axis: Axes, rows: Rows, metric: str, colour: str, label: str | None = None, **style: Any) -> None:
    steps, values = _series(rows, metric)
    if steps:
        axis.plot(steps, values, color=colour, label=label, linewidth=1.4, **style)


def _accuracy(axis: Axes, rows: Rows, colour: str, label: str, **style: Any) -> None:
    steps, low = _series(rows, "eval/accuracy_low")
    if steps:
        axis.fill_between(steps, low, _series(rows, "eval/accuracy_high")[1], color=colour, alpha=0.3, linewidth=0)
        _line(axis, rows, "eval/accuracy", colour, label, marker=".", **style)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))


def _legend(axis: Axes, *others: Axes) -> None:
    """Draw a legend below the panel, where it covers nothing. `others`: further axes of the same panel."""
    parts = [part.get_legend_handles_labels() for part in (axis, *others)]
    handles = [handle for part in parts for handle in part[0]]
    labels = [label for part in parts for label in part[1]]
    if handles:
        columns = 2 if len(handles) < 9 else 3
        style: dict[str, Any] = {"fontsize": 9, "frameon": False, "columnspacing": 1.2, "handlelength": 1.6}
        axis.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, **style)


def _save(figure: Figure, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")  # a viewer may have the old file open
    try:
        figure.savefig(unfinished, format="png")
        unfinished.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error


def _read_run(folder: Path) -> Rows:
    path = folder / "metrics.jsonl"
    try:
        rows = read_jsonl(path)
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    if not rows or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise InputError(f'{path}: not the metrics of a run: expected JSON objects with "step"')
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="picture to write (one run: its own; else comparison.png)"
    )
    arguments = parser.parse_args()
    runs = {str(folder): _read_run(folder) for folder in arguments.runs}
    if len(arguments.runs) == 1:
        path = arguments.output or arguments.runs[0] / "training_curves.png"
        draw_curves(next(iter(runs.values())), path)
    else:
        path = arguments.output or Path("comparison.png")
        draw_comparison(runs, path)
    print(path)


if __name__ == "__main__":
    with errors_explained():
        main()
