"""Surrogate losses, the token-level KL penalty, and the weights that sum per-token losses into one number.

Reading order: ... -> grpo/advantages.py -> [grpo/loss.py] -> train_grpo.py again

The loss of an optimizer step is one weighted sum over its tokens,

    loss = sum( weights * (surrogate + kl_coeff * KL - entropy_coeff * entropy) ),

so the gradients of micro-batches can simply be summed. Letters: B completions, C padded completion length. In formulas:

    r = exp(logps - old_logps)    the ratio: probability of a token now, divided by its probability at rollout time
    A                             the advantage: how much better the completion is than expected

Masked positions may hold any value, including NaN and inf. Every function masks its inputs *before* an exp or a
product, because multiplying a NaN by a weight of 0 gives NaN, in the sum and in the gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

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
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate per completion token, to be minimised (not yet weighted or summed).

        loss = -min(r * A, clip(r, 1 - clip_range, 1 + clip_range_high) * A)

    `min` is correct for both signs of A:
      - A > 0: the token becomes more likely until r > 1 + clip_range_high. Then the gradient is 0.
      - A < 0: the token becomes less likely until r < 1 - clip_range. Then the gradient is 0.
      - If the ratio has moved in the direction opposite to A, `min` keeps the gradient, so the policy is corrected.

    For A < 0 and a large ratio the loss is unbounded: a ratio of 50 weighs as much as fifty tokens with a ratio of 1.
    dual_clip bounds the loss:

        A < 0:  loss = min(the loss above, dual_clip * |A|).

    Args:
        logps: (B, C) log pi_theta of the sampled tokens in nats; carries the gradient.
        old_logps: (B, C) the same log-probs at rollout time; no gradient.
        advantages: (B, 1) or (B, C). Never (B,): that would broadcast along the wrong axis when B == C.
        completion_mask: (B, C), 1 = a sampled token, EOS included.
        clip_range: lower clip, usually 0.2; inf = off.
        clip_range_high: upper clip; None = the same as clip_range. DAPO uses 0.28.
        dual_clip: > 1, usually 3; None = no bound.

    Returns:
        (B, C), exactly 0 where masked. Equals -A on the first update, where the ratio is exactly 1.

    Raises:
        ValueError: advantages are neither (B, 1) nor (B, C).

    Paper: "Proximal Policy Optimization Algorithms" (1707.06347) eq. 7; in GRPO, "DeepSeekMath" (2402.03300) eq. 3;
    "Mastering Complex Control in MOBA Games" (1912.09729) eq. 4 for dual_clip.

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
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.min(loss, -dual_clip * advantages), loss)
    return torch.where(is_token, loss, 0.0)  # (B, C)


def reinforce(logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_mask: Tensor) -> Tensor:
    """The REINFORCE policy gradient per token, to be minimised: loss = -A * log pi_theta.

    old_logps are ignored, so this loss is correct only for the first update after a rollout. There its gradient equals
    the gradient of the clipped surrogate. The value of the loss has no meaning; only its gradient does. Arguments and
    result are those of `clipped_surrogate`.

    Paper: Williams, "Simple Statistical Gradient-Following Algorithms" (1992); "Back to Basics" (2402.14740) eq. 6.

    >>> reinforce(torch.tensor([[-1.0, -2.0]]), torch.zeros(1, 2), torch.tensor([[0.5]]), torch.tensor([[1, 1]]))
    tensor([[0.5000, 1.0000]])
    """
    is_token = completion_mask.bool()
    return -_checked_advantages(advantages, is_token) * torch.where(is_token, logps, 0.0)  # (B, C)


def gspo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Tensor:
    """Group sequence policy optimization: the clipped surrogate with one ratio for the whole completion.

        s = exp( mean over its tokens of (logps - old_logps) ),   loss = -min(s * A, clip(s, ...) * A) at every token

    A reward belongs to a whole completion, so GSPO clips whole completions. Because of the mean, s does not grow with
    the length. The mean also makes s vary little, so clip ranges are small, around 3e-4. Arguments and result are those
    of `clipped_surrogate`. With loss_aggregation sequence, this is the paper's objective.

    Paper: "Group Sequence Policy Optimization" (2507.18071) eq. 5, 7.

    >>> logps, zeros, mask = torch.tensor([[0.2, 0.0, 9.0]]), torch.zeros(1, 3), torch.tensor([[1, 1, 0]])
    >>> gspo(logps, zeros, torch.tensor([[1.0]]), mask, clip_range=0.5)
    tensor([[-1.1052, -1.1052,  0.0000]])
    """
    log_ratio = _sequence_log_ratio(logps, old_logps, completion_mask.bool())  # (B, C)
    return clipped_surrogate(
        log_ratio,
        torch.zeros_like(log_ratio),
        advantages,
        completion_mask,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
    )


def cispo(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_mask: Tensor, *, clip_range_high: float
) -> Tensor:
    """Clipped importance sampling: REINFORCE with a clipped weight instead of a clipped gradient.

        loss = -stopgrad( min(r, 1 + clip_range_high) ) * A * log pi_theta

    PPO's clip removes the gradient of a token whose ratio has moved far. This happens soon to rare tokens such as
    "wait". CISPO keeps training such tokens, with a bounded weight. Arguments and result are those of
    `clipped_surrogate`.

    Paper: "MiniMax-M1" (2506.13585) eq. 4.
    Differs from TRL: its epsilon_high is 1 + our clip_range_high.

    >>> logps, mask = torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 1]])
    >>> cispo(logps, torch.tensor([[0.0, -1.0]]), torch.tensor([[1.0]]), mask, clip_range_high=4.0)
    tensor([[-10.,   1.]])
    """
    weight = _log_ratio(logps, old_logps, completion_mask.bool()).exp().clamp(max=1 + clip_range_high)  # (B, C)
    return weight.detach() * reinforce(logps, old_logps, advantages, completion_mask)


@torch.no_grad()
def clipped_tokens(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens whose gradient is removed by the clip: (low, high), both (B, C) bool.

        low   A < 0 and (r < 1 - clip_range or r > dual_clip)
        high  A > 0 and r > 1 + clip_range_high

    `min` does not clip a ratio outside the range on the other side, so such a token is not counted. Arguments are those
    of `clipped_surrogate`.
    """
    is_token = completion_mask.bool()
    advantages = _checked_advantages(advantages, is_token)  # (B, C)
    ratio = _log_ratio(logps, old_logps, is_token).exp()  # (B, C)
    clip_range_high = clip_range if clip_range_high is None else clip_range_high
    too_low = (ratio < 1 - clip_range) | (ratio > (torch.inf if dual_clip is None else dual_clip))
    return (advantages < 0) & too_low, (advantages > 0) & (ratio > 1 + clip_range_high)


@torch.no_grad()
def _never_clipped(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor]:
    nowhere = torch.zeros_like(completion_mask, dtype=torch.bool)
    return nowhere, nowhere


@torch.no_grad()
def _clipped_sequences(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_mask: Tensor, **clip: float
) -> tuple[Tensor, Tensor]:
    log_ratio = _sequence_log_ratio(logps, old_logps, completion_mask.bool())
    return clipped_tokens(log_ratio, torch.zeros_like(log_ratio), advantages, completion_mask, **clip)


@torch.no_grad()
def _capped_tokens(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_mask: Tensor, *, clip_range_high: float
) -> tuple[Tensor, Tensor]:
    """The tokens whose weight is capped. Their gradient is scaled down, not removed."""
    is_token = completion_mask.bool()
    is_capped = _log_ratio(logps, old_logps, is_token).exp() > 1 + clip_range_high
    return torch.zeros_like(is_capped), is_capped & (_checked_advantages(advantages, is_token) != 0)


class Surrogate(NamedTuple):
    """A surrogate loss. Both functions take (logps, old_logps, advantages, completion_mask, *, clip settings)."""

    loss: Callable[..., Tensor]  # -> (B, C), to be minimised; exactly 0 and no gradient where masked
    clipped: Callable[..., tuple[Tensor, Tensor]]  # -> (low, high), (B, C) bool each: the clipped tokens


# To add a surrogate, add its two functions here, its clip settings to CLIP_KEYS (grpo/algorithms.py) and its name to
# `Config.surrogate` (grpo/settings/config.py). To add a baseline, add its name to BASELINES (grpo/advantages.py) and to
# `Config`. To add a KL estimator, add its name to KL_ESTIMATORS and to `Config`.
SURROGATES = {
    "clipped": Surrogate(clipped_surrogate, clipped_tokens),
    "reinforce": Surrogate(reinforce, _never_clipped),
    "gspo": Surrogate(gspo, _clipped_sequences),
    "cispo": Surrogate(cispo, _capped_tokens),
}


def _log_ratio(logps: Tensor, old_logps: Tensor, is_token: Tensor) -> Tensor:
    """(B, C) logps - old_logps; 0 where masked, so that padding cannot overflow in exp.

    The result is clamped at 80, because exp of more than 88 is inf in float32, and inf times an advantage of 0 is NaN.
    """
    return torch.where(is_token, logps - old_logps, 0.0).clamp(max=80)


def _sequence_log_ratio(logps: Tensor, old_logps: Tensor, is_token: Tensor) -> Tensor:
    """(B, C) the mean log-ratio of each completion, repeated for all of its tokens."""
    log_ratio = torch.where(is_token, logps - old_logps, 0.0)
    return (log_ratio.sum(1, keepdim=True) / is_token.sum(1, keepdim=True).clamp(min=1)).expand_as(log_ratio)


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
    """Token-level estimate of KL(pi_theta || pi_ref) from the sampled token only, to be minimised.

    With D = ref_logps - logps and r = exp(logps - old_logps):

        k1            -D                    unbiased value; as a loss it has no effect: its expected gradient is 0
        k2            D^2 / 2               biased value; gradient of KL(pi || ref)
        k3            exp(D) - D - 1        unbiased, >= 0; but its gradient is that of KL(ref || pi)
        k3_corrected  r * (exp(D) - D - 1)  the value of k3 with the gradient of KL(pi || ref), off-policy too

    Derivation: d(r k3) = r k3 dlogp + r (1 - exp(D)) dlogp = -r D dlogp, which equals d(stopgrad(r) * D^2 / 2). The
    code takes the value from the first form and the gradient from the last form, which does not overflow in practice.

    Args:
        logps: (B, C) log pi_theta of the sampled tokens in nats; carries the gradient.
        ref_logps: (B, C) the log-probs of the same tokens under the frozen reference; no gradient.
        estimator: k1 | k2 | k3 | k3_corrected.
        old_logps: (B, C) log-probs at rollout time; None = on-policy, r is 1. Only k3_corrected uses them.
        completion_mask: (B, C), 1 = a sampled token; None = no position is masked.

    Returns:
        (B, C) nats, exactly 0 and without gradient where masked. In k3 and k3_corrected, D is at most 20.

    Raises:
        ValueError: the estimator is unknown.

    Paper: "DeepSeekMath" (2402.03300) eq. 4 (k3); Schulman, "Approximating KL divergence" (2020) names k1, k2, k3;
    "DeepSeek-V3.2" (2512.02556) for the correction by r.
    Differs from the paper: the default is k3_corrected, which corrects the gradient of k3. k3 clamps D, so a token that
    has become very unlikely under the policy has a large KL instead of inf.

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
    # D is clamped in both terms. Clamping only the D inside exp would leave a gradient with the wrong sign.
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

    T_i = unmasked tokens of completion i; N = completions of the optimizer step, including fully masked completions.
    Call this function once with the mask of the WHOLE optimizer step. A mean per micro-batch would make the weight of a
    token depend on the other tokens of its micro-batch.

    Args:
        completion_mask: (B, C), 1 = a token that is trained on.
        aggregation: sequence | token | constant.
        max_completion_length: the setting max_completion_length, in tokens; not the padded length C of this batch.
        num_rows, num_tokens: totals of the optimizer step, needed if the mask is only a part of it; None = counted from
            the mask.
        dtype: dtype of the result.

    Returns:
        (B, C), 0 where masked. Sums to 1 under `token`. Sums to 1 under `sequence` if no row is fully masked.

    Raises:
        ValueError: the aggregation is unknown.

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
        # Clamped at 1, so that the loss is 0, not 0 / 0, if every completion is masked.
        tokens = completion_mask.sum().clamp(min=1) if num_tokens is None else max(num_tokens, 1)
        return mask / tokens
    return mask / (rows * max_completion_length)
