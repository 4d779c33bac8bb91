"""Where the loss and the update of GRPO go wrong without an error: one test a trap, named after it."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import grpo.batch
import train_grpo
from grpo.advantages import group_advantages
from grpo.logprobs import compute_logprobs
from grpo.loss import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    SURROGATES,
    Surrogate,
    clipped_surrogate,
    clipped_tokens,
    kl_divergence,
    loss_weights,
)
from grpo.models.loading import frozen_copy, load_policy
from grpo.models.optimizer import make_optimizer
from grpo.run.metrics import TokenMeans
from grpo.settings.config import load_config
from tests.algorithm.test_loss import EXACT, MASK, doubles, random, value_and_gradient
from tests.conftest import loop_function, patch_loop

NAN, INF = float("nan"), float("inf")
ONE = torch.ones(1, 1)


# The loop, on a tiny model

REWARD_SOURCE = """
def letters(prompts, completions, **_):
    return [sum(character.isalpha() for character in text) / 8 for text in completions]
"""


class Run(NamedTuple):
    """What a run wrote."""

    steps: list[dict[str, Any]]  # rows of metrics.jsonl, the base's left out
    samples: list[dict[str, Any]]  # rows of samples.jsonl


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., Run]:
    """run_training(key=value, ...): a step of train_grpo.py on a tiny model, or several, as the settings say."""
    model = make_model("llama")
    model.generation_config.eos_token_id = [1, 20, 30, 40]  # so that lengths differ
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "letters_reward.py").write_text(REWARD_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {
        "model_name": tmp_path / "model",
        "train_file": tmp_path / "data.jsonl",
        "eval_file": tmp_path / "data.jsonl",
        "rewards": "['letters_reward:letters']",
        "batch_size": 3,
        "group_size": 4,
        "max_completion_length": 8,
        "num_train_steps": 1,
        "num_iterations": 1,
        "num_minibatches": 1,
        "micro_batch_size": 12,
        "kl_coeff": 0.1,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "device": "cpu",
        "dtype": "float32",
    }
    runs: list[Path] = []

    def run(prompts: Sequence[str] = ("1+2=", "abc", "12-7+3=", "x?"), **changes: Any) -> Run:
        samples = [{"prompt": prompt, "answer": row} for row, prompt in enumerate(prompts)]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, samples)))
        runs.append(tmp_path / f"run-{len(runs)}")
        chosen = settings | changes | {"output_dir": runs[-1]}
        train_grpo.main(load_config(overrides=[f"{key}={value}" for key, value in chosen.items()]))
        return Run(
            [row for row in read(runs[-1] / "metrics.jsonl") if row["step"] > 0], read(runs[-1] / "samples.jsonl")
        )

    return run


def spy_on(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """The arguments of every call of a function of grpo/ that the loop makes."""
    spy, calls = spied(loop_function(name))
    patch_loop(monkeypatch, name, spy)
    return calls


def spy_on_surrogate(
    monkeypatch: pytest.MonkeyPatch, name: str = "clipped"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same of a surrogate, and of what says where its clip acts."""
    (loss, loss_calls), (clipped, clipped_calls) = map(spied, SURROGATES[name])
    monkeypatch.setitem(SURROGATES, name, Surrogate(loss, clipped))
    return loss_calls, clipped_calls


def spied(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[dict[str, Any]]]:
    """The function, and a list that takes up the arguments of its calls."""
    calls: list[dict[str, Any]] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(dict(enumerate(args)) | kwargs)
        return function(*args, **kwargs)

    return spy, calls


def spy_on_micro_batches(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """For every minibatch of the run its micro-batches, as the row numbers they hold."""
    found: list[list[Tensor]] = []
    micro_batches = grpo.batch.micro_batches

    def spy(*args: Any, **kwargs: Any) -> list[Tensor]:
        found.append(micro_batches(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(grpo.batch, "micro_batches", spy)
    return found


# Clip


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        # clip_range 0.2: the ratio is clipped to [0.8, 1.2]; the gradient of -r * A with respect to log p is -r * A
        (1.5, 2.0, -2.4, 0.0),  # A > 0, r too high: -min(3.0, 2.4); far enough, no gradient
        (0.5, 2.0, -1.0, -1.0),  # A > 0, r too low: -min(1.0, 1.6); must come back up
        (1.5, -2.0, 3.0, 3.0),  # A < 0, r too high: -min(-3.0, -2.4); must come back down
        (0.5, -2.0, 1.6, 0.0),  # A < 0, r too low: -min(-1.0, -1.6); far enough, no gradient
        (1.1, 2.0, -2.2, -2.2),  # inside nothing is clipped
        (0.9, -2.0, 1.8, 1.8),
        (1.0, 2.0, -2.0, -2.0),  # the first update
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_max_instead_of_min_for_negative_advantages(
    ratio: float, advantage: float, value: float, gradient: float
) -> None:
    got = value_and_gradient(ratio, advantage, clip_range=0.2)
    assert got == pytest.approx((value, gradient), abs=1e-12)
    # The maximum differs wherever the clip does anything, so each of these rows tells the two apart.
    wrong = -max(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert (abs(wrong - value) > 0.1) == (not 0.8 <= ratio <= 1.2 and advantage != 0)


def test_clip_share_counts_non_binding_clips() -> None:
    ratios = doubles([1.5, 0.5, 1.1], [1.5, 0.5, 0.9], [1.5, 0.5, 1.0])
    advantages = doubles([1.0], [-1.0], [0.0])
    low, high = clipped_tokens(ratios.log(), torch.zeros(3, 3), advantages, torch.ones(3, 3), clip_range=0.2)
    assert low.tolist() == [[False, False, False], [False, True, False], [False, False, False]]
    assert high.tolist() == [[True, False, False], [False, False, False], [False, False, False]]
    # Counting every ratio outside [0.8, 1.2] would give 6 instead of 2.
    assert int(((ratios < 0.8) | (ratios > 1.2)).sum()) == 6
    # Binding = the gradient is gone.
    logps = ratios.log().requires_grad_()
    clipped_surrogate(logps, torch.zeros(3, 3), advantages, torch.ones(3, 3), clip_range=0.2).sum().backward()
    assert logps.grad is not None
    assert torch.equal(logps.grad[:2] == 0, (low | high)[:2])


# Old log-probs


def test_old_logps_recomputed_after_an_update() -> None:
    # One logit per action, action 0, A = 1, two steps of gradient descent at rate 1.
    def two_steps(is_old_recomputed: bool) -> Tensor:
        logits = doubles([0.0, 0.0])[0].requires_grad_()
        old = logits.log_softmax(0)[0].detach()
        for _ in range(2):
            logp = logits.log_softmax(0)[0]
            used = logp.detach() if is_old_recomputed else old
            loss = clipped_surrogate(
                logp.view(1, 1), used.view(1, 1), torch.ones(1, 1), torch.ones(1, 1), clip_range=0.2
            )
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            logits = (logits - gradient).detach().requires_grad_()
        return logits.detach()

    # First step: the gradient of log p_0 is (0.5, -0.5). After it p_0 = 0.731, ratio 1.46 > 1.2: clipped, so no second.
    assert two_steps(is_old_recomputed=False).tolist() == [0.5, -0.5]
    assert two_steps(is_old_recomputed=True)[0] > 0.7


@pytest.mark.parametrize("setting", ["num_iterations", "num_minibatches"])
def test_old_logps_recomputed_after_an_update_in_the_loop(run_training: Callable[..., Run], setting: str) -> None:
    # A large step moves the ratio of the second update far from 1; recomputed old log-probs would hold it at 1.
    (once,) = run_training(batch_size=4, learning_rate=0.05, kl_coeff=0).steps
    assert once["clip_ratio/low_mean"] == once["clip_ratio/high_mean"] == 0  # the first update: ratio exactly 1
    (twice,) = run_training(batch_size=4, learning_rate=0.05, kl_coeff=0, **{setting: 2}).steps
    assert twice["clip_ratio/low_mean"] + twice["clip_ratio/high_mean"] > 0.1
    # And they are the sampler's policy: the mean difference is rounding, not the step that was taken.
    assert twice["sampling/logp_difference/mean"] < 1e-5


def test_old_logps_attached_to_the_graph() -> None:
    """A ratio of a graph with itself is 1 with gradient 0: nothing is ever learned, and the loss looks as it should."""
    logps = random(3, 4, seed=0).requires_grad_()
    values = []
    for old in (logps.detach(), logps):
        loss = clipped_surrogate(logps, old, doubles([1.0], [-2.0], [0.5]), MASK, clip_range=0.2)
        values.append((loss.sum().item(), torch.autograd.grad(loss.sum(), logps)[0].abs().max().item()))
    assert values == [(pytest.approx(3.0 * -1 + 2 * 2.0 + 4 * -0.5), 2.0), (pytest.approx(-1.0), 0.0)]


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_old_logps_attached_to_the_graph_in_the_loop(
    run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, num_iterations: int
) -> None:
    calls, _ = spy_on_surrogate(monkeypatch)
    (row,) = run_training(kl_coeff=0, num_iterations=num_iterations).steps
    assert row["grad_norm"] > 0.01
    assert [call[0].requires_grad for call in calls] == [True] * num_iterations
    assert [call[1].requires_grad for call in calls] == [False] * num_iterations
    first_ratio = (calls[0][0] - calls[0][1]).exp()
    assert (first_ratio - 1).abs().max() < 1e-5


# Masks and padding

POISONS = [NAN, INF, -INF, 1e4, -1e4]  # the last two overflow or vanish in the exp


def poisoned(values: Tensor, poison: float) -> Tensor:
    return torch.where(MASK, values, poison)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("place", ["logps", "old_logps", "advantages", "all"])
def test_nan_masked_after_the_exp_in_the_surrogate(place: str, poison: float) -> None:
    clean = {"logps": random(3, 4, seed=0), "old_logps": random(3, 4, seed=1), "advantages": random(3, 4, seed=2)}
    dirty = {name: poisoned(x, poison) if place in (name, "all") else x for name, x in clean.items()}
    weights = loss_weights(MASK, "token", max_completion_length=4, dtype=torch.float64)
    results = []
    for inputs in (clean, dirty):
        logps = inputs["logps"].clone().requires_grad_()
        loss = clipped_surrogate(logps, inputs["old_logps"], inputs["advantages"], MASK, clip_range=0.2)
        (gradient,) = torch.autograd.grad((loss * weights).sum(), logps)
        low, high = clipped_tokens(logps, inputs["old_logps"], inputs["advantages"], MASK, clip_range=0.2)
        assert (loss[~MASK] == 0).all()
        assert (gradient[~MASK] == 0).all()
        assert not (low | high)[~MASK].any()
        results.append((loss.detach(), gradient, low, high))
    for ours, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, expected)
    assert results[0][1].abs().max() > 0.01


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("place", ["logps", "ref_logps", "old_logps", "all"])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_nan_masked_after_the_exp_in_the_kl(estimator: str, place: str, poison: float) -> None:
    clean = {"logps": random(3, 4, seed=0), "ref_logps": random(3, 4, seed=1), "old_logps": random(3, 4, seed=2)}
    dirty = {name: poisoned(x, poison) if place in (name, "all") else x for name, x in clean.items()}
    results = []
    for inputs in (clean, dirty):
        logps = inputs["logps"].clone().requires_grad_()
        kl = kl_divergence(
            logps, inputs["ref_logps"], estimator=estimator, old_logps=inputs["old_logps"], completion_mask=MASK
        )
        (gradient,) = torch.autograd.grad(kl.sum(), logps)
        assert (kl[~MASK] == 0).all()
        assert (gradient[~MASK] == 0).all()
        results.append((kl.detach(), gradient))
    assert torch.equal(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])
    assert (results[0][1][MASK] != 0).all()


def test_nan_masked_after_the_exp_would_show() -> None:
    # The twin of the two tests above: it shows that they can fail.
    logps = torch.where(MASK, random(3, 4, seed=0), 1e4).requires_grad_()
    masked_after = torch.where(MASK, (logps - 0.0).exp(), 0.0)
    (gradient,) = torch.autograd.grad(masked_after.sum(), logps)
    assert masked_after.isfinite().all()
    assert gradient[~MASK].isnan().any()


def test_mask_dropped_in_the_surrogate() -> None:
    """In padding stand the log-probs of pad tokens: finite numbers that would train the model to write them."""
    logps, old, advantages = (random(3, 4, seed=seed) for seed in range(3))
    leaf = logps.clone().requires_grad_()
    loss = clipped_surrogate(leaf, old, advantages, MASK, clip_range=0.2)
    loss.sum().backward()
    assert leaf.grad is not None
    assert loss[~MASK].abs().max() == leaf.grad[~MASK].abs().max() == 0
    assert leaf.grad[MASK].abs().max() > 0
    unmasked = clipped_surrogate(logps, old, advantages, torch.ones(3, 4), clip_range=0.2)
    torch.testing.assert_close(loss[MASK], unmasked[MASK], **EXACT)
    assert unmasked[~MASK].abs().min() > 0.01


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_mask_dropped_in_the_kl(estimator: str) -> None:
    logps, old, ref = (random(3, 4, seed=seed) for seed in range(3))
    leaf = logps.clone().requires_grad_()
    kl = kl_divergence(leaf, ref, estimator=estimator, old_logps=old, completion_mask=MASK)
    kl.sum().backward()
    assert leaf.grad is not None
    assert kl[~MASK].abs().max() == leaf.grad[~MASK].abs().max() == 0
    unmasked = kl_divergence(logps, ref, estimator=estimator, old_logps=old)
    torch.testing.assert_close(kl[MASK], unmasked[MASK], **EXACT)
    assert unmasked[~MASK].abs().min() > 1e-3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_mask_dropped_in_the_weights(aggregation: str) -> None:
    weights = loss_weights(MASK, aggregation, max_completion_length=4)
    assert weights[~MASK].abs().max() == 0
    assert weights[MASK].min() > 0


def test_mask_dropped_in_the_metrics() -> None:
    means = TokenMeans()
    values = torch.tensor([[1.0, 2.0, 60.0], [6.0, -90.0, NAN]])
    means.add(torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), {"kl/mean": values}, maxima=["kl/mean"])
    assert means.metrics() == {"kl/mean": 3.0, "kl/max": 6.0}  # (1 + 2 + 6) / 3, not / 6


def test_mask_dropped_in_the_loop(run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated completions left out: of the surrogate, of the KL, and of the weights' denominator alike."""
    calls = {name: spy_on(monkeypatch, name) for name in ("kl_divergence", "loss_weights")}
    surrogate_calls, _ = spy_on_surrogate(monkeypatch)
    minibatches = spy_on_micro_batches(monkeypatch)
    samples = run_training(mask_truncated_completions=True).samples
    is_truncated = torch.tensor([row["is_truncated"] for row in samples])
    assert 0 < is_truncated.sum() < 12
    ((rows,),) = minibatches  # in another order than the rollout's
    assert rows.sort().values.tolist() == list(range(12))
    masks = [
        surrogate_calls[0][3],
        calls["kl_divergence"][0]["completion_mask"],
        calls["loss_weights"][0][0][rows],
    ]
    for mask in masks:
        assert torch.equal(mask.sum(1) == 0, is_truncated[rows])
        assert torch.equal(mask, masks[0])
    assert not torch.equal(is_truncated[rows], is_truncated)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_all_completions_masked_gives_zero_over_zero(aggregation: str) -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    logps = torch.full((2, 3), -1.0).requires_grad_()
    loss = clipped_surrogate(logps, torch.zeros(2, 3), torch.ones(2, 1), mask, clip_range=0.2)
    for estimator in KL_ESTIMATORS:
        loss = loss + kl_divergence(logps, torch.zeros(2, 3), estimator=estimator, completion_mask=mask)
    total = (loss * loss_weights(mask, aggregation, max_completion_length=3)).sum()
    total.backward()
    assert total.item() == 0
    assert logps.grad is not None
    assert torch.equal(logps.grad, torch.zeros(2, 3))


# KL


def test_kl_ratio_flipped() -> None:
    """r = new / old: a token that has become twice as likely counts twice, not half."""
    logps, ref = doubles([-1.0]).requires_grad_(), doubles([-2.0])
    kl = kl_divergence(logps, ref, estimator="k3_corrected", old_logps=logps.detach() - math.log(2))
    (gradient,) = torch.autograd.grad(kl.sum(), logps)
    assert kl.item() == pytest.approx(2 * math.exp(-1), abs=1e-12)  # k3 at D = -1: 1 / e + 1 - 1
    assert gradient.item() == pytest.approx(2.0, abs=1e-12)  # -r * D; flipped 0.5


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [("k1", -1.0, 1.0), ("k2", 0.5, -1.0), ("k3", math.e - 2, 1 - math.e), ("k3_corrected", math.e - 2, -1.0)],
)
def test_kl_difference_flipped(estimator: str, value: float, gradient: float) -> None:
    """The reference likes the token e times more. Flipped, k3 would still be positive: 1 / e instead of e - 2."""
    logps = doubles([-2.0]).requires_grad_()
    kl = kl_divergence(logps, doubles([-1.0]), estimator=estimator)
    kl.sum().backward()
    assert logps.grad is not None
    assert (kl.item(), logps.grad.item()) == (pytest.approx(value, abs=1e-12), pytest.approx(gradient, abs=1e-12))


def test_kl_sign_flipped(run_training: Callable[..., Run]) -> None:
    """Completions of one token: the advantages of a group cancel in the loss, and what is left is the KL's share."""
    rows = run_training(max_completion_length=1, kl_coeff=0.5, learning_rate=0.03, num_train_steps=3).steps
    assert rows[0]["loss"] == pytest.approx(0.0, abs=1e-6)  # the policy still is the reference
    for row in rows[1:]:
        assert row["kl"] > 1e-3
        assert row["loss"] == pytest.approx(0.5 * row["kl"], abs=1e-5)


def test_kl_of_another_estimator_than_asked_for(
    run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spy_on(monkeypatch, "kl_divergence")
    for estimator in ("k1", "k3_corrected"):
        run_training(kl_estimator=estimator, num_iterations=2)
        assert {call["estimator"] for call in calls} == {estimator}
        for call in calls:
            assert not call[1].requires_grad
            assert not call["old_logps"].requires_grad
        assert torch.equal(calls[0]["old_logps"], calls[1]["old_logps"])  # of the rollout, in both passes
        assert not torch.equal(calls[0][0], calls[1][0])
        calls.clear()


def test_k1_as_the_loss() -> None:
    """Its gradient is 1 whatever the reference is, so in expectation it does nothing. It is not the default."""
    assert load_config().kl_estimator == "k3_corrected"
    logps = random(3, 4, seed=0).requires_grad_()
    gradients: dict[str, list[Tensor]] = {"k1": [], "k3_corrected": []}
    for estimator, found in gradients.items():
        for seed in (1, 2):
            kl = kl_divergence(logps, random(3, 4, seed=seed), estimator=estimator)
            found.append(torch.autograd.grad(kl.sum(), logps)[0])
    assert torch.equal(gradients["k1"][0], gradients["k1"][1])
    assert (gradients["k3_corrected"][0] - gradients["k3_corrected"][1]).abs().max() > 0.1
    assert (gradients["k3_corrected"][0] - gradients["k1"][0]).abs().min() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("log_ratio", [0.0, 3.0, -3.0])
def test_kl_difference_clamped_before_the_exp(log_ratio: float, dtype: torch.dtype) -> None:
    differences = torch.tensor([[25.0, -25.0, 200.0, -200.0]], dtype=dtype)  # D = ref - log p
    logps = torch.full((1, 4), -300.0, dtype=dtype, requires_grad=True)
    kl = kl_divergence(
        logps, logps.detach() + differences, estimator="k3_corrected", old_logps=logps.detach() - log_ratio
    )
    (gradient,) = torch.autograd.grad(kl.sum(), logps)
    ratio = torch.tensor(log_ratio, dtype=dtype).exp()
    # -r * D: a token the reference likes more must become likelier, however far away it is. Clamping D at 20 before the
    # exp of r * k3 would give +5e8 instead of -25.
    torch.testing.assert_close(gradient, ratio * torch.tensor([[-25.0, 25.0, -200.0, 200.0]], dtype=dtype))
    # In the value D is clamped at 20 from above: e^20 - 21; below it is e^-25 + 24 and e^-200 + 199.
    expected = torch.tensor([[485165174.4097903, 24.000000000013888, 485165174.4097903, 199.0]], dtype=dtype)
    torch.testing.assert_close(kl.detach(), ratio * expected)


def test_kl_exp_clamped_alone() -> None:
    logps = torch.full((1, 4), -300.0, requires_grad=True)
    kl = kl_divergence(logps, logps.detach() + torch.tensor([[25.0, -25.0, 200.0, -200.0]]), estimator="k3")
    (gradient,) = torch.autograd.grad(kl.sum(), logps)
    torch.testing.assert_close(kl.detach(), torch.tensor([[485165184.0, 24.0, 485165184.0, 199.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 1.0, 0.0, 1.0]]))  # clamped: 0; else 1 - e^D
    # Clamping the exp alone keeps -D in reach of the gradient: +1 where the policy must go up.
    wrong_logps = torch.full((1, 1), -300.0, requires_grad=True)
    difference = -275.0 - wrong_logps
    (wrong,) = torch.autograd.grad((difference.clamp(max=20).exp() - difference - 1).sum(), wrong_logps)
    assert wrong.item() == 1.0


# The reference


def test_reference_trained(make_model: Callable[..., PreTrainedModel]) -> None:
    policy = make_model("llama")
    before = copy.deepcopy(policy.state_dict())
    reference = frozen_copy(policy)
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert all(weight.requires_grad for weight in policy.parameters())
    tokens, mask = torch.full((1, 3), 5), torch.ones(1, 3)
    logps, _ = compute_logprobs(policy, tokens, mask, tokens, mask)
    ref_logps, _ = compute_logprobs(reference, tokens, mask, tokens, mask)
    assert not ref_logps.requires_grad
    (kl_divergence(logps, ref_logps + 1, estimator="k2")).sum().backward()
    make_optimizer(policy, load_config(overrides=["learning_rate=0.1"])).step()
    for name, weight in reference.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert not any(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items() if "norm" in name)


def test_reference_trained_in_the_loop(
    run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    references: list[PreTrainedModel] = []

    def recorded(model: PreTrainedModel) -> PreTrainedModel:
        references.append(frozen_copy(model))
        return references[-1]

    patch_loop(monkeypatch, "make_reference", recorded)
    rows = run_training(num_train_steps=2, learning_rate=1e-2).steps
    base, _ = load_policy(str(tmp_path / "model"), base_seed=0, device=torch.device("cpu"))
    trained, _ = load_policy(str(tmp_path / "run-0" / "final"), base_seed=0, device=torch.device("cpu"))
    (reference,) = references
    for name, weight in base.state_dict().items():
        assert torch.equal(reference.state_dict()[name], weight), name
    assert not torch.equal(trained.lm_head.weight, base.lm_head.weight)
    assert rows[1]["kl"] > 1e-3  # a reference that moves with the policy would hold it at 0


# One denominator for the whole optimizer step

PROMPT_LENGTHS, LENGTHS = (2, 5, 3, 1, 4, 2), (4, 1, 6, 2, 3, 6)


def step_inputs(padding: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Six ragged rows of random tokens: the four arguments of compute_logprobs."""
    generator = torch.Generator().manual_seed(0)
    prompt_ids, completion_ids = (torch.randint(3, 40, (6, n), generator=generator) for n in (5, 6))
    prompt_mask = torch.tensor([[t >= 5 - n for t in range(5)] for n in PROMPT_LENGTHS])
    completion_mask = torch.tensor([[t < n for t in range(6)] for n in LENGTHS])
    prompt_ids, prompt_mask = (torch.nn.functional.pad(x, (padding, 0)) for x in (prompt_ids, prompt_mask))
    completion_ids, completion_mask = (
        torch.nn.functional.pad(x, (0, padding)) for x in (completion_ids, completion_mask)
    )
    return prompt_ids, prompt_mask, completion_ids, completion_mask


def step_gradient(
    model: PreTrainedModel,
    aggregation: str,
    pieces: Sequence[Sequence[int]],
    *,
    padding: int = 0,
    mean_per_piece: bool = False,
) -> tuple[float, Tensor]:
    """(loss, flat gradient) of one optimizer step that is computed in these micro-batches."""
    inputs = step_inputs(padding)
    mask = inputs[3]
    advantages = group_advantages(doubles([1.0, 0.0, 3.0], [0.0, 2.0, 0.0])).view(6, 1)
    drift = torch.nn.functional.pad(random(6, 6, seed=4, size=0.3), (0, padding))
    weights = loss_weights(mask, aggregation, max_completion_length=6, dtype=torch.float64)
    model.zero_grad()
    total = 0.0
    for rows in map(list, pieces):
        logps, _ = compute_logprobs(model, *(x[rows] for x in inputs), temperature=0.9)
        old, ref = logps.detach() - drift[rows], logps.detach() + 2 * drift[rows]
        loss = clipped_surrogate(logps, old, advantages[rows], mask[rows], clip_range=0.2)
        loss = loss + 0.1 * kl_divergence(
            logps, ref, estimator="k3_corrected", old_logps=old, completion_mask=mask[rows]
        )
        used = weights[rows]
        if mean_per_piece:
            used = loss_weights(mask[rows], aggregation, max_completion_length=6, dtype=torch.float64) / len(pieces)
        piece = (loss * used).sum()
        piece.backward()
        total += piece.item()
    return total, torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_token_mean_per_micro_batch(make_model: Callable[..., PreTrainedModel], aggregation: str) -> None:
    model = make_model("llama").double()
    whole_loss, whole = step_gradient(model, aggregation, [range(6)])
    for pieces in (
        [[0], [1], [2], [3], [4], [5]],
        [[0, 1], [2, 3], [4, 5]],
        [[0, 1, 2, 3], [4, 5]],
        [[5, 2], [1, 0, 4, 3]],
    ):
        loss, gradient = step_gradient(model, aggregation, pieces)
        assert loss == pytest.approx(whole_loss, abs=1e-12)
        torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-12)
    loss, gradient = step_gradient(model, aggregation, [range(6)], padding=3)
    assert loss == pytest.approx(whole_loss, abs=1e-12)
    torch.testing.assert_close(gradient, whole, rtol=0, atol=1e-12)


def test_token_mean_per_micro_batch_is_another_gradient(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama").double()
    _, whole = step_gradient(model, "token", [range(6)])
    _, wrong = step_gradient(model, "token", [[0, 1], [2, 3], [4, 5]], mean_per_piece=True)
    assert (whole - wrong).norm() / whole.norm() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "aggregation", ["token", *(pytest.param(name, marks=pytest.mark.slow) for name in AGGREGATIONS if name != "token")]
)
def test_loss_weights_per_micro_batch_in_the_loop(
    run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, aggregation: str
) -> None:
    settings = {"loss_aggregation": aggregation, "max_grad_norm": 1e9}
    run = run_training(**settings)
    assert len({len(row["completion"]) for row in run.samples}) > 2  # ragged, else a mean per micro-batch would pass
    assert run.steps[0]["grad_norm"] > 0.01
    minibatches = spy_on_micro_batches(monkeypatch)
    for cut in ({"micro_batch_size": 5}, {"micro_batch_tokens": 40}):
        (pieces,) = run_training(**cut, **settings).steps
        assert len(minibatches[-1]) > 2
        assert pieces["grad_norm"] == pytest.approx(run.steps[0]["grad_norm"], rel=1e-4)
        assert pieces["loss"] == pytest.approx(run.steps[0]["loss"], abs=1e-6)


def test_last_micro_batch_loss_reported(run_training: Callable[..., Run]) -> None:
    """Nor a mean of the micro-batches' means: whatever a step reports does not depend on how it was cut up."""
    names = ["loss", "grad_norm", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "num_tokens"]
    names += ["sampling/logp_difference/mean", "reward", "reward_std", "completions/mean_length"]
    settings = {"num_iterations": 2, "learning_rate": 0.03}  # the second pass has a KL and clips
    (whole,) = run_training(**settings).steps
    assert whole["completions/mean_length"] < 7  # the rows are ragged
    assert min(abs(whole["loss"]), whole["kl"], whole["clip_ratio/low_mean"], whole["clip_ratio/high_mean"]) > 1e-3
    (pieces,) = run_training(micro_batch_size=5, **settings).steps
    assert {name: pieces[name] for name in names} == pytest.approx(
        {name: whole[name] for name in names}, rel=2e-3, abs=1e-5
    )


# Optimizer steps


def test_grad_norm_read_after_zero_grad(run_training: Callable[..., Run]) -> None:
    (row,) = run_training().steps
    assert row["grad_norm"] > 0.01
    (clipped,) = run_training(max_grad_norm=1e-6).steps
    assert clipped["grad_norm"] == pytest.approx(row["grad_norm"])  # as it was, not as it was scaled down to


def test_lr_schedule_counted_in_micro_steps(run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rollouts, two passes, two minibatches: eight optimizer steps, in three micro-batches each."""
    calls = spy_on(monkeypatch, "set_learning_rate")
    settings = {"num_train_steps": 2, "num_iterations": 2, "num_minibatches": 2, "batch_size": 4}
    rows = run_training(lr_schedule="linear", learning_rate=8e-4, micro_batch_size=3, **settings).steps
    assert [call[2] for call in calls] == list(range(8))
    # 8 7 6 5 in the first rollout, 4 3 2 1 in the second; the row holds the last one
    assert [row["learning_rate"] for row in rows] == pytest.approx([5e-4, 1e-4])


def test_bf16_weights_round_small_updates_to_zero(make_model: Callable[..., PreTrainedModel]) -> None:
    """100 steps at 1e-6: float32 weights move, the same weights in bfloat16 hardly ever do."""
    config = load_config(overrides=["learning_rate=1e-6"])

    def share_moved(dtype: torch.dtype) -> float:
        model = make_model("llama").to(dtype)
        before = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        optimizer = make_optimizer(model, config)
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        for _ in range(100):
            optimizer.step()
        after = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        return (after != before).float().mean().item()

    assert share_moved(torch.float32) > 0.9
    assert share_moved(torch.bfloat16) < 0.1


def test_bf16_checkpoint_trained_in_bf16(
    run_training: Callable[..., Run], make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """The weights stay float32 whatever the checkpoint and the autocast are."""
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    run_training(dtype="bfloat16", learning_rate=1e-6)
    base, _ = load_policy(str(tmp_path / "model"), base_seed=0, device=torch.device("cpu"))
    trained, _ = load_policy(str(tmp_path / "run-0" / "final"), base_seed=0, device=torch.device("cpu"))
    moved = [(new != old).float().mean() for new, old in zip(trained.parameters(), base.parameters(), strict=True)]
    assert base.dtype == torch.float32
    assert torch.stack(moved).median() > 0.5  # one step of 1e-6


# Bfloat16 and entropy


def returning_logits(logits: Tensor) -> Any:
    """A model with these logits (B, T, V) whatever it is asked."""
    return lambda **_: SimpleNamespace(logits=logits)


def test_bf16_old_logps_scored_in_other_micro_batches(
    run_training: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape of a batch alone moves bf16 log-probs, on some devices: old and new are scored in the same pieces.

    A learning rate of nothing and a clip of nothing: a single ratio other than exactly 1 would be counted.
    """
    calls = spy_on(monkeypatch, "compute_logprobs")
    settings = {"clip_range": 1e-12, "kl_coeff": 0, "dtype": "bfloat16", "num_iterations": 2, "micro_batch_size": 5}
    (row,) = run_training(learning_rate=1e-30, **settings).steps
    sizes = [len(call[1]) for call in calls]
    assert len(sizes) > 6
    assert sizes == sizes[: len(sizes) // 3] * 3  # once before the first pass, then both passes
    assert row["clip_ratio/low_mean"] == row["clip_ratio/high_mean"] == 0.0
    (moved,) = run_training(learning_rate=1e-3, **settings).steps
    assert moved["clip_ratio/low_mean"] + moved["clip_ratio/high_mean"] > 0.1


def test_sampled_log_prob_called_entropy() -> None:
    """Uniform logits: log V. Elsewhere the entropy is that of the whole distribution, whichever token was drawn."""
    probs = torch.tensor([0.7, 0.2, 0.1])
    logits = torch.stack([torch.zeros(3), probs.log(), probs.log(), probs.log()]).unsqueeze(0)  # (1, 4, 3)
    leaf = logits.clone().requires_grad_()
    tokens, ones = torch.tensor([[0, 0, 2]]), torch.ones(1, 3)
    logps, entropies = compute_logprobs(returning_logits(leaf), tokens[:, :1], ones[:, :1], tokens, ones)
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert entropies[0].tolist() == pytest.approx([math.log(3), entropy, entropy], abs=1e-6)
    assert (-logps[0]).tolist() == pytest.approx([math.log(3), -math.log(0.7), -math.log(0.1)], abs=1e-6)
    assert not entropies.requires_grad  # no gradient unless an entropy bonus asks for it
    assert logps.requires_grad
