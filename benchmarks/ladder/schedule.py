"""The runs and their order: base models, a learning-rate grid for every row, then its seeds at the best rate.

Two runs are active at a time, with one thread each. Results that were measured with this code are kept. Failed runs are
repeated.
"""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import toy
from benchmarks.common import Results
from benchmarks.ladder import measure
from benchmarks.ladder.broken import broken_project, mutant_named
from benchmarks.ladder.measure import Job, build_base, perform
from benchmarks.ladder.rows import ROWS, Row, all_flags, measured_as

NUM_COMPLETIONS = 38_400  # in every run: 150 steps of 256 completions
Parts = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The settings that all rows share. The defaults are those of the experiment; other values are for trials."""

    rates: tuple[float, ...] = (1.5e-4, 5e-4, 1.5e-3)
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_train_steps: int = 150
    num_completions: int = NUM_COMPLETIONS
    base_steps: int = 900

    @property
    def middle_rate(self) -> float:
        return self.rates[len(self.rates) // 2]


SMOKE = Plan(
    rates=(5e-4,), tuning_seeds=(0,), seeds=(1,), num_train_steps=2, num_completions=512, base_steps=20
)  # a test that every row runs


def seed_part(row: Row, seed: int) -> str:
    return f"{measured_as(row).name} seed {seed}"


def grid_part(row: Row, rate: float, seed: int) -> str:
    return f"{measured_as(row).name} rate {rate:g} tuning {seed}"


def grid_score(parts: Parts, row: Row, rate: float, plan: Plan) -> float | None:
    """Held-out accuracy averaged over the run (`held_out_mean`) and the tuning seeds; None if one of them failed."""
    scores = [parts.get(grid_part(row, rate, seed), {}).get("held_out_mean") for seed in plan.tuning_seeds]
    return None if None in scores else mean(scores)


def chosen_rate(parts: Parts, row: Row, plan: Plan = Plan()) -> float | None:
    """The rate of the grid with the best score.

    Among equal scores, the rate nearest the middle of the grid wins, then the lower one. None: every rate failed.
    """
    if row.rate_of is not None:
        return chosen_rate(parts, ROWS[row.rate_of], plan)
    graded = {rate: grid_score(parts, row, rate, plan) for rate in plan.rates}
    scores = {rate: score for rate, score in graded.items() if score is not None}
    middle = plan.rates.index(plan.middle_rate)
    return min(scores, key=lambda rate: (-scores[rate], abs(plan.rates.index(rate) - middle), rate), default=None)


def perform_within(budget: int, job: Job, work: Path) -> dict[str, Any]:
    """Find the number of steps that best uses the budget of completions, for a row that samples more in some steps.

    The number of completions is only known after a run. So the run is repeated with a corrected number of steps (its
    learning rate falls to 0 at the last step), until it is at most 5 % below the budget, or up to six times. The result
    is the run that comes closest to the budget from below.
    """
    num_steps = num_steps_of(job)
    tried: dict[int, int] = {}  # steps -> completions
    while True:
        result = perform(with_steps(job, num_steps), work)
        if "error" in result:
            return result | {"asked_for": job.command}
        tried[num_steps] = result["num_completions"]
        if 0.95 * budget <= tried[num_steps] <= budget or len(tried) == 6:
            break
        num_steps = max(num_steps * budget // tried[num_steps], 1)
        if num_steps in tried:
            break
    fitting = [steps for steps, completions in tried.items() if completions <= budget] or [min(tried)]
    if list(tried)[-1] != max(fitting):  # the last run is not the best one
        result = perform(with_steps(job, max(fitting)), work)
    return result | {"asked_for": job.command, "tried": [list(run) for run in tried.items()]}


def num_steps_of(job: Job) -> int:
    return next(int(flag.partition("=")[2]) for flag in job.flags if flag.startswith("num_train_steps="))


def with_steps(job: Job, num_steps: int) -> Job:
    """The same run with another number of steps. It saves a checkpoint at its end."""
    counts = {"num_train_steps": num_steps, "save_every": num_steps}
    flags = (flag.partition("=")[0] for flag in job.flags)
    return replace(
        job,
        flags=tuple(
            f"{key}={counts[key]}" if key in counts else flag for key, flag in zip(flags, job.flags, strict=True)
        ),
    )


class Ladder:
    """The runs of some rows and seeds with the settings `plan`. Results go to `results`, run folders to `work`."""

    def __init__(self, plan: Plan, results: Results, work: Path) -> None:
        self.plan, self.results, self.work = plan, results, work
        self.projects: dict[str, Path] = {}
        self.num_done, self.num_planned, self.start = 0, 0, 0.0

    def job(self, row: Row, part: str, rate: float, seed: int, *, eval_every: int) -> Job:
        """The job for one run of this row."""
        row, num_steps = measured_as(row), self.plan.num_train_steps
        flags = all_flags(row) | {
            "learning_rate": f"{rate:g}",
            "num_train_steps": num_steps,
            "eval_every": eval_every,
            "save_every": num_steps,
        }
        if self.plan.base_steps != Plan.base_steps:
            flags["base_steps"] = self.plan.base_steps
        job = Job(part, row.script, tuple(f"{key}={value}" for key, value in flags.items()), seed, self.plan.base_steps)
        if row.mutant is None:
            return job
        mutant = mutant_named(row.mutant)
        if mutant.name not in self.projects:  # one copy for all rows with this bug
            self.projects[mutant.name] = broken_project(mutant, self.work / "broken" / str(len(self.projects)))
        what = {"name": mutant.name, "file": mutant.file, "from": mutant.pattern, "to": mutant.replacement}
        return replace(job, mutant=what, project=self.projects[mutant.name])

    def grid_jobs(self, row: Row) -> list[Job]:
        """The runs of the tuning seeds. They are evaluated half as often as the reported runs."""
        if row.rate_of is not None:
            return []
        runs = [(rate, seed) for rate in self.plan.rates for seed in self.plan.tuning_seeds]
        return [self.job(row, grid_part(row, rate, seed), rate, seed, eval_every=10) for rate, seed in runs]

    def seed_jobs(self, row: Row, seeds: Sequence[int]) -> list[Job]:
        """The runs at the best rate; none if the whole grid failed."""
        rate = chosen_rate(self.results.parts, row, self.plan)
        if rate is None:
            return []
        return [self.job(row, seed_part(row, seed), rate, seed, eval_every=5) for seed in seeds]

    def is_measured(self, job: Job) -> bool:
        """Whether the job was measured with this code and this request, without an error."""
        part = self.results.parts.get(job.name, {})
        part = part | {"command": part.get("asked_for", part.get("command"))}
        asked = all(part.get(key) == value for key, value in job.request().items())
        return self.results.has(job.name) and asked and "error" not in part

    def run(self, rows: Sequence[Row], seeds: Sequence[int]) -> None:
        """Make all runs, in order."""
        rows = list({measured_as(row).name: measured_as(row) for row in self.with_rates_of(rows)}.values())
        grid = len(self.plan.rates) * len(self.plan.tuning_seeds)
        self.num_planned = sum((grid if row.rate_of is None else 0) + len(seeds) for row in rows)
        self.start = time.monotonic()
        self.work.mkdir(parents=True, exist_ok=True)
        pool = ProcessPoolExecutor(
            2, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            bases = [*self.plan.tuning_seeds, *seeds]
            print(f"base models of the seeds {bases}, where the cache does not have them", flush=True)
            list(pool.map(build_base, bases, [self.plan.base_steps] * len(bases)))
            self.perform_all([(row, job) for row in rows for job in self.grid_jobs(row)], pool)
            self.perform_all([(row, job) for row in rows for job in self.seed_jobs(row, seeds)], pool)
        finally:
            pool.shutdown(cancel_futures=True)

    @staticmethod
    def with_rates_of(rows: Sequence[Row]) -> list[Row]:
        """These rows, and the rows whose learning rate they use."""
        return [*(ROWS[row.rate_of] for row in rows if row.rate_of is not None), *rows]

    def perform_all(self, jobs: Sequence[tuple[Row, Job]], pool: ProcessPoolExecutor) -> None:
        """Run two jobs at a time, and store each result at once."""
        missing = [(row, job) for row, job in jobs if not self.is_measured(job)]
        self.num_planned -= len(jobs) - len(missing)
        within = partial(perform_within, self.plan.num_completions)
        futures = {pool.submit(within if row.fits_budget else perform, job, self.work): job for row, job in missing}
        for future in as_completed(futures):
            job, result = futures[future], future.result()
            self.results.save(job.name, result)
            self.num_done += 1
            spent = time.monotonic() - self.start
            left = spent / self.num_done * (self.num_planned - self.num_done) / 60
            what = f"FAILED: {result['error']}" if "error" in result else f"test accuracy {result['accuracy']:.3f}"
            print(
                f"[{self.num_done}/{self.num_planned}] {job.name}: {what}, {result['seconds']:.0f} s; "
                f"about {left:.0f} minutes left",
                flush=True,
            )


def results_in(folder: Path) -> Results:
    """The file ladder.json in this folder. Its results depend on the code that makes and measures a run."""
    data = [*sorted((measure.ROOT / "data").glob("*.jsonl")), Path(toy.__file__)]  # has the shuffled reward
    return Results(measure.__file__, name="ladder", folder=folder, data=data)
