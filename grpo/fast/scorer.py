"""Per-token log-probs with less work than `plain_logprobs` (grpo/logprobs.py). Results are equal up to rounding.

How work and memory are saved:
  - A completion that occurs several times in its group is scored once.
  - Completions of one prompt may share a row with one copy of the prompt (grpo/fast/layout.py). This is done if the
    model supports it (grpo/fast/capabilities.py) and it saves work.
  - Logits are computed only for sampled tokens, in chunks of tokens (grpo/fast/lm_head.py).

Letters: B completions, L padded prompt length, C padded completion length, V vocabulary, U distinct pairs of prompt
and completion, k completions per row, N tokens to score, H hidden size.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.fast.capabilities import can_share_prefix, find_head
from grpo.fast.layout import PADDING, completions_per_row, lay_out, trimmed
from grpo.fast.lm_head import log_probs_and_entropies


def score_completions_fast(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float,
    group_size: int | None,
    shared_prefix: str,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The fast implementation of `compute_logprobs`, with the same arguments and results."""
    is_token = completion_mask.bool()  # (B, C)
    prompts = trimmed(torch.where(prompt_mask.bool(), prompt_ids, PADDING), side="left")  # (B, L)
    completions = trimmed(torch.where(is_token, completion_ids, PADDING), side="right")  # (B, C)
    pairs, pair_of = torch.cat([prompts, completions], dim=1), None
    if group_size is not None:  # sorted, so that completions of one prompt are adjacent
        pairs, pair_of = pairs.unique(dim=0, return_inverse=True)  # (U, L + C), (B,)
    prompts, completions = pairs.split([prompts.shape[1], completions.shape[1]], dim=1)
    rows = lay_out(prompts, completions, choose_k(model, prompts, completions, group_size, shared_prefix), model)

    # Position t - 1 predicts token t, so the needed outputs begin at the prompt's last token.
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


def choose_k(
    model: PreTrainedModel, prompts: Tensor, completions: Tensor, group_size: int | None, shared_prefix: str
) -> int:
    """The number of completions per row."""
    if group_size is None or shared_prefix == "never":
        return 1
    _, counts = prompts.unique_consecutive(dim=0, return_counts=True)  # (P,) completions of each prompt
    most = min(group_size, int(counts.max()))
    if most == 1 or not can_share_prefix(model, prompts.shape[1] + completions.shape[1]):
        return 1
    return completions_per_row(
        counts.tolist(),
        prompts.shape[1],
        completions.shape[1],
        model.config.get_text_config().hidden_size,
        range(2 if shared_prefix == "always" else 1, most + 1),
    )
