"""Rows of the scoring batch: a row holds one copy of a prompt and several of its completions.

    [prompt | completion 1 | ... | completion k]        a block mask hides completions from each other

Letters: U distinct pairs of prompt and completion, k completions per row, R rows, L padded prompt length, C padded
completion length, T = L + k * C, N tokens to score.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.fast.lm_head import matmul_dtype

PADDING = -1  # used instead of a token id


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, T) 1 = token, 0 = padding -> (B, T) position ids that count tokens only, for padding on either side.

    >>> positions_from_mask(torch.tensor([[0, 0, 1, 1, 1]]))
    tensor([[0, 0, 0, 1, 2]])
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def trimmed(ids: Tensor, side: str) -> Tensor:
    """Remove columns that hold only padding, on the left or on the right. At least one column is kept."""
    used = (ids != PADDING).any(0).nonzero().flatten().tolist() or [0]
    return ids[:, used[0] :] if side == "left" else ids[:, : used[-1] + 1]


class Rows(NamedTuple):
    """R rows of [prompt | completion 1 | ... | completion k], and where to find the outputs for the N tokens."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask, position_ids
    token_at: tuple[Tensor, Tensor]  # (N,) each: pair u and position t of every token to score
    row: Tensor  # (N,) in 0 ... R - 1
    place: Tensor  # (N,) index of the output that predicts the token; 0 = at the prompt's last token


def lay_out(prompts: Tensor, completions: Tensor, k: int, model: PreTrainedModel) -> Rows:
    """(U, L) prompts, (U, C) completions -> rows of up to k completions. If k > 1, equal prompts must be adjacent."""
    (num_pairs, prompt_length), length = prompts.shape, completions.shape[1]  # U, L, C
    counts = torch.ones(num_pairs, dtype=torch.long, device=prompts.device)
    if k > 1:
        prompts, counts = prompts.unique_consecutive(dim=0, return_counts=True)  # (P, L), (P,)
    # Completion u is number n of its prompt: slot n % k of row n // k among the prompt's rows.
    rows_of = (counts + k - 1) // k  # (P,) rows that each prompt needs
    number = torch.arange(num_pairs, device=prompts.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    row = (rows_of.cumsum(0) - rows_of).repeat_interleave(counts) + number // k  # (U,)
    slot = number % k  # (U,)

    prompts = prompts.repeat_interleave(rows_of, dim=0)  # (R, L)
    slots = completions.new_full((len(prompts), k, length), PADDING)
    slots[row, slot] = completions
    ids = torch.cat([prompts, slots.flatten(1)], dim=1)  # (R, T)
    is_token, is_prompt = ids != PADDING, prompts != PADDING
    after_prompt = is_prompt.sum(1, keepdim=True) + torch.arange(length, device=ids.device).repeat(k)  # (R, k * C)
    mask = is_token.long()  # enough if a row has one completion; the kernels for it are faster
    if k > 1:
        mask = block_mask(is_token, prompt_length, k, matmul_dtype(model.dtype, ids.device))
    inputs = {
        "input_ids": ids.clamp(min=0),
        "attention_mask": mask,
        "position_ids": torch.cat([positions_from_mask(is_prompt), after_prompt * is_token[:, prompt_length:]], dim=1),
    }
    u, t = (completions != PADDING).nonzero(as_tuple=True)  # (N,)
    place = torch.where(t == 0, 0, slot[u] * length + t)  # the prompt's last token predicts every first token
    return Rows(inputs, (u, t), row[u], place)


def completions_per_row(
    counts: list[int], prompt_length: int, completion_length: int, hidden_size: int, allowed: range
) -> int:
    """The number k of completions per row that needs the fewest multiplications.

        cost(k) = rows * (12 * H * T + T * T),    T = L + k * C,    rows = sum_p ceil(counts_p / k)

    The unit is H multiplications per layer. The matrices of a layer have about 12 H^2 weights, each used once per
    token. A token attends to T / 2 positions on average, with 2 H multiplications each. A larger k repeats the prompt
    less often, but computes more attention between completions, which the mask then hides.

    `counts`: number of completions of each prompt. `allowed`: the values of k to choose from.

    >>> completions_per_row([8], prompt_length=512, completion_length=32, hidden_size=768, allowed=range(1, 9))
    8
    >>> completions_per_row([8], prompt_length=8, completion_length=512, hidden_size=64, allowed=range(1, 9))
    1
    """

    def cost(k: int) -> int:
        width = prompt_length + k * completion_length
        return sum(-(-count // k) for count in counts) * (12 * hidden_size * width + width * width)

    return min(allowed, key=cost)


def block_mask(is_token: Tensor, prompt_length: int, k: int, dtype: torch.dtype) -> Tensor:
    """(R, T) -> (R, 1, T, T): 0 where a token (row) may attend to a token (column), the lowest float elsewhere.

    A completion token attends to its prompt and to its own completion up to itself, and to no other completion. Padding
    attends to itself, because a softmax over no positions would be NaN.
    """
    num_places = is_token.shape[1]  # T
    place = torch.arange(num_places, device=is_token.device)
    part = (place - prompt_length).div((num_places - prompt_length) // k, rounding_mode="floor").clamp(min=-1)
    is_seen = (place <= place.unsqueeze(1)) & ((part == part.unsqueeze(1)) | (part == -1))  # (T, T)
    is_seen = (is_seen & is_token.unsqueeze(1)) | (place == place.unsqueeze(1))  # (R, T, T)
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=is_token.device)
    return mask.masked_fill_(~is_seen, torch.finfo(dtype).min).unsqueeze(1)
