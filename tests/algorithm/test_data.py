"""The task's files and how a run reads them."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from grpo.data import Dataset, samples_for_step
from grpo.datasets.chat import PromptFormat, tokenized
from grpo.datasets.rows import JSONLinesDataset
from grpo.errors import InputError
from grpo.models.tiny import train_tokenizer
from tests.conftest import numbered

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {"train": 8000, "eval": 500, "test": 500}


def operands(prompt: str) -> tuple[int, str, int]:
    _, _, a, operator, b, *rest = prompt.replace("?", " ?").split()
    assert rest == ["?", "Answer", "with", "an", "integer."]
    return int(a), operator, int(b)


def problems(name: str) -> list[tuple[int, str, int]]:
    return [operands(sample["prompt"]) for sample in JSONLinesDataset(ROOT / f"data/math_tasks_{name}.jsonl")]


def test_the_script_reproduces_the_files_byte_for_byte(tmp_path: Path) -> None:
    script = tmp_path / "make_math_tasks.py"
    script.write_bytes((ROOT / "data/make_math_tasks.py").read_bytes())
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    for name in SPLITS:
        file = f"math_tasks_{name}.jsonl"
        assert (tmp_path / file).read_bytes() == (ROOT / "data" / file).read_bytes()


@pytest.mark.parametrize("name", SPLITS)
def test_every_answer_is_right_and_no_difference_is_negative(name: str) -> None:
    samples = list(JSONLinesDataset(ROOT / f"data/math_tasks_{name}.jsonl"))
    assert len(samples) == SPLITS[name]
    assert len({sample["prompt"] for sample in samples}) == len(samples)
    for sample in samples:
        assert set(sample) == {"prompt", "answer"}
        a, operator, b = operands(sample["prompt"])
        assert 0 <= a <= 99
        assert 0 <= b <= 99
        answer = {"+": a + b, "-": a - b}[operator]
        assert answer >= 0
        assert sample["answer"] == str(answer)


def test_no_problem_and_no_commuted_form_is_in_two_files() -> None:
    def forms(name: str) -> set[tuple[int, str, int]]:
        own = set(problems(name))
        return own | {(b, operator, a) for a, operator, b in own if operator == "+"}

    train, held_out, test = forms("train"), forms("eval"), forms("test")
    assert not train & held_out
    assert not train & test
    assert not held_out & test


@pytest.mark.parametrize("name", SPLITS)
def test_problems_are_drawn_uniformly(name: str) -> None:
    """The share of sums is 10,000 of 15,050 within 4 standard errors, and so is the share of carries among them."""
    drawn = problems(name)
    sums = [(a, b) for a, operator, b in drawn if operator == "+"]
    expected = 10_000 / 15_050
    assert abs(len(sums) / len(drawn) - expected) < 4 * (expected * (1 - expected) / len(drawn)) ** 0.5
    carries = sum(a % 10 + b % 10 > 9 for a, b in sums) / len(sums)
    assert abs(carries - 0.45) < 4 * (0.45 * 0.55 / len(sums)) ** 0.5


def test_all_problems_are_15050() -> None:
    spec = importlib.util.spec_from_file_location("make_math_tasks", ROOT / "data/make_math_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flat = [problem for fact in module.all_facts() for problem in fact]
    assert len(flat) == len(set(flat)) == 15_050


def test_samples_are_a_function_of_seed_and_step() -> None:
    dataset = numbered(100)
    first = samples_for_step(dataset, step=3, batch_size=8, seed=1)
    samples_for_step(dataset, step=50, batch_size=8, seed=9)
    assert samples_for_step(dataset, step=3, batch_size=8, seed=1) == first
    assert samples_for_step(dataset, step=3, batch_size=8, seed=2) != first
    assert samples_for_step(dataset, step=4, batch_size=8, seed=1) != first


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order() -> None:
    dataset = numbered(10)
    steps = [samples_for_step(dataset, step=step, batch_size=4, seed=0) for step in range(1, 6)]  # two epochs
    seen = [sample["prompt"] for step in steps for sample in step]
    assert Counter(seen[:10]) == Counter(seen[10:]) == Counter(str(number) for number in range(10))
    assert seen[:10] != seen[10:]


def test_no_epoch_of_a_seed_is_an_epoch_of_its_neighbour() -> None:
    """Orders by seed + epoch would show seed 1 what seed 0 sees one epoch later: runs that should be independent."""
    dataset = numbered(20)

    def order(seed: int, epoch: int) -> tuple[str, ...]:
        batch = samples_for_step(dataset, step=epoch + 1, batch_size=len(dataset), seed=seed)  # step = epoch
        return tuple(sample["prompt"] for sample in batch)

    assert order(0, epoch=1) != order(1, epoch=0)
    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


def test_a_batch_larger_than_the_data_spans_epochs() -> None:
    dataset = Dataset("x", [("1", {"prompt": "a"}), ("2", {"prompt": "b"})])
    batch = [sample["prompt"] for sample in samples_for_step(dataset, step=1, batch_size=6, seed=0)]
    assert Counter(batch) == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt"', r"line 2: not JSON"),
        ('{"prompt": "a"}\n\n[1]\n', r"line 3: got list, expected a JSON object"),
        ('{"question": "a"}\n', r'line 1: has no "prompt"; it has question'),
        ('{"prompt": ""}\n', r'line 1: "prompt" must be a text that is not empty'),
        ('{"prompt": "\\ud83d"}\n', r'line 1: "prompt" has half a surrogate pair'),
        (f'{{"prompt": "a", "answer": {"1" * 5000}}}\n', r"line 1: not JSON: Exceeds the limit"),
        ("[" * 100_000, r"line 1: not JSON: maximum recursion depth"),
        ("\n\n", r"has no samples"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        JSONLinesDataset(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing.jsonl: cannot be read: No such file"):
        JSONLinesDataset(tmp_path / "missing.jsonl")


def test_unicode_line_separators_do_not_split_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [sample["prompt"] for sample in JSONLinesDataset(path)] == ["a\u2028b\x85c"]


def test_a_prompt_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "12"}\n{"prompt": "1234567"}\n')
    form = PromptFormat(train_tokenizer(["1 2"]))
    assert len(tokenized(JSONLinesDataset(path), form, max_prompt_length=7)) == 2
    with pytest.raises(InputError, match=r"line 2: the longest prompt has 7 tokens, max_prompt_length allows 6"):
        tokenized(JSONLinesDataset(path), form, max_prompt_length=6)
