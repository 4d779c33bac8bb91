"""GRPO in one sitting: sample a group of answers, reinforce those that beat their siblings, repeat.

    python train_grpo.py                                   a tiny model learns to work arithmetic out, on a laptop
    python train_grpo.py --learning_rate 1e-4 --seed 3     every key of config.yaml is a flag

Reading order: config.yaml -> [train_grpo.py] (skim the seven steps) -> grpo/data.py -> grpo/rollout.py ->
reward_model.py -> grpo/advantages.py -> grpo/logprobs.py -> grpo/loss.py -> [train_grpo.py] again.

Letters: P prompts a step, G = group_size, B = P * G completions, C padded completion length; p of P, b of B.

As `--algorithm` says this is GRPO, or one of its relatives (grpo/algorithms.py). The default differs from the paper
("DeepSeekMath", 2402.03300, algorithm 1):
  - the loss is a mean over all tokens of the step (DAPO's aggregation); loss_aggregation: sequence is the paper's
  - the KL estimator k3 is corrected, so that its gradient is that of KL(policy || reference)
  - a group whose rewards are all alike contributes exactly nothing, instead of rounding noise
  - the reference is the base model throughout (ref_update_every: 0)
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

from grpo.errors import errors_explained
from grpo.settings.command_line import parse_command_line
from grpo.settings.config import Config, Options, warn

if __name__ == "__main__":  # before the slow imports: --help and a misspelt flag answer at once
    CONFIG, OPTIONS = parse_command_line(__doc__)

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from grpo.advantages import penalized_advantages, zero_variance_groups
from grpo.algorithms import CLIP_KEYS
from grpo.batch import Groups, check_rewards_vary, replace_idle_groups
from grpo.data import Sample, samples_for_step
from grpo.datasets.mixture import load_datasets
from grpo.evaluation.greedy import Evaluation, evaluate_greedy
from grpo.evaluation.preflight import outcome_shares, pick_examples, preflight
from grpo.fast.noise import step_seed
from grpo.logprobs import compute_logprobs
from grpo.loss import SURROGATES, kl_divergence, loss_weights
from grpo.models.device import check_compile, choose_device, compile_trunks, make_autocast, uncompiled
from grpo.models.loading import (
    check_lengths,
    check_trainable,
    load_policy,
    load_skeleton,
    loading_settings,
    make_reference,
    make_trainable,
)
from grpo.models.lora import adapter_off
from grpo.models.merge_lora import save_merged
from grpo.models.optimizer import make_optimizer, set_learning_rate
from grpo.models.saving import save_model, weights_sha256
from grpo.rewards.scores import scaled
from grpo.rollout import Rollout, generate_completions
from grpo.run.checkpoint import load_checkpoint, rescue, save_checkpoint
from grpo.run.dry_run import describe, opening_line
from grpo.run.folder import RunFolder, open_run
from grpo.run.records import TokenMeans, check_finite, metrics_by_dataset, sample_rows
from grpo.settings.sources import sources_of
from reward_model import Scores, check_mixture, load_rewards_of, score_mixture


def main(config: Config, options: Options = Options()) -> None:
    """One run: everything it leaves behind is in `config.output_dir`, which it holds under a lock meanwhile."""
    with open_run(config, options) as run:
        train(config, run)


def train(config: Config, run: RunFolder) -> None:
    """The seven steps, over and over."""
    # Set-up. Whatever can be wrong with the input is found here, before any compute.
    warn(config)
    device = choose_device(config.device)
    check_compile(config, device)
    autocast = make_autocast(config.dtype, device)
    eager = uncompiled if config.compile else nullcontext  # where the shapes change with every token
    rewards = load_rewards_of(sources_of(vars(config)), config.combine)
    skeleton, tokenizer = load_skeleton(config.model_name, chat_template=config.chat_template)
    check_trainable(skeleton, config, device)
    train_set, eval_set = load_datasets(config, tokenizer)
    for dataset in (train_set, eval_set):
        check_mixture(rewards, dataset, dataset.place)
        check_lengths(dataset, skeleton, config)
    config = run.plan(train_set.epoch_size)
    if run.options.dry_run:
        print(describe(config, skeleton, tokenizer, train_set))
        return
    print(opening_line(config, device, writes=not run.options.preflight))
    policy, tokenizer = load_policy(config.model_name, **loading_settings(config), device=device)
    make_trainable(policy, tokenizer, config)
    reference = make_reference(policy) if config.kl_coeff > 0 else None
    if config.compile:
        compile_trunks(policy, reference)
    optimizer = make_optimizer(policy, config)
    moved = {"reference": reference} if reference is not None and config.ref_update_every else {}  # besides the policy

    scale = partial(scaled, scaling=config.reward_scaling, bound=config.reward_clip)  # of the combined rewards

    # The four choices that make the algorithm: advantage, surrogate, aggregation, KL.
    advantages_of = partial(penalized_advantages, baseline=config.advantage_baseline, scale=config.advantage_scale)
    clip = {key: getattr(config, key) for key in CLIP_KEYS[config.surrogate]}
    surrogate = partial(SURROGATES[config.surrogate].loss, **clip)
    where_clipped = partial(SURROGATES[config.surrogate].clipped, **clip)
    ends: dict[str, Any] = {key: getattr(config, key) for key in ("max_completion_length", "stop_strings")}
    length = config.max_completion_length
    weigh = partial(loss_weights, aggregation=config.loss_aggregation, max_completion_length=length)
    kl_to_reference = partial(kl_divergence, estimator=config.kl_estimator)

    num_groups, num_rows = config.batch_size, config.batch_size * config.group_size  # P, B
    groups = torch.arange(num_rows, device=device).view(num_groups, config.group_size)  # (P, G) row numbers
    minibatches = groups.chunk(config.num_minibatches)  # (p, G) each: the rows of one optimizer step
    num_updates = config.num_iterations * config.num_minibatches  # optimizer steps a rollout
    needs_old_logps = num_updates > 1 or config.kl_in == "reward"  # before the first of them
    choose_samples = partial(samples_for_step, train_set, batch_size=config.batch_size, seed=config.seed)
    resampling = (config.group_size, config.max_resample_rounds)
    counts = {"num_tokens": 0, "num_completions": 0}  # prompt and completion tokens, completions sampled so far
    last_step = config.num_train_steps

    def roll_out(
        samples: Sequence[Sample], step: int, round: int = 0, places: Sequence[int] = range(num_groups)
    ) -> Rollout:
        """A group of completions for every prompt, from the policy as it is now. Step and place decide the noise."""
        with autocast(), eager():
            return generate_completions(
                policy,
                tokenizer,
                [sample["prompt_ids"] for sample in samples],
                group_size=config.group_size,
                **ends,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                seed=step_seed(config.seed, step, round),
                completion_indices=groups[list(places)].flatten().tolist(),
            )

    def score(samples: Sequence[Sample], rollout: Rollout) -> Scores:
        """What each completion is worth; one sample a completion."""
        return score_mixture(rewards, samples, rollout.completions, rollout.token_lists(), combine=config.combine)

    def judged(samples: Sequence[Sample], rollout: Rollout) -> Groups:
        """The groups of these prompts with what they are worth; row p * G + g belongs to prompt p."""
        row_samples = [sample for sample in samples for _ in range(config.group_size)]
        return Groups(row_samples, rollout, score(row_samples, rollout), scale)

    def sample_groups(step: int, round: int, places: Sequence[int]) -> Groups:
        """Dynamic sampling: [1], [2] and [3] once more, for places whose groups are to be replaced."""
        samples = choose_samples(step=step, round=round)
        chosen = [samples[place] for place in places]
        return judged(chosen, roll_out(chosen, step, round, places))

    def logprobs(model: PreTrainedModel, rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(b, C) log-probs and entropies of these rows, at the temperature they were sampled at."""
        with autocast():
            return compute_logprobs(
                model,
                *rollout.tokens(rows),
                temperature=config.temperature,
                group_size=config.group_size,
                shared_prefix=config.shared_prefix,
                entropy_grad=config.entropy_coeff > 0,
            )

    @torch.no_grad()
    def fixed_logps(model: PreTrainedModel, rollout: Rollout, micro_batches: Sequence[Sequence[Tensor]]) -> Tensor:
        """(B, C) without gradient; NaN for rows that are not scored."""
        rows = torch.cat(list(chain.from_iterable(micro_batches)))
        parts = [logprobs(model, rollout, batch)[0] for batch in chain.from_iterable(micro_batches)]
        return parts[0].new_full((num_rows, parts[0].shape[1]), torch.nan).index_copy(0, rows, torch.cat(parts))

    def reference_logps(rollout: Rollout, micro_batches: Sequence[Sequence[Tensor]]) -> Tensor:
        """(B, C) of the frozen reference, which with LoRA is the policy without its adapter."""
        assert reference is not None
        with adapter_off(reference):
            return fixed_logps(reference, rollout, micro_batches)

    def batches_to_score(rollout: Rollout, is_idle: Tensor) -> list[list[Tensor]]:
        """For each minibatch the row numbers of its forward passes, (b,) each."""
        limits = {"max_rows": config.micro_batch_size, "max_tokens": config.micro_batch_tokens}
        scored = [without_idle(rows, is_idle) if idle_adds_nothing(config) else rows for rows in minibatches]
        return [rollout.micro_batches(rows, **limits) for rows in scored]

    def evaluate() -> Evaluation:
        """Greedy answers to the held-out problems."""
        with autocast(), eager():
            return evaluate_greedy(policy, tokenizer, eval_set, score, **ends, batch_rows=num_rows)

    def is_due(step: int) -> bool:
        return step % config.eval_every == 0 or step == last_step

    def save(step: int) -> None:
        if step > 0:  # step 0 is the base, which can be had again
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
        samples = choose_samples(step=1)
        rollout = roll_out(samples, step=0)
        print(preflight(samples, rollout, score))
        if run.options.preflight:
            return
        if config.max_resample_rounds > 0:
            check_rewards_vary(judged(samples, rollout), *resampling, partial(sample_groups, 0))
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
        samples = choose_samples(step=step)  # P

        # [2] Rollout: a group of completions for every prompt, from the policy as it is now.
        rollout = roll_out(samples, step)  # B = P * G completions
        rollout_time = time.perf_counter() - step_start

        # [3] Rewards: what each completion is worth. With dynamic sampling groups that teach nothing are then replaced.
        with rescue(partial(save, step - 1)):  # a reward is the user's code: its bug must not cost the run
            batch = judged(samples, rollout)
            batch, discarded = replace_idle_groups(batch, *resampling, partial(sample_groups, step))
        rollout, scores = batch.rollout, batch.scores
        grouped_rewards = batch.rewards(config.group_size)  # (P, G)
        is_idle = zero_variance_groups(grouped_rewards)  # (P,) nothing to tell siblings apart by
        mask = rollout.completion_mask  # (B, C)
        if config.mask_truncated_completions:
            mask = mask & ~rollout.is_truncated.unsqueeze(1)

        # [4] Fixed terms: log-probs of the reference, and of the policy before its first optimizer step, in the micro-
        # batches of the update. With one optimizer step the latter are its own, detached: the ratio is exactly 1.
        update_start = time.perf_counter()
        micro_batches = batches_to_score(rollout, is_idle)
        ref_logps = reference_logps(rollout, micro_batches) if reference is not None else None  # (B, C)
        all_old_logps = fixed_logps(policy, rollout, micro_batches) if needs_old_logps else None  # (B, C)

        # [5] Advantages: how much better than its siblings; a KL in the reward is charged before they are compared.
        means = TokenMeans()
        penalties = torch.zeros_like(mask, dtype=torch.float32)  # (B, C)
        if config.kl_in == "reward":
            assert all_old_logps is not None
            assert ref_logps is not None
            kl = kl_to_reference(all_old_logps, ref_logps, completion_mask=mask)
            penalties = config.kl_coeff * kl
            means.add(mask, {"kl": kl})
        advantages = advantages_of(grouped_rewards.to(device), penalties, mask)  # (B, 1), or (B, C) under scale tokens
        completions = sample_rows(step, batch.samples, rollout, scores, advantages)  # for samples.jsonl

        # [6] Update. The weights of a whole optimizer step come first, so that its micro-batches just add gradients up.
        weights = torch.cat([weigh(mask[rows.flatten()]) for rows in minibatches])  # (B, C)
        loss_sum = torch.zeros((), device=device)
        for update, minibatch in enumerate(micro_batches * config.num_iterations, start=(step - 1) * num_updates):
            for rows in minibatch:
                logps, entropies = logprobs(policy, rollout, rows)  # (b, C)
                old_logps = logps.detach() if all_old_logps is None else all_old_logps[rows]
                per_token_loss = surrogate(logps, old_logps, advantages[rows], mask[rows])
                if ref_logps is not None and config.kl_in == "loss":
                    kl = kl_to_reference(logps, ref_logps[rows], old_logps=old_logps, completion_mask=mask[rows])
                    per_token_loss = per_token_loss + config.kl_coeff * kl
                    means.add(mask[rows], {"kl": kl})
                if config.entropy_coeff > 0:
                    per_token_loss = per_token_loss - config.entropy_coeff * entropies
                loss = (per_token_loss * weights[rows]).sum()
                loss.backward()

                loss_sum += loss.detach()
                low, high = where_clipped(logps, old_logps, advantages[rows], mask[rows])
                means.add(
                    mask[rows],
                    {
                        "entropy": entropies,
                        "clip_ratio/low_mean": low,
                        "clip_ratio/high_mean": high,
                        # The sampler's log-probs against the scorer's: rounding, unless there is a bug.
                        "sampling/logp_difference/mean": (rollout.sampling_logps[rows] - old_logps).abs(),
                    },
                    maxima=["sampling/logp_difference/mean"],
                )
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            check_finite(loss_sum, grad_norm, run.folder, completions, rollout, advantages)
            learning_rate = set_learning_rate(optimizer, config, update)
            optimizer.step()
            optimizer.zero_grad()
        if reference is not None and config.ref_update_every and step % config.ref_update_every == 0:
            reference.load_state_dict(policy.state_dict())
        now = time.perf_counter()

        # [7] Record: a row of metrics and every completion; now and then the held-out problems and a checkpoint.
        sampled = [rollout, *discarded]
        counts["num_tokens"] += sum(part.num_tokens for part in sampled)
        counts["num_completions"] += sum(len(part.completions) for part in sampled)
        row = {
            "step": step,
            "loss": loss_sum.item() / num_updates,
            **scores.metrics(),
            **metrics_by_dataset(batch.samples, scores),
            "frac_reward_zero_std": is_idle.float().mean().item(),
            **outcome_shares(scores, rollout.is_truncated),
            **rollout.metrics(),
            **means.metrics(),
            "grad_norm": grad_norm.item(),
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
    if config.save_merged:
        save_merged(run.folder / "final", run.folder / "final-merged")
    run.finish(evaluation or evaluate(), eval_set)


def idle_adds_nothing(config: Config) -> bool:
    """Whether a group whose rewards are all alike has a gradient of exactly 0: siblings are its baseline, by themselves
    and not whitened with others, and nothing besides the surrogate acts on it."""
    among_siblings = config.advantage_baseline in ("group", "leave_one_out") and config.advantage_scale != "tokens"
    return among_siblings and config.kl_coeff == 0 and config.entropy_coeff == 0


def without_idle(rows: Tensor, is_idle: Tensor) -> Tensor:
    """(p, G) row numbers -> those of the groups that have something to learn from.

    Where there is none, a single row. Its gradient is exactly 0, but it is there: without one AdamW would not step, and
    neither its momentum nor its weight decay would act.
    """
    group_numbers = rows[:, 0] // rows.shape[1]  # (p,)
    chosen = rows[~is_idle.to(rows.device)[group_numbers]]
    return chosen if len(chosen) else rows[:1, :1]


if __name__ == "__main__":
    with errors_explained():
        main(CONFIG, OPTIONS)
