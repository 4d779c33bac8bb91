"""Which runs are made, in what order: the bases, a learning-rate grid for every row, then its seeds at the best rate.

Two runs at a time, one thread each. Whatever is in the results already, measured with this code, is not run again; a
run that failed is.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import toy
from benchmarks.common import Results
from benchmarks.ladder import measure
from benchmarks.ladder.broken import broken_project, mutant_named
from benchmarks.ladder.measure import Job, build_base, perform
from benchmarks.ladder.rows import ROWS, Row, all_flags, measured_as
from grpo.records import read_jsonl

NUM_COMPLETIONS = 38_400  # of every run: 150 steps of 256
Parts = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What the rows have in common. The defaults are the experiment; others are for trying it out."""

    rates: tuple[float, ...] = (1.5e-4, 5e-4, 1.5e-3)
    tuning_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_train_steps: int = 150
    num_completions: int = NUM_COMPLETIONS
    base_steps: int = 900

    @property
    def middle_rate(self) -> float:
        return self.rates[len(self.rates) // 2]


SMOKE = Plan(
    rates=(5e-4,), tuning_seed=0, seeds=(1,), num_train_steps=2, num_completions=512, base_steps=20
)  # does every row run at all?


def seed_part(row: Row, seed: int) -> str:
    return f"{measured_as(row).name} seed {seed}"


def grid_part(row: Row, rate: float) -> str:
    return f"{measured_as(row).name} rate {rate:g}"


def steps_part(row: Row) -> str:
    return f"{measured_as(row).name} steps"


def chosen_rate(parts: Parts, row: Row, plan: Plan = Plan()) -> float | None:
    """The rate of the grid that was best: held-out accuracy averaged over the run (`held_out_mean`).

    Of equals the one nearest the middle of the grid, then the lower. None: every run of the grid failed.
    """
    if row.rate_of is not None:
        return chosen_rate(parts, ROWS[row.rate_of], plan)
    scores = {rate: parts.get(grid_part(row, rate), {}).get("held_out_mean") for rate in plan.rates}
    measured = [rate for rate, score in scores.items() if score is not None]
    middle = plan.rates.index(plan.middle_rate)
    return min(measured, key=lambda rate: (-scores[rate], abs(plan.rates.index(rate) - middle), rate), default=None)


def steps_within_budget(run: Callable[[int], Sequence[int]], num_steps: int, budget: int) -> int:
    """How many steps a row may take that samples more completions in some steps than in others.

    `run(n)` trains for n steps, the learning rate falling to 0 at the last, and says how many completions had been
    sampled after each. The first run takes `num_steps`; a run that exceeds the budget is made again, for as many steps
    as fitted; the first whole run within the budget has the number.
    """
    while True:
        sampled = run(num_steps)
        fitting = sum(completions <= budget for completions in sampled)
        if fitting >= num_steps:
            return num_steps
        num_steps = max(fitting, 1)
        if num_steps == 1:
            return 1


class Ladder:
    """The runs of some rows and seeds, made with `plan`; results go to `results`, the runs themselves to `work`."""

    def __init__(self, plan: Plan, results: Results, work: Path) -> None:
        self.plan, self.results, self.work = plan, results, work
        self.projects: dict[str, Path] = {}
        self.num_done, self.num_planned, self.start = 0, 0, 0.0

    def job(self, row: Row, part: str, rate: float, seed: int, *, eval_every: int, num_steps: int | None = None) -> Job:
        """A run of this row."""
        row = measured_as(row)
        if num_steps is None:
            num_steps = self.plan.num_train_steps
            if row.fits_budget:
                num_steps = self.results.parts[steps_part(row)]["num_train_steps"]
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
        """Of the tuning seed, evaluated half as often as the runs that are reported."""
        if row.rate_of is not None or self.lacks_steps(row):
            return []
        seed = self.plan.tuning_seed
        return [self.job(row, grid_part(row, rate), rate, seed, eval_every=10) for rate in self.plan.rates]

    def seed_jobs(self, row: Row, seeds: Sequence[int]) -> list[Job]:
        """At the rate that was best; none where the whole grid failed."""
        rate = chosen_rate(self.results.parts, row, self.plan)
        if rate is None or self.lacks_steps(row):
            return []
        return [self.job(row, seed_part(row, seed), rate, seed, eval_every=5) for seed in seeds]

    def lacks_steps(self, row: Row) -> bool:
        """Whether the search for this row's number of steps failed."""
        return row.fits_budget and "error" in self.results.parts[steps_part(row)]

    def is_measured(self, job: Job) -> bool:
        """By this code, with this request, and without failing."""
        part = self.results.parts.get(job.name, {})
        asked = all(part.get(key) == value for key, value in job.request().items())
        return self.results.has(job.name) and asked and "error" not in part

    def run(self, rows: Sequence[Row], seeds: Sequence[int]) -> None:
        """All of it, in order."""
        rows = list({measured_as(row).name: measured_as(row) for row in self.with_rates_of(rows)}.values())
        self.num_planned = sum((len(self.plan.rates) if row.rate_of is None else 0) + len(seeds) for row in rows)
        self.start = time.monotonic()
        os.environ["OMP_NUM_THREADS"] = "1"
        self.work.mkdir(parents=True, exist_ok=True)
        pool = ProcessPoolExecutor(
            2, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            bases = [self.plan.tuning_seed, *seeds]
            print(f"base models of the seeds {bases}, where the cache does not have them", flush=True)
            list(pool.map(build_base, bases, [self.plan.base_steps] * len(bases)))
            for row in rows:
                if row.fits_budget:
                    self.search_steps(row, pool)
            self.perform_all((job for row in rows for job in self.grid_jobs(row)), pool)
            self.perform_all((job for row in rows for job in self.seed_jobs(row, seeds)), pool)
        finally:
            pool.shutdown(cancel_futures=True)

    @staticmethod
    def with_rates_of(rows: Sequence[Row]) -> list[Row]:
        """These rows, and those whose learning rate they take."""
        return [*(ROWS[row.rate_of] for row in rows if row.rate_of is not None), *rows]

    def search_steps(self, row: Row, pool: ProcessPoolExecutor) -> None:
        """How many steps of this row sample as many completions as others: one number, from the tuning seed."""
        plan, name = self.plan, steps_part(row)

        def job(num_steps: int) -> Job:
            return self.job(row, name, plan.middle_rate, plan.tuning_seed, eval_every=10, num_steps=num_steps)

        first = job(plan.num_train_steps)
        if self.is_measured(first):
            return
        tried: list[list[int]] = []

        def run(num_steps: int) -> list[int]:
            result = pool.submit(perform, job(num_steps), self.work).result()
            if "error" in result:
                raise RuntimeError(result["error"])
            metrics = read_jsonl(self.work / first.folder / "metrics.jsonl")
            sampled = [metric["num_completions"] for metric in metrics if metric["step"] >= 1]
            tried.append([num_steps, sampled[-1]])
            print(f"{name}: {num_steps} steps sample {sampled[-1]:,} completions", flush=True)
            return sampled

        try:
            num_steps = steps_within_budget(run, plan.num_train_steps, plan.num_completions)
            found: dict[str, Any] = {"num_train_steps": num_steps, "tried": tried, "budget": plan.num_completions}
        except RuntimeError as error:
            found = {"error": str(error)}
            print(f"{name}: FAILED: {error}", flush=True)
        self.results.save(name, first.request() | found)

    def perform_all(self, jobs: Iterable[Job], pool: ProcessPoolExecutor) -> None:
        """Two at a time, each result kept as soon as it is there."""
        jobs = list(jobs)
        missing = [job for job in jobs if not self.is_measured(job)]
        self.num_planned -= len(jobs) - len(missing)
        futures = {pool.submit(perform, job, self.work): job for job in missing}
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
    """ladder.json in that folder, kept for the code that makes a run and measures it."""
    data = [*sorted((measure.ROOT / "data").glob("*.jsonl")), Path(toy.__file__)]  # whose reward is dealt at random
    return Results(measure.__file__, name="ladder", folder=folder, data=data)
