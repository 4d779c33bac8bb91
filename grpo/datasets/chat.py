"""Prompts -> token ids: through the chat template of the tokenizer, or as they are. Tokenised here, once, for all uses.

chat_template: auto     a tokenizer with a template gets messages: a text becomes the user's one message, behind
                        system_prompt; what opens the assistant's turn (the generation prompt) is added
chat_template: none     texts are tokenised as they stand; messages are refused
chat_template: TEXT     the template itself, or the name of its file, which is read at once; saved with the model
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo.data import Dataset, Prompt
from grpo.errors import InputError


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
    """Give the tokenizer the template that the setting is; auto and none leave it alone."""
    if chat_template not in ("auto", "none"):
        tokenizer.chat_template = chat_template


@dataclass(frozen=True)
class PromptFormat:
    """How prompts become token ids."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str = "none"  # the setting

    @property
    def has_template(self) -> bool:
        """Whether prompts are rendered as a chat."""
        return self.chat_template != "none" and self.tokenizer.chat_template is not None

    def messages(self, prompt: Prompt, system_prompt: str | None) -> list[dict[str, str]]:
        """A text as the user's one message; the system prompt first, where the prompt has none of its own."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system_prompt})
        return messages

    def text(self, prompt: Prompt, system_prompt: str | None = None, *, place: str = "the prompt") -> str:
        """What the model is asked, before it is tokenised.

        Raises:
            InputError: there is no template and the prompt needs one, or the template fails or leaves a message out.
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
            if message["role"] != "assistant" and message["content"].strip() not in text:  # thoughts may well be cut
                raise InputError(f"{place}: chat_template: the template leaves out what the {message['role']} says")
        return text

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Rendered texts -> token ids. A template writes its own special tokens, so none are added to its text."""
        rows: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=not self.has_template)["input_ids"]
        return [self._with_one_bos(ids) for ids in rows]

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        """Two are one too many: the tokenizer's own, and one that template or text brought along."""
        while len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids = ids[1:]
        return ids


def unused_template(tokenizer: PreTrainedTokenizerBase, chat_template: str, prompt: Prompt) -> bool:
    """Whether the tokenizer's template, which `chat_template` leaves aside, would make something else of the prompt."""
    if chat_template != "none" or tokenizer.chat_template is None or not isinstance(prompt, str):
        return False
    return PromptFormat(tokenizer, "auto").text(prompt) != prompt


def tokenized(dataset: Dataset, form: PromptFormat, *, max_prompt_length: int, drop_long: bool = False) -> Dataset:
    """The same samples with "prompt_ids", each at most `max_prompt_length` tokens.

    Args:
        drop_long: leave longer prompts out, and say how many; else they are an error. None is ever cut: that would ask
            another question.
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
