"""The relatives of GRPO that Hugging Face TRL has, by TRL's own code: advantages, loss and gradient, to 1e-10.

As in test_trl.py TRL gets our completions and does its own work in float64. In all of it old and new log-probs differ.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import RLOOConfig, RLOOTrainer

from grpo.advantages import compute_advantages
from grpo.algorithms import CLIP_KEYS
from grpo.logprobs import compute_logprobs
from grpo.loss import SURROGATES, clipped_surrogate, kl_divergence, loss_weights
from tests.conftest import make_tokenizer
from tests.fidelity import test_trl as helpers
from tests.fidelity.test_family_oracle import Objective
from tests.fidelity.test_trl import (
    GROUP_SIZE,
    LENGTHS,
    MAX_LENGTH,
    PROMPTS,
    REWARDS,
    Batch,
    Setting,
    assert_same_gradients,
    completion_ids,
    float64_scorer,
    gradients,
    make_trainer,
    policy_of,
    shake,
    trl_inputs,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, about transformers 6
llama64 = helpers.llama64  # a fixture

# Our row and what differs from it -> the same in TRL's words
ROWS: dict[str, tuple[Objective, dict[str, Any]]] = {
    "grpo": (Objective.of("grpo"), {"loss_type": "dapo"}),
    "grpo, KL of 0.3": (Objective.of("grpo", kl_coeff=0.3), {"loss_type": "dapo"}),
    "dr_grpo": (Objective.of("dr_grpo"), {"loss_type": "dr_grpo"}),
    "dapo": (Objective.of("dapo"), {"loss_type": "dapo"}),
    "gspo": (Objective.of("gspo"), {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "gspo, a wide range": (
        Objective.of("gspo", clip_range=0.05, clip_range_high=0.1),
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "cispo": (Objective.of("cispo"), {"loss_type": "cispo", "epsilon_high": 5.0}),  # theirs is the cap itself
    "cispo, a low cap": (Objective.of("cispo", clip_range_high=0.1), {"loss_type": "cispo", "epsilon_high": 1.1}),
    "dual clip": (Objective.of("dapo", dual_clip=1.4), {"loss_type": "dapo", "delta": 1.4}),
    "entropy bonus": (Objective.of("grpo", entropy_coeff=0.2), {"loss_type": "dapo", "entropy_coef": 0.2}),
}
RLOO = Objective.of("rloo", kl_coeff=0.05)


def charged_advantages(
    objective: Objective, batch: Batch, old_logps: Tensor | None = None, ref_logps: Tensor | None = None
) -> Tensor:
    """Step [5] of train_grpo.py."""
    penalties = torch.zeros(batch.mask.shape, dtype=torch.float64)
    if objective.kl_in == "reward":
        assert old_logps is not None
        penalties = objective.kl_coeff * kl_divergence(
            old_logps, ref_logps, estimator=objective.kl_estimator, completion_mask=batch.mask
        )
    choices = {"baseline": objective.advantage_baseline, "scale": objective.advantage_scale}
    return compute_advantages(batch.rewards, penalties, batch.mask, **choices)


def our_loss(
    model: PreTrainedModel, objective: Objective, batch: Batch, old_logps: Tensor, ref_logps: Tensor | None
) -> Tensor:
    """Steps [5] and [6]."""
    logps, entropies = compute_logprobs(model, *batch.tokens, entropy_grad=objective.entropy_coeff > 0)
    clip = {key: getattr(objective, key) for key in CLIP_KEYS[objective.surrogate]}
    advantages = charged_advantages(objective, batch, old_logps, ref_logps)
    loss = SURROGATES[objective.surrogate].loss(logps, old_logps, advantages, batch.mask, **clip)
    if ref_logps is not None and objective.kl_in == "loss":
        loss = loss + objective.kl_coeff * kl_divergence(
            logps, ref_logps, estimator=objective.kl_estimator, old_logps=old_logps, completion_mask=batch.mask
        )
    loss = loss - objective.entropy_coeff * entropies
    length = MAX_LENGTH
    weights = loss_weights(batch.mask, objective.aggregation, max_completion_length=length, dtype=torch.float64)
    return (loss * weights).sum()


def two_losses(
    model: PreTrainedModel, folder: Path, objective: Objective, **words: Any
) -> tuple[Any, PreTrainedModel, Tensor, Tensor]:
    """(TRL's trainer, our model, its loss, ours) after an optimizer step's worth of change."""
    setting = Setting(
        advantage_scale=objective.advantage_scale,
        clip_range=objective.clip_range or 0.2,
        clip_range_high=objective.high,
        kl_coeff=objective.kl_coeff,
        num_iterations=2,
    )
    trainer = make_trainer(model, folder, setting, scorer=float64_scorer, **words)
    inputs, batch, ours = trl_inputs(trainer), Batch.of(setting), copy.deepcopy(model)
    torch.testing.assert_close(charged_advantages(objective, batch).flatten(), inputs["advantages"], rtol=0, atol=1e-10)
    with torch.no_grad():
        old_logps = compute_logprobs(ours, *batch.tokens)[0]
        ref_logps = compute_logprobs(trainer.ref_model, *batch.tokens)[0] if objective.kl_coeff > 0 else None
    for moved in (trainer.model, ours):
        shake(moved)
    return (
        trainer,
        ours,
        trainer._compute_loss(trainer.model, inputs),
        our_loss(ours, objective, batch, old_logps, ref_logps),
    )


@pytest.mark.parametrize("row", ROWS)
def test_loss_and_gradient_off_policy_are_trls(llama64: PreTrainedModel, tmp_path: Path, row: str) -> None:
    objective, words = ROWS[row]
    trainer, ours, theirs, loss = two_losses(llama64, tmp_path, objective, **words)
    assert loss.dtype == theirs.dtype == torch.float64
    assert loss.item() == pytest.approx(theirs.item(), rel=0, abs=1e-10)
    theirs.backward()
    loss.backward()
    assert_same_gradients(ours, trainer.model)
    assert sum(gradient.abs().sum() for gradient in gradients(ours).values()) > 0.1


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("grpo, KL of 0.3", {"kl_estimator": "k3"}),
        ("dapo", {"clip_range_high": None}),
        ("gspo", {"aggregation": "token"}),
        ("gspo, a wide range", {"surrogate": "clipped"}),
        ("cispo, a low cap", {"clip_range_high": 1.1}),  # TRL's number
        ("dual clip", {"dual_clip": None}),
        ("entropy bonus", {"entropy_coeff": -0.2}),
    ],
    ids=str,
)
def test_trl_sees_a_wrong_choice(llama64: PreTrainedModel, tmp_path: Path, row: str, wrong: dict[str, Any]) -> None:
    """The twin: what is special to a row takes part."""
    objective, words = ROWS[row]
    _, _, theirs, loss = two_losses(
        llama64, tmp_path, dataclasses.replace(objective, **wrong), **words | trl_of(objective)
    )
    assert abs(loss.item() - theirs.item()) > 1e-4


def trl_of(objective: Objective) -> dict[str, Any]:
    """What TRL is to be told whatever ours is told wrongly."""
    return {"epsilon_high": objective.high} if objective.surrogate == "clipped" else {}


def largest_difference(ours: PreTrainedModel, theirs: PreTrainedModel) -> float:
    pairs = zip(gradients(ours).values(), gradients(theirs).values(), strict=True)
    return max((left - right).abs().max().item() for left, right in pairs)


# RLOO: one ratio a completion, exp(sum of log-ratios)


def make_rloo_trainer(model: PreTrainedModel, folder: Path) -> Any:
    arguments = RLOOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(LENGTHS),
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_LENGTH,
        beta=RLOO.kl_coeff,
        num_iterations=2,
        epsilon=1e9,  # no clip: REINFORCE has none
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer: Any = RLOOTrainer(
        model=policy_of(model, folder, has_reference=True),
        reward_funcs=lambda **_: REWARDS,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=make_tokenizer(),
    )
    trainer._generate_single_turn = lambda *_: completion_ids()
    trainer._get_per_token_logps_and_entropies = float64_scorer
    return trainer


@pytest.fixture
def rloo(llama64: PreTrainedModel, tmp_path: Path) -> Callable[..., tuple[Tensor, Tensor, PreTrainedModel, Any]]:
    """rloo(surrogate=None, is_shaken=False): (our advantages, TRL's, our model, its trainer), gradients computed."""

    def run(
        surrogate: Callable[..., Tensor] | None = None, *, is_shaken: bool = False
    ) -> tuple[Tensor, Tensor, PreTrainedModel, Any]:
        trainer, ours, batch = make_rloo_trainer(llama64, tmp_path), copy.deepcopy(llama64), Batch.of(Setting())
        inputs = trl_inputs(trainer)
        with torch.no_grad():
            old_logps = compute_logprobs(ours, *batch.tokens)[0]
            ref_logps = compute_logprobs(trainer.ref_model, *batch.tokens)[0]
        if is_shaken:
            shake(trainer.model)
            shake(ours)
        trainer._compute_loss(trainer.model, inputs).backward()
        advantages = charged_advantages(RLOO, batch, old_logps, ref_logps)
        if surrogate is None:
            loss = our_loss(ours, RLOO, batch, old_logps, ref_logps)
        else:
            logps, _ = compute_logprobs(ours, *batch.tokens)
            weights = loss_weights(batch.mask, "constant", max_completion_length=MAX_LENGTH, dtype=torch.float64)
            loss = (surrogate(logps, old_logps, advantages, batch.mask) * weights).sum()
        (MAX_LENGTH * loss).backward()  # TRL sums over a completion's tokens, we divide by the longest it could be
        return advantages.flatten(), inputs["advantages"], ours, trainer

    return run


def test_rloos_advantages_and_first_gradient_are_trls(rloo: Callable[..., Any]) -> None:
    """The KL is charged to the reward, summed over a completion; it may be negative."""
    advantages, theirs, ours, trainer = rloo()
    torch.testing.assert_close(advantages, theirs, rtol=0, atol=1e-10)
    assert advantages[8:].abs().min() > 1e-3  # equal rewards, unequal charges
    assert_same_gradients(ours, trainer.model)
    assert sum(gradient.abs().sum() for gradient in gradients(ours).values()) > 1


def test_off_policy_trls_rloo_is_another_algorithm(rloo: Callable[..., Any]) -> None:
    """Its gradient is weighted by the ratio of the whole completion; REINFORCE knows no ratio, and a product of ratios
    is no ratio of a token. Written out, the difference is nothing else."""
    _, _, ours, trainer = rloo(is_shaken=True)
    assert largest_difference(ours, trainer.model) > 0.01

    def per_token(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return clipped_surrogate(logps, old, advantages, mask, clip_range=torch.inf)

    _, _, ours, trainer = rloo(per_token, is_shaken=True)
    assert largest_difference(ours, trainer.model) > 0.01

    def per_completion(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        ratio = torch.where(mask, logps - old, 0.0).sum(1, keepdim=True).exp().detach()
        return ratio * SURROGATES["reinforce"].loss(logps, old, advantages, mask)

    _, _, ours, trainer = rloo(per_completion, is_shaken=True)
    assert_same_gradients(ours, trainer.model)


# Where TRL differs


def test_a_dual_clip_within_the_clip_range_is_another_thing_at_trl() -> None:
    """TRL's delta caps the ratio before the clip does. Above 1 + clip_range_high that is the dual clip; below it TRL
    lowers the upper clip of good completions to delta and leaves bad ones at 1 + clip_range_high. Ours bounds bad ones
    at dual_clip, whatever the range, and nothing else."""
    ratio = torch.tensor([[0.5, 0.9, 1.1, 1.25, 1.5, 4.0]], dtype=torch.float64)
    mask = torch.ones_like(ratio)

    def trls(advantage: float, delta: float) -> Tensor:
        return -torch.min(ratio.clamp(max=delta) * advantage, ratio.clamp(0.8, 1.28) * advantage)

    def ours(advantage: float, dual_clip: float) -> Tensor:
        advantages = torch.full((1, 1), advantage, dtype=torch.float64)
        clip = {"clip_range": 0.2, "clip_range_high": 0.28, "dual_clip": dual_clip}
        return clipped_surrogate(ratio.log(), torch.zeros_like(ratio), advantages, mask, **clip)

    for advantage in (1.0, -1.0):
        torch.testing.assert_close(ours(advantage, 2.0), trls(advantage, 2.0))
    assert ours(1.0, 1.2)[0].tolist() == pytest.approx([-0.5, -0.9, -1.1, -1.25, -1.28, -1.28])
    assert trls(1.0, 1.2)[0].tolist() == pytest.approx([-0.5, -0.9, -1.1, -1.2, -1.2, -1.2])
    assert ours(-1.0, 1.2)[0].tolist() == pytest.approx([0.8, 0.9, 1.1, 1.2, 1.2, 1.2])
    assert trls(-1.0, 1.2)[0].tolist() == pytest.approx([0.8, 0.9, 1.1, 1.25, 1.28, 1.28])


def test_trls_entropy_bonus_is_a_token_mean_whatever_the_aggregation(llama64: PreTrainedModel, tmp_path: Path) -> None:
    """Ours is aggregated as the rest of the loss is: beside a surrogate that is divided by another number TRL's bonus
    keeps its size."""
    objective = Objective.of("dr_grpo", entropy_coeff=0.2)
    _, ours, theirs, loss = two_losses(llama64, tmp_path, objective, loss_type="dr_grpo", entropy_coef=0.2)
    assert abs(loss.item() - theirs.item()) > 0.01
    batch = Batch.of(Setting())
    with torch.no_grad():
        entropies = compute_logprobs(ours, *batch.tokens)[1]
    weights = (
        loss_weights(batch.mask, aggregation, max_completion_length=MAX_LENGTH, dtype=torch.float64)
        for aggregation in ("constant", "token")
    )
    constant, token = ((entropies * weight).sum().item() for weight in weights)
    assert loss.item() + 0.2 * constant == pytest.approx(theirs.item() + 0.2 * token, abs=1e-10)
