"""The results as Markdown: one table per block, a sentence for each row, the learning-rate grid and the comparisons.

`python -m benchmarks.readme` puts them into docs/ABLATIONS.md and docs/ALGORITHM.md.
"""

import math
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

from benchmarks.ladder.intervals import paired_interval, t_interval
from benchmarks.ladder.rows import BLOCKS, COMPARISONS, ROWS, TOP, Row
from benchmarks.ladder.schedule import Parts, Plan, chosen_rate, grid_part, grid_score, seed_part
from benchmarks.ladder.shows import SHOWS

NOTHING = "–"
Runs = dict[int, dict[str, Any]]  # seed -> result


def runs_of(parts: Parts, row: Row) -> Runs:
    """The row's runs at the best rate of the grid, without those that failed."""
    rate = chosen_rate(parts, row)
    if rate is None:
        return {}
    parts_of_row = {seed: parts.get(seed_part(row, seed), {"error": ""}) for seed in Plan.seeds}
    asked = f"--learning_rate={rate:g}"
    return {seed: part for seed, part in parts_of_row.items() if "error" not in part and asked in part["command"]}


def errors_of(parts: Parts, row: Row) -> list[str]:
    """The errors of the failed runs: of the seeds, or of the grid if all of its runs failed."""
    failed = [parts[seed_part(row, seed)] for seed in Plan.seeds if "error" in parts.get(seed_part(row, seed), {})]
    if not failed and not runs_of(parts, row):
        before = [grid_part(row, rate, seed) for rate in Plan.rates for seed in Plan.tuning_seeds]
        failed = [parts[name] for name in before if "error" in parts.get(name, {})]
    return [part["error"] for part in failed]


def accuracy(parts: Parts, row: Row) -> str:
    """Mean and 95 % interval over the seeds, within [0, 1]. Failed runs are listed."""
    runs, errors = runs_of(parts, row), errors_of(parts, row)
    cells = []
    if runs:
        middle, low, high = t_interval([run["accuracy"] for run in runs.values()])
        cells.append(f"{middle:.3f} [{max(low, 0):.3f}, {min(high, 1):.3f}]")
        if len(runs) < len(Plan.seeds) - len(errors):
            cells.append(f"{len(runs)} of {len(Plan.seeds)} seeds")
    if errors:
        cells.append(f"{len(errors)} failed: {errors[0]}".replace("|", "\\|"))
    return ", ".join(cells) or "not measured"


def over_the_run(runs: Runs) -> str:
    """Held-out accuracy averaged over the run: mean and 95 % interval over the seeds."""
    if not runs:
        return NOTHING
    middle, low, high = t_interval([run["held_out_mean"] for run in runs.values()])
    return f"{middle:.3f} [{max(low, 0):.3f}, {min(high, 1):.3f}]"


def reached(runs: Runs) -> tuple[str, str]:
    """Thousands of completions and seconds up to 0.95 held-out accuracy: medians over the seeds that reached it."""
    arrived = [run["reached"] for run in runs.values() if run["reached"] is not None]
    if not arrived:
        return (f"0 of {len(runs)}", NOTHING) if runs else (NOTHING, NOTHING)
    note = "" if len(arrived) == len(runs) else f" ({len(arrived)} of {len(runs)})"
    completions = median(run["completions"] for run in arrived) / 1000
    return f"{completions:.1f}{note}", f"{median(run['seconds'] for run in arrived):.1f}"


def average(runs: Runs, key: str, form: str) -> str:
    return f"{mean(run[key] for run in runs.values()):{form}}" if runs else NOTHING


def rate_of(parts: Parts, row: Row) -> str:
    rate = chosen_rate(parts, row)
    return NOTHING if rate is None else scientific(rate)


def scientific(rate: float) -> str:
    """A number in short scientific notation.

    >>> scientific(0.00015)
    '1.5e-4'
    """
    digits, exponent = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def markdown(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [heading, ["---"] * len(heading), *lines])


def block(parts: Parts, name: str) -> str:
    """The table of one block, followed by a sentence for each row."""
    heading = [
        "row", "one idea more", "than", "rate", "accuracy [95 %]", "over the run [95 %]", "1000 completions to 0.95",
        "seconds to 0.95", "tokens", "KL", "1000 completions in all", "seconds in all",
    ]  # fmt: skip
    lines, sentences = [], []
    for row in (ROWS[name] for name in BLOCKS[name].rows):
        runs = runs_of(parts, row)
        lines.append(
            [
                f"`{row.name}`",
                row.idea,
                f"`{row.after}`" if row.after else NOTHING,
                rate_of(parts, row),
                accuracy(parts, row),
                over_the_run(runs),
                *reached(runs),
                average(runs, "mean_length", ".1f"),
                average(runs, "kl_per_answer", ".2f"),
                f"{mean(run['num_completions'] for run in runs.values()) / 1000:.1f}" if runs else NOTHING,
                average(runs, "training_seconds", ".1f"),
            ]
        )
        sentences.append(f"- `{row.name}`: {SHOWS.get(row.name, NOTHING)}{twin(parts, row)}")
    return f"{markdown(heading, lines)}\n\n" + "\n".join(sentences)


def twin(parts: Parts, row: Row) -> str:
    """Text on whether a row that must equal another row does so."""
    if row.equals is None:
        return ""
    ours, theirs = runs_of(parts, row), runs_of(parts, ROWS[row.equals])
    both = ours.keys() & theirs.keys()
    same = sum(ours[seed]["metrics_sha256"] == theirs[seed]["metrics_sha256"] for seed in both)
    return f" Every number of its metrics but the times equals that of `{row.equals}` in {same} of {len(both)} seeds."


def top(parts: Parts) -> str:
    """The rows that docs/ALGORITHM.md shows, and a sentence for each of them."""
    lines = [
        [
            f"`{row.name}`",
            row.idea,
            rate_of(parts, row),
            accuracy(parts, row),
            over_the_run(runs_of(parts, row)),
            reached(runs_of(parts, row))[0],
            average(runs_of(parts, row), "kl_per_answer", ".2f"),
        ]
        for row in (ROWS[name] for name in TOP)
    ]
    heading = [
        "row", "what", "learning rate", "accuracy [95 %]", "accuracy over the run [95 %]", "1000 completions to 0.95",
        "KL, nats per answer",
    ]  # fmt: skip
    sentences = [f"- `{name}`: {SHOWS.get(name, NOTHING)}" for name in TOP]
    return f"{markdown(heading, lines)}\n\n" + "\n".join(sentences)


def grid(parts: Parts) -> str:
    """The scores of all learning rates of every row on the tuning seeds, with the chosen rate in bold."""
    lines = []
    for row in ROWS.values():
        chosen = chosen_rate(parts, row)
        cells = []
        for rate in Plan.rates if row.rate_of is None else ():
            score = grid_score(parts, row, rate, Plan())
            cell = NOTHING if score is None else f"{score:.3f}"
            cells.append(f"**{cell}**" if rate == chosen else cell)
        lines.append([f"`{row.name}`", *(cells or [f"as `{row.rate_of}`", "", ""])])
    return markdown(["row", *map(scientific, Plan.rates)], lines)


def comparisons(parts: Parts) -> str:
    """Paired differences over the same seeds, in final accuracy and in accuracy over the run."""
    lines = []
    for first, second in COMPARISONS:
        ours, theirs = runs_of(parts, ROWS[first]), runs_of(parts, ROWS[second])
        both = sorted(ours.keys() & theirs.keys())
        cells = [difference(ours, theirs, both, key) if both else NOTHING for key in ("accuracy", "held_out_mean")]
        lines.append([f"`{first}`", f"`{second}`", *cells, f"{len(both)}"])
    return markdown(["row", "less row", "accuracy [95 %]", "over the run [95 %]", "seeds"], lines)


def difference(ours: Runs, theirs: Runs, seeds: Sequence[int], key: str) -> str:
    """Mean of the paired differences with its interval, in bold if the interval excludes 0."""
    middle, low, high = paired_interval(*([runs[seed][key] for seed in seeds] for runs in (ours, theirs)))
    if not math.isfinite(low):
        return f"{middle:+.3f}"
    text = f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"
    return text if low <= 0 <= high else f"**{text}**"


def provenance(parts: Parts) -> str:
    """The machine and the versions with which the numbers were measured."""
    commits = sorted({part["commit"][:7] + "+changes" * part["commit"].endswith("+changes") for part in parts.values()})
    hours = sum(part.get("seconds", 0.0) for part in parts.values()) / 3600
    return f"{len(parts)} measurements, {hours:.1f} hours of one thread, at commit {', '.join(commits)}."


RENDER: dict[str, Callable[[Parts], str]] = {  # the blocks of docs/ABLATIONS.md
    **{f"ladder:{name}": lambda parts, name=name: block(parts, name) for name in BLOCKS},  # type: ignore[misc]
    "ladder:comparisons": comparisons,
    "ladder:grid": grid,
    "ladder:provenance": provenance,
}
