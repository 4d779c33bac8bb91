"""A learned reward: any sequence classifier or reward model of Hugging Face, with its own tokenizer and chat template.

A policy learns to exploit the weaknesses of a learned reward. So read samples during the run, and use a KL penalty.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo.errors import InputError
from grpo.models.device import choose_device
from grpo.models.loading import disable_dropout, find_model
from grpo.rewards.arguments import check_choice, check_count
from grpo.rewards.base import LARGEST, RewardFn, RewardValue, declare, text_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READS = ("conversation", "completion")
OUTPUTS = ("logit", "probability")
DEVICES = ("auto", "cpu", "cuda", "mps")


def classifier_reward(
    model: str,
    label: str | int | None = None,
    output: str | None = None,
    reads: str = "conversation",
    batch_size: int = 16,
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> RewardFn:
    """The output of a sequence classifier for each completion.

    Args:
        model: folder or Hub name of an AutoModelForSequenceClassification with its tokenizer.
        label: the label to reward, by name or number; required if the classifier has several labels.
        output: logit or probability. The default is logit with one label (as reward models are trained) and
            probability with several labels. A probability is a softmax over several labels, or a sigmoid of one.
        reads: conversation = prompt and completion, in the classifier's chat template if it has one, otherwise
            concatenated; completion = only the completion.
        batch_size: texts per forward pass.
        max_length: maximum tokens per text. A longer text is truncated on the tokenizer's truncation side, which is
            usually its end. None: 1024, or the classifier's maximum if that is smaller.
        device, dtype: of the classifier. auto = a GPU if there is one.

    Raises:
        ValueError: there is no such model or label, or the value of an argument is not allowed.
    """
    check_choice("reads", reads, READS)
    if output is not None:
        check_choice("output", output, OUTPUTS)
    check_choice("device", device, DEVICES)
    check_choice("dtype", dtype, list(DTYPES))
    check_count("batch_size", batch_size)
    try:
        chosen = choose_device(device)
    except InputError as error:
        raise ValueError(str(error)) from error
    source, config, tokenizer = _find(model)
    index = _label_number(label, config.id2label)
    if output is None:
        output = "logit" if len(config.id2label) == 1 else "probability"
    num_readable = _num_readable(config, tokenizer)
    if max_length is None:
        max_length = min(1024, num_readable)
    check_count("max_length", max_length, most=num_readable, what="what the classifier can read")

    def classifier_fn(prompts: list, completions: list, **_: Any) -> list[RewardValue]:
        classifier = _load(source, chosen, dtype, tokenizer)
        has_template = reads == "conversation" and tokenizer.chat_template is not None  # with its own special tokens
        pairs = zip(prompts, completions, strict=True)
        texts = [_text(tokenizer, prompt, completion, reads) for prompt, completion in pairs]
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # texts of similar length share a batch
        values: list[RewardValue] = [None] * len(texts)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = tokenizer(
                [texts[row] for row in rows],
                add_special_tokens=not has_template,
                truncation=True,
                max_length=max_length,
                padding=True,
                padding_side="right",  # left padding would shift the positions of models with learned positions
                return_tensors="pt",
            )
            logits = _logits(classifier, inputs)  # (b, labels)
            if output == "probability":
                logits = logits.softmax(1) if logits.shape[1] > 1 else logits.sigmoid()
            for row, value in zip(rows, logits[:, index].tolist(), strict=True):
                values[row] = value
        return values

    return declare(classifier_fn, full_mark=None, lowest=0.0 if output == "probability" else -LARGEST)


def _find(model: str) -> tuple[str | Path, Any, PreTrainedTokenizerBase]:
    """The classifier's location, config and tokenizer. The weights are not loaded yet."""
    if not isinstance(model, str):
        raise ValueError(f"model: got {model!r}, expected a folder or a name on the Hub")
    try:
        source = find_model(model)
    except InputError as error:
        raise ValueError(str(error).replace("model_name:", "model:", 1)) from error
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers may raise any error for a file of the user
        raise ValueError(f"model: {model!r} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if not any("ForSequenceClassification" in name for name in config.architectures or ()):
        found = ", ".join(config.architectures or ["nothing"])
        raise ValueError(f"model: {model!r} is no sequence classifier, but {found}")
    return source, config, tokenizer


def _num_readable(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The maximum number of tokens per text. The tokenizer's limit counts too: RoBERTa has unusable positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(positions or tokenizer.model_max_length, tokenizer.model_max_length)


def _label_number(label: str | int | None, names: dict[int, str]) -> int:
    allowed = ", ".join(f"{number} ({name})" for number, name in sorted(names.items()))
    if label is None:
        if len(names) == 1:
            return 0
        raise ValueError(f"label: the classifier has {len(names)} of them, so one must be named: {allowed}")
    for number, name in names.items():
        if label == name or (label == number and not isinstance(label, bool)):
            return int(number)
    raise ValueError(f"label: got {label!r}, allowed: {allowed}")


@lru_cache(maxsize=4)  # two datasets of a mixture may use the same classifier
def _load(source: str | Path, device: torch.device, dtype: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=DTYPES[dtype], trust_remote_code=False)
    disable_dropout(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The model scores a text at its last token, which it finds by the pad token. Without one it scores the padding.
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval().requires_grad_(False)


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, reads: str) -> str:
    written = text_of(completion).encode(errors="replace").decode()  # tokenizers refuse half a surrogate pair
    if reads == "completion":
        return written
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        return "".join(message["content"] for message in messages) + written
    messages = [*messages, {"role": "assistant", "content": written}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: BatchEncoding) -> Tensor:
    """The logits of b texts: (b, labels), float32."""
    return model(**inputs.to(model.device)).logits.float()
