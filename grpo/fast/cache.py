"""A KV cache with spare room, so that appending a token does not copy the keys and values of earlier tokens."""

from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from grpo.errors import InputError


def with_room(cache: Any) -> Any:
    """Give the plain layers of a prefilled cache room to grow. Sliding-window layers are not changed."""
    layers = getattr(cache, "layers", [cache])
    if not all(hasattr(layer, "batch_select_indices") and not hasattr(layer, "recurrent_states") for layer in layers):
        raise InputError(
            "model_name: a model of this kind cannot be sampled from: its cache is not of keys and values alone, "
            "which could be copied for every completion"
        )
    if isinstance(cache, Cache):
        cache.layers = [RoomyLayer(layer) if type(layer) is DynamicLayer else layer for layer in layers]
    return cache


class RoomyLayer(DynamicLayer):
    """The keys and values of a layer, (n, heads, tokens, size), with spare room for later tokens.

    The layer of transformers appends by torch.cat, which copies the whole cache for every token. This layer supports
    only what the sampler uses: `update` and `batch_select_indices`. The other methods of a transformers layer would
    ignore the spare room.
    """

    ROOM = 32  # tokens
    keys: Tensor
    values: Tensor

    def __init__(self, filled: DynamicLayer) -> None:
        super().__init__()
        assert filled.keys is not None
        assert filled.values is not None
        self.lazy_initialization(filled.keys, filled.values)
        self.keys, self.values = filled.keys, filled.values
        self.roomy_keys, self.roomy_values = filled.keys, filled.values  # includes the spare room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, and return all keys and values."""
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if end > self.roomy_keys.shape[-2]:
            self.roomy_keys, self.roomy_values = (
                functional.pad(old, (0, 0, 0, end - start + self.ROOM)) for old in (self.keys, self.values)
            )
        self.roomy_keys[..., start:end, :] = key_states
        self.roomy_values[..., start:end, :] = value_states
        self.keys, self.values = self.roomy_keys[..., :end, :], self.roomy_values[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows. A row may be selected several times."""
        length = self.keys.shape[-2]
        self.roomy_keys, self.roomy_values = self.roomy_keys[indices], self.roomy_values[indices]
        self.keys, self.values = self.roomy_keys[..., :length, :], self.roomy_values[..., :length, :]
