"""Run a training script once, in a separate process, and measure the result.

The current code measures every run in the same way, including runs in a copy of the project with a bug:

    accuracy, mean_length   greedy answers to data/math_tasks_test.jsonl, which is used for no training and no choice
    kl_per_answer           KL(final || base) in nats: the sum over the tokens of an answer of the exact KL between the
                            two models' distributions over the vocabulary, averaged over answers that the final model
                            samples at temperature 1 to the prompts of data/math_tasks_eval.jsonl
    kl_per_token            the same sum over all answers, divided by the number of their tokens
    held_out_mean           accuracy on data/math_tasks_eval.jsonl averaged over the run: the area under the curve of
                            accuracy against completions, divided by the number of completions. It distinguishes runs
                            that all end near 1.
    reached                 the first evaluation on data/math_tasks_eval.jsonl with an accuracy of at least 0.95: its
                            step, the completions sampled and the seconds of training steps up to it
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import ROOT, code_of
from grpo.datasets.rows import JSONLinesDataset
from grpo.fast.capabilities import find_head
from grpo.fast.noise import step_seed
from grpo.files import read_jsonl
from grpo.logprobs import completion_states
from grpo.models.loading import load_policy
from grpo.models.tiny import tiny_base_model
from grpo.rollout import generate_completions
from reward_model import MathRewardModel

TARGET = 0.95  # held-out accuracy
TIMEOUT = 900  # seconds per run
ANSWERS_PER_PROMPT = 4  # sampled for the KL
ANSWERS_AT_ONCE = 250  # answers per batch; two distributions over the vocabulary are computed for each token
LENGTH = 28  # tokens, max_completion_length of config.yaml

TEST_FILE, EVAL_FILE = ROOT / "data" / "math_tasks_test.jsonl", ROOT / "data" / "math_tasks_eval.jsonl"


@dataclass(frozen=True)
class Job:
    """One run. `name`: of its result; `flags`: KEY=VALUE; `project`: the folder of the code that it runs."""

    name: str
    script: str
    flags: tuple[str, ...]
    seed: int
    base_steps: int
    mutant: dict[str, str] | None = None  # the bug in the copy of the project
    project: Path = ROOT

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def command(self) -> list[str]:
        flags = [f"--{flag}" for flag in self.flags]
        return [self.script, *flags, f"--seed={self.seed}", f"--base_seed={self.seed}"]

    def request(self) -> dict[str, Any]:
        """The request, which is stored with the result. A result of another request does not belong to this job."""
        return {
            "command": self.command,
            "mutant": self.mutant,
            "script_sha256": hashlib.sha256(code_of(self.project / self.script).encode()).hexdigest()[:16],
        }


def perform(job: Job, work: Path) -> dict[str, Any]:
    """Run the job and measure its output in `work`. The result of a failed run is {"error": its last line}."""
    folder = work / job.folder
    shutil.rmtree(folder, ignore_errors=True)
    printed = work / f"{job.folder}.err"
    start = time.perf_counter()
    with printed.open("w") as err:
        command = [sys.executable, *job.command, f"--output_dir={folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            status = subprocess.run(
                command, cwd=job.project, env=environment, stdout=subprocess.DEVNULL, stderr=err, timeout=TIMEOUT
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
            err.write(f"\nnot done after {TIMEOUT} seconds\n")
    seconds = time.perf_counter() - start
    if status:
        lines = printed.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        return job.request() | {"error": lines[-1][-300:], "status": status, "seconds": seconds}
    try:
        rows = read_jsonl(folder / "metrics.jsonl")
        base = tiny_base_model(job.seed, job.base_steps)
        result = {"seconds": seconds} | describe(folder / "final", base) | progress(rows)
    except Exception as error:  # a failed measurement must not stop the other runs
        return job.request() | {"error": f"{type(error).__name__}: {error}"[:300], "status": 0, "seconds": seconds}
    printed.unlink()
    for leftover in folder.iterdir():  # delete the models, which take megabytes
        if leftover.name != "metrics.jsonl":
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return job.request() | result


def progress(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The learning progress of a run, from its metrics.jsonl.

    >>> curve = [{"step": 0, "eval/accuracy": 0.2}, {"step": 1, "num_completions": 8, "step_time": 2.0},
    ...          {"step": 2, "num_completions": 16, "step_time": 3.0, "eval/accuracy": 0.96}]
    >>> progress(curve)["reached"]
    {'step': 2, 'completions': 16, 'seconds': 5.0}
    """
    evaluations = [row for row in rows if "eval/accuracy" in row]
    first = next((row["step"] for row in evaluations if row["eval/accuracy"] >= TARGET), None)
    reached = None
    if first is not None:
        before = [row for row in rows if 1 <= row["step"] <= first]
        reached = {
            "step": first,
            "completions": before[-1]["num_completions"] if before else 0,
            "seconds": sum(row["step_time"] for row in before),
        }
    return {
        "held_out": rows[-1].get("eval/accuracy"),
        "held_out_mean": mean_over_run(evaluations),
        "reached": reached,
        "steps": rows[-1]["step"],
        "num_completions": rows[-1].get("num_completions", 0),
        "training_seconds": sum(row.get("step_time", 0.0) for row in rows),
        "metrics_sha256": fingerprint_of(rows),
    }


def mean_over_run(evaluations: Sequence[dict[str, Any]]) -> float:
    """Held-out accuracy averaged over the completions sampled, by the trapezoidal rule.

    >>> mean_over_run([{"eval/accuracy": 0.2}, {"num_completions": 8, "eval/accuracy": 0.6}])
    0.4
    """
    points = [(row.get("num_completions", 0), row["eval/accuracy"]) for row in evaluations]
    area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))
    return area / points[-1][0] if points[-1][0] else points[-1][1]


def fingerprint_of(rows: Sequence[dict[str, Any]]) -> str:
    """A hash of all numbers of a run except times. It is equal for two runs that are bit-identical."""
    timeless = [{key: value for key, value in row.items() if "time" not in key} for row in rows]
    return hashlib.sha256(json.dumps(timeless).encode()).hexdigest()[:16]


def describe(final: Path, base: Path) -> dict[str, Any]:
    """Measure the trained model: its greedy answers, and its KL from the base model."""
    model, tokenizer = load_policy(str(final), base_seed=0, device=torch.device("cpu"))
    samples = list(JSONLinesDataset(TEST_FILE))
    prompts = [sample["prompt"] for sample in samples]
    greedy = generate_completions(model, tokenizer, prompts, group_size=1, max_completion_length=LENGTH, temperature=0)
    judge = MathRewardModel()
    num_right = sum(
        judge.compute_reward(sample, completion) == 1.0
        for sample, completion in zip(samples, greedy.completions, strict=True)
    )
    reference, _ = load_policy(str(base), base_seed=0, device=torch.device("cpu"))
    prompts = [sample["prompt"] for sample in JSONLinesDataset(EVAL_FILE)]
    per_answer, per_token = kl_to_base(model, reference, tokenizer, prompts)
    return {
        "n": len(samples),
        "num_right": num_right,
        "accuracy": num_right / len(samples),
        "mean_length": greedy.completion_mask.sum().item() / len(samples),
        "kl_per_answer": per_answer,
        "kl_per_token": per_token,
    }


@torch.no_grad()
def kl_to_base(
    model: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> tuple[float, float]:
    """KL(model || base) in nats, per answer and per token, on answers sampled from the model at temperature 1.

    sum_t sum_v p(v | s_t) (log p(v | s_t) - log q(v | s_t)) is exact for every prefix s_t of an answer, so only the
    choice of the answers is random. The mean over answers is an unbiased estimate of the KL of whole answers.
    """
    rollout = generate_completions(
        model,
        tokenizer,
        prompts,
        group_size=ANSWERS_PER_PROMPT,
        max_completion_length=LENGTH,
        seed=step_seed(0, 0),
    )
    model.eval()
    base.eval()

    def log_probs(scorer: PreTrainedModel, rows: Tensor) -> Tensor:
        head = find_head(scorer)
        assert head is not None
        return head.logits(completion_states(scorer, *rollout.tokens(rows))).log_softmax(-1)  # (b, C, V)

    total = 0.0
    for rows in torch.arange(len(rollout.completions)).split(ANSWERS_AT_ONCE):
        ours, theirs = log_probs(model, rows), log_probs(base, rows)
        kl = (ours.exp() * (ours - theirs)).sum(-1)  # (b, C)
        total += torch.where(rollout.completion_mask[rows], kl, 0.0).sum().item()
    return total / len(rollout.completions), total / int(rollout.completion_mask.sum())


def build_base(seed: int, base_steps: int) -> None:
    """Build the tiny base model of a seed, before the runs that share it start."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # hides progress bars
        tiny_base_model(seed, base_steps)
