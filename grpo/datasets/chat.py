"""Turn prompts into token ids, with or without a chat template. Each prompt is tokenised once, in this file.

chat_template: auto     use the tokenizer's template, if it has one. A text becomes one user message, after the
                        system_prompt. The generation prompt, which opens the assistant's turn, is added.
chat_template: none     texts are tokenised unchanged; messages are refused
chat_template: TEXT     the template itself, or the name of a file with it, which is read when the config is loaded;
                        the template is saved with the model
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo.data import Dataset, Prompt
from grpo.errors import InputError


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
    """Give the tokenizer the template of the setting. auto and none do not change the tokenizer."""
    if chat_template not in ("auto", "none"):
        tokenizer.chat_template = chat_template


@dataclass(frozen=True)
class PromptFormat:
    """How prompts become token ids."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str = "none"  # the setting `chat_template`

    @property
    def has_template(self) -> bool:
        """Whether prompts are rendered as a chat."""
        return self.chat_template != "none" and self.tokenizer.chat_template is not None

    def messages(self, prompt: Prompt, system_prompt: str | None) -> list[dict[str, str]]:
        """The prompt as messages. A text becomes one user message. `system_prompt` is added if the prompt has none."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system_prompt})
        return messages

    def text(self, prompt: Prompt, system_prompt: str | None = None, *, place: str = "the prompt") -> str:
        """The prompt as the text that will be tokenised.

        Raises:
            InputError: the prompt needs a template but there is none, or the template fails or leaves out a message.
        """
        if not self.has_template:
            why = "none" if self.chat_template == "none" else "auto, and the tokenizer has no template"
            if not isinstance(prompt, str):
                raise InputError(f"{place}: messages need a chat template, but chat_template is {why}")
            if system_prompt is not None:
                raise InputError(f"system_prompt: needs a chat template, but chat_template is {why}")
            return prompt
        messages = self.messages(prompt, system_prompt)
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[assignment]
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(
                f"{place}: chat_template: cannot be applied: {' '.join(str(error).split())[:200]}"
            ) from error
        for message in messages:
            # A template may remove the thoughts of earlier assistant messages, so these are not checked.
            if message["role"] != "assistant" and message["content"].strip() not in text:
                raise InputError(f"{place}: chat_template: the template leaves out what the {message['role']} says")
        return text

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise rendered texts. A template writes its own special tokens, so none are added to its texts."""
        rows: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=not self.has_template)["input_ids"]
        return [self._with_one_bos(ids) for ids in rows]

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        """Remove a duplicate BOS: the tokenizer may add one to a text that already begins with one."""
        while len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids = ids[1:]
        return ids


def unused_template(tokenizer: PreTrainedTokenizerBase, chat_template: str, prompt: Prompt) -> bool:
    """Whether `chat_template: none` ignores a template of the tokenizer that would change the prompt."""
    if chat_template != "none" or tokenizer.chat_template is None or not isinstance(prompt, str):
        return False
    return PromptFormat(tokenizer, "auto").text(prompt) != prompt


def tokenized(dataset: Dataset, form: PromptFormat, *, max_prompt_length: int, drop_long: bool = False) -> Dataset:
    """The samples with "prompt_ids", each with at most `max_prompt_length` tokens.

    Args:
        drop_long: leave out longer prompts and print how many; if false, a longer prompt is an error. Prompts are never
            truncated, because a truncated prompt asks another question.
    """
    texts = [
        form.text(sample["prompt"], sample.get("system_prompt"), place=dataset.place(index))
        for index, sample in enumerate(dataset)
    ]
    rows = form.ids(texts)
    for index, ids in enumerate(rows):
        if not ids:
            raise InputError(f"{dataset.place(index)}: the prompt has no tokens")
    longest = max(range(len(rows)), key=lambda index: len(rows[index]))
    if len(rows[longest]) > max_prompt_length and not drop_long:
        raise InputError(
            f"{dataset.place(longest)}: the longest prompt has {len(rows[longest])} tokens, max_prompt_length allows "
            f"{max_prompt_length} (long_prompts: drop leaves such prompts out)"
        )
    kept = [index for index, ids in enumerate(rows) if len(ids) <= max_prompt_length]
    if not kept:
        raise InputError(
            f"{dataset.path}: every prompt has more than the {max_prompt_length} tokens of max_prompt_length"
        )
    if len(kept) < len(rows):
        num_long = len(rows) - len(kept)
        print(f"{dataset.path}: {num_long} of {len(rows)} prompts have more than {max_prompt_length} tokens: left out")
    return Dataset(dataset.path, [(dataset.place(i), dataset[i] | {"prompt_ids": rows[i]}) for i in kept])
