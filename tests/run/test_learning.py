"""The default base model learns under GRPO, and does not when its rewards are shuffled."""

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tests.run.test_train import read, run

NUM_STEPS = 25


@pytest.fixture(scope="module")
def learn(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that runs the first steps of the default run; the base model is built once, as a user's is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_CACHE", str(tmp_path_factory.mktemp("cache")))

        def learn(name: str, **settings: object) -> list[dict[str, Any]]:
            folder: Path = tmp_path_factory.mktemp(name) / "run"
            result = run({"num_train_steps": NUM_STEPS, "lr_schedule": "constant"} | settings, folder)
            assert result.returncode == 0, result.stderr
            return read(folder / "metrics.jsonl")

        yield learn


@pytest.mark.slow
def test_reward_rises_and_does_not_with_shuffled_rewards(learn: Any) -> None:
    """25 of the default run's 150 steps: accuracy at least + 0.25 with the true rewards, no gain without them."""
    rows = learn("true")
    assert mean(row["reward"] for row in rows[-5:]) > mean(row["reward"] for row in rows[1:6]) + 0.2
    assert rows[-1]["eval/accuracy"] > rows[0]["eval/accuracy"] + 0.25
    assert rows[-1]["completions/mean_length"] > 1.5 * rows[1]["completions/mean_length"]  # it works the problem out

    shuffled = learn("shuffled", rewards="[{name: math, weight: 0}, {name: 'benchmarks.toy:shuffled_math'}]")
    assert shuffled[0]["eval/accuracy"] == rows[0]["eval/accuracy"]  # the same base
    assert shuffled[-1]["eval/accuracy"] < shuffled[0]["eval/accuracy"] + 0.1
