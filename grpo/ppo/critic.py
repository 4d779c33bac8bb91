"""The critic: a second model that says, before each token, what the completion will earn.

Reading order: examples/train_ppo.py -> [grpo/ppo/critic.py] -> grpo/ppo/gae.py -> examples/train_ppo.py again

GRPO has none: the mean reward of a group stands for the value of its prompt, and all later texts get the same. Letters:
B completions, C padded completion length, H hidden size.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.logprobs import completion_states


class Critic(nn.Module):
    """A copy of the policy's trunk under a linear head: V = head(hidden state of the text so far).

    The trunk is its own. In a shared one the value loss would move the policy, by gradients that know nothing of the
    clip. The head starts at zero: before it has learned anything, everything is worth 0.
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
        """The value of the text before each completion token: (B, C) float32, units of the reward, 0 where masked.

        Before, not after: what V_t is compared with is what token t and its successors earn. Arguments as in
        `compute_logprobs`.
        """
        states = completion_states(self.trunk, prompt_ids, prompt_mask, completion_ids, completion_mask)  # (B, C, H)
        with torch.autocast(states.device.type, enabled=False):  # bfloat16 would round small differences away
            values = self.head(states.to(self.head.weight.dtype)).squeeze(-1)  # (B, C)
        return torch.where(completion_mask.bool(), values, 0.0)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, completion_mask: Tensor, *, value_clip_range: float
) -> Tensor:
    """Squared error of the critic per token, to be minimised (not yet weighted or summed).

        loss = 1/2 * max( (V - return)^2, (clip(V, V_old - c, V_old + c) - return)^2 ),    c = value_clip_range

    `max` is the worse of the two, as `min` is in the policy's clipped surrogate: once V has moved by c toward the
    return, the gradient stops; where it has moved away, it stays.

    Args:
        values: (B, C) of the critic being trained; carries the gradient.
        old_values: (B, C) of the critic at rollout time; no gradient.
        returns: (B, C) made of old_values; no gradient.
        completion_mask: (B, C), 1 = a token that is trained on.
        value_clip_range: c > 0, in units of the reward; inf = no clip.

    Returns:
        (B, C), exactly 0 where masked. Equals (V - return)^2 / 2 on the first update.

    Paper: OpenAI's baselines of "Proximal Policy Optimization Algorithms" (1707.06347), whose text has the plain square
    (eq. 9); "What Matters in On-Policy Reinforcement Learning?" (2006.05990) found no use in the clip.

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
    """(B, C) bool: where the clip takes the gradient away: V has moved by more than c toward the return.

    Arguments as in `clipped_value_loss`.
    """
    moved = values - old_values
    clipped_error = (old_values + moved.clamp(-value_clip_range, value_clip_range) - returns).abs()
    return completion_mask.bool() & (moved.abs() > value_clip_range) & (clipped_error > (values - returns).abs())


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, completion_mask: Tensor) -> float:
    """1 - Var(return - V) / Var(return) over unmasked tokens: 1 = foretold, 0 = no better than a constant.

    NaN where all returns are alike. Arguments as in `clipped_value_loss`.
    """
    is_token = completion_mask.bool()
    returns, errors = returns[is_token], (returns - values)[is_token]  # (N,)
    if len(returns) < 2 or returns.max() - returns.min() <= 1e-6 * returns.abs().max().clamp(min=1):
        return float("nan")
    return (1 - errors.var() / returns.var()).item()
