"""LoRA: the base weights are frozen, and a low-rank adapter of its matrices is trained. Adapters are made by peft.

    W x  ->  W x + (lora_alpha / lora_rank) * B A x        A: (rank, in), random; B: (out, rank), 0 at first

Differs from training all weights:
  - The KL reference is the policy with its adapter disabled, so there is no second copy of the model.
  - step-N/, best/ and final/ hold only the adapter and the name of its base. final-merged/ is a complete model.

Paper: "LoRA" (2106.09685) eq. 3.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grpo.errors import InputError, missing_package

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_FILE = "base.json"  # written by this project: sha256 of the base's weights
PREFIX = "base_model.model."  # of every name in ADAPTER_FILE


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise missing_package("peft", "lora_rank: LoRA adapters") from error
    return peft


def _names(target_modules: str) -> list[str]:
    return [name.strip() for name in target_modules.split(",")]


def check_targets(model: PreTrainedModel, target_modules: str) -> None:
    """Check that every name matches a layer that can have an adapter. The model may be without weights.

    Raises:
        InputError: peft is not installed; a name matches no layer, or only a layer with tied weights. An adapter of a
            tied LM head would also change the embedding when it is merged.
    """
    _peft()
    shared = [model.get_input_embeddings(), model.get_output_embeddings()]
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    layers = {
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and not (is_tied and module in shared)
    }  # fmt: skip
    for name in _names(target_modules):
        if name != "all-linear" and not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            allowed = sorted({layer.rpartition(".")[2] for layer in layers})
            raise InputError(
                f"lora_target_modules: got {name}, which fits no layer of {type(model).__name__} that can have its own "
                f"adapter; allowed: all-linear, or some of {', '.join(allowed)}"
            )


def add_adapter(model: PreTrainedModel, *, rank: int, alpha: float, target_modules: str, seed: int, base: str) -> None:
    """Add an adapter to `model`. From then on, only the adapter is trained.

    Args:
        base: the folder or Hub name that `model` can be loaded from; saved with the adapter.
        target_modules: all-linear (every linear layer but the LM head), or comma-separated ends of layer names.
        seed: for the random values of A.

    Raises:
        InputError: as `check_targets`.
    """
    check_targets(model, target_modules)
    peft, names = _peft(), _names(target_modules)
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=target_modules if names == ["all-linear"] else names,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(settings)
    model.peft_config["default"].base_model_name_or_path = base


def has_adapter(model: nn.Module) -> bool:
    """Whether the model has an adapter, so that only the adapter is trained."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the adapter is disabled, so the model is its base. No effect on a model without an adapter."""
    if not has_adapter(model):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Replace the adapter of the model by the one saved in `folder`, which must have the same shape."""
    saved = {name.removeprefix(PREFIX): weight for name, weight in load_file(folder / ADAPTER_FILE).items()}
    own = _peft().get_peft_model_state_dict(model, adapter_name="default")
    if {name: weight.shape for name, weight in saved.items()} != {name: weight.shape for name, weight in own.items()}:
        raise ValueError(f"{ADAPTER_FILE} is not an adapter of these layers and this rank")
    _peft().set_peft_model_state_dict(model, saved, adapter_name="default")


def note_base(model: PreTrainedModel, sha256: str) -> None:
    """Store the hash of the base weights in `model`, so that `save_base` can write it beside the adapter."""
    model.base_sha256 = sha256  # type: ignore[assignment]


def save_base(model: PreTrainedModel, folder: Path) -> None:
    """Write BASE_FILE if the hash of the adapter's base is known."""
    if (sha256 := getattr(model, "base_sha256", None)) is not None:
        (folder / BASE_FILE).write_text(json.dumps({"sha256": sha256}) + "\n")


def check_base(folder: Path, sha256: str) -> None:
    """Check that the base still has the weights that the adapter was trained on, if BASE_FILE exists."""
    path = folder / BASE_FILE
    if path.is_file() and sha256 not in path.read_text(encoding="utf-8"):
        raise InputError(f"{folder}: its base, {base_of(folder)}, no longer has the weights that it was trained on")


def is_adapter_folder(folder: Path) -> bool:
    """Whether the folder holds an adapter and no complete model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The model that an adapter was trained on: a folder or a Hub name."""
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / ADAPTER_CONFIG}: does not name the base model") from error
    if not isinstance(base, str):
        raise InputError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: got {base!r}, expected a text")
    return base


def merge(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`base` with the adapter of `folder` added to its weights: W + (alpha / rank) B A. Do not use `base` afterwards.

    The sum is computed in float32 for any dtype of the file. In bfloat16, merging an adapter and subtracting it again
    changes a sixth of the weights.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers warns about peft's code
        model: PreTrainedModel = _peft().PeftModel.from_pretrained(base.float(), folder).merge_and_unload()
    return model.requires_grad_(True)  # peft froze the weights
