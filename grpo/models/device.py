"""Device, precision (autocast) and torch.compile."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from transformers import (
    PreTrainedModel,
)

from grpo.errors import InputError
from grpo.fast.capabilities import find_head
from grpo.settings.config import Config


def choose_device(name: str) -> torch.device:
    """auto = CUDA, else MPS, else CPU."""
    is_available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in is_available.items() if available))
    if not is_available[name]:
        raise InputError(f"device: got {name}, which this machine or this build of torch does not have")
    return torch.device(name)


def check_compile(config: Config, device: torch.device) -> None:
    """Refuse `compile` without CUDA, where compiling takes minutes and gains little. It saves GPU kernel launches."""
    if config.compile and device.type != "cuda":
        raise InputError(
            f"compile: got true on {device.type}, allowed there: false (it fuses the kernels of a CUDA device)"
        )


def compile_trunks(*models: PreTrainedModel | None) -> None:
    """torch.compile all of each model except the LM head, for any batch shape. Weights keep their names."""
    for model in models:
        if model is not None:
            find_head(model)  # tests what the model supports, before it is compiled
            model.base_model.compile(dynamic=True)


def uncompiled() -> AbstractContextManager:
    """A context in which compiled models run uncompiled. Sampling would recompile whenever the KV cache grows."""
    return torch.compiler.set_stance("force_eager")


def make_autocast(dtype: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Returns a function that makes a context for forward passes: matrix products in `dtype`, the rest in float32."""
    if dtype == "auto":
        # Emulated bfloat16 (before Ampere) would be slower than float32.
        is_supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if is_supported else "float32"
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
