"""Prompts -> a group of sampled completions each: a KV-cache sampling loop for any Hugging Face causal model.

Reading order: ... -> grpo/data.py -> [grpo/rollout.py] -> reward_model.py -> ...

Letters: P prompts, G = group_size, B = P * G completions (row p * G + g), L padded prompt length, C padded completion
length, V vocabulary.

Differs from `model.generate`: settings come from the arguments alone, never from the model's generation_config; each
prompt is prefilled once and its cache expanded to the group; finished rows leave the batch; and the random number
behind token t of completion i depends on (seed, i, t) only, so neither batching nor the order of finishing changes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.logprobs import positions_from_mask

Rows = slice | Tensor

# Tokens between two looks at which rows have finished. A look waits for the device: free on a CPU, dear on a GPU.
# (Some attention implementations of transformers look at the padding mask themselves, once a forward.)
CHECK_EVERY = {"cpu": 1}


@dataclass(frozen=True)
class Rollout:
    """What was sampled. Masks are bool, 1 = a real token; masked ids are padding and masked log-probs are 0."""

    prompt_ids: Tensor  # (B, L) left-padded
    prompt_mask: Tensor  # (B, L)
    completion_ids: Tensor  # (B, C) right-padded, the stop token included
    completion_mask: Tensor  # (B, C)
    sampling_logps: Tensor  # (B, C) nats, of the distribution sampled from: after temperature, top-k and top-p
    is_truncated: Tensor  # (B,) ran into max_completion_length without a stop token
    completions: list[str]  # B texts without their stop token

    def metrics(self) -> dict[str, float]:
        """Length in tokens, the stop token included, and the share that was cut off."""
        return {
            "completions/mean_length": self.completion_mask.sum(1).float().mean().item(),
            "completions/clipped_ratio": self.is_truncated.float().mean().item(),
        }

    def tokens(self, rows: Rows = slice(None)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four arguments of `compute_logprobs` for these rows."""
        return self.prompt_ids[rows], self.prompt_mask[rows], self.completion_ids[rows], self.completion_mask[rows]

    def token_lists(self) -> list[list[int]]:
        """B lists of the sampled ids, the stop token included, without padding."""
        return [
            ids[kept].tolist() for ids, kept in zip(self.completion_ids.cpu(), self.completion_mask.cpu(), strict=True)
        ]

    def select(self, rows: Tensor) -> Self:
        """The rollout of these rows alone. `rows`: (b,) indices; padding stays as wide as it was."""
        return type(self)(
            *self.tokens(rows),
            self.sampling_logps[rows],
            self.is_truncated[rows],
            [self.completions[row] for row in rows.tolist()],
        )


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    group_size: int,
    max_completion_length: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    completion_indices: Sequence[int] | None = None,
) -> Rollout:
    """Sample `group_size` completions for every prompt.

    Args:
        model: used in eval mode under no_grad; its mode is restored, even after an error.
        prompts: P texts (tokenised here by tokenizer(prompt)) or P lists of token ids (used as they are).
        group_size: G.
        max_completion_length: in tokens, the stop token included.
        temperature: logits are divided by it; 0 = greedy.
        top_p, top_k: sample from the smallest set of likeliest tokens with mass >= top_p, and from the top_k likeliest;
            1.0 and 0 = off. Anything else makes the sampler's distribution differ from the scorer's.
        seed: >= 0; the caller mixes the training step into it (`step_seed`).
        completion_indices: B indices >= 0 that choose the noise of each row; None = 0 ... B - 1.

    Returns:
        a Rollout whose row p * G + g is completion g of prompt p.

    Raises:
        ValueError: no prompts, an empty prompt, or a setting out of range, each named.

    Paper: "DeepSeekMath" (2402.03300) algorithm 1, line 7.
    """
    num_rows = len(prompts) * group_size
    indices = range(num_rows) if completion_indices is None else completion_indices
    _check("prompts", len(prompts), len(prompts) >= 1, "at least one")
    _check("group_size", group_size, group_size >= 1, ">= 1")
    _check("max_completion_length", max_completion_length, max_completion_length >= 1, ">= 1")
    _check("temperature", temperature, temperature >= 0, ">= 0 (0 = greedy)")
    _check("top_p", top_p, 0 < top_p <= 1, "in (0, 1]")
    _check("top_k", top_k, top_k >= 0, ">= 0 (0 = off)")
    _check("seed", seed, 0 <= seed < 2**64, "0 ... 2**64 - 1")
    _check("completion_indices", list(indices), len(indices) == num_rows, f"{num_rows} of them")
    _check("completion_indices", list(indices), all(index >= 0 for index in indices), ">= 0")

    uniforms = sampling_noise(seed, indices, max_completion_length).to(model.device)  # (B, C)
    stop_ids = torch.tensor(sorted(stop_token_ids(model, tokenizer)), dtype=torch.long, device=model.device)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # a filler: masks never look at ids
    prompt_ids, prompt_mask = _left_pad(_tokenize(tokenizer, prompts), pad_id, model.device)  # (P, L)

    was_training = model.training
    model.eval()  # training mode would switch the cache off under gradient checkpointing, and dropout on
    try:
        draw = partial(sample_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
        sampled_ids, sampled_logps = _decode(model, prompt_ids, prompt_mask, stop_ids, uniforms, group_size, draw)
    finally:
        model.train(was_training)

    # A row ends with its first stop token: keep what has no stop token before it.
    is_stop = torch.isin(sampled_ids, stop_ids)  # (B, C)
    mask = is_stop.int().cumsum(1) - is_stop.int() == 0  # (B, C)
    length = int(mask.sum(1).max())
    mask = mask[:, :length]
    completion_ids = torch.where(mask, sampled_ids[:, :length], pad_id)
    ends = mask & ~is_stop[:, :length]  # the text leaves the stop token out, whichever of the stop ids it is
    texts = [ids[kept].tolist() for ids, kept in zip(completion_ids.cpu(), ends.cpu(), strict=True)]
    return Rollout(
        prompt_ids=prompt_ids.repeat_interleave(group_size, dim=0),
        prompt_mask=prompt_mask.repeat_interleave(group_size, dim=0),
        completion_ids=completion_ids,
        completion_mask=mask,
        sampling_logps=torch.where(mask, sampled_logps[:, :length], 0.0),
        is_truncated=~is_stop.any(1),
        completions=tokenizer.batch_decode(texts, skip_special_tokens=True),
    )


def _decode(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    stop_ids: Tensor,
    uniforms: Tensor,
    group_size: int,
    draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The loop: (B, max_completion_length) sampled ids and their log-probs. What follows a stop token is arbitrary."""
    rows, max_length = uniforms.shape
    sampled_ids = torch.zeros(rows, max_length, dtype=torch.long, device=uniforms.device)
    sampled_logps = torch.zeros(rows, max_length, dtype=torch.float32, device=uniforms.device)
    check_every = CHECK_EVERY.get(uniforms.device.type, 16)

    # Prefill: each prompt once. Its last position predicts the first token; the cache is then copied to the group.
    output = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        position_ids=positions_from_mask(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(group_size)
    logits = output.logits[:, -1].repeat_interleave(group_size, dim=0)  # (B, V)
    attention_mask = prompt_mask.long().repeat_interleave(group_size, dim=0)  # (B, L)
    positions = attention_mask.sum(1, keepdim=True)  # (B, 1) of the token about to be sampled
    active = torch.arange(rows, device=uniforms.device)  # rows still writing; b of B
    is_finished = torch.zeros_like(active, dtype=torch.bool)  # (b,)

    for t in range(max_length):
        tokens, logps = draw(logits, uniforms[active, t])  # (b,)
        sampled_ids[active, t] = tokens
        sampled_logps[active, t] = logps
        is_finished = is_finished | torch.isin(tokens, stop_ids)
        if t + 1 == max_length:
            break
        if (t + 1) % check_every == 0:
            going_on = (~is_finished).nonzero().squeeze(1)
            if len(going_on) == 0:
                break
            if len(going_on) < len(active):
                cache.batch_select_indices(going_on)
                active, tokens, positions = active[going_on], tokens[going_on], positions[going_on]
                attention_mask, is_finished = attention_mask[going_on], is_finished[going_on]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(active), 1)], dim=1)
        output = model(
            input_ids=tokens.unsqueeze(1),
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]  # (b, V)
        positions = positions + 1
    return sampled_ids, sampled_logps


def sample_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF, and its log-probability under the distribution it was drawn from.

    Args:
        logits: (b, V).
        uniforms: (b,) in [0, 1].

    Returns:
        tokens (b,), log-probs (b,) in float32 nats. Never a token of probability 0. Greedy (temperature 0): the
        likeliest token, log-prob 0.

    >>> sample_tokens(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([0.6]), temperature=1.0)
    (tensor([2]), tensor([-1.3863]))
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(uniforms)
    logps = torch.log_softmax(logits / temperature, dim=-1)  # (b, V)
    if top_k > 0 or top_p < 1:
        logps = _keep_likeliest(logps, top_p=top_p, top_k=top_k)
    probs = logps.exp()
    cdf = probs.cumsum(-1)
    # The first token whose CDF exceeds u * total. `right` skips tokens of probability 0 when u = 0; the total is the
    # CDF's own end, which rounding leaves a little off 1.
    tokens = torch.searchsorted(cdf, uniforms.unsqueeze(-1) * cdf[:, -1:], right=True).clamp(max=cdf.shape[-1] - 1)
    # u so near 1 that u * total rounds to total runs off the end, to the last token; and a parallel scan may step up
    # where the probability is 0. Where that token is impossible, one draw in some ten million, take the likeliest.
    is_possible = probs.gather(-1, tokens) > 0
    tokens = torch.where(is_possible, tokens, probs.argmax(-1, keepdim=True))
    return tokens.squeeze(-1), logps.gather(-1, tokens).squeeze(-1)


def _keep_likeliest(logps: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """(b, V) log-probs -> log-probs renormalised over the top_k likeliest tokens, then over the nucleus top_p."""
    if 0 < top_k < logps.shape[-1]:
        kept = logps.topk(top_k, dim=-1)
        logps = torch.full_like(logps, -torch.inf).scatter(-1, kept.indices, kept.values)
        logps = torch.log_softmax(logps, dim=-1)
    if top_p < 1:
        descending, order = logps.sort(dim=-1, descending=True, stable=True)
        mass_before = descending.exp().cumsum(-1) - descending.exp()  # a token is kept while the mass before is short
        descending = descending.masked_fill(mass_before >= top_p, -torch.inf)
        logps = torch.empty_like(logps).scatter(-1, order, descending)
        logps = torch.log_softmax(logps, dim=-1)
    return logps


def sampling_noise(seed: int, completion_indices: Sequence[int], length: int) -> Tensor:
    """(B, length) float32 uniforms in [0, 1): row i is the stream of (seed, completion_indices[i]).

    Philox is counter-based: its two keys name a stream, and streams of different keys are independent. A longer
    `length` only continues the rows.
    """
    # As uint64: from plain ints NumPy would make floats of large seeds and lose their low bits.
    keys = [np.array([seed, index], dtype=np.uint64) for index in completion_indices]
    streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
    return torch.from_numpy(np.stack([stream.random(length, dtype=np.float32) for stream in streams]))


def step_seed(seed: int, step: int, round: int = 0) -> int:
    """One 64-bit seed for (seed, step, resampling round); neighbouring steps get unrelated seeds."""
    return int(np.random.SeedSequence([seed, step, round]).generate_state(1, np.uint64)[0])


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's eos and every eos of the model's generation_config: the one set for sampling, masks and text."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return {token_id for token_id in [tokenizer.eos_token_id, *ids] if token_id is not None}


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
    is_text = isinstance(prompts[0], str)
    prompt_ids: list[list[int]] = tokenizer(prompts)["input_ids"] if is_text else [list(ids) for ids in prompts]  # type: ignore[arg-type]
    for number, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"prompts[{number}]: got {prompts[number]!r}, which has no tokens; at least one is needed")
    return prompt_ids


def _check(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ValueError(f"{name}: got {value}, allowed: {allowed}")


def _left_pad(sequences: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists of ids -> (P, L) ids and bool mask. Padding on the left, so that every row ends with its last token."""
    width = max(map(len, sequences))
    ids = [[pad_id] * (width - len(sequence)) + sequence for sequence in sequences]
    mask = [[False] * (width - len(sequence)) + [True] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
