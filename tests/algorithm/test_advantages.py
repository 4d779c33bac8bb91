"""Advantages: hand-computed values and the identities between the variants."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.advantages import (
    BASELINES,
    SCALES,
    compute_advantages,
    group_advantages,
    token_advantages,
    whitened,
    zero_variance_groups,
)

EXACT = {"rtol": 0.0, "atol": 1e-12}
PAIRS = [(b, s) for b in BASELINES for s in SCALES if s != "group" or b in ("group", "leave_one_out")]


def doubles(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Two groups. Row 0: mean 3, deviations -2 -1 3, squares 4 + 1 + 9 = 14, variance 14/2 = 7, std 2.6457513110645907.
# Row 1: mean 1, deviations -1 -1 2, squares 6, variance 3, std 1.7320508075688772.
# Whole batch 1 2 6 0 0 3: mean 2, squares 1 + 0 + 16 + 4 + 4 + 1 = 26, variance 26/5 = 5.2, std 2.280350850198276.
REWARDS = ([1.0, 2.0, 6.0], [0.0, 0.0, 3.0])


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        ("group", "none", ([-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0])),
        # against the mean of the other two: 1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2
        ("leave_one_out", "none", ([-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0])),
        ("batch", "none", ([-1.0, 0.0, 4.0], [-2.0, -2.0, 1.0])),
        ("none", "none", ([1.0, 2.0, 6.0], [0.0, 0.0, 3.0])),
    ],
)
def test_baselines_by_hand(baseline: str, scale: str, expected: tuple[list[float], list[float]]) -> None:
    advantages = group_advantages(doubles(*REWARDS), baseline=baseline, scale=scale)
    torch.testing.assert_close(advantages, doubles(*expected), **EXACT)


def test_batch_scale_by_hand() -> None:
    # the deviations from the group's mean over the std of all six rewards, 2.280350850198276 + 0.0001
    expected = doubles(
        [-0.8770195594551437, -0.4385097797275719, 1.3155293391827156],
        [-0.4385097797275719, -0.4385097797275719, 0.8770195594551437],
    )
    torch.testing.assert_close(group_advantages(doubles(*REWARDS), scale="batch"), expected, **EXACT)


def test_eps_is_added_to_the_std() -> None:
    # 0 and 1e-3: std 7.071e-4; the advantage is 5e-4 / (7.0710678e-4 + eps)
    rewards = doubles([0.0, 1e-3])
    torch.testing.assert_close(group_advantages(rewards)[0, 1].item(), 0.6194967, rtol=0, atol=1e-6)
    torch.testing.assert_close(group_advantages(rewards, eps=0.0)[0, 1].item(), 0.70710678, rtol=0, atol=1e-8)


def test_equal_rewards_are_compared_relative_to_their_size() -> None:
    def is_zero(rewards: list[float]) -> bool:
        advantages = group_advantages(doubles(rewards))
        assert zero_variance_groups(doubles(rewards)).item() == bool((advantages == 0).all())
        return bool((advantages == 0).all())

    assert is_zero([0.0, 0.9e-6])
    assert not is_zero([0.0, 1.1e-6])
    assert is_zero([1000.0, 1000.0009])  # 1e-6 * 1000 = 1e-3
    assert not is_zero([1000.0, 1000.0011])
    assert is_zero([-1000.0, -1000.0009])


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_rewards_that_are_not_two_dimensional_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(torch.rand(shape))


def test_unknown_and_contradictory_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="baseline: got 'mean'"):
        group_advantages(torch.rand(2, 2), baseline="mean")
    with pytest.raises(ValueError, match="scale: got 'std'"):
        group_advantages(torch.rand(2, 2), scale="std")
    for baseline in ("batch", "none"):
        with pytest.raises(ValueError, match="scale: got group"):
            group_advantages(torch.rand(2, 2), baseline=baseline, scale="group")


def test_nan_rewards_count_nowhere_under_any_baseline_and_scale() -> None:
    nan = float("nan")
    with_nan = doubles([1.0, nan, 2.0, 6.0], [0.0, 0.0, 3.0, nan])
    places = [[0, 2, 3], [0, 1, 2]]
    for baseline, scale in PAIRS:
        full = group_advantages(with_nan, baseline=baseline, scale=scale)
        kept = torch.stack([row[place] for row, place in zip(full, places, strict=True)])
        without = group_advantages(doubles(*REWARDS), baseline=baseline, scale=scale)
        torch.testing.assert_close(kept, without, **EXACT)
        assert full[0, 1] == 0
        assert full[1, 3] == 0


def test_baselines_over_the_batch_keep_groups_without_spread() -> None:
    rewards = doubles([1.0, 1.0], [0.0, 0.0])
    assert torch.equal(group_advantages(rewards), torch.zeros_like(rewards))
    assert torch.equal(group_advantages(rewards, baseline="leave_one_out", scale="none"), torch.zeros_like(rewards))
    torch.testing.assert_close(
        group_advantages(rewards, baseline="batch", scale="none"), doubles([0.5, 0.5], [-0.5, -0.5]), **EXACT
    )
    assert torch.equal(group_advantages(rewards, baseline="none", scale="none"), rewards)


def test_a_batch_without_spread_is_left_unscaled() -> None:
    rewards = torch.full((2, 7), 0.95)
    assert torch.equal(group_advantages(rewards, baseline="none", scale="batch"), rewards)
    assert torch.equal(group_advantages(rewards, baseline="batch", scale="batch"), torch.zeros(2, 7))


finite = st.floats(-100, 100, allow_nan=False)
groups = st.integers(2, 6).flatmap(lambda g: st.lists(st.lists(finite, min_size=g, max_size=g), min_size=1, max_size=4))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=groups, constant=st.integers(-50, 50))
def test_a_constant_added_to_a_groups_rewards_changes_nothing(rows: list[list[float]], constant: int) -> None:
    rewards = doubles(*[[round(value, 3) for value in row] for row in rows])
    for baseline, scale in [("group", "group"), ("group", "none"), ("leave_one_out", "none")]:
        moved = rewards.clone()
        moved[0] += constant  # one group only
        torch.testing.assert_close(
            group_advantages(moved, baseline=baseline, scale=scale),
            group_advantages(rewards, baseline=baseline, scale=scale),
            rtol=1e-6,
            atol=1e-9,
        )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=groups)
def test_every_group_sums_to_zero(rows: list[list[float]]) -> None:
    rewards = doubles(*rows)
    for baseline in ("group", "leave_one_out"):
        for scale in SCALES:
            sums = group_advantages(rewards, baseline=baseline, scale=scale).sum(1)
            torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-7)


def test_rloo_is_g_over_g_minus_1_times_dr_grpo() -> None:
    for size in (2, 3, 8):
        rewards = torch.randn(4, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
        dr_grpo = group_advantages(rewards, scale="none")
        rloo = group_advantages(rewards, baseline="leave_one_out", scale="none")
        torch.testing.assert_close(rloo, dr_grpo * size / (size - 1), **EXACT)
        others = (rewards.sum(1, keepdim=True) - rewards) / (size - 1)  # the definition
        torch.testing.assert_close(rloo, rewards - others, **EXACT)


def test_scaling_a_groups_rewards_changes_nothing_without_eps() -> None:
    rewards = doubles(*REWARDS)
    torch.testing.assert_close(
        group_advantages(rewards * 1e-3, eps=0.0), group_advantages(rewards, eps=0.0), rtol=0, atol=1e-9
    )
    # With eps it does: 1e-4 is 4 % of a std of 2.6e-3.
    lost = 1 - group_advantages(rewards * 1e-3) / group_advantages(rewards)
    assert 0.03 < lost[0].min() < lost[0].max() < 0.05


def test_inputs_are_unchanged_and_the_dtype_is_kept() -> None:
    for dtype in (torch.float32, torch.float64):
        rewards = torch.tensor([[1.0, float("nan"), 3.0], [2.0, 0.0, 5.0]], dtype=dtype)
        before = rewards.clone()
        for baseline, scale in PAIRS:
            advantages = group_advantages(rewards, baseline=baseline, scale=scale)
            assert advantages.dtype == dtype
            assert advantages.shape == rewards.shape
            assert torch.equal(rewards.nan_to_num(-9), before.nan_to_num(-9))


# What tokens cost. Two completions of one prompt, of two tokens and of one; what stands in the padding must not count.
# Still to be charged: 0.25 + 0.5 and 0.5 in the first, -0.5 in the second. So 1 - 0.75, 1 - 0.5 and 0 + 0.5 before
# whitening: mean 5/12, squares 1/36 + 1/144 + 1/144 = 1/24, variance 1/48, std 0.14433756729740643.
NAN = float("nan")
PAIR = [1.0, 0.0]
PENALTIES = ([0.25, 0.5, NAN], [-0.5, NAN, 9.0])
TOKENS = torch.tensor([[1, 1, 0], [1, 0, 0]])
TO_COME = ([-(3**-0.5) * 2, 3**-0.5, 0.0], [3**-0.5, 0.0, 0.0])  # -1/6, 1/12 and 1/12 of that std


def test_a_token_is_charged_with_itself_and_what_follows() -> None:
    ours = token_advantages(doubles(PAIR), doubles(*PENALTIES), TOKENS, eps=0.0)
    torch.testing.assert_close(ours, doubles(*TO_COME), **EXACT)
    # Charged with what came before, they would be worth 0.75 and 0.25: the other way round.
    assert ours[0, 0] < ours[0, 1]
    with_eps = token_advantages(doubles(PAIR), doubles(*PENALTIES), TOKENS)
    torch.testing.assert_close(with_eps, doubles(*TO_COME) * 48**-0.5 / (48**-0.5 + 1e-4), **EXACT)


def test_a_baseline_comes_before_the_charges() -> None:
    """Two groups: against the group's mean both begin at +-0.5, without it at 1, 0, 11, 10."""
    rewards, mask = doubles([1.0, 0.0], [11.0, 10.0]), torch.ones(4, 1)
    penalties = doubles([0.5], [0.0], [0.0], [0.0])
    # 0, -0.5, 0.5, -0.5: mean -0.125, squares (1 + 9 + 25 + 9) / 64 = 0.6875, variance 0.6875 / 3
    std = (0.6875 / 3) ** 0.5
    expected = doubles([0.125], [-0.375], [0.625], [-0.375]) / std
    ours = token_advantages(rewards, penalties, mask, baseline="group", eps=0.0)
    torch.testing.assert_close(ours, expected, **EXACT)
    assert not torch.allclose(token_advantages(rewards, penalties, mask, eps=0.0), expected, atol=0.1)


def test_tokens_of_a_completion_without_reward_count_nowhere() -> None:
    penalties, mask = doubles([0.25, 0.5], [7.0, 7.0], [-0.5, NAN]), torch.tensor([[1, 1], [1, 1], [1, 0]])
    with_nan = token_advantages(doubles([1.0, NAN, 0.0]), penalties, mask, eps=0.0)
    assert with_nan[1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(with_nan[[0, 2]], doubles(*TO_COME)[:, :2], **EXACT)


def test_without_charges_all_tokens_of_a_completion_have_one_advantage() -> None:
    rewards, mask = doubles([3.0, 1.0]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    ours = token_advantages(rewards, torch.zeros(2, 3), mask, eps=0.0)
    # 3, 3, 3, 1: mean 2.5, squares 3/4 + 9/4 = 3, variance 1. Over completions the mean would be 2.
    torch.testing.assert_close(ours, doubles([0.5, 0.5, 0.5], [-1.5, 0.0, 0.0]), **EXACT)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
def test_whitened_by_hand(mask_dtype: torch.dtype) -> None:
    # 1, 2 and 6: mean 3, variance 14/2 = 7; the biased one would be 14/3
    values, mask = doubles([1.0, 2.0, NAN], [6.0, 100.0, NAN]), torch.tensor([[1, 1, 0], [1, 0, 0]]).to(mask_dtype)
    ours = whitened(values, mask, eps=0.0)
    torch.testing.assert_close(ours, doubles([-2.0, -1.0, 0.0], [3.0, 0.0, 0.0]) / 7**0.5, **EXACT)
    torch.testing.assert_close(whitened(values, mask), ours * 7**0.5 / (7**0.5 + 1e-4), **EXACT)
    assert ours.std() != pytest.approx(1.0)  # with the zeros of the padding it is not


@pytest.mark.parametrize("mask", [[[1, 1], [1, 0]], [[0, 1], [0, 0]], [[0, 0], [0, 0]]])
def test_nothing_is_whitened_where_all_are_alike(mask: list[list[int]]) -> None:
    """Three times 0.7, one value, none: 0 and not noise / eps, nor NaN."""
    assert whitened(torch.full((2, 2), 0.7), torch.tensor(mask)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_a_completion_is_charged_with_the_sum_before_it_is_compared() -> None:
    # 1 - 0.75 and 0 + 0.5: the second is the better one
    def ours(baseline: str, scale: str) -> list[float]:
        advantages = compute_advantages(
            doubles(PAIR), doubles(*PENALTIES), TOKENS, baseline=baseline, scale=scale
        )  # (B, 1)
        assert advantages.shape == (2, 1)
        return advantages.flatten().tolist()

    assert ours("none", "none") == [0.25, 0.5]
    assert ours("group", "none") == [-0.125, 0.125]  # before the charges it was the other way round
    assert ours("leave_one_out", "none") == [-0.25, 0.25]
    assert ours("group", "group") == pytest.approx([-0.125 / (0.03125**0.5 + 1e-4), 0.125 / (0.03125**0.5 + 1e-4)])


def test_charges_make_and_undo_the_spread_of_a_group() -> None:
    mask, settings = torch.ones(2, 1), {"baseline": "group", "scale": "group"}
    charged = compute_advantages(doubles([1.0, 1.0]), doubles([0.5], [0.0]), mask, **settings)
    assert charged.flatten().tolist() == pytest.approx([-0.7069, 0.7069], abs=1e-4)
    undone = compute_advantages(doubles([1.0, 0.0]), doubles([1.0], [0.0]), mask, **settings)
    assert undone.flatten().tolist() == [0.0, 0.0]


def test_without_charges_advantages_are_what_they_were() -> None:
    rewards, mask = doubles(*REWARDS), torch.ones(6, 4)
    for baseline, scale in PAIRS:
        ours = compute_advantages(rewards, torch.zeros(6, 4), mask, baseline=baseline, scale=scale)
        assert torch.equal(ours, group_advantages(rewards, baseline=baseline, scale=scale).view(6, 1))
    by_token = compute_advantages(rewards, torch.zeros(6, 4), mask, baseline="none", scale="tokens")
    assert torch.equal(by_token, token_advantages(rewards, torch.zeros(6, 4), mask))


def test_a_baseline_or_scale_that_is_not_known_here_is_refused_by_name() -> None:
    """The critic's baseline too: it is of another script."""
    inputs = torch.rand(1, 2), torch.zeros(2, 1), torch.ones(2, 1)
    with pytest.raises(ValueError, match="scale: got 'std'"):
        compute_advantages(*inputs, baseline="group", scale="std")
    for scale in ("none", "tokens"):
        with pytest.raises(ValueError, match="baseline: got 'critic'"):
            compute_advantages(*inputs, baseline="critic", scale=scale)
    with pytest.raises(ValueError, match="baseline: got 'mean'"):
        token_advantages(*inputs, baseline="mean")
    with pytest.raises(ValueError, match="group_size: got 1"):
        token_advantages(torch.rand(2, 1), *inputs[1:], baseline="group")


def test_token_advantages_leave_their_inputs_as_they_are() -> None:
    for dtype in (torch.float32, torch.float64):
        rewards, penalties = torch.rand(2, 2).to(dtype), torch.rand(4, 3).to(dtype)
        mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
        before = [tensor.clone() for tensor in (rewards, penalties, mask)]
        advantages = token_advantages(rewards, penalties, mask)
        assert advantages.dtype == dtype
        assert (advantages[mask == 0] == 0).all()
        assert all(torch.equal(now, then) for now, then in zip((rewards, penalties, mask), before, strict=True))
