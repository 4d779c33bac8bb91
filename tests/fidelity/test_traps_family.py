"""Where the relatives of GRPO go wrong in the loop without an error: KL in the reward, dynamic sampling, clips."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.algorithms import CLIP_KEYS
from grpo.fast.noise import step_seed
from grpo.logprobs import compute_logprobs
from grpo.loss import SURROGATES
from grpo.models.loading import load_policy
from grpo.rollout import Rollout
from grpo.settings.config import load_config
from tests.conftest import loop_function, patch_loop
from tests.fidelity import test_traps_loss as helpers
from tests.fidelity import test_wiring as wiring

run_training, Run, read = helpers.run_training, helpers.Run, helpers.read
rollouts = wiring.rollouts  # every rollout of a run: the pre-flight's, then those of the steps
spy_on, spy_on_surrogate = helpers.spy_on, helpers.spy_on_surrogate


# KL in the reward

BETA = 0.7
CHARGED = {"algorithm": "reinforce_pp", "kl_coeff": BETA, "num_train_steps": 2, "num_iterations": 2}
CHARGED |= {"learning_rate": 1e-2, "batch_size": 3}


@pytest.fixture
def advantages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], Tensor]]:
    """(arguments, result) of every call the loop makes for advantages."""
    found: list[tuple[tuple[Any, ...], Tensor]] = []
    compute_advantages = loop_function("compute_advantages")

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        found.append((args, compute_advantages(*args, **kwargs)))
        return found[-1][1]

    patch_loop(monkeypatch, "compute_advantages", recorded)
    return found


def test_the_kl_in_the_reward_is_of_the_policy_that_sampled_against_the_base(
    run_training: Callable[..., Run], advantages: list[Any], rollouts: list[Rollout], tmp_path: Path
) -> None:
    """Worked out from the sampler's log-probs and a fresh copy of the base. In step 1 they are one: no charge."""
    run = run_training(**CHARGED)
    base, _ = load_policy(str(tmp_path / "model"), base_seed=0, device=torch.device("cpu"))
    assert len(advantages) == 2
    for step, ((rewards, penalties, mask), _) in enumerate(advantages, start=1):
        rollout = rollouts[step]
        with torch.no_grad():
            ref_logps, _ = compute_logprobs(base, *rollout.tokens())
        expected = BETA * (rollout.sampling_logps - ref_logps)
        torch.testing.assert_close(penalties, expected, rtol=0, atol=1e-4)
        assert torch.equal(mask, rollout.completion_mask)
        assert rewards.shape == (3, 4)
        assert (expected.abs().max() > 0.3) == (step == 2)
        kl = expected.sum().item() / BETA / mask.sum().item()
        assert run.steps[step - 1]["kl"] == pytest.approx(kl, abs=1e-4)


def test_a_kl_in_the_reward_is_charged_once(
    run_training: Callable[..., Run], advantages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every update of a rollout gets the advantages of the rollout, and no KL besides them."""
    calls, _ = spy_on_surrogate(monkeypatch)
    kl_calls = spy_on(monkeypatch, "kl_divergence")
    minibatches = helpers.spy_on_micro_batches(monkeypatch)
    run_training(**CHARGED)
    expected = [
        found[rows]
        for (_, found), micro_batches in zip(advantages, minibatches, strict=True)
        for _ in range(2)  # passes over the rollout
        for rows in micro_batches
    ]
    assert len(calls) >= 4
    for call, given in zip(calls, expected, strict=True):
        assert torch.equal(call[2], given)
    assert [call[0].requires_grad for call in kl_calls] == [False, False]  # one a rollout, of fixed log-probs


def test_samples_of_token_advantages_are_means_of_what_was_trained_on(
    run_training: Callable[..., Run], advantages: list[Any]
) -> None:
    run = run_training(**CHARGED)
    for step, ((_, _, mask), found) in enumerate(advantages, start=1):
        assert found.shape == mask.shape
        assert not found[~mask].any()
        recorded = [row["advantage"] for row in run.samples if row["step"] == step]
        expected = found.sum(1) / mask.sum(1)
        assert recorded == pytest.approx(expected.tolist(), abs=1e-4)


# Dynamic sampling

SOME_IDLE = """
def some_idle(prompts, completions, **_):
    return [0.5 if "=" in prompt else len(text) / 8 for prompt, text in zip(prompts, completions)]

def all_idle(prompts, completions, **_):
    return [0.5 for _ in prompts]
"""


@pytest.fixture
def resampled(
    run_training: Callable[..., Run], rollouts: list[Rollout], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Run, list[Rollout], list[dict[str, Any]]]]:
    """resampled(reward, ...): (the run, its rollouts without the pre-flight's, what the sampler was asked)."""
    (tmp_path / "idle_reward.py").write_text(SOME_IDLE)
    monkeypatch.syspath_prepend(tmp_path)
    # Rewards that never vary are refused before the first step; what is tried here is what the loop does with them.
    patch_loop(monkeypatch, "check_rewards_vary", lambda *_: None)
    calls = spy_on(monkeypatch, "generate_completions")

    def run(reward: str, **changes: Any) -> tuple[Run, list[Rollout], list[dict[str, Any]]]:
        found = run_training(rewards=f"['idle_reward:{reward}']", kl_coeff=0, **changes)
        return found, rollouts[1:], calls[1:]

    return run


def test_a_group_is_replaced_in_its_own_place(resampled: Callable[..., Any]) -> None:
    """Row by row: what stands in samples.jsonl is the first rollout's, or the new group's of that very place."""
    run, (first, *others), calls = resampled("some_idle", max_resample_rounds=1, batch_size=4)
    (second,) = others
    (_, kept), (_, places) = ((call["seed"], call["completion_indices"]) for call in calls)
    assert kept == list(range(16))
    replaced = sorted({row // 4 for row in places})
    assert places == [4 * place + g for place in replaced for g in range(4)]  # whole groups, in their order
    assert 0 < len(replaced) < 4  # else take another seed
    assert replaced != list(range(len(replaced)))
    texts, new = list(first.completions), iter(second.completions)
    for row in places:
        texts[row] = next(new)
    assert [row["completion"] for row in run.samples] == texts
    assert texts != first.completions


def test_a_round_has_noise_of_its_own(resampled: Callable[..., Any]) -> None:
    """All prompts are one: with the noise of round 0 the new group would be the old one again, and no help."""
    _, (first, *others), calls = resampled("all_idle", max_resample_rounds=2, prompts=["abc"] * 4, batch_size=2, seed=6)
    assert [call["seed"] for call in calls] == [step_seed(6, 1, round) for round in (0, 1, 2)]
    assert len(others) == 2
    assert len({tuple(rollout.completions) for rollout in (first, *others)}) == 3


def test_what_is_thrown_away_was_sampled_all_the_same(resampled: Callable[..., Any]) -> None:
    run, found, _ = resampled("all_idle", max_resample_rounds=2, batch_size=3)
    (row,) = run.steps
    assert len(found) == 3
    assert row["num_completions"] == sum(len(rollout.completions) for rollout in found) == 36
    assert row["num_tokens"] == sum(rollout.num_tokens for rollout in found)
    assert len(run.samples) == 12
    assert [sample["completion"] for sample in run.samples] == found[-1].completions


# A surrogate and its clips


@pytest.mark.parametrize(
    ("overrides", "clip_range", "clip_range_high"),
    [
        (["algorithm=grpo", "surrogate=gspo"], 3e-4, 4e-4),
        (["algorithm=dapo", "surrogate=gspo"], 3e-4, 4e-4),
        (["algorithm=gspo", "surrogate=clipped"], 0.2, None),
        (["algorithm=cispo", "surrogate=clipped"], 0.2, None),
        (["algorithm=dapo", "surrogate=cispo"], None, 4.0),
        (["algorithm=dapo", "surrogate=reinforce"], None, None),
        (["algorithm=rloo", "surrogate=clipped"], 0.2, None),
        (["algorithm=dapo"], 0.2, 0.28),
    ],
)
def test_a_clip_range_of_another_surrogate(
    overrides: list[str], clip_range: float | None, clip_range_high: float | None
) -> None:
    """0.2 around GSPO's ratio would never bind, 3e-4 around a token's would always: the range follows the surrogate."""
    config = load_config(None, overrides)
    assert (config.clip_range, config.clip_range_high) == (clip_range, clip_range_high)


@pytest.mark.parametrize("surrogate", ["gspo", "cispo"])
def test_the_loop_uses_the_surrogate_that_was_asked_for(
    run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, surrogate: str
) -> None:
    calls = {name: spy_on_surrogate(monkeypatch, name) for name in SURROGATES}
    config = load_config(None, [f"surrogate={surrogate}"])
    run_training(surrogate=surrogate)
    assert [name for name, found in calls.items() if found != ([], [])] == [surrogate]
    expected = {key: getattr(config, key) for key in CLIP_KEYS[surrogate]}
    for call in (*calls[surrogate][0], *calls[surrogate][1]):
        assert {key: value for key, value in call.items() if isinstance(key, str)} == expected
