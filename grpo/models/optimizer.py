"""AdamW and its learning rate schedule."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from grpo.settings.config import Config


def make_optimizer(model: nn.Module, config: Config, critic: nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW for all trainable weights: first the groups of the model, then those of the critic (`set_learning_rate`).

    Weight decay acts on matrices only, not on biases and norms, which are 1-D.
    """
    groups = []
    for module in (model,) if critic is None else (model, critic):
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        groups += [
            {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
        ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def with_num_steps(config: Config, epoch_size: int) -> Config:
    """Convert num_train_epochs to num_train_steps: enough steps to draw `epoch_size` samples that many times."""
    if config.num_train_epochs is None:
        return config
    num_steps = math.ceil(config.num_train_epochs * epoch_size / config.batch_size)
    return dataclasses.replace(config, num_train_steps=num_steps)


# Factor on the learning rate as a function of progress in [0, 1] after the warm-up. cosine and linear end at 0.
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate_at(config: Config, num_updates: int, peak: float | None = None) -> float:
    """The learning rate after `num_updates` optimizer steps: linear warm-up to `peak`, then `lr_schedule`.

    The rate depends only on the number of optimizer steps, so a resumed run has no schedule state to restore. There may
    be several optimizer steps per rollout. `peak`: None = config.learning_rate.
    """
    peak = config.learning_rate if peak is None else peak
    last = config.num_train_steps * config.num_iterations * config.num_minibatches
    if num_updates < config.warmup_steps:
        return peak * (num_updates + 1) / (config.warmup_steps + 1)
    progress = (num_updates - config.warmup_steps) / max(last - config.warmup_steps, 1)
    return peak * LR_SCHEDULES[config.lr_schedule](min(progress, 1.0))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, num_updates: int) -> float:
    """Set the learning rate of the next optimizer step, and return the policy's rate.

    The first two groups of `make_optimizer` belong to the policy. Further groups belong to the critic, which may have a
    different peak rate (`critic_learning_rate`).
    """
    rate = learning_rate_at(config, num_updates)
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = rate if number < 2 else learning_rate_at(config, num_updates, config.critic_learning_rate)
    return rate
