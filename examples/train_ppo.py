"""PPO with a learned critic: what GRPO was made from. The seven steps of train_grpo.py before the simplification.

    python examples/train_ppo.py                           from the project's root; algorithm ppo, else config.yaml
    python examples/train_ppo.py --gae_lambda 1 --num_minibatches 2

Read train_grpo.py first. What GRPO takes away, step by step:

  [1] [2]  nothing; but here the completions of a prompt are no group: none is compared with another
  [3]      rewards for single tokens: in GRPO a completion has one reward, here each of its tokens may have one
  [4]      the critic: a second model as large as the policy, with its pass over the rollout, gradients, optimizer state
  [5]      gamma, gae_lambda and the critic's errors: in place of what the critic expects before a token stands the mean
           reward of the group, and all tokens of a completion have one advantage; the KL moves into the loss
  [6]      the value loss with its clip and its learning rate; and shuffling of single completions: groups stay together
  [7]      the critic in every checkpoint

What is left is the rollout, the ratio and its clip. For a text that can be sampled sixteen times, sixteen samples judge
the prompt, and no critic has to be trained first. A critic can do what they cannot: say which token it was.

Letters: P prompts a step, G = group_size, B = P * G completions, C padded completion length; b of B.

Differs from the paper ("Proximal Policy Optimization Algorithms", 1707.06347, algorithm 1):
  - policy and critic share no weights, so there is no weight of the value loss: each gradient is clipped by itself
  - the advantages are whitened over all tokens of a step, and the loss is a mean over tokens (loss_aggregation)
  - the KL against the base is part of the reward ("Fine-Tuning Language Models from Human Preferences", 1909.08593)
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python itself looks beside this file only

from grpo.errors import InputError, errors_explained
from grpo.settings.command_line import parse_command_line
from grpo.settings.config import Config, Options, warn

if __name__ == "__main__":  # before the slow imports: --help and a misspelt flag answer at once
    CONFIG, OPTIONS = parse_command_line(__doc__, has_critic=True)

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from grpo.advantages import whitened
from grpo.data import Sample, samples_for_step
from grpo.datasets.mixture import load_datasets
from grpo.evaluation.greedy import Evaluation, evaluate_greedy
from grpo.evaluation.preflight import outcome_shares, pick_examples, preflight
from grpo.fast.noise import step_seed
from grpo.logprobs import compute_logprobs
from grpo.loss import clipped_surrogate, clipped_tokens, kl_divergence, loss_weights
from grpo.models.device import check_compile, choose_device, compile_trunks, make_autocast, uncompiled
from grpo.models.loading import check_lengths, frozen_copy, load_policy, load_skeleton, loading_settings
from grpo.models.optimizer import learning_rate_at, make_optimizer, set_learning_rate
from grpo.models.saving import save_model, weights_sha256
from grpo.ppo.critic import Critic, clipped_value_loss, clipped_values, explained_variance
from grpo.ppo.gae import generalized_advantages
from grpo.rollout import Rollout, generate_completions
from grpo.run.checkpoint import load_checkpoint, rescue, save_checkpoint
from grpo.run.dry_run import describe, opening_line
from grpo.run.folder import RunFolder, open_run
from grpo.run.records import TokenMeans, check_finite, sample_rows
from reward_model import Scores, check_samples, load_rewards, score_completions


def main(config: Config, options: Options = Options()) -> None:
    """One run: everything it leaves behind is in `config.output_dir`, which it holds under a lock meanwhile."""
    check_settings(config)
    with open_run(config, options, script="examples/train_ppo.py") as run:
        train(config, run)


def check_settings(config: Config) -> None:
    """What other algorithms choose is fixed here: another choice is refused, never passed over."""
    allowed: dict[str, tuple[Any, ...]] = {
        "advantage_baseline": ("critic",),
        "advantage_scale": ("tokens", "none"),
        "surrogate": ("clipped",),
        "kl_in": ("reward",) if config.kl_coeff > 0 else ("reward", "loss"),  # where there is no KL, it is nowhere
        "datasets": (None,),
        "combine": ("sum",),  # single tokens have rewards, which add up
        "reward_scaling": ("identity",),
        "lora_rank": (0,),  # the critic has a trunk of its own, all of which is trained
        "gradient_checkpointing": (False,),
    }
    for key, values in allowed.items():
        if getattr(config, key) not in values:
            choices = " | ".join(map(str, values))
            raise InputError(f"{key}: got {getattr(config, key)}, allowed with a critic: {choices}")


def train(config: Config, run: RunFolder) -> None:
    """The seven steps, over and over."""
    # Set-up. Whatever can be wrong with the input is found here, before any compute.
    warn(config)
    device = choose_device(config.device)
    check_compile(config, device)
    autocast = make_autocast(config.dtype, device)
    eager = uncompiled if config.compile else nullcontext  # where the shapes change with every token
    rewards = load_rewards(config.rewards)
    skeleton, tokenizer = load_skeleton(config.model_name, chat_template=config.chat_template)
    train_set, eval_set = load_datasets(config, tokenizer)
    for dataset in (train_set, eval_set):
        check_samples(rewards, dataset, dataset.place)
        check_lengths(dataset, skeleton, config)
    config = run.plan(train_set.epoch_size)
    if run.options.dry_run:
        print(describe(config, skeleton, tokenizer, train_set))
        return
    print(opening_line(config, device, writes=not run.options.preflight))
    policy, tokenizer = load_policy(config.model_name, **loading_settings(config), device=device)
    reference = frozen_copy(policy) if config.kl_coeff > 0 else None
    critic = Critic(policy)
    if config.compile:
        compile_trunks(policy, reference)
        critic.trunk.compile(dynamic=True)
    # One AdamW for both models, the critic's weights in groups of their own behind the policy's.
    optimizer = make_optimizer(policy, config)
    num_policy_groups = len(optimizer.param_groups)
    critic_config = dataclasses.replace(config, learning_rate=config.critic_learning_rate or config.learning_rate)
    for group in make_optimizer(critic, critic_config).param_groups:
        optimizer.add_param_group(group)
    # Besides the policy, what training moves: a checkpoint needs it.
    moved = {"critic": critic} | ({"reference": reference} if reference is not None and config.ref_update_every else {})

    num_rows = config.batch_size * config.group_size  # B
    num_updates = config.num_iterations * config.num_minibatches  # optimizer steps a rollout
    clip: dict[str, Any] = {key: getattr(config, key) for key in ("clip_range", "clip_range_high", "dual_clip")}
    value_clip: dict[str, Any] = {"value_clip_range": config.value_clip_range}
    counts = {"num_tokens": 0, "num_completions": 0}  # all that was sampled so far; prompts are tokens too
    last_step = config.num_train_steps

    def roll_out(samples: Sequence[Sample], step: int) -> Rollout:
        """Completions for every prompt, from the policy as it is now; the noise belongs to the step."""
        with autocast(), eager():
            return generate_completions(
                policy,
                tokenizer,
                [sample["prompt_ids"] for sample in samples],
                group_size=config.group_size,
                max_completion_length=config.max_completion_length,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                seed=step_seed(config.seed, step),
                stop_strings=config.stop_strings,
            )

    def score(samples: Sequence[Sample], rollout: Rollout) -> Scores:
        """What each completion, and each of its tokens, is worth; one sample a completion."""
        return score_completions(rewards, samples, rollout.completions, rollout.token_lists(), per_token=True)

    def logprobs(model: PreTrainedModel, rollout: Rollout, rows: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """(b, C) log-probs and entropies of these rows, at the temperature they were sampled at."""
        with autocast():
            return compute_logprobs(
                model,
                *rollout.tokens(rows),
                temperature=config.temperature,
                group_size=config.group_size,
                shared_prefix=config.shared_prefix,
                **options,
            )

    def values_of(rollout: Rollout, rows: Tensor) -> Tensor:
        """(b, C) the critic's values of these rows: of the text before each token."""
        with autocast():
            return critic(*rollout.tokens(rows))

    def shuffled(rollout: Rollout, step: int, iteration: int) -> list[list[Tensor]]:
        """Row numbers (b,) for each micro-batch of each minibatch: chance, but a function of (seed, step, pass)."""
        order = torch.from_numpy(np.random.default_rng([config.seed, step, iteration]).permutation(num_rows)).to(device)
        limits = {"max_rows": config.micro_batch_size, "max_tokens": config.micro_batch_tokens}
        return [rollout.micro_batches(rows.unsqueeze(1), **limits) for rows in order.chunk(config.num_minibatches)]

    def evaluate() -> Evaluation:
        """Greedy answers to the held-out problems."""
        limits: dict[str, Any] = {key: getattr(config, key) for key in ("max_completion_length", "stop_strings")}
        with autocast(), eager():
            return evaluate_greedy(policy, tokenizer, eval_set, score, **limits, batch_rows=num_rows)

    def is_due(step: int) -> bool:
        return step % config.eval_every == 0 or step == last_step

    def save(step: int) -> None:
        if step > 0:  # step 0 is the base and a critic that has learned nothing, which can be had again
            save_checkpoint(
                run.folder,
                step,
                policy=policy,
                tokenizer=tokenizer,
                optimizer=optimizer,
                modules=moved,
                counts=counts,
                keep_checkpoints=config.keep_checkpoints,
            )

    # The base as it is, or the newest checkpoint as it was.
    policy.train()
    first_step = 1
    evaluation = None
    if run.checkpoint is None:
        samples = samples_for_step(train_set, step=1, batch_size=config.batch_size, seed=config.seed)
        print(preflight(samples, roll_out(samples, step=0), score))
        if run.options.preflight:
            return
        evaluation = evaluate().having(config.eval_metric)
        run.begin(base_sha256=weights_sha256(policy), examples=pick_examples(evaluation))
        run.append({"step": 0} | evaluation.metrics())
        run.report(0, evaluation, policy, tokenizer)
    else:
        state = load_checkpoint(run.checkpoint, policy, optimizer, moved, run.facts["base_sha256"])
        run.resume(state)
        first_step, counts = state["step"] + 1, {name: state[name] for name in counts}
        if is_due(state["step"]) and "eval/reward" not in run.rows[-1]:  # it failed then, or this is a new last step
            evaluation = evaluate()
            run.amend(evaluation.metrics())
            run.report(state["step"], evaluation, policy, tokenizer)

    steps = range(first_step, last_step + 1)
    progress = tqdm(steps, desc="training", unit="step", initial=first_step - 1, total=last_step, disable=None)
    for step in progress:
        step_start = time.perf_counter()

        # [1] Prompts: a pure function of (seed, step).
        samples = samples_for_step(train_set, step=step, batch_size=config.batch_size, seed=config.seed)

        # [2] Rollout: G completions for every prompt, from the policy as it is now.
        rollout = roll_out(samples, step)
        rollout_time = time.perf_counter() - step_start

        # [3] Rewards: what each token is worth. A reward for the completion as a whole stands on its last token.
        row_samples = [sample for sample in samples for _ in range(config.group_size)]  # B
        with rescue(partial(save, step - 1)):  # a reward is the user's code: its bug must not cost the run
            scores = score(row_samples, rollout)
        assert scores.token_rewards is not None
        token_rewards = scores.token_rewards.to(device)  # (B, C)
        mask = rollout.completion_mask & ~scores.combined.isnan().to(device).unsqueeze(1)  # (B, C) what is trained on
        if config.mask_truncated_completions:
            mask = mask & ~rollout.is_truncated.unsqueeze(1)

        # [4] Fixed terms: log-probs of policy and reference, and the values, all before the first optimizer step and in
        # the micro-batches of the first pass: the first ratios are exactly 1.
        update_start = time.perf_counter()
        passes = [shuffled(rollout, step, iteration) for iteration in range(config.num_iterations)]
        old_logps, old_values, ref_logps = torch.zeros(3, *mask.shape, device=device)  # (B, C) each
        with torch.no_grad():
            for rows in chain.from_iterable(passes[0]):
                old_logps[rows] = logprobs(policy, rollout, rows)[0]
                old_values[rows] = values_of(rollout, rows)
                if reference is not None:
                    ref_logps[rows] = logprobs(reference, rollout, rows)[0]
        means = TokenMeans()
        if reference is not None:
            kl = kl_divergence(old_logps, ref_logps, estimator="k1", completion_mask=mask)  # (B, C)
            token_rewards = token_rewards - config.kl_coeff * kl
            means.add(mask, {"kl": kl})

        # [5] Advantages: how much better it went on, from each token, than the critic expected.
        advantages, returns = generalized_advantages(
            token_rewards, old_values, rollout.completion_mask, gamma=config.gamma, gae_lambda=config.gae_lambda
        )  # (B, C)
        advantages = torch.where(mask, advantages, 0.0)
        if config.advantage_scale == "tokens":
            advantages = whitened(advantages, mask)
        completions = sample_rows(step, row_samples, rollout, scores, advantages)  # for samples.jsonl

        # [6] Update: passes over the rollout in minibatches, shuffled anew for each. Policy and critic learn from the
        # same micro-batches; they share no weights, so the sum of their losses has the gradients of both.
        policy_loss_sum, value_loss_sum = torch.zeros(2, device=device)
        for update, micro_batches in enumerate(chain.from_iterable(passes), start=(step - 1) * num_updates):
            minibatch = torch.cat(micro_batches)
            weights = torch.zeros_like(old_logps)  # (B, C)
            weights[minibatch] = loss_weights(
                mask[minibatch], config.loss_aggregation, max_completion_length=config.max_completion_length
            )
            for rows in micro_batches:
                logps, entropies = logprobs(policy, rollout, rows, entropy_grad=config.entropy_coeff > 0)  # (b, C)
                values = values_of(rollout, rows)  # (b, C)
                surrogate_terms = (logps, old_logps[rows], advantages[rows], mask[rows])
                value_terms = (values, old_values[rows], returns[rows], mask[rows])
                per_token_loss = clipped_surrogate(*surrogate_terms, **clip) - config.entropy_coeff * entropies
                per_token_value_loss = clipped_value_loss(*value_terms, **value_clip)
                policy_loss = (per_token_loss * weights[rows]).sum()
                value_loss = (per_token_value_loss * weights[rows]).sum()
                (policy_loss + value_loss).backward()

                policy_loss_sum += policy_loss.detach()
                value_loss_sum += value_loss.detach()
                low, high = clipped_tokens(*surrogate_terms, **clip)
                means.add(
                    mask[rows],
                    {
                        "entropy": entropies,
                        "clip_ratio/low_mean": low,
                        "clip_ratio/high_mean": high,
                        "value/clip_ratio": clipped_values(*value_terms, **value_clip),
                        # The sampler's log-probs against the scorer's: rounding, unless there is a bug.
                        "sampling/logp_difference/mean": (rollout.sampling_logps[rows] - old_logps[rows]).abs(),
                    },
                    maxima=["sampling/logp_difference/mean"],
                )
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            critic_grad_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), config.max_grad_norm)
            losses, norms = policy_loss_sum + value_loss_sum, grad_norm + critic_grad_norm  # a NaN shows in the sum
            check_finite(losses, norms, run.folder, completions, rollout, advantages)
            learning_rate = set_learning_rate(optimizer, config, update)
            for group in optimizer.param_groups[num_policy_groups:]:
                group["lr"] = learning_rate_at(critic_config, update)
            optimizer.step()
            optimizer.zero_grad()
        if reference is not None and config.ref_update_every and step % config.ref_update_every == 0:
            reference.load_state_dict(policy.state_dict())
        now = time.perf_counter()

        # [7] Record: a row of metrics and every completion; now and then the held-out problems and a checkpoint.
        counts["num_tokens"] += rollout.num_tokens
        counts["num_completions"] += num_rows
        row = {
            "step": step,
            "loss": policy_loss_sum.item() / num_updates,
            "value_loss": value_loss_sum.item() / num_updates,
            "value/explained_variance": explained_variance(old_values, returns, mask),
            **scores.metrics(),
            **outcome_shares(scores, rollout.is_truncated),
            **rollout.metrics(),
            **means.metrics(),
            "grad_norm": grad_norm.item(),
            "critic_grad_norm": critic_grad_norm.item(),
            "learning_rate": learning_rate,
            **counts,
            "step_time": now - step_start,
            "rollout_time": rollout_time,
            "update_time": now - update_start,
        }
        with rescue(partial(run.append, row, completions), partial(save, step)):
            evaluation = evaluate() if is_due(step) else None
        run.append(row | (evaluation.metrics() if evaluation else {}), completions)
        if evaluation:
            run.report(step, evaluation, policy, tokenizer)
        if step % config.save_every == 0 or step == last_step or run.stop_requested:
            save(step)
        if run.stop_requested:
            raise KeyboardInterrupt
        progress.set_postfix(run.status())

    save_model(policy, tokenizer, run.folder / "final")
    run.finish(evaluation or evaluate(), eval_set)


if __name__ == "__main__":
    with errors_explained():
        main(CONFIG, OPTIONS)
