"""Save a model so that a folder is either complete or absent."""

import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()  # transformers' own bars, one per file loaded or saved, would tear ours apart


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary Hugging Face folder (safetensors weights, tokenizer, generation_config with eos and pad ids).

    Everything goes into a hidden neighbour first, which is then renamed: a killed process leaves no half-written
    folder under the final name. Where another process was faster, its folder stays.
    """
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
