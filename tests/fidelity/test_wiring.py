"""Every setting reaches the function that it is for, and the loop hands every function the right tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo.batch
import train_grpo
from grpo.fast.noise import step_seed
from grpo.loss import AGGREGATIONS
from grpo.rollout import Rollout, generate_completions
from tests.conftest import loop_function, patch_loop
from tests.fidelity import test_traps_loss as helpers

run_training, Run = helpers.run_training, helpers.Run  # a fixture, what it returns
spy_on, spy_on_surrogate = helpers.spy_on, helpers.spy_on_surrogate

Calls = list[dict[str, Any]]


def given(calls: Calls, *names: str | int) -> set[tuple[Any, ...]]:
    """What the calls were given under these names; None where a call left one out."""
    return {tuple(call.get(name) for name in names) for call in calls}


@pytest.fixture
def rollouts(monkeypatch: pytest.MonkeyPatch) -> list[Rollout]:
    """Every rollout of the run: the pre-flight's, then one a step."""
    found: list[Rollout] = []

    def recorded(*args: Any, **kwargs: Any) -> Rollout:
        found.append(generate_completions(*args, **kwargs))
        return found[-1]

    patch_loop(monkeypatch, "generate_completions", recorded)
    return found


# Settings


def test_every_setting_reaches_its_function(run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a value that is nobody's default: a setting left out or swapped for another cannot pass."""
    names = ["samples_for_step", "generate_completions", "evaluate_greedy", "compute_logprobs"]
    names += ["compute_advantages", "loss_weights", "kl_divergence"]
    calls = {name: spy_on(monkeypatch, name) for name in names}
    calls["clipped_surrogate"], calls["clipped_tokens"] = spy_on_surrogate(monkeypatch)
    cuts, max_norms = [], []
    micro_batches = grpo.batch.micro_batches

    def micro_batches_spied(rollout: Rollout, groups: Tensor, **limits: int) -> list[Tensor]:
        cuts.append((groups.tolist(), limits))
        return micro_batches(rollout, groups, **limits)

    clip_grad_norm = torch.nn.utils.clip_grad_norm_

    def clip_grad_norm_spied(weights: Any, max_norm: float) -> Tensor:
        max_norms.append(max_norm)
        return clip_grad_norm(weights, max_norm)

    monkeypatch.setattr(train_grpo, "clip_grad_norm_", clip_grad_norm_spied)
    monkeypatch.setattr(grpo.batch, "micro_batches", micro_batches_spied)
    run_training(
        seed=8,
        group_size=5,
        max_completion_length=50,
        temperature=1.5,  # hot, so that every completion ends before its 50 tokens
        top_p=0.9,
        top_k=40,
        advantage_baseline="leave_one_out",
        advantage_scale="none",
        clip_range=0.1,
        clip_range_high=0.3,
        dual_clip=2.5,
        kl_estimator="k2",
        loss_aggregation="constant",
        max_grad_norm=5.0,
        num_iterations=2,
        micro_batch_size=15,
        micro_batch_tokens=1000,
        shared_prefix="always",
    )
    assert all(calls.values())
    # Data and noise; step 0 is the pre-flight, on the samples of step 1.
    assert given(calls["samples_for_step"], "step", "batch_size", "seed") == {(1, 3, 8)}
    assert [call.get("seed") for call in calls["generate_completions"]] == [step_seed(8, 0), step_seed(8, 1)]
    # The sampler
    settings = ("group_size", "max_completion_length", "temperature", "top_p", "top_k")
    assert given(calls["generate_completions"], *settings) == {(5, 50, 1.5, 0.9, 40)}
    assert given(calls["evaluate_greedy"], "max_completion_length") == {(50,)}
    # The scorer: reference, policy before the first pass, and both passes
    is_trained = [next(call[0].parameters()).requires_grad for call in calls["compute_logprobs"]]
    assert is_trained == [False, True, True, True]
    assert given(calls["compute_logprobs"], "temperature", "group_size", "shared_prefix") == {(1.5, 5, "always")}
    groups = [[5 * p + g for g in range(5)] for p in range(3)]
    assert cuts == [(groups, {"max_rows": 15, "max_tokens": 1000})]
    # The objective
    assert {call[0].shape for call in calls["compute_advantages"]} == {(3, 5)}
    assert given(calls["compute_advantages"], "baseline", "scale") == {("leave_one_out", "none")}
    for name in ("clipped_surrogate", "clipped_tokens"):
        assert given(calls[name], "clip_range", "clip_range_high", "dual_clip") == {(0.1, 0.3, 2.5)}
    assert given(calls["kl_divergence"], "estimator") == {("k2",)}
    assert given(calls["loss_weights"], 1, "max_completion_length") == {("constant", 50)}
    assert calls["loss_weights"][0][0].shape[1] < 50  # so that the padded width is another number
    assert max_norms == [5.0, 5.0]


def test_the_optimizer_is_the_one_asked_for(run_training: Callable[..., Run], tmp_path: Path) -> None:
    run_training(learning_rate=3e-3, adam_beta1=0.7, adam_beta2=0.8, weight_decay=0.25)
    state = torch.load(tmp_path / "run-0" / "step-000001" / "optimizer.pt", weights_only=True)
    assert [(*group["betas"], group["lr"], group["weight_decay"]) for group in state["param_groups"]] == [
        (0.7, 0.8, 3e-3, 0.25),  # matrices
        (0.7, 0.8, 3e-3, 0.0),  # biases and norms
    ]


# Tensors


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_ratio_is_against_the_scorer_not_the_sampler(
    run_training: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    rollouts: list[Rollout],
    num_iterations: int,
) -> None:
    """Under top_k = 2 the sampler's log-probs are far from the policy's: a ratio against them would not start at 1."""
    (surrogate, share), kl = spy_on_surrogate(monkeypatch), spy_on(monkeypatch, "kl_divergence")
    run_training(top_k=2, num_iterations=num_iterations)
    logps = surrogate[0][0].detach()
    sampling_logps = rollouts[1].sampling_logps
    assert sampling_logps.shape == logps.shape
    assert (sampling_logps - logps).abs().max() > 0.1
    for call in (surrogate[0], share[0]):
        assert torch.equal(call[0].detach(), logps)
        assert torch.equal(call[1], logps)
    assert torch.equal(kl[0][0].detach(), logps)
    # The later pass keeps the old ones, though the policy has moved.
    assert len(surrogate) == len(share) == len(kl) == num_iterations
    for call in (surrogate[-1], share[-1]):
        assert torch.equal(call[1], logps)
        assert torch.equal(call[0].detach(), logps) == (num_iterations == 1)
    for call in kl:
        assert call.get("old_logps") is not None
        assert torch.equal(call["old_logps"], logps)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_the_logged_difference_has_no_sign(
    run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    """A scorer that likes every token more, or less, than the sampler did: with a sign half of such bugs look fine."""
    compute_logprobs = loop_function("compute_logprobs")

    def shifted(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        logps, entropies = compute_logprobs(*args, **kwargs)
        return logps + shift, entropies

    patch_loop(monkeypatch, "compute_logprobs", shifted)
    (row,) = run_training().steps
    found = [row[f"sampling/logp_difference/{kind}"] for kind in ("mean", "max")]
    assert found == pytest.approx([0.5, 0.5], abs=1e-4)


def test_num_tokens_counts_prompt_and_completion_tokens(
    run_training: Callable[..., Run], rollouts: list[Rollout]
) -> None:
    run = run_training(num_train_steps=2)
    counts = []
    for step, rollout in enumerate(rollouts[1:], start=1):
        prompt_tokens = sum(len(row["prompt"]) for row in run.samples if row["step"] == step)  # one a character
        counts.append(prompt_tokens + sum(map(len, rollout.token_lists())))
        assert counts[-1] < rollout.prompt_ids.numel() + rollout.completion_ids.numel()  # padding does not count
    assert [row["num_tokens"] for row in run.steps] == [counts[0], counts[0] + counts[1]]


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_one_steps_gradient_in_the_loop_does_not_depend_on_micro_batches(
    run_training: Callable[..., Run], tmp_path: Path, aggregation: str
) -> None:
    """Every entry of it: after one step AdamW's first moment is (1 - beta1) * gradient.

    k1 is the estimator whose gradient is not 0 where the policy is still the reference.
    """
    settings = {"loss_aggregation": aggregation, "max_grad_norm": 1e9, "kl_coeff": 0.1, "kl_estimator": "k1"}
    num_runs = 0

    def gradient(**changes: Any) -> Tensor:
        nonlocal num_runs
        run_training(**settings, **changes)
        state = torch.load(tmp_path / f"run-{num_runs}" / "step-000001" / "optimizer.pt", weights_only=True)["state"]
        num_runs += 1
        return torch.cat([weight["exp_avg"].flatten() for weight in state.values()]) / (1 - 0.9)

    whole = gradient()
    largest = whole.abs().max()
    assert largest > 1e-3
    for changes in (
        *({"micro_batch_size": size} for size in (1, 2, 3, 5)),
        *({"micro_batch_tokens": tokens} for tokens in (1, 40, 90)),
        {"micro_batch_size": 5, "micro_batch_tokens": 60, "shared_prefix": "always"},
        {"shared_prefix": "never"},
    ):
        assert (gradient(**changes) - whole).abs().max() < 1e-5 * largest, changes
    assert (gradient(seed=1) - whole).abs().max() > 0.1 * largest  # another rollout is another
