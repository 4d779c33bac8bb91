"""The critic: a second model that predicts, before each token, the rewards that the rest of the completion will get.

Reading order: examples/train_ppo.py -> [grpo/ppo/critic.py] -> grpo/ppo/gae.py -> examples/train_ppo.py again

GRPO has no critic. It uses the mean reward of a group as the value of the prompt and of every token after it.

Letters: B completions, C padded completion length, H hidden size.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.logprobs import completion_states


class Critic(nn.Module):
    """A copy of the policy's trunk with a linear head: V = head(hidden state of the text so far).

    Policy and critic share no weights. With a shared trunk, the gradient of the value loss would change the policy
    without the limits of the clip. The head starts at zero, so every value is 0 before training.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.trunk: PreTrainedModel = copy.deepcopy(policy.base_model)  # type: ignore[assignment]  # typed as any module
        self.head = nn.Linear(policy.config.get_text_config().hidden_size, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor:
        """The value of the text before each completion token: (B, C) float32, in units of the reward, 0 where masked.

        V_t is computed before token t because it predicts the rewards of token t and all later tokens. Arguments are
        those of `compute_logprobs`.
        """
        states = completion_states(self.trunk, prompt_ids, prompt_mask, completion_ids, completion_mask)  # (B, C, H)
        with torch.autocast(states.device.type, enabled=False):  # bfloat16 would lose small differences
            values = self.head(states.to(self.head.weight.dtype)).squeeze(-1)  # (B, C)
        return torch.where(completion_mask.bool(), values, 0.0)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, completion_mask: Tensor, *, value_clip_range: float
) -> Tensor:
    """Squared error of the critic per token, to be minimised (not yet weighted or summed).

        loss = 1/2 * max( (V - return)^2, (clip(V, V_old - c, V_old + c) - return)^2 ),    c = value_clip_range

    `max` takes the larger error, as `min` takes the worse objective in the clipped surrogate. If V has moved by more
    than c toward the return, the gradient is 0. If V has moved away from the return, the gradient remains.

    Args:
        values: (B, C) values of the critic being trained; carries the gradient.
        old_values: (B, C) values of the critic at rollout time; no gradient.
        returns: (B, C) targets, computed from rewards and old_values; no gradient.
        completion_mask: (B, C), 1 = a token that is trained on.
        value_clip_range: c > 0, in units of the reward; inf = no clip.

    Returns:
        (B, C), exactly 0 where masked. Equals (V - return)^2 / 2 on the first update.

    Paper: "Proximal Policy Optimization Algorithms" (1707.06347) eq. 9 has the squared error without a clip. The clip
    comes from the authors' code (OpenAI Baselines). "What Matters in On-Policy Reinforcement Learning?" (2006.05990)
    found no benefit of the clip.

    >>> values, zeros, ones = torch.tensor([[0.5, -0.5]]), torch.zeros(1, 2), torch.ones(1, 2)
    >>> clipped_value_loss(values, zeros, ones, ones, value_clip_range=0.2)
    tensor([[0.3200, 1.1250]])
    """
    is_token = completion_mask.bool()
    values, old_values, returns = (torch.where(is_token, x, 0.0) for x in (values, old_values, returns))
    clipped_values = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    return torch.max((values - returns).square(), (clipped_values - returns).square()) / 2


@torch.no_grad()
def clipped_values(
    values: Tensor, old_values: Tensor, returns: Tensor, completion_mask: Tensor, *, value_clip_range: float
) -> Tensor:
    """(B, C) bool: the tokens whose gradient the clip removes, because V has moved by more than c toward the return.

    Arguments are those of `clipped_value_loss`.
    """
    moved = values - old_values
    clipped_error = (old_values + moved.clamp(-value_clip_range, value_clip_range) - returns).abs()
    return completion_mask.bool() & (moved.abs() > value_clip_range) & (clipped_error > (values - returns).abs())


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, completion_mask: Tensor) -> float:
    """1 - Var(return - V) / Var(return) over unmasked tokens: 1 = perfect, 0 = no better than a constant.

    NaN if all returns are equal. Arguments are those of `clipped_value_loss`.
    """
    is_token = completion_mask.bool()
    returns, errors = returns[is_token], (returns - values)[is_token]  # (N,)
    if len(returns) < 2 or returns.max() - returns.min() <= 1e-6 * returns.abs().max().clamp(min=1):
        return float("nan")
    return (1 - errors.var() / returns.var()).item()
