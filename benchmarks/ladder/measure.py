"""One run of a training script, in a process of its own, and what became of it.

Everything after the run is measured the same way for every row, by the code as it is, the project's copies with a bug
in them included:

    accuracy, mean_length   greedy answers to data/math_tasks_test.jsonl, which no run and no choice has seen
    kl_per_answer           KL(final || base) in nats: the sum over the tokens of an answer of the exact KL between the
                            two models' distributions over the vocabulary, averaged over answers that the final model
                            samples at temperature 1 to the prompts of data/math_tasks_eval.jsonl
    kl_per_token            the same sum over all answers, divided by their tokens
    held_out_mean           accuracy on data/math_tasks_eval.jsonl averaged over the run, the area under its curve
                            against completions divided by them; it tells runs apart that all end near 1
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
TIMEOUT = 900  # seconds a run
ANSWERS_PER_PROMPT = 4  # sampled for the KL
ANSWERS_AT_ONCE = 250  # of the two models' distributions over the vocabulary
LENGTH = 28  # tokens, max_completion_length of config.yaml

TEST_FILE, EVAL_FILE = ROOT / "data" / "math_tasks_test.jsonl", ROOT / "data" / "math_tasks_eval.jsonl"


@dataclass(frozen=True)
class Job:
    """One run. `name` is that of its result, `flags` are KEY=VALUE, `project` the copy of the code it runs in."""

    name: str
    script: str
    flags: tuple[str, ...]
    seed: int
    base_steps: int
    mutant: dict[str, str] | None = None  # what is broken in it
    project: Path = ROOT

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def command(self) -> list[str]:
        flags = [f"--{flag}" for flag in self.flags]
        return [self.script, *flags, f"--seed={self.seed}", f"--base_seed={self.seed}"]

    def request(self) -> dict[str, Any]:
        """What was asked for: a result of another request is none of this job's."""
        return {
            "command": self.command,
            "mutant": self.mutant,
            "script_sha256": hashlib.sha256(code_of(self.project / self.script).encode()).hexdigest()[:16],
        }


def perform(job: Job, work: Path) -> dict[str, Any]:
    """Run it and measure what it left in `work`; a failure is a result too: {"error": its last line}."""
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
    except Exception as error:  # the measuring itself failed; the other runs shall go on
        return job.request() | {"error": f"{type(error).__name__}: {error}"[:300], "status": 0, "seconds": seconds}
    printed.unlink()
    for leftover in folder.iterdir():  # the models weigh megabytes
        if leftover.name != "metrics.jsonl":
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return job.request() | result


def progress(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What metrics.jsonl says of the way there.

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
    """Of every number of a run but its times: equal where two runs are the same, bit for bit."""
    timeless = [{key: value for key, value in row.items() if "time" not in key} for row in rows]
    return hashlib.sha256(json.dumps(timeless).encode()).hexdigest()[:16]


def describe(final: Path, base: Path) -> dict[str, Any]:
    """The trained model: its greedy answers, and how far it is from its base."""
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

    sum_t sum_v p(v | s_t) (log p(v | s_t) - log q(v | s_t)) is exact for every text s_t met on the way, so that only
    the choice of the answers is random: its mean over answers is unbiased for the KL of whole answers.
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
    """The tiny base model of a seed, before the runs that share it."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # two progress bars in one terminal
        tiny_base_model(seed, base_steps)
