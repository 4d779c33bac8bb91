"""AdamW and the learning rate of each of its steps."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from grpo.settings.config import Config


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW; weight decay only on matrices, never on biases and norms (which are 1-D)."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=True,
    )


def with_num_steps(config: Config, epoch_size: int) -> Config:
    """num_train_epochs in steps: as many as show every one of `epoch_size` samples so often."""
    if config.num_train_epochs is None:
        return config
    num_steps = math.ceil(config.num_train_epochs * epoch_size / config.batch_size)
    return dataclasses.replace(config, num_train_steps=num_steps)


# Factor on the learning rate against progress in [0, 1] after the warm-up; cosine and linear reach 0 at the end.
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate_at(config: Config, num_updates: int) -> float:
    """The rate of the next optimizer step after `num_updates` of them: linear warm-up, then `lr_schedule`.

    A function of the count alone, so a resumed run has nothing to restore. A rollout may give several optimizer steps.
    """
    last = config.num_train_steps * config.num_iterations * config.num_minibatches
    if num_updates < config.warmup_steps:
        return config.learning_rate * (num_updates + 1) / (config.warmup_steps + 1)
    progress = (num_updates - config.warmup_steps) / max(last - config.warmup_steps, 1)
    return config.learning_rate * LR_SCHEDULES[config.lr_schedule](min(progress, 1.0))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, num_updates: int) -> float:
    """Give the optimizer the rate of its next step, and return it."""
    rate = learning_rate_at(config, num_updates)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
