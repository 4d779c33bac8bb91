"""Generalised advantages, the critic and its loss, each against plain Python and against the ways to get it wrong."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from grpo.advantages import whitened
from grpo.ppo.critic import Critic, clipped_value_loss, clipped_values, explained_variance
from grpo.ppo.gae import generalized_advantages
from tests.conftest import ragged_batch

NAN, INF = float("nan"), float("inf")


def plain_gae(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float
) -> tuple[list[float], list[float]]:
    """The definition: a sum over all later tokens, for every token of one completion."""
    length, advantages = len(rewards), []
    worth = [*values, 0.0]  # after the last token
    for t in range(length):
        total = 0.0
        for k in range(length - t):
            delta = rewards[t + k] + gamma * worth[t + k + 1] - worth[t + k]
            total += (gamma * gae_lambda) ** k * delta
        advantages.append(total)
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def padded(rows: list[list[float]], filler: float) -> Tensor:
    width = max(map(len, rows)) + 1
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.float64)


numbers = st.floats(-3, 3)
completions = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=7), min_size=1, max_size=4)


def against_plain(gae: Callable[..., Any], rows: list[list[Any]], gamma: float, gae_lambda: float) -> None:
    """What `gae` says of ragged completions whose padding is full of NaN, and what plain Python says."""
    rewards, values = ([[pair[i] for pair in row] for row in rows] for i in (0, 1))
    mask = ~padded(rewards, NAN).isnan()
    advantages, returns = gae(padded(rewards, NAN), padded(values, NAN), mask, gamma=gamma, gae_lambda=gae_lambda)
    for row, (r, v) in enumerate(zip(rewards, values, strict=True)):
        expected = plain_gae(r, v, gamma, gae_lambda)
        for ours, wanted in zip((advantages, returns), expected, strict=True):
            assert ours[row, : len(r)].tolist() == pytest.approx(wanted, abs=1e-9)
            assert ours[row, len(r) :].tolist() == [0.0] * (ours.shape[1] - len(r))


@settings(deadline=None, derandomize=True)
@given(completions, st.floats(0.5, 1), st.floats(0, 1))
def test_gae_is_the_double_sum_of_its_definition(rows: list[list[Any]], gamma: float, gae_lambda: float) -> None:
    against_plain(generalized_advantages, rows, gamma, gae_lambda)


@settings(deadline=None, derandomize=True)
@given(completions)
def test_lambda_1_believes_the_rewards_and_0_the_critic(rows: list[list[Any]]) -> None:
    rewards, values = (padded([[pair[i] for pair in row] for row in rows], 0.0) for i in (0, 1))
    mask = padded([[1.0] * len(row) for row in rows], 0.0).bool()
    to_go = rewards.flip(1).cumsum(1).flip(1) * mask
    blind, _ = generalized_advantages(rewards, 0 * values, mask, gamma=1.0, gae_lambda=1.0)
    assert torch.allclose(blind, to_go)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    assert torch.allclose(returns, to_go)  # whatever the critic says
    assert torch.allclose(advantages, to_go - values * mask)
    _, returns = generalized_advantages(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    next_values = torch.nn.functional.pad(values * mask, (0, 1))[:, 1:]
    assert torch.allclose(returns, (rewards + 0.9 * next_values) * mask)


def test_a_perfect_critic_leaves_no_advantage() -> None:
    rewards = torch.tensor([[0.0, 0.5, 0.0, 1.0]])
    values = torch.tensor([[1.5, 1.5, 1.0, 1.0]])
    for gae_lambda in (0.0, 0.3, 1.0):
        advantages, returns = generalized_advantages(rewards, values, rewards >= 0, gamma=1.0, gae_lambda=gae_lambda)
        assert torch.equal(advantages, torch.zeros(1, 4))
        assert torch.equal(returns, values)


def values_after_the_token(rewards: Tensor, values: Tensor, mask: Tensor, **settings: float) -> tuple[Tensor, Tensor]:
    return generalized_advantages(rewards, values.roll(1, 1), mask.roll(1, 1) & mask, **settings)


def bootstrap_through_padding(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """The value of the first padding, or of nothing, taken for that of the text's end."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.25)
    advantages, _ = generalized_advantages(rewards, values, torch.ones_like(mask), gamma=gamma, gae_lambda=gae_lambda)
    return advantages * mask, (advantages + values) * mask


def last_value_as_the_next(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """As for a game that was interrupted."""
    last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    bootstrapped = rewards + torch.where(last, gamma * values, 0.0)
    return generalized_advantages(bootstrapped, values, mask, gamma=gamma, gae_lambda=gae_lambda)


def lambda_alone(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """gamma forgotten in the sum."""
    return generalized_advantages(rewards, values, mask, gamma=gamma, gae_lambda=min(gae_lambda / gamma, 1.0))


TWINS = [values_after_the_token, bootstrap_through_padding, last_value_as_the_next, lambda_alone]


@pytest.mark.parametrize("wrong", TWINS, ids=lambda wrong: wrong.__name__)
def test_the_usual_mistakes_are_told_from_it(wrong: Callable[..., Any]) -> None:
    rows = [[(0.5, 0.3), (-0.2, 0.7), (1.0, -0.4)], [(0.1, 0.2)], [(0.0, 0.9), (1.0, 0.6)]]
    against_plain(generalized_advantages, rows, 0.9, 0.8)
    with pytest.raises(AssertionError):
        against_plain(wrong, rows, 0.9, 0.8)


def test_neither_advantages_nor_returns_carry_a_gradient() -> None:
    """A gradient through them would teach the critic to make advantages small instead of to foretell."""
    values = torch.zeros(1, 3, requires_grad=True)
    rewards = torch.ones(1, 3, requires_grad=True)
    results = generalized_advantages(rewards, values, torch.ones(1, 3), gamma=1.0, gae_lambda=0.9)
    assert not any(result.requires_grad for result in results)


def test_its_arguments_are_left_alone() -> None:
    rewards, values, mask = torch.ones(1, 3), torch.full((1, 3), 2.0), torch.tensor([[1, 1, 0]])
    generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=0.9)
    assert torch.equal(rewards, torch.ones(1, 3))
    assert torch.equal(values, torch.full((1, 3), 2.0))


def test_whitening_looks_at_kept_tokens_alone() -> None:
    values, mask = torch.tensor([[3.0, 1.0, 50.0], [2.0, -70.0, 90.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    ours = whitened(values, mask, eps=0.0)
    assert torch.allclose(ours, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert not torch.allclose(whitened(values, torch.ones_like(mask), eps=0.0) * mask, ours, atol=0.5)  # the wrong twin


# The loss of the critic


# V_old is 0, the clip 0.2: value, return -> the loss by hand, and whether V still learns.
QUADRANTS = [
    (0.5, 1.0, 0.32, False),  # beyond the clip, toward the return: (0.2 - 1)^2 / 2, constant
    (-0.5, -1.0, 0.32, False),
    (-0.5, 1.0, 1.125, True),  # beyond the clip, away from it: (-0.5 - 1)^2 / 2 is the worse one
    (0.5, -1.0, 1.125, True),
    (0.1, 1.0, 0.405, True),  # within the clip
    (0.5, 0.1, 0.08, True),  # past the return: (0.5 - 0.1)^2 / 2 is worse than (0.2 - 0.1)^2 / 2
    (0.4, 0.29, 0.00605, True),  # the return lies beyond the clip, and V is the farther one from it
]


@pytest.mark.parametrize(("value", "target", "expected", "learns"), QUADRANTS)
def test_the_value_loss_by_hand_in_every_case(value: float, target: float, expected: float, learns: bool) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    old_values, returns, mask = torch.zeros(1, 1), torch.tensor([[target]]), torch.ones(1, 1)
    loss = clipped_value_loss(values, old_values, returns, mask, value_clip_range=0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad.item() == pytest.approx((value - target) if learns else 0.0, abs=1e-6)
    assert clipped_values(values, old_values, returns, mask, value_clip_range=0.2).item() is not learns


def test_min_in_place_of_max_would_let_go_of_what_went_wrong() -> None:
    def wrong(values: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
        clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
        return torch.min((values - returns).square(), (clipped - returns).square()) / 2

    differing = [
        value
        for value, target, expected, _ in QUADRANTS
        if wrong(torch.tensor(value), torch.zeros(()), torch.tensor(target)).item() != pytest.approx(expected, abs=1e-6)
    ]
    assert len(differing) == 6  # all but the one within the clip


def test_without_a_clip_it_is_half_the_squared_error() -> None:
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = torch.randn(3, 2, 4, generator=generator)
    loss = clipped_value_loss(values, old_values, returns, torch.ones(2, 4), value_clip_range=INF)
    assert torch.allclose(loss, (values - returns).square() / 2)
    assert not clipped_values(values, old_values, returns, torch.ones(2, 4), value_clip_range=INF).any()


def test_masked_values_may_be_anything_and_send_no_gradient() -> None:
    values = torch.tensor([[0.5, NAN], [INF, 0.5]], requires_grad=True)
    mask = torch.tensor([[1, 0], [0, 1]])
    junk = torch.tensor([[0.0, NAN], [-INF, 0.0]])
    loss = clipped_value_loss(values, junk, junk, mask, value_clip_range=0.2)
    assert loss[0, 1].item() == loss[1, 0].item() == 0.0
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert not clipped_values(values, junk, junk, mask, value_clip_range=0.2)[0, 1]


def test_explained_variance_by_hand() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1, 1, 1, 0]])
    assert explained_variance(returns.clone(), returns, mask) == 1.0
    assert explained_variance(returns + 5, returns, mask) == pytest.approx(1.0)  # a constant error is no variance
    assert explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)  # errors 2, 4, 6
    assert math.isnan(explained_variance(returns, torch.ones(1, 4), mask))
    assert math.isnan(explained_variance(returns, returns, torch.zeros(1, 4)))


# The critic


def awake(critic: Critic) -> Critic:
    """With a head that is not zero."""
    torch.manual_seed(3)
    torch.nn.init.normal_(critic.head.weight)
    torch.nn.init.constant_(critic.head.bias, 0.7)
    return critic


def test_a_new_critic_says_0_and_its_head_still_learns(model: PreTrainedModel) -> None:
    critic = Critic(model)
    values = critic(*ragged_batch())
    assert torch.equal(values, torch.zeros(4, 6))
    (values - 1).square().sum().backward()
    assert critic.head.weight.grad is not None
    assert critic.head.weight.grad.abs().sum() > 0


def test_a_value_of_a_padded_batch_is_that_of_the_text_alone(model: PreTrainedModel) -> None:
    """Every value against the trunk run over the unpadded text before its token: no shift, no padding, no batch."""
    critic = awake(Critic(model.eval()))
    batch = ragged_batch()
    values = critic(*batch)
    prompt_ids, prompt_mask, completion_ids, completion_mask = batch
    assert values.dtype == torch.float32
    for row in range(4):
        prompt = prompt_ids[row][prompt_mask[row]]
        for t in range(6):
            if not completion_mask[row, t]:
                assert values[row, t] == 0.0
                continue
            text = torch.cat([prompt, completion_ids[row, :t]]).unsqueeze(0)  # before token t
            state = critic.trunk(input_ids=text, use_cache=False).last_hidden_state[0, -1]
            assert values[row, t].item() == pytest.approx(critic.head(state).item(), abs=2e-5)


def test_a_value_after_its_token_is_another_one(llama: PreTrainedModel) -> None:
    """The wrong twin: the state at the token itself, which has already seen it."""
    critic = awake(Critic(llama.eval()))
    prompt_ids, prompt_mask, completion_ids, completion_mask = ragged_batch()
    values = critic(prompt_ids, prompt_mask, completion_ids, completion_mask)
    changed = completion_ids.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 40
    moved = (critic(prompt_ids, prompt_mask, changed, completion_mask) - values).abs()[0] > 1e-4
    assert moved.tolist() == [False, False, True, True, False, False]  # token 1 is first seen by the value before 2


def test_the_critic_shares_no_weight_with_the_policy(model: PreTrainedModel) -> None:
    before = copy.deepcopy(model.state_dict())
    critic = awake(Critic(model))
    theirs = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert not any(weight.untyped_storage().data_ptr() in theirs for weight in critic.parameters())
    assert all(weight.requires_grad for weight in critic.parameters())
    critic(*ragged_batch()).sum().backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert any(weight.grad is not None and weight.grad.any() for weight in critic.trunk.parameters())
    with torch.no_grad():
        for weight in critic.parameters():
            weight.add_(1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_values_are_float32_under_autocast(llama: PreTrainedModel) -> None:
    critic = awake(Critic(llama))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = critic(*ragged_batch())
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())  # the head itself was not rounded to 8 bits
