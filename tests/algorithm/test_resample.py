"""Dynamic sampling: rollouts put together, the prompts of a round, which groups are replaced; then in the loop."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import grpo.run.plots
from grpo.batch import Batch, check_rewards_vary, replace_zero_variance_groups
from grpo.data import samples_for_step
from grpo.datasets.rows import JSONLinesDataset
from grpo.errors import InputError, RunError, errors_explained
from grpo.fast.noise import step_seed
from grpo.rollout import Rollout
from grpo.run.checkpoint import checkpoints
from grpo.settings.config import load_config
from reward_model import Scores
from tests.conftest import loop_function, numbered, patch_loop
from tests.run import test_train as helpers
from tests.run.test_train import read, resume, run, train

small = helpers.small  # the fixture

NAN = float("nan")
DATA = numbered(10)


# Rollouts, one after another


def make_rollout(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, spare: int = 0) -> Rollout:
    """Rows of these tokens, padded to the longest and by `spare` more; every row its own log-probs and flag."""
    length = max(map(len, prompts)) + spare
    width = max(map(len, completions)) + spare

    def left(row: Sequence[int], fill: int) -> list[int]:
        return [fill] * (length - len(row)) + list(row)

    def right(row: Sequence[Any], fill: Any) -> list[Any]:
        return list(row) + [fill] * (width - len(row))

    return Rollout(
        prompt_ids=torch.tensor([left(row, 0) for row in prompts]),
        prompt_mask=torch.tensor([left([1] * len(row), 0) for row in prompts]).bool(),
        completion_ids=torch.tensor([right(row, 0) for row in completions]),
        completion_mask=torch.tensor([right([1] * len(row), 0) for row in completions]).bool(),
        sampling_logps=torch.tensor([right([-token / 8 for token in row], 0.0) for row in completions]),
        is_truncated=torch.tensor([len(row) % 2 == 0 for row in completions]),
        completions=["".join(map(str, row)) for row in completions],
    )


def contents(rollout: Rollout) -> list[tuple[Any, ...]]:
    """Every row without its padding."""
    rows = []
    for row in range(len(rollout.completions)):
        prompt, completion = rollout.prompt_mask[row], rollout.completion_mask[row]
        rows.append(
            (
                rollout.prompt_ids[row][prompt].tolist(),
                rollout.completion_ids[row][completion].tolist(),
                rollout.sampling_logps[row][completion].tolist(),
                rollout.is_truncated[row].item(),
                rollout.completions[row],
            )
        )
    return rows


SHORT = make_rollout([[3], [4, 5]], [[7], [8, 9, 6]])
LONG = make_rollout([[6, 7, 8], [9]], [[5], [4, 3]])


def test_cat_pads_prompts_on_the_left_and_completions_on_the_right() -> None:
    both = Rollout.cat([SHORT, LONG])
    assert both.prompt_ids.tolist() == [[0, 0, 3], [0, 4, 5], [6, 7, 8], [0, 0, 9]]
    assert both.prompt_mask.int().tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]
    assert both.completion_ids.tolist() == [[7, 0, 0], [8, 9, 6], [5, 0, 0], [4, 3, 0]]
    assert both.completion_mask.int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert both.sampling_logps[3].tolist() == [-0.5, -0.375, 0.0]
    assert both.prompt_mask.dtype == both.completion_mask.dtype == torch.bool
    assert both.num_tokens == SHORT.num_tokens + LONG.num_tokens


@pytest.mark.parametrize("order", [(SHORT, LONG), (LONG, SHORT), (SHORT,), (LONG, SHORT, LONG)])
def test_what_was_put_together_is_selected_unchanged(order: tuple[Rollout, ...]) -> None:
    both = Rollout.cat(order)
    start = 0
    for part in order:
        rows = torch.arange(start, start + len(part.completions))
        assert contents(both.select(rows)) == contents(part)
        start += len(part.completions)
    assert contents(both) == [row for part in order for row in contents(part)]


def test_masked_places_hold_padding_whatever_was_put_together() -> None:
    both = Rollout.cat([SHORT, LONG])
    assert (both.completion_ids[~both.completion_mask] == 0).all()
    assert (both.sampling_logps[~both.completion_mask] == 0).all()
    assert (both.prompt_ids[~both.prompt_mask] == 0).all()


# The prompts of a round


def prompts_of(step: int = 1, round: int = 1, seed: int = 0, batch_size: int = 4) -> list[str]:
    samples = samples_for_step(DATA, step=step, batch_size=batch_size, seed=seed, round=round)
    return [sample["prompt"] for sample in samples]


def test_the_prompts_of_a_round_are_a_function_of_seed_step_and_round() -> None:
    assert prompts_of(step=3, round=2) == prompts_of(step=3, round=2)
    choices = {tuple(prompts_of(step, round, seed)) for step in (1, 2, 3) for round in (1, 2, 3) for seed in (0, 1, 2)}
    assert len(choices) == 27


def test_a_round_repeats_no_prompt_until_all_were_there() -> None:
    for round in (1, 2, 3):
        assert sorted(prompts_of(round=round, batch_size=10)) == [str(number) for number in range(10)]
        twice = prompts_of(round=round, batch_size=20)
        assert twice[:10] == twice[10:]


def test_the_prompts_of_a_place_do_not_depend_on_the_size_of_the_batch() -> None:
    assert prompts_of(batch_size=8)[:4] == prompts_of(batch_size=4)


def test_round_0_is_the_step_itself() -> None:
    assert prompts_of(round=0) == [s["prompt"] for s in samples_for_step(DATA, step=1, batch_size=4, seed=0)]
    assert prompts_of(round=0) != prompts_of(round=1)


def test_the_noise_of_a_round_is_its_own() -> None:
    seeds = {step_seed(seed, step, round) for seed in (0, 1) for step in range(4) for round in range(4)}
    assert len(seeds) == 32
    assert step_seed(5, 7, 0) == step_seed(5, 7)


# Which groups are replaced


CONFIG = load_config(None, ["group_size=2"])


def make_groups(names: Sequence[str], rewards: Sequence[Sequence[float]], *, spare: int = 0) -> Batch:
    """A group for each name, a completion for each of its rewards."""
    combined = torch.tensor([reward for group in rewards for reward in group])
    rows = [(name, g) for name, group in zip(names, rewards, strict=True) for g in range(len(group))]
    rollout = make_rollout(
        [[ord(letter) for letter in name] for name, _ in rows], [[ord(name[0]), g + 1] for name, g in rows], spare=spare
    )
    is_correct, has_answer = (combined == 1).float(), torch.ones(len(combined), dtype=torch.bool)
    scores = Scores({"toy": combined}, combined, is_correct, has_answer, is_correct_leniently=is_correct)
    return Batch([{"prompt": name} for name in names], rollout, scores, CONFIG)


def prompts(groups: Batch) -> list[str]:
    return [sample["prompt"] for sample in groups.samples]


def replaced(batch: Batch, max_rounds: int, sample_groups: Callable[..., Batch]) -> tuple[Batch, list[Rollout]]:
    """The batch after so many rounds, and what was thrown away."""
    after = replace_zero_variance_groups(*in_rounds(batch, max_rounds, sample_groups))
    return after, list(after.discarded)


def in_rounds(batch: Batch, max_rounds: int, sample_groups: Callable[..., Batch]) -> tuple[Batch, int, Any]:
    """The arguments of both functions, for step 7."""
    batch = dataclasses.replace(batch, config=dataclasses.replace(CONFIG, max_resample_rounds=max_rounds))

    def at_step_7(step: int, round: int, places: list[int]) -> Batch:
        assert step == 7
        return sample_groups(round, places)

    return batch, 7, at_step_7


MIXED, FLAT = [0.0, 1.0], [1.0, 1.0]


def never(round: int, places: list[int]) -> Batch:
    raise AssertionError(f"sampled again: round {round}, places {places}")


def test_idle_groups_are_replaced_in_their_place_and_the_others_untouched() -> None:
    before = make_groups(["a", "b", "c", "d"], [MIXED, FLAT, [0.25, 0.5], FLAT])
    asked = []

    def sample_groups(round: int, places: list[int]) -> Batch:
        asked.append((round, places))
        return make_groups(["bbbb", "dd"], [[0.5, 0.0], [0.0, 0.75]], spare=2)  # longer, and padded further

    after, discarded = replaced(before, 5, sample_groups)
    assert asked == [(1, [1, 3])]  # once: then nothing is idle
    assert prompts(after) == ["a", "bbbb", "c", "dd"]
    assert [sample["prompt"] for sample in after.row_samples] == ["a", "a", "bbbb", "bbbb", "c", "c", "dd", "dd"]
    assert after.scores.combined.tolist() == [0.0, 1.0, 0.5, 0.0, 0.25, 0.5, 0.0, 0.75]
    assert after.scores.by_name["toy"].tolist() == after.scores.combined.tolist()
    assert after.scores.is_correct.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    rows, old = contents(after.rollout), contents(before.rollout)
    assert rows[0:2] + rows[4:6] == old[0:2] + old[4:6]
    assert [row[0] for row in rows[2:4] + rows[6:8]] == [[98] * 4] * 2 + [[100] * 2] * 2
    assert [contents(part) for part in discarded] == [old[2:4] + old[6:8]]


def test_a_batch_without_idle_groups_is_left_alone() -> None:
    groups = make_groups(["a", "b"], [MIXED, [0.25, 0.5]])
    after, discarded = replaced(groups, 3, never)
    assert after.rollout is groups.rollout
    assert after.scores is groups.scores
    assert after.samples is groups.samples
    assert discarded == []


def test_no_rounds_leave_everything_as_it_is() -> None:
    groups = make_groups(["a", "b"], [FLAT, FLAT])
    after, discarded = replaced(groups, 0, never)
    assert after.rollout is groups.rollout
    assert after.scores is groups.scores
    assert after.samples is groups.samples
    assert discarded == []


def test_what_is_left_after_the_last_round_is_kept() -> None:
    asked = []

    def sample_groups(round: int, places: list[int]) -> Batch:
        asked.append((round, places))
        signal = {1: [MIXED, FLAT, FLAT], 2: [FLAT, [0.0, 0.5]]}[round]
        return make_groups([f"{'abcd'[place]}{round}" for place in places], signal)

    before = make_groups(["a", "b", "c", "d"], [FLAT, FLAT, MIXED, FLAT])
    after, discarded = replaced(before, 2, sample_groups)
    assert asked == [(1, [0, 1, 3]), (2, [1, 3])]
    assert prompts(after) == ["a1", "b2", "c", "d2"]  # b2 has no signal either
    assert after.scores.combined.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.5]
    assert [len(part.completions) for part in discarded] == [6, 4]
    thrown_away = [row[4] for part in discarded for row in contents(part)]
    assert thrown_away == ["971", "972", "981", "982", "1001", "1002", "981", "982", "1001", "1002"]


def test_a_group_that_no_reward_applies_to_has_no_signal() -> None:
    before = make_groups(["a", "b", "c"], [[NAN, NAN], [NAN, 1.0], MIXED])

    def sample_groups(round: int, places: list[int]) -> Batch:
        assert places == [0, 1]  # a lone reward has nothing to be compared with either
        return make_groups(["x", "y"], [MIXED, MIXED])

    after, discarded = replaced(before, 2, sample_groups)
    assert prompts(after) == ["x", "y", "c"]
    assert sum(len(part.completions) for part in discarded) == 4


# In the loop. Where the first number of the sum is one of IDLE, all completions earn the same.

IDLE = "02"


def by_prompt(prompts: list[str], completions: list[str], idle: str = IDLE, **_: Any) -> list[float]:
    """What a completion is worth is how many stand before it; nothing where the prompt is idle."""
    return [0.0 if prompt[len("What is ")] in idle else float(row) for row, prompt in enumerate(prompts)]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the loop samples, the pre-flight's first; evaluations are another's."""
    calls = []
    generate = loop_function("generate_completions")

    def recording(model: Any, tokenizer: Any, prompts: Any, **settings: Any) -> Rollout:
        rollout = generate(model, tokenizer, prompts, **settings)
        calls.append({"prompts": list(prompts), "rollout": rollout} | settings)
        return rollout

    patch_loop(monkeypatch, "generate_completions", recording)
    return calls


DYNAMIC = {
    "rewards": "[tests.algorithm.test_resample:by_prompt]", "max_resample_rounds": 2, "lr_schedule": "constant",
    "warmup_steps": 0, "eval_metric": "eval/reward", "eval_every": 2,
}  # fmt: skip


def test_what_is_thrown_away_is_counted_and_what_stays_is_recorded(
    small: dict[str, Any], tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    """Against the rule written out: which prompts are idle is known beforehand, so all else follows."""
    rows = train(small | DYNAMIC, tmp_path / "run", num_train_steps=3)
    dataset, tokenizer = JSONLinesDataset(small["train_file"]), AutoTokenizer.from_pretrained(small["model_name"])
    written = read(tmp_path / "run" / "samples.jsonl")
    expected_calls, num_completions, rounds_used = [], 0, []
    for step in (1, 2, 3):
        chosen = [
            [sample["prompt"] for sample in samples_for_step(dataset, step=step, batch_size=4, seed=0, round=round)]
            for round in (0, 1, 2)
        ]
        places, kept, round = [0, 1, 2, 3], list[str](chosen[0]), 0
        while places and round <= 2:
            for place in places:
                kept[place] = chosen[round][place]
            indices = [4 * place + g for place in places for g in range(4)]
            expected_calls.append((step_seed(0, step, round), [kept[place] for place in places], indices))
            num_completions += 4 * len(places)
            places = [place for place in places if kept[place][len("What is ")] in IDLE]
            round += 1
        rounds_used.append((round - 1, len(places)))
        row = rows[step]
        assert row["num_completions"] == num_completions
        assert row["frac_reward_zero_std"] == len(places) / 4
        mine = [sample for sample in written if sample["step"] == step]
        assert [sample["prompt"] for sample in mine] == [prompt for prompt in kept for _ in range(4)]
        assert [sample["advantage"] != 0 for sample in mine] == [p[8] not in IDLE for p in kept for _ in range(4)]
    assert any(used > 0 for used, _ in rounds_used)  # something was replaced
    assert any(used == 2 for used, _ in rounds_used)  # more than once
    done = [
        (call["seed"], tokenizer.batch_decode(call["prompts"]), list(call["completion_indices"])) for call in calls[1:]
    ]
    assert done == expected_calls
    assert rows[3]["num_tokens"] == sum(call["rollout"].num_tokens for call in calls[1:])
    sampled = sum(len(call["rollout"].completions) for call in calls[1:])
    assert rows[3]["num_completions"] == sampled == num_completions > 3 * 16


@pytest.mark.slow
def test_a_place_gets_the_same_group_whichever_others_are_replaced(
    small: dict[str, Any], tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    replaced = []
    for name, idle in [("few", "1"), ("many", "01")]:
        reward = f"{{name: 'tests.algorithm.test_resample:by_prompt', idle: '{idle}'}}"
        calls.clear()
        train(small | DYNAMIC, tmp_path / name, rewards=f"[{reward}]", num_train_steps=1, seed=1, max_resample_rounds=1)
        again = calls[2]  # after the pre-flight and the step's own
        texts = again["rollout"].completions
        places = [index // 4 for index in again["completion_indices"][::4]]
        replaced.append({place: (again["prompts"][p], texts[4 * p : 4 * p + 4]) for p, place in enumerate(places)})
    few, many = replaced
    assert set(few) < set(many)  # else take another seed
    assert len({tuple(texts) for _, texts in many.values()}) == len(many)  # every place its own noise
    assert few == {place: many[place] for place in few}


@pytest.mark.slow
def test_a_resumed_run_resamples_alike(small: dict[str, Any], tmp_path: Path) -> None:
    """4 == 2 + 2, bit for bit."""
    settings = small | DYNAMIC | {"save_every": 2}
    whole = train(settings, tmp_path / "whole", num_train_steps=4)
    train(settings, tmp_path / "parts", num_train_steps=2)
    parts = resume(tmp_path / "parts", num_train_steps=4)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert whole[4]["num_completions"] == parts[4]["num_completions"] > whole[2]["num_completions"] + 2 * 16


def assert_same(first: Path, second: Path) -> None:
    """Samples, weights, and what the metrics say but for the time it took."""
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]
    rows = [
        [{key: value for key, value in row.items() if "time" not in key} for row in read(folder / "metrics.jsonl")]
        for folder in (first, second)
    ]
    assert rows[0] == rows[1]


FLAKY = """
from tests.algorithm.test_resample import by_prompt

broken = True
num_rounds = 0

def fn(prompts, completions, **_):
    global num_rounds
    num_rounds += len(set(prompts)) < len(prompts) < 16  # groups, but not all of a step's: some are replaced
    if broken and num_rounds == 3:
        raise ValueError("no such luck")
    return by_prompt(prompts, completions)
"""


@pytest.mark.slow
def test_a_reward_that_raises_in_a_round_costs_no_step(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flaky_in_a_round.py").write_text(FLAKY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flaky_in_a_round", raising=False)
    settings = small | DYNAMIC | {"rewards": "[flaky_in_a_round:fn]", "save_every": 50, "num_train_steps": 4}
    with pytest.raises(RunError, match=r"raised ValueError: no such luck .*; step \d is saved; to go on"):
        train(settings, tmp_path / "run")
    last = read(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert 1 <= last < 4
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{last:06d}"]
    state = json.loads((tmp_path / "run" / f"step-{last:06d}" / "state.json").read_text())
    assert state["num_completions"] == read(tmp_path / "run" / "metrics.jsonl")[-1]["num_completions"]
    sys.modules["flaky_in_a_round"].broken = False  # type: ignore[attr-defined]
    resume(tmp_path / "run")
    train(settings, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "run")


def constant(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [0.5] * len(prompts)


def nothing(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
    """Applies to held-out problems alone."""
    return [None if len(set(prompts)) < len(prompts) else 0.5 for _ in prompts]


@pytest.mark.parametrize(
    ("reward", "message"),
    [  # of four, and of two rounds
        (
            "constant",
            "max_resample_rounds: got 2, but in none of 12 groups from the base do the rewards (tests.alg",
        ),
        ("nothing", "rewards: none of them applies to any of the first step's 16 completions"),
    ],
)
def test_rewards_that_never_vary_are_refused_before_the_first_round(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], reward: str, message: str
) -> None:
    """Every group would be replaced, in every round of every step, for nothing."""
    changes = {
        "rewards": f"[tests.algorithm.test_resample:{reward}]",
        "eval_metric": "eval/reward",
        "max_resample_rounds": 2,
    }
    with pytest.raises(SystemExit) as raised, errors_explained():
        train(small, tmp_path / "run", **changes)
    assert raised.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_refuses_them_too(small: dict[str, Any], tmp_path: Path) -> None:
    settings = small | {
        "rewards": "[tests.algorithm.test_resample:constant]",
        "eval_metric": "eval/reward",
        "algorithm": "dapo",
    }
    result = run(settings, tmp_path / "run")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: max_resample_rounds: got 3, but in none of 16 groups")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_without_dynamic_sampling_they_are_no_error(small: dict[str, Any], tmp_path: Path) -> None:
    changes = {
        "rewards": "[tests.algorithm.test_resample:constant]",
        "eval_metric": "eval/reward",
        "num_train_steps": 1,
    }
    assert train(small, tmp_path / "run", **changes)[1]["frac_reward_zero_std"] == 1.0


def test_any_difference_in_any_round_is_enough() -> None:
    idle, flat, asked = [FLAT, [0.25, 0.25]], make_groups(["a", "b"], [FLAT, [NAN, 0.5]]), list[tuple[int, list[int]]]()

    def found_in(lucky_round: int) -> Any:
        def sample_groups(round: int, places: list[int]) -> Batch:
            asked.append((round, places))
            return make_groups(["x", "y"], [FLAT, MIXED] if round == lucky_round else idle)

        return sample_groups

    check_rewards_vary(*in_rounds(make_groups(["a", "b"], [FLAT, [0.25, 0.5]]), 3, never))
    check_rewards_vary(*in_rounds(flat, 3, found_in(2)))
    assert asked == [(1, range(2)), (2, range(2))]  # no further than needed
    with pytest.raises(InputError, match=r"^max_resample_rounds: got 1, but in none of 4 groups .*\(toy\)"):
        check_rewards_vary(*in_rounds(flat, 1, found_in(2)))  # the groups differ, but none within


def test_selecting_moves_scores_with_their_rows() -> None:
    batch = make_groups(["a", "b"], [MIXED, [0.25, 0.5]])
    rows: Tensor = torch.tensor([3, 0])
    assert batch.scores.select(rows).combined.tolist() == [0.5, 0.0]
    assert batch.rollout.select(rows).completions == ["982", "971"]


def test_groups_that_are_put_in_places_keep_their_rewards_and_prompts() -> None:
    batch = make_groups(["a", "b", "c"], [MIXED, FLAT, FLAT])
    after = batch.replace([2, 1], make_groups(["x", "y"], [[0.25, 0.5], [0.75, 0.0]]))
    assert [sample["prompt"] for sample in after.row_samples] == ["a", "a", "y", "y", "x", "x"]
    assert after.rewards.tolist() == [[0.0, 1.0], [0.75, 0.0], [0.25, 0.5]]
    assert [chr(row[0][0]) for row in contents(after.rollout)] == ["a", "a", "y", "y", "x", "x"]
    assert [row[0] for row in contents(after.discarded[0])] == [[ord("c")]] * 2 + [[ord("b")]] * 2
