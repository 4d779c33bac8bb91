"""Save a model as an ordinary Hugging Face folder; the hash of its weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from grpo.files import complete_folder
from grpo.models.lora import save_base

disable_progress_bar()  # transformers' own bars, one per file loaded or saved, would break up ours


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    about: dict[str, Any] | None = None,
    replace: bool = True,
) -> None:
    """An ordinary Hugging Face folder: safetensors weights, tokenizer, generation_config with eos and pad ids.

    `about` becomes about.json in it. An earlier `folder` is replaced, or kept where `replace` is false.
    """
    with complete_folder(folder, replace=replace) as unfinished:
        model.save_pretrained(unfinished)
        save_base(model, unfinished)
        tokenizer.save_pretrained(unfinished)
        if about is not None:
            (unfinished / "about.json").write_text(json.dumps(about) + "\n")


def weights_sha256(model: PreTrainedModel) -> str:
    """Of names, shapes and values of all weights, wherever they lie; those of an adapter beside them do not count."""
    digest = hashlib.sha256()
    weights = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
