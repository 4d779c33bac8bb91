"""A tiny model learns to write programs that work, from nothing but what the sandbox says of them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo.run.plots
import train_grpo
from grpo.models.saving import save_model
from grpo.models.tiny import build_model, train_tokenizer
from grpo.settings.config import load_config
from tests.run.test_train import read

OPERATORS = {"add": "+", "subtract": "-", "multiply by": "*"}
TASKS = [(word, number) for word in OPERATORS for number in range(2, 10)]


def program(word: str, number: int, right: bool) -> str:
    """Right, or with the operator of another task."""
    operator = OPERATORS[word] if right else {"+": "-", "-": "*", "*": "+"}[OPERATORS[word]]
    return f"def f(n): return n{operator}{number}"


def sample(word: str, number: int) -> dict[str, Any]:
    tests = [f"assert f({n}) == {eval(f'{n}{OPERATORS[word]}{number}')}" for n in (0, 3, 10)]
    return {"prompt": f"{word} {number}: ", "tests": tests}


def base_model(folder: Path) -> None:
    """Warmed up on programs of which one in four is right: it prefers the wrong ones."""
    rng = random.Random(0)
    tokenizer = train_tokenizer([sample(*task)["prompt"] + program(*task, True) for task in TASKS])
    model = build_model(tokenizer, 0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        rows = []
        for _ in range(32):
            word, number = rng.choice(TASKS)
            prompt = tokenizer(sample(word, number)["prompt"])["input_ids"]
            rows.append(
                (prompt, [*tokenizer(program(word, number, rng.random() < 0.25))["input_ids"], tokenizer.eos_token_id])
            )
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((32, width), tokenizer.eos_token_id)
        labels = torch.full((32, width), -100)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 250)
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, folder)


@pytest.mark.slow
def test_a_tiny_model_learns_to_write_programs_that_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)
    base_model(tmp_path / "base")
    held_out = TASKS[::3]
    for name, tasks in (("train", [task for task in TASKS if task not in held_out]), ("eval", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(sample(*task)) + "\n" for task in tasks))
    settings = {
        "model_name": tmp_path / "base",
        "train_file": tmp_path / "train.jsonl",
        "eval_file": tmp_path / "eval.jsonl",
        "rewards": "[{name: code, bare: true, timeout: 2}]",
        "max_completion_length": 24,
        "batch_size": 8,
        "group_size": 8,
        "num_train_steps": 25,
        "learning_rate": 1e-3,
        "eval_every": 5,
        "output_dir": tmp_path / "run",
        "device": "cpu",
    }
    train_grpo.main(load_config(overrides=[f"{key}={value}" for key, value in settings.items()]))
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert 0.05 < rows[1]["answers/right"] < 0.5  # what there is to amplify
    assert rows[0]["eval/accuracy"] <= 0.25
    assert rows[-1]["eval/accuracy"] >= 0.75  # on problems it was not trained on
    assert sum(row["answers/right"] for row in rows[-5:]) / 5 > 0.7
