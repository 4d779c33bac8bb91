"""examples/grpo_from_scratch.py: it computes what train_grpo.py does, and it learns."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo.run.plots
import grpo.run.setup
import train_grpo
from examples import grpo_from_scratch as scratch
from grpo.data import samples_for_step
from grpo.datasets.rows import JSONLinesDataset
from grpo.models.loading import load_policy
from grpo.rollout import Rollout, generate_completions
from grpo.settings.config import load_config
from tests.run import test_train as helpers
from tests.run.test_train import read

small = helpers.small  # the fixture
ROOT = Path(__file__).resolve().parents[2]


def in_float64(*arguments: Any, **settings: Any) -> Any:
    """`load_policy`, so that rounding cannot hide behind the optimizer, which scales every gradient up."""
    model, tokenizer = load_policy(*arguments, **settings)
    return model.double(), tokenizer


class FirstLetters:
    """A reward that nearly every completion gets another value from."""

    def compute_reward(self, sample: dict[str, Any], completion: str) -> float:
        return len(set(completion)) / 8


def first_letters(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [FirstLetters().compute_reward({}, completion) for completion in completions]


@pytest.fixture
def both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]], float]]:
    """both(settings): two steps of train_grpo.py, and two of the example with the same samples.

    Returns (what each step of train_grpo.py computed, the same of the example, the largest difference of a weight).
    """

    def run(settings: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], float]:
        rollouts: list[Rollout] = []
        policies: list[Any] = []

        def recorded(model: Any, *arguments: Any, **options: Any) -> Rollout:
            policies[:] = [model]
            rollouts.append(generate_completions(model, *arguments, **options))
            return rollouts[-1]

        monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)
        monkeypatch.setattr(grpo.run.setup, "load_policy", in_float64)
        monkeypatch.setattr(grpo.run.setup, "generate_completions", recorded)
        settings = settings | {
            "num_train_steps": 2, "batch_size": scratch.NUM_PROMPTS, "group_size": scratch.GROUP_SIZE,
            "max_completion_length": scratch.MAX_TOKENS, "learning_rate": scratch.LEARNING_RATE,
            "clip_range": scratch.CLIP_RANGE, "kl_coeff": scratch.KL_COEFF, "seed": scratch.SEED,
            "lr_schedule": "constant", "warmup_steps": 0, "device": "cpu", "output_dir": tmp_path / "run",
        }  # fmt: skip
        config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
        train_grpo.main(config)
        rows = read(tmp_path / "run" / "metrics.jsonl")[1:]
        samples = read(tmp_path / "run" / "samples.jsonl")
        ours = [
            {"loss": row["loss"]}
            | {name: [one[name] for one in samples if one["step"] == row["step"]] for name in ("reward", "advantage")}
            for row in rows
        ]

        policy, tokenizer = in_float64(config.model_name, base_seed=config.base_seed, device=torch.device("cpu"))
        reference = load_policy(config.model_name, base_seed=config.base_seed, device=torch.device("cpu"))[0].double()
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=scratch.LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
        )
        dataset, theirs = JSONLinesDataset(config.train_file), []
        for step, rollout in enumerate(rollouts[1:], start=1):  # the first one is the pre-flight's
            completions = iter(rollout.token_lists())
            monkeypatch.setattr(
                scratch, "sample", lambda model, prompt, eos, completions=completions: next(completions)
            )
            problems = samples_for_step(dataset, step=step, batch_size=scratch.NUM_PROMPTS, seed=scratch.SEED)
            rewards, advantages, loss = scratch.train_step(policy, reference, optimizer, tokenizer, problems)
            assert next(completions, None) is None
            theirs.append({"reward": rewards, "advantage": advantages, "loss": loss})
        pairs = zip(policies[0].parameters(), policy.parameters(), strict=True)
        return ours, theirs, max(float((mine - other).abs().max()) for mine, other in pairs)

    return run


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], difference: float) -> None:
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["reward"] == pytest.approx(other["reward"], abs=1e-7)
        assert len(set(mine["reward"])) > 1
        assert mine["advantage"] == pytest.approx(other["advantage"], abs=1e-5)  # rewards are float32 in both
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert ours[1]["loss"] != 0
    assert difference < 5e-6  # of 1e-3 that every weight moves


def test_two_steps_are_those_of_train_grpo(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, both: Callable[..., Any]
) -> None:
    for name, value in {"NUM_PROMPTS": 4, "GROUP_SIZE": 4, "MAX_TOKENS": 6}.items():
        monkeypatch.setattr(scratch, name, value)
    monkeypatch.setattr(scratch, "MathRewardModel", FirstLetters)
    rewards = "[tests.fidelity.test_from_scratch:first_letters]"
    assert_same(*both(small | {"rewards": rewards, "eval_metric": "eval/reward"}))


@pytest.mark.parametrize(("name", "wrong"), [("KL_COEFF", 0.5), ("CLIP_RANGE", 0.9), ("LEARNING_RATE", 6e-4)])
def test_the_comparison_can_fail(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, both: Callable[..., Any], name: str, wrong: float
) -> None:
    """Another setting than the run's, put in after the run: the weights differ. (With one update the clip is idle.)"""
    for setting, value in {"NUM_PROMPTS": 4, "GROUP_SIZE": 4, "MAX_TOKENS": 6}.items():
        monkeypatch.setattr(scratch, setting, value)
    monkeypatch.setattr(scratch, "MathRewardModel", FirstLetters)
    main = train_grpo.main

    def then_changed(config: Any) -> None:
        main(config)
        monkeypatch.setattr(scratch, name, wrong)

    monkeypatch.setattr(train_grpo, "main", then_changed)
    rewards = "[tests.fidelity.test_from_scratch:first_letters]"
    _, _, difference = both(small | {"rewards": rewards, "eval_metric": "eval/reward"})
    assert (difference > 5e-5) == (name != "CLIP_RANGE")


@pytest.mark.slow
def test_two_steps_on_the_toy_are_those_of_train_grpo(both: Callable[..., Any]) -> None:
    """As the example stands: the tiny base model, its problems, its reward."""
    assert_same(*both({}))


@pytest.mark.slow
def test_the_command_learns() -> None:
    command = [sys.executable, "examples/grpo_from_scratch.py", "--steps", "20"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rewards = [float(value) for value in re.findall(r"^step +\d+  reward ([\d.]+)  loss", result.stdout, re.MULTILINE)]
    assert len(rewards) == 20
    assert sum(rewards[:3]) / 3 < 0.25
    assert sum(rewards[-5:]) / 5 > 0.35
