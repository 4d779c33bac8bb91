"""Evaluation: intervals and pass@k by hand, greedy accuracy with rows where no reward applies."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grpo.evaluation.greedy import Evaluation, evaluate_greedy
from grpo.evaluation.statistics import pass_at_k, wilson_interval
from grpo.rollout import Rollout, generate_completions
from reward_model import Scores

SAMPLES = [{"prompt": text} for text in ("1+2=", "a", "3*4-5=", "?", "12")]
NAN = float("nan")


@pytest.mark.parametrize(
    ("num_correct", "num_samples", "low", "high"),
    [
        # with z^2 = 3.8414588: 0 of 10 ends at z^2 / (10 + z^2) = 0.2775328, and 10 of 10 mirrors it
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        # centre (0.5 + z^2/200) / (1 + z^2/100) = 0.5, half width z * sqrt(0.0025 + z^2/40000) / 1.0384146 = 0.0961685
        (50, 100, 0.4038315, 0.5961685),
        (8, 10, 0.4901625, 0.9433178),
        (1, 1, 0.2065493, 1.0),
    ],
)
def test_wilson_interval_by_hand(num_correct: int, num_samples: int, low: float, high: float) -> None:
    assert wilson_interval(num_correct, num_samples) == pytest.approx((low, high), abs=1e-7)


def test_wilson_interval_solves_its_equation_and_stays_in_0_1() -> None:
    # The bounds are the p with |share - p| = z * sqrt(p (1 - p) / n).
    for num_correct, num_samples in [(1, 7), (8, 10), (19, 20), (300, 1000)]:
        for bound in wilson_interval(num_correct, num_samples):
            distance = abs(num_correct / num_samples - bound)
            assert distance == pytest.approx(1.959963984540054 * math.sqrt(bound * (1 - bound) / num_samples))
    for num_correct in range(21):
        low, high = wilson_interval(num_correct, 20)
        assert 0 <= low <= num_correct / 20 <= high <= 1
        assert high - low > 0.1  # the textbook interval p +- 1.96 s has no width at 0 and 20


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (10, 3, 1, 0.3),
        (10, 3, 2, 1 - 21 / 45),  # C(7, 2) / C(10, 2)
        (10, 3, 5, 1 - 21 / 252),  # C(7, 5) / C(10, 5)
        (10, 3, 8, 1.0),  # only 7 are wrong
        (10, 0, 5, 0.0),
        (10, 10, 1, 1.0),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(num_samples: int, num_correct: int, k: int, expected: float) -> None:
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_by_enumeration() -> None:
    for n, c, k in [(5, 2, 3), (6, 1, 2), (7, 4, 3)]:
        draws = list(itertools.combinations(range(n), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(min(draw) < c for draw in draws) / len(draws))
        assert pass_at_k(n, c, k) > 1 - (1 - c / n) ** k + 0.01  # the plug-in estimate is biased downwards


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    combined: dict[str, float],
    is_correct: dict[str, float],
    batch_rows: int = 2,
) -> Evaluation:
    """Greedy over SAMPLES, each scored by its prompt."""

    def score(samples: Sequence[dict[str, Any]], rollout: Rollout) -> Scores:
        assert len(samples) == len(rollout.completions) <= batch_rows
        prompts = [sample["prompt"] for sample in samples]
        verdicts = torch.tensor([is_correct[prompt] for prompt in prompts])
        return Scores(
            combined=torch.tensor([combined[prompt] for prompt in prompts]),
            is_correct=verdicts,
            by_name={"mine": torch.tensor([combined[prompt] for prompt in prompts])},
            has_answer=torch.ones(len(prompts), dtype=torch.bool),
            is_correct_leniently=torch.full_like(verdicts, NAN),
        )

    return evaluate_greedy(model, tokenizer, SAMPLES, score, max_completion_length=6, batch_rows=batch_rows)


def test_rows_where_no_reward_applies_count_nowhere(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [sample["prompt"] for sample in SAMPLES]
    combined = dict(zip(prompts, [1.0, NAN, 0.0, 0.5, NAN], strict=True))
    is_correct = dict(zip(prompts, [1.0, NAN, 0.0, 1.0, NAN], strict=True))
    evaluation = evaluate(llama, tokenizer, combined, is_correct)
    assert evaluation.is_correct == [True, None, False, True, None]
    assert (evaluation.num_correct, evaluation.num_scored) == (2, 3)
    assert evaluation.reward == evaluation.rewards["mine"] == pytest.approx(0.5)  # (1 + 0 + 0.5) / 3, not / 5
    row = evaluation.metrics()
    assert row["eval/accuracy"] == pytest.approx(2 / 3)  # not 2/5
    assert (row["eval/accuracy_low"], row["eval/accuracy_high"]) == wilson_interval(2, 3)
    assert "0.667" in str(evaluation)
    assert "of 3" in str(evaluation)


def test_no_accuracy_where_it_is_defined_for_no_row(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [sample["prompt"] for sample in SAMPLES]
    evaluation = evaluate(llama, tokenizer, dict.fromkeys(prompts, 0.25), dict.fromkeys(prompts, NAN))
    assert evaluation.num_scored == 0
    names = set(evaluation.metrics())
    assert {"eval/clipped_ratio", "eval/mean_length", "eval/reward"} <= names
    assert not {"eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"} & names
    assert evaluation.reward == 0.25
    assert "accuracy" not in str(evaluation)


def test_evaluation_is_greedy_one_completion_a_sample_in_order(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [sample["prompt"] for sample in SAMPLES]
    rights = dict(zip(prompts, [0.0, 1.0, 0.0, 1.0, 1.0], strict=True))
    whole = generate_completions(
        llama, tokenizer, prompts, group_size=1, max_completion_length=6, temperature=0.0, seed=9
    )
    for batch_rows in (1, 2, 5, 100):
        evaluation = evaluate(llama, tokenizer, rights, rights, batch_rows)
        assert evaluation.completions == whole.completions
        assert evaluation.is_correct == [False, True, False, True, True]
        assert evaluation.reward == pytest.approx(0.6)
        assert evaluation.mean_length == pytest.approx(whole.completion_mask.sum().item() / 5)
        assert evaluation.clipped_ratio == pytest.approx(whole.is_truncated.float().mean().item())
    sampled = generate_completions(llama, tokenizer, prompts, group_size=1, max_completion_length=6, seed=9)
    assert sampled.completions != whole.completions


def test_length_and_clipped_ratio_by_hand(scripted: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    # Lengths 3 (EOS is id 1), 6 (cut off), 1, 6 (ends with EOS at the very end: not cut off), 2.
    scripts = [[5, 5, 1, 5, 5, 5], [5] * 6, [1] * 6, [5, 5, 5, 5, 5, 1], [5, 1, 1, 5, 5, 5]]
    prompts = [sample["prompt"] for sample in SAMPLES]
    ones = dict.fromkeys(prompts, 1.0)
    evaluation = evaluate(scripted(scripts), tokenizer, ones, ones, batch_rows=5)
    assert evaluation.mean_length == pytest.approx(18 / 5)
    assert evaluation.clipped_ratio == pytest.approx(1 / 5)
    assert evaluation.completions == ["22", "222222", "", "22222", "2"]  # id 5 is the digit 2


def test_lengths_are_averaged_over_samples_not_over_batches(
    scripted: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches, the last one smaller: four samples end at once, and the one in the last batch is cut off at 6."""
    prompts = [sample["prompt"] for sample in SAMPLES]
    scripts = dict(zip(prompts, [[1] * 6] * 4 + [[5] * 6], strict=True))

    def by_prompt(model: None, tokenizer: PreTrainedTokenizerFast, prompts: list[str], **settings: Any) -> Rollout:
        return generate_completions(scripted([scripts[text] for text in prompts]), tokenizer, prompts, **settings)

    monkeypatch.setattr("grpo.evaluation.greedy.generate_completions", by_prompt)
    ones = dict.fromkeys(prompts, 1.0)
    evaluation = evaluate(None, tokenizer, ones, ones, batch_rows=2)
    assert evaluation.mean_length == pytest.approx(2.0)  # (1 + 1 + 1 + 1 + 6) / 5; of batches (1 + 1 + 6) / 3
    assert evaluation.clipped_ratio == pytest.approx(0.2)  # not 1 / 3
