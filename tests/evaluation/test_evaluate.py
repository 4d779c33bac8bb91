"""evaluate.py as a user starts it, and the numbers behind it by hand."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import evaluate
import grpo.evaluation.measure
import grpo.run.plots
from grpo.datasets.rows import JSONLinesDataset
from grpo.errors import InputError
from grpo.evaluation.greedy import Evaluation, count_correct
from grpo.evaluation.measure import answer, measure
from grpo.evaluation.preflight import outcome_shares, pick_examples, preflight
from grpo.evaluation.report import compare, table
from grpo.evaluation.statistics import mcnemar, pass_at_k, wilson_interval
from grpo.models.loading import load_policy
from grpo.rollout import Rollout, generate_completions
from grpo.settings.command_line import parse_command_line
from grpo.settings.config import TYPES, Config, load_config
from reward_model import load_rewards, score_completions
from tests.run import test_train as helpers
from tests.run.test_train import ROOT, train

small = helpers.small  # the fixture

NAN = float("nan")

# Right where the completion has an even number of characters: about half of what an untrained model writes.
LUCKY = "def fn(prompts, completions, **_):\n    return [1.0 - len(text) % 2 for text in completions]\n"

REPORTED = {
    "model", "data", "n", "accuracy", "accuracy_low", "accuracy_high", "pass_at_1", "pass_at_k", "k", "mean_length",
    "clipped_ratio", "reward", "rewards", "accuracy_lenient", "accuracy_lenient_low", "accuracy_lenient_high",
    "datasets",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a reward of its own and a base to compare with; lucky.py lies beside it."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "lucky.py").write_text(LUCKY)
    settings = small | {"rewards": "[lucky:fn]", "learning_rate": 0.05, "warmup_steps": 0, "group_size": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(grpo.run.plots, "_save", lambda figure, path: None)
        train(settings, folder / "run", num_train_steps=3)
    return folder / "run"


def command(trained: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """evaluate.py, with lucky.py to be found."""
    return subprocess.run(
        [sys.executable, "evaluate.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(trained.parent)},
        capture_output=True,
        text=True,
    )


def assert_one_line(result: subprocess.CompletedProcess[str], *texts: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert [text for text in texts if text not in last] == []


# The command


@pytest.mark.slow
def test_two_models_side_by_side(trained: Path, small: dict[str, Any], tmp_path: Path) -> None:
    """Everything in the file is worked out again, from this process and from other numbers in the file."""
    base, output = small["model_name"], tmp_path / "numbers.json"
    result = command(trained, trained / "final", "--compare", base, "--output", output)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert set(report) == REPORTED | {"compare", "comparison"}
    assert set(report["compare"]) == REPORTED
    # the settings are those of the run
    assert (report["model"], report["compare"]["model"]) == (str(trained / "final"), base)
    assert (report["data"], report["n"], report["k"]) == (small["eval_file"], 20, 8)
    assert set(report["rewards"]) == {"lucky:fn"}
    assert report["mean_length"] <= 6
    for numbers in (report, report["compare"]):
        assert numbers["accuracy"] == numbers["reward"] == pytest.approx(numbers["rewards"]["lucky:fn"])
        bounds = (numbers["accuracy_low"], numbers["accuracy_high"])
        assert bounds == pytest.approx(wilson_interval(round(20 * numbers["accuracy"]), 20))
        assert 0 < numbers["pass_at_1"] < numbers["pass_at_k"] <= 1
        assert f"{numbers['accuracy']:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]" in result.stdout
    comparison = report["comparison"]
    only_first, only_second = len(comparison["only_first"]), len(comparison["only_second"])
    assert only_first + only_second > 0
    assert only_first - only_second == round(20 * (report["accuracy"] - report["compare"]["accuracy"]))
    n, fewer = only_first + only_second, min(only_first, only_second)
    assert comparison["mcnemar_p"] == min(1.0, 2 * sum(comb(n, i) for i in range(fewer + 1)) / 2**n)
    assert f"{only_first} problems only {trained / 'final'} solves, {only_second} only {base}" in result.stdout
    assert f"p = {comparison['mcnemar_p']:.2g}" in result.stdout


@pytest.mark.slow
def test_flags_change_what_the_run_recorded(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "What is 1 + 1?", "answer": "2"}\n' * 3)
    flags = ["--data", tmp_path / "mine.jsonl", "--k", 2, "--max_completion_length", 3, "--rewards", "[math]"]
    result = command(trained, trained / "best", *flags, "--output", tmp_path / "numbers.json")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "numbers.json").read_text())
    assert (report["data"], report["n"], report["k"]) == (str(tmp_path / "mine.jsonl"), 3, 2)
    assert set(report["rewards"]) == {"math"}
    assert report["mean_length"] <= 3
    assert "comparison" not in report
    assert str(tmp_path / "numbers.json") in result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_one_question_gets_one_answer_and_no_file(trained: Path, tmp_path: Path) -> None:
    result = command(trained, trained / "final", "--prompt", "What is 1 + 2?", "--output", tmp_path / "numbers.json")
    assert result.returncode == 0, result.stderr
    config = load_config(recorded=json.loads((trained / "run.json").read_text())["settings"])
    assert result.stdout == answer(str(trained / "final"), "What is 1 + 2?", config) + "\n"
    assert not (tmp_path / "numbers.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        (["tiny", "--k=0"], ["--k: got 0, allowed: >= 1"]),
        (["tiny", "--comprae=x"], ["--comprae: not a setting; did you mean --compare?"]),
        (["/nowhere/final", "--rewards=[math]"], ["MODEL: there is no folder '/nowhere/final'"]),
        (["tiny", "--data=missing.jsonl"], ["missing.jsonl: cannot be read: No such file or directory"]),
    ],
    ids=["k", "unknown flag", "missing model", "missing data"],
)
def test_wrong_input_ends_in_one_line(trained: Path, flags: list[str], texts: list[str]) -> None:
    assert_one_line(command(trained, *flags), *texts)


@pytest.mark.slow
def test_an_output_that_cannot_be_written_ends_in_one_line(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "no" / "such" / "folder" / "numbers.json"
    assert_one_line(command(trained, trained / "final", "--output", output), "--output", str(output.parent))


# What the arguments mean


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[Any, Config]:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    return evaluate.parse_arguments()


def test_settings_come_from_the_run_beside_the_model(
    trained: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("final", "best", "step-000003"):
        _, config = parsed(monkeypatch, trained / name)
        assert (config.max_completion_length, config.rewards) == (6, ["lucky:fn"])
        assert (config.eval_file, config.group_size) == (small["eval_file"], 6)
    _, config = parsed(monkeypatch, trained / "final", "--group_size", 9, "--data", "other.jsonl")
    assert (config.max_completion_length, config.group_size, config.eval_file) == (6, 9, "other.jsonl")
    _, config = parsed(monkeypatch, small["model_name"])  # no run.json beside it
    assert config == load_config()
    _, config = parsed(monkeypatch, "tiny")
    assert config == load_config()


def test_a_settings_file_stands_between_the_run_and_the_flags(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more.yaml").write_text("max_completion_length: 5\ngroup_size: 2\n")
    _, config = parsed(monkeypatch, trained / "final", "--config", tmp_path / "more.yaml", "--group_size", 3)
    assert (config.max_completion_length, config.group_size, config.rewards) == (5, 3, ["lucky:fn"])


# The functions


def score_with(specs: list[Any]) -> Callable[..., Any]:
    rewards = load_rewards(specs)

    def score(samples: Sequence[dict[str, Any]], rollout: Rollout) -> Any:
        return score_completions(rewards, samples, rollout.completions, rollout.token_lists())

    return score


def test_measure_by_hand(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy, pass@1 and pass@k from texts that are generated and judged here."""
    (tmp_path / "lucky_too.py").write_text(LUCKY)
    monkeypatch.syspath_prepend(tmp_path)
    specs = ["lucky_too:fn", {"name": "math", "weight": 0.5}]
    config = load_config(None, [f"{key}={value}" for key, value in small.items()] + ["seed=4"])
    dataset = JSONLinesDataset(small["eval_file"])
    evaluation, report = measure(small["model_name"], dataset, {None: load_rewards(specs)}, config, 3)

    model, tokenizer = load_policy(small["model_name"], base_seed=0, base_steps=1, device=torch.device("cpu"))
    prompts = [sample["prompt"] for sample in dataset]
    greedy = generate_completions(
        model, tokenizer, prompts, group_size=1, max_completion_length=6, temperature=0.0
    ).completions
    sampled = generate_completions(model, tokenizer, prompts, group_size=3, max_completion_length=6, seed=4).completions
    right = [len(text) % 2 == 0 for text in greedy]
    counts = [sum(len(text) % 2 == 0 for text in sampled[3 * i : 3 * i + 3]) for i in range(20)]
    assert evaluation.completions == greedy
    assert evaluation.is_correct == right
    assert 0 < sum(right) < 20
    assert report["accuracy"] == sum(right) / 20
    assert report["pass_at_1"] == pytest.approx(sum(counts) / 60)
    assert report["pass_at_k"] == pytest.approx(sum(count > 0 for count in counts) / 20)
    assert (report["n"], report["k"], report["rewards"]["math"]) == (20, 3, 0.0)
    assert report["rewards"]["lucky_too:fn"] == pytest.approx(sum(right) / 20)
    assert set(report) == REPORTED


def test_what_is_undefined_is_null_in_the_file(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not NaN, which is no JSON; nor 0, which would be a result."""
    (tmp_path / "silent_one.py").write_text("def fn(prompts, completions, **_):\n    return [None] * len(prompts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    output = tmp_path / "numbers.json"
    arguments, config = parsed(
        monkeypatch, small["model_name"], "--output", output, "--k", 2, "--rewards", "[silent_one:fn, math]",
        "--eval_file", small["eval_file"], "--max_completion_length", 3,
    )  # fmt: skip
    evaluate.main(arguments, config)

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} in the file")

    report = json.loads(output.read_text(), parse_constant=refuse)
    assert [report[name] for name in ("n", "accuracy", "accuracy_low", "pass_at_1", "pass_at_k")] == [0] + [None] * 4
    assert report["rewards"] == {"silent_one:fn": None, "math": 0.0}
    assert "accuracy, greedy, n = 0 [95 %]" in capsys.readouterr().out


def reports() -> list[dict[str, Any]]:
    first = {
        "model": "a", "n": 10, "accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75, "pass_at_1": 0.4,
        "pass_at_k": 0.9, "k": 4, "mean_length": 3.25, "clipped_ratio": 0.125, "rewards": {"math": 0.5},
    }  # fmt: skip
    undefined = dict.fromkeys(["accuracy", "accuracy_low", "accuracy_high", "pass_at_1", "pass_at_k"])
    return [first, first | undefined | {"model": "checkpoints/a-long-name", "rewards": {"math": NAN}}]


def test_the_table_has_a_column_a_model() -> None:
    lines = table(reports()).split("\n")
    assert len({len(line) for line in lines}) == 1
    cells = [line.split("  ")[-1].strip() for line in lines]
    assert cells[:4] == ["checkpoints/a-long-name", "undefined", "undefined", "undefined"]
    text = {line.strip().partition("  ")[0]: line for line in lines}
    assert "0.500 [0.250, 0.750]" in text["accuracy, greedy, n = 10 [95 %]"]
    assert "0.900" in text["pass@4, temperature 1"]
    assert "0.400" in text["pass@1, temperature 1"]
    assert "12.5%" in text["cut off"]


def evaluation_of(verdicts: Sequence[bool | None]) -> Evaluation:
    texts = [f"text {index}" for index in range(len(verdicts))]
    return Evaluation(texts, list(verdicts), 0.0, {}, 1.0, 0.0, 0.0)


def test_compare_counts_what_exactly_one_model_solves(tmp_path: Path) -> None:
    """1 against 9: p = 2 (C(10, 0) + C(10, 1)) / 2^10 = 22 / 1024."""
    first = [True] * 1 + [False] * 9 + [True, True, False, None, True, None, False]
    second = [False] * 1 + [True] * 9 + [True, True, False, True, None, None, None]
    lines = [json.dumps({"prompt": f"problem {index}"}) for index in range(len(first))]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    dataset = JSONLinesDataset(tmp_path / "data.jsonl")
    result, said = compare(["one", "two"], dataset, [evaluation_of(first), evaluation_of(second)])
    assert result == {
        "only_first": ["problem 0"],
        "only_second": [f"problem {index}" for index in range(1, 10)],
        "mcnemar_p": 22 / 1024,
    }
    assert "1 problems only one solves, 9 only two: McNemar's test, two-sided, exact: p = 0.021" in said
    assert "Only two solves (the first 5 of 9)" in said
    assert "problem 5" in said
    assert "problem 6" not in said


def test_mcnemar_by_enumeration() -> None:
    """Twice the share of all sequences of coin flips with so few heads, 1 at most."""
    for only_first in range(7):
        for only_second in range(7):
            n, fewer = only_first + only_second, min(only_first, only_second)
            few = sum(flips.bit_count() <= fewer for flips in range(2**n))
            assert mcnemar(only_first, only_second) == min(1, 2 * Fraction(few, 2**n))


@pytest.mark.parametrize(
    ("only_first", "only_second", "expected"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 1, 1.0), (0, 6, 2 / 64), (9, 1, 22 / 1024), (1, 9, 22 / 1024)],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, expected: float) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx(expected, abs=1e-15)


def test_mcnemar_of_many_problems_is_a_number() -> None:
    assert mcnemar(3000, 3000) == 1.0
    assert 0 < mcnemar(1000, 1300) < 1e-8


def test_count_right_does_not_depend_on_the_batches(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [{"prompt": prompt} for prompt in ("1+2=", "a", "3*4-5=", "?", "12", "b")]
    seen = []

    def score(batch: Sequence[dict[str, Any]], rollout: Rollout) -> Any:
        seen.append(len(batch))
        rights = [
            NAN if sample["prompt"] == "?" else float(len(text) % 2 == 0)
            for sample, text in zip(batch, rollout.completions, strict=True)
        ]
        return SimpleNamespace(is_correct=torch.tensor(rights))

    def counts(batch_rows: int, seed: int = 0) -> list[int | None]:
        return count_correct(
            llama, tokenizer, samples, score, k=4, max_completion_length=6, batch_rows=batch_rows, seed=seed
        )

    expected = counts(24)
    assert expected[3] is None
    assert len(set(expected)) > 2
    for batch_rows in (1, 4, 7, 8, 23, 1000):
        seen.clear()
        assert counts(batch_rows) == expected
        assert max(seen) == max(4, min(24, batch_rows // 4 * 4))
    assert any(counts(24, seed) != expected for seed in (1, 2, 3))
    whole = generate_completions(
        llama, tokenizer, [sample["prompt"] for sample in samples], group_size=4, max_completion_length=6, seed=0
    )
    assert expected[5] == sum(len(text) % 2 == 0 for text in whole.completions[20:])


def test_pass_at_k_of_the_counts_is_unbiased_in_k() -> None:
    assert [pass_at_k(4, 1, k) for k in (1, 2, 3, 4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def scores_of(rights: list[float], combined: list[float] | None = None, has_answer: list[bool] | None = None) -> Any:
    return SimpleNamespace(
        is_correct=torch.tensor(rights),
        combined=torch.tensor(rights if combined is None else combined),
        has_answer=torch.tensor(has_answer or [True] * len(rights)),
        by_name={},
    )


def test_outcome_shares_by_hand() -> None:
    # right | right, though cut off | cut off | cut off without an answer | wrong | no answer | two that do not count
    rights = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, NAN, NAN]
    has_answer = [True, True, True, False, True, False, True, False]
    is_truncated = torch.tensor([False, True, True, True, False, False, True, False])
    assert outcome_shares(scores_of(rights, has_answer=has_answer), is_truncated) == {
        "answers/right": 2 / 6, "answers/wrong": 1 / 6, "answers/none": 1 / 6, "answers/truncated": 2 / 6,
    }  # fmt: skip


def test_outcome_shares_of_nothing_are_no_columns() -> None:
    assert outcome_shares(scores_of([NAN, NAN]), torch.tensor([True, False])) == {}


def preflight_of(rights: list[float], combined: list[float] | None = None, num_cut: int = 0) -> list[str]:
    """Groups of two; the lines."""
    samples = [{"prompt": f"problem {p}", "answer": f"{p}"} for p in range(len(rights) // 2)]
    rollout: Any = SimpleNamespace(
        completions=[f"completion {row}" for row in range(len(rights))],
        is_truncated=torch.arange(len(rights)) < num_cut,
    )

    def score(batch: Sequence[dict[str, Any]], _: Rollout) -> Any:
        assert [sample["prompt"] for sample in batch] == [f"problem {row // 2}" for row in range(len(rights))]
        return scores_of(rights, combined)

    return preflight(samples, rollout, score).split("\n")


def test_preflight_counts_kinds_of_groups_and_shows_a_right_completion() -> None:
    first, question, shown, *advice = preflight_of([0, 0, 1, 1, 0, 1, NAN, 1, NAN, NAN, NAN, 0], num_cut=3)
    assert first == (
        "pre-flight: 6 groups of 2 from the base: 2 all right, 1 mixed, 2 all wrong, 1 not scored; "
        "25% of the completions cut off"
    )
    assert question == "  problem 1   (answer: 1)"
    assert shown == "    reward 1.00  completion 2"
    assert advice == []


def test_preflight_says_when_the_base_can_do_it_already() -> None:
    assert preflight_of([1, 1, 1, 1])[-1] == "  No group is mixed: the base can do this already. Try harder problems."


def test_preflight_says_when_problems_are_either_too_easy_or_too_hard() -> None:
    for rights in ([1, 1, 1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0, 0, 0]):
        assert "every problem is solved always or never" in preflight_of(rights)[-1]


def test_preflight_says_when_nothing_is_ever_right() -> None:
    *_, shown, advice = preflight_of([0, 0, 0, 0], num_cut=2)
    assert shown == "    reward 0.00  completion 0"
    assert "never found a right answer" in advice
    assert "group_size" in advice
    assert "max_completion_length" not in advice
    assert "max_completion_length" in preflight_of([0, 0, 0, 0], num_cut=3)[-1]


def test_preflight_says_when_the_first_reward_applies_to_nothing() -> None:
    first, *_, advice = preflight_of([NAN] * 4, combined=[0.0] * 4)
    assert "0 all right, 0 mixed, 0 all wrong, 2 not scored" in first
    assert "the first of the rewards applies to none of these rows" in advice


def test_preflight_says_when_there_is_a_signal_all_the_same() -> None:
    *_, last = preflight_of([0, 0, 0, 0], combined=[0.1, 0.2, 0.3, 0.3])
    assert last == "  In 1 of 2 groups the rewards still differ, so there is a signal."


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([True, False, True, None, False], [1, 3, 4]),
        ([True, True, False, True], [2, 0, 1]),
        ([True, True, True, True], [0, 1, 2]),
        ([False, True], [0, 1]),
    ],
)
def test_examples_are_those_with_most_to_learn(verdicts: list[bool | None], expected: list[int]) -> None:
    assert pick_examples(evaluation_of(verdicts)) == [
        {"index": index, "completion": f"text {index}"} for index in expected
    ]
    assert len(pick_examples(evaluation_of(verdicts), num_examples=1)) == 1


def test_preflight_shows_the_terms_of_a_sum_of_rewards() -> None:
    rollout: Any = SimpleNamespace(completions=["a", "b"], is_truncated=torch.tensor([False, False]))
    scores = scores_of([0.0, 1.0], combined=[0.1, 1.1])
    scores.by_name = {"math": torch.tensor([0.0, 1.0]), "mine": torch.tensor([0.5, 0.5])}
    shown = preflight([{"prompt": "p"}], rollout, lambda *_: scores).split("\n")[2]
    assert shown == "    reward 1.10 (math 1.00, mine 0.50)  b"


def test_a_help_names_every_setting_once_and_fits_its_usage_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for parse in (lambda: parse_command_line("", ["--help_all"]), evaluate.parse_arguments):
        monkeypatch.setattr(sys, "argv", ["x", "--help_all"])
        with pytest.raises(SystemExit) as raised:
            parse()
        assert raised.value.code == 0
        text = capsys.readouterr().out
        assert all(text.count(f"\n  --{key} X") == 1 for key in TYPES)
        assert "--KEY VALUE" in text.splitlines()[0]


# Mixtures and adapters


def test_a_mixture_is_reported_by_data_set_and_leniently(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two models, one of them an adapter; every number from the answers themselves."""
    (tmp_path / "three.py").write_text(
        "def fn(prompts, completions, **_):\n    return [1.0 * (len(text) % 3 == 0) for text in completions]\n"
        "fn.is_correct_leniently = lambda sample, text: len(text) % 3 < 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entries = [
        {"path": small["train_file"], "eval_path": small["eval_file"], "name": "sums", "rewards": ["three:fn"]},
        {"path": small["eval_file"], "eval_path": small["train_file"], "name": "more", "rewards": ["lucky_mix:fn"]},
    ]
    (tmp_path / "lucky_mix.py").write_text(LUCKY)
    mixture = {key: small[key] for key in small.keys() - {"train_file", "eval_file", "rewards"}}
    mixture |= {"datasets": json.dumps(entries), "lora_rank": 2, "learning_rate": 0.05, "eval_metric": "eval/reward"}
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)
    train(mixture, tmp_path / "run")
    output = tmp_path / "numbers.json"
    arguments, config = parsed(
        monkeypatch, tmp_path / "run" / "final", "--compare", small["model_name"], "--output", output, "--k", 2
    )
    evaluate.main(arguments, config)
    said = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["n"] == 60
    assert {name: part["n"] for name, part in report["datasets"].items()} == {"sums": 20, "more": 40}
    sums, more = report["datasets"]["sums"], report["datasets"]["more"]
    assert report["accuracy"] == pytest.approx((20 * sums["accuracy"] + 40 * more["accuracy"]) / 60)
    assert report["accuracy_lenient"] == sums["accuracy_lenient"] >= sums["accuracy"]
    assert "accuracy_lenient" not in more
    for line in ("sums, n = 20", "more, n = 40", "sums, wherever the answer stands", "McNemar's test, two-sided"):
        assert line in said
    assert (
        report["accuracy"] != report["compare"]["accuracy"] or report["mean_length"] != report["compare"]["mean_length"]
    )
    assert not list(tmp_path.glob("*.unfinished.jsonl"))
    # One file of the mixture is judged as the run judged it; another file needs to be told how.
    _, config = parsed(monkeypatch, tmp_path / "run" / "final", "--data", small["train_file"])
    assert (config.rewards, config.eval_file, config.datasets) == (["lucky_mix:fn"], small["train_file"], None)
    with pytest.raises(InputError, match=r"--data: other\.jsonl is of none of the run's data sets.*add --rewards"):
        parsed(monkeypatch, tmp_path / "run" / "final", "--data", "other.jsonl")


def test_a_stopped_command_says_how_to_go_on(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "numbers.json"
    arguments, config = parsed(
        monkeypatch, small["model_name"], "--output", output, "--k", 2, "--eval_file", small["eval_file"],
        "--max_completion_length", 3,
    )  # fmt: skip
    monkeypatch.setattr(
        grpo.evaluation.measure, "count_correct", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped; the same command goes on with the answers in .*numbers\.json"
    ):
        evaluate.main(arguments, config)
    assert (tmp_path / "numbers.json.unfinished.jsonl").read_text().count("\n") > 0
    assert not output.exists()
    monkeypatch.undo()
    evaluate.main(arguments, config)
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_the_numbers_from_a_notebook_are_those_of_the_command(small: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(None, [f"{key}={value}" for key, value in small.items()])
    report = evaluate.evaluate_model(small["model_name"], config, k=2)
    assert set(report) == REPORTED
    assert report["k"] == 2
