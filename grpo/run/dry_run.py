"""The output of --dry_run: sizes, estimated memory and a rendered prompt. No weights are loaded."""

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from grpo.data import Dataset
from grpo.fast.lm_head import CHUNK
from grpo.settings.config import Config

BYTES = 4  # bytes per float32 value
BITS = {"none": 32, "8bit": 8, "4bit": 4}  # bits per weight


def opening_line(config: Config, device: torch.device, *, writes: bool) -> str:
    """The first line that a run prints. `writes` is false for --preflight, which writes nothing."""
    return (
        f"Training {config.model_name} on {device}: {config.num_train_steps} steps of {config.batch_size} prompts x "
        f"{config.group_size} completions; {f'everything goes to {config.output_dir}' if writes else 'pre-flight only'}"
    )


def describe(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> str:
    """The text that --dry_run prints. The samples of `dataset` must be tokenized."""
    longest = max(len(sample["prompt_ids"]) for sample in dataset)
    completions = config.batch_size * config.group_size
    updates = config.num_iterations * config.num_minibatches
    rounds = config.max_resample_rounds
    prompt_ids = dataset[0]["prompt_ids"]
    tokens = completions * (longest + config.max_completion_length)
    memory = estimate_memory(config, model, longest)
    parts = ", ".join(f"{name} {_size(value)}" for name, value in memory.items())
    return "\n".join(
        [
            f"a step       {config.batch_size} prompts x {config.group_size} completions = {completions} completions, "
            f"at most {tokens:,} tokens",
            f"             {updates} optimizer step{'s' if updates > 1 else ''}, in micro-batches of at most "
            f"{_micro_batch_rows(config, longest)} completions",
            f"the run      {config.num_train_steps} steps = {config.num_train_steps * completions:,} completions, "
            f"{config.num_train_steps * updates:,} optimizer steps, at most {config.num_train_steps * tokens:,} tokens"
            + (f"; up to {1 + rounds} times as many with dynamic sampling" if rounds else ""),
            f"the method   {_method(config)}",
            f"the model    {config.model_name}: {type(model).__name__}, {model.num_parameters():,} weights"
            + (f", of which none but an adapter of {num_trained(config, model):,} is trained" * (config.lora_rank > 0)),
            f"memory       about {_size(sum(memory.values()))}, besides Python and torch themselves",
            f"             {parts}",
            f"a prompt     {tokenizer.decode(prompt_ids)!r}",
            f"             {len(prompt_ids)} tokens: {prompt_ids}",
        ]
    )


def estimate_memory(config: Config, model: PreTrainedModel, prompt_length: int) -> dict[str, int]:
    """Estimated memory in bytes by purpose, for completions of maximum length in float32.

    The update keeps about 24 hidden-sized values per token and layer, the attention weights, and five copies of a chunk
    of the logits (grpo/fast/lm_head.py). The sampler keeps a KV cache and four vocabulary-sized rows per completion.
    The estimate ignores prompts shared between completions, and the block mask that sharing needs.
    """
    architecture = model.config.get_text_config()
    hidden, layers = architecture.hidden_size, architecture.num_hidden_layers
    heads = getattr(architecture, "num_attention_heads", 1)
    head_size = getattr(architecture, "head_dim", None) or hidden // heads
    kv_heads = getattr(architecture, "num_key_value_heads", None) or heads
    weights, trained = model.num_parameters(), num_trained(config, model)
    length = prompt_length + config.max_completion_length
    completions = config.batch_size * config.group_size
    rows = _micro_batch_rows(config, prompt_length)
    kept = 24 * hidden * length + 2 * heads * length**2  # values per completion and layer
    update = rows * (layers * hidden * length + kept if config.gradient_checkpointing else layers * kept)
    update += 5 * min(rows * config.max_completion_length * architecture.vocab_size, CHUNK)
    rollout = completions * (length * layers * 2 * kv_heads * head_size + 4 * architecture.vocab_size)
    # The critic needs its weights, their gradients and the two moments of AdamW.
    critic = {"critic": 4 * BYTES * weights} if config.advantage_baseline == "critic" else {}
    needs_copy = config.kl_coeff > 0 and config.lora_rank == 0  # LoRA: the reference is the policy itself
    return {
        "weights": round(BITS[config.quantization] / 8 * weights) + BYTES * (trained if config.lora_rank > 0 else 0),
        "reference": BYTES * weights if needs_copy else 0,
        "gradients": BYTES * trained,
        "AdamW": 2 * BYTES * trained,
        **critic,
        "rollout or update": BYTES * max(update, rollout),
    }


def num_trained(config: Config, model: PreTrainedModel) -> int:
    """The number of weights that get a gradient: all of them, or rank * (in + out) per layer with an adapter."""
    if config.lora_rank == 0:
        return model.num_parameters()
    wanted, head = [name.strip() for name in config.lora_target_modules.split(",")], model.get_output_embeddings()
    return sum(
        config.lora_rank * sum(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
        if "all-linear" in wanted or name.rpartition(".")[2] in wanted
    )


def _method(config: Config) -> str:
    """Text for the four choices (advantages, surrogate, aggregation, KL) and for optional terms."""
    low, high = config.clip_range, config.clip_range_high
    clip = [("clip_range", low), ("clip_range_high", low if high is None else high), ("dual_clip", config.dual_clip)]
    parts = [
        f"baseline {config.advantage_baseline}, scale {config.advantage_scale}",
        ", ".join([f"surrogate {config.surrogate}", *(f"{key} {value:g}" for key, value in clip if value is not None)]),
        f"aggregation {config.loss_aggregation}",
        f"KL {config.kl_coeff:g} in the {config.kl_in} ({config.kl_estimator})" if config.kl_coeff > 0 else "no KL",
    ]
    if config.entropy_coeff > 0:
        parts.append(f"entropy bonus {config.entropy_coeff:g}")
    if config.max_resample_rounds > 0:
        parts.append(f"dynamic sampling in {config.max_resample_rounds} rounds")
    return f"{config.algorithm}: {'; '.join(parts)}"


def _micro_batch_rows(config: Config, prompt_length: int) -> int:
    """The number of completions of maximum length in the largest micro-batch."""
    completions = config.batch_size * config.group_size // config.num_minibatches
    fitting = config.micro_batch_tokens // (prompt_length + config.max_completion_length)
    return min(config.micro_batch_size, completions, max(fitting, 1))


def _size(num_bytes: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
