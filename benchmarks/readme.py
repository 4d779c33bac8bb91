"""Write measured numbers from benchmarks/results into README.md and docs/, so that nobody types them.

    python -m benchmarks.readme            rewrite the marked blocks
    python -m benchmarks.readme --check    exit 1 if a block differs from the results

A block is the text between `<!-- FILE:NAME -->` and `<!-- /FILE:NAME -->`. FILE is the result file without folder and
ending. The algorithm table has no FILE: it is rendered from code. docs/SETTINGS.md is generated from config.yaml.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import floor, logprobs, sampler, scaling, vs_trl
from benchmarks.common import ROOT
from benchmarks.ladder import table as ladder
from grpo.algorithms import markdown_table
from grpo.settings.page import settings_page

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
MAX_TOTAL = 50  # seconds: the bar for the default run as a whole
TUNED_ON, CONFIRMED_ON = range(5), range(5, 10)

Runs = dict[str, dict[str, Any]]


def collect(runs: Runs, kind: str, seeds: range, *path: str) -> list[float]:
    """One number per seed, e.g. collect(runs, "grpo", range(5), "final", "accuracy")."""
    found = []
    for seed in seeds:
        value: Any = runs[f"{kind}-{seed}"]
        for key in path:
            value = value[key]
        found.append(value)
    return found


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and range over seeds: "0.987 (0.980–0.994)"."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def headline(runs: Runs) -> str:
    """The list under the title."""
    seeds = range(10)
    base = mean(collect(runs, "grpo", seeds, "base", "accuracy"))
    final = mean(collect(runs, "grpo", seeds, "final", "accuracy"))
    style = [mean(collect(runs, "grpo", seeds, which, "worked_share")) for which in ("base", "final")]
    length = [mean(collect(runs, "grpo", seeds, which, "mean_length")) for which in ("base", "final")]
    seconds = mean(collect(runs, "grpo", seeds, "seconds", "total"))
    return (
        f"Measured on 2 CPU cores, mean of 10 seeds, {runs['grpo-0']['final']['n']} test problems each:\n\n"
        f"- accuracy: **{base:.2f} → {final:.3f}**\n"
        f"- answers that show their work: {style[0]:.0%} → {style[1]:.0%}\n"
        f"- tokens per answer: {length[0]:.1f} → {length[1]:.1f}\n"
        f"- total time: **{seconds:.0f} s**, including building the base model"
    )


def summary(runs: Runs) -> str:
    """Tuning seeds and held-back seeds side by side."""
    rows: list[tuple[str, Callable[[range], str]]] = [
        ("base: accuracy", lambda s: spread(collect(runs, "grpo", s, "base", "accuracy"))),
        ("base: pass@16 (temperature 1)", lambda s: spread(collect(runs, "grpo", s, "base", "pass_at_16"))),
        ("base: answers with worked steps", lambda s: spread(collect(runs, "grpo", s, "base", "worked_share"))),
        ("base: accuracy of the worked answers", lambda s: spread(collect(runs, "grpo", s, "base", "worked_accuracy"))),
        ("base: accuracy of the quick answers", lambda s: spread(collect(runs, "grpo", s, "base", "quick_accuracy"))),
        ("**GRPO: accuracy**", lambda s: f"**{spread(collect(runs, 'grpo', s, 'final', 'accuracy'))}**"),
        ("GRPO: answers with worked steps", lambda s: spread(collect(runs, "grpo", s, "final", "worked_share"))),
        (
            "GRPO: worked answers correct in every step",
            lambda s: spread(collect(runs, "grpo", s, "final", "worked_flawless")),
        ),
        ("GRPO: tokens per answer", lambda s: spread(collect(runs, "grpo", s, "final", "mean_length"), 1)),
        ("control, shuffled rewards: accuracy", lambda s: spread(collect(runs, "shuffled", s, "final", "accuracy"))),
        (
            "control, rejection sampling: accuracy",
            lambda s: spread(collect(runs, "rejection_sampling", s, "final", "accuracy")),
        ),
        (
            "control, rejection sampling: worked steps",
            lambda s: spread(collect(runs, "rejection_sampling", s, "final", "worked_share")),
        ),
        ("total time, s", lambda s: spread(collect(runs, "grpo", s, "seconds", "total"), 0)),
        ("peak memory, GB", lambda s: spread(collect(runs, "grpo", s, "peak_memory_gb"), 2)),
    ]
    lines = ["| | seeds 0–4 (tuned on) | seeds 5–9 (confirmed once) |", "|---|---|---|"]
    lines += [f"| {name} | {cell(TUNED_ON)} | {cell(CONFIRMED_ON)} |" for name, cell in rows]
    commits = sorted({run["commit"][:7] for run in runs.values()})
    return "\n".join([*lines, "", f"Measured at commit {', '.join(commits)}."])


def output(runs: Runs) -> str:
    """The output of the default run, without progress bars and most evaluations."""
    lines: list[str] = []
    for line in runs["grpo-0"]["printed"].strip().splitlines():
        step = re.match(r"step +(\d+)  held-out", line)
        if step and 30 <= int(step[1]) < 150:
            line = "…"
        if not (line == "…" and lines[-1] == "…"):
            lines.append(line)
    return "\n".join(["```text", "$ python train_grpo.py", *lines, "```"])


def seeds_table(runs: Runs) -> str:
    """The table of all seeds."""
    lines = [
        "| seed | base [95 %] | base pass@16 | GRPO [95 %] | worked: base → GRPO | flawless | tokens: base → GRPO "
        "| shuffled | rejection sampling | s: warm-up + rollout + update + evaluation = total | GB |",
        "|" + "---|" * 11,
    ]

    def with_interval(result: dict[str, Any]) -> str:
        return f"{result['accuracy']:.3f} [{result['accuracy_low']:.3f}, {result['accuracy_high']:.3f}]"

    for seed in [*TUNED_ON, *CONFIRMED_ON]:
        run = runs[f"grpo-{seed}"]
        base, final, seconds = run["base"], run["final"], run["seconds"]
        parts = [seconds[key] for key in ("warm_up", "rollout", "update", "evaluation")]
        lines.append(
            f"| {seed} | {with_interval(base)} | {base['pass_at_16']:.3f} | {with_interval(final)} "
            f"| {base['worked_share']:.2f} → {final['worked_share']:.2f} | {final['worked_flawless']:.3f} "
            f"| {base['mean_length']:.1f} → {final['mean_length']:.1f} "
            f"| {runs[f'shuffled-{seed}']['final']['accuracy']:.3f} "
            f"| {runs[f'rejection_sampling-{seed}']['final']['accuracy']:.3f} "
            f"| {' + '.join(f'{part:.0f}' for part in parts)} → {seconds['total']:.0f} | {run['peak_memory_gb']:.2f} |"
        )
    return "\n".join(lines)


def performance(runs: Runs) -> str:
    """The table of all measurements of speed and memory, with their bars."""
    trl, step = parts_of("vs_trl"), parts_of("floor")["step"]
    samples, chunks = parts_of("sampler"), parts_of("logprobs")
    lines = [
        "| | here | compared with | ratio | bar |",
        "|---|---|---|---|---|",
    ]

    def line(what: str, ours: str, other: str, ratio: float, bar: str, is_met: bool | None = None) -> None:
        verdict = {True: f"{bar}: met", False: f"{bar}: **not met**", None: bar}[is_met]
        lines.append(f"| {what} | {ours} | {other} | {ratio:.2f} | {verdict} |")

    total = median(collect(runs, "grpo", range(10), "seconds", "total"))
    verdict = "met" if total <= MAX_TOTAL else "**not met**"
    lines.append(
        f"| the whole default run, with building the base model | {total:.0f} s | | | <= {MAX_TOTAL} s: {verdict} |"
    )
    (_, step_bar, step_ratio, step_met), (_, to_bar, to_ratio, to_met) = vs_trl.bars(trl)
    ours, theirs = (trl["step"][side]["seconds"]["median"] for side in ("ours", "trl"))
    line("one training step", ms(ours), f"TRL {ms(theirs)}", step_ratio, step_bar, step_met)
    ours, theirs = (vs_trl.median_to_accuracy(trl["to_accuracy"], side) for side in ("ours", "trl"))
    what = f"training until {trl['to_accuracy']['target']} of the held-out problems are correct"
    line(what, f"{ours:.1f} s", f"TRL {theirs:.1f} s", to_ratio, to_bar, to_met)
    ours, theirs = (trl["memory"][side]["peak_memory_gb"] for side in ("ours", "trl"))
    line("peak memory of such a run", gb(ours), f"TRL {gb(theirs)}", ours / theirs, "")
    floors = {
        "plain": "one step, over bare model calls that share nothing",
        "made": "one step, over its own bare model calls",
    }
    for (_, bar, ratio, met), (name, what) in zip(floor.bars({"step": step}), floors.items(), strict=True):
        line(what, ms(step["ours"]["median"]), ms(step[name]["median"]), ratio, bar, met)
    for (what, bar, ratio, met), case in zip(sampler.bars(samples), samples.values(), strict=True):
        speeds = [f"{case['samplers'][side]['tokens_per_second']:,.0f} tokens/s" for side in ("ours", "generate")]
        line(what, speeds[0], f"`generate` {speeds[1]}", ratio, bar, met)
    tokens = logprobs.BAR_TOKENS
    peaks = [chunks[f"memory-{variant}-{tokens}"]["net_gb"] for variant in ("chunked", "full_logits")]
    times = [chunks[f"time-{tokens}"][variant]["median"] for variant in ("chunked", "full_logits")]
    (what, bar, ratio, met), (time_what, time_bar, time_ratio, time_met) = logprobs.bars(chunks)
    line(what, gb(peaks[0]), gb(peaks[1]), ratio, bar, met)
    line(time_what, f"{times[0]:.1f} s", f"{times[1]:.1f} s", time_ratio, time_bar, time_met)
    return "\n".join(lines)


def fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def gb(size: float) -> str:
    return f"{size:.2f} GB"


def parts_of(name: str) -> Runs:
    """The content of results/NAME.json."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        sys.exit(f"{path} is missing: run python -m benchmarks.{name}")
    return json.loads(path.read_text())["parts"]


BLOCKS: dict[Path, dict[str, Callable[[Runs], str]]] = {
    ROOT / "README.md": {
        "toy:headline": headline,
        "toy:output": output,
    },
    DOCS / "ALGORITHM.md": {
        "algorithms": lambda _: markdown_table(),
        "ladder:top": lambda _: ladder.top(parts_of("ladder")),
    },
    DOCS / "RESULTS.md": {"toy:summary": summary},
    DOCS / "SPEED.md": {"speed:bars": performance},
    ROOT / "benchmarks" / "README.md": {
        "toy:seeds": seeds_table,
        "scaling:axes": lambda _: fenced(
            "\n\n".join(scaling.axis_table(parts_of("scaling"), axis) for axis in scaling.AXES)
        ),
        "scaling:grid": lambda _: fenced(scaling.grid_table(parts_of("scaling")["grid"]["cells"])),
    },
    DOCS / "ABLATIONS.md": {
        name: lambda _, render=render: render(parts_of("ladder"))  # type: ignore[misc]
        for name, render in ladder.RENDER.items()
    },
    DOCS / "SETTINGS.md": {},
}


def rendered(path: Path) -> str:
    """The file with every block rendered from the results."""
    if path == DOCS / "SETTINGS.md":
        return settings_page()
    runs = parts_of("toy")
    text = path.read_text(encoding="utf-8")
    for name, render in BLOCKS[path].items():
        before, opening, rest = text.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition(f"<!-- /{name} -->")
        if not (opening and closing):
            raise SystemExit(f"{path} has no block {name}")
        text = f"{before}{opening}{render(runs)}\n{closing}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if the README is out of date")
    arguments = parser.parse_args()
    for path in BLOCKS:
        text = rendered(path)
        if text == path.read_text(encoding="utf-8"):
            continue
        if arguments.check:
            sys.exit(f"{path} does not say what {RESULTS} says: run python -m benchmarks.readme")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
