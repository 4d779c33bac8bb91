"""Loss: the clipped surrogate, the KL and the weights by hand, and the identities between the variants."""

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.loss import AGGREGATIONS, KL_ESTIMATORS, clipped_surrogate, clipped_tokens, kl_divergence, loss_weights

EXACT = {"rtol": 0.0, "atol": 1e-12}
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
INF = float("inf")


def doubles(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Clipped surrogate


def value_and_gradient(ratio: float, advantage: float, **clip: Any) -> tuple[float, float]:
    """Of one token; the gradient is with respect to its log-probability."""
    logps = doubles([ratio]).log().requires_grad_()
    loss = clipped_surrogate(logps, torch.zeros_like(logps), doubles([advantage]), torch.ones(1, 1), **clip)
    loss.sum().backward()
    assert logps.grad is not None
    return loss.item(), logps.grad.item()


def test_the_upper_clip_is_its_own_setting() -> None:
    assert value_and_gradient(1.25, 1.0, clip_range=0.2) == pytest.approx((-1.2, 0.0), abs=1e-12)
    assert value_and_gradient(1.25, 1.0, clip_range=0.2, clip_range_high=0.28) == pytest.approx((-1.25, -1.25))
    assert value_and_gradient(1.5, 1.0, clip_range=0.2, clip_range_high=0.28) == pytest.approx((-1.28, 0.0), abs=1e-12)
    # The lower end stays where it was: 0.75 lies below 0.8 but not below 0.72.
    assert value_and_gradient(0.75, -1.0, clip_range=0.2, clip_range_high=0.28) == pytest.approx((0.8, 0.0), abs=1e-12)


def test_clip_share_uses_the_upper_clip_and_the_mask() -> None:
    ratios, advantages = doubles([1.25, 1.5, 1.5], [0.5, 0.5, 0.5]), doubles([1.0], [-1.0])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    low, high = clipped_tokens(ratios.log(), torch.zeros(2, 3), advantages, mask, clip_range=0.2, clip_range_high=0.28)
    assert high.tolist() == [[False, True, False], [False, False, False]]
    assert low.tolist() == [[False, False, False], [False, True, True]]
    low, high = clipped_tokens(ratios.log(), torch.zeros(2, 3), advantages, mask, clip_range=0.6)
    assert not (low | high).any()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_far_too_likely_with_a_negative_advantage_costs_its_whole_ratio(dtype: torch.dtype) -> None:
    """The side that is never clipped. An early clamp, as of the KL at 20, would take its gradient away."""
    logps = torch.tensor([[30.0, 200.0]], dtype=dtype, requires_grad=True)
    zeros, minus_one = torch.zeros(1, 2, dtype=dtype), -torch.ones(1, 1, dtype=dtype)
    loss = clipped_surrogate(logps, zeros, minus_one, torch.ones(1, 2), clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert loss[0, 0].item() == gradient[0, 0].item() == pytest.approx(10686474581524.463)  # e^30
    assert loss[0, 1].isfinite()
    assert gradient[0, 1].isfinite()


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


# KL


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


def test_kl_is_zero_where_the_policy_is_the_reference() -> None:
    logps = random(3, 4, seed=0)
    for estimator in KL_ESTIMATORS:
        assert torch.equal(kl_divergence(logps, logps, estimator=estimator), torch.zeros(3, 4, dtype=torch.float64))


def test_an_unknown_estimator_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="estimator: got 'k4'"):
        kl_divergence(torch.zeros(1, 1), torch.zeros(1, 1), estimator="k4")


# Weights


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
