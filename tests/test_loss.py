"""Loss: the clipped surrogate, the KL and the weights by hand, by enumeration, by gradcheck; and the loop that sums."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import train_grpo
from grpo.advantages import group_advantages
from grpo.config import load_config
from grpo.logprobs import compute_logprobs
from grpo.loss import AGGREGATIONS, KL_ESTIMATORS, clipped_surrogate, clipped_tokens, kl_divergence, loss_weights

EXACT = {"rtol": 0.0, "atol": 1e-12}
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
INF, NAN = float("inf"), float("nan")


def doubles(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- clipped surrogate


def value_and_gradient(ratio: float, advantage: float, **clip: Any) -> tuple[float, float]:
    """Of one token; the gradient is with respect to its log-probability."""
    logps = doubles([ratio]).log().requires_grad_()
    loss = clipped_surrogate(logps, torch.zeros_like(logps), doubles([advantage]), torch.ones(1, 1), **clip)
    loss.sum().backward()
    assert logps.grad is not None
    return loss.item(), logps.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        # clip_range 0.2: the ratio is clipped to [0.8, 1.2]; the gradient of -r * A with respect to log p is -r * A
        (1.5, 2.0, -2.4, 0.0),  # A > 0, r too high: -min(3.0, 2.4); far enough, no gradient
        (0.5, 2.0, -1.0, -1.0),  # A > 0, r too low: -min(1.0, 1.6); must come back up
        (1.5, -2.0, 3.0, 3.0),  # A < 0, r too high: -min(-3.0, -2.4); must come back down
        (0.5, -2.0, 1.6, 0.0),  # A < 0, r too low: -min(-1.0, -1.6); far enough, no gradient
        (1.1, 2.0, -2.2, -2.2),  # inside nothing is clipped
        (0.9, -2.0, 1.8, 1.8),
        (1.0, 2.0, -2.0, -2.0),  # the first update
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_min_not_max_in_all_four_quadrants(ratio: float, advantage: float, value: float, gradient: float) -> None:
    got = value_and_gradient(ratio, advantage, clip_range=0.2)
    assert got == pytest.approx((value, gradient), abs=1e-12)
    # The maximum differs wherever the clip does anything, so each of these rows tells the two apart.
    wrong = -max(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert (abs(wrong - value) > 0.1) == (not 0.8 <= ratio <= 1.2 and advantage != 0)


def test_the_upper_clip_is_its_own_setting() -> None:
    assert value_and_gradient(1.25, 1.0, clip_range=0.2) == pytest.approx((-1.2, 0.0), abs=1e-12)
    assert value_and_gradient(1.25, 1.0, clip_range=0.2, clip_range_high=0.28) == pytest.approx((-1.25, -1.25))
    assert value_and_gradient(1.5, 1.0, clip_range=0.2, clip_range_high=0.28) == pytest.approx((-1.28, 0.0), abs=1e-12)
    # The lower end stays where it was: 0.75 lies below 0.8 but not below 0.72.
    assert value_and_gradient(0.75, -1.0, clip_range=0.2, clip_range_high=0.28) == pytest.approx((0.8, 0.0), abs=1e-12)


def test_clip_share_counts_binding_clips_only() -> None:
    ratios = doubles([1.5, 0.5, 1.1], [1.5, 0.5, 0.9], [1.5, 0.5, 1.0])
    advantages = doubles([1.0], [-1.0], [0.0])
    low, high = clipped_tokens(ratios.log(), torch.zeros(3, 3), advantages, torch.ones(3, 3), clip_range=0.2)
    assert low.tolist() == [[False, False, False], [False, True, False], [False, False, False]]
    assert high.tolist() == [[True, False, False], [False, False, False], [False, False, False]]
    # Counting every ratio outside [0.8, 1.2] would give 6 instead of 2.
    assert int(((ratios < 0.8) | (ratios > 1.2)).sum()) == 6
    # Binding = the gradient is gone.
    logps = ratios.log().requires_grad_()
    clipped_surrogate(logps, torch.zeros(3, 3), advantages, torch.ones(3, 3), clip_range=0.2).sum().backward()
    assert logps.grad is not None
    assert torch.equal(logps.grad[:2] == 0, (low | high)[:2])


def test_clip_share_uses_the_upper_clip_and_the_mask() -> None:
    ratios, advantages = doubles([1.25, 1.5, 1.5], [0.5, 0.5, 0.5]), doubles([1.0], [-1.0])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    low, high = clipped_tokens(ratios.log(), torch.zeros(2, 3), advantages, mask, clip_range=0.2, clip_range_high=0.28)
    assert high.tolist() == [[False, True, False], [False, False, False]]
    assert low.tolist() == [[False, False, False], [False, True, True]]
    low, high = clipped_tokens(ratios.log(), torch.zeros(2, 3), advantages, mask, clip_range=0.6)
    assert not (low | high).any()


def test_one_dimensional_advantages_are_refused_also_when_b_equals_c() -> None:
    square, mask = torch.zeros(3, 3), torch.ones(3, 3)
    for function in (clipped_surrogate, clipped_tokens):
        for shape in [(3,), (1, 3), (3, 2), (), (3, 3, 1)]:
            with pytest.raises(ValueError, match="advantages"):
                function(square, square, torch.ones(shape), mask, clip_range=0.2)
    # What the refusal prevents: (3,) would have run along the tokens instead of the completions.
    by_row = clipped_surrogate(square, square, torch.tensor([[1.0], [2.0], [3.0]]), mask, clip_range=0.2)
    assert by_row.tolist() == [[-1.0] * 3, [-2.0] * 3, [-3.0] * 3]


def test_advantages_may_differ_by_token() -> None:
    zeros = torch.zeros(2, 2)
    loss = clipped_surrogate(zeros, zeros, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2), clip_range=0.2)
    assert loss.tolist() == [[-1.0, -2.0], [-3.0, -4.0]]


def test_the_gradient_where_old_equals_new_is_that_of_reinforce() -> None:
    logits = random(3, 4, 5, seed=0).requires_grad_()
    tokens = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(1))
    advantages, weights = doubles([1.0], [-2.0], [0.5]), loss_weights(MASK, "token", max_completion_length=4)

    def logps() -> Tensor:
        return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    surrogate = clipped_surrogate(logps(), logps().detach(), advantages, MASK, clip_range=0.2)
    assert torch.equal(surrogate, torch.where(MASK, -advantages, 0.0))  # -A, and the loss itself says nothing
    (ours,) = torch.autograd.grad((surrogate * weights).sum(), logits)
    (reinforce,) = torch.autograd.grad((-advantages * logps() * weights).sum(), logits)
    torch.testing.assert_close(ours, reinforce, **EXACT)
    assert ours.abs().max() > 0.01


def test_an_infinite_clip_removes_the_clip() -> None:
    old, advantages = random(3, 4, seed=1), doubles([1.0], [-2.0], [0.5])
    logps = random(3, 4, seed=2, size=3.0).requires_grad_()
    ours = clipped_surrogate(logps, old, advantages, MASK, clip_range=INF)
    plain = torch.where(MASK, -(logps - old).exp() * advantages, 0.0)
    torch.testing.assert_close(ours, plain, **EXACT)
    (ours_gradient,) = torch.autograd.grad(ours.sum(), logps)
    (plain_gradient,) = torch.autograd.grad(plain.sum(), logps)
    torch.testing.assert_close(ours_gradient, plain_gradient, **EXACT)
    assert not torch.allclose(clipped_surrogate(logps, old, advantages, MASK, clip_range=0.2), plain)


def test_old_logps_stay_fixed_so_a_second_step_is_not_another_on_policy_step() -> None:
    # One logit per action, action 0, A = 1, two steps of gradient descent at rate 1.
    def two_steps(is_old_recomputed: bool) -> Tensor:
        logits = doubles([0.0, 0.0])[0].requires_grad_()
        old = logits.log_softmax(0)[0].detach()
        for _ in range(2):
            logp = logits.log_softmax(0)[0]
            used = logp.detach() if is_old_recomputed else old
            loss = clipped_surrogate(
                logp.view(1, 1), used.view(1, 1), torch.ones(1, 1), torch.ones(1, 1), clip_range=0.2
            )
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            logits = (logits - gradient).detach().requires_grad_()
        return logits.detach()

    # First step: the gradient of log p_0 is (0.5, -0.5). After it p_0 = 0.731, ratio 1.46 > 1.2: clipped, so no second.
    assert two_steps(is_old_recomputed=False).tolist() == [0.5, -0.5]
    assert two_steps(is_old_recomputed=True)[0] > 0.7


# ---------------------------------------------------------------- padding


POISONS = [NAN, INF, -INF, 1e4, -1e4]  # the last two overflow or vanish in the exp


def poisoned(values: Tensor, poison: float) -> Tensor:
    return torch.where(MASK, values, poison)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("place", ["logps", "old_logps", "advantages", "all"])
def test_nan_in_padding_changes_nothing_in_the_surrogate(place: str, poison: float) -> None:
    clean = {"logps": random(3, 4, seed=0), "old_logps": random(3, 4, seed=1), "advantages": random(3, 4, seed=2)}
    dirty = {name: poisoned(x, poison) if place in (name, "all") else x for name, x in clean.items()}
    weights = loss_weights(MASK, "token", max_completion_length=4, dtype=torch.float64)
    results = []
    for inputs in (clean, dirty):
        logps = inputs["logps"].clone().requires_grad_()
        loss = clipped_surrogate(logps, inputs["old_logps"], inputs["advantages"], MASK, clip_range=0.2)
        (gradient,) = torch.autograd.grad((loss * weights).sum(), logps)
        low, high = clipped_tokens(logps, inputs["old_logps"], inputs["advantages"], MASK, clip_range=0.2)
        assert (loss[~MASK] == 0).all()
        assert (gradient[~MASK] == 0).all()
        assert not (low | high)[~MASK].any()
        results.append((loss.detach(), gradient, low, high))
    for ours, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, expected)
    assert results[0][1].abs().max() > 0.01


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("place", ["logps", "ref_logps", "old_logps", "all"])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_nan_in_padding_changes_nothing_in_the_kl(estimator: str, place: str, poison: float) -> None:
    clean = {"logps": random(3, 4, seed=0), "ref_logps": random(3, 4, seed=1), "old_logps": random(3, 4, seed=2)}
    dirty = {name: poisoned(x, poison) if place in (name, "all") else x for name, x in clean.items()}
    results = []
    for inputs in (clean, dirty):
        logps = inputs["logps"].clone().requires_grad_()
        kl = kl_divergence(
            logps, inputs["ref_logps"], estimator=estimator, old_logps=inputs["old_logps"], completion_mask=MASK
        )
        (gradient,) = torch.autograd.grad(kl.sum(), logps)
        assert (kl[~MASK] == 0).all()
        assert (gradient[~MASK] == 0).all()
        results.append((kl.detach(), gradient))
    assert torch.equal(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])
    assert (results[0][1][MASK] != 0).all()


def test_masking_after_the_exp_would_still_give_nan_gradients() -> None:
    # The twin of the two tests above: it shows that they can fail.
    logps = torch.where(MASK, random(3, 4, seed=0), 1e4).requires_grad_()
    masked_after = torch.where(MASK, (logps - 0.0).exp(), 0.0)
    (gradient,) = torch.autograd.grad(masked_after.sum(), logps)
    assert masked_after.isfinite().all()
    assert gradient[~MASK].isnan().any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_all_completions_masked_gives_loss_zero_and_finite_gradients(aggregation: str) -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    logps = torch.full((2, 3), -1.0).requires_grad_()
    loss = clipped_surrogate(logps, torch.zeros(2, 3), torch.ones(2, 1), mask, clip_range=0.2)
    for estimator in KL_ESTIMATORS:
        loss = loss + kl_divergence(logps, torch.zeros(2, 3), estimator=estimator, completion_mask=mask)
    total = (loss * loss_weights(mask, aggregation, max_completion_length=3)).sum()
    total.backward()
    assert total.item() == 0
    assert logps.grad is not None
    assert torch.equal(logps.grad, torch.zeros(2, 3))


# ---------------------------------------------------------------- KL


def test_kl_values_by_hand() -> None:
    # log p = -1, -2, -3 against ref = -2: D = ref - log p = -1, 0, 1
    logps, ref = doubles([-1.0, -2.0, -3.0]), doubles([-2.0, -2.0, -2.0])
    expected = {
        "k1": [1.0, 0.0, -1.0],  # -D: positive where the policy is likelier than the reference
        "k2": [0.5, 0.0, 0.5],
        "k3": [0.36787944117144233, 0.0, 0.7182818284590451],  # e^-1 + 1 - 1, and e - 1 - 1
        "k3_corrected": [0.36787944117144233, 0.0, 0.7182818284590451],  # on-policy the same value
    }
    for estimator, values in expected.items():
        torch.testing.assert_close(kl_divergence(logps, ref, estimator=estimator), doubles(values), **EXACT)
    # Off-policy r = exp(log p - old): old = log p - ln 2 makes it 2, and only k3_corrected asks.
    old = logps - doubles([2.0]).log()
    for estimator, values in expected.items():
        factor = 2.0 if estimator == "k3_corrected" else 1.0
        torch.testing.assert_close(
            kl_divergence(logps, ref, estimator=estimator, old_logps=old), factor * doubles(values), **EXACT
        )


def test_kl_gradients_by_hand() -> None:
    logps, ref = doubles([-1.0, -2.0, -3.0]), doubles([-2.0, -2.0, -2.0])
    expected = {
        "k1": [1.0, 1.0, 1.0],
        "k2": [1.0, 0.0, -1.0],  # -D
        "k3": [0.6321205588285577, 0.0, -1.718281828459045],  # 1 - e^D
        "k3_corrected": [1.0, 0.0, -1.0],  # -r * D
    }
    for estimator, values in expected.items():
        leaf = logps.clone().requires_grad_()
        kl_divergence(leaf, ref, estimator=estimator).sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, doubles(values), **EXACT)
    leaf = logps.clone().requires_grad_()
    old = (logps - doubles([2.0]).log()).requires_grad_()
    kl_divergence(leaf, ref, estimator="k3_corrected", old_logps=old).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, doubles([2.0, 0.0, -2.0]), **EXACT)
    assert old.grad is None  # nothing flows into the old log-probs


# A softmax over six tokens: policy, reference, and the policy that sampled.
THETA = [0.3, -0.7, 1.2, 0.0, -1.5, 0.8]
REFERENCE = doubles([-0.2, 0.5, 0.9, -1.0, 0.4, 0.1])[0].log_softmax(0)
BEHAVIOUR = doubles([0.5, -0.2, 0.7, 0.3, -0.9, 0.2])[0].log_softmax(0)


def enumerate_kl(estimator: str, is_off_policy: bool) -> tuple[Tensor, Tensor]:
    """(value, gradient) expected over every token the sampler can draw."""
    theta = doubles(THETA)[0].requires_grad_()
    logps = theta.log_softmax(0)
    sampler = BEHAVIOUR if is_off_policy else logps.detach()
    kl = kl_divergence(
        logps.unsqueeze(1),  # (6, 1): each token once
        REFERENCE.unsqueeze(1),
        estimator=estimator,
        old_logps=BEHAVIOUR.unsqueeze(1) if is_off_policy else None,
        completion_mask=torch.ones(6, 1),
    )
    expectation = (sampler.exp() * kl.squeeze(1)).sum()
    return expectation.detach(), torch.autograd.grad(expectation, theta)[0]


def exact_kl(is_reversed: bool = False) -> tuple[Tensor, Tensor]:
    """KL(policy || reference), or KL(reference || policy), and its gradient."""
    theta = doubles(THETA)[0].requires_grad_()
    logps = theta.log_softmax(0)
    kl = (REFERENCE.exp() * (REFERENCE - logps)).sum() if is_reversed else (logps.exp() * (logps - REFERENCE)).sum()
    return kl.detach(), torch.autograd.grad(kl, theta)[0]


def test_kl_by_enumeration_on_a_small_softmax() -> None:
    value, gradient = exact_kl()
    _, reversed_gradient = exact_kl(is_reversed=True)
    for estimator in ("k1", "k3", "k3_corrected"):  # unbiased values
        torch.testing.assert_close(enumerate_kl(estimator, is_off_policy=False)[0], value, **EXACT)
    expected = {"k1": torch.zeros(6, dtype=torch.float64), "k2": gradient, "k3": reversed_gradient}
    for estimator, expected_gradient in (expected | {"k3_corrected": gradient}).items():
        torch.testing.assert_close(enumerate_kl(estimator, is_off_policy=False)[1], expected_gradient, **EXACT)
    # The four expectations differ by far more than the tolerance, so that a swapped estimator or a flipped D is seen.
    assert abs(enumerate_kl("k2", is_off_policy=False)[0] - value) > 1e-2
    assert (gradient - reversed_gradient).abs().max() > 0.05
    assert gradient.abs().max() > 0.05


def test_kl_corrected_by_enumeration_off_policy() -> None:
    value, gradient = exact_kl()
    ours = enumerate_kl("k3_corrected", is_off_policy=True)
    torch.testing.assert_close(ours[0], value, **EXACT)
    torch.testing.assert_close(ours[1], gradient, **EXACT)
    for estimator in ("k1", "k2", "k3"):  # without the ratio nothing is exact when another policy has sampled
        assert (enumerate_kl(estimator, is_off_policy=True)[1] - gradient).abs().max() > 0.01
    assert abs(enumerate_kl("k3", is_off_policy=True)[0] - value) > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("log_ratio", [0.0, 3.0, -3.0])
def test_kl_corrected_gradient_at_extreme_differences(log_ratio: float, dtype: torch.dtype) -> None:
    differences = torch.tensor([[25.0, -25.0, 200.0, -200.0]], dtype=dtype)  # D = ref - log p
    logps = torch.full((1, 4), -300.0, dtype=dtype, requires_grad=True)
    kl = kl_divergence(
        logps, logps.detach() + differences, estimator="k3_corrected", old_logps=logps.detach() - log_ratio
    )
    (gradient,) = torch.autograd.grad(kl.sum(), logps)
    ratio = torch.tensor(log_ratio, dtype=dtype).exp()
    # -r * D: a token the reference likes more must become likelier, however far away it is. Clamping D at 20 before the
    # exp of r * k3 would give +5e8 instead of -25.
    torch.testing.assert_close(gradient, ratio * torch.tensor([[-25.0, 25.0, -200.0, 200.0]], dtype=dtype))
    # In the value D is clamped at 20 from above: e^20 - 21; below it is e^-25 + 24 and e^-200 + 199.
    expected = torch.tensor([[485165174.4097903, 24.000000000013888, 485165174.4097903, 199.0]], dtype=dtype)
    torch.testing.assert_close(kl.detach(), ratio * expected)


def test_plain_k3_at_extreme_differences_is_finite_and_never_has_the_wrong_sign() -> None:
    logps = torch.full((1, 4), -300.0, requires_grad=True)
    kl = kl_divergence(logps, logps.detach() + torch.tensor([[25.0, -25.0, 200.0, -200.0]]), estimator="k3")
    (gradient,) = torch.autograd.grad(kl.sum(), logps)
    torch.testing.assert_close(kl.detach(), torch.tensor([[485165184.0, 24.0, 485165184.0, 199.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 1.0, 0.0, 1.0]]))  # clamped: 0; else 1 - e^D
    # Clamping the exp alone keeps -D in reach of the gradient: +1 where the policy must go up.
    wrong_logps = torch.full((1, 1), -300.0, requires_grad=True)
    difference = -275.0 - wrong_logps
    (wrong,) = torch.autograd.grad((difference.clamp(max=20).exp() - difference - 1).sum(), wrong_logps)
    assert wrong.item() == 1.0


def test_kl_is_zero_where_the_policy_is_the_reference() -> None:
    logps = random(3, 4, seed=0)
    for estimator in KL_ESTIMATORS:
        assert torch.equal(kl_divergence(logps, logps, estimator=estimator), torch.zeros(3, 4, dtype=torch.float64))


def test_an_unknown_estimator_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="estimator: got 'k4'"):
        kl_divergence(torch.zeros(1, 1), torch.zeros(1, 1), estimator="k4")


# ---------------------------------------------------------------- gradcheck


def test_gradcheck_of_the_surrogate() -> None:
    old = random(3, 4, seed=1)
    away_from_kinks = torch.tensor([0.1, -0.1, 0.5, -0.5], dtype=torch.float64)  # 1.11 0.90 inside, 1.65 0.61 outside
    logps = (old + away_from_kinks).requires_grad_()
    advantages = random(3, 4, seed=2).requires_grad_()

    def loss(logps: Tensor, advantages: Tensor) -> Tensor:
        return clipped_surrogate(logps, old, advantages, MASK, clip_range=0.2)

    assert torch.autograd.gradcheck(loss, (logps, advantages))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_gradcheck_of_the_kl(estimator: str) -> None:
    logps, ref, old = random(3, 4, seed=0).requires_grad_(), random(3, 4, seed=1), random(3, 4, seed=2)

    def kl(logps: Tensor) -> Tensor:
        return kl_divergence(logps, ref, estimator=estimator, old_logps=old, completion_mask=MASK)

    assert torch.autograd.gradcheck(kl, (logps,))  # also of k3_corrected: d(r * k3) = -r * D


def test_gradcheck_tells_k3_corrected_from_k3_on_policy() -> None:
    # With r held at 1 the value is k3's and the gradient is not: that is the correction.
    logps, ref = random(3, 4, seed=0).requires_grad_(), random(3, 4, seed=1)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda x: kl_divergence(x, ref, estimator="k3_corrected"), (logps,))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
def test_loss_weights_by_hand(mask_dtype: torch.dtype) -> None:
    # Lengths 3, 2, 4 and 0; N = 4 rows, the masked one included; 9 tokens; max_completion_length 5.
    mask = torch.cat([MASK, torch.zeros(1, 4, dtype=torch.bool)]).to(mask_dtype)
    kept = mask.double()
    expected = {
        "sequence": kept * doubles([1 / 12], [1 / 8], [1 / 16], [0.0]),
        "token": kept / 9,
        "constant": kept / 20,  # 4 * 5: the setting, not the padded length 4 and not the tokens there are
    }
    for aggregation, weights in expected.items():
        ours = loss_weights(mask, aggregation, max_completion_length=5, dtype=torch.float64)
        torch.testing.assert_close(ours, weights, **EXACT)
        assert loss_weights(mask, aggregation, max_completion_length=5).dtype == torch.float32


def test_totals_of_the_step_replace_those_of_the_mask() -> None:
    def weight(aggregation: str) -> float:
        mask = torch.tensor([[1, 1]])
        return loss_weights(mask, aggregation, max_completion_length=8, num_rows=5, num_tokens=40)[0, 0].item()

    assert weight("sequence") == pytest.approx(1 / 10)
    assert weight("token") == pytest.approx(1 / 40)
    assert weight("constant") == pytest.approx(1 / 40)  # 5 * 8
    nothing = loss_weights(torch.zeros(1, 2), "token", max_completion_length=8, num_tokens=0)
    assert torch.equal(nothing, torch.zeros(1, 2))


def test_an_unknown_aggregation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="aggregation: got 'mean'"):
        loss_weights(MASK, "mean", max_completion_length=4)


def test_equal_lengths_make_token_and_sequence_the_same() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    token, sequence = (loss_weights(mask, name, max_completion_length=3) for name in ("token", "sequence"))
    torch.testing.assert_close(token, sequence, rtol=0, atol=1e-7)
    token, sequence = (loss_weights(MASK, name, max_completion_length=4) for name in ("token", "sequence"))
    assert (token - sequence).abs().max() > 0.01  # ragged lengths do not


def test_full_lengths_make_token_and_constant_the_same() -> None:
    full = torch.ones(3, 4)
    token, constant = (loss_weights(full, name, max_completion_length=4) for name in ("token", "constant"))
    torch.testing.assert_close(token, constant, rtol=0, atol=1e-7)
    token, constant = (loss_weights(MASK, name, max_completion_length=4) for name in ("token", "constant"))
    assert (token - constant).abs().max() > 0.01


def test_padding_changes_no_weight() -> None:
    padded = torch.nn.functional.pad(MASK, (0, 3))
    for aggregation in AGGREGATIONS:
        narrow, wide = (loss_weights(mask, aggregation, max_completion_length=7) for mask in (MASK, padded))
        assert torch.equal(wide[:, :4], narrow)
        assert (wide[:, 4:] == 0).all()


def test_inputs_are_unchanged_and_the_dtype_is_kept() -> None:
    for dtype in (torch.float32, torch.float64):
        inputs = [random(3, 4, seed=seed).to(dtype) for seed in range(3)]
        before = [tensor.clone() for tensor in inputs]
        mask = MASK.clone()
        logps, old, other = inputs
        results = [clipped_surrogate(logps, old, other, mask, clip_range=0.2)]
        results += [
            kl_divergence(logps, other, estimator=name, old_logps=old, completion_mask=mask) for name in KL_ESTIMATORS
        ]
        results += [loss_weights(mask, name, max_completion_length=4, dtype=dtype) for name in AGGREGATIONS]
        assert {result.dtype for result in results} == {dtype}
        assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))
        assert torch.equal(mask, MASK)


# ---------------------------------------------------------------- one optimizer step, in pieces


PROMPT_LENGTHS, LENGTHS = (2, 5, 3, 1, 4, 2), (4, 1, 6, 2, 3, 6)


def step_inputs(padding: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Six ragged rows of random tokens: the four arguments of compute_logprobs."""
    generator = torch.Generator().manual_seed(0)
    prompt_ids, completion_ids = (torch.randint(3, 40, (6, n), generator=generator) for n in (5, 6))
    prompt_mask = torch.tensor([[t >= 5 - n for t in range(5)] for n in PROMPT_LENGTHS])
    completion_mask = torch.tensor([[t < n for t in range(6)] for n in LENGTHS])
    prompt_ids, prompt_mask = (torch.nn.functional.pad(x, (padding, 0)) for x in (prompt_ids, prompt_mask))
    completion_ids, completion_mask = (
        torch.nn.functional.pad(x, (0, padding)) for x in (completion_ids, completion_mask)
    )
    return prompt_ids, prompt_mask, completion_ids, completion_mask


def step_gradient(
    model: PreTrainedModel,
    aggregation: str,
    pieces: Sequence[Sequence[int]],
    *,
    padding: int = 0,
    mean_per_piece: bool = False,
) -> tuple[float, Tensor]:
    """(loss, flat gradient) of one optimizer step that is computed in these micro-batches."""
    inputs = step_inputs(padding)
    mask = inputs[3]
    advantages = group_advantages(doubles([1.0, 0.0, 3.0], [0.0, 2.0, 0.0])).view(6, 1)
    drift = torch.nn.functional.pad(random(6, 6, seed=4, size=0.3), (0, padding))
    weights = loss_weights(mask, aggregation, max_completion_length=6, dtype=torch.float64)
    model.zero_grad()
    total = 0.0
    for rows in map(list, pieces):
        logps, _ = compute_logprobs(model, *(x[rows] for x in inputs), temperature=0.9)
        old, ref = logps.detach() - drift[rows], logps.detach() + 2 * drift[rows]
        loss = clipped_surrogate(logps, old, advantages[rows], mask[rows], clip_range=0.2)
        loss = loss + 0.1 * kl_divergence(
            logps, ref, estimator="k3_corrected", old_logps=old, completion_mask=mask[rows]
        )
        used = weights[rows]
        if mean_per_piece:
            used = loss_weights(mask[rows], aggregation, max_completion_length=6, dtype=torch.float64) / len(pieces)
        piece = (loss * used).sum()
        piece.backward()
        total += piece.item()
    return total, torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_do_not_depend_on_micro_batches(make_model: Callable[..., PreTrainedModel], aggregation: str) -> None:
    model = make_model("llama").double()
    whole_loss, whole = step_gradient(model, aggregation, [range(6)])
    for pieces in (
        [[0], [1], [2], [3], [4], [5]],
        [[0, 1], [2, 3], [4, 5]],
        [[0, 1, 2, 3], [4, 5]],
        [[5, 2], [1, 0, 4, 3]],
    ):
        loss, gradient = step_gradient(model, aggregation, pieces)
        assert loss == pytest.approx(whole_loss, abs=1e-12)
        torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-12)
    loss, gradient = step_gradient(model, aggregation, [range(6)], padding=3)
    assert loss == pytest.approx(whole_loss, abs=1e-12)
    torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-12)


def test_a_token_mean_per_micro_batch_is_another_gradient(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama").double()
    _, whole = step_gradient(model, "token", [range(6)])
    _, wrong = step_gradient(model, "token", [[0, 1], [2, 3], [4, 5]], mean_per_piece=True)
    assert (whole - wrong).norm() / whole.norm() > 0.05


# ---------------------------------------------------------------- the loop that uses all of it

REWARD_SOURCE = """
def letters(prompts, completions, **_):
    return [sum(character.isalpha() for character in text) / 8 for text in completions]
"""


@pytest.fixture
def run_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., list[dict[str, Any]]]:
    """run_training(key=value, ...): a few steps of train_grpo.py on a tiny model; returns the rows of metrics.jsonl."""
    model = make_model("llama")
    model.generation_config.eos_token_id = [1, 20, 30, 40]  # so that lengths differ
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "letters_reward.py").write_text(REWARD_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    samples = [{"prompt": text} for text in ("1+2=", "abc", "12-7+3=", "x?")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, samples)))
    settings = {
        "model_name": tmp_path / "model",
        "train_file": tmp_path / "data.jsonl",
        "eval_file": tmp_path / "data.jsonl",
        "rewards": "['letters_reward:letters']",
        "batch_size": 3,
        "group_size": 4,
        "max_completion_length": 8,
        "num_train_steps": 1,
        "num_iterations": 1,
        "num_minibatches": 1,
        "micro_batch_size": 12,
        "kl_coeff": 0.1,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "device": "cpu",
        "dtype": "float32",
    }
    runs: list[Path] = []

    def run(**changes: Any) -> list[dict[str, Any]]:
        runs.append(tmp_path / f"run-{len(runs)}")
        chosen = settings | changes | {"output_dir": runs[-1]}
        train_grpo.main(load_config(overrides=[f"{key}={value}" for key, value in chosen.items()]))
        rows = [json.loads(line) for line in (runs[-1] / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["step"] > 0]

    return run


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_loss_gradient_and_metrics_of_a_run_do_not_depend_on_micro_batches(
    run_training: Callable[..., list[dict[str, Any]]], aggregation: str
) -> None:
    names = ["loss", "grad_norm", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "num_tokens"]
    names += ["sampling/logp_difference/mean", "reward", "reward_std", "completions/mean_length"]
    (whole,) = run_training(loss_aggregation=aggregation)
    assert whole["grad_norm"] > 0.01  # read before zero_grad
    assert whole["completions/mean_length"] < 7  # the rows are ragged, else a mean per micro-batch would pass
    for size in (1, 2, 5):
        (pieces,) = run_training(loss_aggregation=aggregation, micro_batch_size=size)
        assert {name: pieces[name] for name in names} == pytest.approx(
            {name: whole[name] for name in names}, rel=1e-4, abs=1e-6
        )


@pytest.mark.parametrize("setting", ["num_iterations", "num_minibatches"])
def test_old_logps_are_of_before_the_first_optimizer_step(
    run_training: Callable[..., list[dict[str, Any]]], setting: str
) -> None:
    # A large step moves the ratio of the second update far from 1; recomputed old log-probs would hold it at 1.
    (once,) = run_training(batch_size=4, learning_rate=0.05, kl_coeff=0)
    assert once["clip_ratio/low_mean"] == once["clip_ratio/high_mean"] == 0  # the first update: ratio exactly 1
    (twice,) = run_training(batch_size=4, learning_rate=0.05, kl_coeff=0, **{setting: 2})
    assert twice["clip_ratio/low_mean"] + twice["clip_ratio/high_mean"] > 0.1
    # And they are the sampler's policy: the mean difference is rounding, not the step that was taken.
    assert twice["sampling/logp_difference/mean"] < 1e-5


def test_an_overflowing_ratio_of_an_unmasked_token_gives_no_nan() -> None:
    """inf * 0 is NaN: advantage 0 (a group without spread) in the surrogate, D = 0 in the corrected KL."""
    old, one, zero = torch.full((1, 1), -100.0), torch.ones(1, 1), torch.zeros(1, 1)
    for advantage in (0.0, 1.0):
        logps = torch.zeros(1, 1, requires_grad=True)
        loss = clipped_surrogate(logps, old, advantage * one, one, clip_range=0.2)
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        assert loss.item() == pytest.approx(-1.2 * advantage)
        assert gradient.item() == 0.0
    logps = torch.zeros(1, 1, requires_grad=True)
    kl = kl_divergence(logps, zero, estimator="k3_corrected", old_logps=old)
    (gradient,) = torch.autograd.grad(kl.sum(), logps)
    assert kl.item() == gradient.item() == 0.0
