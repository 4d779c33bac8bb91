"""Tokens -> per-token log-probs and entropies. `plain_logprobs` shows the idea: forward, shift, log-softmax, gather.

Reading order: ... -> grpo/batch.py -> [grpo/logprobs.py] -> grpo/advantages.py -> ...

    [ pad pad p1 p2 p3 | c1 c2 c3 eos pad ]      a row: the left-padded prompt, then the right-padded completion
               -> c1 -> c2 -> c3 -> eos          the logits at position t - 1 predict token t

Letters: B completions, L padded prompt length, C padded completion length, V vocabulary, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.fast.layout import positions_from_mask
from grpo.fast.scorer import score_completions_fast

SHARED_PREFIX = ("auto", "always", "never")


def plain_logprobs(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The plain version of `compute_logprobs`: forward, shift, log-softmax, gather.

    This function is for reading. Training does not call it, and a test checks that `compute_logprobs` gives the same
    result. It holds all (B, C, V) logits in memory and processes each prompt G times. Arguments and results are those
    of `compute_logprobs`, except that the entropies always carry a gradient.
    """
    logits = model(**_rows(prompt_ids, prompt_mask, completion_ids, completion_mask)).logits  # (B, L + C, V)
    logits = logits[:, prompt_ids.shape[1] - 1 : -1]  # (B, C, V): the logits at position t - 1 predict token t
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    all_logps = torch.log_softmax(logits, dim=-1)  # (B, C, V)
    logps = all_logps.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)  # (B, C)
    entropies = -(all_logps.exp() * all_logps).sum(-1)  # (B, C)
    is_token = completion_mask.bool()
    return torch.where(is_token, logps, 0.0), torch.where(is_token, entropies, 0.0)


def compute_logprobs(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    group_size: int | None = None,
    shared_prefix: str = "auto",
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of every sampled token under `model`, and the entropy of the distribution at its position.

        logits_t = model(prompt + completion[:t])[-1]    the logits at the last token before t predict token t
        logps_t  = log_softmax(logits_t / temperature)[completion_t]
        H_t      = - sum_v p_v log p_v,   p = softmax(logits_t / temperature)

    Pass the temperature of the rollout, so that the optimized distribution is the one that was sampled from.

    The result equals that of `plain_logprobs` up to rounding. grpo/fast/scorer.py explains how work is saved.

    Args:
        model: any Hugging Face causal language model; its mode (train or eval) is not changed.
        prompt_ids, prompt_mask: (B, L) left-padded, mask 1 = a prompt token.
        completion_ids, completion_mask: (B, C) right-padded, mask 1 = a sampled token, EOS included.
        temperature: > 0.
        group_size: number of rows with the same prompt. With this number, equal rows are scored once, and up to
            group_size completions may share one copy of their prompt. None: every row is scored separately.
        shared_prefix: whether completions of one prompt share a copy of it: always | never | auto. auto shares if this
            needs fewer multiplications (`completions_per_row`). The result is the same up to rounding.
        entropy_grad: whether the entropies carry a gradient; only an entropy bonus needs it.

    Returns:
        logps: (B, C) nats, exactly 0 where masked; carries the gradient. The dtype is at least float32: bfloat16 logits
            are cast before the log-softmax, which in bfloat16 has errors of up to 0.125 nats.
        entropies: (B, C) nats, in [0, log V], exactly 0 where masked; no gradient unless entropy_grad.

    Raises:
        ValueError: temperature <= 0, or an unknown shared_prefix.

    Paper: "DeepSeekMath" (2402.03300) eq. 3, the numerator and denominator of the ratio.

    >>> from types import SimpleNamespace
    >>> uniform = lambda input_ids, **_: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))
    >>> one = torch.ones(1, 2, dtype=torch.long)
    >>> compute_logprobs(uniform, one, one, one, torch.tensor([[1, 0]]))
    (tensor([[-1.3863,  0.0000]]), tensor([[1.3863, 0.0000]]))
    """
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, scoring needs a value > 0")
    if shared_prefix not in SHARED_PREFIX:
        raise ValueError(f"shared_prefix: got {shared_prefix!r}, allowed: {', '.join(SHARED_PREFIX)}")
    return score_completions_fast(
        model,
        prompt_ids,
        prompt_mask,
        completion_ids,
        completion_mask,
        temperature=temperature,
        group_size=group_size,
        shared_prefix=shared_prefix,
        entropy_grad=entropy_grad,
    )


def completion_states(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
) -> Tensor:
    """The hidden state that predicts each completion token: the trunk's output at the last token before it.

    Args: as in `compute_logprobs`.

    Returns:
        (B, C, H) last hidden states, 0 where masked; carries the gradient.
    """
    inputs = _rows(prompt_ids, prompt_mask, completion_ids, completion_mask)
    states = model.base_model(**inputs).last_hidden_state  # (B, L + C, H)
    states = states[:, prompt_ids.shape[1] - 1 : -1]  # (B, C, H): the state at position t - 1 predicts token t
    return torch.where(completion_mask.bool().unsqueeze(-1), states, 0.0)


def _rows(prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor) -> dict[str, Any]:
    """The model's inputs, one row per completion: [prompt | completion]. The ids at padding are ignored."""
    attention_mask = torch.cat([prompt_mask.bool(), completion_mask.bool()], dim=1)  # (B, L + C)
    return {
        "input_ids": torch.cat([prompt_ids, completion_ids], dim=1).masked_fill(~attention_mask, 0),
        "attention_mask": attention_mask.long(),
        "position_ids": positions_from_mask(attention_mask),
        "use_cache": False,
    }
