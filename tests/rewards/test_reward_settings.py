"""What a run does with its rewards: combining, scaling, what is kept of the best; a reward tried before training."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reward_model
import train_grpo
from grpo.batch import Batch
from grpo.errors import InputError, RunError
from grpo.rewards.command_line import parse_arguments
from grpo.rewards.scores import scaled
from grpo.settings.config import load_config, warnings_about
from tests.fidelity import test_traps_loss as helpers
from tests.run.test_train import ROOT, _no_pictures, read, small, train  # noqa: F401

run_training, Run = helpers.run_training, helpers.Run  # a fixture, and what it returns
NAN = float("nan")


# Scaling


def test_standardized_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, NAN, 6.0], dtype=torch.float64)
    # mean 3, squares 4 + 1 + 9 = 14, unbiased std sqrt(7) = 2.6457513110645906
    expected = torch.tensor([-2.0, -1.0, NAN, 3.0], dtype=torch.float64) / (7**0.5 + 1e-4)
    torch.testing.assert_close(scaled(rewards, "standardize"), expected, rtol=0, atol=1e-12, equal_nan=True)
    assert rewards[0] == 1.0


@pytest.mark.parametrize("rewards", [[0.95] * 7, [0.1 + 0.2, 0.3], [NAN, NAN], [5.0], [NAN, 2.0]])
def test_rewards_that_are_all_alike_standardize_to_nothing(rewards: list[float]) -> None:
    """Rounding divided by a tiny standard deviation would be a signal of size one."""
    result = scaled(torch.tensor(rewards), "standardize")
    assert result.nan_to_num(0.0).abs().sum() == 0
    assert result.isnan().tolist() == [value != value for value in rewards]


def test_clipped_by_hand() -> None:
    rewards = torch.tensor([-3.0, -0.5, 0.25, 7.0, NAN])
    assert scaled(rewards, "clip", 0.5).nan_to_num(9.0).tolist() == [-0.5, -0.5, 0.25, 0.5, 9.0]
    assert scaled(rewards, "identity") is rewards


def test_what_is_scaled_makes_the_advantages_and_what_is_logged_is_not(run_training: Callable[..., Run]) -> None:
    settings = {"advantage_baseline": "none", "advantage_scale": "none", "surrogate": "reinforce"}
    plain = run_training(**settings)
    rewards = [row["reward"] for row in plain.samples]
    assert [row["advantage"] for row in plain.samples] == pytest.approx(rewards, abs=1e-6)
    clipped = run_training(**settings, reward_scaling="clip", reward_clip=0.3)
    assert max(rewards) > 0.3
    assert [row["reward"] for row in clipped.samples] == rewards
    assert [row["advantage"] for row in clipped.samples] == pytest.approx(
        [min(value, 0.3) for value in rewards], abs=1e-6
    )
    assert clipped.steps[0]["reward"] == plain.steps[0]["reward"]
    standardized = run_training(**settings, reward_scaling="standardize")
    expected = scaled(torch.tensor(rewards), "standardize").tolist()
    assert [row["advantage"] for row in standardized.samples] == pytest.approx(expected, abs=1e-5)
    assert sum(expected) == pytest.approx(0, abs=1e-4)


def test_a_group_that_differs_only_beyond_the_clip_has_no_signal(run_training: Callable[..., Run]) -> None:
    row = run_training(reward_scaling="clip", reward_clip=1e-6).steps[0]
    assert row["frac_reward_zero_std"] == 1.0
    assert row["reward_std"] > 0


def test_dynamic_sampling_replaces_what_has_no_signal_after_scaling() -> None:
    from tests.algorithm.test_resample import Scores, make_rollout  # the same class as everybody's

    def batch(rewards: list[float], **settings: Any) -> Batch:
        combined = torch.tensor(rewards)
        scores = Scores({"a": combined}, combined, combined, combined.bool(), combined)
        config = dataclasses.replace(load_config(), **settings)
        return Batch([{"prompt": "p"}] * 2, make_rollout([[1]] * 4, [[2]] * 4), scores, config)

    rewards = [5.0, 9.0, 0.0, 1.0]
    clip = {"reward_scaling": "clip", "reward_clip": 2.0}
    assert batch(rewards).zero_variance_groups.tolist() == [False, False]
    assert batch(rewards, **clip).zero_variance_groups.tolist() == [True, False]
    assert batch(rewards, **clip).rewards.tolist() == [[2.0, 2.0], [0.0, 1.0]]


def test_combine_reaches_training_and_evaluation(run_training: Callable[..., Run], tmp_path: Path) -> None:
    rewards = "['letters_reward:letters', {name: 'tests.toy_rewards:even_digits', weight: 3}]"
    by_how = {}
    for how in ("sum", "mean", "product"):
        run = run_training(rewards=rewards, combine=how)
        terms = [(row["rewards"]["letters_reward:letters"], row["rewards"]["tests.toy_rewards:even_digits"])
                 for row in run.samples]  # fmt: skip
        by_how[how] = [row["reward"] for row in run.samples], terms
    for how, formula in {
        "sum": lambda a, b: a + 3 * b, "mean": lambda a, b: (a + 3 * b) / 4, "product": lambda a, b: a * 3 * b,
    }.items():  # fmt: skip
        combined, terms = by_how[how]
        assert combined == pytest.approx([formula(a, b) for a, b in terms], abs=1e-5)
    evaluations = [read(tmp_path / f"run-{number}" / "metrics.jsonl")[0]["eval/reward"] for number in range(3)]
    assert len(set(evaluations)) == 3  # the base's, before any training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["combine=max"], 'combine: "max" is not a valid choice. Use sum, mean or product.'),
        (["reward_scaling=norm"], 'reward_scaling: "norm" is not a valid choice. Use identity, standardize or clip.'),
        (["reward_scaling=clip"], 'reward_clip: needed for reward_scaling "clip". Use a number above 0.'),
        (
            ["reward_clip=1"],
            'reward_clip: 1.0 has no effect with reward_scaling "identity". Use reward_scaling clip, or leave '
            "reward_clip out.",
        ),
        (["reward_scaling=clip", "reward_clip=0"], "reward_clip: 0.0 is not positive. Use a number above 0."),
        (["save_threshold=high"], 'save_threshold: "high" is not a number. Use a number such as 0.5.'),
    ],
)
def test_wrong_settings_are_named(changes: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        load_config(overrides=changes)
    assert str(raised.value) == message


def test_what_is_seldom_meant_is_said() -> None:
    said = warnings_about(load_config(overrides=["reward_scaling=standardize"]))
    assert any("advantage_scale group divides by the standard deviation anyway" in text for text in said)
    assert not warnings_about(load_config(overrides=["reward_scaling=standardize", "advantage_scale=none"]))
    said = warnings_about(load_config(overrides=["rewards=[math, {name: length, target: 99, slope: 1}]"]))
    assert any(
        "its target of 99 tokens cannot be reached, because max_completion_length is 28" in text for text in said
    )


# The best


def test_completions_above_the_threshold_are_kept_by_themselves(
    small: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    train(small | {"save_threshold": 0.0}, folder)
    samples, kept = read(folder / "samples.jsonl"), read(folder / "high_scoring.jsonl")
    keys = ("step", "prompt", "completion", "answer", "reward", "rewards")
    expected = [{key: row[key] for key in keys} for row in samples if row["reward"] > 0]
    assert kept == expected
    assert 0 < len(kept) < len(samples)
    assert {row["step"] for row in kept} == {1, 2}
    equal = sorted(row["reward"] for row in kept)[0]
    train(small | {"save_threshold": equal}, tmp_path / "higher")
    assert all(row["reward"] > equal for row in read(tmp_path / "higher" / "high_scoring.jsonl"))


def test_without_a_threshold_there_is_no_such_file(small: dict[str, Any], tmp_path: Path) -> None:
    train(small, tmp_path / "run")
    assert not (tmp_path / "run" / "high_scoring.jsonl").exists()


def test_a_resumed_run_keeps_each_of_them_once(small: dict[str, Any], tmp_path: Path) -> None:
    from grpo.settings.config import Options, resumed_config

    settings = small | {"save_threshold": 0.0, "num_train_steps": 3, "save_every": 1, "keep_checkpoints": 3}
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(settings, whole)
    train(settings, again)
    for step in (2, 3):  # as if killed after the third step, with the first one saved
        import shutil

        shutil.rmtree(again / f"step-{step:06d}")
    facts = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps(facts | {"finished": None}))
    with (again / "high_scoring.jsonl").open("a") as file:
        file.write('{"step": 4, "prompt": "half a li')
    train_grpo.main(resumed_config(None, [f"output_dir={again}"]), Options(resume=True))
    assert (again / "high_scoring.jsonl").read_bytes() == (whole / "high_scoring.jsonl").read_bytes()
    assert {row["step"] for row in read(whole / "high_scoring.jsonl")} == {1, 2, 3}


# Rewards with bugs


BUGGY = '''
calls = 0

def late(what):
    def fn(prompts, completions, **_):
        """Fine before training (the pre-flight, the evaluation) and in the first step, wrong in the second."""
        global calls
        calls += len(set(prompts)) < len(prompts)  # groups, not the held-out problems
        values = [float(len(text)) for text in completions]
        if calls < 3:
            return values
        if what == "raises":
            raise KeyError("level")
        if what == "count":
            return values[:-1]
        values[1] = {"nan": float("nan"), "text": "good"}[what]
        return values
    return fn

raises, count, nan, text = (late(what) for what in ("raises", "count", "nan", "text"))

def never(prompts, completions, **_):
    return [None] * len(prompts)

def in_groups(prompts, completions, **_):
    return [None if len(set(prompts)) == len(prompts) else 1.0 for _ in prompts]
'''


@pytest.fixture
def buggy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"buggy_{tmp_path.name}".replace("[", "_").replace("]", "_")
    (tmp_path / f"{name}.py").write_text(BUGGY)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raises", r"reward \S+:raises raised KeyError: 'level' \(\S+.py, line \d+\)"),
        ("count", r"reward \S+:count returned 15 values for 16 completions"),
        ("nan", r"reward \S+:nan returned nan for '.+', expected a finite number or None"),
        ("text", r"reward \S+:text returned 'good' for '.+', expected a finite number or None"),
    ],
)
def test_a_reward_that_goes_wrong_ends_the_run_by_name_and_what_was_learned_is_saved(
    small: dict[str, Any],
    tmp_path: Path,
    buggy: str,
    what: str,
    message: str,
) -> None:
    folder = tmp_path / "run"
    changes = {"rewards": f"['{buggy}:{what}']", "eval_metric": "eval/reward", "save_every": 50, "num_train_steps": 4}
    with pytest.raises(RunError, match=message + r".*step 1 is saved; to go on: python train_grpo.py --resume"):
        train(small | changes, folder)
    assert (folder / "step-000001").is_dir()
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [0, 1]


def test_a_reward_that_never_applies_is_said_before_training(
    small: dict[str, Any],
    tmp_path: Path,
    buggy: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewards = f"['tests.toy_rewards:even_digits', '{buggy}:never']"
    rows = train(small | {"rewards": rewards, "num_train_steps": 1}, tmp_path / "run")
    assert f"The reward {buggy}:never applies to none of these completions." in capsys.readouterr().out
    assert rows[1][f"rewards/{buggy}:never/mean"] is None


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("never", "rewards: none of them applies to any of the first step's 16 completions: nothing to learn"),
        ("in_groups", "rewards: none of them applies to any row of eval_file"),
    ],
)
def test_rewards_that_never_apply_are_wrong_input(
    small: dict[str, Any], tmp_path: Path, buggy: str, reward: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(small | {"rewards": f"['{buggy}:{reward}']", "eval_metric": "eval/reward"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# python -m reward_model


def written(tmp_path: Path, data: list[Any], completions: list[Any], *flags: str) -> list[str]:
    """The command's arguments, for files with these rows."""
    for name, rows in (("data", data), ("completions", completions)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--data={tmp_path}/data.jsonl", f"--completions={tmp_path}/completions.jsonl", *flags]


@pytest.fixture
def tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """tried(data, completions, flag, ...): the lines it prints."""

    def run(data: list[Any], completions: list[Any], *flags: str) -> list[str]:
        arguments = written(tmp_path, data, completions, *flags)
        reward_model.main(*parse_arguments(reward_model.__doc__, arguments))
        return capsys.readouterr().out.splitlines()

    return run


DATA = [{"prompt": "What is 2 + 3?", "answer": 5}, {"prompt": "What is 1 + 1?", "answer": 2}]


def test_a_reward_is_tried_row_by_row(tried: Callable[..., list[str]]) -> None:
    completions = [{"completion": "2+3=5 5"}, {"completion": "so\n3"}]
    assert tried(DATA, completions, "--rewards=[math, {name: format, weight: 2}]") == [
        "  row    reward      math    format  right  completion",
        "    1     1.000     1.000     0.000    yes  2+3=5 5",
        "    2     0.000     0.000     0.000     no  so 3",
        " mean     0.500     0.500     0.000  0.500  2 completions",
    ]


def test_completions_may_name_their_prompts_and_lengths_are_the_tokenizers(tried: Callable[..., list[str]]) -> None:
    completions = [{"prompt": DATA[1]["prompt"], "completion": text, "step": 3} for text in ("2", "11", "2")]
    lines = tried(DATA, completions, "--rewards=[math, {name: overlong, max_length: 2, cache: 1}]")
    assert [line.split()[:5] for line in lines[1:4]] == [
        ["2", "0.000", "1.000", "-1.000", "yes"],  # two tokens: 2 and the stop token
        ["2", "-1.000", "0.000", "-1.000", "no"],
        ["2", "0.000", "1.000", "-1.000", "yes"],
    ]


def test_of_equal_prompts_the_answer_says_which_row(tried: Callable[..., list[str]]) -> None:
    data = [DATA[0], DATA[0] | {"answer": 6}, DATA[0]]
    completions = [{"prompt": DATA[0]["prompt"], "completion": "6", "answer": answer} for answer in (5, 6)]
    lines = tried(data, completions, "--rewards=[math]")
    assert [line.split()[:2] for line in lines[1:3]] == [["1", "0.000"], ["2", "1.000"]]


def test_fewer_completions_than_rows_belong_to_the_first_rows(tried: Callable[..., list[str]]) -> None:
    lines = tried(DATA, [{"completion": "5"}], "--rewards=[math]")
    assert [line.split()[:2] for line in lines[1:]] == [["1", "1.000"], ["mean", "1.000"]]


def test_why_a_program_earns_no_more_is_said(tried: Callable[..., list[str]]) -> None:
    tests = ["assert f(1) == 1", {"input": "", "output": "2"}]
    programs = [
        "def f(n): return n\nprint(2)",
        "def f(n): return n\nprint(3)",
        "def f(n): raise ValueError",
        "import no",
    ]
    completions = [{"completion": f"```python\n{program}\n```"} for program in programs] + [{"completion": "f"}]
    lines = tried([{"prompt": "p", "tests": tests}] * 5, completions, "--rewards=[code]")
    assert [line.strip() for line in lines if line.strip().startswith("code: ")] == [
        "code: printed '3\\n', expected '2'",
        "code: assert 1: ValueError",
        "code: assert 1: ModuleNotFoundError: No module named 'no'",
        "code: no block of Python",
    ]


def test_what_looks_wrong_is_said(tried: Callable[..., list[str]]) -> None:
    lines = tried(DATA, [{"completion": "a"}, {"completion": "b"}], "--rewards=[math, 'tests.toy_rewards:never']")
    assert lines[-2:] == [
        "The reward tests.toy_rewards:never applies to none of these completions.",
        "All of them earn the same: there is nothing to learn from such completions.",
    ]
    assert " - " in lines[1]


@pytest.mark.parametrize(
    ("data", "completions", "flags", "message"),
    [
        (DATA, [{"completion": "5"}] * 3, [], 'completions.jsonl: 3 lines without a "prompt", but'),
        (DATA, [{"text": "5"}] * 2, [], 'completions.jsonl, line 1: "completion": got None, expected a text'),
        (DATA, [{"completion": "5", "prompt": "?"}], [], "completions.jsonl, line 1: \"prompt\": '?' is in no row of"),
        (DATA, [{"completion": "5", "prompt": DATA[0]["prompt"]}, {"completion": "5"}], [], "1 of 2 lines have"),
        (DATA, [], [], "completions.jsonl: has no completions"),
        (
            [DATA[0], DATA[0] | {"answer": 6}],
            [{"completion": "5", "prompt": DATA[0]["prompt"]}],
            [],
            'completions.jsonl, line 1: "prompt": 2 rows of',
        ),
        (
            DATA,
            [{"completion": "5", "prompt": DATA[0]["prompt"], "answer": 7}],
            [],
            'completions.jsonl, line 1: "answer": no row of',
        ),
        ([{"prompt": "p"}], [{"completion": "5"}], [], 'data.jsonl, line 1: has no "answer", which reward math needs'),
        (DATA, [{"completion": "5"}] * 2, ["--rewards=[maths]"], "rewards: got 'maths', allowed: math"),
        (DATA, [{"completion": "5"}] * 2, ["--config=configs/mixture.yaml"], "--data: got"),
    ],
)
def test_wrong_input_is_named(
    tried: Callable[..., list[str]], data: list, completions: list, flags: list[str], message: str
) -> None:
    with pytest.raises(InputError) as raised:
        tried(data, completions, *flags)
    assert message in str(raised.value)


def test_wrong_input_is_one_line_and_said_at_once(tmp_path: Path) -> None:
    for flags, message in (
        ("--reward=[math]", "--reward: not a setting; did you mean --rewards?"),
        ("--k=1", "--k: not"),
    ):
        command = [sys.executable, "-m", "reward_model", *written(tmp_path, DATA, [], flags)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {message}")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("print('x')", 1, "standard output cannot be written to: Broken pipe"),
        ("print('x' * 10**6)", 1, "standard output cannot be written to: Broken pipe"),
        ("print('x'); raise InputError('wrong')", 2, "wrong"),
        ("print('x'); raise RunError('failed')", 1, "failed"),
    ],
)
def test_a_reader_that_has_gone_is_one_line(code: str, status: int, message: str) -> None:
    """`| head` reads some lines and closes the pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    assert explained(code, writing) == (status, f"error: {message}\n")
    os.close(writing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_an_output_that_is_full_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        message = "error: standard output cannot be written to: No space left on device\n"
        assert explained("print('x')", full.fileno()) == (1, message)


def test_an_output_that_is_closed_is_no_error() -> None:
    assert explained("print('x')", None) == (0, "")


def explained(code: str, stdout: int | None) -> tuple[int, str]:
    """Exit status and standard error of a command."""
    code = f"from grpo.errors import InputError, RunError, errors_explained\nwith errors_explained():\n    {code}"
    closed = [] if stdout is not None else ["sh", "-c", 'exec "$@" >&-', "sh"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [*closed, sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stderr
