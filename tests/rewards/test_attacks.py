"""Every reward under every attack: none earns more than an honest wrong answer, and none takes long."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from reward_model import REWARDS, Reward, load_rewards, score_completions
from tests.attacks import PLACES, SIZE, attacks
from tests.conftest import VOCABULARY, later_slow, make_tokenizer
from tests.rewards.test_sandbox import CHEATS

SAMPLE = {
    "prompt": "What is 12 + 25? Answer with an integer.",
    "answer": "37",
    "tests": ["assert add(12, 25) == 37", "assert add(1, -4) == -3", {"input": "12 25", "output": "37"}],
}
ALL = dict(attacks(SAMPLE["prompt"], SAMPLE["answer"]))
ALL |= {f"cheat: {name}": f"```python\n{program}\n```" for name, program in CHEATS.items()}
ALL |= {f"cheat, add: {name}": f"```python\n{program}\nadd = f\n```" for name, program in CHEATS.items()}
WRONG = PLACES["tags"].format(36)
PROGRAM = "```python\ndef add(a, b):\n    return a * b + 7\nprint(add(*map(int, input().split())))\n```"
# name -> arguments, an honest wrong completion, what it earns
CASES: dict[str, tuple[dict[str, Any], str, float]] = {
    "math": ({}, "36", 0.0),
    "gsm8k": ({}, "#### 36", 0.0),
    "boxed": ({}, "\\boxed{36}", 0.0),
    "correctness": ({}, WRONG, 0.0),
    "integer": ({}, WRONG, 0.5),
    "xml_count": ({}, WRONG, 0.5),
    "soft_format": ({}, WRONG, 0.5),
    "strict_format": ({}, WRONG, 0.5),
    "format": ({}, WRONG, 0.5),
    "length": ({"target": len(WRONG.split()), "slope": 0.01}, WRONG, 1.0),
    "overlong": ({"max_length": 300, "cache": 50}, WRONG, 0.0),
    "repetition": ({}, WRONG, 0.0),
    "code": ({"timeout": 1.0}, PROGRAM, 0.0),
    "classifier": ({}, "12+25=36", 1.0),
}
FAST = ("gsm8k", "boxed", "correctness", "format")
VARIANTS = later_slow(
    [
        *((name, {}) for name in FAST),
        ("boxed", {"symbolic": True}),
        *((name, {}) for name in CASES if name not in FAST),
        ("gsm8k", {"lenient": True}),
        ("repetition", {"ngram_size": 40}),
        ("boxed", {"symbolic": False}),
        ("format", {"pattern": r"(?s)<reasoning>(\s*.*?)+</reasoning>\s*<answer>(.*?)+</answer>\s*"}),
        ("format", {"pattern": r"(?s)\s*<reasoning>\n.*\n</reasoning>\n<answer>\n\d+\n</answer>\s*"}),
        ("code", {"timeout": 1.0, "mode": "all", "bare": True}),
    ],
    1 + len(FAST),
)


def test_every_reward_is_attacked() -> None:
    assert set(CASES) == set(REWARDS)
    assert len(ALL) > 300
    assert max(map(len, ALL.values())) > SIZE


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier that likes whatever ends with a digit: it has no layer, and reads the last token alone."""
    folder = tmp_path_factory.mktemp("classifier")
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=0,
        num_attention_heads=2,
        num_labels=2,
        id2label={0: "bad", 1: "good"},
        max_position_embeddings=4096,
    )
    model = LlamaForSequenceClassification(config)
    digits = torch.tensor([token in set("0123456789") for token in VOCABULARY])
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = torch.where(digits, 1.0, -1.0)
        model.score.weight.zero_()
        model.score.weight[1, 0] = 10.0
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)
    return str(folder)


def loaded(name: str, arguments: dict[str, Any], classifier: str) -> Reward:
    if name == "classifier":
        arguments = {"model": classifier, "label": "good", "max_length": 2048} | arguments
    (reward,) = load_rewards([{"name": name, **CASES[name][0], **arguments}])
    return reward


def values(reward: Reward, completions: list[str]) -> list[float]:
    """A token a word."""
    ids = [[hash(word) & 0xFFFFFF for word in text.split()] or [0] for text in completions]
    return score_completions([reward], [SAMPLE] * len(completions), completions, ids).combined.tolist()


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_no_attack_earns_more_than_an_honest_wrong_answer(
    name: str, arguments: dict[str, Any], classifier: str
) -> None:
    reward = loaded(name, arguments, classifier)
    honest = values(reward, [CASES[name][1]])[0]
    assert honest == pytest.approx(CASES[name][2], abs=1e-4)
    earned = dict(zip(ALL, values(reward, list(ALL.values())), strict=True))
    assert all(math.isfinite(value) for value in earned.values())
    assert {attack: value for attack, value in earned.items() if value > honest + 1e-6} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_a_text_of_100_kilobytes_takes_no_more_than_50_milliseconds(
    name: str, arguments: dict[str, Any], classifier: str
) -> None:
    """All that is asked of a reward for one completion; the best of some, a busy machine is no fault of its."""
    if name in ("code", "classifier"):  # these have limits of their own: a program's timeout, max_length tokens
        arguments = {**arguments, "timeout": 0.5} if name == "code" else {**arguments, "max_length": 512}
        allowed, texts = (
            3.0,
            {"huge": "1" * SIZE, "huge code": f"```python\n{'x = 1' + chr(10)}{'y = 2;' * 20_000}\n```"},
        )
    else:
        allowed, texts = 0.05, {attack: text for attack, text in ALL.items() if len(text) >= SIZE}
    reward = loaded(name, arguments, classifier)

    def seconds(text: str) -> float:
        ids = [list(map(ord, text))]  # as many tokens as there can be
        start = time.perf_counter()
        reward.fn(
            prompts=[SAMPLE["prompt"]], completions=[text], completion_ids=ids, answer=["37"], tests=[SAMPLE["tests"]]
        )
        reward.has_answer(text)
        if reward.is_correct_leniently is not None:
            reward.is_correct_leniently(SAMPLE, text)
        return time.perf_counter() - start

    slow = {attack: text for attack, text in texts.items() if seconds(text) > allowed}
    assert [
        attack for attack, text in slow.items() if min(seconds(text + " " * n) for n in range(1, 9)) > allowed
    ] == []


def test_the_attacks_are_no_straw_men(tmp_path: Path) -> None:
    """Rewards as they are often written fall to them."""
    naive = {
        "substring": lambda text: "37" in text,
        "any number": lambda text: "37" in text.replace(",", " ").split(),
        "tags counted": lambda text: all(text.count(tag) >= 1 for tag in ("<reasoning>", "</reasoning>", "<answer>")),
        "isdigit": lambda text: text.strip().isdigit() and int(text) == 37,
    }
    for name, reward in naive.items():
        assert any(reward(text) for text in ALL.values()), name
