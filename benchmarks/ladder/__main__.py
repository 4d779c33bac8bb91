"""Measure every row of benchmarks/ladder/rows.py, on the same base models and with the same number of completions.

    python -m benchmarks.ladder                              all rows, about an hour and a half on two cores
    python -m benchmarks.ladder --rows grpo dapo --seeds 0   some rows and seeds
    python -m benchmarks.ladder --list                       print the rows and their flags
    python -m benchmarks.ladder --smoke                      test that every row runs: two steps each, own results

Every row trains at three learning rates on the seeds 100 and 101, then on seeds 0 to 4 at the best rate; seed =
base_seed. Two runs are active at a time, with one thread each. If you stop a ladder, the same command continues it.
Runs that failed, or that were measured with other code or flags, are repeated. Results go to
benchmarks/results/ladder.json and ladder_metrics.json.xz. `python -m benchmarks.ladder.picture` and
`python -m benchmarks.readme` then show them.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import RESULTS, ROOT
from benchmarks.ladder.raw import RAW, pack
from benchmarks.ladder.rows import ROWS, all_flags, measured_as
from benchmarks.ladder.schedule import SMOKE, Ladder, Plan, results_in


def listing() -> str:
    """Every row with its command, without the learning rate and the seed."""
    lines = []
    for row in ROWS.values():
        flags = " ".join(f"--{key} {_quoted(value)}" for key, value in all_flags(row).items())
        same = measured_as(row)
        notes = [f"the same runs as {same.name}"] if same is not row else []
        notes += [f'in a copy of the project with the mutant "{row.mutant}"'] if row.mutant else []
        notes += ["as many steps as the budget allows"] if row.fits_budget else []
        lines.append(f"{row.name:26} python {row.script} {flags}".rstrip() + f"  ({'; '.join(notes)})" * bool(notes))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    return f'"{value}"' if " " in str(value) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--smoke", action="store_true", help="two steps at one rate on one seed, a hardly trained base")
    parser.add_argument("--work", type=Path, default=ROOT / "checkpoints-ladder", help="folder for the runs themselves")
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print(listing())
        return
    work = chosen.work.resolve()
    plan, folder, raw = Plan(), RESULTS, RAW
    if chosen.smoke:
        plan, work = SMOKE, work / "smoke"
        folder, raw = work, work / RAW.name
    os.environ.setdefault("GRPO_CACHE", str(work / "cache"))
    ladder = Ladder(dataclasses.replace(plan, seeds=tuple(chosen.seeds or plan.seeds)), results_in(folder), work)
    try:
        ladder.run([ROWS[name] for name in chosen.rows], ladder.plan.seeds)
    finally:
        pack(ladder.results.parts, work, raw)
    failed = [name for name, part in ladder.results.parts.items() if "error" in part]
    if failed:
        print(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
