"""Every row of the table of algorithms against loops in plain Python: advantages, loss, gradient and metrics.

As in test_oracle.py the oracle knows only the math module and the chain rule written out by hand. Padding holds NaN.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.advantages import compute_advantages
from grpo.algorithms import ALGORITHMS, CLIP_KEYS
from grpo.loss import SURROGATES, kl_divergence, loss_weights
from grpo.run.metrics import TokenMeans
from tests.fidelity import test_oracle as grpo_oracle
from tests.fidelity.test_oracle import (
    Case,
    Table,
    doubles,
    has_spread,
    mean,
    oracle_kl,
    oracle_weight,
    random_case,
    std,
)

INF, NAN = math.inf, math.nan
ROWS = [name for name, row in ALGORITHMS.items() if row["advantage_baseline"] != "critic"]
OURS = {"rtol": 0.0, "atol": 1e-10}


@dataclass(frozen=True)
class Objective:
    """What is minimised, in the names of config.yaml."""

    advantage_baseline: str = "group"
    advantage_scale: str = "group"
    surrogate: str = "clipped"
    aggregation: str = "token"  # the name that `oracle_weight` reads
    clip_range: float | None = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    kl_coeff: float = 0.0
    kl_in: str = "loss"
    kl_estimator: str = "k3_corrected"
    entropy_coeff: float = 0.0
    max_completion_length: int = 9

    @classmethod
    def of(cls, algorithm: str, **changes: Any) -> Self:
        row = {key: value for key, value in ALGORITHMS[algorithm].items() if key != "max_resample_rounds"}
        return cls(aggregation=row.pop("loss_aggregation"), **row | changes)

    @property
    def high(self) -> float | None:
        return self.clip_range if self.clip_range_high is None else self.clip_range_high


def scaled_case(seed: int, spread: float) -> Case:
    """As `random_case`, with log-probs that are `spread` times as far from the old ones."""
    case = random_case(seed)
    pairs = [list(zip(*rows, strict=True)) for rows in zip(case.logps, case.old_logps, strict=True)]
    return replace(case, old_logps=[[new - spread * (new - old) for new, old in row] for row in pairs])


CASES = [scaled_case(seed, spread) for seed in range(14) for spread in (1.0, 5.0, 1e-3)]  # gspo's range is 3e-4 wide


# The oracle


def oracle_penalties(case: Case, objective: Objective) -> Table:
    """What each token is charged, from the log-probs of the policy that sampled it."""
    beta = objective.kl_coeff if objective.kl_in == "reward" else 0.0
    return [
        [beta * (case.old_logps[i][t] - case.ref_logps[i][t]) for t in range(length)]
        for i, length in enumerate(case.lengths)
    ]


def oracle_compared(rewards: Table, baseline: str, scale: str) -> list[float]:
    return grpo_oracle.oracle_advantages(rewards, grpo_oracle.Setting(baseline=baseline, scale=scale))


def oracle_token_advantages(case: Case, objective: Objective) -> Table:
    """One a token; ragged."""
    penalties, size = oracle_penalties(case, objective), len(case.rewards[0])
    baseline, scale = objective.advantage_baseline, objective.advantage_scale
    flat = [reward for group in case.rewards for reward in group]
    if scale != "tokens":
        charged = [reward - sum(row) for reward, row in zip(flat, penalties, strict=True)]
        groups = [charged[start : start + size] for start in range(0, len(charged), size)]
        found = oracle_compared(groups, baseline, scale)
        return [[found[i]] * length for i, length in enumerate(case.lengths)]
    compared = oracle_compared(case.rewards, baseline, "none")
    table = [[compared[i] - sum(penalties[i][t:]) for t in range(length)] for i, length in enumerate(case.lengths)]
    kept = [value for i, row in enumerate(table) for value in row if not math.isnan(flat[i])]
    if not has_spread(kept):
        return [[0.0] * len(row) for row in table]
    center, scale_by = mean(kept), std(kept) + 1e-4
    return [
        [0.0 if math.isnan(flat[i]) else (value - center) / scale_by for value in row] for i, row in enumerate(table)
    ]


def oracle_clip(ratio: float, advantage: float, objective: Objective) -> tuple[float, float, str]:
    """(loss, d loss / d log ratio, which clip acts) of the clipped surrogate at this ratio."""
    low, high = 1 - objective.clip_range, 1 + objective.high
    if advantage > 0 and ratio > high:
        return -high * advantage, 0.0, "high"
    if advantage < 0 and ratio < low:
        return -low * advantage, 0.0, "low"
    if advantage < 0 and objective.dual_clip is not None and ratio > objective.dual_clip:
        return -objective.dual_clip * advantage, 0.0, "low"
    return -ratio * advantage, -ratio * advantage, ""


def oracle_completion(
    new: list[float], old: list[float], advantages: list[float], objective: Objective
) -> tuple[float, list[float], list[str]]:
    """(sum of its tokens' losses, its derivative by each log-prob, the clip that acts on each token)."""
    log_ratios = [n - o for n, o in zip(new, old, strict=True)]
    if objective.surrogate == "reinforce":
        pairs = list(zip(new, advantages, strict=True))
        return sum(-a * n for n, a in pairs), [-a for a in advantages], [""] * len(new)
    if objective.surrogate == "cispo":
        cap = 1 + objective.clip_range_high
        weights = [min(math.exp(x), cap) for x in log_ratios]
        terms = list(zip(weights, new, advantages, strict=True))
        clips = ["high" if math.exp(x) > cap and a != 0 else "" for x, a in zip(log_ratios, advantages, strict=True)]
        return sum(-w * a * n for w, n, a in terms), [-w * a for w, _, a in terms], clips
    if objective.surrogate == "gspo":  # every token's loss hangs on every log-prob, by 1 / length
        ratio = math.exp(mean(log_ratios))
        found = [oracle_clip(ratio, a, objective) for a in advantages]
        slope = sum(one[1] for one in found) / len(new)
        return sum(one[0] for one in found), [slope] * len(new), [one[2] for one in found]
    found = [oracle_clip(math.exp(x), a, objective) for x, a in zip(log_ratios, advantages, strict=True)]
    return sum(one[0] for one in found), [one[1] for one in found], [one[2] for one in found]


def oracle_step(case: Case, objective: Objective) -> tuple[float, Table, dict[str, float]]:
    """(loss, d loss / d logps, metrics)."""
    loss, gradient = 0.0, [[0.0] * len(row) for row in case.logps]
    sums = {"kl": 0.0, "low": 0.0, "high": 0.0}
    advantages = oracle_token_advantages(case, objective)
    for i, length in enumerate(case.lengths):
        if length == 0:
            continue
        weight = oracle_weight(length, case.lengths, objective)
        new, old, ref = case.logps[i][:length], case.old_logps[i][:length], case.ref_logps[i][:length]
        total, slopes, clips = oracle_completion(new, old, advantages[i], objective)
        loss += weight * total
        for t in range(length):
            gradient[i][t] = weight * slopes[t]
            loss -= weight * objective.entropy_coeff * case.entropies[i][t]
            if objective.kl_in == "loss":
                kl, slope = oracle_kl(new[t], ref[t], old[t], objective.kl_estimator)
                loss += weight * objective.kl_coeff * kl
                gradient[i][t] += weight * objective.kl_coeff * slope
            else:
                kl = old[t] - ref[t]
            sums["kl"] += kl
            if clips[t]:
                sums[clips[t]] += 1
    return loss, gradient, {name: total / max(sum(case.lengths), 1) for name, total in sums.items()}


# Ours


def mask_of(case: Case) -> Tensor:
    return torch.tensor([[t < length for t in range(len(case.logps[0]))] for length in case.lengths])


def our_advantages(case: Case, objective: Objective) -> Tensor:
    """Step [5] of train_grpo.py."""
    mask, old, ref = mask_of(case), doubles(case.old_logps), doubles(case.ref_logps)
    penalties = torch.zeros_like(old)
    if objective.kl_in == "reward":
        penalties = objective.kl_coeff * kl_divergence(old, ref, estimator=objective.kl_estimator, completion_mask=mask)
    return compute_advantages(
        doubles(case.rewards), penalties, mask, baseline=objective.advantage_baseline, scale=objective.advantage_scale
    )


def our_step(
    case: Case, objective: Objective, pieces: Sequence[Sequence[int]] | None = None
) -> tuple[float, Tensor, dict[str, float]]:
    """Step [6] of train_grpo.py, in these micro-batches."""
    logps, entropies = doubles(case.logps).requires_grad_(), doubles(case.entropies)
    old, ref, mask = doubles(case.old_logps), doubles(case.ref_logps), mask_of(case)
    advantages, means, loss_sum = our_advantages(case, objective), TokenMeans(), 0.0
    surrogate, clipped_by = SURROGATES[objective.surrogate]
    clip = {key: getattr(objective, key) for key in CLIP_KEYS[objective.surrogate]}
    length = objective.max_completion_length
    weights = loss_weights(mask, objective.aggregation, max_completion_length=length, dtype=torch.float64)
    for rows in [range(len(mask))] if pieces is None else pieces:
        part = list(rows)
        given = logps[part], old[part], advantages[part], mask[part]
        loss = surrogate(*given, **clip)
        if objective.kl_in == "loss":
            kl = kl_divergence(
                logps[part],
                ref[part],
                estimator=objective.kl_estimator,
                old_logps=old[part],
                completion_mask=mask[part],
            )
            loss = loss + objective.kl_coeff * kl
        else:
            kl = kl_divergence(old[part], ref[part], estimator="k1", completion_mask=mask[part])
        # compute_logprobs gives entropies that are 0 in padding
        loss = loss - objective.entropy_coeff * torch.where(mask[part], entropies[part], 0.0)
        piece = (loss * weights[part]).sum()
        piece.backward()
        loss_sum += piece.item()
        low, high = clipped_by(*given, **clip)
        means.add(mask[part], {"kl": kl, "low": low, "high": high})
    return loss_sum, logps.grad, means.metrics()


def assert_same(case: Case, objective: Objective) -> None:
    loss, gradient, metrics = our_step(case, objective)
    expected_loss, expected_gradient, expected_metrics = oracle_step(case, objective)
    assert loss == pytest.approx(expected_loss, rel=1e-12, abs=1e-10)
    torch.testing.assert_close(gradient, doubles(expected_gradient), **OURS)  # 0 in padding, not NaN
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)  # summed in float32


# Rows


@pytest.mark.parametrize("algorithm", ROWS)
def test_every_row_equals_the_loops(algorithm: str) -> None:
    for case in CASES:
        assert_same(case, Objective.of(algorithm))


CHANGES: list[dict[str, Any]] = [
    {"kl_coeff": 0.3, "kl_in": "reward", "kl_estimator": "k1"},
    {"kl_coeff": 0.3, "kl_in": "loss", "kl_estimator": "k3_corrected", "entropy_coeff": 0.1},
    {"kl_coeff": 0.3, "kl_in": "reward", "kl_estimator": "k1", "advantage_scale": "tokens"},
    {"advantage_baseline": "group", "advantage_scale": "tokens", "aggregation": "sequence"},
    {"advantage_baseline": "leave_one_out", "advantage_scale": "batch", "aggregation": "constant"},
    {"advantage_baseline": "batch", "advantage_scale": "batch"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_any_choice_goes_with_any_surrogate(surrogate: str, changes: dict[str, Any]) -> None:
    clips = {key: {"clip_range": 0.15, "clip_range_high": 0.35, "dual_clip": 1.5}[key] for key in CLIP_KEYS[surrogate]}
    for case in CASES[::3]:
        assert_same(case, replace(Objective(surrogate=surrogate), **clips | changes))


@pytest.mark.parametrize("algorithm", ["grpo", "gspo"])
def test_a_clip_without_an_upper_end_is_as_wide_above_as_below(algorithm: str) -> None:
    for case in CASES:
        assert_same(case, Objective.of(algorithm, clip_range=0.3, clip_range_high=None))


def test_advantages_of_tokens_equal_the_loops() -> None:
    for baseline in ("none", "group", "leave_one_out", "batch"):
        for case in CASES:
            objective = Objective.of("reinforce_pp", advantage_baseline=baseline, kl_coeff=0.4)
            ours, expected = our_advantages(case, objective), oracle_token_advantages(case, objective)
            assert (ours[~mask_of(case)] == 0).all()
            padded = [row + [0.0] * (ours.shape[1] - len(row)) for row in expected]
            torch.testing.assert_close(ours, doubles(padded), **OURS)


def test_the_cases_reach_every_branch() -> None:
    def shares(objective: Objective) -> list[dict[str, float]]:
        return [oracle_step(case, objective)[2] for case in CASES]

    for algorithm in ("grpo", "dapo", "gspo"):
        found = shares(Objective.of(algorithm))
        assert sum(row["low"] > 0 for row in found) > 5
        assert sum(row["high"] > 0 for row in found) > 5
        assert sum(0 < row["low"] + row["high"] < 0.9 for row in found) > 5
    assert sum(row["high"] > 0 for row in shares(Objective.of("cispo"))) > 3
    with_bound = sum(row["low"] for row in shares(Objective(dual_clip=3.0)))
    assert with_bound > sum(row["low"] for row in shares(Objective())) + 0.1
    assert any(math.isnan(reward) for case in CASES for group in case.rewards for reward in group)
    assert any(0 in case.lengths for case in CASES)


@pytest.mark.parametrize(
    ("algorithm", "wrong"),
    [
        ("grpo", {"advantage_scale": "none"}),
        ("grpo", {"kl_coeff": 0.1}),
        ("grpo", {"dual_clip": 1.2}),
        ("dr_grpo", {"aggregation": "token"}),
        ("dr_grpo", {"advantage_scale": "group"}),
        ("dapo", {"clip_range_high": None}),
        ("rloo", {"advantage_baseline": "group"}),
        ("rloo", {"kl_coeff": 0.0}),
        ("rloo", {"kl_coeff": -0.005}),
        ("rloo", {"surrogate": "clipped", "clip_range": 0.2}),
        ("reinforce", {"advantage_baseline": "batch"}),
        ("reinforce_pp", {"advantage_scale": "none"}),
        ("reinforce_pp", {"kl_coeff": -0.005}),
        ("gspo", {"surrogate": "clipped"}),
        ("gspo", {"aggregation": "token"}),
        ("gspo", {"clip_range": 4e-4, "clip_range_high": 3e-4}),
        ("cispo", {"clip_range_high": 3.0}),
        ("cispo", {"surrogate": "reinforce"}),
    ],
    ids=str,
)
def test_the_loops_see_every_wrong_choice(algorithm: str, wrong: dict[str, Any]) -> None:
    """The twin: in some case each of them moves loss and gradient by far more than the tolerance."""
    right = Objective.of(algorithm)
    losses, slopes = [], []
    for case in CASES:
        ours, expected = our_step(case, replace(right, **wrong)), oracle_step(case, right)
        losses.append(abs(ours[0] - expected[0]))
        slopes.append((ours[1] - doubles(expected[1])).abs().max().item())
    assert max(losses) > 1e-5
    assert max(slopes) > 1e-5


@pytest.mark.parametrize("surrogate", ["clipped", "reinforce", "gspo"])
def test_the_slopes_of_the_loops_are_those_of_their_values(surrogate: str) -> None:
    """By central differences; CISPO's weight is held fixed, so its slope is not one of its value."""
    objective, random = Objective(surrogate=surrogate, clip_range_high=0.3, dual_clip=2.0), Random(0)
    for _ in range(50):
        length = random.randint(1, 5)
        new, old, advantages = ([random.gauss(0, 0.5) for _ in range(length)] for _ in range(3))
        _, slopes, _ = oracle_completion(new, old, advantages, objective)
        for t in range(length):
            up, down = ([x + step * (u == t) for u, x in enumerate(new)] for step in (1e-6, -1e-6))
            values = [oracle_completion(moved, old, advantages, objective)[0] for moved in (up, down)]
            assert slopes[t] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7)


# Micro-batches and padding


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    algorithm=st.sampled_from(ROWS),
    case=st.sampled_from(CASES),
    bins=st.lists(st.integers(0, 4), min_size=20, max_size=20),
)
def test_any_micro_batches_give_the_gradient_of_all_rows(algorithm: str, case: Case, bins: list[int]) -> None:
    rows = range(len(case.lengths))
    pieces = [part for number in range(5) if (part := [row for row in rows if bins[row] == number])]
    objective = Objective.of(algorithm, entropy_coeff=0.1)
    whole, parts = our_step(case, objective), our_step(case, objective, pieces)
    assert parts[0] == pytest.approx(whole[0], abs=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=0, atol=1e-12)
    assert parts[2] == pytest.approx(whole[2], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("place", ["logps", "old_logps", "advantages", "all"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_nothing_leaks_from_padding(surrogate: str, place: str, poison: float) -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("logps", "old_logps", "advantages")
    clean = {name: torch.randn(3, 4, generator=generator, dtype=torch.float64) for name in names}
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    clip = {key: {"clip_range": 0.2, "clip_range_high": 0.3, "dual_clip": 2.0}[key] for key in CLIP_KEYS[surrogate]}

    def found(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaf = tensors["logps"].clone().requires_grad_()
        given = leaf, tensors["old_logps"], tensors["advantages"], mask
        loss = SURROGATES[surrogate].loss(*given, **clip)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return [loss.detach(), gradient, *SURROGATES[surrogate].clipped(*given, **clip)]

    poisoned = {name: torch.where(mask.bool(), x, poison) if place in (name, "all") else x for name, x in clean.items()}
    for ours, expected in zip(found(poisoned), found(clean), strict=True):
        assert torch.equal(ours, expected)
        assert not ours[~mask.bool()].any()
    assert found(clean)[1].abs().max() > 0.01


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("scale", ["tokens", "group", "batch", "none"])
def test_nothing_leaks_from_the_penalties_of_padding(scale: str, poison: float) -> None:
    case = CASES[0]
    mask, rewards = mask_of(case), doubles(case.rewards)
    assert not mask.all()
    penalties = torch.linspace(-1, 1, mask.numel(), dtype=torch.float64).view(mask.shape)
    chosen = {"baseline": "group", "scale": scale}
    expected = compute_advantages(rewards, penalties, mask, **chosen)
    assert expected.isfinite().all()
    assert torch.equal(compute_advantages(rewards, penalties.masked_fill(~mask, poison), mask, **chosen), expected)
