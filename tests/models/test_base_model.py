"""The tiny base model: its tokenizer, its two styles of answer, its cache."""

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.datasets.rows import JSONLinesDataset
from grpo.models import tiny as base_model
from grpo.models.tiny import (
    build_model,
    encode_all,
    styled_answer,
    supervised_loss,
    tiny_base_model,
    train_tokenizer,
    worked_answer,
)
from grpo.settings.config import load_config
from reward_model import last_integer

PROMPT = "What is 12 - 7? Answer with an integer."


@pytest.fixture(scope="module")
def dataset() -> JSONLinesDataset:
    return JSONLinesDataset(base_model.TRAIN_FILE)


@pytest.fixture(scope="module")
def tokenizer(dataset: JSONLinesDataset):
    return train_tokenizer([sample["prompt"] for sample in dataset])


@pytest.fixture
def quick_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own; two warm-up steps are enough here."""
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path))
    return tmp_path


def test_digits_are_single_tokens_and_pad_is_not_eos(tokenizer) -> None:
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for digit in "0123456789":
        assert len(tokenizer(digit)["input_ids"]) == 1
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("99+89=188 1")["input_ids"])
    assert [token for token in tokens if any(map(str.isdigit, token))] == list("99891881")


@pytest.mark.parametrize(
    "text", [PROMPT, "7+8=15 4+3+1=8 85", "é — 東京 \U0001f600\n\ttabs", "  two  spaces  ", "<eos"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_single_user_message_renders_as_the_plain_prompt(tokenizer) -> None:
    message = {"role": "user", "content": PROMPT}
    assert tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True) == PROMPT
    answered = tokenizer.apply_chat_template([message, {"role": "assistant", "content": "5"}], tokenize=False)
    assert answered == PROMPT + "5" + tokenizer.eos_token


def all_problems() -> list[tuple[int, str, int]]:
    sums = [(a, "+", b) for a in range(100) for b in range(100)]
    return sums + [(a, "-", b) for a in range(100) for b in range(a + 1)]


def test_worked_answers_are_right_in_every_step() -> None:
    for a, operator, b in all_problems():
        text = worked_answer(a, operator, b)
        assert last_integer(text) == str(a + b if operator == "+" else a - b)
        steps = re.findall(r"(\d+)([+-])(\d+)(?:\+(\d+))?=(\d+)", text)
        assert len(steps) == 2
        for left, sign, right, carry, result in steps:
            total = int(left) + (int(right) if sign == "+" else -int(right)) + int(carry or 0)
            assert total == int(result)


def test_every_worked_answer_fits_the_default_length(tokenizer) -> None:
    texts = [worked_answer(*problem) for problem in all_problems()]
    longest = max(map(len, tokenizer(texts)["input_ids"])) + 1  # and eos
    assert longest <= 28


def test_styles_come_in_the_shares_asked_for(dataset: JSONLinesDataset) -> None:
    rng = random.Random(0)
    sample = {"prompt": "What is 47 + 38? Answer with an integer.", "answer": "85"}
    answers = [styled_answer(sample, 0.1, rng) for _ in range(4000)]
    worked = sum("=" in answer for answer in answers)
    assert set(answers) == {"7+8=15 4+3+1=8 85", "85", "84", "86", "75", "95"}
    assert abs(worked / 4000 - 0.1) < 4 * (0.09 / 4000) ** 0.5
    assert abs(answers.count("85") / (4000 - worked) - 0.5) < 4 * (0.25 / 3600) ** 0.5


def test_every_text_of_the_warm_up_is_tokenised_beforehand(dataset: JSONLinesDataset, tokenizer) -> None:
    token_ids = encode_all(dataset, tokenizer)
    rng = random.Random(0)
    samples = [rng.choice(dataset) for _ in range(2000)]
    texts = {sample["prompt"] for sample in samples}
    texts |= {styled_answer(sample, worked_share, rng) for sample in samples for worked_share in (0.0, 0.5)}
    assert len(texts) > 1000
    for text in texts:
        assert token_ids[text] == tokenizer(text)["input_ids"]


def test_the_supervised_loss_is_that_of_transformers(tokenizer) -> None:
    """One row at a time, without padding; the eos that ends an answer is learned, the prompt is not."""
    model, eos = build_model(tokenizer, base_seed=0), tokenizer.eos_token_id
    prompts, answers = [[5, 6, 7], [8], [9, 10]], [[20], [21, 22, 23], []]
    total, num_tokens = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        labels = [-100] * len(prompt) + [*answer, eos]
        total += model(torch.tensor([[*prompt, *answer, eos]]), labels=torch.tensor([labels])).loss.item() * (
            len(answer) + 1
        )
        num_tokens += len(answer) + 1
    assert supervised_loss(model, prompts, answers, eos).item() == pytest.approx(total / num_tokens, abs=1e-5)
    assert supervised_loss(model, prompts, answers, eos + 3).item() != pytest.approx(total / num_tokens, abs=1e-3)


def test_the_model_is_an_ordinary_folder_of_the_stated_size(quick_recipe: Path) -> None:
    folder = tiny_base_model(0, 2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 100_000 <= model.num_parameters() <= 200_000
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert list(folder.glob("*.safetensors"))


def test_the_second_run_starts_at_once_and_another_seed_is_another_model(
    quick_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_base_model(0, 2)
    weights = (folder / "model.safetensors").read_bytes()
    assert (tiny_base_model(1, 2) / "model.safetensors").read_bytes() != weights

    def fail(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(base_model, "warm_up", fail)
    assert tiny_base_model(0, 2) == folder


def test_the_same_seed_builds_the_same_weights(quick_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = (tiny_base_model(3, 2) / "model.safetensors").read_bytes()
    monkeypatch.setenv("GRPO_CACHE", str(quick_recipe / "other"))
    assert (tiny_base_model(3, 2) / "model.safetensors").read_bytes() == first


def test_a_half_written_cache_is_never_used(quick_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        assert not list(quick_recipe.glob("tiny-*"))  # the weights are written, and not under the final name
        raise KeyboardInterrupt

    saved = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", killed)  # after the weights are written
    with pytest.raises(KeyboardInterrupt):
        tiny_base_model(0, 2)
    assert not list(quick_recipe.iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("GRPO_CACHE", str(quick_recipe))
    assert saved(tiny_base_model(0, 2)).num_parameters() > 0


@pytest.mark.slow
def test_a_changed_recipe_is_another_model(
    quick_recipe: Path, monkeypatch: pytest.MonkeyPatch, dataset: JSONLinesDataset
) -> None:
    folder = tiny_base_model(0, 2)
    changed = quick_recipe / "train.jsonl"
    changed.write_bytes(base_model.TRAIN_FILE.read_bytes() + b"\n")
    monkeypatch.setattr(base_model, "TRAIN_FILE", changed)
    assert tiny_base_model(0, 2) != folder


def test_the_default_number_of_steps_is_the_recipes() -> None:
    assert load_config().base_steps == base_model.NUM_STEPS


def test_building_does_not_touch_the_callers_random_state(tokenizer) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(tokenizer, base_seed=0)
    assert torch.equal(torch.rand(3), expected)
