"""Per-token log-probs with less work than `plain_logprobs` (grpo/logprobs.py), and the same numbers up to rounding.

What is the same is computed once:
  - a completion that occurs several times in its group is scored once
  - completions of one prompt may share a row behind a single copy of it (grpo/fast/layout.py), if the model can do that
    (grpo/fast/capabilities.py) and it saves work
  - logits are computed for sampled tokens only, some at a time, so they never exist as a whole (grpo/fast/lm_head.py)

Letters: B completions, L padded prompt length, C padded completion length, V vocabulary, U different pairs of prompt
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
    """Arguments and results of `compute_logprobs`."""
    is_token = completion_mask.bool()  # (B, C)
    prompts = trimmed(torch.where(prompt_mask.bool(), prompt_ids, PADDING), side="left")  # (B, L)
    completions = trimmed(torch.where(is_token, completion_ids, PADDING), side="right")  # (B, C)
    pairs, pair_of = torch.cat([prompts, completions], dim=1), None
    if group_size is not None:  # sorted, so that completions of one prompt follow each other
        pairs, pair_of = pairs.unique(dim=0, return_inverse=True)  # (U, L + C), (B,)
    prompts, completions = pairs.split([prompts.shape[1], completions.shape[1]], dim=1)
    rows = lay_out(prompts, completions, choose_k(model, prompts, completions, group_size, shared_prefix), model)

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


def choose_k(
    model: PreTrainedModel, prompts: Tensor, completions: Tensor, group_size: int | None, shared_prefix: str
) -> int:
    """How many completions of a prompt stand in one row."""
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
