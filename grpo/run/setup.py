"""Set-up of a run: check all input, then load data, rewards, models and optimizer.

`Setup` holds these objects. Its methods have the names of the functions that they call, and pass the settings to them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.batch import Batch, check_rewards_vary, one_per_row
from grpo.data import Dataset, Sample, samples_for_step
from grpo.datasets.mixture import load_datasets
from grpo.evaluation.greedy import Evaluation, evaluate_greedy
from grpo.evaluation.preflight import preflight
from grpo.fast.noise import step_seed
from grpo.logprobs import compute_logprobs
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
from grpo.models.optimizer import make_optimizer
from grpo.ppo.critic import Critic
from grpo.rewards.scores import Scores
from grpo.rewards.scoring import RewardsOf, check_mixture, score_mixture
from grpo.rollout import Rollout, generate_completions
from grpo.run.dry_run import describe, opening_line
from grpo.run.folder import RunFolder
from grpo.settings.config import Config, warn
from grpo.settings.sources import sources_of
from reward_model import load_rewards_of


@dataclass
class Setup:
    """Settings, models, data and rewards of a run. Letters: P prompts, B completions, C padded length, b of B rows."""

    config: Config
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel | None  # None if kl_coeff is 0; with LoRA the policy itself (adapter disabled)
    critic: Critic | None  # only in examples/train_ppo.py
    optimizer: torch.optim.AdamW
    train_set: Dataset
    eval_set: Dataset
    rewards: RewardsOf
    autocast: Callable[[], AbstractContextManager]
    eager: Callable[[], AbstractContextManager]  # disables torch.compile while sampling

    @property
    def extra_modules(self) -> Mapping[str, nn.Module]:
        """The models that training changes besides the policy. Checkpoints must include them."""
        modules: dict[str, nn.Module] = {} if self.critic is None else {"critic": self.critic}
        if self.reference is not None and self.config.ref_update_every:
            modules["reference"] = self.reference
        return modules

    def generate_completions(
        self, samples: Sequence[Sample], step: int, round: int = 0, places: Sequence[int] | None = None
    ) -> Rollout:
        """Sample a group of completions for each sample from the current policy.

        The noise is a function of (seed, step, resampling round, place). `places`: positions of the samples in the
        batch, each in 0 ... P - 1; None = the samples are the whole batch.
        """
        config = self.config
        numbers = torch.arange(config.batch_size * config.group_size).view(-1, config.group_size)  # (P, G)
        rows = numbers if places is None else numbers[list(places)]
        with self.autocast(), self.eager():
            return generate_completions(
                self.policy,
                self.tokenizer,
                [sample["prompt_ids"] for sample in samples],
                group_size=config.group_size,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                seed=step_seed(config.seed, step, round),
                completion_indices=rows.flatten().tolist(),
                **config.stop_kwargs,
            )

    def score_completions(self, samples: Sequence[Sample], rollout: Rollout) -> Scores:
        """The rewards of all completions of `rollout`. `samples`: one per group, or one per completion."""
        return score_mixture(
            self.rewards,
            one_per_row(samples, rollout),
            rollout.completions,
            rollout.token_lists(),
            combine=self.config.combine,
            per_token=self.critic is not None,
        )

    def sample_groups(self, step: int, round: int, places: Sequence[int]) -> Batch:
        """Dynamic sampling: repeat [1], [2] and [3] for some places of a step. `round` is 1, 2, ..."""
        config = self.config
        drawn = samples_for_step(self.train_set, step=step, batch_size=config.batch_size, seed=config.seed, round=round)
        samples = [drawn[place] for place in places]
        rollout = self.generate_completions(samples, step, round, places)
        return Batch(samples, rollout, self.score_completions(samples, rollout), config)

    def compute_logprobs(self, model: PreTrainedModel, rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(b, C) log-probs and entropies of these rows, at the sampling temperature."""
        with self.autocast():
            return compute_logprobs(
                model,
                *rollout.tokens(rows),
                temperature=self.config.temperature,
                group_size=self.config.group_size,
                shared_prefix=self.config.shared_prefix,
                entropy_grad=self.config.entropy_coeff > 0,
            )

    def old_logps(self, rollout: Rollout, plan: Sequence[Sequence[Tensor]]) -> Tensor:
        """(B, C) log-probs under the policy before the first optimizer step, with the update's micro-batches."""
        return self._fixed_logps(self.policy, rollout, plan)

    def ref_logps(self, rollout: Rollout, plan: Sequence[Sequence[Tensor]]) -> Tensor:
        """(B, C) log-probs under the frozen reference, with the update's micro-batches."""
        assert self.reference is not None
        with adapter_off(self.reference):
            return self._fixed_logps(self.reference, rollout, plan)

    @torch.no_grad()
    def _fixed_logps(self, model: PreTrainedModel, rollout: Rollout, plan: Sequence[Sequence[Tensor]]) -> Tensor:
        """(B, C) log-probs without gradient. Rows that are in no micro-batch are NaN."""
        micro_batches = list(chain.from_iterable(plan))
        parts = [self.compute_logprobs(model, rollout, rows)[0] for rows in micro_batches]
        table = parts[0].new_full(rollout.completion_ids.shape, torch.nan)
        return table.index_copy(0, torch.cat(micro_batches), torch.cat(parts))

    def update_reference(self, step: int) -> None:
        """Copy the policy to the reference every `ref_update_every` steps (the outer loop of the paper)."""
        every = self.config.ref_update_every
        if self.reference is not None and every and step % every == 0:
            self.reference.load_state_dict(self.policy.state_dict())

    def evaluate(self) -> Evaluation:
        """Evaluate greedy answers to the held-out problems."""
        batch_rows = self.config.batch_size * self.config.group_size
        with self.autocast(), self.eager():
            return evaluate_greedy(
                self.policy,
                self.tokenizer,
                self.eval_set,
                self.score_completions,
                batch_rows=batch_rows,
                **self.config.stop_kwargs,
            )


def set_up(folder: RunFolder) -> Setup | None:
    """Check all input, then load everything. Returns None for --dry_run and --preflight, which do not train.

    Raises:
        InputError: wrong input. Nothing has been trained or saved.
    """
    config = folder.config
    warn(config)
    device = choose_device(config.device)
    check_compile(config, device)
    autocast = make_autocast(config.dtype, device)
    rewards = load_rewards_of(sources_of(vars(config)), config.combine)
    skeleton, tokenizer = load_skeleton(config.model_name, chat_template=config.chat_template)
    check_trainable(skeleton, config, device)
    train_set, eval_set = load_datasets(config, tokenizer)
    for dataset in (train_set, eval_set):
        check_mixture(rewards, dataset, dataset.place)
        check_lengths(dataset, skeleton, config)
    config = folder.plan(train_set.epoch_size)
    if folder.options.dry_run:
        print(describe(config, skeleton, tokenizer, train_set))
        return None

    print(opening_line(config, device, writes=not folder.options.preflight))
    policy, tokenizer = load_policy(config.model_name, **loading_settings(config), device=device)
    make_trainable(policy, tokenizer, config)
    reference = make_reference(policy) if config.kl_coeff > 0 else None
    critic = Critic(policy) if config.advantage_baseline == "critic" else None
    if config.compile:
        compile_trunks(policy, reference)
        if critic is not None:
            critic.trunk.compile(dynamic=True)
    eager = uncompiled if config.compile else nullcontext
    optimizer = make_optimizer(policy, config, critic)
    policy.train()
    setup = Setup(
        config, policy, tokenizer, reference, critic, optimizer, train_set, eval_set, rewards, autocast, eager
    )
    if folder.checkpoint is None:
        is_ready = _look_at_first_groups(setup, only_look=folder.options.preflight)
        return setup if is_ready else None
    return setup


def _look_at_first_groups(setup: Setup, *, only_look: bool) -> bool:
    """The pre-flight: sample the first step's prompts from the base model, and print a report of the rewards."""
    config = setup.config
    samples = samples_for_step(setup.train_set, step=1, batch_size=config.batch_size, seed=config.seed)
    rollout = setup.generate_completions(samples, step=0)
    print(preflight(samples, rollout, setup.score_completions))
    if only_look:
        return False
    if config.max_resample_rounds > 0:
        batch = Batch(samples, rollout, setup.score_completions(samples, rollout), config)
        check_rewards_vary(batch, 0, setup.sample_groups)
    return True
