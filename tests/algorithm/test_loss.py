"""Loss: the clipped surrogate, the KL and the weights by hand, and the identities between the variants."""

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.loss import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    SURROGATES,
    cispo,
    clipped_surrogate,
    clipped_tokens,
    gspo,
    kl_divergence,
    loss_weights,
    reinforce,
)

EXACT = {"rtol": 0.0, "atol": 1e-12}
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
INF, NAN = float("inf"), float("nan")


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


def test_dual_clip_bounds_the_loss_of_a_bad_token() -> None:
    def ours(ratio: float, advantage: float) -> Any:
        return pytest.approx(value_and_gradient(ratio, advantage, clip_range=0.2, dual_clip=3.0), abs=1e-12)

    assert ours(4.0, -1.0) == (3.0, 0.0)  # without it 4 and 4
    assert value_and_gradient(4.0, -1.0, clip_range=0.2) == pytest.approx((4.0, 4.0))
    assert ours(2.5, -2.0) == (5.0, 5.0)  # ratio 2.5 is not yet 3
    assert ours(0.5, -1.0) == (0.8, 0.0)  # the lower clip as before
    assert ours(4.0, 1.0) == (-1.2, 0.0)  # a good token has the upper clip already
    assert ours(0.1, 1.0) == (-0.1, -0.1)
    assert ours(4.0, 0.0) == (0.0, 0.0)


def test_dual_clip_is_a_clip_of_bad_tokens() -> None:
    log_ratios, ones = doubles([4.0, 2.5, 0.5]).log(), torch.ones(1, 3)
    for advantage, expected in [(-1.0, [True, False, True]), (1.0, [False, False, False])]:
        low, _ = clipped_tokens(log_ratios, 0 * log_ratios, doubles([advantage]), ones, clip_range=0.2, dual_clip=3.0)
        assert low.tolist() == [expected]


# The other surrogates


def test_reinforce_by_hand() -> None:
    logps, old = doubles([-1.0, -2.0, NAN], [-0.5, NAN, NAN]).requires_grad_(), doubles([-9.0] * 3, [-9.0] * 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = reinforce(logps, old, doubles([2.0], [-4.0]), mask)
    assert loss.tolist() == [[2.0, 4.0, 0.0], [-2.0, 0.0, 0.0]]
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert gradient.tolist() == [[-2.0, -2.0, 0.0], [4.0, 0.0, 0.0]]  # -A, no ratio e^8 in it


# Log-ratios 0.2 and 0.4, mean 0.3; e^0.3 = 1.3498588. Their sum would make 1.822, each by itself 1.221 and 1.492.
S = 1.3498588075760032


@pytest.mark.parametrize(
    ("clip", "advantage", "value", "gradient"),
    [
        ({"clip_range": 0.5}, 1.0, -S, -S),  # of both tokens, each s / 2 times two losses
        ({"clip_range": 0.2}, 1.0, -1.2, 0.0),
        ({"clip_range": 0.2, "clip_range_high": 0.3}, 1.0, -1.3, 0.0),
        ({"clip_range": 0.2, "clip_range_high": 0.4}, 1.0, -S, -S),
        ({"clip_range": 0.2}, -1.0, S, S),  # moved against A: still to be corrected
        ({"clip_range": INF}, 2.0, -2 * S, -2 * S),
    ],
)
def test_gspo_by_hand(clip: dict[str, float], advantage: float, value: float, gradient: float) -> None:
    logps, old = doubles([-0.8, -1.6, NAN]).requires_grad_(), doubles([-1.0, -2.0, 5.0])
    mask = torch.tensor([[1, 1, 0]])
    loss = gspo(logps, old, doubles([advantage]), mask, **clip)
    torch.testing.assert_close(loss, doubles([value, value, 0.0]), **EXACT)
    (ours,) = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(ours, doubles([gradient, gradient, 0.0]), **EXACT)


def test_gspo_clips_a_completion_from_below_too() -> None:
    logps, old, ones = doubles([-1.2, -2.4]).requires_grad_(), doubles([-1.0, -2.0]), torch.ones(1, 2)
    loss = gspo(logps, old, doubles([-1.0]), ones, clip_range=0.2)  # e^-0.3 = 0.74
    torch.testing.assert_close(loss, doubles([0.8, 0.8]), **EXACT)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert gradient.tolist() == [[0.0, 0.0]]
    low, high = SURROGATES["gspo"].clipped(logps, old, doubles([-1.0]), ones, clip_range=0.2)
    assert low.tolist() == [[True, True]]  # by itself the first token, at e^-0.2 = 0.82, is within
    assert high.tolist() == [[False, False]]


def test_gspo_of_one_token_is_the_clipped_surrogate() -> None:
    logps, old = random(6, 1, seed=0), random(6, 1, seed=1)
    advantages, ones = random(6, 1, seed=2), torch.ones(6, 1)
    one = gspo(logps, old, advantages, ones, clip_range=0.2)
    torch.testing.assert_close(one, clipped_surrogate(logps, old, advantages, ones, clip_range=0.2), **EXACT)
    two = (random(6, 2, seed=0), random(6, 2, seed=1), advantages, torch.ones(6, 2))
    assert not torch.allclose(gspo(*two, clip_range=0.2), clipped_surrogate(*two, clip_range=0.2), atol=0.01)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [(0.5, 1.0, 0.5), (0.001, 1.0, 0.001), (1.0, -1.0, 1.0), (4.9, 2.0, 4.9), (7.0, 2.0, 5.0), (7.0, -2.0, 5.0)],
)
def test_cispo_weighs_and_never_silences(ratio: float, advantage: float, weight: float) -> None:
    """The cap is 1 + clip_range_high, for both signs; there is none below. The gradient is that of the weight alone."""
    logps = doubles([-3.0]).requires_grad_()
    old = doubles([-3.0]) - doubles([ratio]).log()
    loss = cispo(logps, old, doubles([advantage]), torch.ones(1, 1), clip_range_high=4.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.item() == pytest.approx(3.0 * weight * advantage)
    assert gradient.item() == pytest.approx(-weight * advantage)  # through the weight it would be 1 - 3 times that
    _, high = SURROGATES["cispo"].clipped(logps, old, doubles([advantage]), torch.ones(1, 1), clip_range_high=4.0)
    assert high.item() == (ratio > 5)


CLIPS: dict[str, dict[str, float]] = {
    "clipped": {"clip_range": 0.2, "dual_clip": 3.0}, "reinforce": {}, "gspo": {"clip_range": 0.2},
    "cispo": {"clip_range_high": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("name", SURROGATES)
def test_on_policy_every_surrogate_has_the_gradient_of_reinforce(name: str) -> None:
    logps = random(3, 4, seed=0).requires_grad_()
    advantages = doubles([1.0], [-2.0], [0.5])
    loss = SURROGATES[name].loss(logps, logps.detach(), advantages, MASK, **CLIPS[name])
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(gradient, torch.where(MASK, -advantages, 0.0), **EXACT)
    low, high = SURROGATES[name].clipped(logps, logps.detach(), advantages, MASK, **CLIPS[name])
    assert not (low | high).any()
    assert low.shape == high.shape == (3, 4)
    assert low.dtype == high.dtype == torch.bool


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("filler", [NAN, INF, -INF, 1e30])
def test_no_surrogate_looks_behind_the_mask(name: str, filler: float) -> None:
    """The last row is masked altogether."""
    mask = torch.cat([MASK, torch.zeros(1, 4, dtype=torch.bool)])
    clean = [random(4, 4, seed=seed).where(mask, 0.0) for seed in range(3)]
    spoilt = [tensor.masked_fill(~mask, filler) for tensor in clean]
    results = []
    for logps, old, advantages in (clean, spoilt):
        logps = logps.clone().requires_grad_()
        loss = SURROGATES[name].loss(logps, old, advantages, mask, **CLIPS[name])
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        clips = SURROGATES[name].clipped(logps, old, advantages, mask, **CLIPS[name])
        results.append((loss.detach(), gradient, *clips))
        assert (loss[~mask] == 0).all()
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).any()
        assert not any(clip[~mask].any() for clip in clips)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("name", SURROGATES)
def test_without_advantage_there_is_no_gradient_however_far_the_policy_has_gone(name: str) -> None:
    logps = torch.tensor([[0.0, 200.0, -200.0]], requires_grad=True)
    loss = SURROGATES[name].loss(logps, torch.zeros(1, 3), torch.zeros(1, 1), torch.ones(1, 3), **CLIPS[name])
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.abs().tolist() == gradient.abs().tolist() == [[0.0, 0.0, 0.0]]
    low, high = SURROGATES[name].clipped(logps, torch.zeros(1, 3), torch.zeros(1, 1), torch.ones(1, 3), **CLIPS[name])
    assert not (low | high).any()


@pytest.mark.parametrize("name", SURROGATES)
def test_advantages_of_another_shape_are_refused(name: str) -> None:
    for shape in [(3,), (4,), (4, 1), (3, 3)]:
        with pytest.raises(ValueError, match=r"advantages: got shape .*, expected \(3, 1\) or \(3, 4\)"):
            SURROGATES[name].loss(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(shape), MASK, **CLIPS[name])


@pytest.mark.parametrize("name", SURROGATES)
def test_no_surrogate_changes_its_inputs_or_their_dtype(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        inputs = [random(3, 4, seed=seed, size=0.1).to(dtype) for seed in range(3)]
        before = [tensor.clone() for tensor in inputs]
        loss = SURROGATES[name].loss(*inputs, MASK, **CLIPS[name])
        assert loss.dtype == dtype
        assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


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
