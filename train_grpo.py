"""GRPO: sample a group of answers to each problem, reinforce those that are better than the group's mean, repeat.

    python train_grpo.py                                  a tiny model learns arithmetic, in a minute on a laptop
    python train_grpo.py --learning_rate 1e-4 --seed 3    every key of config.yaml is a flag

Reading order: examples/grpo_from_scratch.py -> [train_grpo.py] -> grpo/data.py -> grpo/rollout.py -> reward_model.py ->
grpo/batch.py -> grpo/logprobs.py -> grpo/advantages.py -> grpo/loss.py. `set_up` and `run` handle models, files,
checkpoints and evaluation; you can learn GRPO without reading them. Three blocks are not used by GRPO itself but by
related algorithms (`--algorithm`, grpo/algorithms.py): dynamic sampling, the KL in the reward, the entropy bonus.

What to change: the data in config.yaml (train_file), the reward in reward_model.py, the algorithm in [5] and [6].
Shapes: P prompts per step, G completions per prompt, B = P * G rows (row p * G + g), C padded completion length, b rows
of a micro-batch. Paper: "DeepSeekMath" (2402.03300), algorithm 1. The defaults differ from it:
  - The loss is a mean over all tokens, as in DAPO. For the paper's loss, set loss_aggregation: sequence.
  - The KL estimator k3 is corrected, so that its gradient is the gradient of KL(policy || reference).
  - A group whose rewards are all equal has advantages of exactly 0, not rounding noise divided by a tiny std.
  - The reference is always the base model. The paper updates it from time to time (ref_update_every).
"""

from grpo.errors import errors_explained
from grpo.settings.command_line import parse_command_line
from grpo.settings.config import Config, Options

if __name__ == "__main__":  # before the slow imports, so that --help and flag errors are fast
    CONFIG, OPTIONS = parse_command_line(__doc__)

import torch
from torch.nn.utils import clip_grad_norm_

from grpo.advantages import compute_advantages
from grpo.batch import Batch, replace_zero_variance_groups
from grpo.data import samples_for_step
from grpo.loss import SURROGATES, kl_divergence, loss_weights
from grpo.models.optimizer import set_learning_rate
from grpo.run.metrics import StepMetrics
from grpo.run.run import Run, open_run
from grpo.run.setup import Setup, set_up


def main(config: Config, options: Options = Options()) -> None:
    """One training run. All output goes to `config.output_dir`, which is locked while the run is active."""
    with open_run(config, options) as run:  # folder lock, Ctrl-C, and saving after an error
        setup = set_up(run.folder)  # checks all input; loads data, rewards, models, optimizer
        if setup is not None:  # None with --dry_run and --preflight, which do not train
            train(setup, run)


def train(setup: Setup, run: Run) -> None:
    """The training loop: repeat the steps [1] to [7]."""
    config, policy, optimizer = setup.config, setup.policy, setup.optimizer
    surrogate, clip = SURROGATES[config.surrogate], config.clip_kwargs  # GRPO: clipped_surrogate, clip_range 0.2
    num_updates = config.num_iterations * config.num_minibatches  # optimizer steps per rollout

    for step in run.steps(setup):  # from 1, or from the step after the checkpoint
        metrics = StepMetrics(step)  # starts the clock

        # [1] Prompts: batch_size = P problems, chosen by (seed, step) alone, so a resumed run sees the same data.
        samples = samples_for_step(setup.train_set, step=step, batch_size=config.batch_size, seed=config.seed)

        # [2] Rollout: G completions per prompt, sampled from the current policy.
        rollout = setup.generate_completions(samples, step)  # B rows of token ids, masks, log-probs, text
        metrics.lap("rollout_time")

        # [3] Rewards: one number per completion.
        batch = Batch(samples, rollout, setup.score_completions(samples, rollout), config)
        if config.max_resample_rounds > 0:  # dynamic sampling (DAPO): repeat [1] to [3] for zero-variance groups
            batch = replace_zero_variance_groups(batch, step, setup.sample_groups)
        rollout, mask = batch.rollout, batch.trained_tokens  # mask: (B, C), 1 = a token included in the loss
        metrics.lap("reward_time")

        # [4] Fixed terms: log-probs under the frozen reference, and under the policy before its first update. With one
        # update per rollout, the latter are the current log-probs, detached, so the ratio is exactly 1.
        plan = batch.plan_micro_batches()  # per optimizer step of a pass: row numbers of its micro-batches
        ref_logps = setup.ref_logps(rollout, plan) if config.kl_coeff > 0 else None  # (B, C)
        old_logps = setup.old_logps(rollout, plan) if num_updates > 1 or config.kl_in == "reward" else None  # (B, C)

        # [5] Advantages: how much better is a completion than the other completions of its prompt?
        penalties = None  # (B, C) penalty per token, if the KL is part of the reward (RLOO, REINFORCE++)
        if config.kl_in == "reward":
            assert old_logps is not None
            assert ref_logps is not None
            kl = kl_divergence(old_logps, ref_logps, estimator=config.kl_estimator, completion_mask=mask)
            penalties = config.kl_coeff * kl
            metrics.add_tokens(mask, kl=kl)
        baseline, scale = config.advantage_baseline, config.advantage_scale  # GRPO: the group's mean and std
        advantages = compute_advantages(batch.rewards, penalties, mask, baseline=baseline, scale=scale)  # (B, 1 or C)

        # [6] Update: num_iterations passes of num_minibatches optimizer steps. Minimize the surrogate, plus a KL to the
        # reference, minus an entropy bonus. Token weights are computed for a whole optimizer step, so the gradients of
        # its micro-batches can simply be summed.
        aggregation, length = config.loss_aggregation, config.max_completion_length
        parts = mask.chunk(config.num_minibatches)  # one per optimizer step: num_minibatches divides batch_size
        weights = torch.cat([loss_weights(part, aggregation, max_completion_length=length) for part in parts])  # (B, C)
        first_update = (step - 1) * num_updates  # optimizer steps before this rollout
        for update, micro_batches in enumerate(plan * config.num_iterations, start=first_update):
            for rows in micro_batches:  # (b,) row numbers
                logps, entropies = setup.compute_logprobs(policy, rollout, rows)  # (b, C)
                old = logps.detach() if old_logps is None else old_logps[rows]
                per_token_loss = surrogate.loss(logps, old, advantages[rows], mask[rows], **clip)  # (b, C)
                if config.kl_in == "loss" and ref_logps is not None:
                    ref, estimator = ref_logps[rows], config.kl_estimator
                    kl = kl_divergence(logps, ref, estimator=estimator, old_logps=old, completion_mask=mask[rows])
                    per_token_loss = per_token_loss + config.kl_coeff * kl
                    metrics.add_tokens(mask[rows], kl=kl)
                if config.entropy_coeff > 0:
                    per_token_loss = per_token_loss - config.entropy_coeff * entropies
                loss = (per_token_loss * weights[rows]).sum()
                loss.backward()
                clipped = surrogate.clipped(logps, old, advantages[rows], mask[rows], **clip)
                logp_difference = rollout.sampling_logps[rows] - old  # sampler minus scorer: only rounding
                metrics.add_micro_batch(loss, mask[rows], entropies, clipped, logp_difference)
            metrics.grad_norm = clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            run.check_finite(metrics, batch, advantages)  # raises an error if the loss or the gradient is NaN or inf
            metrics.learning_rate = set_learning_rate(optimizer, config, update)
            optimizer.step()
            optimizer.zero_grad()
        setup.update_reference(step)  # every ref_update_every steps, if that is set
        metrics.lap("update_time")

        # [7] Record: metrics and completions; if due, an evaluation and a checkpoint. After Ctrl-C, the run ends here.
        run.record(batch, advantages, metrics)

    run.finish()


if __name__ == "__main__":
    with errors_explained():
        main(CONFIG, OPTIONS)
