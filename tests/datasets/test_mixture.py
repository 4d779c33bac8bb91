"""Several data sets in one run: exact shares, a function of (seed, step), rewards and metrics of their own."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import grpo.run.plots
from grpo.data import SOURCE, Dataset, Sample, samples_for_step
from grpo.datasets.mixture import Mixture, divide, load_train_set
from grpo.errors import InputError
from grpo.settings.config import load_config
from grpo.settings.sources import Source, sources_of
from reward_model import load_rewards_of, score_mixture
from tests.run import test_train as helpers
from tests.run.test_resume import assert_same_run, interrupted
from tests.run.test_train import read, resume, train

small = helpers.small  # the fixture


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)


def part(name: str, size: int) -> Dataset:
    rows: list[tuple[str, Sample]] = [
        (f"{name}, line {index + 1}", {"prompt": f"{name}{index}", SOURCE: name}) for index in range(size)
    ]
    return Dataset(name, rows)


def drawn(mixture: Dataset, num_steps: int, *, seed: int = 0, batch_size: int = 7) -> list[str]:
    steps = range(1, num_steps + 1)
    return [
        sample["prompt"]
        for step in steps
        for sample in samples_for_step(mixture, step=step, batch_size=batch_size, seed=seed)
    ]


def test_an_epoch_has_the_exact_shares_and_every_row_comes_equally_often() -> None:
    mixture = Mixture([part("a", 10), part("b", 4)], [15, 6])
    assert (len(mixture), mixture.epoch_size) == (14, 21)
    prompts = drawn(mixture, 30)  # 210 samples, ten epochs
    for start in range(0, 210, 21):
        assert Counter(prompt[0] for prompt in prompts[start : start + 21]) == {"a": 15, "b": 6}
    assert set(Counter(prompts).values()) == {15}  # 150 of ten rows, 60 of four


def test_a_mixture_is_a_function_of_seed_and_step() -> None:
    mixture = Mixture([part("a", 10), part("b", 10)], [10, 10])
    assert drawn(mixture, 9) == drawn(mixture, 9) != drawn(mixture, 9, seed=1)
    assert drawn(mixture, 9)[7:14] == [
        sample["prompt"] for sample in samples_for_step(mixture, step=2, batch_size=7, seed=0)
    ]
    # Data sets of one size are not read in step.
    orders = {name: [prompt[1:] for prompt in drawn(mixture, 9) if prompt[0] == name] for name in "ab"}
    assert orders["a"] != orders["b"]


def test_one_part_of_a_mixture_does_not_change_what_is_read_of_another() -> None:
    """The rows of a come in the same order, whoever else takes part."""
    with_b, with_c = (Mixture([part("a", 10), other], [10, 10]) for other in (part("b", 10), part("c", 3)))
    rows = [[prompt for prompt in drawn(mixture, 9) if prompt[0] == "a"] for mixture in (with_b, with_c)]
    assert rows[0] == rows[1]


def test_a_resampling_round_draws_by_the_shares_too() -> None:
    mixture = Mixture([part("a", 10), part("b", 10)], [30, 10])
    samples = samples_for_step(mixture, step=3, batch_size=40, seed=0, round=1)
    assert Counter(sample[SOURCE] for sample in samples) == {"a": 30, "b": 10}


@pytest.mark.parametrize(
    ("total", "weights", "sizes"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [3, 1], [8, 2]),
        (7, [2, 1], [5, 2]),
        (5, [1e-9, 1], [0, 5]),
        (100, [70, 30], [70, 30]),
    ],
)
def test_places_are_divided_by_the_largest_remainders(total: int, weights: list[float], sizes: list[int]) -> None:
    assert divide(total, weights) == sizes


# Settings


def sources(*entries: dict[str, Any], **changes: Any) -> list[Source]:
    config = load_config(
        None, [f"datasets={json.dumps(entries)}", *(f"{key}={value}" for key, value in changes.items())]
    )
    return sources_of(vars(config))


def test_entries_inherit_what_they_do_not_say() -> None:
    first, second = sources(
        {"path": "x/a.jsonl", "eval_path": "b.csv", "weight": 3},
        {"path": "c", "name": "d", "rewards": ["boxed"], "system_prompt": "be", "prompt_column": "q"},
        chat_template="auto",
        system_prompt="usual",
    )
    assert first == Source("x/a.jsonl", "b.csv", ["math"], "a", 3.0, "usual")
    assert second == Source("c", None, ["boxed"], "d", 1.0, "be", "q")


A, B = {"path": "a.jsonl", "eval_path": "a.jsonl"}, {"path": "b.jsonl"}


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ([A | {"weight": 0}], {}, r"datasets, entry 1: weight: 0 is out of range. Use a finite number above 0"),
        ([A, B | {"weight": -1}], {}, r"datasets, entry 2: weight: -1 is out of range"),
        ([A | {"weight": "much"}], {}, r'datasets, entry 1: weight: "much" is not a number'),
        (
            [A | {"weigth": 1}],
            {},
            r"datasets, entry 1: weigth: not a key of a dataset; did you mean weight\?",
        ),
        ([A | {"name": "a/b"}], {}, r'datasets, entry 1: name: "a/b" has other characters than letters'),
        ([A, A], {}, r'datasets: the name "a" is used 2 times. Give each dataset a unique name'),
        ([B], {}, r"datasets: no entry has an eval_path, so there is nothing to evaluate on"),
        ([{"eval_path": "x"}], {}, r"datasets, entry 1: .* has no path. Write \{path: "),
        ([A | {"rewards": []}], {}, r"datasets, entry 1: rewards: \[\] is not a list of rewards"),
        (
            [A | {"percentage": 60}, B],
            {"total_rows": 9},
            r"datasets: an entry has no percentage, or also a weight",
        ),
        (
            [A | {"percentage": 60}, B | {"percentage": 30}],
            {"total_rows": 9},
            r"percentages add up to 90. Change them",
        ),
        ([A | {"percentage": 100}], {}, r"total_rows: null, but datasets have a percentage"),
    ],
)
def test_entries_that_are_wrong_are_named(entries: list[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sources(*entries, **changes)


@pytest.mark.parametrize("key", ["train_file", "eval_file"])
def test_a_file_beside_datasets_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=f'{key}: "x.jsonl" has no effect, because datasets replaces it'):
        sources(A, B, **{key: "x.jsonl"})


def test_total_rows_without_datasets_is_refused() -> None:
    with pytest.raises(InputError, match="total_rows: 5 has no effect without datasets"):
        load_config(None, ["total_rows=5"])


# Rewards


def test_rows_of_one_data_set_are_not_scored_by_the_rewards_of_another() -> None:
    own = load_rewards_of(
        [
            Source("", None, [{"name": "gsm8k", "weight": 2}, "format"], "tags"),
            Source("", None, ["boxed"], "boxes"),
            Source("", None, ["math"], "idle"),
        ]
    )
    # Five rows, so that putting them back into their order is not what took them out of it.
    names = ("boxes", "tags", "boxes", "tags", "boxes")
    samples = [{"prompt": "x", "answer": "5", SOURCE: name} for name in names]
    good = "<reasoning>a</reasoning><answer>5</answer>"
    scores = score_mixture(own, samples, [r"\boxed{5}", good, good, r"\boxed{5}", r"\boxed{5}"], [[1]] * 5)
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert scores.by_name["gsm8k"].tolist() == [nan, 1.0, nan, 0.0, nan]
    assert scores.by_name["format"].tolist() == [nan, 0.5, nan, 0.0, nan]
    assert scores.by_name["boxed"].tolist() == [1.0, nan, 0.0, nan, 1.0]
    assert scores.by_name["math"].tolist() == [nan] * 5
    assert scores.combined.tolist() == [1.0, 2.5, 0.0, 0.0, 1.0]
    assert scores.is_correct.tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert scores.is_correct_leniently.tolist() == [1.0] * 5


def test_a_reward_that_is_wrong_names_its_data_set() -> None:
    with pytest.raises(InputError, match=r"datasets: tags: rewards: got 'gsm9k', allowed: .*; did you mean gsm8k\?"):
        load_rewards_of([Source("", None, ["gsm9k"], "tags")])


# Runs


@pytest.fixture
def mixed(small: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run on two data sets with a reward each."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"question": f"{n} - 1?"}) + "\n" for n in range(6)))
    entries = [
        {
            "path": small["train_file"],
            "eval_path": small["eval_file"],
            "name": "sums",
            "weight": 3,
            "rewards": ["math"],
        },
        {
            "path": str(other),
            "eval_path": str(other),
            "prompt_column": "question",
            "rewards": ["tests.toy_rewards:even_digits"],
        },
    ]
    keys = small.keys() - {"train_file", "eval_file", "rewards"}
    return {key: small[key] for key in keys} | {"datasets": json.dumps(entries), "eval_metric": "eval/reward"}


def test_a_run_on_a_mixture_reports_each_data_set(mixed: dict[str, Any], tmp_path: Path) -> None:
    rows = train(mixed, tmp_path / "run", num_train_steps=3, save_every=2)
    step = rows[1]
    assert {"datasets/sums/reward", "datasets/other/reward", "rewards/math/mean"} <= set(step)
    assert {"eval/sums/accuracy", "eval/sums/accuracy_low", "eval/sums/reward", "eval/other/reward"} <= set(rows[0])
    assert rows[0]["eval/sums/n"] == 20
    assert rows[0]["eval/other/n"] == 6
    samples = read(tmp_path / "run" / "samples.jsonl")
    for sample in samples:
        is_sum = "+" in sample["prompt"]
        assert (sample["rewards"]["math"] is None) != is_sum
        assert (sample["rewards"]["tests.toy_rewards:even_digits"] is None) == is_sum


@pytest.mark.slow
def test_a_resumed_mixture_is_the_same_to_the_bit(mixed: dict[str, Any], tmp_path: Path) -> None:
    train(mixed, tmp_path / "whole", num_train_steps=4, save_every=2)
    interrupted(tmp_path / "whole", tmp_path / "again")
    resume(tmp_path / "again")
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def test_epochs_are_turned_into_steps(mixed: dict[str, Any], tmp_path: Path) -> None:
    del mixed["num_train_steps"]
    rows = train(mixed, tmp_path / "run", num_train_epochs=0.2, total_rows=33)
    assert rows[-1]["step"] == 2  # 0.2 * 33 / 4, rounded up
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["num_train_epochs"], settings["num_train_steps"]) == (0.2, 2)


def test_a_share_of_less_than_a_row_is_refused(mixed: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"datasets: other: its share of an epoch of 1 rows is less than one row"):
        train(mixed, tmp_path / "run", total_rows=1)


def test_epochs_and_steps_are_alternatives(mixed: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"num_train_epochs and num_train_steps are both set\. Set only one of them"):
        load_config(None, ["num_train_epochs=1", "num_train_steps=5"])
    (tmp_path / "steps.yaml").write_text("num_train_steps: 5\n")
    (tmp_path / "epochs.yaml").write_text("num_train_epochs: 2\n")  # a flag beats either
    assert load_config(tmp_path / "steps.yaml", ["num_train_epochs=1"]).num_train_epochs == 1
    assert load_config(tmp_path / "epochs.yaml", ["num_train_steps=7"]).num_train_epochs is None
    del mixed["num_train_steps"]
    train(mixed, tmp_path / "run", num_train_epochs=0.2, total_rows=33)
    assert resume(tmp_path / "run", num_train_steps=3)[-1]["step"] == 3
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["num_train_epochs"] is None
    assert resume(tmp_path / "run", num_train_epochs=0.4)[-1]["step"] == 4


def test_columns_with_our_names_are_the_users(small: dict[str, Any], tmp_path: Path) -> None:
    """ "dataset" is a column as any other; a system prompt that is null is none of its own."""
    rows = [
        {"prompt": f"{n}+1", "dataset": [n], "system_prompt": own} for n, own in enumerate([None, "mine", None, "mine"])
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    settings = small | {"train_file": data, "eval_file": data, "eval_metric": "eval/reward", "system_prompt": "usual"}
    train(settings, tmp_path / "run", chat_template=template, num_train_steps=1, batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(small["model_name"])
    train_set = load_train_set(
        load_config(None, [f"{k}={v}" for k, v in (settings | {"chat_template": template}).items()]), tokenizer
    )
    texts = [tokenizer.decode(sample["prompt_ids"]) for sample in train_set]
    assert [text[:4] for text in texts] == ["usua", "mine", "usua", "mine"]
    data.write_text('{"prompt": "x", "system_prompt": 5}\n')
    with pytest.raises(InputError, match=r"data\.jsonl, line 1: system_prompt: got 5, expected a text"):
        train(settings, tmp_path / "other", chat_template=template)
