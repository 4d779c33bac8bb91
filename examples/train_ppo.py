"""PPO with a learned critic, the algorithm that GRPO simplifies. It has the same seven steps as train_grpo.py.

    python examples/train_ppo.py --gae_lambda 1 --num_minibatches 2           run it from the project's root

Read train_grpo.py first. The lines that differ are those that GRPO does not need:

  [1] [2]  no difference, except that completions of the same prompt are not compared with each other
  [3]      rewards per token: in GRPO each completion has one reward, here each token may have one
  [4]      the critic: a second model of the policy's size, with its own forward passes, optimizer state and checkpoints
  [5]      gamma, gae_lambda and the critic's errors: GRPO uses the mean reward of the group instead of a critic
  [6]      the value loss with its clip and learning rate; also, single completions are shuffled, not whole groups

A group of samples estimates the value of a prompt. Only a critic estimates which token made the difference.
Shapes: B = batch_size * group_size completions per step, C padded completion length, b rows of a micro-batch.

Differs from the paper ("Proximal Policy Optimization Algorithms", 1707.06347, algorithm 1):
  - Policy and critic share no weights, so the value loss needs no coefficient. Each gradient is clipped separately.
  - Advantages are whitened over all tokens of a step, and the loss is a mean over tokens (loss_aggregation).
  - The KL to the base is part of the reward ("Fine-Tuning Language Models from Human Preferences", 1909.08593)
"""

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that Python finds grpo/

from grpo.errors import errors_explained
from grpo.settings.command_line import parse_command_line
from grpo.settings.config import Config, Options
from grpo.settings.rules import check_critic

if __name__ == "__main__":  # before the slow imports, so that --help and flag errors are fast
    CONFIG, OPTIONS = parse_command_line(__doc__, has_critic=True)

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from grpo.advantages import whitened
from grpo.batch import Batch, micro_batches
from grpo.data import samples_for_step
from grpo.loss import clipped_surrogate, clipped_tokens, kl_divergence, loss_weights
from grpo.models.optimizer import set_learning_rate
from grpo.ppo.critic import clipped_value_loss, clipped_values, explained_variance
from grpo.ppo.gae import generalized_advantages
from grpo.rollout import Rollout
from grpo.run.metrics import StepMetrics
from grpo.run.run import Run, open_run
from grpo.run.setup import Setup, set_up


def main(config: Config, options: Options = Options()) -> None:
    """One training run, as in train_grpo.py."""
    check_critic(vars(config))
    with open_run(config, options, script="examples/train_ppo.py") as run:
        if (setup := set_up(run.folder)) is not None:
            train(setup, run)


def train(setup: Setup, run: Run) -> None:
    """The training loop: repeat the steps [1] to [7]."""
    config, policy, critic, optimizer = setup.config, setup.policy, setup.critic, setup.optimizer
    assert critic is not None
    num_updates = config.num_iterations * config.num_minibatches  # optimizer steps per rollout
    clip, value_clip = config.clip_kwargs, config.value_clip_range

    for step in run.steps(setup):
        metrics = StepMetrics(step)

        # [1] Prompts: P problems, chosen by (seed, step) alone.
        samples = samples_for_step(setup.train_set, step=step, batch_size=config.batch_size, seed=config.seed)

        # [2] Rollout: group_size completions per prompt, sampled from the current policy.
        rollout = setup.generate_completions(samples, step)
        metrics.lap("rollout_time")

        # [3] Rewards: one per token. A reward for the whole completion is assigned to its last token.
        batch = Batch(samples, rollout, setup.score_completions(samples, rollout), config)
        assert batch.scores.token_rewards is not None
        token_rewards = batch.scores.token_rewards.to(policy.device)  # (B, C)
        mask = batch.trained_tokens & ~batch.scores.combined.isnan().to(policy.device).unsqueeze(1)  # (B, C)
        metrics.lap("reward_time")

        # [4] Fixed terms: log-probs of policy and reference, and the critic's values, before the first optimizer step.
        # They are computed with the micro-batches of the first pass, so the first ratios are exactly 1.
        passes = [shuffled_plan(rollout, config, step, iteration) for iteration in range(config.num_iterations)]
        old_logps = setup.old_logps(rollout, passes[0])  # (B, C)
        old_values = fixed_values(setup, rollout, passes[0])  # (B, C)
        if config.kl_coeff > 0:
            kl = kl_divergence(old_logps, setup.ref_logps(rollout, passes[0]), estimator="k1", completion_mask=mask)
            token_rewards = token_rewards - config.kl_coeff * kl
            metrics.add_tokens(mask, kl=kl)

        # [5] Advantages: how much better was the result, from each token on, than the critic expected?
        advantages, returns = generalized_advantages(
            token_rewards, old_values, rollout.completion_mask, gamma=config.gamma, gae_lambda=config.gae_lambda
        )  # (B, C)
        advantages = torch.where(mask, advantages, 0.0)
        if config.advantage_scale == "tokens":
            advantages = whitened(advantages, mask)

        # [6] Update: passes over the rollout, each shuffled and split into minibatches. Policy and critic learn from
        # the same micro-batches. They share no weights, so the sum of their losses has the gradients of both.
        value_loss_sum, logp_difference = torch.zeros((), device=policy.device), rollout.sampling_logps - old_logps
        aggregation, length = config.loss_aggregation, config.max_completion_length
        for update, minibatch in enumerate(chain.from_iterable(passes), start=(step - 1) * num_updates):
            weights, step_rows = torch.zeros_like(old_logps), torch.cat(minibatch)  # (B, C), row numbers
            weights[step_rows] = loss_weights(mask[step_rows], aggregation, max_completion_length=length)
            for rows in minibatch:  # (b,) row numbers of one micro-batch
                logps, entropies = setup.compute_logprobs(policy, rollout, rows)  # (b, C)
                values = compute_values(setup, rollout, rows)  # (b, C)
                surrogate_terms = (logps, old_logps[rows], advantages[rows], mask[rows])
                value_terms = (values, old_values[rows], returns[rows], mask[rows])
                per_token_loss = clipped_surrogate(*surrogate_terms, **clip) - config.entropy_coeff * entropies
                per_token_value_loss = clipped_value_loss(*value_terms, value_clip_range=value_clip)
                policy_loss = (per_token_loss * weights[rows]).sum()
                value_loss = (per_token_value_loss * weights[rows]).sum()
                (policy_loss + value_loss).backward()
                value_loss_sum += value_loss.detach()
                clipped = clipped_tokens(*surrogate_terms, **clip)
                metrics.add_micro_batch(policy_loss, mask[rows], entropies, clipped, logp_difference[rows])
                is_clipped = clipped_values(*value_terms, value_clip_range=value_clip)
                metrics.add_tokens(mask[rows], **{"value/clip_ratio": is_clipped})
            metrics.grad_norm = clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            critic_norm = clip_grad_norm_(critic.parameters(), config.max_grad_norm)
            metrics.more = {"value_loss": float(value_loss_sum) / num_updates, "critic_grad_norm": float(critic_norm)}
            run.check_finite(metrics, batch, advantages)
            metrics.learning_rate = set_learning_rate(optimizer, config, update)  # also sets the critic's rate
            optimizer.step()
            optimizer.zero_grad()
        setup.update_reference(step)
        metrics.lap("update_time")

        # [7] Record: as in train_grpo.py.
        metrics.more["value/explained_variance"] = explained_variance(old_values, returns, mask)
        run.record(batch, advantages, metrics)

    run.finish()


def compute_values(setup: Setup, rollout: Rollout, rows: Tensor) -> Tensor:
    """(b, C) the critic's values of the text before each token of these rows."""
    assert setup.critic is not None
    with setup.autocast():
        return setup.critic(*rollout.tokens(rows))


@torch.no_grad()
def fixed_values(setup: Setup, rollout: Rollout, plan: Sequence[Sequence[Tensor]]) -> Tensor:
    """(B, C) the critic's values before the first optimizer step, computed with the update's micro-batches."""
    values = torch.zeros_like(rollout.sampling_logps)
    for rows in chain.from_iterable(plan):
        values[rows] = compute_values(setup, rollout, rows)
    return values


def shuffled_plan(rollout: Rollout, config: Config, step: int, iteration: int) -> list[list[Tensor]]:
    """For each optimizer step of a pass, the rows (b,) of its micro-batches. Depends only on (seed, step, pass)."""
    order = np.random.default_rng([config.seed, step, iteration]).permutation(len(rollout.completions))
    minibatches = torch.from_numpy(order).to(rollout.completion_ids.device).chunk(config.num_minibatches)
    limits = {"max_rows": config.micro_batch_size, "max_tokens": config.micro_batch_tokens}
    return [micro_batches(rollout, rows.unsqueeze(1), **limits) for rows in minibatches]


if __name__ == "__main__":
    with errors_explained():
        main(CONFIG, OPTIONS)
