"""Tokens -> per-token log-probabilities and entropies. The only shift-by-one in the project is in this file.

Reading order: ... -> grpo/advantages.py -> [grpo/logprobs.py] -> grpo/loss.py -> ...

Letters: B completions, L padded prompt length, C padded completion length, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, T) 1 = token, 0 = padding -> (B, T) position ids that count tokens only, wherever the padding stands.

    >>> positions_from_mask(torch.tensor([[0, 0, 1, 1, 1]]))
    tensor([[0, 0, 0, 1, 2]])
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def compute_logprobs(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of every sampled token under `model`, and the entropy of the distribution it was drawn from.

        logits_t = model(prompt + completion[:t])        the logits at position t - 1 speak of token t
        logps_t  = log_softmax(logits_t / temperature)[completion_t]
        H_t      = - sum_v p_v log p_v,   p = softmax(logits_t / temperature)

    The temperature is the one of the rollout: the policy that is optimised is the policy that was sampled from.

    Args:
        model: any Hugging Face causal language model; its mode (train or eval) is left alone.
        prompt_ids, prompt_mask: (B, L) left-padded, mask 1 = a prompt token.
        completion_ids, completion_mask: (B, C) right-padded, mask 1 = a sampled token, EOS included.
        temperature: > 0.

    Returns:
        logps: (B, C) nats, at least float32 (bfloat16 logits are cast first: their log-softmax errs by up to 0.125
            nat), exactly 0 where masked; carries the gradient.
        entropies: (B, C) nats, in [0, log V], exactly 0 where masked; no gradient.

    Raises:
        ValueError: temperature <= 0.

    Paper: "DeepSeekMath" (2402.03300) eq. 3, the numerator and denominator of the ratio.

    >>> from types import SimpleNamespace
    >>> uniform = lambda input_ids, **_: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))
    >>> one = torch.ones(1, 2, dtype=torch.long)
    >>> compute_logprobs(uniform, one, one, one, torch.tensor([[1, 0]]))
    (tensor([[-1.3863,  0.0000]]), tensor([[1.3863, 0.0000]]))
    """
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, scoring needs a value > 0")
    length = completion_ids.shape[1]
    input_ids = torch.cat([prompt_ids, completion_ids], dim=1)  # (B, L + C)
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1).long()  # (B, L + C)
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions_from_mask(attention_mask),
        use_cache=False,
        logits_to_keep=length + 1,  # the LM head is the dearest layer of a small model: no logits for the prompt
    )
    # The shift: position t - 1 predicts token t. Keep from the last prompt position on, drop the last completion one.
    logits = output.logits[:, -(length + 1) : -1]  # (B, C, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    all_logps = torch.log_softmax(logits, dim=-1)  # (B, C, V)
    logps = all_logps.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)  # (B, C)
    with torch.no_grad():
        entropies = torch.special.entr(all_logps.exp()).sum(-1)  # (B, C); entr(p) = -p log p, 0 where p is 0
    is_token = completion_mask.bool()
    return torch.where(is_token, logps, 0.0), torch.where(is_token, entropies, 0.0)
