"""Where two members of the family are the same algorithm, to 1e-12; and, as the twin, where they cease to be."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.advantages import compute_advantages, group_advantages, token_advantages, whitened
from grpo.loss import AGGREGATIONS, SURROGATES, loss_weights

EXACT = {"rtol": 0.0, "atol": 1e-12}
INF = math.inf
RAGGED = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
FULL = torch.ones(4, 4)
ADVANTAGES = torch.tensor([[1.5], [-0.5], [-2.0], [0.3]], dtype=torch.float64)


def random(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OLD = random(4, 4, seed=0) - 2
NEW = OLD + random(4, 4, seed=1)  # ratios from 0.3 to 3


def value_and_gradient(
    surrogate: str,
    logps: Tensor = NEW,
    old_logps: Tensor = OLD,
    advantages: Tensor = ADVANTAGES,
    mask: Tensor = RAGGED,
    aggregation: str = "token",
    **clip: Any,
) -> tuple[Tensor, Tensor]:
    """((B, C) per-token losses, gradient of their weighted sum)."""
    leaf = logps.clone().requires_grad_()
    loss = SURROGATES[surrogate].loss(leaf, old_logps, advantages, mask, **clip)
    weights = loss_weights(mask, aggregation, max_completion_length=4, dtype=torch.float64)
    return loss.detach(), torch.autograd.grad((loss * weights).sum(), leaf)[0]


def assert_same(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for our_tensor, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(our_tensor, wanted, **EXACT)


def differ(ours: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> list[bool]:
    """Whether values, and whether gradients, are far from each other."""
    return [bool((our - other).abs().max() > 1e-3) for our, other in zip(ours, others, strict=True)]


# Surrogates

CLIPS: dict[str, dict[str, Any]] = {
    "clipped": {"clip_range": 0.2, "dual_clip": 3.0},
    "gspo": {"clip_range": 3e-4, "clip_range_high": 4e-4},
    "cispo": {"clip_range_high": 4.0},
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("surrogate", CLIPS)
def test_where_old_is_new_every_gradient_is_reinforces(surrogate: str, aggregation: str) -> None:
    """The first update of a rollout; off-policy they all part."""
    clip = CLIPS[surrogate]
    expected = value_and_gradient("reinforce", NEW, NEW, aggregation=aggregation)[1]
    torch.testing.assert_close(
        value_and_gradient(surrogate, NEW, NEW, aggregation=aggregation, **clip)[1], expected, **EXACT
    )
    assert expected.abs().max() > 0.05
    assert differ(value_and_gradient(surrogate, NEW, OLD, aggregation=aggregation, **clip), (expected, expected))[1]


def test_gspo_gives_every_token_the_mean_of_its_completions_advantages() -> None:
    """So where advantages are per token its first gradient is not REINFORCE's, but that of the mean advantage."""
    per_token = random(4, 4, seed=2)
    mean = (per_token * RAGGED).sum(1, keepdim=True) / RAGGED.sum(1, keepdim=True)
    ours = value_and_gradient("gspo", NEW, NEW, per_token, **CLIPS["gspo"])[1]
    torch.testing.assert_close(ours, value_and_gradient("reinforce", NEW, NEW, mean)[1], **EXACT)
    assert (ours - value_and_gradient("reinforce", NEW, NEW, per_token)[1]).abs().max() > 0.01


def test_an_infinite_clip_range_is_no_clip() -> None:
    ratio = (NEW - OLD).exp()
    leaf = NEW.clone().requires_grad_()
    weights = loss_weights(RAGGED, "token", max_completion_length=4, dtype=torch.float64)
    plain = -(leaf - OLD).exp() * ADVANTAGES * RAGGED
    expected = plain.detach(), torch.autograd.grad((plain * weights).sum(), leaf)[0]
    assert_same(value_and_gradient("clipped", clip_range=INF), expected)
    assert_same(value_and_gradient("clipped", clip_range=INF, clip_range_high=INF), expected)
    assert differ(value_and_gradient("clipped", clip_range=0.2), expected) == [True, True]
    assert ratio.min() < 0.5
    assert ratio.max() > 2
    for low, high in (
        SURROGATES["clipped"].clipped(NEW, OLD, ADVANTAGES, RAGGED, clip_range=INF),
        SURROGATES["gspo"].clipped(NEW, OLD, ADVANTAGES, RAGGED, clip_range=INF),
        SURROGATES["cispo"].clipped(NEW, OLD, ADVANTAGES, RAGGED, clip_range_high=INF),
    ):
        assert not low.any()
        assert not high.any()


def test_cispo_without_a_cap_has_the_gradient_of_the_unclipped_ratio_and_another_value() -> None:
    """r * A * grad logp = grad(r) * A; the value is r * A * logp."""
    ours, plain = (
        value_and_gradient("cispo", clip_range_high=INF),
        value_and_gradient("clipped", clip_range=INF),
    )
    torch.testing.assert_close(ours[1], plain[1], **EXACT)
    assert differ(ours, plain) == [True, False]
    assert differ(value_and_gradient("cispo", clip_range_high=0.1), plain)[1]


def test_cispo_trains_the_tokens_that_the_clip_silences() -> None:
    low, high = SURROGATES["clipped"].clipped(NEW, OLD, ADVANTAGES, RAGGED, clip_range=0.2)
    silenced = low | high
    assert silenced.sum() >= 2
    assert (value_and_gradient("clipped", clip_range=0.2)[1][silenced] == 0).all()
    assert (value_and_gradient("cispo", clip_range_high=4.0)[1][silenced] != 0).all()


def test_with_one_token_a_completion_gspo_is_the_clipped_surrogate() -> None:
    single = torch.tensor([[1, 0, 0, 0]] * 4)
    for clip in ({"clip_range": 0.2}, {"clip_range": 0.1, "clip_range_high": 0.4}):
        ours = value_and_gradient("gspo", mask=single, **clip)
        assert_same(ours, value_and_gradient("clipped", mask=single, **clip))
        assert ours[1].abs().max() > 0.01
        assert differ(value_and_gradient("gspo", **clip), value_and_gradient("clipped", **clip)) == [True, True]


def test_gspos_ratio_does_not_grow_with_the_length() -> None:
    """Every token twice as likely: the ratio is 2, for one token as for four, padding or not."""
    leaf = OLD + math.log(2)
    ones = torch.ones(4, 1, dtype=torch.float64)
    loss, _ = value_and_gradient("gspo", leaf, OLD, ones, clip_range=INF)
    torch.testing.assert_close(loss, -2.0 * RAGGED, check_dtype=False, **EXACT)


def test_dual_clip_bounds_negative_advantages_alone() -> None:
    """At ratios from 0.3 to 20, for both signs."""
    log_ratio = torch.tensor([-1.2, -0.1, 0.1, 0.5, 1.0, 1.2, 2.0, 3.0], dtype=torch.float64).unsqueeze(0)
    mask = torch.ones_like(log_ratio)
    for advantage in (2.0, -2.0):
        given = log_ratio, torch.zeros_like(log_ratio), torch.full((1, 1), advantage, dtype=torch.float64), mask
        bounded = value_and_gradient("clipped", *given, clip_range=0.2, dual_clip=3.0)
        free = value_and_gradient("clipped", *given, clip_range=0.2)
        is_bounded = (log_ratio.exp() > 3) & (advantage < 0)
        assert is_bounded.sum() == (3 if advantage < 0 else 0)
        for ours, others in zip(bounded, free, strict=True):
            assert torch.equal(ours[~is_bounded], others[~is_bounded])
        assert (bounded[0][is_bounded] == 6.0).all()
        assert (bounded[1][is_bounded] == 0).all()
        assert (free[1][is_bounded] != 0).all()
        assert_same(value_and_gradient("clipped", *given, clip_range=0.2, dual_clip=INF), free)


# Aggregation


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_aggregations_part_by_length_alone(surrogate: str) -> None:
    clip = CLIPS.get(surrogate, {})

    def gradient(aggregation: str, mask: Tensor) -> Tensor:
        return value_and_gradient(surrogate, aggregation=aggregation, mask=mask, **clip)[1]

    three = torch.tensor([[1, 1, 1, 0]] * 4)
    torch.testing.assert_close(gradient("token", three), gradient("sequence", three), **EXACT)
    torch.testing.assert_close(gradient("token", three) * 3 / 4, gradient("constant", three), **EXACT)
    torch.testing.assert_close(gradient("token", FULL), gradient("constant", FULL), **EXACT)
    for left, right in (("token", "sequence"), ("token", "constant"), ("sequence", "constant")):
        assert (gradient(left, RAGGED) - gradient(right, RAGGED)).abs().max() > 1e-3


# Advantages

GROUPS = st.integers(2, 5).flatmap(
    lambda size: st.lists(
        st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=size, max_size=size), min_size=1, max_size=4
    )
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(GROUPS)
def test_rloo_is_dr_grpo_times_g_over_g_minus_1(rewards: list[list[float]]) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    size = values.shape[1]
    rloo, dr_grpo = (group_advantages(values, baseline=name, scale="none") for name in ("leave_one_out", "group"))
    torch.testing.assert_close(rloo, size / (size - 1) * dr_grpo, **EXACT)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rewards=GROUPS, seed=st.integers(0, 9))
def test_a_charge_that_all_siblings_pay_changes_nothing(rewards: list[list[float]], seed: int) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    num_rows = values.numel()
    mask = torch.arange(4) < 1 + torch.arange(num_rows).unsqueeze(1) % 4  # lengths 1, 2, 3, 4, 1, ...
    shares = random(num_rows, 4, seed=seed).abs() * mask
    charge = random(len(values), seed=seed + 1).repeat_interleave(values.shape[1]).unsqueeze(1)  # one a group
    penalties = charge * shares / shares.sum(1, keepdim=True)
    nothing = torch.zeros_like(penalties)
    for baseline, scale in (("group", "none"), ("group", "group"), ("leave_one_out", "none")):
        ours, expected = (
            compute_advantages(values, paid, mask, baseline=baseline, scale=scale) for paid in (penalties, nothing)
        )
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)
        assert ours.shape == (num_rows, 1)


def test_a_charge_that_siblings_pay_unequally_changes_advantages() -> None:
    """The twin."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    penalties = torch.zeros(4, 4, dtype=torch.float64)
    penalties[0, 2] = 0.5
    for scale in ("none", "group"):
        ours = compute_advantages(rewards, penalties, FULL, baseline="group", scale=scale)
        assert (ours[0] - ours[3]).item() < -0.4


@pytest.mark.parametrize("baseline", ["none", "group", "batch"])
def test_where_nothing_is_charged_token_advantages_are_whitened_rewards(baseline: str) -> None:
    """Each completion's reward counted once a token: a longer one has more say in mean and std."""
    rewards = torch.tensor([[1.0, 0.0], [0.25, 2.0]], dtype=torch.float64)
    ours = token_advantages(rewards, torch.zeros(4, 4), RAGGED, baseline=baseline)
    compared = group_advantages(rewards, baseline=baseline, scale="none").flatten().tolist()
    told = [value for value, row in zip(compared, RAGGED.tolist(), strict=True) for _ in range(sum(row))]
    center = sum(told) / len(told)
    std = math.sqrt(sum((value - center) ** 2 for value in told) / (len(told) - 1))
    expected = torch.tensor([[(value - center) / (std + 1e-4)] for value in compared], dtype=torch.float64) * RAGGED
    torch.testing.assert_close(ours, expected, **EXACT)
    torch.testing.assert_close(ours.sum().item(), 0.0, **EXACT)
    assert torch.equal(whitened(torch.tensor(compared).double().unsqueeze(1).expand(4, 4), RAGGED), ours)


def test_a_token_answers_for_what_comes_after_it() -> None:
    """One token is charged: those up to it fall, those behind it do not."""
    rewards, penalties = torch.tensor([[0.0, 0.0]], dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    penalties[0, 2] = 1.0
    ours = token_advantages(rewards, penalties, torch.ones(2, 4))
    assert (ours[0, :3] < 0).all()
    assert (ours[0, 3] > 0).all()
    assert (ours[0, 3] == ours[1]).all()
