"""What a run writes down."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from grpo.batch import Batch
from grpo.errors import NotFiniteError
from grpo.files import append_jsonl
from grpo.rollout import Rollout
from grpo.run.folder import RunFolder
from grpo.run.metrics import StepMetrics, TokenMeans
from grpo.run.records import sample_rows
from grpo.run.run import Run
from grpo.settings.config import load_config
from reward_model import Reward, score_completions

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def rollout() -> Rollout:
    """Two completions of one token each."""
    ids, mask = torch.tensor([[5], [6]]), torch.ones(2, 1, dtype=torch.bool)
    is_truncated = torch.tensor([False, True])
    return Rollout(ids, mask, ids.clone(), mask.clone(), torch.zeros(2, 1), is_truncated, ["2", "3"])


def test_token_means_do_not_depend_on_micro_batches() -> None:
    values, mask = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    whole, parts = TokenMeans(), TokenMeans()
    whole.add(mask, {"kl/mean": values}, maxima=["kl/mean"])
    for row in range(2):
        parts.add(mask[row : row + 1], {"kl/mean": values[row : row + 1]}, maxima=["kl/mean"])
    # (1 + 2 + 3 + 10) / 4; a mean of the micro-batches' means would be (2 + 10) / 2 = 6
    assert whole.metrics() == parts.metrics() == {"kl/mean": 4.0, "kl/max": 10.0}


def test_token_means_ignore_nan_in_padding_and_survive_an_empty_mask() -> None:
    means, empty = TokenMeans(), TokenMeans()
    means.add(torch.tensor([[True, False]]), {"kl": torch.tensor([[2.0, torch.nan]])})
    assert means.metrics() == {"kl": 2.0}
    empty.add(torch.zeros(1, 2, dtype=torch.bool), {"kl": torch.ones(1, 2)})
    assert empty.metrics() == {"kl": 0.0}


def test_jsonl_has_one_object_a_line_and_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": float("nan"), "b": {"c": float("inf")}, "d": "é\n"}])
    append_jsonl(path, [{"a": 1.5}])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"a": None, "b": {"c": None}, "d": "é\n"}, {"a": 1.5}]


def test_a_samples_reward_is_the_combined_one_and_each_stands_by_its_name(rollout: Rollout) -> None:
    rewards = [
        Reward("a", lambda prompts, completions, **_: [1.0, 0.0], weight=1.0),
        Reward("b", lambda prompts, completions, **_: [0.5, 1.0], weight=3.0),
    ]
    samples = [{"prompt": "1+1=", "answer": 2}, {"prompt": "1+1="}]
    scores = score_completions(rewards, samples, rollout.completions, rollout.token_lists())
    assert sample_rows(4, samples, rollout, scores, torch.tensor([[-0.25], [0.25]])) == [
        {
            "step": 4,
            "prompt": "1+1=",
            "completion": "2",
            "answer": 2,
            "reward": 2.5,  # 1 * 1.0 + 3 * 0.5
            "rewards": {"a": 1.0, "b": 0.5},
            "advantage": -0.25,
            "is_truncated": False,
        },
        {
            "step": 4,
            "prompt": "1+1=",
            "completion": "3",
            "answer": None,
            "reward": 3.0,  # 1 * 0.0 + 3 * 1.0
            "rewards": {"a": 0.0, "b": 1.0},
            "advantage": 0.25,
            "is_truncated": True,
        },
    ]


def test_where_tokens_have_advantages_a_completions_is_their_mean() -> None:
    ids, mask = torch.full((2, 3), 5), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    rollout = Rollout(ids, mask, ids, mask, torch.zeros(2, 3), torch.zeros(2).bool(), ["2", "3"])
    scores = score_completions(
        [Reward("a", lambda prompts, completions, **_: [1.0, 0.0], weight=1.0)],
        [{"prompt": "1+1="}] * 2,
        rollout.completions,
        rollout.token_lists(),
    )
    by_token = torch.tensor([[1.0, 2.0, 6.0], [-4.0, NAN, 100.0]])
    rows = sample_rows(1, [{"prompt": "1+1="}] * 2, rollout, scores, by_token)
    assert [row["advantage"] for row in rows] == [3.0, -4.0]  # with the padding it would be no number


def check_finite(loss: float, grad_norm: float, rollout: Rollout, folder: Path, **more: float) -> None:
    """`Run.check_finite` in step 4, of a run into this folder."""
    config = load_config(None, [f"output_dir={folder}", "batch_size=1", "group_size=2"])
    reward = Reward("a", lambda prompts, completions, **_: [1.0, 0.0], weight=1.0)
    samples = [{"prompt": "1+1="}]
    scores = score_completions([reward], samples * 2, rollout.completions, rollout.token_lists())
    metrics = StepMetrics(4, loss=torch.tensor(loss), grad_norm=torch.tensor(grad_norm))
    metrics.more = more
    Run(RunFolder(config)).check_finite(metrics, Batch(samples, rollout, scores, config), torch.zeros(2, 1))


@pytest.mark.parametrize(("loss", "grad_norm"), [(0.5, 2.0), (0.0, 0.0), (-0.5, 1e30)])
def test_finite_loss_and_gradient_norm_go_on(rollout: Rollout, tmp_path: Path, loss: float, grad_norm: float) -> None:
    check_finite(loss, grad_norm, rollout, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("loss", "grad_norm"), [(NAN, 2.0), (INF, 2.0), (-INF, 2.0), (0.5, NAN), (0.5, INF), (-INF, INF)]
)
def test_either_of_loss_and_gradient_norm_ends_the_run(
    rollout: Rollout, tmp_path: Path, loss: float, grad_norm: float
) -> None:
    with pytest.raises(NotFiniteError, match=f"^step 4: loss {loss:.3g}, gradient norm {grad_norm:.3g}; the batch"):
        check_finite(loss, grad_norm, rollout, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".safetensors"]


def test_a_batch_whose_tensors_share_memory_hides_nothing(rollout: Rollout, tmp_path: Path) -> None:
    """safetensors refuses to save two names for one piece of memory."""
    shared = dataclasses.replace(rollout, prompt_ids=rollout.completion_ids)
    with pytest.raises(NotFiniteError, match=r"^step 4: loss nan"):
        check_finite(NAN, 1.0, shared, tmp_path)


@pytest.mark.parametrize("name", ["value_loss", "critic_grad_norm"])
def test_the_critics_loss_and_gradient_norm_end_the_run_too(rollout: Rollout, tmp_path: Path, name: str) -> None:
    check_finite(0.5, 2.0, rollout, tmp_path, **{name: 1.0})
    with pytest.raises(NotFiniteError, match=r"^step 4: "):
        check_finite(0.5, 2.0, rollout, tmp_path, **{name: NAN})
