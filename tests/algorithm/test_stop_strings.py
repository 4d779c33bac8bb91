"""Texts that end a completion: the mask ends with the token that completes one, the text keeps it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grpo.logprobs import compute_logprobs
from grpo.rollout import generate_completions
from tests.conftest import EOS_ID, PROMPTS, ScriptedCache, ScriptedModel, make_tokenizer, sample


def ids_of(text: str) -> list[int]:
    return make_tokenizer()(text)["input_ids"]


def scripted(*texts: str, **settings: Any) -> Any:
    """What is sampled from a model that writes these texts, one for each prompt."""
    width = max(map(len, texts))
    model = ScriptedModel([ids_of(text) + [EOS_ID] * (width + 1 - len(text)) for text in texts])
    defaults: dict[str, Any] = {"group_size": 2, "max_completion_length": width + 1}
    return generate_completions(model, make_tokenizer(), [[5]] * len(texts), **(defaults | settings))  # type: ignore[arg-type]


def test_a_stop_string_ends_the_completion_and_stays_in_its_text() -> None:
    rollout = scripted("1+1=2/a", "b/", "cc", "//d", stop_strings=["=2/", "/"])
    assert rollout.completions[::2] == ["1+1=2/", "b/", "cc", "/"]
    assert rollout.completion_mask.sum(1).tolist()[::2] == [6, 2, 3, 1]  # "cc" ends with its EOS
    assert not rollout.is_truncated.any()


def test_a_stop_string_at_the_very_end_is_no_truncation() -> None:
    rollout = scripted("ab", "cd", max_completion_length=2, stop_strings=["ab"])
    assert rollout.is_truncated.tolist() == [False, False, True, True]


def test_a_stop_string_is_found_wherever_it_begins() -> None:
    text = "a" * 40 + "stop" + "b" * 5
    rollout = scripted(text, stop_strings=["stop"])
    assert rollout.completions[0] == "a" * 40 + "stop"


def test_without_stop_strings_nothing_changes(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    plain, never = sample(llama, tokenizer), sample(llama, tokenizer, stop_strings=["this is never written"])
    assert torch.equal(plain.completion_ids, never.completion_ids)
    assert torch.equal(plain.sampling_logps, never.sampling_logps)


def test_what_comes_before_is_sampled_as_without_and_scored_as_sampled(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = sample(llama, tokenizer, PROMPTS)
    letters = sorted({text[len(text) // 2] for text in plain.completions if text})
    stopped = sample(llama, tokenizer, PROMPTS, stop_strings=letters)
    assert stopped.completion_mask.sum() < plain.completion_mask.sum()
    for ours, whole, text in zip(stopped.token_lists(), plain.token_lists(), stopped.completions, strict=True):
        assert ours == whole[: len(ours)]
        assert not any(letter in text[:-1] for letter in letters)
    logps, _ = compute_logprobs(llama, *stopped.tokens())
    assert (logps - stopped.sampling_logps).abs().max() < 1e-5


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte: a character of four bytes is four tokens, of which three decode to nothing whole."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@pytest.mark.parametrize("stop", ["\U0001f600", "é!", "\U0001f600\U0001f600"])
def test_a_character_of_several_tokens_is_complete_with_its_last(stop: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé\U0001f601" * 9 + stop + "zz")["input_ids"]
    rollout = generate_completions(
        Echo(ids),  # type: ignore[arg-type]
        tokenizer,
        [[5]],
        group_size=1,
        max_completion_length=len(ids),
        stop_strings=[stop],
    )
    assert rollout.token_lists()[0] == ids[:-2]
    assert rollout.completions[0].endswith(stop)


def test_a_special_token_may_be_a_stop_string() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unk>"]})
    rollout = generate_completions(
        ScriptedModel([[5, 6, 2, 7, 8]]),  # type: ignore[arg-type]
        tokenizer,
        [[5]],
        group_size=1,
        max_completion_length=5,
        stop_strings=["<unk>"],
    )
    assert rollout.token_lists() == [[5, 6, 2]]


class Echo(ScriptedModel):
    """A script in a vocabulary of bytes."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__([ids], eos_token_id=None)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **rest: Any) -> Any:
        cache = past_key_values or ScriptedCache(torch.arange(len(input_ids)))
        cache.num_written += past_key_values is not None
        tokens = self.scripts[cache.rows, cache.num_written]
        logits = 100.0 * torch.nn.functional.one_hot(tokens, 257).float()
        return SimpleNamespace(logits=logits.unsqueeze(1), past_key_values=cache)
