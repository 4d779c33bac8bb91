"""Save a model as a standard Hugging Face folder, and hash its weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from grpo.files import complete_folder
from grpo.models.lora import save_base

disable_progress_bar()  # the bars of transformers, one per file, would disturb ours


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    about: dict[str, Any] | None = None,
    replace: bool = True,
) -> None:
    """Write a standard Hugging Face folder: safetensors weights, tokenizer, generation_config with EOS and pad ids.

    `about` is written to about.json. An existing `folder` is replaced, or kept if `replace` is false.
    """
    with complete_folder(folder, replace=replace) as unfinished:
        model.save_pretrained(unfinished)
        save_base(model, unfinished)
        tokenizer.save_pretrained(unfinished)
        if about is not None:
            (unfinished / "about.json").write_text(json.dumps(about) + "\n")


def weights_sha256(model: PreTrainedModel) -> str:
    """SHA-256 of the names, dtypes, shapes and values of all weights, without those of an adapter."""
    digest = hashlib.sha256()
    weights = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
