"""Sample a group of completions for every prompt: a KV-cache sampling loop for any Hugging Face causal model.

Reading order: ... -> grpo/data.py -> [grpo/rollout.py] -> reward_model.py -> ...

Letters: P prompts, G = group_size, B = P * G completions (row p * G + g), L padded prompt length, C padded completion
length, V vocabulary.

On a first reading, read `sample_tokens` and the docstrings, and skip `_decode`, the loop with the cache.

Differs from `model.generate`:
  - Settings come only from the arguments. The model's generation_config is used for its EOS ids and nothing else.
  - The model processes each prompt once. Completions that are still identical share a row of the batch, and finished
    completions leave the batch.
  - The random number for token t of completion i depends only on (seed, i, t), so sharing rows changes no sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.fast.cache import with_room
from grpo.fast.layout import positions_from_mask
from grpo.fast.noise import sampling_noise

Rows = slice | Tensor


@dataclass(frozen=True)
class Rollout:
    """The sampled completions. Masks are bool, 1 = a real token. Masked ids are padding; masked log-probs are 0."""

    prompt_ids: Tensor  # (B, L) left-padded
    prompt_mask: Tensor  # (B, L)
    completion_ids: Tensor  # (B, C) right-padded, stop token included
    completion_mask: Tensor  # (B, C)
    sampling_logps: Tensor  # (B, C) nats, under the sampling distribution (after temperature, top-k and top-p)
    is_truncated: Tensor  # (B,) bool: reached max_completion_length without a stop token or stop string
    completions: list[str]  # B texts, without the stop token but with the stop string

    def metrics(self) -> dict[str, float]:
        """Mean length in tokens (stop token included) and the fraction of truncated completions."""
        return {
            "completions/mean_length": self.completion_mask.sum(1).float().mean().item(),
            "completions/clipped_ratio": self.is_truncated.float().mean().item(),
        }

    def tokens(self, rows: Rows = slice(None)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four arguments of `compute_logprobs` for these rows."""
        return self.prompt_ids[rows], self.prompt_mask[rows], self.completion_ids[rows], self.completion_mask[rows]

    def token_lists(self) -> list[list[int]]:
        """B lists of sampled ids, with the stop token and without padding."""
        return _unpadded(self.completion_ids, self.completion_mask)

    @property
    def num_tokens(self) -> int:
        """Number of prompt and completion tokens. A prompt is counted once per completion."""
        return int(self.prompt_mask.sum() + self.completion_mask.sum())

    def select(self, rows: Tensor) -> Self:
        """A rollout of only these rows. `rows`: (b,) indices. The padded widths L and C do not change."""
        return type(self)(
            *self.tokens(rows),
            self.sampling_logps[rows],
            self.is_truncated[rows],
            [self.completions[row] for row in rows.tolist()],
        )

    @classmethod
    def cat(cls, rollouts: Sequence[Self]) -> Self:
        """Concatenate the rows of several rollouts, padded to the longest prompt and the longest completion."""

        def joined(name: str, side: str) -> Tensor:
            parts = [getattr(rollout, name) for rollout in rollouts]
            width = max(part.shape[1] for part in parts)
            missing = [width - part.shape[1] for part in parts]
            padding = [(n, 0) if side == "left" else (0, n) for n in missing]
            return torch.cat([functional.pad(*pair) for pair in zip(parts, padding, strict=True)])

        return cls(
            prompt_ids=joined("prompt_ids", "left"),
            prompt_mask=joined("prompt_mask", "left"),
            completion_ids=joined("completion_ids", "right"),
            completion_mask=joined("completion_mask", "right"),
            sampling_logps=joined("sampling_logps", "right"),
            is_truncated=torch.cat([rollout.is_truncated for rollout in rollouts]),
            completions=[text for rollout in rollouts for text in rollout.completions],
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
    stop_strings: Sequence[str] = (),
) -> Rollout:
    """Sample `group_size` completions for every prompt.

    Args:
        model: used in eval mode under no_grad; its previous mode is restored afterwards, even after an error.
        prompts: P texts (tokenised here by tokenizer(prompt)) or P lists of token ids (used unchanged).
        group_size: G.
        max_completion_length: in tokens, stop token included.
        temperature: logits are divided by this value; 0 = greedy.
        top_p, top_k: sample only from the smallest set of most likely tokens with total probability >= top_p, and only
            from the top_k most likely tokens. 1.0 and 0 turn them off. With other values the sampler's distribution
            differs from the scorer's.
        seed: >= 0. The caller derives it from the run's seed and the training step (`step_seed`).
        completion_indices: B indices >= 0 that select the noise of each row; None = 0 ... B - 1.
        stop_strings: texts that also end a completion. The token that completes a stop string is kept.

    Returns:
        A Rollout. Row p * G + g is completion g of prompt p.

    Raises:
        ValueError: there are no prompts, a prompt is empty, or an argument is out of range.

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
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # any id: masks never use ids
    prompt_ids, prompt_mask = _left_pad(_tokenize(tokenizer, prompts), pad_id, model.device)  # (P, L)

    was_training = model.training
    model.eval()  # training mode would enable dropout and, with gradient checkpointing, disable the cache
    try:
        draw = partial(sample_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
        ends = partial(_ends, tokenizer, stop_ids, stop_strings)
        sampled_ids, sampled_logps, is_end = _decode(model, prompt_ids, prompt_mask, uniforms, group_size, draw, ends)
    finally:
        model.train(was_training)

    mask = is_end.int().cumsum(1) - is_end.int() == 0  # (B, C) True up to and including the last token
    length = int(mask.sum(1).max())
    mask = mask[:, :length]
    completion_ids = torch.where(mask, sampled_ids[:, :length], pad_id)
    is_text = mask & ~torch.isin(completion_ids, stop_ids)  # texts do not contain the stop token
    return Rollout(
        prompt_ids=prompt_ids.repeat_interleave(group_size, dim=0),
        prompt_mask=prompt_mask.repeat_interleave(group_size, dim=0),
        completion_ids=completion_ids,
        completion_mask=mask,
        sampling_logps=torch.where(mask, sampled_logps[:, :length], 0.0),
        is_truncated=~is_end.any(1),
        completions=_decode_texts(tokenizer, _unpadded(completion_ids, is_text)),
    )


def _decode(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    group_size: int,
    draw: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ends: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The sampling loop.

    Completions that are identical so far share a row of the model's batch. At first all completions of a group share
    one row; later fewer do. Letters: n rows of the model's batch, w unfinished completions.

    Returns:
        sampled ids, their log-probs, and a bool that marks the last token of a completion; (B, max_completion_length)
        each. The caller must ignore all values after the last token.
    """
    num_completions, max_length = uniforms.shape
    device, prompt_length = uniforms.device, prompt_ids.shape[1]  # L
    sampled_ids = torch.zeros(num_completions, max_length, dtype=torch.long, device=device)
    sampled_logps = torch.zeros(num_completions, max_length, dtype=torch.float32, device=device)
    is_end = torch.zeros(num_completions, max_length, dtype=torch.bool, device=device)

    # Prefill: process each prompt once. Its last position predicts the first completion token.
    output = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        position_ids=positions_from_mask(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = with_room(getattr(output, "past_key_values", None))
    logits = output.logits[:, -1]  # (n, V)
    attention_mask = functional.pad(prompt_mask.long(), (0, max_length), value=1)  # (n, L + max_length)
    positions = prompt_mask.sum(1, keepdim=True)  # (n, 1) position of the token to be sampled next
    writing = torch.arange(num_completions, device=device)  # (w,) indices of the unfinished completions
    rows = torch.arange(len(prompt_ids), device=device).repeat_interleave(group_size)  # (w,) the row of each completion

    for t in range(max_length):
        tokens, logps = draw(logits, uniforms[writing, t], rows)  # (w,)
        sampled_ids[writing, t] = tokens
        sampled_logps[writing, t] = logps
        has_ended = ends(sampled_ids[:, : t + 1], writing)  # (w,)
        is_end[writing, t] = has_ended
        going_on = (~has_ended).nonzero().squeeze(1)
        if t + 1 == max_length or len(going_on) == 0:
            break
        writing, rows, tokens = writing[going_on], rows[going_on], tokens[going_on]

        # Completions that share a row and drew the same token keep sharing it. The others get their own copy of the
        # cache.
        num_rows, vocab_size = logits.shape
        drawn, rows = (rows * vocab_size + tokens).unique(return_inverse=True)
        parents, tokens = drawn // vocab_size, drawn % vocab_size  # (n,) the old row of each new row, and its token
        # `parents` is sorted. If it is exactly 0 ... n - 1, the rows have not changed and nothing needs to be copied.
        if len(parents) != num_rows or (parents[1:] == parents[:-1]).any():
            cache.batch_select_indices(parents)
            attention_mask, positions = attention_mask[parents], positions[parents]
        output = model(
            input_ids=tokens.unsqueeze(1),
            attention_mask=attention_mask[:, : prompt_length + t + 1],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]  # (n, V)
        positions = positions + 1
    return sampled_ids, sampled_logps, is_end


def _ends(
    tokenizer: PreTrainedTokenizerBase, stop_ids: Tensor, stop_strings: Sequence[str], ids: Tensor, rows: Tensor
) -> Tensor:
    """Whether the last token of a completion is a stop token or completes a stop string.

    `ids`: (B, t) the tokens sampled so far. `rows`: (w,) the rows to check. Returns (w,) bool.

    Only the end of a long text is decoded. A token has at least one byte and a character at most four bytes, so four
    tokens per character of the stop string are enough. The window may begin inside a character and garble it, so it
    holds 8 more tokens.
    """
    is_end = torch.isin(ids[rows, -1], stop_ids)
    if stop_strings:
        window = ids[rows, -(4 * max(map(len, stop_strings)) + 8) :].tolist()
        texts = _decode_texts(tokenizer, window, skip_special_tokens=False)  # a stop string may be a special token
        found = [any(string in text for string in stop_strings) for text in texts]
        is_end = is_end | torch.tensor(found, device=ids.device)
    return is_end


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    rows: Tensor | None = None,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sample one token for each of w completions by inverse CDF, with its log-prob under the sampling distribution.

    Args:
        logits: (n, V).
        uniforms: (w,) in [0, 1).
        rows: (w,) the row of logits to sample each completion's token from; None = row i for completion i.

    Returns:
        tokens (w,), log-probs (w,) in float32 nats. A token of probability 0 is never returned. With temperature 0
        (greedy): the most likely token, with log-prob 0.

    >>> sample_tokens(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([0.6]), temperature=1.0)
    (tensor([2]), tensor([-1.3863]))
    """
    logits = logits.float()
    if rows is None:
        rows = torch.arange(len(logits), device=logits.device)
    if temperature == 0:
        return logits.argmax(-1)[rows], torch.zeros_like(uniforms)
    logps = torch.log_softmax(logits / temperature, dim=-1)  # (n, V)
    if top_k > 0 or top_p < 1:
        logps = _keep_likeliest(logps, top_p=top_p, top_k=top_k)
    cdf = logps.exp().cumsum(-1)[rows]  # (w, V)
    # Choose the first token whose CDF exceeds u * total. `right=True` skips tokens of probability 0 when u = 0. The
    # total is the last value of the CDF, which differs slightly from 1 because of rounding.
    tokens = torch.searchsorted(cdf, uniforms.unsqueeze(-1) * cdf[:, -1:], right=True).squeeze(-1)  # (w,)
    tokens = tokens.clamp(max=cdf.shape[-1] - 1)
    # Rounding can select a token of probability 0 in two cases: u * total rounds up to total, which gives the last
    # token; or a parallel cumsum increases where the probability is 0. In these cases (about one draw in ten million),
    # take the most likely token instead.
    is_possible = logps[rows, tokens].exp() > 0
    tokens = torch.where(is_possible, tokens, logps.argmax(-1)[rows])
    return tokens, logps[rows, tokens]


def _keep_likeliest(logps: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """(n, V) log-probs -> log-probs renormalised over the top_k most likely tokens, then over the top_p nucleus."""
    if 0 < top_k < logps.shape[-1]:
        kept = logps.topk(top_k, dim=-1)
        logps = torch.full_like(logps, -torch.inf).scatter(-1, kept.indices, kept.values)
        logps = torch.log_softmax(logps, dim=-1)
    if top_p < 1:
        descending, order = logps.sort(dim=-1, descending=True, stable=True)
        mass_before = descending.exp().cumsum(-1) - descending.exp()  # keep a token if this is < top_p
        descending = descending.masked_fill(mass_before >= top_p, -torch.inf)
        logps = torch.empty_like(logps).scatter(-1, order, descending)
        logps = torch.log_softmax(logps, dim=-1)
    return logps


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The EOS ids of the tokenizer and of the model's generation_config. Sampling, masks and texts all use this set."""
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


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """(B, C) right-padded ids -> B lists without padding."""
    return [row[:length] for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)]


def _decode_texts(
    tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]], *, skip_special_tokens: bool = True
) -> list[str]:
    """Decode the sequences, by default without special tokens. Each distinct sequence is decoded once."""
    distinct = list({tuple(ids): ids for ids in sequences}.values())
    texts = tokenizer.batch_decode(distinct, skip_special_tokens=skip_special_tokens)
    text_of = {tuple(ids): text for ids, text in zip(distinct, texts, strict=True)}
    return [text_of[tuple(ids)] for ids in sequences]


def _check(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ValueError(f"{name}: got {value}, allowed: {allowed}")


def _left_pad(sequences: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists of ids -> (P, L) ids and bool mask. With left padding, every row ends with the last token of its prompt."""
    width = max(map(len, sequences))
    ids = [[pad_id] * (width - len(sequence)) + sequence for sequence in sequences]
    mask = [[False] * (width - len(sequence)) + [True] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
