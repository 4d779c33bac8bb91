"""Load the policy and its tokenizer, prepare the policy for training, and copy the frozen reference."""

import copy
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo.data import Dataset
from grpo.datasets.chat import set_chat_template
from grpo.datasets.rows import JSONLinesDataset
from grpo.errors import InputError, missing_package
from grpo.models.lora import (
    add_adapter,
    base_of,
    check_base,
    check_targets,
    has_adapter,
    is_adapter_folder,
    merge,
    note_base,
)
from grpo.models.saving import save_model, weights_sha256
from grpo.models.tiny import NUM_STEPS, TRAIN_FILE, build_model, tiny_base_model, train_tokenizer
from grpo.rollout import stop_token_ids
from grpo.settings.config import Config


def load_policy(
    model_name: str,
    *,
    base_seed: int,
    base_steps: int = NUM_STEPS,
    device: torch.device,
    chat_template: str = "auto",
    attn_implementation: str | None = None,
    quantization: str = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in float32 with dropout disabled, and its tokenizer. The model `tiny` is built if it is not cached.

    If the folder holds an adapter, its base model is loaded and the adapter is merged into it. float32 is requested
    explicitly, because transformers 5 uses the dtype of the file. This is often bfloat16, in which an update of size
    1e-6 is lost to rounding.
    """
    source = tiny_base_model(base_seed, base_steps) if model_name == "tiny" else find_model(model_name)
    base = find_model(base_of(source)) if _is_adapter(source) else source
    if base is not source and quantization != "none":
        raise InputError(
            f"quantization: got {quantization} with an adapter as the model, allowed there: none; or first merge it: "
            f"python -m grpo.models.merge_lora {source} OUT"
        )
    how = {"dtype": torch.float32, "attn_implementation": attn_implementation, **_quantized(quantization, device)}
    with _foreign_files(model_name):
        tokenizer = _load_tokenizer(source, base, chat_template)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, **how, **_options(base))
        if base is not source:
            check_base(Path(source), weights_sha256(model))
            model = merge(model, Path(source))
    _check_eos(model_name, tokenizer)
    disable_dropout(model)
    _set_special_tokens(model, tokenizer)
    if quantization == "none":
        model.to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to
    return model, tokenizer


def load_skeleton(model_name: str, *, chat_template: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model without its trained weights, and the tokenizer. This is enough to check the input."""
    if model_name == "tiny":
        tiny_tokenizer = train_tokenizer([sample["prompt"] for sample in JSONLinesDataset(TRAIN_FILE)])
        set_chat_template(tiny_tokenizer, chat_template)
        return build_model(tiny_tokenizer, base_seed=0), tiny_tokenizer
    source = find_model(model_name)
    base = find_model(base_of(source)) if _is_adapter(source) else source
    with _foreign_files(model_name):
        tokenizer = _load_tokenizer(source, base, chat_template)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, **_options(base)))
    _check_eos(model_name, tokenizer)
    return model, tokenizer


def _is_adapter(source: str | Path) -> TypeGuard[Path]:
    return isinstance(source, Path) and is_adapter_folder(source)


def _load_tokenizer(source: str | Path, base: str | Path, chat_template: str) -> PreTrainedTokenizerBase:
    """The tokenizer from the model folder, or from the base model if an adapter folder has no tokenizer."""
    has_own = not _is_adapter(source) or (source / "tokenizer_config.json").is_file()
    chosen = source if has_own else base
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(chosen, **_options(chosen))
    set_chat_template(tokenizer, chat_template)
    return tokenizer


def _quantized(quantization: str, device: torch.device) -> dict[str, Any]:
    """Arguments for loading 4-bit or 8-bit weights: NF4 of QLoRA ("QLoRA", 2305.14314), LLM.int8() (2208.07339)."""
    if quantization == "none":
        return {}
    if device.type != "cuda":
        raise InputError(f"quantization: got {quantization} on {device.type}, allowed there: none (it needs CUDA)")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise missing_package("bitsandbytes", f"quantization: {quantization}: quantized weights")
    compute = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    settings = BitsAndBytesConfig(**(four if quantization == "4bit" else {"load_in_8bit": True}))
    return {"quantization_config": settings, "device_map": {"": device}}


def loading_settings(config: Config) -> dict[str, Any]:
    """The keyword arguments of `load_policy` that come from a config."""
    keys = ("base_seed", "base_steps", "chat_template", "attn_implementation", "quantization")
    return {key: getattr(config, key) for key in keys}


def check_trainable(skeleton: PreTrainedModel, config: Config, device: torch.device) -> None:
    """Check what training needs (quantization, LoRA target modules) before the weights are loaded."""
    _quantized(config.quantization, device)
    if config.lora_rank > 0:
        check_targets(skeleton, config.lora_target_modules)


def make_trainable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Add an adapter if lora_rank > 0 (else all weights are trained), and enable gradient checkpointing if set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of transformers 5 rename this method
        if config.gradient_checkpointing:  # only in train mode; rollouts use eval mode and a KV cache
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.lora_rank > 0:
            add_adapter(
                model,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                target_modules=config.lora_target_modules,
                seed=config.seed,
                base=_base_for_adapter(model, tokenizer, config.model_name),
            )
            if config.quantization == "none":  # quantized weights differ from those in the base's files
                note_base(model, weights_sha256(model))


def _base_for_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_name: str) -> str:
    """The folder or Hub name of the base weights. A base merged with an earlier adapter is first saved in the cache."""
    folder = Path(str(model.name_or_path))
    if model_name != "tiny" and _is_adapter(find_model(model_name)):
        cache = Path(os.environ.get("GRPO_CACHE") or Path.home() / ".cache" / "grpo")
        folder = cache / f"merged-{weights_sha256(model)[:12]}"
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            save_model(model, tokenizer, folder, replace=False)
            print(f"{model_name} merged into its base is now a base of its own, kept in {folder}")
    return str(folder.resolve() if folder.is_dir() else folder)


@contextmanager
def _foreign_files(model_name: str) -> Iterator[None]:
    """Turn any exception from loading a model into one line. transformers raises many kinds, often pages long."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model_name: {model_name!r} cannot be loaded: {reason}") from error


def _options(source: str | Path) -> dict[str, Any]:
    """Options for loading from a local folder (a Path) or from the Hub (a name). Code in a model repo is never run."""
    return {"local_files_only": isinstance(source, Path), "trust_remote_code": False}


def _check_eos(model_name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError(f"model_name: the tokenizer of {model_name!r} has no eos token: no completion could ever end")


def find_model(model_name: str) -> str | Path:
    """Find a model: returns a local Path, or the name of a model that exists on the Hub.

    The Hub is asked first, because without a network transformers retries for about a minute before it gives up.
    """
    folder = Path(model_name).expanduser()
    if model_name.strip() and folder.exists():
        _check_model_folder(folder)
        return folder
    if model_name.count("/") > 1 or model_name.startswith((".", "/", "~")) or not model_name.strip():
        raise InputError(f"model_name: there is no folder {model_name!r}")
    try:
        huggingface_hub.model_info(model_name, timeout=10)
        return model_name
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "and it is no public model of the Hugging Face Hub"
        raise InputError(f"model_name: there is no folder {model_name!r} here, {reason}") from error
    except Exception as error:  # no network or the Hub is down; the exception type depends on the HTTP library
        try:
            return Path(huggingface_hub.snapshot_download(model_name, local_files_only=True))
        except Exception:
            raise InputError(
                f"model_name: there is no folder {model_name!r} here, it is not in the download cache, and the Hugging "
                "Face Hub cannot be reached; tiny, the default model, needs no network"
            ) from error


def _check_model_folder(folder: Path) -> None:
    needed = {
        "configuration (config.json)": ["config.json", "adapter_config.json"],
        "weights (*.safetensors)": ["*.safetensors", "pytorch_model*.bin"],
        "tokenizer (tokenizer.json)": ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.*"],
    }
    if is_adapter_folder(folder):
        del needed["tokenizer (tokenizer.json)"]  # the base model has a tokenizer
    for what, patterns in needed.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            hint = f"; did you mean {folder / 'final'}?" if (folder / "final").is_dir() else ""
            raise InputError(f"model_name: {folder} is no model folder: it has no {what}{hint}")


def check_lengths(dataset: Dataset, model: PreTrainedModel, config: Config) -> None:
    """Check that the longest prompt and its completion fit into the model's positions."""
    longest = max(len(sample["prompt_ids"]) for sample in dataset)
    check_positions(model, longest, config.max_completion_length, what=f"the longest prompt of {dataset.path}")


def check_positions(model: PreTrainedModel, prompt_length: int, max_completion_length: int, *, what: str) -> None:
    """Check lengths. Beyond its positions, a model with learned positions fails, and other models write nonsense."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt_length + max_completion_length > positions:
        raise InputError(
            f"max_completion_length: got {max_completion_length}; with {what} ({prompt_length} tokens) that exceeds "
            f"the {positions} positions of the model"
        )


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a pad token that the model can embed, and a generation_config with the EOS and pad ids.

    Both are saved in every model folder. The rest of a published generation_config is dropped. The sampler does not use
    it, and some published configs fail the check of transformers on saving, which would lose the finished run.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        tokenizer.pad_token = tokenizer.eos_token  # any id: masks never use ids
    stop_ids = sorted(stop_token_ids(model, tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=stop_ids[0] if len(stop_ids) == 1 else stop_ids or None, pad_token_id=tokenizer.pad_token_id
    )


def disable_dropout(model: PreTrainedModel) -> None:
    """Disable dropout. With dropout, two scoring passes differ, but the ratio of the first update must be exactly 1.

    Dropout rates are in modules and, for example for the attention of Llama, in floats read from the config.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for holder in [model.config, *model.modules()]:
        for name, value in vars(holder).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name or name.endswith("_pdrop")):
                setattr(holder, name, 0.0)


def make_reference(model: PreTrainedModel) -> PreTrainedModel:
    """The KL reference: a copy of the model, or the model itself if it has an adapter (score it in `adapter_off`)."""
    return model if has_adapter(model) else frozen_copy(model)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model whose weights are never trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)
