"""benchmarks/vs_trl.py: both sides do the same work under the same clock, and the bars say what they mean."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

import grpo.evaluation.greedy
import reward_model
import train_grpo
from benchmarks import vs_trl
from benchmarks.vs_trl import Training, bars, describe, measure_step, measure_to_accuracy, train, trl_settings, turns
from grpo.data import samples_for_step
from grpo.datasets.rows import JSONLinesDataset
from grpo.models.loading import load_policy
from grpo.models.optimizer import learning_rate_at
from grpo.models.tiny import tiny_base_model
from grpo.settings.config import load_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, about transformers 6

NUM_STEPS, NUM_GROUPS, GROUP_SIZE = 4, 2, 4
NUM_ROWS = NUM_GROUPS * GROUP_SIZE


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The smallest run that has everything: a base of two warm-up steps, two groups of four short answers."""
    folder = tmp_path_factory.mktemp("vs_trl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_CACHE", str(folder / "cache"))
        model = tiny_base_model(0, num_steps=2)
    problems = list(JSONLinesDataset(load_config().eval_file))[:NUM_ROWS]
    (folder / "eval.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    changes = {
        "model_name": model,
        "eval_file": folder / "eval.jsonl",
        "batch_size": NUM_GROUPS,
        "group_size": GROUP_SIZE,
        "micro_batch_size": NUM_ROWS,
        "max_completion_length": 6,
        "num_train_steps": NUM_STEPS,
        "device": "cpu",
        "dtype": "float32",
    }
    return [f"{key}={value}" for key, value in changes.items()]


@pytest.mark.parametrize("side", vs_trl.SIDES)
def test_every_step_is_timed_and_answers_our_prompts_in_our_order(
    settings: list[str], side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, reward_fn = [], reward_model.math_reward()

    def recording(prompts: list, **columns: Any) -> list[float | None]:
        batches.append(list(zip(prompts, columns["answer"], strict=True)))
        return reward_fn(prompts=prompts, **columns)

    monkeypatch.setitem(reward_model.REWARDS, "math", lambda: recording)
    monkeypatch.setattr(vs_trl, "math_reward", lambda: recording)
    training = train(side, settings, Training(NUM_STEPS))

    dataset = JSONLinesDataset(load_config(None, settings).train_file)
    expected = [
        [(sample["prompt"], sample["answer"]) for sample in samples for _ in range(GROUP_SIZE)]
        for samples in (
            samples_for_step(dataset, step=step, batch_size=NUM_GROUPS, seed=0) for step in range(1, NUM_STEPS + 1)
        )
    ]
    # Ours scores the pre-flight and the base's evaluation before, and evaluates the last step.
    assert (batches if side == "trl" else batches[2:-1]) == expected
    assert len(training.step_seconds) == NUM_STEPS
    assert min(training.step_seconds) > 0
    assert all(1 <= length <= 6 for length in training.mean_lengths)
    if side == "ours":  # writing the files counts, on top of what metrics.jsonl says
        pairs = zip(training.step_times, training.step_seconds, strict=True)
        assert all(0 < step_time < seconds for step_time, seconds in pairs)


@pytest.mark.parametrize("side", vs_trl.SIDES)
def test_evaluations_do_not_count_and_the_target_ends_the_run(
    settings: list[str], side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every evaluation seems to take 1000 seconds: the clock jumps, nobody waits."""
    skew, now, generate = [0.0], time.perf_counter, grpo.evaluation.greedy.generate_completions

    def slow(*arguments: Any, **keywords: Any) -> Any:
        skew[0] += 1000.0
        return generate(*arguments, **keywords)

    monkeypatch.setattr(time, "perf_counter", lambda: now() + skew[0])
    monkeypatch.setattr(grpo.evaluation.greedy, "generate_completions", slow)
    training = train(side, settings, Training(NUM_STEPS, target=0.0), eval_every=3)
    assert [step for step, _ in training.accuracies] == [3]
    assert training.has_reached_target
    assert len(training.step_seconds) == 3
    assert 0 < min(training.step_seconds) <= max(training.step_seconds) < 500
    assert skew[0] == (1000 if side == "trl" else 2000)  # ours evaluates the base too


def test_trls_weights_are_evaluated_as_they_are_at_that_step(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, evaluate = [], vs_trl.evaluate_greedy

    def recording(model: Any, *arguments: Any, **keywords: Any) -> Any:
        seen.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
        return evaluate(model, *arguments, **keywords)

    monkeypatch.setattr(vs_trl, "evaluate_greedy", recording)
    monkeypatch.setattr(vs_trl, "math_reward", lambda: lambda completions, **_: [len(c) % 2 for c in completions])
    train("trl", settings, Training(NUM_STEPS), eval_every=2)
    base, _ = load_policy(load_config(None, settings).model_name, base_seed=0, device=torch.device("cpu"))
    weights = [torch.cat([weight.detach().flatten() for weight in base.parameters()]), *seen]
    assert len(seen) == NUM_STEPS // 2
    for before, after in zip(weights, seen, strict=False):
        assert 0 < (after - before).abs().max() < 0.01


def test_a_real_interrupt_is_passed_on(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_grpo, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("ours", settings, Training(NUM_STEPS))


def test_trl_is_told_the_default_run() -> None:
    told = trl_settings(load_config())
    expected = {
        "per_device_train_batch_size": 256,
        "num_generations": 16,
        "max_completion_length": 28,
        "loss_type": "dapo",
        "beta": 0.005,
        "use_bias_correction_kl": True,
        "scale_rewards": "group",
        "num_iterations": 1,
        "max_steps": 150,
        "learning_rate": 5e-4,
        "adam_beta2": 0.95,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    assert expected.items() <= told.items()
    with pytest.raises(AssertionError):  # no counterpart in TRL
        trl_settings(load_config(None, ["num_minibatches=2"]))


def test_the_learning_rates_differ_in_the_warm_up_alone() -> None:
    config = load_config()
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=config.learning_rate)
    scheduler = get_scheduler(
        config.lr_schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.num_train_steps
    )
    theirs = []
    for _ in range(config.num_train_steps):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [learning_rate_at(config, step) for step in range(config.num_train_steps)]
    assert theirs[5:] == pytest.approx(ours[5:], rel=1e-12)
    assert theirs[:5] == pytest.approx([config.learning_rate * n / 5 for n in range(5)])
    assert ours[:5] == pytest.approx([config.learning_rate * (n + 1) / 6 for n in range(5)])


@pytest.mark.slow
def test_the_measurements_measure(settings: list[str], tmp_path: Path) -> None:
    parts = {
        "step": measure_step({0: settings}),
        "to_accuracy": measure_to_accuracy({0: settings}, target=0.0, eval_every=2),
    }
    for side in vs_trl.SIDES:
        assert parts["step"][side]["seconds"]["n"] == NUM_STEPS - 1  # the first one warms up
        rate, seconds = parts["step"][side]["completions_per_second"], parts["step"][side]["seconds"]["median"]
        assert rate * seconds == pytest.approx(NUM_ROWS)
        [run] = parts["to_accuracy"][side]
        assert (run["seed"], run["steps"]) == (0, 2)
        assert run["seconds"] > 0
    assert "step_time" in parts["step"]["ours"]
    assert "step_time" not in parts["step"]["trl"]
    assert [value > 0 for _, _, value, _ in bars(json.loads(json.dumps(parts)), tmp_path)] == [True, True]
    never = measure_to_accuracy({0: settings}, target=1.1, eval_every=2)
    assert [never[side][0]["seconds"] for side in vs_trl.SIDES] == [None, None]
    assert "never to 1.1 (steps: 4)" in describe({"to_accuracy": never})


def test_who_is_first_changes_from_seed_to_seed() -> None:
    assert turns({3: [], 4: [], 5: []}) == [(3, "ours"), (3, "trl"), (4, "trl"), (4, "ours"), (5, "ours"), (5, "trl")]


def make_parts(ours: float, trl: float, ours_to: list[float | None], trl_to: list[float | None]) -> dict[str, Any]:
    runs = {"ours": ours_to, "trl": trl_to}
    return {
        "step": {"ours": {"seconds": {"median": ours}}, "trl": {"seconds": {"median": trl}}},
        "to_accuracy": {"target": 0.95, **{side: [{"seconds": s} for s in values] for side, values in runs.items()}},
    }


def test_bars_are_half_of_trls_seconds(tmp_path: Path) -> None:
    parts = make_parts(0.05, 0.1, [1.0, 9.0, 2.0], [3.9, 4.0, 90.0])
    assert bars(parts, tmp_path) == [
        ("seconds a step, over TRL's", "<= 0.50", 0.5, True),
        ("seconds to 0.95 held out, over TRL's", "<= 0.50", 0.5, True),  # medians 2 and 4
    ]
    assert not bars(make_parts(0.051, 0.1, [1.0], [1.0]), tmp_path)[0][3]
    assert bars({}, tmp_path) == []


def test_a_floor_that_is_higher_than_half_of_trls_seconds_moves_both_bars(tmp_path: Path) -> None:
    parts = make_parts(0.06, 0.1, [6.0], [10.0])
    floor = tmp_path / "floor.json"
    assert [met for *_, met in bars(parts, tmp_path)] == [False, False]
    floor.write_text(json.dumps({"parts": {}}))
    assert [met for *_, met in bars(parts, tmp_path)] == [False, False]
    floor.write_text(json.dumps({"parts": {"step": {"floor_seconds": 0.04}}}))  # 1.15 x 0.04 < 0.05
    assert [met for *_, met in bars(parts, tmp_path)] == [False, False]
    floor.write_text(json.dumps({"parts": {"step": {"floor_seconds": 0.055}}}))
    assert [(bar, met) for _, bar, _, met in bars(parts, tmp_path)] == [("<= 0.63 (1.15 x the floor)", True)] * 2


def test_a_run_that_never_got_there_meets_no_bar(tmp_path: Path) -> None:
    for trl_to in ([4.0], [None]):
        assert not bars(make_parts(0.01, 0.1, [None], trl_to), tmp_path)[1][3]
    assert bars(make_parts(0.01, 0.1, [1.0], [None]), tmp_path)[1][2:] == (0.0, True)


def test_without_trl_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r"pip install -r requirements-dev\.txt"):
        vs_trl.import_trl()
