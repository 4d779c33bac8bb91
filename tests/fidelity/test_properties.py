"""What must hold for any input at all: files a user may give, completions a model may write, rewards, masks, seeds."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from grpo.advantages import group_advantages
from grpo.data import samples_for_step
from grpo.datasets.rows import JSONLinesDataset
from grpo.errors import InputError
from grpo.loss import loss_weights
from grpo.settings.config import TYPES, Config, load_config, read_run_json, resumed_config
from reward_model import MathRewardModel, check_samples, last_integer, load_rewards, score_completions
from tests.conftest import later_slow, numbered

BRACKETS, DIGITS = "[" * 100_000, "1" * 5000  # deeper than Python recurses, longer than it converts


def examples(number: int) -> settings:
    """The same ones every time; the file that a test writes is written anew for each."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def outcome(load: Callable[[], object]) -> str:
    """'loaded', or the one line that is said; a traceback is a failed assertion."""
    try:
        load()
    except InputError as error:
        message = str(error)
        assert message.strip()
        assert len(message.splitlines()) == 1, message
        return message
    except Exception as error:
        raise AssertionError(f"a traceback: {type(error).__name__}") from error
    return "loaded"


# Settings


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**62, max_value=2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["group", "none", "math", ".inf", "0", "1e-5", "auto", "a\nb", "\0", "\ud800", "=", "<<"]),
    st.binary(max_size=4),
    st.dates(),
    st.datetimes(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(), st.none()), inner, max_size=3),
        st.sets(st.integers(), max_size=2),
    ),
    max_leaves=6,
)
STRUCTURES = st.dictionaries(st.one_of(st.sampled_from(list(TYPES)), SCALARS), VALUES, max_size=4)

# YAML that random text seldom hits: what PyYAML's constructors trip over, aliases, numbers and depths without end.
NASTY_YAML = [
    BRACKETS, "{a: " * 2000, f"seed: 0x{'f' * 5000}", f"? 0x{'f' * 5000}\n: 1", f"rewards: [0x{'f' * 5000}]",
    f"seed: {DIGITS}", f"learning_rate: {DIGITS}", f"num_train_steps: 0x{'f' * 300}", "rewards: &a [*a]",
    "rewards: [&a {name: math, correct_reward: *a}]", "&a {<<: *a}", "seed: *nowhere", '!!int ""', 'seed: !!float ""',
    "seed: !!bool x", "seed: !!timestamp x", "seed: 2024-13-45", "seed: 0b_", "rewards: [2024-01-01]",
    "rewards: [{name: 'a:b', x: .nan}]", "rewards: [!!set {a, b}]", "rewards: [!!binary aaaa]", "rewards: [{1: 2}]",
    "seed: !!python/object/apply:os.system [true]", "seed: 1\nseed: 2", '"a\\nb": 1', 'train_file: "a\\nb\\0"',
    'output_dir: "\\ud800"', 'model_name: "\\0"', "? [a]\n: b", "? {a: b}\n: c", "--- 1\n--- 2", "%YAML 3.0\n--- 1",
    "\ufeffseed: 1", f"train_file: {'a' * 300}", "seed: =", "<<: 1", "seed: 1:1:1:1", "temperature: 1e400", "- 1",
    "null", "a", "", "\x00", "\t",
    "\n".join(["rewards:", "- &a0 [x, x]", *(f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30))]),
]  # fmt: skip


def check_config(config: Config) -> None:
    """A Config is whole, its kinds are the declared ones, and run.json can hold it."""
    assert set(vars(config)) == set(TYPES)
    json.dumps(vars(config))
    for key in ("model_name", "train_file", "eval_file", "output_dir"):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(getattr(config, key))  # raises something else where no file can have this name


def check_yaml(content: bytes, folder: Path) -> str:
    path = folder / "mine.yaml"
    path.write_bytes(content)
    return outcome(lambda: check_config(load_config(path)))


@pytest.mark.parametrize(
    "text", later_slow([*NASTY_YAML[1:], BRACKETS], len(NASTY_YAML) - 1), ids=lambda text: text[:30]
)
def test_any_yaml_gives_a_config_or_one_line_even_a_nasty_one(tmp_path: Path, text: str) -> None:
    check_yaml(text.encode("utf-8", "surrogatepass"), tmp_path)
    for key in ("seed", "rewards", "kl_estimator", "clip_range_high", "output_dir"):
        outcome(lambda key=key: check_config(load_config(None, [f"{key}={text}"])))  # type: ignore[misc]


@examples(150)
@given(
    content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
)
def test_any_bytes_give_a_config_or_one_line(tmp_path: Path, content: bytes) -> None:
    check_yaml(content, tmp_path)


@pytest.mark.slow
@examples(200)
@given(
    key=st.sampled_from(list(TYPES)),
    text=st.text(alphabet=st.sampled_from("[]{}:,-&*!?|>'\"%@# \n0a.e~<=x_"), max_size=24),
)
def test_any_punctuation_gives_a_config_or_one_line(tmp_path: Path, key: str, text: str) -> None:
    check_yaml(f"{key}: {text}".encode(), tmp_path)


@pytest.mark.slow
@examples(200)
@given(structure=st.one_of(STRUCTURES, VALUES))
def test_any_structure_gives_a_config_or_one_line(tmp_path: Path, structure: Any) -> None:
    check_yaml(yaml.dump(structure, allow_unicode=False).encode(), tmp_path)


@examples(200)
@given(override=st.one_of(
    st.text(max_size=20),
    st.tuples(st.sampled_from(list(TYPES)), st.text(max_size=20)).map("=".join),
))  # fmt: skip
def test_any_override_gives_a_config_or_one_line(override: str) -> None:
    outcome(lambda: check_config(load_config(None, [override])))


@pytest.mark.slow
@examples(200)
@given(recorded=STRUCTURES)
def test_any_recorded_settings_give_a_config_or_one_line(recorded: dict[Any, Any]) -> None:
    outcome(lambda: check_config(load_config(recorded=recorded)))


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.just("\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


@pytest.mark.slow
@examples(150)
@given(run=st.one_of(
    st.binary(max_size=40),
    JSON_VALUES.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(list(TYPES)), JSON_VALUES, max_size=3).map(
        lambda recorded: json.dumps({"settings": recorded}).encode()
    ),
    st.sampled_from([BRACKETS, DIGITS, f'{{"settings": {{"seed": {DIGITS}}}}}', "\ufeff{}"]).map(str.encode),
))  # fmt: skip
def test_any_run_json_gives_a_config_or_one_line(tmp_path: Path, run: bytes) -> None:
    (tmp_path / "run.json").write_bytes(run)
    outcome(lambda: read_run_json(tmp_path))
    outcome(lambda: check_config(resumed_config(None, [f"output_dir={tmp_path}"])))


# Data


NASTY_LINES = [
    BRACKETS, '{"a": ' * 100_000, f'{{"prompt": "a", "answer": {DIGITS}}}', '{"prompt": "a", "answer": NaN}',
    '{"prompt": "a", "answer": 1e400}', '{"prompt": "\\ud800", "answer": 1}', '{"prompt": "a", "answer": "\\ud800"}',
    '{"prompt": "a", "prompt": "b", "answer": 1}', '\ufeff{"prompt": "a", "answer": 1}', '{"a\\nb": 1}', "null",
    '{"prompt": ["a"]}', '{"prompt": "a\\u2028b", "answer": "x\\ny"}', '{"prompt": "a"}', "", "\x00", " \t\r",
]  # fmt: skip
GOOD_LINE = '{"prompt": "What is 2 + 3?", "answer": "5"}'


def check_jsonl(content: bytes, folder: Path) -> str:
    """Samples that can be tokenized and scored, or one line that names the file."""
    path = folder / "mine.jsonl"
    path.write_bytes(content)
    rewards = load_rewards(["math"])

    def load() -> None:
        dataset = JSONLinesDataset(path)
        check_samples(rewards, dataset, dataset.place)
        assert len(dataset) > 0
        for sample in dataset:
            sample["prompt"].encode()
        score_completions(rewards, list(dataset), ["5"] * len(dataset), [[1]] * len(dataset))

    message = outcome(load)
    assert message == "loaded" or message.startswith(str(path))
    return message


@pytest.mark.parametrize("line", NASTY_LINES, ids=lambda line: line[:30])
def test_any_line_gives_a_sample_or_one_line_even_a_nasty_one(tmp_path: Path, line: str) -> None:
    content = f"{GOOD_LINE}\n{line}\n{GOOD_LINE}\n".encode("utf-8", "surrogatepass")
    message = check_jsonl(content, tmp_path)
    assert message == "loaded" or f"{tmp_path / 'mine.jsonl'}, line 2: " in message


@examples(200)
@given(content=st.one_of(
    st.binary(max_size=60),
    st.lists(JSON_VALUES.map(json.dumps), max_size=3).map(lambda lines: "\n".join(lines).encode()),
    st.fixed_dictionaries({"prompt": JSON_VALUES, "answer": JSON_VALUES}).map(lambda row: json.dumps(row).encode()),
    st.text(max_size=30).map(lambda text: (GOOD_LINE[:-1] + text).encode("utf-8", "replace")),
))  # fmt: skip
def test_any_bytes_give_samples_or_one_line(tmp_path: Path, content: bytes) -> None:
    check_jsonl(content, tmp_path)


# Rewards


NUMERIC = st.text(alphabet=st.sampled_from("0123456789.,+-\u2212 =x\n٣५"), max_size=24)
COMPLETIONS = st.one_of(st.text(max_size=30), NUMERIC, st.text(alphabet=st.characters(), max_size=12))
ANSWERS = st.one_of(
    st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6).map(str), st.sampled_from(["1,234", "-7.0"])
)
# No digit of any script, no sign, no point, no comma.
SILENT = st.text(
    alphabet=st.characters(exclude_categories=("Nd", "Nl", "No"), exclude_characters="+-\u2212.,"), max_size=20
)


@examples(300)
@given(completion=COMPLETIONS, answer=ANSWERS)
def test_a_reward_never_raises_and_stays_in_the_allowed_set(completion: str, answer: Any) -> None:
    sample = {"prompt": "?", "answer": answer}
    assert MathRewardModel(2.0, -0.5).compute_reward(sample, completion) in (2.0, -0.5)
    rewards = load_rewards([{"name": "math", "correct_reward": 2.0, "wrong_reward": -0.5, "weight": 3.0}])
    scores = score_completions(rewards, [sample] * 2, [completion, f"{completion} {answer}"], [[1], [2]])
    assert set(scores.combined.tolist()) <= {6.0, -1.5}
    assert scores.combined[1] == 6.0  # the right answer as the last word
    assert scores.is_correct.tolist() == [float(value == 2.0) for value in scores.by_name["math"].tolist()]


@examples(200)
@given(
    digits=st.integers(1, 20_000), completion=st.sampled_from(["{}", "-{}", "1,{}", "{}.0", "{},", ".{}", "9{}-9{}"])
)
def test_a_number_of_thousands_of_digits_is_only_a_wrong_answer(digits: int, completion: str) -> None:
    text = completion.replace("{}", "7" * digits)
    assert MathRewardModel().compute_reward({"answer": "12"}, text) == 0.0


@examples(300)
@given(completion=COMPLETIONS, before=SILENT, after=SILENT, answer=st.integers(-99, 99))
def test_words_around_a_completion_change_nothing(completion: str, before: str, after: str, answer: int) -> None:
    """Whatever has no digit, sign, point or comma in it."""
    assert last_integer(f"{before} {completion} {after}") == last_integer(completion)
    reward = MathRewardModel().compute_reward
    sample = {"answer": answer}
    assert reward(sample, f"{before} {completion} {after}") == reward(sample, completion)
    assert reward(sample, f"{before} {answer} {after}") == 1.0


@examples(100)
@given(name=st.text(max_size=10), weight=SCALARS, arguments=st.dictionaries(st.text(max_size=6), SCALARS, max_size=2))
def test_any_list_of_rewards_loads_or_gives_one_line(name: str, weight: Any, arguments: dict[str, Any]) -> None:
    for entry in (name, weight, {"name": "math", "weight": weight}, {"name": "math", **arguments}, arguments):
        assert outcome(lambda entry=entry: load_rewards([entry]))  # type: ignore[misc]


# Advantages


@st.composite
def reward_tables(draw: st.DrawFn) -> torch.Tensor:
    """(P, G), float64, in steps of 1/8: sums are exact, so spread is spread and not rounding."""
    groups, size = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    values = draw(st.lists(st.integers(-80, 80), min_size=groups * size, max_size=groups * size))
    return torch.tensor(values, dtype=torch.float64).view(groups, size) / 8


@examples(150)
@given(rewards=reward_tables(), scale=st.sampled_from(["group", "batch", "none"]))
def test_the_advantages_of_a_group_sum_to_0(rewards: torch.Tensor, scale: str) -> None:
    for baseline in ("group", "leave_one_out"):
        sums = group_advantages(rewards, baseline=baseline, scale=scale).sum(1)
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-10)
    whole = group_advantages(rewards, baseline="batch", scale="batch").sum()
    assert abs(whole.item()) < 1e-10


@examples(150)
@given(rewards=reward_tables(), factor=st.floats(0.5, 1e4), shift=st.integers(-1000, 1000))
def test_advantages_do_not_depend_on_the_unit_of_the_rewards(rewards: torch.Tensor, factor: float, shift: int) -> None:
    """Where the std is far above eps, or eps is 0; a shift of a group never matters."""
    assume(all(len(set(group)) > 1 for group in rewards.tolist()))
    exact = group_advantages(rewards, eps=0.0)
    torch.testing.assert_close(group_advantages(rewards * factor + shift, eps=0.0), exact, rtol=1e-8, atol=1e-8)
    # The least std of such a group is 1/8/sqrt(6), so eps takes at most 1e-4 * 8 * sqrt(6) = 0.2 % away, twice that
    # where the factor is a half.
    torch.testing.assert_close(group_advantages(rewards * factor), group_advantages(rewards), rtol=4e-3, atol=1e-12)
    unscaled = group_advantages(rewards * factor, scale="none")
    torch.testing.assert_close(unscaled, factor * group_advantages(rewards, scale="none"))


# Loss weights


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    """(B, C) of any kept tokens, rows and columns without one included."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    kept = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(kept).view(rows, columns)


@examples(200)
@given(mask=masks(), surplus=st.integers(0, 9))
def test_loss_weights_sum_to_the_share_of_what_is_kept(mask: torch.Tensor, surplus: int) -> None:
    (rows, columns), kept = mask.shape, mask.sum(1).tolist()
    length = columns + surplus
    expected = {
        "token": float(sum(kept) > 0),
        "sequence": sum(count > 0 for count in kept) / rows,
        "constant": sum(kept) / (rows * length),
    }
    for aggregation, total in expected.items():
        weights = loss_weights(mask, aggregation, max_completion_length=length, dtype=torch.float64)
        assert weights.sum().item() == pytest.approx(total, rel=0, abs=1e-12)
        assert (weights[mask] > 0).all()
        assert (weights[~mask] == 0).all()


@examples(100)
@given(mask=masks(), aggregation=st.sampled_from(["token", "sequence", "constant"]), cut=st.integers(0, 6))
def test_the_weights_of_a_part_are_a_part_of_the_weights(mask: torch.Tensor, aggregation: str, cut: int) -> None:
    given = {"num_rows": len(mask), "num_tokens": int(mask.sum()), "max_completion_length": 9}
    parts = [loss_weights(part, aggregation, **given) for part in (mask[:cut], mask[cut:])]
    assert torch.equal(torch.cat(parts), loss_weights(mask, aggregation, max_completion_length=9))


# Prompts


@examples(100)
@given(
    size=st.integers(1, 12),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 2**63 - 1),
    first=st.one_of(st.integers(1, 50), st.integers(10**6, 10**9)),
)
def test_every_epoch_is_a_permutation_and_steps_do_not_overlap(
    size: int, batch_size: int, seed: int, first: int
) -> None:
    dataset = numbered(size)
    steps = range(first, first + 2 + math.ceil(2 * size / batch_size))  # at least one whole epoch lies within
    drawn = [
        sample["prompt"]
        for step in steps
        for sample in samples_for_step(dataset, step=step, batch_size=batch_size, seed=seed)
    ]
    assert len(drawn) == len(steps) * batch_size
    start = -((first - 1) * batch_size) % size  # where the first whole epoch begins
    for place in range(start, len(drawn) - size + 1, size):
        assert Counter(drawn[place : place + size]) == Counter(str(number) for number in range(size))
    again = samples_for_step(dataset, step=first, batch_size=batch_size, seed=seed)
    assert [sample["prompt"] for sample in again] == drawn[:batch_size]
