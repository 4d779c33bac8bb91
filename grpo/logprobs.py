"""Tokens -> per-token log-probabilities and entropies. The only shift-by-one in the project is in this file.

Reading order: ... -> grpo/advantages.py -> [grpo/logprobs.py] -> grpo/loss.py -> ...

Letters: B completions, L padded prompt length, C padded completion length, V vocabulary. Here also: U different pairs
of prompt and completion, k completions in a row of the model's batch, R rows, T = L + k * C, N tokens, H hidden size.

What is the same is computed once. A completion that occurs again is scored once; completions of one prompt may stand in
one row behind a single copy of it. And logits are computed only where a sampled token is to be scored, never all at a
time.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.fast.abilities import _choose_k, find_head
from grpo.fast.layout import PADDING, _lay_out, _trimmed
from grpo.fast.lm_head import log_probs_and_entropies

SHARED_PREFIX = ("auto", "always", "never")


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
        group_size: so many rows share a prompt. Then equal rows are scored once, and up to group_size completions may
            stand behind one copy of their prompt. None: every row is scored by itself.
        shared_prefix: whether they do, with a group_size: always | never, or auto: where it takes fewer
            multiplications (`completions_per_row`). The result is the same up to rounding.
        entropy_grad: whether the entropies carry a gradient, which an entropy bonus needs and all else can do without.

    Returns:
        logps: (B, C) nats, at least float32 (bfloat16 logits are cast first: their log-softmax errs by up to 0.125
            nat), exactly 0 where masked; carries the gradient.
        entropies: (B, C) nats, in [0, log V], exactly 0 where masked; no gradient unless entropy_grad.

    Raises:
        ValueError: temperature <= 0, an unknown shared_prefix.

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
    is_token = completion_mask.bool()  # (B, C)
    prompts = _trimmed(torch.where(prompt_mask.bool(), prompt_ids, PADDING), side="left")  # (B, L)
    completions = _trimmed(torch.where(is_token, completion_ids, PADDING), side="right")  # (B, C)
    pairs, pair_of = torch.cat([prompts, completions], dim=1), None
    if group_size is not None:  # sorted, so that completions of one prompt follow each other
        pairs, pair_of = pairs.unique(dim=0, return_inverse=True)  # (U, L + C), (B,)
    prompts, completions = pairs.split([prompts.shape[1], completions.shape[1]], dim=1)
    rows = _lay_out(prompts, completions, _choose_k(model, prompts, completions, group_size, shared_prefix), model)

    # The shift: position t - 1 predicts token t. So the outputs that matter begin with the prompt's last.
    num_outputs = rows.inputs["input_ids"].shape[1] - prompts.shape[1] + 1  # 1 + k * C
    head = find_head(model)
    if head is not None:
        outputs = model.base_model(**rows.inputs, use_cache=False).last_hidden_state[:, -num_outputs:]
    else:
        outputs = model(**rows.inputs, use_cache=False, logits_to_keep=num_outputs).logits[:, -num_outputs:]
    outputs = outputs.flatten(0, 1).index_select(0, rows.row * num_outputs + rows.place)  # (N, H) or (N, V)
    u, t = rows.token_at
    score = log_probs_and_entropies if head is None else head.log_probs
    logps, entropies = score(outputs, completions[u, t], temperature, entropy_grad=entropy_grad)  # (N,)

    def per_completion(values: Tensor) -> Tensor:
        table = values.new_zeros(len(pairs), completion_ids.shape[1]).index_put((u, t), values)  # (U, C)
        return table if pair_of is None else table[pair_of]  # (B, C)

    return per_completion(logps), per_completion(entropies)


def completion_states(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
) -> Tensor:
    """What the model's trunk makes of the text before each sampled token: the state in which that token was chosen.

    Args: as in `compute_logprobs`.

    Returns:
        (B, C, H) last hidden states, 0 where masked; carries the gradient.
    """
    is_token = completion_mask.bool()
    prompts = torch.where(prompt_mask.bool(), prompt_ids, PADDING)
    completions = torch.where(is_token, completion_ids, PADDING)
    rows = _lay_out(prompts, completions, 1, model)
    outputs = model.base_model(**rows.inputs, use_cache=False).last_hidden_state  # (B, L + C, H)
    before = outputs[:, prompt_ids.shape[1] - 1 : -1]  # (B, C, H) from the prompt's last to the last but one
    return torch.where(is_token.unsqueeze(-1), before, 0.0)


# Rows of the model's batch


# What a model can take
