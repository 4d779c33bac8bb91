"""Tokens -> per-token log-probabilities and entropies. The only shift-by-one in the project is in this file.

Reading order: ... -> grpo/advantages.py -> [grpo/logprobs.py] -> grpo/loss.py -> ...

Letters: B completions, L padded prompt length, C padded completion length, V vocabulary. Here also: U different pairs
of prompt and completion, k completions in a row of the model's batch, R rows, T = L + k * C, N tokens, H hidden size.

What is the same is computed once. A completion that occurs again is scored once; completions of one prompt may stand in
one row behind a single copy of it. And logits are computed only where a sampled token is to be scored, never all at a
time.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.lm_head import Head, log_probs_and_entropies, matmul_dtype

SHARED_PREFIX = ("auto", "always", "never")
PADDING = -1  # in place of a token id


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


def _trimmed(ids: Tensor, side: str) -> Tensor:
    """Without the columns, left or right, that hold nothing but padding; at least one stays."""
    used = (ids != PADDING).any(0).nonzero().flatten().tolist() or [0]
    return ids[:, used[0] :] if side == "left" else ids[:, : used[-1] + 1]


# Rows of the model's batch


class _Rows(NamedTuple):
    """[prompt | completion 1 | ... | completion k], R times, and where the outputs for the N tokens stand in them."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask, position_ids
    token_at: tuple[Tensor, Tensor]  # (N,) each: u, t of every token to be scored
    row: Tensor  # (N,) in 0 ... R - 1
    place: Tensor  # (N,) of the output that speaks of the token, counted from the prompt's last


def _lay_out(prompts: Tensor, completions: Tensor, k: int, model: PreTrainedModel) -> _Rows:
    """(U, L) prompts and (U, C) completions, equal prompts side by side if k > 1 -> rows of up to k completions."""
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
    mask = is_token.long()  # enough for a lone completion, and its kernels are faster
    if k > 1:
        mask = _block_mask(is_token, prompt_length, k, matmul_dtype(model.dtype, ids.device))
    inputs = {
        "input_ids": ids.clamp(min=0),
        "attention_mask": mask,
        "position_ids": torch.cat([positions_from_mask(is_prompt), after_prompt * is_token[:, prompt_length:]], dim=1),
    }
    u, t = (completions != PADDING).nonzero(as_tuple=True)  # (N,)
    place = torch.where(t == 0, 0, slot[u] * length + t)  # every completion's first token follows the prompt
    return _Rows(inputs, (u, t), row[u], place)


def _choose_k(
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


def completions_per_row(
    counts: list[int], prompt_length: int, completion_length: int, hidden_size: int, allowed: range
) -> int:
    """The number k of completions behind one copy of their prompt that costs the fewest multiplications.

        cost(k) = rows * (12 * H * T + T * T),    T = L + k * C,    rows = sum_p ceil(counts_p / k)

    In units of H multiplications a layer: its matrices hold about 12 H^2 weights, each used once a token, and a token
    looks back at T / 2 places on average, 2 H multiplications each. A larger k repeats the prompt less often, and looks
    more often at siblings that the mask then hides. `counts`: completions of each prompt.

    >>> completions_per_row([8], prompt_length=512, completion_length=32, hidden_size=768, allowed=range(1, 9))
    8
    >>> completions_per_row([8], prompt_length=8, completion_length=512, hidden_size=64, allowed=range(1, 9))
    1
    """

    def cost(k: int) -> int:
        width = prompt_length + k * completion_length
        return sum(-(-count // k) for count in counts) * (12 * hidden_size * width + width * width)

    return min(allowed, key=cost)


def _block_mask(is_token: Tensor, prompt_length: int, k: int, dtype: torch.dtype) -> Tensor:
    """(R, T) -> (R, 1, T, T), 0 where a token (row) may look at another (column), hugely negative elsewhere.

    A completion sees its prompt and itself, up to the token at hand, and none of its siblings. Padding sees itself:
    a softmax over nothing would be NaN.
    """
    num_places = is_token.shape[1]  # T
    place = torch.arange(num_places, device=is_token.device)
    part = (place - prompt_length).div((num_places - prompt_length) // k, rounding_mode="floor").clamp(min=-1)
    is_seen = (place <= place.unsqueeze(1)) & ((part == part.unsqueeze(1)) | (part == -1))  # (T, T)
    is_seen = (is_seen & is_token.unsqueeze(1)) | (place == place.unsqueeze(1))  # (R, T, T)
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=is_token.device)
    return mask.masked_fill_(~is_seen, torch.finfo(dtype).min).unsqueeze(1)


# What a model can take


class _Abilities(NamedTuple):
    """What holds for an architecture, found by trying."""

    head_is_known: bool  # its logits are Head(...) of its trunk's last hidden state
    takes_block_mask: bool  # and positions that begin anew


_ABILITIES: WeakKeyDictionary[nn.Module, _Abilities] = WeakKeyDictionary()
_SAID: set[str] = set()


def find_head(model: PreTrainedModel) -> Head | None:
    """The LM head, to be applied where it is needed; None if the model does more with its hidden states than that."""
    if _abilities(model).head_is_known:
        return _head_of(model)
    _say_once(model, "computes its logits in its own way: those of a whole micro-batch exist at once")
    return None


def can_share_prefix(model: PreTrainedModel, length: int) -> bool:
    """Whether completions can stand in one row, where a prompt and one of them have up to `length` tokens."""
    if not _abilities(model).takes_block_mask:
        _say_once(model, "takes no mask of its own for every token: each completion is scored behind its own prompt")
        return False
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if any(window is not None and window < length for window in windows):  # our mask would take the window's place
        _say_once(model, "looks back less far than a row is long: each completion is scored behind its own prompt")
        return False
    return True


def _say_once(model: PreTrainedModel, what: str) -> None:
    message = f"note: {type(model).__name__} {what}"
    if isinstance(model, PreTrainedModel) and message not in _SAID:
        _SAID.add(message)
        print(message, file=sys.stderr)


def _head_of(model: PreTrainedModel) -> Head | None:
    """What the config says of it; `_abilities` has the proof."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))  # Gemma


@torch.no_grad()
def _abilities(model: PreTrainedModel) -> _Abilities:
    """Score two tiny completions of one prompt both ways, once for every model, and compare."""
    if not isinstance(model, PreTrainedModel):
        return _Abilities(False, False)
    if model not in _ABILITIES:
        in_training = [module for module in model.modules() if module.training]
        model.eval()
        with torch.autocast(model.device.type, enabled=False):
            _ABILITIES[model] = _Abilities(_try_head(model), _try_block_mask(model))
        for module in in_training:
            module.training = True
    return _ABILITIES[model]


@contextmanager
def _failing_means_no() -> Iterator[None]:
    """Foreign code may want other arguments, return something else, raise anything; but no memory is another matter."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: S110
        pass


def _try_head(model: PreTrainedModel) -> bool:
    head, ids = _head_of(model), torch.arange(6, device=model.device).unsqueeze(0)  # any tokens will do
    if head is None:
        return False
    with _failing_means_no():
        ours = head.logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        theirs = model(input_ids=ids, use_cache=False).logits.float()
        return bool((ours - theirs).abs().max() <= 1e-3 * theirs.std())
    return False


def _try_block_mask(model: PreTrainedModel) -> bool:
    """Whether the mask does what it should: the result is far nearer to the right one than without it."""
    if hasattr(model.config, "window_size"):  # GPT-Neo's counts places in the row, whatever the mask says
        return False
    with _failing_means_no():
        ids = torch.arange(6, device=model.device)  # a prompt of two tokens, two completions of two
        apart = torch.stack([ids[[0, 1, 2, 3]], ids[[0, 1, 4, 5]]])
        together: dict[str, Any] = {
            "input_ids": ids.unsqueeze(0),
            "position_ids": torch.tensor([[0, 1, 2, 3, 2, 3]], device=ids.device),
            "use_cache": False,
        }
        mask = _block_mask(torch.ones_like(ids, dtype=torch.bool).unsqueeze(0), 2, 2, model.dtype)
        right = (
            model(input_ids=apart, attention_mask=torch.ones_like(apart), use_cache=False).logits[:, 2:].flatten(0, 1)
        )
        masked = model(**together, attention_mask=mask).logits[0, 2:]  # (4, V)
        unmasked = model(**together, attention_mask=torch.ones_like(mask[:, 0, 0], dtype=torch.long)).logits[0, 2:]
        return bool((masked - right).abs().max() < 0.01 * (unmasked - right).abs().max())
    return False
