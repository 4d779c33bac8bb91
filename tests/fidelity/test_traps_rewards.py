"""Where rewards and advantages of GRPO go wrong without an error: one test a trap, named after it."""

import itertools
import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grpo.advantages import group_advantages, zero_variance_groups
from grpo.errors import InputError
from grpo.logprobs import compute_logprobs
from grpo.loss import clipped_surrogate, clipped_tokens
from grpo.rollout import generate_completions
from grpo.settings.config import load_config
from reward_model import MathRewardModel, RewardError
from tests.algorithm.test_advantages import EXACT, PAIRS, REWARDS, doubles
from tests.fidelity import test_traps_loss as helpers
from tests.rewards.test_rewards import entry, returning, same, score

run_training, Run = helpers.run_training, helpers.Run  # a fixture, and what it returns
NAN = float("nan")


# Groups mixed up


def test_groups_mixed_up_in_the_advantages() -> None:
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = group_advantages(rewards)
    alone = torch.cat([group_advantages(row.unsqueeze(0)) for row in rewards])
    assert torch.equal(together, alone)
    # Columns instead of rows would be another result.
    assert not torch.allclose(together[:4, :4], group_advantages(rewards[:4].T).T, atol=0.1)


def test_groups_tiled_instead_of_repeated_in_the_rollout(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Row p * G + g continues prompt p: its ids, its mask, its cache and its first logits all belong to that prompt."""
    model, prompts = make_model("llama").eval(), ["1+2=", "x", "what is 7?"]
    rollout = generate_completions(model, tokenizer, prompts, group_size=2, max_completion_length=5)
    for row in range(6):
        prompt_ids = torch.tensor([tokenizer(prompts[row // 2])["input_ids"]])
        assert rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist() == prompt_ids[0].tolist()
        kept = rollout.completion_mask[row]
        completion = rollout.completion_ids[row][kept].unsqueeze(0)
        alone, _ = compute_logprobs(
            model, prompt_ids, torch.ones_like(prompt_ids), completion, torch.ones_like(completion)
        )
        torch.testing.assert_close(rollout.sampling_logps[row][kept], alone[0], rtol=0, atol=1e-5)
        other_ids = torch.tensor([tokenizer(prompts[row % 3])["input_ids"]])  # whose row it were if groups were tiled
        if row % 3 != row // 2:
            tiled, _ = compute_logprobs(
                model, other_ids, torch.ones_like(other_ids), completion, torch.ones_like(completion)
            )
            assert (tiled - alone).abs().max() > 0.01


def advantages_by_hand(rewards: list[float]) -> list[float]:
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    return [(reward - mean(rewards)) / (stdev(rewards) + 1e-4) for reward in rewards]


def test_groups_tiled_instead_of_repeated_in_the_loop(run_training: Callable[..., Run]) -> None:
    samples = run_training().samples
    groups = [samples[start : start + 4] for start in range(0, 12, 4)]
    assert [len({row["prompt"] for row in group}) for group in groups] == [1, 1, 1]
    assert len({row["prompt"] for row in samples}) == 3
    expected = [advantages_by_hand([row["reward"] for row in group]) for group in groups]
    assert [row["advantage"] for row in samples] == pytest.approx(list(itertools.chain(*expected)), abs=1e-4)
    # Tiled, completion g of prompt p would be compared with those in rows p, p + 3, p + 6, p + 9.
    tiled = advantages_by_hand([row["reward"] for row in samples[::3]])
    assert [row["advantage"] for row in samples[::3]] != pytest.approx(tiled, abs=0.1)


def test_groups_tiled_where_completions_are_scored(run_training: Callable[..., Run]) -> None:
    """Every completion is scored with its own prompt."""
    samples = run_training(rewards="['tests.toy_rewards:prompt_length']").samples
    assert [row["reward"] for row in samples] == [len(row["prompt"]) for row in samples]
    assert len({row["reward"] for row in samples}) == 3


def test_equal_prompts_merged_into_one_group(run_training: Callable[..., Run]) -> None:
    """Two samples with the same text, and other answers, are two groups."""
    samples = run_training(prompts=["abc", "abc"], batch_size=2).samples
    groups = [samples[:4], samples[4:]]
    assert [{row["answer"] for row in group} for group in groups] in ([{0}, {1}], [{1}, {0}])
    assert [row["completion"] for row in groups[0]] != [row["completion"] for row in groups[1]]  # noise of their own
    expected = [advantages_by_hand([row["reward"] for row in group]) for group in groups]
    assert [row["advantage"] for row in samples] == pytest.approx(list(itertools.chain(*expected)), abs=1e-4)
    merged = advantages_by_hand([row["reward"] for row in samples])
    assert [row["advantage"] for row in samples] != pytest.approx(merged, abs=0.1)


# What a group is compared with


def test_seven_times_0_95_gives_no_advantage() -> None:
    rewards = torch.full((1, 7), 0.95)
    for baseline, scale in PAIRS:
        if baseline != "none":
            assert torch.equal(group_advantages(rewards, baseline=baseline, scale=scale, eps=1e-8), torch.zeros(1, 7))
    nearly = doubles([0.3, 0.1 + 0.2])  # equal but for the last bit
    assert nearly[0, 0] != nearly[0, 1]
    assert torch.equal(group_advantages(nearly, eps=0.0), torch.zeros_like(nearly))
    # The naive formula on the same rewards: their float32 mean is off by one ulp, and noise / noise is no signal.
    mean = rewards.sum() / 7
    naive = (rewards - mean) / ((rewards - mean).square().sum() / 6).sqrt().add(1e-8)
    assert naive.abs().max() > 0.5


def test_population_std_instead_of_unbiased() -> None:
    # -2 / (2.6457513110645907 + 0.0001) and so on
    expected = doubles(
        [-0.7559003756697407, -0.3779501878348705, 1.1338505635046111],
        [-0.5773169377806822, -0.5773169377806822, 1.1546338755613645],
    )
    advantages = group_advantages(doubles(*REWARDS))
    torch.testing.assert_close(advantages, expected, **EXACT)
    # The population std of row 0 is sqrt(14/3) = 2.160: it would give -0.926, -0.463, 1.389.
    population = doubles(*REWARDS) - doubles([3.0], [1.0])
    population = population / (population.square().mean(1, keepdim=True).sqrt() + 1e-4)
    assert (advantages - population).abs().min() > 0.08


def test_group_of_one_does_nothing_silently() -> None:
    for baseline in ("group", "leave_one_out"):
        with pytest.raises(ValueError, match="group_size"):
            group_advantages(torch.ones(3, 1), baseline=baseline, scale="none")
    rewards = doubles([1.0], [3.0], [5.0])
    torch.testing.assert_close(
        group_advantages(rewards, baseline="batch", scale="none"), doubles([-2.0], [0.0], [2.0]), **EXACT
    )
    assert torch.equal(group_advantages(rewards, baseline="none", scale="none"), rewards)


def test_group_of_one_is_refused_before_any_compute() -> None:
    for baseline, scale in (("group", "group"), ("leave_one_out", "none")):
        with pytest.raises(InputError, match="group_size: 1 is too small"):
            load_config(overrides=["group_size=1", f"advantage_baseline={baseline}", f"advantage_scale={scale}"])
    assert load_config(overrides=["group_size=1", "advantage_baseline=batch", "advantage_scale=none"]).group_size == 1


def test_advantages_of_shape_b_broadcast_along_the_wrong_axis() -> None:
    square, mask = torch.zeros(3, 3), torch.ones(3, 3)
    for function in (clipped_surrogate, clipped_tokens):
        for shape in [(3,), (1, 3), (3, 2), (), (3, 3, 1)]:
            with pytest.raises(ValueError, match="advantages"):
                function(square, square, torch.ones(shape), mask, clip_range=0.2)
    # What the refusal prevents: (3,) would have run along the tokens instead of the completions.
    by_row = clipped_surrogate(square, square, torch.tensor([[1.0], [2.0], [3.0]]), mask, clip_range=0.2)
    assert by_row.tolist() == [[-1.0] * 3, [-2.0] * 3, [-3.0] * 3]


# Rewards that are none


def test_nan_reward_counted_as_zero() -> None:
    nan = float("nan")
    rewards = doubles([1.0, nan, 3.0, nan], [5.0, nan, nan, nan], [nan, nan, nan, nan], [0.0, 0.0, 0.0, 4.0])
    # Row 0: mean of 1 and 3 is 2, std sqrt(2) = 1.4142135623730951. One valid reward, or none: nothing to compare.
    # Row 3: mean 1, squares 1 + 1 + 1 + 9 = 12, variance 4, std 2.
    expected = doubles(
        [-0.7070567847218315, 0.0, 0.7070567847218315, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [-0.4999750012499375, -0.4999750012499375, -0.4999750012499375, 1.4999250037498125],
    )
    torch.testing.assert_close(group_advantages(rewards), expected, **EXACT)
    assert zero_variance_groups(rewards).tolist() == [False, True, True, False]


def test_none_from_every_reward_counted_as_zero() -> None:
    """Nothing applies: no reward, which is not the reward 0 of a completion that was judged and found wrong."""
    scores = score([entry("a", returning(1.0, None, 0.0)), entry("logged", returning(5.0, 5.0, 5.0), weight=0.0)])
    assert same(scores.combined, 1.0, NAN, 0.0)
    assert same(scores.is_correct, 1.0, NAN, 0.0)
    assert scores.metrics()["reward"] == 0.5  # the mean of two; with a zero for the third it would be 1/3


@pytest.mark.parametrize("values", [[1.0], [1.0] * 4, []])
def test_reward_of_the_wrong_count(values: list[float]) -> None:
    with pytest.raises(RewardError, match=rf"reward culprit returned {len(values)} values for 3 completions"):
        score([entry("culprit", returning(*values))])


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, "1", [1.0], 1j])
def test_reward_that_is_nan_or_no_number(value: Any) -> None:
    with pytest.raises(RewardError, match=r"reward culprit returned .* for 'prompt 1'"):
        score([entry("fine", returning(1.0, 1.0, 1.0)), entry("culprit", returning(1.0, value, 1.0))])


@pytest.mark.parametrize("returned", [None, 1.0, "abc", torch.ones(3)])
def test_reward_that_is_no_list(returned: Any) -> None:
    with pytest.raises(RewardError, match="reward culprit returned"):
        score([entry("culprit", lambda prompts, completions, **_: returned)])


def test_reward_that_raises() -> None:
    def culprit(prompts: list, completions: list, **_: Any) -> list[float]:
        raise KeyError("level")

    with pytest.raises(RewardError, match="reward culprit raised KeyError: 'level'") as caught:
        score([entry("culprit", culprit)])
    assert isinstance(caught.value.__cause__, KeyError)


# Answers that fool a reward
# The long table of strings is in tests/rewards/test_rewards.py.


def marks(answer: int, *completions: str) -> list[float]:
    model = MathRewardModel()
    return [model.compute_reward({"answer": answer}, text) for text in completions]


def test_substring_credit() -> None:
    assert marks(5, "15", "52", "5.5", "-5", "1,005") == [0.0] * 5
    assert marks(5, "5", "05", "5.0") == [1.0] * 3
    assert all("5" in text for text in ("15", "52", "5.5", "-5", "1,005"))  # what a substring test would accept


def test_first_number_instead_of_the_last() -> None:
    assert marks(5, "5 or 6", "5+1=6", "12-7 is 5") == [0.0, 0.0, 1.0]


def test_answer_repeated_in_every_form() -> None:
    assert marks(5, "5 5 5 6", "1 2 3 4 5 6 7 8 9 10", "5, five, 5.0, 05 and 4") == [0.0] * 3
    assert marks(10, "1 2 3 4 5 6 7 8 9 10") == [1.0]


def test_text_after_the_answer() -> None:
    assert marks(5, "5, I am sure", "5.", "x=5 y", "The answer is 5!", "5 (checked)") == [1.0] * 5
    assert marks(5, "5, and then 6", "5 /2") == [0.0] * 2


def test_minus_after_a_digit_read_as_a_sign() -> None:
    assert marks(5, "10-5", "10 - 5") == [1.0] * 2
    assert marks(-5, "10-5", "= -5", "\u22125") == [0.0, 1.0, 1.0]


def test_eval_of_model_text() -> None:
    """Evaluated, the first would take forever, the others would be right or do harm."""
    assert marks(9, "9**9**9") == [1.0]
    assert marks(5, "2+3", "10/2", "int('5')+0", "__import__('os').getpid()*0+5 #1") == [0.0] * 4


def test_no_number_at_all_is_wrong_whatever_the_answer() -> None:
    for answer in (0, -1, 5):
        assert marks(answer, "", "none", "3.5", "\u0665") == [0.0] * 4


# Format and correctness


def test_format_reward_outweighs_correctness() -> None:
    """Nothing forbids it, so it must be seen: a mean of each reward apart, and `right` asks the first reward alone."""
    correct = entry("math", returning(1.0, 0.0, 0.0), weight=1.0)
    form = entry("format", returning(0.0, 1.0, 1.0), weight=3.0)
    scores = score([correct, form])
    assert same(scores.combined, 1.0, 3.0, 3.0)  # well-formed and wrong is worth more than right
    row = scores.metrics()
    assert row["rewards/math/mean"] == pytest.approx(1 / 3)  # in its own unit, not times its weight
    assert row["rewards/format/mean"] == pytest.approx(2 / 3)
    assert same(scores.is_correct, 1.0, 0.0, 0.0)
    assert not same(score([form, correct]).is_correct, 1.0, 0.0, 0.0)
