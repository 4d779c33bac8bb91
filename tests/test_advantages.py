"""Advantages: hand-computed values and the identities between the variants."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.advantages import BASELINES, SCALES, group_advantages, groups_without_spread

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
        assert groups_without_spread(doubles(rewards)).item() == bool((advantages == 0).all())
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
