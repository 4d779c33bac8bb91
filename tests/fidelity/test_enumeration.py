"""Expectations without sampling: every completion, or every group of them, a tiny softmax policy can draw.

The true gradients and divergences are plain formulas; ours are expectations of what grpo/ computes from samples.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.advantages import compute_advantages, group_advantages
from grpo.loss import clipped_surrogate, kl_divergence, loss_weights, reinforce

EXACT = {"rtol": 0.0, "atol": 1e-12}
INF = float("inf")


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(left: Tensor, right: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0).item()


# Policy gradients
#
# Token 0 ends a completion, at most two tokens: (0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2). The policy is a
# table of logits: row 0 for the first token, row a for the token after a.

MAX_LENGTH = 2
COMPLETIONS = [(0,)] + [(a, b) for a in (1, 2) for b in (0, 1, 2)]
REWARDS = [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0]
POLICY = random(3, 3, seed=2)
MASK = torch.tensor([[t < len(completion) for t in range(MAX_LENGTH)] for completion in COMPLETIONS])


def logps_of(policy: Tensor) -> Tensor:
    """(7, 2) log-probs of every token of every completion."""
    logps = policy.log_softmax(-1)
    first = torch.stack([logps[0, completion[0]] for completion in COMPLETIONS])
    none = torch.zeros((), dtype=torch.float64)
    second = torch.stack([logps[c[0], c[1]] if len(c) == 2 else none for c in COMPLETIONS])
    return torch.stack([first, second], dim=1)


def expected_gradient(group_size: int, aggregation: str = "constant", **advantage: Any) -> Tensor:
    """Of minus the loss, over every group that can be drawn; the group is one optimizer step."""
    policy = POLICY.clone().requires_grad_()
    all_logps = logps_of(policy)
    probs = all_logps.detach().sum(1).exp()
    objective = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(len(COMPLETIONS)), repeat=group_size):
        rows = list(group)
        logps, mask = all_logps[rows], MASK[rows]  # (G, 2)
        advantages = group_advantages(doubles(*[REWARDS[i] for i in rows]).view(1, -1), **advantage).view(-1, 1)
        loss = clipped_surrogate(logps, logps.detach(), advantages, mask, clip_range=0.2)
        weights = loss_weights(mask, aggregation, max_completion_length=MAX_LENGTH, dtype=torch.float64)
        objective = objective - probs[rows].prod() * (loss * weights).sum()
    return torch.autograd.grad(objective, policy)[0]


def true_gradient() -> Tensor:
    """Of the expected reward: sum over completions of p * R."""
    policy = POLICY.clone().requires_grad_()
    expected_reward = (logps_of(policy).sum(1).exp() * doubles(*REWARDS)).sum()
    return torch.autograd.grad(expected_reward, policy)[0]


def test_the_completions_are_all_there_are() -> None:
    assert logps_of(POLICY).sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert true_gradient().abs().max() > 0.05


@pytest.mark.parametrize("group_size", [2, 3])
def test_leave_one_out_with_constant_weights_is_the_policy_gradient(group_size: int) -> None:
    ours = expected_gradient(group_size, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(ours, true_gradient() / MAX_LENGTH, **EXACT)


@pytest.mark.parametrize("group_size", [2, 3])
def test_subtracting_the_groups_mean_shrinks_it_to_g_minus_1_over_g(group_size: int) -> None:
    ours = expected_gradient(group_size, baseline="group", scale="none")
    torch.testing.assert_close(ours, true_gradient() / MAX_LENGTH * (group_size - 1) / group_size, **EXACT)


@pytest.mark.parametrize("group_size", [1, 2])
def test_no_baseline_is_unbiased_too(group_size: int) -> None:
    ours = expected_gradient(group_size, baseline="none", scale="none")
    torch.testing.assert_close(ours, true_gradient() / MAX_LENGTH, **EXACT)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_a_length_in_the_denominator_changes_the_direction(aggregation: str) -> None:
    """The twin: only constant weights leave the policy gradient what it is."""
    ours = expected_gradient(2, aggregation, baseline="leave_one_out", scale="none")
    assert cosine(ours, true_gradient()) < 0.999
    assert cosine(expected_gradient(2, baseline="leave_one_out", scale="none"), true_gradient()) > 1 - 1e-12


def std_gradient_by_hand(group_size: int, degrees_lost: int = 1) -> list[list[float]]:
    """Expected gradient with advantages (R - mean) / (std + 1e-4), in floats: grad log p = 1[token] - softmax."""
    softmax = [[math.exp(x) for x in row] for row in POLICY.tolist()]
    softmax = [[x / sum(row) for x in row] for row in softmax]

    def states(completion: tuple[int, ...]) -> list[tuple[int, int]]:
        return list(zip((0, *completion), completion, strict=False))  # (row of the table, token drawn from it)

    probs = [math.prod(softmax[row][token] for row, token in states(completion)) for completion in COMPLETIONS]
    gradient = [[0.0] * 3 for _ in range(3)]
    for group in itertools.product(range(len(COMPLETIONS)), repeat=group_size):
        rewards = [REWARDS[i] for i in group]
        mean = sum(rewards) / group_size
        std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (group_size - degrees_lost))
        for i, reward in zip(group, rewards, strict=True):
            share = math.prod(probs[j] for j in group) * (reward - mean) / (std + 1e-4) / (group_size * MAX_LENGTH)
            for row, token in states(COMPLETIONS[i]):
                for v in range(3):
                    gradient[row][v] += share * ((v == token) - softmax[row][v])
    return gradient


@pytest.mark.parametrize("group_size", [2, 3])
def test_the_groups_std_equals_the_enumeration_by_hand(group_size: int) -> None:
    ours = expected_gradient(group_size)
    torch.testing.assert_close(ours, torch.tensor(std_gradient_by_hand(group_size), dtype=torch.float64), **EXACT)
    population = torch.tensor(std_gradient_by_hand(group_size, degrees_lost=0), dtype=torch.float64)
    assert (ours - population).abs().max() > 1e-3


@pytest.mark.parametrize("group_size", [2, 3])
def test_dividing_by_the_groups_std_changes_the_direction(group_size: int) -> None:
    assert cosine(expected_gradient(group_size), true_gradient()) < 0.97
    assert cosine(expected_gradient(group_size, scale="none"), true_gradient()) > 1 - 1e-12


def test_the_ratio_makes_samples_of_another_policy_unbiased() -> None:
    """One token, clip off: E_old[r * A * grad log p] is the gradient of the policy, not that of the old one."""
    rewards, old = doubles(1.0, 0.0, 3.0), random(3, seed=1).log_softmax(0)

    def gradient(*, is_ratio_used: bool) -> Tensor:
        policy = POLICY[0].clone().requires_grad_()
        logps, objective = policy.log_softmax(0), torch.zeros((), dtype=torch.float64)
        for group in itertools.product(range(3), repeat=2):
            rows = list(group)
            new = logps[rows].view(2, 1)
            advantages = group_advantages(rewards[rows].view(1, 2), baseline="leave_one_out", scale="none").view(2, 1)
            used = old[rows].view(2, 1) if is_ratio_used else new.detach()
            loss = clipped_surrogate(new, used, advantages, torch.ones(2, 1), clip_range=INF)
            objective = objective - old[rows].exp().prod() * loss.mean()
        return torch.autograd.grad(objective, policy)[0]

    policy = POLICY[0].clone().requires_grad_()
    (truth,) = torch.autograd.grad((policy.softmax(0) * rewards).sum(), policy)
    torch.testing.assert_close(gradient(is_ratio_used=True), truth, **EXACT)
    assert (gradient(is_ratio_used=False) - truth).abs().max() > 0.01


# KL
#
# A softmax over six tokens: the policy, the reference, and the policy that sampled.

THETA = doubles(0.3, -0.7, 1.2, 0.0, -1.5, 0.8)
REFERENCE = doubles(-0.2, 0.5, 0.9, -1.0, 0.4, 0.1).log_softmax(0)
BEHAVIOUR = doubles(0.5, -0.2, 0.7, 0.3, -0.9, 0.2).log_softmax(0)
Estimator = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def ours(name: str) -> Estimator:
    """(logps, ref_logps, old_logps), each (6,) -> (6,)."""

    def estimate(logps: Tensor, ref: Tensor, old: Tensor | None) -> Tensor:
        rows = [None if x is None else x.unsqueeze(1) for x in (logps, ref, old)]  # (6, 1): each token once
        kl = kl_divergence(rows[0], rows[1], estimator=name, old_logps=rows[2], completion_mask=torch.ones(6, 1))
        return kl.squeeze(1)

    return estimate


def enumerate_kl(estimate: Estimator, *, is_off_policy: bool = False) -> tuple[Tensor, Tensor]:
    """(value, gradient) expected over every token the sampler can draw."""
    theta = THETA.clone().requires_grad_()
    logps = theta.log_softmax(0)
    sampler = BEHAVIOUR if is_off_policy else logps.detach()
    expectation = (sampler.exp() * estimate(logps, REFERENCE, BEHAVIOUR if is_off_policy else None)).sum()
    return expectation.detach(), torch.autograd.grad(expectation, theta)[0]


def exact_kl(*, is_reversed: bool = False) -> tuple[Tensor, Tensor]:
    """KL(policy || reference), or KL(reference || policy), and its gradient, which is known in closed form."""
    logps = THETA.log_softmax(0)
    if is_reversed:
        return (REFERENCE.exp() * (REFERENCE - logps)).sum(), logps.exp() - REFERENCE.exp()
    value = (logps.exp() * (logps - REFERENCE)).sum()
    return value, logps.exp() * (logps - REFERENCE - value)


def test_the_closed_form_gradients_are_those_of_autograd() -> None:
    theta = THETA.clone().requires_grad_()
    logps = theta.log_softmax(0)
    (forward,) = torch.autograd.grad((logps.exp() * (logps - REFERENCE)).sum(), theta, retain_graph=True)
    (backward,) = torch.autograd.grad((REFERENCE.exp() * (REFERENCE - logps)).sum(), theta)
    torch.testing.assert_close(forward, exact_kl()[1], **EXACT)
    torch.testing.assert_close(backward, exact_kl(is_reversed=True)[1], **EXACT)


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3_corrected"])
def test_the_expected_value_is_the_kl(estimator: str) -> None:
    torch.testing.assert_close(enumerate_kl(ours(estimator))[0], exact_kl()[0], **EXACT)


def test_the_expected_value_of_k2_is_another() -> None:
    assert abs(enumerate_kl(ours("k2"))[0] - exact_kl()[0]) > 1e-2


def test_the_expected_gradient_of_every_estimator() -> None:
    forward, backward = exact_kl()[1], exact_kl(is_reversed=True)[1]
    expected = {"k1": torch.zeros_like(THETA), "k2": forward, "k3": backward, "k3_corrected": forward}
    for estimator, gradient in expected.items():
        torch.testing.assert_close(enumerate_kl(ours(estimator))[1], gradient, **EXACT)
    # They differ by far more than the tolerance, so a swapped estimator is seen.
    assert min(forward.abs().max(), (forward - backward).abs().max(), backward.abs().max()) > 0.05


def test_k3_corrected_is_exact_when_another_policy_has_sampled() -> None:
    value, gradient = enumerate_kl(ours("k3_corrected"), is_off_policy=True)
    torch.testing.assert_close(value, exact_kl()[0], **EXACT)
    torch.testing.assert_close(gradient, exact_kl()[1], **EXACT)
    for estimator in ("k1", "k2", "k3"):  # none of these knows who sampled
        wrong = enumerate_kl(ours(estimator), is_off_policy=True)
        assert abs(wrong[0] - exact_kl()[0]) > 0.01
        assert (wrong[1] - exact_kl()[1]).abs().max() > 0.01


def plain_k3(logps: Tensor, ref: Tensor, old: Tensor | None) -> Tensor:
    return (ref - logps).exp() - (ref - logps) - 1


def flipped_k3(logps: Tensor, ref: Tensor, old: Tensor | None) -> Tensor:
    return (logps - ref).exp() - (logps - ref) - 1


def flipped_k1(logps: Tensor, ref: Tensor, old: Tensor | None) -> Tensor:
    return ref - logps


def ratio_of(logps: Tensor, old: Tensor | None) -> Tensor:
    return (logps - (logps.detach() if old is None else old)).exp()


def ratio_times_k2(logps: Tensor, ref: Tensor, old: Tensor | None) -> Tensor:
    return ratio_of(logps, old) * (ref - logps).square() / 2


def flipped_ratio_times_k3(logps: Tensor, ref: Tensor, old: Tensor | None) -> Tensor:
    return plain_k3(logps, ref, old) / ratio_of(logps, old)


def fixed_ratio_times_k3(logps: Tensor, ref: Tensor, old: Tensor | None) -> Tensor:
    return ratio_of(logps, old).detach() * plain_k3(logps, ref, old)


def test_the_enumeration_sees_a_flipped_difference_that_no_sign_check_would() -> None:
    logps = THETA.log_softmax(0)
    assert (flipped_k3(logps, REFERENCE, None) >= 0).all()  # like k3
    assert flipped_k3(logps, logps, None).abs().max() == 0  # like k3
    assert abs(enumerate_kl(flipped_k3)[0] - exact_kl()[0]) > 0.01
    assert (enumerate_kl(flipped_k3)[1] - exact_kl(is_reversed=True)[1]).abs().max() > 0.01
    assert abs(enumerate_kl(flipped_k1)[0] - exact_kl()[0]) > 0.1
    torch.testing.assert_close(enumerate_kl(plain_k3)[0], exact_kl()[0], **EXACT)


@pytest.mark.parametrize("wrong", [ratio_times_k2, flipped_ratio_times_k3, fixed_ratio_times_k3])
@pytest.mark.parametrize("is_off_policy", [False, True])
def test_the_enumeration_sees_wrong_corrections(wrong: Estimator, is_off_policy: bool) -> None:
    assert (enumerate_kl(wrong, is_off_policy=is_off_policy)[1] - exact_kl()[1]).abs().max() > 0.01


def sequence_kl(first: Tensor, second: Tensor) -> Tensor:
    """Of two tables of logits, over whole completions."""
    left, right = logps_of(first).sum(1), logps_of(second).sum(1)
    return (left.exp() * (left - right)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3_corrected"])
def test_summed_over_the_tokens_it_is_the_kl_of_whole_completions(estimator: str) -> None:
    reference, behaviour = 2 * random(3, 3, seed=4), random(3, 3, seed=5)
    logps, ref, old = logps_of(POLICY), logps_of(reference), logps_of(behaviour)
    kl = kl_divergence(logps, ref, estimator=estimator, completion_mask=MASK)
    truth = sequence_kl(POLICY, reference)
    torch.testing.assert_close((logps.sum(1).exp() * kl.sum(1)).sum(), truth, **EXACT)
    swapped = kl_divergence(ref, logps, estimator=estimator, completion_mask=MASK)
    assert abs((logps.sum(1).exp() * swapped.sum(1)).sum() - truth) > 0.1
    # The correction is per token: the ratio of the first token is missing from the second, so off-policy it is not.
    off_policy = kl_divergence(logps, ref, estimator=estimator, old_logps=old, completion_mask=MASK)
    assert abs((old.sum(1).exp() * off_policy.sum(1)).sum() - truth) > 0.01


def test_a_penalised_objective_descends_to_reward_minus_kl() -> None:
    """Surrogate plus coefficient times KL: the expected gradient is that of KL - reward, signs and all."""
    rewards, coefficient = doubles(1.0, 0.0, 2.0, 0.5, -1.0, 0.0), 0.7

    def gradient(sign: float) -> Tensor:
        theta = THETA.clone().requires_grad_()
        logps, objective = theta.log_softmax(0), torch.zeros((), dtype=torch.float64)
        for group in itertools.product(range(6), repeat=2):
            rows = list(group)
            new, ref = logps[rows].view(2, 1), REFERENCE[rows].view(2, 1)
            advantages = group_advantages(rewards[rows].view(1, 2), baseline="leave_one_out", scale="none").view(2, 1)
            loss = clipped_surrogate(new, new.detach(), advantages, torch.ones(2, 1), clip_range=0.2)
            loss = loss + sign * coefficient * kl_divergence(new, ref, estimator="k3_corrected", old_logps=new.detach())
            objective = objective + logps[rows].detach().exp().prod() * loss.mean()
        return torch.autograd.grad(objective, theta)[0]

    probs = THETA.softmax(0)
    truth = coefficient * exact_kl()[1] - probs * (rewards - (probs * rewards).sum())
    torch.testing.assert_close(gradient(1.0), truth, **EXACT)
    assert (gradient(-1.0) - truth).abs().max() > 0.05


# KL in the reward

PRIOR = 2 * random(3, 3, seed=4)
BETA = 0.4


def expected_gradient_of_penalised_rewards(
    baseline: str, *, estimator: str = "k1", beta: float = BETA, is_mean: bool = False
) -> Tensor:
    """Of minus REINFORCE's loss, over every pair of completions, each charged with beta times its KL."""
    policy = POLICY.clone().requires_grad_()
    all_logps, prior = logps_of(policy), logps_of(PRIOR)
    probs = all_logps.detach().sum(1).exp()
    objective = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(len(COMPLETIONS)), repeat=2):
        rows = list(group)
        logps, mask = all_logps[rows], MASK[rows]  # (2, 2)
        kl = kl_divergence(logps.detach(), prior[rows], estimator=estimator, completion_mask=mask)
        penalties = beta * kl / (mask.sum(1, keepdim=True) if is_mean else 1)
        rewards = doubles(*[REWARDS[i] for i in rows]).view(1, 2)
        advantages = compute_advantages(rewards, penalties, mask, baseline=baseline, scale="none")
        weights = loss_weights(mask, "constant", max_completion_length=MAX_LENGTH, dtype=torch.float64)
        objective = (
            objective - probs[rows].prod() * (reinforce(logps, logps.detach(), advantages, mask) * weights).sum()
        )
    return torch.autograd.grad(objective, policy)[0]


def true_penalised_gradient() -> Tensor:
    """Of the expected reward less beta times the KL of whole completions against the prior."""
    policy = POLICY.clone().requires_grad_()
    reward = (logps_of(policy).sum(1).exp() * doubles(*REWARDS)).sum()
    return torch.autograd.grad(reward - BETA * sequence_kl(policy, PRIOR), policy)[0]


@pytest.mark.parametrize(("baseline", "share"), [("none", 1.0), ("leave_one_out", 1.0), ("group", 0.5)])
def test_a_kl_in_the_reward_is_a_kl_in_the_objective(baseline: str, share: float) -> None:
    """k1 is not differentiated there, and so needs no gradient of its own: its value, summed, is all that counts."""
    truth = true_penalised_gradient() / MAX_LENGTH
    torch.testing.assert_close(expected_gradient_of_penalised_rewards(baseline), share * truth, **EXACT)
    assert (truth - true_gradient() / MAX_LENGTH).abs().max() > 0.05  # the KL takes part


@pytest.mark.parametrize("wrong", [{"beta": -BETA}, {"beta": 0.0}, {"is_mean": True}, {"estimator": "k2"}], ids=str)
def test_the_enumeration_sees_a_wrong_kl_in_the_reward(wrong: dict[str, Any]) -> None:
    wrong_gradient = expected_gradient_of_penalised_rewards("leave_one_out", **wrong)
    assert (wrong_gradient - true_penalised_gradient() / MAX_LENGTH).abs().max() > 0.01
