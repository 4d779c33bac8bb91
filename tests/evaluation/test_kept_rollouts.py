"""An evaluation that was stopped goes on where it was, and ends with the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import grpo.evaluation.kept_rollouts
from grpo.evaluation.greedy import Evaluation, count_correct, evaluate_greedy
from grpo.evaluation.kept_rollouts import KeptRollouts
from grpo.rollout import Rollout
from reward_model import Scores, load_rewards, score_completions

SAMPLES = [{"prompt": text} for text in ("1+2=", "abc", "12-7=", "x?", "77")]
REWARDS = load_rewards(["tests.toy_rewards:even_digits"])


def score(samples: Any, rollout: Rollout) -> Scores:
    return score_completions(REWARDS, samples, rollout.completions, rollout.token_lists())


def evaluated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, kept: KeptRollouts | None = None
) -> tuple[Evaluation, list[int | None]]:
    common: dict[str, Any] = {"max_completion_length": 6, "batch_rows": 2}
    if kept is not None:
        common["generate"] = kept.of(model)
    greedy = evaluate_greedy(model, tokenizer, SAMPLES, score, **common)
    return greedy, count_correct(model, tokenizer, SAMPLES, score, k=2, seed=3, **common)


class StoppedError(Exception):
    """Instead of Ctrl-C."""


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Any]]:
    """sampled(n): let the sampler be called n times, then stop; what it was asked is noted."""
    real = grpo.evaluation.kept_rollouts.generate_completions

    def limit(most: int) -> list[Any]:
        calls: list[Any] = []

        def generate(model: Any, tokenizer: Any, prompts: Any, **settings: Any) -> Rollout:
            if len(calls) == most:
                raise StoppedError
            calls.append(prompts)
            return real(model, tokenizer, prompts, **settings)

        monkeypatch.setattr(grpo.evaluation.kept_rollouts, "generate_completions", generate)
        return calls

    return limit


def same(ours: tuple[Evaluation, Any], theirs: tuple[Evaluation, Any]) -> bool:
    rows = [vars(greedy) | {"seconds": 0} for greedy, _ in (ours, theirs)]
    return rows[0] == rows[1] and ours[1] == theirs[1]


def test_a_stopped_evaluation_goes_on_and_ends_alike(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, sampled: Callable[[int], list[Any]]
) -> None:
    path = tmp_path / "kept.jsonl"
    whole = evaluated(llama, tokenizer)
    for most in (2, 0, 3, 1):
        sampled(most)
        with pytest.raises(StoppedError):
            evaluated(llama, tokenizer, KeptRollouts(path))
        with path.open("a") as file:
            file.write('{"key": "half')  # killed while it wrote
    calls = sampled(99)
    kept = KeptRollouts(path)
    assert same(evaluated(llama, tokenizer, kept), whole)
    assert len(calls) == 2  # three batches of greedy answers, five of samples: six of the eight were there
    assert all(json.loads(line) for line in path.read_text().splitlines())
    kept.forget()
    assert not path.exists()


def test_nothing_stale_is_taken_for_fresh(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, sampled: Callable[[int], list[Any]]
) -> None:
    kept = KeptRollouts(tmp_path / "kept.jsonl")
    generate, settings = kept.of(llama), {"group_size": 2, "max_completion_length": 5, "seed": 1}
    first = generate(llama, tokenizer, [[5]], **settings)
    kept = KeptRollouts(tmp_path / "kept.jsonl")
    calls = sampled(99)
    again = kept.of(llama)(llama, tokenizer, [[5]], **settings)
    assert calls == []
    assert again.completions == first.completions
    assert again.token_lists() == first.token_lists()
    assert torch.equal(again.is_truncated, first.is_truncated)
    for prompts, changes in [([[6]], {}), ([[5]], {"seed": 2}), ([[5]], {"max_completion_length": 4})]:
        kept.of(llama)(llama, tokenizer, prompts, **(settings | changes))
    assert len(calls) == 3
    with torch.no_grad():
        next(llama.parameters()).view(-1)[0] += 1
    kept.of(llama)(llama, tokenizer, [[5]], **settings)
    assert len(calls) == 4
    other = KeptRollouts(tmp_path / "kept.jsonl", dtype="bfloat16")
    other.of(llama)(llama, tokenizer, [[5]], **settings)
    assert len(calls) == 5
    other.forget()  # its own answer; those of the others stay
    assert len(KeptRollouts(tmp_path / "kept.jsonl").rows) == 5
