"""Draw docs/ladder.png: held-out accuracy against completions, one panel per block, with a label at each curve's end.

python -m benchmarks.ladder.picture            from the results, after python -m benchmarks.ladder
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.common import ROOT
from benchmarks.ladder.measure import TARGET
from benchmarks.ladder.raw import Columns, read_raw
from benchmarks.ladder.rows import BLOCKS, ROWS, Block
from benchmarks.ladder.schedule import Plan, seed_part
from grpo.run.plots import CYCLE, STYLES

PICTURE = ROOT / "docs" / "ladder.png"
COLUMNS = 2  # number of panels per row
LOWEST = 0.7  # accuracy at which the axis begins, if every curve ends above it
APART = 0.072  # minimum distance of two labels, as a fraction of the panel's height

Curve = list[tuple[float, float]]  # thousands of completions, held-out accuracy


def curve_of(columns: Columns) -> Curve:
    """The evaluations of one run."""
    completions = columns["num_completions"]
    pairs = zip(completions, columns["eval/accuracy"], strict=True)
    return [((sampled or 0) / 1000, accuracy) for sampled, accuracy in pairs if accuracy is not None]


def mean_and_band(curves: Sequence[Curve]) -> list[tuple[float, float, float, float]]:
    """(completions, mean, lowest, highest) at each evaluation that every seed has.

    >>> mean_and_band([[(0.0, 0.2), (1.0, 0.5)], [(0.0, 0.4), (1.2, 0.7)]])[1]
    (1.1, 0.6, 0.5, 0.7)
    """
    points = []
    for evaluations in zip(*curves, strict=False):
        completions, accuracies = zip(*evaluations, strict=True)
        middle = sum(accuracies) / len(accuracies)
        points.append((sum(completions) / len(completions), middle, min(accuracies), max(accuracies)))
    return points


def spread_out(heights: Sequence[float], apart: float) -> list[float]:
    """Heights for labels, in the same order. A label is moved down if it is closer than `apart` to the one above.

    >>> [round(height, 2) for height in spread_out([0.5, 0.98, 0.99], 0.1)]
    [0.5, 0.89, 0.99]
    """
    placed = list(heights)
    ceiling = 1.0
    for index in sorted(range(len(heights)), key=lambda index: -heights[index]):
        placed[index] = min(heights[index], ceiling)
        ceiling = placed[index] - apart
    return placed


def draw(raw: dict[str, Columns], path: Path) -> None:
    """The picture, in 64 colours."""
    num_rows = -(-len(BLOCKS) // COLUMNS)
    figure = Figure(figsize=(11, 2.9 * num_rows), dpi=100)
    figure.subplots_adjust(left=0.055, right=0.835, top=0.97, bottom=0.035, wspace=0.68, hspace=0.36)
    panels = list(figure.subplots(num_rows, COLUMNS, squeeze=False).flat)
    for axis, block in zip(panels, BLOCKS.values(), strict=False):
        draw_block(axis, block, raw)
    for axis in panels[len(BLOCKS) :]:
        axis.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


def draw_block(axis: Axes, block: Block, raw: dict[str, Columns]) -> None:
    """Draw the mean over the seeds, and the band from the lowest to the highest seed."""
    axis.set_title(block.title, fontsize=11)
    axis.set_ylabel("held-out accuracy", labelpad=2)
    axis.set_xlabel("thousand completions", labelpad=1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.axhline(TARGET, color="black", linewidth=0.6, alpha=0.5)
    ends = []
    for number, name in enumerate(block.rows):
        runs = [raw[part] for seed in Plan.seeds if (part := seed_part(ROWS[name], seed)) in raw]
        points = mean_and_band([curve_of(columns) for columns in runs])
        if not points:
            continue
        colour, style = CYCLE[number % len(CYCLE)], STYLES[number // len(CYCLE) % len(STYLES)]
        completions, middle, low, high = (list(values) for values in zip(*points, strict=True))
        axis.fill_between(completions, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(completions, middle, color=colour, linestyle=style, linewidth=1.4)
        ends.append((name, colour, style, completions[-1], middle[-1]))
    axis.margins(x=0)
    bottom = LOWEST if all(end[-1] > LOWEST for end in ends) else 0.0  # the curves differ mostly near the top
    axis.set_ylim(bottom, 1 + 0.02 * (1 - bottom))
    apart = APART * (1 - bottom)
    right = max((last for *_, last, _ in ends), default=1.0)
    for (name, colour, style, last, height), label in zip(
        ends, spread_out([end[-1] for end in ends], apart), strict=True
    ):
        axis.annotate(
            name,
            (last, height),
            (right * 1.05, label),
            color=colour,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linestyle": style,
                "linewidth": 1.0,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),  # the line ends where the name begins
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PICTURE)
    path = parser.parse_args().output
    draw(read_raw(), path)
    print(path)


if __name__ == "__main__":
    main()
