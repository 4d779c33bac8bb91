"""Hidden states -> log-probs and entropies. The LM head is applied to chunks of tokens, which saves memory.

Letters: N tokens to score, n of them in a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK = 2**25  # logits per chunk: 128 MB in float32, with about five copies in memory


class Head(NamedTuple):
    """The LM head: logits = x, or cap * tanh(x / cap) if there is a cap, with x = scale * (W h + b)."""

    weight: Tensor  # (V, H), may be tied to the embedding
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V), at least float32."""
        logits = functional.linear(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def log_probs(
        self, hidden: Tensor, targets: Tensor, temperature: float, *, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(N, H) hidden states, (N,) targets -> (N,) log-probs and entropies. Computes logits in chunks."""
        logps, entropies = _ChunkedHead.apply(
            hidden, self.weight, self.bias, targets, self.scale, self.cap, temperature, entropy_grad
        )
        return logps, entropies


def log_probs_and_entropies(
    logits: Tensor, targets: Tensor, temperature: float, *, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """(n, V) logits, (n,) targets -> (n,) log-probs and entropies. Entropies have a gradient only if entropy_grad."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    all_logps = torch.log_softmax(logits, dim=-1)  # (n, V)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_grad):
        lowest = -1e4  # exp(-1e4) is 0, so p log p and its gradient are 0, not NaN, where p = 0
        entropies = -(all_logps.exp() * all_logps.clamp(min=lowest)).sum(-1)
    return all_logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropies.clamp(min=0)


class _ChunkedHead(torch.autograd.Function):
    """Log-probs of targets and entropies from hidden states, computed for one chunk of tokens at a time.

        forward    z = logits / temperature,   logp = z[target] - logsumexp(z);   no tensor of size V is kept
        backward   dz = dlogp * (onehot(target) - softmax(z)), z is recomputed;   dh = dz W,   dW += dz^T h
                   if entropy_grad:   dz -= dH * p * (log p + H),   p = softmax(z)

    With the recomputation there are four matrix products instead of autograd's three. It saves several (N, V) tensors,
    gigabytes each with a vocabulary of 150,000.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        cap: float | None,
        temperature: float,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtype = matmul_dtype(hidden.dtype, hidden.device)
        ctx.scale, ctx.cap, ctx.temperature = scale, cap, temperature
        hidden = hidden.to(ctx.dtype)
        head = _cast(Head(weight, bias, scale, cap), ctx.dtype)
        parts = [
            log_probs_and_entropies(head.logits(h), y, temperature) for h, y in _chunks(len(weight), hidden, targets)
        ]
        logps, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, entropies if entropy_grad else None)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropies = ctx.saved_tensors
        head = _cast(Head(weight, bias, ctx.scale, ctx.cap), ctx.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # a frozen head needs no gradient
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        of_entropy = [] if entropies is None else [entropies, grad_entropies]
        for h, y, dlogp, dh, *entropy in _chunks(len(weight), hidden, targets, grad_logps, grad_hidden, *of_entropy):
            logits = head.logits(h)  # (n, V)
            dz = torch.softmax(logits / ctx.temperature, dim=-1)
            if entropy:
                value, slope = (part.unsqueeze(1) for part in entropy)  # (n, 1)
                factor = -dlogp.unsqueeze(1) - slope * (torch.log_softmax(logits / ctx.temperature, dim=-1) + value)
                dz.mul_(torch.where(dz > 0, factor, 0.0))  # 0 where p = 0, because 0 * log 0 would be NaN
            else:
                dz.mul_(-dlogp.unsqueeze(1))
            dz.scatter_add_(1, y.unsqueeze(1), dlogp.unsqueeze(1))
            dz.mul_(ctx.scale / ctx.temperature)
            if ctx.cap is not None:
                dz.mul_(1 - (logits / ctx.cap).square())  # derivative of tanh
            if grad_bias is not None:
                grad_bias += dz.sum(0)
            dz = dz.to(ctx.dtype)
            dh.copy_(dz @ head.weight)
            if grad_weight is not None and grad_weight.dtype == ctx.dtype:
                grad_weight.addmm_(dz.T, h)  # in place: adding a second (V, H) tensor would take as long
            elif grad_weight is not None:
                grad_weight += dz.T @ h
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a matrix product: autocast's dtype if autocast is enabled, else `dtype`."""
    is_cast = torch.is_autocast_enabled(device.type) and dtype != torch.float64
    return torch.get_autocast_dtype(device.type) if is_cast else dtype


def _cast(head: Head, dtype: torch.dtype) -> Head:
    """The head with its weight and bias cast to `dtype`, as autocast would do."""
    return head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))


def _chunks(vocab_size: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Split tensors of N rows into matching chunks, so that a chunk has at most CHUNK logits."""
    size = max(1, CHUNK // vocab_size)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
