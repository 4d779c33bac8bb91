"""Test whether the default run learns, and whether GRPO is the reason: ten seeds and two controls on the same bases.

    python -m benchmarks.toy                              all parts, 15 minutes on two cores
    python -m benchmarks.toy --seeds 0 1 --kinds grpo     some parts

For every seed (seed = base_seed), three models are trained and measured greedily on data/math_tasks_test.jsonl:

    grpo                `python train_grpo.py`, as a user would start it, including building the base model
    shuffled            the same, but the rewards of each step are randomly permuted among its completions
    rejection_sampling  supervised fine-tuning on the base model's own correct answers, with the same number of sampled
                        completions, optimizer steps and rows per step, the same optimizer and the same schedule as grpo

Results go to benchmarks/results/toy.json after every part. Parts that were measured with other code or settings are
repeated. `python -m benchmarks.readme` writes the numbers into the README.
"""

import argparse
import os
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.common import ROOT, Results, run_watched
from grpo.data import samples_for_step
from grpo.datasets.rows import JSONLinesDataset
from grpo.evaluation.statistics import pass_at_k, wilson_interval
from grpo.fast.noise import step_seed
from grpo.files import read_jsonl
from grpo.models.loading import load_policy
from grpo.models.optimizer import make_optimizer, set_learning_rate
from grpo.models.tiny import parse_problem, supervised_loss, tiny_base_model, worked_answer
from grpo.rollout import generate_completions
from grpo.settings.config import Config, load_config
from reward_model import MathRewardModel, math_reward

TEST_FILE = ROOT / "data" / "math_tasks_test.jsonl"
PICTURE = ROOT / "docs" / "training_curves.png"
KINDS = ("grpo", "shuffled", "rejection_sampling")
NUM_SAMPLES = 16  # completions per problem for pass@16


def shuffled_math(prompts: list, completions: list, answer: list, **_: Any) -> list[Any]:
    """The reward function of the control: the true rewards of the batch, randomly permuted among completions."""
    rewards = list(math_reward()(prompts=prompts, completions=completions, answer=answer))
    random.Random("".join(completions)).shuffle(rewards)
    return rewards


def describe(folder: Path, config: Config) -> dict[str, Any]:
    """Measure greedy accuracy and style on the test file, and pass@k of samples at temperature 1."""
    model, tokenizer = load_policy(str(folder), base_seed=0, device=torch.device("cpu"))
    samples = list(JSONLinesDataset(TEST_FILE))
    prompts = [sample["prompt"] for sample in samples]
    reward_model = MathRewardModel()

    def is_correct(sample: dict[str, Any], completion: str) -> bool:
        return reward_model.compute_reward(sample, completion) == 1.0

    length = config.max_completion_length
    greedy = generate_completions(
        model, tokenizer, prompts, group_size=1, max_completion_length=length, temperature=0.0
    )
    right = [is_correct(*pair) for pair in zip(samples, greedy.completions, strict=True)]
    worked = ["=" in completion for completion in greedy.completions]
    flawless = [
        completion == worked_answer(*parse_problem(prompt))
        for prompt, completion in zip(prompts, greedy.completions, strict=True)
    ]
    sampled = generate_completions(
        model, tokenizer, prompts, group_size=NUM_SAMPLES, max_completion_length=length, seed=step_seed(0, 0)
    )
    num_right = [
        sum(is_correct(sample, completion) for completion in sampled.completions[start : start + NUM_SAMPLES])
        for sample, start in zip(samples, range(0, len(sampled.completions), NUM_SAMPLES), strict=True)
    ]

    def share(rows: Sequence[bool], among: Sequence[bool]) -> float | None:
        chosen = [row for row, counts in zip(rows, among, strict=True) if counts]
        return sum(chosen) / len(chosen) if chosen else None

    low, high = wilson_interval(sum(right), len(right))
    return {
        "n": len(right),
        "num_right": sum(right),
        "accuracy": sum(right) / len(right),
        "accuracy_low": low,
        "accuracy_high": high,
        "worked_share": sum(worked) / len(worked),
        "worked_accuracy": share(right, worked),
        "worked_flawless": share(flawless, worked),
        "quick_accuracy": share(right, [not style for style in worked]),
        "mean_length": greedy.completion_mask.sum().item() / len(right),
        "sampled_accuracy": sum(num_right) / len(sampled.completions),
        "sampled_worked_share": sum("=" in completion for completion in sampled.completions) / len(sampled.completions),
        f"pass_at_{NUM_SAMPLES}": sum(pass_at_k(NUM_SAMPLES, c, NUM_SAMPLES) for c in num_right) / len(num_right),
    }


def run_command(seed: int, output: Path, *flags: str) -> dict[str, Any]:
    """Run `python train_grpo.py` in a separate process. Measures its total time, the time of its parts, its memory."""
    shutil.rmtree(output, ignore_errors=True)
    printed, bars = output.with_suffix(".out"), output.with_suffix(".err")
    command = ["train_grpo.py", f"--seed={seed}", f"--base_seed={seed}", f"--output_dir={output}", *flags]
    with printed.open("w") as out, bars.open("w") as err:
        status, total, peak = run_watched(command, stdout=out, stderr=err)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{bars.read_text()[-2000:]}")
    rows = read_jsonl(output / "metrics.jsonl")
    bar = re.findall(r"building the tiny base model.*?(\d+)/\1 \[.*?, *([\d.]+)step/s\]", bars.read_text())
    return {
        "command": " ".join(["python", *command]).replace(str(output), "…"),
        "seconds": {
            "total": total,
            "warm_up": float(bar[-1][0]) / float(bar[-1][1]) if bar else 0.0,  # the overall rate of the progress bar
            "rollout": sum(row.get("rollout_time", 0.0) for row in rows),
            "update": sum(row.get("update_time", 0.0) for row in rows),
            "evaluation": sum(row.get("eval/time", 0.0) for row in rows),
        },
        "peak_memory_gb": peak,
        "held_out_curve": [[row["step"], row["eval/accuracy"]] for row in rows if "eval/accuracy" in row],
        "printed": printed.read_text().replace(str(output), "checkpoints"),
    }


def measure_grpo(seed: int, config: Config, work: Path) -> dict[str, Any]:
    shutil.rmtree(Path(os.environ["GRPO_CACHE"]), ignore_errors=True)  # so that the time includes building the base
    run = run_command(seed, work / f"grpo-{seed}")
    if seed == 0:  # the README shows the picture of this run, in 64 colours
        Image.open(work / "grpo-0/training_curves.png").convert("RGB").quantize(64).save(PICTURE, optimize=True)
    return {
        "base": describe(tiny_base_model(seed), config),
        "final": describe(work / f"grpo-{seed}/final", config),
        **run,
    }


def measure_shuffled(seed: int, config: Config, work: Path) -> dict[str, Any]:
    rewards = "[{name: math, weight: 0}, {name: 'benchmarks.toy:shuffled_math'}]"
    run = run_command(seed, work / f"shuffled-{seed}", f"--rewards={rewards}")
    return {"final": describe(work / f"shuffled-{seed}/final", config), **run}


def measure_rejection_sampling(seed: int, config: Config, work: Path) -> dict[str, Any]:
    model, tokenizer = load_policy("tiny", base_seed=seed, device=torch.device("cpu"))
    dataset = JSONLinesDataset(config.train_file)
    kept: list[tuple[str, str]] = []
    num_sampled = 0
    for step in tqdm(range(1, config.num_train_steps + 1), desc="sampling from the base", unit="step"):
        samples = samples_for_step(dataset, step=step, batch_size=config.batch_size, seed=seed)
        rollout = generate_completions(
            model,
            tokenizer,
            [sample["prompt"] for sample in samples],
            group_size=config.group_size,
            max_completion_length=config.max_completion_length,
            seed=step_seed(seed, step),
        )
        rows = [sample for sample in samples for _ in range(config.group_size)]
        rewards = math_reward()(
            prompts=rows, completions=rollout.completions, answer=[sample["answer"] for sample in rows]
        )
        num_sampled += len(rows)
        kept += [
            (sample["prompt"], completion)
            for sample, completion, reward in zip(rows, rollout.completions, rewards, strict=True)
            if reward == 1.0
        ]

    optimizer = make_optimizer(model, config)
    rng = random.Random(seed)
    model.train()
    queue: list[tuple[str, str]] = []
    for update in tqdm(range(config.num_train_steps), desc="fine-tuning on what was right", unit="step"):
        while len(queue) < config.batch_size * config.group_size:
            queue += rng.sample(kept, len(kept))
        batch, queue = queue[: config.batch_size * config.group_size], queue[config.batch_size * config.group_size :]
        prompts, answers = (tokenizer(list(texts))["input_ids"] for texts in zip(*batch, strict=True))
        supervised_loss(model, prompts, answers, tokenizer.eos_token_id).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        set_learning_rate(optimizer, config, update)
        optimizer.step()
        optimizer.zero_grad()
    folder = work / f"rejection_sampling-{seed}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    worked = sum("=" in completion for _, completion in kept)
    return {
        "final": describe(folder, config),
        "num_sampled": num_sampled,
        "num_kept": len(kept),
        "kept_worked_share": worked / len(kept),
    }


MEASURES = {"grpo": measure_grpo, "shuffled": measure_shuffled, "rejection_sampling": measure_rejection_sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--work", type=Path, default=ROOT / "checkpoints-toy", help="folder for the runs themselves")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)

    config = load_config()
    results = Results(__file__, data=sorted(ROOT.glob("data/*.jsonl")))
    for kind in arguments.kinds:  # grpo first, because its times need an otherwise idle machine
        for seed in arguments.seeds:
            if results.has(f"{kind}-{seed}"):
                continue
            os.environ["GRPO_CACHE"] = str(work / f"cache-{seed}")
            result = MEASURES[kind](seed, config, work)
            results.save(f"{kind}-{seed}", result)
            print(f"{kind} {seed}: accuracy {result['final']['accuracy']:.3f}", flush=True)


if __name__ == "__main__":
    main()
