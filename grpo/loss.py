"""Clipped surrogate, token-level KL, and the weights that turn per-token losses into one number.

Reading order: ... -> grpo/logprobs.py -> [grpo/loss.py] -> train_grpo.py again

The loss of an optimizer step is one weighted sum over its tokens,

    loss = sum( weights * (surrogate + kl_coeff * KL) ),

so that gradients of micro-batches just add up. Letters: B completions, C padded completion length.

Masked positions may hold anything, NaN and inf too. Every function masks its inputs *before* an exp or a product:
a weight of 0 cannot repair a NaN, neither in the sum nor in the gradient.
"""

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3", "k3_corrected")
AGGREGATIONS = ("sequence", "token", "constant")


def clipped_surrogate(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate per completion token, to be minimised (not yet weighted or summed).

        ratio = exp(logps - old_logps)
        loss  = -min(ratio * A, clip(ratio, 1 - clip_range, 1 + clip_range_high) * A)

    `min` is right for both signs of A. A > 0: the token is made likelier until ratio > 1 + clip_range_high, then the
    gradient stops. A < 0: it is made less likely until ratio < 1 - clip_range. On the other side of 1 the ratio has
    moved against A, the policy must still be corrected, and `min` keeps the gradient.

    Args:
        logps: (B, C) log pi_theta of the sampled tokens in nats; carries the gradient.
        old_logps: (B, C) the same at rollout time; no gradient.
        advantages: (B, 1) or (B, C). Never (B,): that would broadcast along the wrong axis when B == C.
        completion_mask: (B, C), 1 = a sampled token, EOS included.
        clip_range, clip_range_high: lower and upper clip, usually 0.2; None = same as the lower (DAPO: 0.28).

    Returns:
        (B, C), exactly 0 where masked. Equals -A on the first update, where the ratio is exactly 1.

    Raises:
        ValueError: advantages are neither (B, 1) nor (B, C).

    Paper: "Proximal Policy Optimization Algorithms" (1707.06347) eq. 7; in GRPO, "DeepSeekMath" (2402.03300) eq. 3.

    >>> ones, mask = torch.ones(2, 3), torch.tensor([[1, 1, 0], [1, 1, 0]])
    >>> clipped_surrogate(0.5 * ones, 0 * ones, torch.tensor([[1.0], [-1.0]]), mask, clip_range=0.2)
    tensor([[-1.2000, -1.2000,  0.0000],
            [ 1.6487,  1.6487,  0.0000]])
    """
    is_token = completion_mask.bool()
    advantages = _checked_advantages(advantages, is_token)  # (B, C)
    ratio = _log_ratio(logps, old_logps, is_token).exp()  # (B, C)
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    loss = -torch.min(ratio * advantages, clipped_ratio * advantages)
    return torch.where(is_token, loss, 0.0)  # (B, C)


@torch.no_grad()
def clipped_tokens(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the clip binds, that is where it takes the gradient away: (low, high), both (B, C) bool.

    low: A < 0 and ratio < 1 - clip_range. high: A > 0 and ratio > 1 + clip_range_high. A ratio outside the range on
    its other side is not clipped by `min` and does not count. Arguments as in `clipped_surrogate`.
    """
    is_token = completion_mask.bool()
    advantages = _checked_advantages(advantages, is_token)  # (B, C)
    ratio = _log_ratio(logps, old_logps, is_token).exp()  # (B, C)
    clip_range_high = clip_range if clip_range_high is None else clip_range_high
    return (advantages < 0) & (ratio < 1 - clip_range), (advantages > 0) & (ratio > 1 + clip_range_high)


def _log_ratio(logps: Tensor, old_logps: Tensor, is_token: Tensor) -> Tensor:
    """(B, C) logps - old_logps; 0 where masked, so that padding cannot overflow in the exp.

    Clamped at 80, near the largest exponent of float32: an infinite ratio times an advantage of 0 would be NaN.
    """
    return torch.where(is_token, logps - old_logps, 0.0).clamp(max=80)


def _checked_advantages(advantages: Tensor, is_token: Tensor) -> Tensor:
    """(B, 1) or (B, C) -> (B, C), 0 where masked."""
    rows, length = is_token.shape
    if advantages.shape not in ((rows, 1), (rows, length)):
        raise ValueError(f"advantages: got shape {tuple(advantages.shape)}, expected {(rows, 1)} or {(rows, length)}")
    return torch.where(is_token, advantages, 0.0)


def kl_divergence(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    estimator: str,
    old_logps: Tensor | None = None,
    completion_mask: Tensor | None = None,
) -> Tensor:
    """Token-level estimate of KL(pi_theta || pi_ref) from the sampled token alone, to be minimised.

    With D = ref_logps - logps and r = exp(logps - old_logps):

        k1            -D                    unbiased value; as a loss its expected gradient is 0: it does nothing
        k2            D^2 / 2               biased value; gradient of KL(pi || ref)
        k3            exp(D) - D - 1        unbiased, >= 0; but its gradient is that of KL(ref || pi)
        k3_corrected  r * (exp(D) - D - 1)  the value of k3 with the gradient of KL(pi || ref), exact off-policy too

    Worked by hand: d(r k3) = r k3 dlogp + r (1 - exp(D)) dlogp = -r D dlogp, which is d(stopgrad(r) * D^2 / 2). The
    code takes the value from the first form and the gradient from the last, where nothing can overflow.

    Args:
        logps: (B, C) log pi_theta of the sampled tokens in nats; carries the gradient.
        ref_logps: (B, C) the same under the frozen reference; no gradient.
        estimator: k1 | k2 | k3 | k3_corrected.
        old_logps: (B, C) at rollout time; None = on-policy, r is 1. Only k3_corrected uses it.
        completion_mask: (B, C), 1 = a sampled token; None = every position is one.

    Returns:
        (B, C) nats, exactly 0 and without gradient where masked. Values clamp D at 20 from above.

    Raises:
        ValueError: an unknown estimator.

    Paper: "DeepSeekMath" (2402.03300) eq. 4 (k3); Schulman, "Approximating KL divergence" (2020) names k1, k2, k3;
    "DeepSeek-V3.2" (2512.02556) for the correction by r.
    Differs from the paper: the default corrects k3's gradient; k3 clamps D, so that a token the policy has all but
    dropped costs a large number instead of inf.

    >>> kl_divergence(torch.tensor([[-1.0, -2.0, -3.0]] * 2), torch.full((2, 3), -2.0), estimator="k3")
    tensor([[0.3679, 0.0000, 0.7183],
            [0.3679, 0.0000, 0.7183]])
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"estimator: got {estimator!r}, allowed: {', '.join(KL_ESTIMATORS)}")
    is_token = torch.ones_like(logps, dtype=torch.bool) if completion_mask is None else completion_mask.bool()
    difference = torch.where(is_token, ref_logps - logps, 0.0)  # D, (B, C)
    if estimator == "k1":
        return -difference
    k2 = difference.square() / 2
    if estimator == "k2":
        return k2
    # D itself is clamped, in both terms: clamping only the exp would leave a gradient of the wrong sign.
    clamped = difference.clamp(max=20)
    k3 = clamped.exp() - clamped - 1
    if estimator == "k3":
        return k3
    ratio = 1.0 if old_logps is None else _log_ratio(logps, old_logps, is_token).exp().detach()
    gradient = ratio * k2
    return (ratio * k3).detach() + (gradient - gradient.detach())


def loss_weights(
    completion_mask: Tensor,
    aggregation: str,
    *,
    max_completion_length: int,
    num_rows: int | None = None,
    num_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of every token in the loss of one optimizer step: loss = (per_token_loss * weights).sum().

        sequence  1 / (N * T_i)                      mean over completions of their token means; GRPO paper
        token     1 / (T_1 + ... + T_N)              mean over all tokens; DAPO, TRL's default
        constant  1 / (N * max_completion_length)    no length in the denominator; Dr. GRPO

    with T_i = unmasked tokens of completion i and N = completions of the optimizer step, fully masked ones included.
    Call it once with the mask of the WHOLE optimizer step: a mean per micro-batch weighs tokens by the company they
    happen to keep.

    Args:
        completion_mask: (B, C), 1 = a token that is trained on.
        aggregation: sequence | token | constant.
        max_completion_length: the setting, in tokens; not the padded C of this batch.
        num_rows, num_tokens: totals of the optimizer step where the mask is only a part of it; None = the mask's own.
        dtype: of the result.

    Returns:
        (B, C), 0 where masked; sums to 1 under `token` and, with no row fully masked, under `sequence`.

    Raises:
        ValueError: an unknown aggregation.

    Paper: "DeepSeekMath" (2402.03300) eq. 3; "DAPO" (2503.14476) eq. 8; "Understanding R1-Zero-Like Training"
    (2503.20783) section 3.1.

    >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> loss_weights(mask, "sequence", max_completion_length=4)
    tensor([[0.1667, 0.1667, 0.1667],
            [0.5000, 0.0000, 0.0000]])
    >>> loss_weights(mask, "token", max_completion_length=4)
    tensor([[0.2500, 0.2500, 0.2500],
            [0.2500, 0.0000, 0.0000]])
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: got {aggregation!r}, allowed: {', '.join(AGGREGATIONS)}")
    mask = completion_mask.to(dtype)
    rows = mask.shape[0] if num_rows is None else num_rows
    if aggregation == "sequence":
        return mask / (rows * mask.sum(1, keepdim=True).clamp(min=1))
    if aggregation == "token":
        # Clamped at 1: when every completion is masked the loss is 0, not 0 / 0.
        tokens = completion_mask.sum().clamp(min=1) if num_tokens is None else max(num_tokens, 1)
        return mask / tokens
    return mask / (rows * max_completion_length)
