"""The ladder: one idea a rung, runs that go on where they stopped, choices and intervals by hand, honest tables."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import RESULTS, Results
from benchmarks.ladder import __main__ as command
from benchmarks.ladder import picture, schedule, table
from benchmarks.ladder.broken import broken_project, mutant_named
from benchmarks.ladder.intervals import paired_interval, t_interval
from benchmarks.ladder.measure import Job, fingerprint_of, kl_to_base, perform, progress
from benchmarks.ladder.raw import columns_of, pack, read_raw
from benchmarks.ladder.rows import BLOCKS, COMPARISONS, PPO, ROWS, TOP, all_flags, measured_as, settings
from benchmarks.ladder.schedule import (
    Ladder,
    Parts,
    Plan,
    chosen_rate,
    grid_part,
    num_steps_of,
    perform_within,
    results_in,
    seed_part,
)
from benchmarks.ladder.shows import SHOWS
from grpo.datasets.rows import JSONLinesDataset
from grpo.fast.noise import step_seed
from grpo.logprobs import compute_logprobs
from grpo.loss import KL_ESTIMATORS
from grpo.models.tiny import build_model, train_tokenizer
from grpo.rollout import generate_completions
from tests.mutant_list import Mutant

ROOT = Path(__file__).parent.parent.parent

# Rows

SEVERAL = {  # ideas that are more than one setting: everything else changes what its flags name, one thing
    "two_minibatches": {"surrogate", "clip_range", "num_minibatches"},
    **{f"kl_{name}": {"kl_coeff", "kl_estimator"} for name in KL_ESTIMATORS},
    "kl_reward": {"kl_coeff", "kl_in", "kl_estimator"},  # in the reward there is no estimator to choose
    **{f"group_size_{size}": {"group_size", "batch_size"} for size in (2, 4, 8, 32)},  # equal completions
}


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.after], ids=lambda row: row.name)
def test_a_rung_is_one_idea_more_than_the_one_it_follows(row: Any) -> None:
    before, after = settings(ROWS[row.after]), settings(row)
    changed = {key for key in after if after[key] != before[key]}
    assert changed <= SEVERAL.get(row.name, set(row.flags))
    assert set(row.flags) - changed <= {"kl_estimator"}  # k3_corrected is what reinforce would take, with a KL
    another_rate = row.rate_of not in (None, row.after)  # that is its idea
    assert [len(changed) == 1 or row.name in SEVERAL, row.mutant is not None, another_rate].count(True) == 1
    assert row.script == ROWS[row.after].script


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_every_row_samples_as_many_completions_a_step(row: Any) -> None:
    chosen = settings(row)
    assert chosen["batch_size"] * chosen["group_size"] * Plan.num_train_steps == Plan.num_completions
    assert row.fits_budget == (chosen["max_resample_rounds"] > 0)
    assert (row.script == PPO) == (chosen["advantage_baseline"] == "critic")


def test_rows_are_told_apart_and_those_that_coincide_are_measured_once() -> None:
    assert len({row.idea for row in ROWS.values()}) == len(ROWS)
    same = {row.name: measured_as(row).name for row in ROWS.values() if measured_as(row) is not row}
    assert same == {"grpo_two_updates": "kl_k3_corrected"}


def test_every_row_is_shown_and_every_name_is_a_row() -> None:
    assert {name for block in BLOCKS.values() for name in block.rows} == set(ROWS)
    assert len(TOP) == len(set(TOP)) == 10
    assert {*TOP, *(name for pair in COMPARISONS for name in pair)} <= set(ROWS)


def missing_sentences(parts: Parts, shows: dict[str, str]) -> list[str]:
    measured = [name for name, row in ROWS.items() if table.runs_of(parts, row) or table.errors_of(parts, row)]
    return [name for name in measured if not shows.get(name, "").endswith(".")]


def test_every_row_that_is_measured_has_its_sentence() -> None:
    path = RESULTS / "ladder.json"
    parts = json.loads(path.read_text())["parts"] if path.is_file() else {}
    assert missing_sentences(parts, SHOWS) == []
    assert set(SHOWS) <= set(ROWS)


def test_a_missing_sentence_would_be_noticed() -> None:
    assert missing_sentences(measured([0.9], steps=[None], name="gspo"), {"grpo": "It learns."}) == ["gspo"]
    assert missing_sentences({"gspo seed 3": {}}, {"gspo": "It learns."}) == []


# Mutants


def test_the_mutants_are_in_the_list_and_their_copy_is_broken_as_it_says(tmp_path: Path) -> None:
    names = {row.mutant for row in ROWS.values() if row.mutant}
    assert len(names) == 2
    for number, name in enumerate(sorted(names)):
        mutant = mutant_named(name)
        copy = broken_project(mutant, tmp_path / str(number))
        ours, theirs = (ROOT / mutant.file).read_text(), (copy / mutant.file).read_text()
        assert theirs != ours
        assert theirs.replace(mutant.replacement, mutant.pattern) == ours
        assert (copy / "train_grpo.py").read_text() == (ROOT / "train_grpo.py").read_text()


def test_a_mutant_that_is_gone_or_matches_no_longer_ends_the_ladder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="0 mutants named 'min becomes max'"):
        mutant_named("min becomes max")
    (tmp_path / "code.py").write_text("a = 1\na = 1\n")
    twice, never = (Mutant("x", "code.py", pattern, "b", ("test",)) for pattern in ("a = 1", "a = 2"))
    with pytest.raises(SystemExit, match="matches 2 places of code"):
        mutant_named("x", [twice], tmp_path)
    with pytest.raises(SystemExit, match="matches 0 places"):
        mutant_named("x", [never], tmp_path)


# Choices


def graded(scores: dict[float, float | None], row: str = "grpo") -> Parts:
    """A grid with these scores, as means of two tuning seeds."""
    return {
        grid_part(ROWS[row], rate, seed): {"error": "no"} if score is None else {"held_out_mean": score + offset}
        for rate, score in scores.items()
        for seed, offset in zip(Plan.tuning_seeds, (0.25, -0.25), strict=True)
    }


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({1.5e-4: 0.8, 5e-4: 0.9, 1.5e-3: 0.95}, 1.5e-3),
        ({1.5e-4: 0.9, 5e-4: 0.9, 1.5e-3: 0.9}, 5e-4),  # of equals the middle
        ({1.5e-4: 0.9, 5e-4: 0.8, 1.5e-3: 0.9}, 1.5e-4),  # then the lower
        ({1.5e-4: None, 5e-4: None, 1.5e-3: 0.1}, 1.5e-3),  # what failed is not chosen
        ({1.5e-4: None, 5e-4: None, 1.5e-3: None}, None),
    ],
)
def test_the_best_rate_of_the_grid_is_chosen(scores: dict[float, float | None], expected: float | None) -> None:
    assert chosen_rate(graded(scores), ROWS["grpo"]) == expected
    assert chosen_rate(graded(scores), ROWS["max_for_min_one_update"]) == expected  # its rate is that of grpo
    assert chosen_rate(graded(scores, "kl_k3_corrected"), ROWS["grpo_two_updates"]) == expected  # the same runs


def test_a_rate_that_failed_on_one_tuning_seed_is_not_chosen() -> None:
    parts = graded({1.5e-4: 0.8, 5e-4: 0.9, 1.5e-3: 0.95})
    parts[grid_part(ROWS["grpo"], 1.5e-3, Plan.tuning_seeds[0])] = {"error": "loss nan"}
    assert chosen_rate(parts, ROWS["grpo"]) == 5e-4


@pytest.mark.parametrize(
    ("sampled", "tried"),
    [
        (lambda steps: 256 * steps, [150]),  # it fits at once
        (lambda steps: 512 * steps, [150, 75]),
        (lambda steps: 256 * steps + 4 * steps**2, [150, 44, 88, 63, 75, 69]),  # more in every step, the longer it runs
        (lambda steps: 40_000, [150, 144, 138, 132, 126, 120]),  # never
    ],
)
def test_a_run_gets_as_many_steps_as_its_budget_allows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sampled: Callable[[int], int], tried: list[int]
) -> None:
    made = []

    def run(job: Job, work: Path) -> dict[str, Any]:
        made.append(num_steps_of(job))
        assert f"save_every={made[-1]}" in job.flags
        return job.request() | {"num_completions": sampled(made[-1])}

    monkeypatch.setattr(schedule, "perform", run)
    job = Job("dapo seed 0", "train_grpo.py", ("algorithm=dapo", "num_train_steps=150", "save_every=150"), 0, 900)
    result = perform_within(38_400, job, tmp_path)
    assert [steps for steps, _ in result["tried"]] == tried
    fitting = [steps for steps in tried if sampled(steps) <= 38_400] or [min(tried)]
    assert result["num_completions"] == sampled(made[-1])
    assert made[-1] == max(fitting)
    assert made[: len(tried)] == tried
    assert result["asked_for"] == job.command != ["", *result["command"]]


def test_t_intervals_of_known_samples() -> None:
    """Scores 1 ... 5: mean 3, s = sqrt(2.5), t = 2.776 at 4 degrees of freedom."""
    assert t_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 3 - 1.96293, 3 + 1.96293), abs=1e-4)
    assert t_interval([1.0, 3.0]) == pytest.approx((2.0, 2 - 12.706, 2 + 12.706), abs=1e-4)  # s / sqrt(2) = 1
    assert t_interval([0.5]) == (0.5, -math.inf, math.inf)
    # Paired: the seeds differ a lot, the rows by the same little everywhere.
    assert paired_interval([0.2, 0.5, 0.9], [0.1, 0.4, 0.8]) == pytest.approx((0.1, 0.1, 0.1))


# Measures


def curve(accuracies: dict[int, float], num_steps: int) -> list[dict[str, Any]]:
    """metrics.jsonl of a run that samples 256 completions and takes half a second a step."""
    rows: list[dict[str, Any]] = [{"step": 0}]
    rows += [
        {"step": step, "num_completions": 256 * step, "step_time": 0.5, "reward": step / 7}
        for step in range(1, num_steps + 1)
    ]
    for step, accuracy in accuracies.items():
        rows[step]["eval/accuracy"] = accuracy
    return rows


def test_the_way_to_095_is_counted_to_the_first_evaluation_there() -> None:
    result = progress(curve({0: 0.2, 5: 0.94, 10: 0.95, 15: 0.9, 20: 0.97, 25: 0.99}, 25))
    assert result["reached"] == {"step": 10, "completions": 2560, "seconds": 5.0}
    areas = [5 * (0.2 + 0.94), 5 * (0.94 + 0.95), 5 * (0.95 + 0.9), 5 * (0.9 + 0.97), 5 * (0.97 + 0.99)]
    assert result["held_out_mean"] == pytest.approx(sum(areas) / 2 / 25)
    assert (result["held_out"], result["steps"], result["num_completions"]) == (0.99, 25, 6400)
    assert progress(curve({0: 0.2, 25: 0.949}, 25))["reached"] is None


def test_runs_are_the_same_whatever_they_took_and_not_if_a_number_differs() -> None:
    rows, slower, other = (curve({0: 0.2}, 3) for _ in range(3))
    slower[2]["step_time"] = 0.7
    other[2]["reward"] += 1e-16 + 1e-9
    assert fingerprint_of(rows) == fingerprint_of(slower) != fingerprint_of(other)


def test_the_kl_is_that_of_sampled_log_ratios() -> None:
    """On the same answers the exact KL a token and the mean log-ratio estimate the same number."""
    prompts = [sample["prompt"] for sample in JSONLinesDataset(ROOT / "data/math_tasks_eval.jsonl")][:50]
    tokenizer = train_tokenizer(prompts)
    model, base = build_model(tokenizer, 0), build_model(tokenizer, 0)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)))
    per_answer, per_token = kl_to_base(model, base, tokenizer, prompts)
    rollout = generate_completions(
        model, tokenizer, prompts, group_size=4, max_completion_length=28, seed=step_seed(0, 0)
    )
    with torch.no_grad():
        ours, theirs = (compute_logprobs(scorer, *rollout.tokens())[0] for scorer in (model, base))
    ratios = (ours - theirs).sum(1)  # (B,)
    assert abs(ratios.mean().item() - per_answer) < 3 * ratios.std().item() / len(ratios) ** 0.5
    assert per_answer / per_token == pytest.approx(rollout.completion_mask.sum().item() / len(ratios))
    assert per_answer > 0.05
    assert kl_to_base(base, base, tokenizer, prompts[:2]) == pytest.approx((0, 0), abs=1e-6)


# Runs


PLAN = Plan()


class FakeRuns:
    """Takes the place of `perform`: notes what is asked for, and writes the metrics of a run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.jobs: list[Job] = []
        self.failing: set[str] = set()
        self.folder = folder
        self.code = "this code"  # whoever edits the project meanwhile changes no test
        monkeypatch.setattr("benchmarks.common.fingerprint", lambda *_: self.code)
        monkeypatch.setattr("benchmarks.common.commit", lambda: "0123456789")
        monkeypatch.setattr(schedule, "perform", self.perform)
        monkeypatch.setattr(schedule, "build_base", lambda seed, base_steps: None)
        monkeypatch.setattr(schedule, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
        monkeypatch.setattr(schedule, "broken_project", lambda mutant, folder: ROOT)

    def perform(self, job: Job, work: Path) -> dict[str, Any]:
        self.jobs.append(job)
        if job.name in self.failing:
            return job.request() | {"error": "loss nan", "status": 1, "seconds": 1.0}
        folder = work / job.folder
        folder.mkdir(parents=True, exist_ok=True)
        flags = dict(flag.split("=", 1) for flag in job.flags)
        a_step = 512 if flags["algorithm"] == "dapo" else 256
        rows = curve({0: 0.2, 5: 0.9, 10: 0.96}, int(flags["num_train_steps"]))
        for row in rows[1:]:
            row["num_completions"] = a_step * row["step"]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        accuracy = {"accuracy": 0.9 + job.seed / 100, "mean_length": 16.0, "kl_per_answer": 1.5, "seconds": 2.0}
        better = {"held_out_mean": float(flags["learning_rate"])}  # the highest rate wins
        return job.request() | accuracy | progress(rows) | better

    def run(self, *rows: str, plan: Plan = PLAN, results: Results | None = None) -> tuple[list[str], Ladder]:
        """The names of the runs that were made this time."""
        self.jobs = []
        ladder = Ladder(plan, results or results_in(self.folder), self.folder)
        ladder.run([ROWS[name] for name in rows], plan.seeds)
        return [job.name for job in self.jobs], ladder


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRuns:
    return FakeRuns(monkeypatch, tmp_path)


GRID = [f"grpo rate {rate} tuning {seed}" for rate in ("0.00015", "0.0005", "0.0015") for seed in (100, 101)]
SEEDS = [f"grpo seed {seed}" for seed in range(5)]


def grid_of(name: str) -> list[str]:
    return [grid_part(ROWS[name], rate, seed) for rate in Plan.rates for seed in Plan.tuning_seeds]


def test_a_row_is_tuned_on_its_grid_and_then_run_on_the_other_seeds(fake: FakeRuns) -> None:
    made, ladder = fake.run("grpo")
    assert made == GRID + SEEDS
    assert [job.seed for job in fake.jobs[:6]] == [100, 101] * 3
    assert all("--learning_rate=0.0015" in job.command and f"--seed={job.seed}" in job.command for job in fake.jobs[6:])
    assert all(f"--base_seed={job.seed}" in job.command for job in fake.jobs)
    assert ladder.results.parts["grpo seed 4"]["accuracy"] == pytest.approx(0.94)


@pytest.mark.slow
def test_a_stopped_ladder_goes_on_and_other_code_or_flags_are_measured_again(
    fake: FakeRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fake.run("grpo", plan=Plan(seeds=(0, 1)))[0] == [*GRID, *SEEDS[:2]]
    assert fake.run("grpo")[0] == SEEDS[2:]  # what was stopped goes on
    assert fake.run("grpo")[0] == []

    results = results_in(fake.folder)
    del results.parts[
        "grpo rate 0.0015 tuning 100"
    ]  # then another rate of the grid may win, and the seeds are run at that one
    fake.failing = {"grpo rate 0.0015 tuning 100"}
    assert fake.run("grpo", results=results)[0] == ["grpo rate 0.0015 tuning 100", *SEEDS]
    fake.failing = set()
    assert fake.run("grpo")[0] == ["grpo rate 0.0015 tuning 100", *SEEDS]  # what failed is run again

    monkeypatch.setitem(ROWS, "grpo", dataclasses.replace(ROWS["grpo"], flags={"algorithm": "grpo", "kl_coeff": 0.1}))
    assert fake.run("grpo")[0] == GRID + SEEDS
    fake.code = "other code"
    assert fake.run("grpo")[0] == GRID + SEEDS


def test_a_failed_run_is_kept_and_kills_no_other(fake: FakeRuns) -> None:
    fake.failing = {"grpo seed 1", *grid_of("clip")}
    made, ladder = fake.run("clip", "grpo")
    assert [name for name in made if name.startswith("grpo")] == GRID + SEEDS
    assert not [name for name in made if name.startswith("clip seed")]  # no rate to run it at
    assert ladder.results.parts["grpo seed 1"]["error"] == "loss nan"
    parts = ladder.results.parts
    assert table.accuracy(parts, ROWS["grpo"]).endswith(", 1 failed: loss nan")
    assert table.accuracy(parts, ROWS["clip"]) == "6 failed: loss nan"


def test_rows_that_coincide_or_take_anothers_rate_cost_no_run_of_their_own(fake: FakeRuns) -> None:
    made, _ = fake.run("kl_k3_corrected", "grpo_two_updates", plan=Plan(seeds=(0,)))
    assert made == [*grid_of("kl_k3_corrected"), "kl_k3_corrected seed 0"]
    made, ladder = fake.run("max_for_min_one_update", plan=Plan(seeds=(0,)))
    assert made == [*GRID, "grpo seed 0", "max_for_min_one_update seed 0"]
    mutant = ladder.results.parts["max_for_min_one_update seed 0"]["mutant"]
    assert mutant["name"] == "clip: min -> max"
    assert "torch.max(" in mutant["to"]
    assert ladder.results.parts["grpo seed 0"]["mutant"] is None


def test_dynamic_sampling_gets_as_many_completions_not_as_many_steps(fake: FakeRuns) -> None:
    made, ladder = fake.run("dapo", plan=Plan(seeds=(0,)))
    assert made == [name for name in [*grid_of("dapo"), "dapo seed 0"] for _ in range(2)]  # 150 steps, then 75
    for part in ladder.results.parts.values():
        assert part["tried"] == [[150, 76800], [75, 38400]]
        assert "--num_train_steps=75" in part["command"]
        assert part["num_completions"] == 38400
    assert fake.run("dapo", plan=Plan(seeds=(0,)))[0] == []
    fake.failing = set(grid_of("dapo"))
    made, ladder = fake.run("dapo", "grpo", plan=Plan(seeds=(0,)), results=results_in(fake.folder / "fresh"))
    assert made == [*grid_of("dapo"), *GRID, "grpo seed 0"]
    assert table.accuracy(ladder.results.parts, ROWS["dapo"]) == "6 failed: loss nan"


def test_raw_metrics_are_packed_and_kept_when_the_runs_are_gone(tmp_path: Path) -> None:
    run = tmp_path / "grpo-seed-0"
    run.mkdir()
    rows = curve({0: 0.2, 2: 0.123456}, 2)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "raw.json.xz"
    parts = {"grpo seed 0": {"metrics_sha256": fingerprint_of(rows)}, "grpo seed 1": {"error": "loss nan"}}
    pack(parts, tmp_path, file)
    assert read_raw(file) == {"grpo seed 0": columns_of(rows)}
    assert read_raw(file)["grpo seed 0"]["eval/accuracy"] == [0.2, None, 0.1235]
    (run / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")  # the run is being made again
    pack(parts, tmp_path, file)
    assert read_raw(file) == {"grpo seed 0": columns_of(rows)}
    (run / "metrics.jsonl").unlink()
    pack(parts, tmp_path, file)
    assert read_raw(file) == {"grpo seed 0": columns_of(rows)}


def test_what_goes_wrong_in_a_process_is_its_last_line(tmp_path: Path) -> None:
    job = Job("no such setting", "train_grpo.py", ("group_sise=8",), seed=0, base_steps=1)
    result = perform(job, tmp_path)
    assert result["error"].startswith("error: --group_sise: not a setting; did you mean --group_size?")
    assert result["status"] == 2


# What is shown


def measured(accuracies: list[float], *, steps: list[int | None], name: str = "grpo") -> Parts:
    """Runs of the first seeds, at the rate that a grid of one finds best."""
    grid = {"held_out_mean": 0.5, "commit": "0123456789", "seconds": 0.0}
    return {grid_part(ROWS[name], 5e-4, seed): grid for seed in Plan.tuning_seeds} | {
        seed_part(ROWS[name], seed): {
            "command": ["train_grpo.py", "--learning_rate=0.0005"],
            "accuracy": accuracy,
            "held_out_mean": accuracy - 0.1,
            "mean_length": 16.0 + seed,
            "kl_per_answer": 1.25,
            "num_completions": 38400,
            "training_seconds": 10.0,
            "metrics_sha256": f"{accuracy}",
            "reached": None if step is None else {"step": step, "completions": 256 * step, "seconds": step / 10},
            "commit": "0123456789",
            "seconds": 3600.0,
        }
        for seed, (accuracy, step) in enumerate(zip(accuracies, steps, strict=True))
    }


def test_the_table_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = measured([0.95, 0.96, 0.97, 0.98, 0.99], steps=[10, 20, 30, None, None])
    parts |= graded({1.5e-4: 0.8, 5e-4: 0.9, 1.5e-3: 0.9})
    line = next(line for line in table.block(parts, "algorithms").splitlines() if line.startswith("| `grpo` |"))
    interval = "0.970 [0.950, 0.990]"  # s = 0.0158, 2.776 s / sqrt(5) = 0.0196
    means = f"{interval} | 0.870 [0.850, 0.890]"
    row = "| `grpo` | --algorithm grpo, the default |"
    assert line == f"{row} – | 5e-4 | {means} | 5.1 (3 of 5) | 2.0 | 18.0 | 1.25 | 38.4 | 10.0 |"
    assert "| `gspo` | --algorithm gspo | – | – | not measured | – | – | – | – | – | – | – |" in table.block(
        parts, "algorithms"
    )
    assert "| `grpo` | 0.800 | **0.900** | 0.900 |" in table.grid(parts)
    assert "| `max_for_min_one_update` | as `grpo` |" in table.grid(parts)
    monkeypatch.setattr(table, "TOP", ("grpo",))
    assert f"{row} 5e-4 | {means} | 5.1 (3 of 5) | 1.25 |" in table.top(parts)
    runs = {name: part for name, part in parts.items() if "seed" in name}
    assert table.provenance(runs) == "5 measurements, 5.0 hours of one thread, at commit 0123456."


def test_intervals_stay_within_0_and_1_and_missing_seeds_are_counted() -> None:
    parts = measured([1.0, 1.0, 0.9], steps=[None] * 3)
    assert table.accuracy(parts, ROWS["grpo"]) == "0.967 [0.823, 1.000], 3 of 5 seeds"
    assert table.reached(table.runs_of(parts, ROWS["grpo"])) == ("0 of 3", "–")
    parts["grpo seed 2"]["command"] = ["train_grpo.py", "--learning_rate=0.0015"]  # of an earlier grid
    assert table.accuracy(parts, ROWS["grpo"]).endswith(", 2 of 5 seeds")


def test_a_difference_is_paired_by_seed() -> None:
    parts = measured([0.2, 0.5, 0.9], steps=[None] * 3, name="group_baseline")
    parts |= measured([0.25, 0.56, 0.94], steps=[None] * 3, name="leave_one_out")
    parts["leave_one_out seed 2"]["held_out_mean"] = 0.7
    line = "| `leave_one_out` | `group_baseline` | **+0.050 [+0.025, +0.075]** | +0.003 [-0.219, +0.226] | 3 |"
    assert line in table.comparisons(parts)


def test_a_mutant_that_must_change_nothing_is_held_against_its_original() -> None:
    same = measured([0.9, 0.8], steps=[None] * 2)
    other = measured([0.9, 0.7], steps=[None] * 2, name="max_for_min_one_update")
    assert "equals that of `grpo` in 1 of 2 seeds." in table.block(same | other, "mistakes")


def test_the_page_has_a_place_for_every_table() -> None:
    page = (ROOT / "docs" / "ABLATIONS.md").read_text(encoding="utf-8")
    places = [line for line in page.splitlines() if line.startswith("<!--")]
    assert sorted(places) == sorted(f"<!-- {slash}{name} -->" for name in table.RENDER for slash in ("", "/"))
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")][2:-2] == [
        block.title for block in BLOCKS.values()
    ]


def test_the_picture_names_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = []
    monkeypatch.setattr(
        picture.Axes, "annotate", lambda axis, name, *_, **__: named.append((axis.get_title(), name)), raising=True
    )
    columns = columns_of(curve({0: 0.2, 5: 0.9}, 5))
    raw = {seed_part(row, seed): columns for row in ROWS.values() for seed in Plan.seeds}
    picture.draw(raw, tmp_path / "ladder.png")
    assert named == [(block.title, name) for block in BLOCKS.values() for name in block.rows]
    assert 1000 < (tmp_path / "ladder.png").stat().st_size < 400_000


def test_labels_keep_their_distance() -> None:
    heights = [0.99, 0.2, 0.985, 1.0, 0.21]
    placed = picture.spread_out(heights, 0.05)
    assert all(low <= height for low, height in zip(placed, heights, strict=True))
    ordered = sorted(placed)
    assert min(high - low for low, high in itertools.pairwise(ordered)) >= 0.05 - 1e-9
    assert [round(height, 3) for height in placed] == [0.95, 0.16, 0.9, 1.0, 0.21]


def test_list_prints_every_row_with_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ROWS)
    assert any(line.split()[1:] == ["python", PPO, "--algorithm", "ppo"] for line in lines)
    for line, row in zip(lines, ROWS.values(), strict=True):
        assert all(f"--{key} " in line for key in all_flags(row))


@pytest.mark.slow
def test_one_row_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("benchmarks.common.fingerprint", lambda *_: "this code")  # whoever edits it meanwhile
    command.main(["--smoke", "--rows", "max_for_min_one_update", "--work", str(tmp_path)])
    assert "[3/3]" in capsys.readouterr().out
    parts = json.loads((tmp_path / "smoke" / "ladder.json").read_text())["parts"]
    names = ["grpo rate 0.0005 tuning 0", "grpo seed 1", "max_for_min_one_update seed 1"]
    assert sorted(parts) == names
    for part in parts.values():
        assert (part["steps"], part["num_completions"], part["n"]) == (2, 512, 500)
        assert 0 <= part["kl_per_answer"] < math.inf  # 0 where two steps of a hardly trained base earn no reward
    # With one update a rollout every ratio is 1: min or max, not a bit differs.
    assert parts[names[1]]["metrics_sha256"] == parts[names[2]]["metrics_sha256"] != parts[names[0]]["metrics_sha256"]
    assert sorted(read_raw(tmp_path / "smoke" / "ladder_metrics.json.xz")) == names
