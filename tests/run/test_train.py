"""train_grpo.py as a user starts it, on a small untrained model: what it writes, says and refuses."""

import contextlib
import copy
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo.evaluation.greedy
import grpo.run.plots
import grpo.run.setup
import train_grpo
from grpo.algorithms import ALGORITHMS
from grpo.batch import zero_variance_has_no_gradient
from grpo.data import samples_for_step
from grpo.datasets.rows import JSONLinesDataset
from grpo.errors import InputError, errors_explained
from grpo.fast.noise import step_seed
from grpo.models.loading import load_policy
from grpo.models.saving import save_model
from grpo.models.tiny import build_model, train_tokenizer
from grpo.rollout import generate_completions
from grpo.settings.config import Options, load_config, resumed_config
from reward_model import REWARDS
from tests.conftest import later_slow, loop_function, patch_loop
from tests.toy_rewards import different_letters

ROOT = Path(__file__).resolve().parents[2]

EVERY_STEP = {
    "step", "loss", "reward", "reward_std", "rewards/math/mean", "rewards/math/std", "frac_reward_zero_std",
    "completions/mean_length", "completions/clipped_ratio", "kl", "entropy", "clip_ratio/low_mean",
    "clip_ratio/high_mean", "sampling/logp_difference/mean", "sampling/logp_difference/max", "grad_norm",
    "learning_rate", "num_tokens", "num_completions", "step_time", "rollout_time", "reward_time", "update_time",
    "answers/right", "answers/wrong", "answers/none", "answers/truncated",
}  # fmt: skip
CLOCKS = {"step_time", "rollout_time", "reward_time", "update_time"}
EVERY_EVALUATION = {
    "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/reward", "eval/mean_length", "eval/clipped_ratio",
    "eval/time",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run of two steps that takes seconds."""
    folder = tmp_path_factory.mktemp("small")
    samples = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(5) for b in range(12)]
    for name, part in [("train", samples[:40]), ("eval", samples[40:])]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in part))
    tokenizer = train_tokenizer([sample["prompt"] for sample in samples])
    save_model(build_model(tokenizer, 0), tokenizer, folder / "model")
    return {
        "model_name": str(folder / "model"),
        "train_file": str(folder / "train.jsonl"),
        "eval_file": str(folder / "eval.jsonl"),
        "num_train_steps": 2,
        "batch_size": 4,
        "group_size": 4,
        "max_completion_length": 6,
        "rewards": "[tests.toy_rewards:even_digits]",
        "device": "cpu",
    }


def run(settings: dict[str, Any], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, as a user types it."""
    flags = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "train_grpo.py", *flags, f"--output_dir={folder}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def train(settings: dict[str, Any], folder: Path, **changes: object) -> list[dict[str, Any]]:
    """The same within this process; returns the rows of metrics.jsonl."""
    settings = settings | changes | {"output_dir": folder}
    train_grpo.main(load_config(None, [f"{key}={value}" for key, value in settings.items()]))
    return read(folder / "metrics.jsonl")


def resume(folder: Path, **changes: object) -> list[dict[str, Any]]:
    """`--resume`, within this process."""
    config = resumed_config(None, [f"output_dir={folder}"] + [f"{key}={value}" for key, value in changes.items()])
    train_grpo.main(config, Options(resume=True))
    return read(folder / "metrics.jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()


@pytest.mark.slow
def test_a_run_leaves_behind_what_the_readme_says(small: dict[str, Any], tmp_path: Path) -> None:
    result = run(small | {"rewards": "[math]"}, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert set(rows[0]) == {"step"} | EVERY_EVALUATION
    assert set(rows[1]) == EVERY_STEP
    assert set(rows[2]) == EVERY_STEP | EVERY_EVALUATION
    assert all(math.isfinite(value) for row in rows for value in row.values())
    samples = read(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 2 * 16
    assert set(samples[0]) == {
        "step", "prompt", "completion", "answer", "reward", "rewards", "advantage", "is_truncated",
    }  # fmt: skip
    assert [sample["prompt"] for sample in samples[:4]] == [samples[0]["prompt"]] * 4  # rows of a group stand together
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["group_size"] == 4
    final = tmp_path / "run" / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert "held-out accuracy" in result.stdout


def test_the_first_update_has_ratio_1_and_the_sampler_agrees_with_the_scorer(
    small: dict[str, Any], tmp_path: Path
) -> None:
    rows = train(small, tmp_path / "run")
    assert rows[1]["kl"] == 0.0  # the policy still is the reference
    assert rows[2]["kl"] > 0.0
    for row in rows[1:]:
        assert row["clip_ratio/low_mean"] == row["clip_ratio/high_mean"] == 0.0
        assert row["sampling/logp_difference/max"] < 1e-5
        assert row["grad_norm"] > 0
    assert rows[1]["learning_rate"] == pytest.approx(5e-4 / 6)  # the rate that step used


def test_the_same_command_gives_the_same_bits(small: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(small, tmp_path / name)
    assert (tmp_path / "a/samples.jsonl").read_bytes() == (tmp_path / "b/samples.jsonl").read_bytes()
    assert (tmp_path / "a/final/model.safetensors").read_bytes() == (
        tmp_path / "b/final/model.safetensors"
    ).read_bytes()
    train(small, tmp_path / "c", seed=1)
    assert (tmp_path / "a/samples.jsonl").read_bytes() != (tmp_path / "c/samples.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_nothing_depends_on_the_micro_batch_size(small: dict[str, Any], tmp_path: Path, aggregation: str) -> None:
    """Metrics and weights; one step, because a second one would sample from weights that differ by rounding."""
    settings = small | {"num_train_steps": 1, "loss_aggregation": aggregation, "mask_truncated_completions": True}
    expected = train(settings, tmp_path / "all", micro_batch_size=16)[1]
    cuts: dict[str, dict[str, Any]] = {str(size): {"micro_batch_size": size} for size in (1, 3, 5)}
    cuts |= {f"{tokens} tokens": {"micro_batch_tokens": tokens} for tokens in (1, 100)}
    for name, cut in cuts.items():
        row = train(settings, tmp_path / name, **cut)[1]
        for key in EVERY_STEP - {*CLOCKS, "rewards/math/mean", "rewards/math/std"}:
            assert row[key] == pytest.approx(expected[key], abs=2e-6, rel=1e-4), key
    for name, weight in weights_of(tmp_path / "all").items():
        # Adam's first step moves every weight by about the learning rate, whatever the gradient's size: the sign of a
        # gradient near 0 is rounding, so nearly all weights agree, not all.
        for cut in ("1", "100 tokens"):
            close = torch.isclose(weights_of(tmp_path / cut)[name], weight, atol=1e-6)
            assert close.float().mean() > 0.98, (name, cut)


def test_several_updates_a_rollout_move_the_ratio(small: dict[str, Any], tmp_path: Path) -> None:
    """old_logps are those of the rollout, so the second minibatch and the second pass see ratios other than 1."""
    tight = {"clip_range": 1e-6, "learning_rate": 1e-2, "warmup_steps": 0, "num_train_steps": 1}
    tight["rewards"] = "[tests.toy_rewards:different_letters]"  # so that both minibatches have a signal
    one = train(small | tight, tmp_path / "one")[1]
    minibatches = train(small | tight, tmp_path / "minibatches", num_minibatches=2)[1]
    iterations = train(small | tight, tmp_path / "iterations", num_iterations=2)[1]
    assert one["clip_ratio/low_mean"] + one["clip_ratio/high_mean"] == 0.0
    assert minibatches["clip_ratio/low_mean"] + minibatches["clip_ratio/high_mean"] > 0.0
    assert iterations["clip_ratio/low_mean"] + iterations["clip_ratio/high_mean"] > 0.0
    # the sampler's log-probs are compared with the policy before its first step, not with the moved one
    assert max(minibatches["sampling/logp_difference/max"], iterations["sampling/logp_difference/max"]) < 1e-5


def test_without_kl_there_is_no_reference(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise AssertionError("a reference was made")

    patch_loop(monkeypatch, "make_reference", fail)
    rows = train(small, tmp_path / "run", kl_coeff=0)
    assert all("kl" not in row for row in rows)


def test_the_reference_stays_frozen_unless_told_otherwise(small: dict[str, Any], tmp_path: Path) -> None:
    fixed = train(small, tmp_path / "fixed", num_train_steps=3)
    moving = train(small, tmp_path / "moving", num_train_steps=3, ref_update_every=1)
    assert [row["kl"] > 0 for row in fixed[1:]] == [False, True, True]
    assert [row["kl"] > 0 for row in moving[1:]] == [False, False, False]  # the reference is the policy of the rollout


def test_rewards_of_another_kind_are_logged_by_name(small: dict[str, Any], tmp_path: Path) -> None:
    rewards = "[{name: math, weight: 0}, {name: 'tests.toy_rewards:even_digits', weight: 0.5}]"
    row = train(small, tmp_path / "run", rewards=rewards)[1]
    assert row["reward"] == pytest.approx(0.5 * row["rewards/tests.toy_rewards:even_digits/mean"])
    assert row["rewards/math/mean"] == 0.0


def test_masked_truncated_completions_are_not_trained_on(small: dict[str, Any], tmp_path: Path) -> None:
    """At length 1 an untrained model hardly ever stops, so everything is masked: loss 0 and finite gradients."""
    changes = {"max_completion_length": 1, "mask_truncated_completions": True, "num_train_steps": 1, "seed": 1}
    row = train(small, tmp_path / "run", **changes)[1]
    assert row["completions/clipped_ratio"] == 1.0
    assert row["loss"] == row["grad_norm"] == row["kl"] == row["entropy"] == 0.0


def test_bfloat16_runs_on_a_cpu_with_float32_weights(small: dict[str, Any], tmp_path: Path) -> None:
    rows, exact = train(small, tmp_path / "run", dtype="bfloat16"), train(small, tmp_path / "exact", dtype="float32")
    assert rows[1]["clip_ratio/low_mean"] == rows[1]["clip_ratio/high_mean"] == 0.0
    assert rows[1]["kl"] == 0.0
    assert rows[1]["sampling/logp_difference/mean"] < 0.05
    assert rows[1]["entropy"] != exact[1]["entropy"]  # rounding, so the path was taken
    assert rows[1]["entropy"] == pytest.approx(exact[1]["entropy"], rel=0.02)
    assert {weight.dtype for weight in weights_of(tmp_path / "run").values()} == {torch.float32}


def test_the_evaluation_is_of_held_out_problems_and_greedy(small: dict[str, Any], tmp_path: Path) -> None:
    """Against transformers' own greedy decoding; the training problems would give another number."""
    row = train(small, tmp_path / "run", num_train_steps=0, rewards="[tests.toy_rewards:different_letters]")[0]
    policy, tokenizer = load_policy(small["model_name"], base_seed=0, device=torch.device("cpu"))
    rewards = {}
    for file in ("eval_file", "train_file"):
        prompts = [sample["prompt"] for sample in JSONLinesDataset(small[file])]
        texts = []
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            answer = policy.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
            texts.append(tokenizer.decode(answer, skip_special_tokens=True))
        rewards[file] = mean(different_letters(prompts, texts))
    assert row["eval/reward"] == pytest.approx(rewards["eval_file"])
    assert abs(rewards["eval_file"] - rewards["train_file"]) > 0.01


def test_zero_steps_evaluate_and_save_the_base(small: dict[str, Any], tmp_path: Path) -> None:
    rows = train(small, tmp_path / "run", num_train_steps=0)
    assert [row["step"] for row in rows] == [0]
    assert (tmp_path / "run" / "final" / "config.json").is_file()


def test_another_distribution_than_the_scorers_is_warned_about(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = train(small, tmp_path / "run", top_k=2, num_train_steps=1)
    assert "warning: top_k 2" in capsys.readouterr().err
    assert rows[1]["sampling/logp_difference/mean"] > 0.1


def test_compile_is_refused_on_a_cpu_before_any_compute(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    patch_loop(monkeypatch, "load_skeleton", fail)
    patch_loop(monkeypatch, "load_policy", fail)
    with pytest.raises(SystemExit) as raised, errors_explained():
        train(small, tmp_path / "run", compile="true")
    assert raised.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: compile: got true on cpu")
    with pytest.raises(AssertionError, match="a model was loaded"):
        train(small, tmp_path / "run", compile="false")


@pytest.mark.slow
@pytest.mark.parametrize("kl_coeff", [0.1, 0])
def test_compiled_are_the_trunks_of_policy_and_reference_and_never_in_the_sampler(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kl_coeff: float
) -> None:
    """Without a GPU: the checks of the device and torch.compile itself are replaced by what they would be asked."""
    compiled: list[tuple[torch.nn.Module, dict[str, Any]]] = []
    models: dict[str, list[tuple[Any, bool]]] = {"sampled": [], "scored": []}  # and whether it may run compiled
    is_eager = False

    @contextlib.contextmanager
    def uncompiled() -> Iterator[None]:
        nonlocal is_eager
        is_eager = True
        yield
        is_eager = False

    def watched(function: Callable[..., Any], calls: list[tuple[Any, bool]]) -> Callable[..., Any]:
        def call(model: Any, *arguments: Any, **settings: Any) -> Any:
            calls.append((model, is_eager))
            return function(model, *arguments, **settings)

        return call

    patch_loop(monkeypatch, "check_compile", lambda config, device: None)
    patch_loop(monkeypatch, "uncompiled", uncompiled)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: compiled.append((module, settings)))
    for place in (grpo.run.setup, grpo.evaluation.greedy):
        monkeypatch.setattr(place, "generate_completions", watched(place.generate_completions, models["sampled"]))
    patch_loop(monkeypatch, "compute_logprobs", watched(loop_function("compute_logprobs"), models["scored"]))
    train(small, tmp_path / "run", compile="true", kl_coeff=kl_coeff, num_train_steps=1)
    scored = list(dict.fromkeys(model for model, _ in models["scored"]))  # the reference comes first
    assert len(scored) == (2 if kl_coeff else 1)
    assert compiled == [(model.base_model, {"dynamic": True}) for model in reversed(scored)]
    assert not any(is_eager for _, is_eager in models["scored"])
    assert len(models["sampled"]) >= 4  # pre-flight, the base's evaluation, the step's rollout, the last evaluation
    assert all(is_eager for _, is_eager in models["sampled"])
    compiled.clear()
    models["sampled"].clear()
    train(small, tmp_path / "plain", kl_coeff=kl_coeff, num_train_steps=1)
    assert compiled == []
    assert not any(is_eager for _, is_eager in models["sampled"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "status", "message"),
    [
        ("--group_sise=3", 2, "error: --group_sise: not a setting; did you mean --group_size?"),
        ("--train_file=missing.jsonl", 2, 'error: train_file: no file named "missing.jsonl". Relative paths start at'),
        ("--rewards=[tests.toy_rewards:raises]", 1, "error: reward tests.toy_rewards:raises raised KeyError: 'oops'"),
        ("--learning_rate=1e30", 1, "gradient norm nan; the batch lies in"),
    ],
)
def test_what_goes_wrong_ends_in_one_line(
    small: dict[str, Any], tmp_path: Path, flag: str, status: int, message: str
) -> None:
    result = run(small, tmp_path / "run", flag)
    assert result.returncode == status
    assert "Traceback" not in result.stderr
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rewards": "[maths]"},
            f"rewards: got 'maths', allowed: {', '.join(REWARDS)}, or module:function; did you mean math?",
        ),
        ({"rewards": "[tests.toy_rewards:needs_colour]"}, 'train.jsonl, line 1: has no "colour", which reward'),
        ({"max_prompt_length": 3}, "the longest prompt has 6 tokens, max_prompt_length allows 3"),
        ({"model_name": "/nowhere/at/all"}, "model_name: there is no folder '/nowhere/at/all'"),
        ({"eval_file": "missing.jsonl"}, "missing.jsonl: cannot be read"),
        ({"group_size": 1}, 'group_size: 1 is too small for advantage_baseline "group"'),
        ({"compile": "true"}, "compile: got true on cpu, allowed there: false"),
    ],
)
def test_wrong_input_leaves_nothing_half_written(
    small: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as raised:
        train(small, tmp_path / "run", **changes)
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()


def start(settings: dict[str, Any], folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command, not waited for."""
    flags = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "train_grpo.py", *flags, f"--output_dir={folder}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(metrics: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) >= number):
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(small: dict[str, Any], tmp_path: Path) -> None:
    """And the resumed run is, bit for bit, the one that was never interrupted."""
    settings = small | {"num_train_steps": 300, "eval_every": 300}
    process = start(settings, tmp_path / "run")
    wait_for_rows(tmp_path / "run" / "metrics.jsonl", 4)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    rows = read(tmp_path / "run" / "metrics.jsonl")
    step = rows[-1]["step"]
    assert 3 <= step < 300
    folder = tmp_path / "run"
    assert stderr.splitlines()[-1] == (
        f"stopped; step {step} is saved; to go on: python train_grpo.py --resume --output_dir {folder}"
    )
    resumed = run({}, folder, "--resume", f"--num_train_steps={step + 3}")
    assert resumed.returncode == 0, resumed.stderr
    assert f"Going on after step {step} of {step + 3}" in resumed.stdout
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == list(range(step + 4))


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(small: dict[str, Any], tmp_path: Path) -> None:
    process = start(small | {"num_train_steps": 300, "rewards": "[tests.toy_rewards:slow]"}, tmp_path / "run")
    wait_for_rows(tmp_path / "run" / "metrics.jsonl", 1)
    time.sleep(1.0)  # by now it is inside step 1, whose reward takes three seconds
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "no step is saved yet; to begin again" in stderr.splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_leaves_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    process = start(small | {"rewards": "[tests.toy_rewards:slow]"}, tmp_path / "run")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / "run" / ".lock").exists():
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.splitlines()[-1]) == (130, "stopped before step 1")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "ppo"])
def test_every_algorithm_trains(small: dict[str, Any], tmp_path: Path, algorithm: str) -> None:
    """Two steps of two updates each."""
    changes = {
        "algorithm": algorithm, "num_minibatches": 2, "rewards": "[tests.toy_rewards:different_letters]",
        "eval_every": 2, "warmup_steps": 0, "learning_rate": 1e-3,
    }  # fmt: skip
    rows = train(small, tmp_path / "run", **changes)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["grad_norm"] > 0 for row in rows[1:])
    assert rows[1]["num_completions"] >= 16
    row = ALGORITHMS[algorithm]
    assert all(("kl" in step) == (row["kl_coeff"] > 0) for step in rows[1:])
    assert rows[2].get("kl", 1.0) != 0.0  # the policy has left the reference
    may_clip = row["surrogate"] != "reinforce"
    assert may_clip or all(step["clip_ratio/low_mean"] + step["clip_ratio/high_mean"] == 0 for step in rows[1:])
    samples = read(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 2 * 16
    assert all(isinstance(sample["advantage"], float) for sample in samples)  # one a completion, also by token
    assert any(sample["advantage"] != 0 for sample in samples)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert {key: settings[key] for key in row} == row  # what was null is on record as it was filled


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"clip_range": ".inf", "max_grad_norm": ".inf"},
        {"algorithm": "dapo", "clip_range_high": ".inf", "dual_clip": 3},
        {"algorithm": "rloo", "kl_coeff": 0},
    ],
    ids=str,
)
def test_what_the_algorithm_filled_is_no_change_on_resume(
    small: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Nor is an infinity, which JSON does not have."""
    train(small, tmp_path / "run", **changes, num_train_steps=1)
    assert [row["step"] for row in resume(tmp_path / "run", **changes, num_train_steps=2)] == [0, 1, 2]
    with pytest.raises(InputError, match=r"--resume: clip_range: 0.1, but the run in .* has (inf|0.2|null)"):
        resume(tmp_path / "run", clip_range=0.1, surrogate="clipped")


def test_a_kl_in_the_reward_is_that_of_the_rollout(small: dict[str, Any], tmp_path: Path) -> None:
    """Of the policy before its first update, whatever follows: at first it still is the reference."""
    changes = {"kl_in": "reward", "kl_coeff": 0.5, "num_iterations": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    rows = train(small, tmp_path / "reward", **changes)
    assert rows[1]["kl"] == 0.0
    assert rows[2]["kl"] != 0.0
    in_the_loss = train(small, tmp_path / "loss", **(changes | {"kl_in": "loss"}))
    assert in_the_loss[1]["kl"] > 0.0  # its mean over both passes: after the first the policy has moved


def test_a_kl_in_the_reward_tells_siblings_apart_that_earn_the_same(small: dict[str, Any], tmp_path: Path) -> None:
    """So groups without spread are trained on, from the second step on."""
    reward = "[{name: 'tests.toy_rewards:scaled', scale: 0.5}]"
    changes = {"kl_in": "reward", "kl_coeff": 0.5, "rewards": reward, "eval_metric": "eval/reward", "warmup_steps": 0}
    rows = train(small, tmp_path / "run", **changes, entropy_coeff=1.0)  # which moves the policy all the same
    assert [row["frac_reward_zero_std"] for row in rows[1:]] == [1.0, 1.0]
    samples = read(tmp_path / "run" / "samples.jsonl")
    assert all(sample["reward"] == 0.5 for sample in samples)  # as the function gave it: the charge is not in it
    assert all(sample["advantage"] == 0 for sample in samples[:16])  # the policy still is the reference
    assert all(sample["advantage"] != 0 for sample in samples[16:])


def test_an_entropy_bonus_raises_the_entropy(small: dict[str, Any], tmp_path: Path) -> None:
    changes = {"kl_coeff": 1e-3, "num_train_steps": 3, "learning_rate": 3e-3, "warmup_steps": 0, "temperature": 0.5}
    without = train(small, tmp_path / "without", **changes)
    bonus = train(small, tmp_path / "bonus", **changes, entropy_coeff=5.0)
    assert bonus[1]["entropy"] == without[1]["entropy"]
    assert bonus[3]["entropy"] > without[3]["entropy"] + 0.01


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("kl_coeff=0", True),
        ("algorithm=dr_grpo", True),
        ("algorithm=dapo", True),
        ("algorithm=gspo", True),
        ("algorithm=cispo", True),
        ("algorithm=rloo kl_coeff=0", True),
        ("algorithm=dr_grpo advantage_scale=batch", True),
        ("algorithm=grpo", False),  # the KL acts on every group
        ("algorithm=rloo", False),
        ("algorithm=dapo entropy_coeff=0.1", False),
        ("algorithm=reinforce", False),
        ("algorithm=reinforce advantage_baseline=batch", False),
        ("kl_coeff=0 advantage_scale=tokens", False),  # whitened with others its advantages are not 0
        ("algorithm=reinforce_pp kl_coeff=0", False),
    ],
)
def test_a_group_without_spread_is_left_out_only_where_its_gradient_is_0(settings: str, expected: bool) -> None:
    assert zero_variance_has_no_gradient(load_config(None, settings.split())) == expected


@pytest.mark.parametrize("choice", [{"entropy_coeff": 1.0}, {"advantage_scale": "tokens"}], ids=str)
def test_leaving_out_idle_groups_changes_no_gradient(
    small: dict[str, Any], tmp_path: Path, choice: dict[str, Any]
) -> None:
    """A KL of next to no weight has every group scored; so does what acts on them by itself."""
    choice = choice | {
        "num_train_steps": 1,
        "rewards": "[tests.algorithm.test_resample:by_prompt]",
        "eval_metric": "eval/reward",
    }
    with_kl = train(small, tmp_path / "kl", **choice, kl_coeff=1e-12)[1]
    without = train(small, tmp_path / "none", **choice, kl_coeff=0)[1]
    assert 0 < without["frac_reward_zero_std"] < 1
    assert without["entropy"] == with_kl["entropy"]
    assert without["grad_norm"] == pytest.approx(with_kl["grad_norm"], rel=1e-5)


Logps = torch.Tensor  # (T,) of one completion


@dataclass(frozen=True)
class Twin:
    """Settings of a run, and what they mean, in plain Python."""

    changes: dict[str, Any]
    rates: list[float]  # of the optimizer steps
    # of all rewards, and of what every token is charged -> of every token
    advantages: Callable[[list[float], list[list[float]]], list[list[float]]]
    surrogate: Callable[
        [Logps, Logps, torch.Tensor], torch.Tensor
    ]  # of new, old log-probs and advantages, to be minimised
    kl: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of the ratio and of ref - new
    weight: Callable[[int, list[int]], float]  # of a token, from the length of its completion and those of the step


def among_siblings(advantage: Callable[[float, list[float]], float]) -> Callable[..., list[list[float]]]:
    """From the advantage of a reward in its group of four; the charges of its tokens are taken off it first."""

    def of_tokens(rewards: list[float], charges: list[list[float]]) -> list[list[float]]:
        nets = [reward - sum(charge) for reward, charge in zip(rewards, charges, strict=True)]
        groups = [nets[row // 4 * 4 : row // 4 * 4 + 4] for row in range(16)]
        return [
            [advantage(net, group) if max(group) > min(group) else 0.0] * len(charge)
            for net, group, charge in zip(nets, groups, charges, strict=True)
        ]

    return of_tokens


def over_all_tokens(rewards: list[float], charges: list[list[float]]) -> list[list[float]]:
    """REINFORCE++: what is still to come, in standard deviations from the mean of all tokens."""
    to_come = [
        [reward - sum(charge[t:]) for t in range(len(charge))] for reward, charge in zip(rewards, charges, strict=True)
    ]
    every = [value for row in to_come for value in row]
    return [[(value - mean(every)) / (stdev(every) + 1e-4) for value in row] for row in to_come]


def clipped(low: float, high: float, dual: float = math.inf) -> Callable[..., torch.Tensor]:
    def surrogate(new: Logps, old: Logps, advantages: torch.Tensor) -> torch.Tensor:
        losses = []
        for ratio, advantage in zip((new - old).exp(), advantages, strict=True):
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            losses.append(-torch.maximum(gain, dual * advantage) if advantage < 0 else -gain)
        return torch.stack(losses)

    return surrogate


def clipped_sequence(low: float, high: float) -> Callable[..., torch.Tensor]:
    """GSPO: one ratio a completion, the geometric mean of its tokens'."""

    def surrogate(new: Logps, old: Logps, advantages: torch.Tensor) -> torch.Tensor:
        ratio = (new.sum() / len(new) - old.sum() / len(old)).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)

    return surrogate


COSINE = [0.5 + 0.5 * math.cos(math.pi * k / 5) for k in range(5)]
GRPO = Twin(
    changes={
        "temperature": 0.7, "kl_coeff": 2.0, "num_minibatches": 2, "num_iterations": 2, "micro_batch_size": 3,
        "warmup_steps": 3, "learning_rate": 5e-3, "max_grad_norm": 0.5, "weight_decay": 0.1,
        "max_completion_length": 20,
    },
    # 3 steps of warm-up, then 5 of cosine, of 8 optimizer steps in all
    rates=[5e-3 * factor for factor in (1 / 4, 2 / 4, 3 / 4, *COSINE)],
    advantages=among_siblings(lambda reward, group: (reward - mean(group)) / (stdev(group) + 1e-4)),
    surrogate=clipped(0.2, 0.2),
    kl=lambda ratio, difference: ratio * (difference.exp() - difference - 1),
    weight=lambda length, lengths: 1 / sum(lengths),
)  # fmt: skip
OTHER = Twin(
    changes={
        "temperature": 1.3, "kl_coeff": 0.5, "kl_estimator": "k2", "num_iterations": 2, "micro_batch_size": 5,
        "warmup_steps": 1, "learning_rate": 2e-3, "max_grad_norm": 3.0, "weight_decay": 0.01, "seed": 3,
        "clip_range": 0.05, "clip_range_high": 0.15, "lr_schedule": "linear", "adam_beta1": 0.8, "adam_beta2": 0.9,
        "advantage_baseline": "leave_one_out", "advantage_scale": "none", "loss_aggregation": "constant",
        "max_completion_length": 20,
    },
    # 1 step of warm-up, then 3 of a line, of 4 in all
    rates=[2e-3 * factor for factor in (1 / 2, 1, 2 / 3, 1 / 3)],
    advantages=among_siblings(lambda reward, group: reward - (sum(group) - reward) / 3),
    surrogate=clipped(0.05, 0.15),
    kl=lambda ratio, difference: difference**2 / 2,
    weight=lambda length, lengths: 1 / (len(lengths) * 20),
)  # fmt: skip
EVEN = {"lr_schedule": "constant", "warmup_steps": 0, "max_completion_length": 20, "max_grad_norm": 1.5}
REINFORCE_PP = Twin(
    changes=EVEN | {"algorithm": "reinforce_pp", "kl_coeff": 2.0, "num_minibatches": 2, "learning_rate": 5e-3},
    rates=[5e-3] * 4,
    advantages=over_all_tokens,
    surrogate=clipped(0.2, 0.2),
    kl=lambda ratio, difference: 0 * ratio,  # it is in the reward
    weight=lambda length, lengths: 1 / sum(lengths),
)
RLOO = Twin(
    changes=EVEN | {"algorithm": "rloo", "kl_coeff": 1.5, "micro_batch_size": 3, "learning_rate": 5e-3},
    rates=[5e-3] * 2,
    advantages=among_siblings(lambda reward, group: reward - (sum(group) - reward) / 3),
    surrogate=lambda new, old, advantages: -advantages * new,
    kl=lambda ratio, difference: 0 * ratio,  # it is in the reward
    weight=lambda length, lengths: 1 / (len(lengths) * 20),
)
GSPO = Twin(
    changes=EVEN
    | {"algorithm": "gspo", "num_iterations": 2, "num_minibatches": 2, "learning_rate": 1e-3, "micro_batch_size": 3}
    | {"clip_range": 0.02, "clip_range_high": 0.06},
    rates=[1e-3] * 8,
    advantages=among_siblings(lambda reward, group: (reward - mean(group)) / (stdev(group) + 1e-4)),
    surrogate=clipped_sequence(0.02, 0.06),
    kl=lambda ratio, difference: 0 * ratio,  # there is none
    weight=lambda length, lengths: 1 / (len(lengths) * length),
)
CISPO = Twin(
    changes=EVEN | {"algorithm": "cispo", "num_iterations": 3, "learning_rate": 5e-3, "clip_range_high": 0.1},
    rates=[5e-3] * 6,
    advantages=among_siblings(lambda reward, group: (reward - mean(group)) / (stdev(group) + 1e-4)),
    surrogate=lambda new, old, advantages: -(new - old).exp().detach().clamp(max=1.1) * advantages * new,
    kl=lambda ratio, difference: 0 * ratio,  # there is none
    weight=lambda length, lengths: 1 / sum(lengths),
)
BONUS = Twin(
    changes=EVEN
    | {"entropy_coeff": 0.25, "dual_clip": 1.02, "kl_coeff": 0.5, "temperature": 0.7, "num_iterations": 3}
    | {"learning_rate": 5e-3, "loss_aggregation": "sequence", "advantage_scale": "none"},
    rates=[5e-3] * 6,
    advantages=among_siblings(lambda reward, group: reward - mean(group)),
    surrogate=clipped(0.2, 0.2, dual=1.02),
    kl=lambda ratio, difference: ratio * (difference.exp() - difference - 1),
    weight=lambda length, lengths: 1 / (len(lengths) * length),
)
TWINS = {
    "GRPO": GRPO, "everything else": OTHER, "REINFORCE++": REINFORCE_PP, "RLOO": RLOO, "GSPO": GSPO, "CISPO": CISPO,
    "entropy bonus and dual clip": BONUS,
}  # fmt: skip


@pytest.mark.parametrize("twin", later_slow(TWINS.values(), 3), ids=TWINS)
def test_two_steps_of_the_loop_worked_by_hand(small: dict[str, Any], tmp_path: Path, twin: Twin) -> None:
    """The whole wiring of train_grpo.py against a naive twin: row by row, without padding, masks or micro-batches.

    Everything that could be wired wrongly is switched on: a temperature, a KL, minibatches, two passes, a warm-up,
    gradient clipping, weight decay; then other values of all of these, a KL in the reward, a bonus. The sampler is
    shared; log-probs, advantages, loss and update are written out.
    """
    small = small | {"rewards": "[tests.toy_rewards:different_letters]"}  # nearly every group has a signal
    rows = train(small, tmp_path / "run", **twin.changes)
    trained = torch.cat([weight.flatten() for weight in weights_of(tmp_path / "run").values()])

    config = load_config(None, [f"{key}={value}" for key, value in (small | twin.changes).items()])
    policy, tokenizer = load_policy(small["model_name"], base_seed=0, device=torch.device("cpu"))
    reference = copy.deepcopy(policy)
    start = torch.cat([weight.flatten() for weight in policy.state_dict().values()])
    matrices = [weight for weight in policy.parameters() if weight.dim() >= 2]
    others = [weight for weight in policy.parameters() if weight.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(config.adam_beta1, config.adam_beta2),
    )
    rates = list(twin.rates)
    dataset = JSONLinesDataset(small["train_file"])
    written = read(tmp_path / "run" / "samples.jsonl")
    was_off_policy = False

    def score(model: Any, prompt: list[int], completion: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / config.temperature
        logps, entropies = [], []
        for token, row in zip(completion, logits.log_softmax(-1), strict=True):
            logps.append(row[token])
            entropies.append(-(row.exp() * row).sum())
        return torch.stack(logps), torch.stack(entropies)  # (T,)

    for step in (1, 2):
        samples = samples_for_step(dataset, step=step, batch_size=4, seed=config.seed)
        rollout = generate_completions(
            policy, tokenizer, [sample["prompt"] for sample in samples], group_size=4,
            max_completion_length=config.max_completion_length, temperature=config.temperature,
            seed=step_seed(config.seed, step),
        )  # fmt: skip
        prompts = [tokenizer(samples[row // 4]["prompt"])["input_ids"] for row in range(16)]
        completions = rollout.token_lists()
        assert step == 2 or len(set(map(len, completions))) > 1  # else aggregations could not be told apart
        rewards = different_letters([samples[row // 4]["prompt"] for row in range(16)], rollout.completions)
        with torch.no_grad():
            old = [score(policy, *pair)[0] for pair in zip(prompts, completions, strict=True)]
            ref = [score(reference, *pair)[0] for pair in zip(prompts, completions, strict=True)]
        kls = [(then - now).tolist() for then, now in zip(old, ref, strict=True)]
        price = config.kl_coeff if config.kl_in == "reward" else 0.0
        advantages = twin.advantages(rewards, [[price * kl for kl in row] for row in kls])
        losses = []
        size = 16 // config.num_minibatches
        for start_row in [*range(0, 16, size)] * config.num_iterations:
            minibatch = range(start_row, start_row + size)
            lengths = [len(completions[row]) for row in minibatch]
            loss = torch.zeros(())
            for row in minibatch:
                new, entropies = score(policy, prompts[row], completions[row])
                ratio, difference = (new - old[row]).exp(), ref[row] - new
                was_off_policy |= bool(((ratio - 1).abs() > 0.1).any())
                surrogate = twin.surrogate(new, old[row], torch.tensor(advantages[row]))
                per_token_loss = surrogate + config.kl_coeff * twin.kl(ratio, difference)
                per_token_loss = per_token_loss - config.entropy_coeff * entropies
                loss = loss + per_token_loss.sum() * twin.weight(len(completions[row]), lengths)
            loss.backward()
            losses.append(loss.item())
            grad_norm = torch.cat([weight.grad.flatten() for weight in policy.parameters()]).norm().item()
            assert grad_norm > 0.01  # every minibatch has a signal: else take another seed
            rate = rates.pop(0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for weight in policy.parameters():
                weight.grad *= min(1.0, config.max_grad_norm / grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        assert rows[step]["reward"] == pytest.approx(mean(rewards))
        assert rows[step]["loss"] == pytest.approx(mean(losses), abs=2e-5)
        assert rows[step]["learning_rate"] == pytest.approx(rate)
        assert rows[step]["grad_norm"] == pytest.approx(grad_norm, rel=1e-3)
        assert rows[step]["sampling/logp_difference/max"] < 1e-5
        recorded = [sample["advantage"] for sample in written if sample["step"] == step]
        assert recorded == pytest.approx([mean(row) for row in advantages], abs=1e-3)
        if config.kl_in == "reward":
            assert rows[step]["kl"] == pytest.approx(mean(kl for row in kls for kl in row), abs=1e-4)
            assert step == 1 or max(abs(kl) for row in kls for kl in row) > 0.1
    assert was_off_policy == (len(twin.rates) > 2)  # and the clip has bound
    assert was_off_policy == any(row["clip_ratio/low_mean"] + row["clip_ratio/high_mean"] > 0 for row in rows[1:])
    assert rates == []
    by_hand = torch.cat([weight.flatten() for weight in policy.state_dict().values()])
    assert (trained - by_hand).norm() < 1e-3 * (by_hand - start).norm()
