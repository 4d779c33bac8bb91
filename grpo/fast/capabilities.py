"""What a model supports, tested once on six tokens: applying the LM head separately, and a block mask."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from grpo.fast.layout import block_mask
from grpo.fast.lm_head import Head


class _Capabilities(NamedTuple):
    """What a model supports, according to a test on six tokens."""

    head_is_known: bool  # its logits equal Head(...) of the trunk's last hidden state
    takes_block_mask: bool  # and position ids that restart for each completion


_CAPABILITIES: WeakKeyDictionary[nn.Module, _Capabilities] = WeakKeyDictionary()

_SAID: set[str] = set()


def find_head(model: PreTrainedModel) -> Head | None:
    """The LM head, to be applied separately. None if the model computes its logits in another way."""
    if _capabilities(model).head_is_known:
        return _head_of(model)
    _say_once(model, "computes its logits in its own way: those of a whole micro-batch exist at once")
    return None


def can_share_prefix(model: PreTrainedModel, length: int) -> bool:
    """Whether completions can share a row. `length`: maximum tokens of a prompt with one completion."""
    if not _capabilities(model).takes_block_mask:
        _say_once(model, "takes no mask of its own for every token: each completion is scored behind its own prompt")
        return False
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if any(window is not None and window < length for window in windows):  # our mask would replace the window
        _say_once(model, "looks back less far than a row is long: each completion is scored behind its own prompt")
        return False
    return True


def _say_once(model: PreTrainedModel, what: str) -> None:
    message = f"note: {type(model).__name__} {what}"
    if isinstance(model, PreTrainedModel) and message not in _SAID:
        _SAID.add(message)
        print(message, file=sys.stderr)


def _head_of(model: PreTrainedModel) -> Head | None:
    """The LM head according to the model's config. `_capabilities` checks that it gives the model's logits."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))  # Gemma


@torch.no_grad()
def _capabilities(model: PreTrainedModel) -> _Capabilities:
    """Test a model once: compare the separate head and the block mask with the plain forward pass."""
    if not isinstance(model, PreTrainedModel):
        return _Capabilities(False, False)
    if model not in _CAPABILITIES:
        in_training = [module for module in model.modules() if module.training]
        model.eval()
        with torch.autocast(model.device.type, enabled=False):
            _CAPABILITIES[model] = _Capabilities(_try_head(model), _try_block_mask(model))
        for module in in_training:
            module.training = True
    return _CAPABILITIES[model]


@contextmanager
def _failing_means_no() -> Iterator[None]:
    """Ignore exceptions of model code, so that a failed test means "not supported". Out of memory is still raised."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: S110
        pass


def _try_head(model: PreTrainedModel) -> bool:
    head, ids = _head_of(model), torch.arange(6, device=model.device).unsqueeze(0)  # any tokens
    if head is None:
        return False
    with _failing_means_no():
        ours = head.logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        theirs = model(input_ids=ids, use_cache=False).logits.float()
        return bool((ours - theirs).abs().max() <= 1e-3 * theirs.std())
    return False


def _try_block_mask(model: PreTrainedModel) -> bool:
    """Whether the mask works: with it, the logits are far closer to the correct ones than without it."""
    if hasattr(model.config, "window_size"):  # GPT-Neo's window ignores the mask
        return False
    with _failing_means_no():
        ids = torch.arange(6, device=model.device)  # a prompt of two tokens and two completions of two tokens
        apart = torch.stack([ids[[0, 1, 2, 3]], ids[[0, 1, 4, 5]]])
        together: dict[str, Any] = {
            "input_ids": ids.unsqueeze(0),
            "position_ids": torch.tensor([[0, 1, 2, 3, 2, 3]], device=ids.device),
            "use_cache": False,
        }
        mask = block_mask(torch.ones_like(ids, dtype=torch.bool).unsqueeze(0), 2, 2, model.dtype)
        right = (
            model(input_ids=apart, attention_mask=torch.ones_like(apart), use_cache=False).logits[:, 2:].flatten(0, 1)
        )
        masked = model(**together, attention_mask=mask).logits[0, 2:]  # (4, V)
        unmasked = model(**together, attention_mask=torch.ones_like(mask[:, 0, 0], dtype=torch.long)).logits[0, 2:]
        return bool((masked - right).abs().max() < 0.01 * (unmasked - right).abs().max())
    return False
